"""All that differs between the SGLang versions we serve.

0.5.17 keeps a request's KV row on the request itself and lets the cache free it
(``cache_finished_req``). From 0.5.18 on the row is ``req.kv`` and the scheduler frees it
(``insert_req``, ``free_kv_row``). From 0.5.22 on one call, ``checkpoint``, stores what a request
leaves, a request holds a lock object, and it keeps the length of its prefix, not the slots.
"""

import contextlib
import inspect
import os
from importlib import metadata
from typing import Any

import torch

from kvshare_sglang.errors import UnsupportedError

OLDEST = (0, 5, 17)
NEWEST = (0, 5, 23)
TRY = "KVSHARE_TRY_SGLANG"


def sglang_version() -> tuple[int, ...]:
    """Version of the SGLang that is imported, as numbers."""
    import sglang

    text = getattr(sglang, "__version__", None) or metadata.version("sglang")
    numbers = []
    for part in text.split(".")[:3]:
        digits = "".join(c for c in part if c.isdigit())
        numbers.append(int(digits or 0))
    return tuple(numbers)


def device_of(named: str | None) -> str:
    """The kind of device that a server runs on, ``named`` or the one that SGLang takes by itself;
    empty where it finds none, which it says itself."""
    if named:
        return str(named).partition(":")[0]
    from sglang.srt.utils import get_device

    try:
        return str(get_device()).partition(":")[0]
    except RuntimeError:
        return ""


def check_version() -> None:
    """Raise UnsupportedError for an SGLang outside the supported range.

    ``KVSHARE_TRY_SGLANG`` names one version that is let in all the same, to be tried: see
    scripts/next_sglang.sh.
    """
    have = sglang_version()
    if not OLDEST <= have <= NEWEST and os.environ.get(TRY) != ".".join(map(str, have)):
        lo, hi, mine = (".".join(map(str, v)) for v in (OLDEST, NEWEST, have))
        raise UnsupportedError(f"SGLang {mine}", f"it for a version in [{lo}, {hi}]")


def kv_row(req: Any) -> Any:
    """What holds ``req_pool_idx`` and ``cache_protected_len`` of a request."""
    return req.kv if hasattr(req.kv, "cache_protected_len") else req


def brings_embeddings(req: Any) -> bool:
    """Whether some of its tokens stand for others than they are: SGLang up to 0.5.21 caches what it
    computes of them under the tokens all the same."""
    return getattr(req, "positional_embed_overrides", None) is not None


def namespace(key: Any) -> tuple[Any, Any]:
    """What a key (RadixKey or Req) must share with a source: extra_key and cache_salt."""
    return key.extra_key, getattr(key, "cache_salt", None)


def knows_salts() -> bool:
    """Whether requests have a ``cache_salt``: from 0.5.18 on."""
    from sglang.srt.managers.io_struct import GenerateReqInput

    return "cache_salt" in GenerateReqInput.__dataclass_fields__


def salt_field() -> str:
    """Where a GenerateReqInput names whose text it may meet."""
    return "cache_salt" if knows_salts() else "extra_key"


def make_key(token_ids: Any, like: Any, *, extra_key: Any = None) -> Any:
    """A RadixKey in the namespace of ``like`` (a request), or under ``extra_key``."""
    from sglang.srt.mem_cache.radix_cache import RadixKey

    if extra_key is not None:
        return RadixKey(token_ids, extra_key)
    extra, salt = namespace(like)
    return RadixKey(token_ids, extra, cache_salt=salt) if salt else RadixKey(token_ids, extra)


def was_cut(adder: Any, req: Any) -> bool:
    """Whether a request that was admitted a moment ago gets only a part of its prompt now."""
    return adder.new_chunked_req is req


def full_batch() -> Any:
    """What ``PrefillAdder`` answers where a batch takes no more requests."""
    from sglang.srt.managers.schedule_policy import AddReqResult

    return AddReqResult.OTHER


def no_memory() -> Any:
    """What ``PrefillAdder`` answers where KV memory is short."""
    from sglang.srt.managers.schedule_policy import AddReqResult

    return AddReqResult.NO_TOKEN


def chunk_size() -> int | None:
    """Tokens that SGLang gives to prefill at a time, all requests together; None without chunks."""
    from sglang.srt.runtime_context import get_schedule

    chunk = get_schedule().chunked_prefill_size
    return chunk if chunk and chunk > 0 else None


def mixes_decodes() -> bool:
    """Whether requests that decode may share a batch with prefill."""
    from sglang.srt.runtime_context import get_schedule

    return bool(get_schedule().enable_mixed_chunk)


def set_num_tokens(fb: Any, num: int) -> None:
    """Tell a ForwardBatch how many tokens it has; 0.5.17 keeps the counts under shorter names."""
    prefix = "global_" if hasattr(fb, "global_num_token_non_padded_cpu") else ""
    setattr(fb, f"{prefix}num_token_non_padded_cpu", num)
    on_device = getattr(fb, f"{prefix}num_token_non_padded", None)
    if on_device is not None:
        on_device.fill_(num)


def run_model(runner: Any, fb: Any) -> Any:
    """The model's own forward pass over a batch whose attention is planned; nothing of SGLang's
    runners around it, so that a CUDA graph can record it."""
    from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

    takes = inspect.signature(forward_context).parameters
    of_batch = {"forward_batch": fb} if "forward_batch" in takes else {}
    eager = runner.eager_runner
    models = eager.model_context() if hasattr(eager, "model_context") else contextlib.nullcontext()
    with models, forward_context(ForwardContext(attn_backend=runner.attn_backend), **of_batch):
        return runner.model.forward(fb.input_ids, fb.positions, fb)


def prefill_once(scheduler: Any, ids: Any) -> torch.Tensor:
    """Logits [vocab] after a prompt, by one prefill that nobody else sees: it reads nothing from
    the cache and leaves nothing. As SGLang's own ``benchmark/one_batch.py`` runs a batch. The
    scheduler must be idle; raises what allocation and the model raise, with all given back."""
    from array import array

    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.sampling.sampling_params import SamplingParams

    runner, pool = scheduler.tp_worker.model_runner, scheduler.req_to_token_pool
    allocator = scheduler.token_to_kv_pool_allocator
    params = SamplingParams(temperature=0, max_new_tokens=1)
    req = Req("kvshare-shadow", "", array("q", ids), params)
    req.full_untruncated_fill_ids, req.logprob_start_len = req.origin_input_ids, -1
    if hasattr(req, "prefix_len"):
        req.extend_end = len(ids)
    else:
        req.set_extend_range(0, len(ids))
    batch = ScheduleBatch.init_new(
        reqs=[req],
        req_to_token_pool=pool,
        token_to_kv_pool_allocator=allocator,
        tree_cache=scheduler.tree_cache,
        model_config=runner.model_config,
        enable_overlap=False,
        spec_algorithm=scheduler.spec_algorithm,
    )
    try:
        batch.prepare_for_extend()
        if batch.input_ids is None:
            batch.input_ids = batch.prefill_input_ids_cpu.to(batch.device)
            batch.prefill_input_ids_cpu = None
        fb = ForwardBatch.init_new(batch, runner, return_hidden_states_before_norm=False)
        logits: torch.Tensor = runner.forward(fb).logits_output.next_token_logits[0].clone()
        return logits
    finally:
        row = kv_row(req).req_pool_idx
        if row is not None:
            # Where slots ran short there are none; what is in the row is then another's.
            slots = pool.req_to_token[row, : getattr(req.kv, "kv_allocated_len", 0)]
            allocator.free_segments([(slots.to(torch.int64), 0)])
            pool.free(req)


def is_updating_weights(updater: Any) -> bool:
    """Whether a session of weight updates is open, in which weights may be half written. There are
    such from 0.5.21 on."""
    return getattr(updater, "_session", None) is not None


def resolved(server_args: Any) -> Any:
    """Settings with what SGLang makes of them, which from 0.5.21 on it writes beside them."""
    try:
        from sglang.srt.arg_groups.overrides import resolved_view
    except ImportError:
        return server_args
    return resolved_view(server_args)


# ---- requests and caches, before and from 0.5.22 on -------------------------------------------


def prefix_len(req: Any) -> int:
    """How many tokens of a request were found in the tree."""
    return req.prefix_len if hasattr(req, "prefix_len") else len(req.prefix_indices)


def not_yet_given(req: Any) -> int:
    """Tokens of a prompt in chunks that no chunk has had."""
    given = req.extend_end if hasattr(req, "extend_end") else req.extend_range
    if given is None:  # retracted a moment ago
        return 0
    return max(0, len(req.full_untruncated_fill_ids) - getattr(given, "end", given))


def insert_params(key: Any, value: Any, req: Any, *, chunked: bool) -> Any:
    """InsertParams for what ``req`` leaves in the tree; its own tokens count as no new hit."""
    from sglang.srt.mem_cache.base_prefix_cache import InsertParams

    row = kv_row(req)
    if hasattr(row, "cache_inserted_len"):
        hits = {"inserted_len": row.cache_inserted_len}
        row.cache_inserted_len = max(row.cache_inserted_len, len(key))
    else:
        hits = {"chunked": chunked}
    return InsertParams(key=key, value=value, priority=getattr(req, "priority", 0) or 0, **hits)


def path_slots(cache: Any, match: Any) -> Any:
    """The slots [n] of a match; valid until the next eviction unless its path is locked."""
    if hasattr(match, "device_indices"):
        return match.device_indices
    return cache.path_device_indices(match.last_device_node)


def match_len(match: Any) -> int:
    """How many tokens a match covers."""
    if hasattr(match, "device_prefix_len"):
        return match.device_prefix_len
    return len(match.device_indices)


def stepped_over(cache: Any, match: Any, node: Any, length: int) -> Any:
    """``match``, led on to ``node``, where it covers ``length`` tokens."""
    nodes = {"last_device_node": node, "last_host_node": node, "best_match_node": node}
    if hasattr(match, "device_prefix_len"):
        return match._replace(device_prefix_len=length, **nodes)
    values = []
    at = node
    while at is not cache.root_node:
        values.append(at.value)
        at = at.parent
    return match._replace(device_indices=torch.cat(values[::-1]), **nodes)


def move_lock(cache: Any, req: Any, node: Any, slots: Any) -> None:
    """Lock ``node`` for a request in place of its last node; ``slots`` [n] are those of all its
    tokens so far, which a request keeps up to 0.5.21."""
    if hasattr(req, "lock"):
        cache.unlock(req.lock)
        req.lock = cache.lock(node)
    else:
        cache.dec_lock_ref(req.last_node)
        cache.inc_lock_ref(node)
        req.prefix_indices = slots
    req.last_node = node
