"""What we change in SGLang and what we rely on, by version, and the check that it is there.

``WRAPPED``: functions that ours wrap; ``DOORS``: those that take requests and write answers, whose
models ``ANSWERS`` get a field. ``OVERRIDDEN``: methods of SGLang's cache and attention
backends that our classes define anew, the private ones included. ``ATTRIBUTES``: what its objects
carry for us, one attribute each. ``FIELDS``: fields of its batches that we read or cut. ``USED``:
what else of its insides we call, rebind or write; calls of its cache's and pools' public methods
are not listed. Decoder layers get torch's own forward pre-hooks, once an
observer narrows a batch (``attention.py``).
"""

import importlib
import inspect
import pkgutil
from typing import Any, NamedTuple

from kvshare_sglang.errors import SeamError
from kvshare_sglang.runtime import versions

BACKEND = "kvshare"  # our name among --radix-cache-backend
ALWAYS = ((0, 0, 0), (9, 9, 9))
UP_TO_0_5_17 = ((0, 0, 0), (0, 5, 17))
FROM_0_5_18 = ((0, 5, 18), (9, 9, 9))
FROM_0_5_18_TO_21 = ((0, 5, 18), (0, 5, 21))
FROM_0_5_21 = ((0, 5, 21), (9, 9, 9))
UP_TO_0_5_21 = ((0, 0, 0), (0, 5, 21))
FROM_0_5_22 = ((0, 5, 22), (9, 9, 9))


class HookPoint(NamedTuple):
    """A function of SGLang that ``ours`` (``module:function``) wraps."""

    target: str
    kind: str  # a name of sglang's HookType
    ours: str
    why: str
    versions: tuple[tuple[int, ...], tuple[int, ...]] = ALWAYS


class Override(NamedTuple):
    """A method of SGLang's class ``owner`` that a class of ours defines anew."""

    owner: str
    name: str
    versions: tuple[tuple[int, ...], tuple[int, ...]] = ALWAYS


class Used(NamedTuple):
    """A name of SGLang's that we call, rebind or write; ``by_init``: not on the class, but set on
    each object."""

    owner: str
    name: str
    why: str
    by_init: bool = False
    versions: tuple[tuple[int, ...], tuple[int, ...]] = ALWAYS


class Attribute(NamedTuple):
    """What an object of SGLang's carries for us; ``holds`` is its type."""

    owner: str
    name: str
    holds: str


_SRT = "sglang.srt"
# In every process, kvshare on or off: without --kvshare they change nothing but the flags.
FLAGS = (
    HookPoint(
        f"{_SRT}.server_args.ServerArgs.add_cli_args",
        "AROUND",
        "kvshare_sglang.runtime.launch:hook_add_cli_args",
        "the flags",
    ),
    HookPoint(
        f"{_SRT}.server_args.ServerArgs.from_cli_args",
        "AROUND",
        "kvshare_sglang.runtime.launch:hook_from_cli_args",
        "their values",
    ),
    HookPoint(
        f"{_SRT}.server_args.prepare_server_args",
        "AFTER",
        "kvshare_sglang.runtime.launch:hook_prepare_server_args",
        "refuse ports that are taken",
    ),
    HookPoint(
        f"{_SRT}.server_args.ServerArgs.check_server_args",
        "AROUND",
        "kvshare_sglang.runtime.launch:hook_check_server_args",
        "before processes start, whoever built the ServerArgs",
    ),
)
# Only with --kvshare.
WRAPPED = (
    HookPoint(
        f"{_SRT}.sampling.sampling_params.SamplingParams.verify",
        "AFTER",
        "kvshare_sglang.runtime.scheduler:hook_verify",
        "refuse bad request options, and parameters that end the server",
    ),
    HookPoint(
        f"{_SRT}.managers.scheduler.validate_input_length",
        "AFTER",
        "kvshare_sglang.runtime.scheduler:hook_validate_input_length",
        "refuse what ends the server, through whatever front end it came",
    ),
    HookPoint(
        f"{_SRT}.managers.scheduler.Scheduler._add_request_to_queue",
        "AROUND",
        "kvshare_sglang.runtime.scheduler:hook_add_request_to_queue",
        "the same of what is known of a request later than its length",
    ),
    HookPoint(
        f"{_SRT}.managers.schedule_policy.PrefillAdder.add_one_req",
        "AROUND",
        "kvshare_sglang.runtime.scheduler:hook_add_one_req",
        "match a request, lock its sources, admit it",
    ),
    HookPoint(
        f"{_SRT}.managers.schedule_policy.SchedulePolicy.calc_priority",
        "AROUND",
        "kvshare_sglang.runtime.scheduler:hook_calc_priority",
        "order the waiting queue",
    ),
    HookPoint(
        f"{_SRT}.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
        ".flush_cache_after_weight_update",
        "AROUND",
        "kvshare_sglang.runtime.scheduler:hook_new_weights",
        "nothing that other weights made is copied or stepped into",
    ),
    HookPoint(
        f"{_SRT}.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
        ".end_weight_update",
        "AROUND",
        "kvshare_sglang.runtime.scheduler:hook_end_weight_update",
        "nor what was made before weights were written past SGLang",
        FROM_0_5_21,
    ),
    HookPoint(
        f"{_SRT}.managers.scheduler.Scheduler.__init__",
        "AROUND",
        "kvshare_sglang.runtime.launch:hook_start_scheduler",
        "a start that fails there says why in one line",
    ),
    HookPoint(
        f"{_SRT}.managers.scheduler.Scheduler.on_idle",
        "AROUND",
        "kvshare_sglang.runtime.shadow:hook_on_idle",
        "index what answers left, once they are sent; run exact twins",
    ),
    HookPoint(
        f"{_SRT}.managers.scheduler.Scheduler.set_internal_state",
        "AROUND",
        "kvshare_sglang.runtime.shadow:hook_set_internal_state",
        "switch reuse on and off",
    ),
    HookPoint(
        f"{_SRT}.managers.scheduler.Scheduler.run_event_loop",
        "AROUND",
        "kvshare_sglang.runtime.stream:hook_run_event_loop",
        "tell routers what is cached",
    ),
    HookPoint(
        f"{_SRT}.model_executor.forward_batch_info.ForwardBatch.init_new",
        "AROUND",
        "kvshare_sglang.runtime.forward:hook_init_new",
        "copy KV and keep only the rows to compute",
    ),
    HookPoint(
        f"{_SRT}.model_executor.model_runner.ModelRunner.init_attention_backends",
        "AFTER",
        "kvshare_sglang.runtime.forward:hook_init_attention_backends",
        "let attention serve some rows of a batch",
    ),
    HookPoint(
        f"{_SRT}.model_executor.model_runner.ModelRunner.forward",
        "AROUND",
        "kvshare_sglang.runtime.forward:hook_forward",
        "hand the rows to attention; passes before and after",
    ),
    HookPoint(
        f"{_SRT}.model_executor.model_runner.ModelRunner.sample",
        "AROUND",
        "kvshare_sglang.runtime.forward:hook_sample",
        "settle tokens in doubt before they are taken",
    ),
    HookPoint(
        f"{_SRT}.model_executor.runner.prefill_cuda_graph_runner"
        ".PrefillCudaGraphRunner.can_run_graph",
        "AROUND",
        "kvshare_sglang.runtime.forward:hook_can_run_graph",
        "no graph replay for a partial batch",
    ),
    HookPoint(
        f"{_SRT}.model_executor.runner.decode_cuda_graph_runner"
        ".DecodeCudaGraphRunner.can_run_graph",
        "AROUND",
        "kvshare_sglang.runtime.forward:hook_can_run_graph",
        "no graph replay where attention is observed",
    ),
)
# Where requests come in: the launcher, and each tokenizer worker that it has.
_PROTOCOL = f"{_SRT}.entrypoints.openai.protocol"
_USAGE = f"{_SRT}.entrypoints.openai.usage_processor.UsageProcessor"
_ANTHROPIC = f"{_SRT}.entrypoints.anthropic"
_OLLAMA = f"{_SRT}.entrypoints.ollama.protocol"
_OLLAMAS = tuple(
    f"Ollama{what}{how}Response" for what in ("Chat", "Generate") for how in ("", "Stream")
)
DOORS = (
    HookPoint(
        f"{_SRT}.managers.tokenizer_manager.TokenizerManager.generate_request",
        "AROUND",
        "kvshare_sglang.runtime.doors:hook_generate_request",
        "read the headers, refuse bad options, see what was reused",
    ),
    HookPoint(
        f"{_SRT}.managers.tokenizer_manager.TokenizerManager._create_tokenized_object",
        "AFTER",
        "kvshare_sglang.runtime.doors:hook_tokenized",
        "refuse what ends the scheduler",
    ),
    *(
        HookPoint(target, "AFTER", "kvshare_sglang.runtime.doors:hook_answer", "show the record")
        for target in (
            f"{_USAGE}.calculate_response_usage",
            f"{_USAGE}.calculate_streaming_usage",
            f"{_PROTOCOL}.ResponsesResponse.from_request",
            f"{_ANTHROPIC}.serving._anthropic_usage_from_openai",
        )
    ),
    HookPoint(
        f"{_SRT}.entrypoints.openai.serving_base.OpenAIServingBase._compute_extra_key",
        "AROUND",
        "kvshare_sglang.runtime.doors:hook_compute_extra_key",
        "no tenant's salt and key read as another's",
        UP_TO_0_5_17,
    ),
    *(
        HookPoint(
            f"{_OLLAMA}.{name}.__init__",
            "AFTER",
            "kvshare_sglang.runtime.doors:hook_ollama_answer",
            "show the record",
        )
        for name in _OLLAMAS
    ),
)
# Models of answers that must take a field of ours, by the module that holds them.
ANSWERS = (
    (_PROTOCOL, ("UsageInfo", "ResponsesResponse")),
    (f"{_ANTHROPIC}.protocol", ("AnthropicUsage",)),
    (_OLLAMA, _OLLAMAS),
)
_ROTARY = f"{_SRT}.layers.rotary_embedding.base.RotaryEmbedding"
_REQ = f"{_SRT}.managers.schedule_batch.Req"
_KV = f"{_SRT}.managers.schedule_batch.ReqKvInfo"
_ADDER = f"{_SRT}.managers.schedule_policy.PrefillAdder"
_RADIX = f"{_SRT}.mem_cache.radix_cache.RadixCache"
_BATCH = f"{_SRT}.model_executor.forward_batch_info.ForwardBatch"
_BACKEND = f"{_SRT}.layers.attention.base_attn_backend.AttentionBackend"
OVERRIDDEN = (
    *(
        Override(_RADIX, name)
        for name in (
            "reset",
            "match_prefix",
            "_insert_helper",
            "_split_node",
            "_delete_leaf",
            "evict",
        )
    ),
    Override(_RADIX, "cache_finished_req", UP_TO_0_5_17),
    Override(_RADIX, "cache_unfinished_req", UP_TO_0_5_21),
    Override(_RADIX, "insert_req", FROM_0_5_18_TO_21),
    Override(_RADIX, "checkpoint", FROM_0_5_22),
    Override(_RADIX, "on_release", FROM_0_5_18),
    *(
        Override(_BACKEND, name)
        for name in ("init_forward_metadata", "forward_extend", "forward_decode")
    ),
)
ATTRIBUTES = (
    Attribute(f"{_SRT}.managers.schedule_batch.Req", "kvshare", "RequestReuse"),
    Attribute(f"{_SRT}.mem_cache.radix_cache.TreeNode", "kvshare", "NodeNote"),
    Attribute(_BATCH, "kvshare", "BatchReuse"),
    Attribute(_BATCH, "kvshare_shadow", "Callable"),
    Attribute(_BATCH, "kvshare_doubts", "Doubts"),
    Attribute(_BACKEND, "kvshare", "BackendReuse"),
    Attribute(_ADDER, "kvshare", "int"),
    Attribute(f"{_SRT}.server_args.ServerArgs", "_kvshare", "KVShareConfig"),
    *(
        Attribute(f"{module}.{name}", "kvshare", "list")
        for module, names in ANSWERS
        for name in names
    ),
    Attribute(_ROTARY, "kvshare_table", "torch.Tensor"),
    Attribute(f"{_SRT}.model_executor.model_runner.ModelRunner", "kvshare_copier", "tuple"),
)
USED = (
    Used(
        f"{_SRT}.server_args.ServerArgs",
        "get_tokenizer_worker_class",
        "set on the object: called in each tokenizer worker, which loads no plug-ins",
    ),
    Used(f"{_SRT}.entrypoints.http_server", "app", "wrapped: bad headers are a 400"),
    Used(f"{_SRT}.entrypoints.engine.Engine", "server_args_class", "rebound: Engine(kvshare=True)"),
    Used(f"{_SRT}.utils", "get_device", "called: which budget a calibration says"),
    Used(_ROTARY, "_compute_cos_sin_cache", "called: cos and sin in fp32"),
    *(
        Used(_REQ, name, "written: blended tokens are not cached ones", True)
        for name in ("already_computed", "cached_tokens_device", "_cache_breakdown_computed")
    ),
    *(
        Used(_ADDER, name, "written: blended tokens are not cached ones", True)
        for name in ("log_hit_tokens", "reprocessed_log_hit_tokens")
    ),
    Used(_RADIX, "_match_prefix_helper", "called: walk a blended branch"),
    Used(_ROTARY, "_ensure_cos_sin_cache_length", "called: as many rows as the model's own"),
    Used(_REQ, "customized_info", "written: the answer's record", True),
    Used(_REQ, "retracted_stain", "read: a prefix hit of the second time", True),
    Used(_REQ, "last_node", "written: moved with the lock", True),
    Used(_REQ, "lock", "written: moved to the exact part", True, FROM_0_5_22),
    Used(_REQ, "prefix_indices", "written: slots so far", True, UP_TO_0_5_21),
    Used(_REQ, "prefix_len", "read: the prefix hit", True, FROM_0_5_22),
    Used(_REQ, "cache_protected_len", "written: what the tree owns", True, UP_TO_0_5_17),
    Used(_KV, "cache_protected_len", "written: what the tree owns", False, FROM_0_5_18),
    Used(_KV, "kv_allocated_len", "read: what a twin took"),
    Used(_KV, "cache_inserted_len", "written: what was inserted", False, FROM_0_5_22),
    Used(f"{_SRT}.mem_cache.radix_cache.TreeNode", "last_access_time", "written: a copy", True),
    Used(_RADIX, "eviction_strategy", "written: by frequency", True),
    Used(f"{_SRT}.mem_cache.radix_cache.TreeNode", "lock_ref", "written: sources are held", True),
    Used(_RADIX, "inc_lock_ref", "sets protected_size_ and evictable_size_, written for sources"),
    Used(_RADIX, "_update_leaf_status", "called: sources are held"),
    Used(_ADDER, "rem_chunk_tokens", "written: rows are charged", True),
    Used(_ADDER, "rem_input_tokens", "written: rows are charged", True),
    Used(_ADDER, "rem_total_tokens", "read: how many finished turns are given back"),
    Used(f"{_SRT}.managers.schedule_batch.ScheduleBatch", "prepare_for_extend", "called: a twin"),
    Used(f"{_SRT}.managers.schedule_batch.Req", "set_finish_with_abort", "called: to refuse"),
    Used(f"{_SRT}.managers.scheduler.Scheduler", "is_fully_idle", "called: may a twin run"),
    Used(
        f"{_SRT}.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager",
        "offload_tags",
        "read: may a twin run",
        True,
    ),
    Used(
        f"{_SRT}.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager",
        "_session",
        "read: whether weights may have been written; may a twin run",
        versions=FROM_0_5_21,
    ),
    Used(f"{_SRT}.runtime_context", "get_schedule", "called: the chunk size"),
    *(
        Used(f"{_SRT}.sampling.sampling_batch_info.SamplingBatchInfo", name, "called: margins")
        for name in ("update_regex_vocab_mask", "apply_logits_bias")
    ),
    *(
        Used(_REQ, name, "read: has the answer ended", True)
        for name in ("eos_token_ids", "tokenizer")
    ),
    Used(
        f"{_SRT}.managers.scheduler.Scheduler",
        "init_running_status",
        "sets waiting_queue, running_batch, cur_batch_for_debug and chunked_req, read for routers",
    ),
)
# What ``batch.py`` and ``prefill.py`` read and cut of a ForwardBatch.
FIELDS = (
    *("input_ids", "positions", "out_cache_loc", "req_pool_indices", "seq_lens", "seq_lens_cpu"),
    *("extend_num_tokens", "extend_seq_lens", "extend_seq_lens_cpu", "extend_prefix_lens"),
    *("extend_prefix_lens_cpu", "extend_start_loc", "extend_logprob_start_lens_cpu"),
    *("batch_size", "forward_mode", "orig_seq_lens", "return_logprob", "rids", "input_embeds"),
    "sampling_info",
    *("mm_inputs", "seq_lens_sum", "top_logprobs_nums", "token_ids_logprobs"),
)


def register(points: tuple[HookPoint, ...]) -> None:
    """Wrap the functions; safe to call again."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for point in filter(is_here, points):
        known = [hook for _, hook, _ in HookRegistry._hooks.get(point.target, ())]
        ours = _resolve(point.ours)
        if ours not in known:
            HookRegistry.register(point.target, ours, HookType[point.kind])
    HookRegistry.apply_hooks()


def check(points: tuple[HookPoint, ...] = (*FLAGS, *WRAPPED)) -> None:
    """Raise SeamError naming every touch that is not there at this moment."""
    if gone := missing(points):
        raise SeamError(gone)


def missing(points: tuple[HookPoint, ...] = (*FLAGS, *WRAPPED)) -> list[str]:
    """Touches of this SGLang's version that are not there: functions that ours do not wrap,
    methods and fields that are gone, attributes whose names SGLang took."""
    gone = [point.target for point in points if not applied(point)]
    gone += [
        f"{one.owner}.{one.name}"
        for one in OVERRIDDEN
        if is_here(one) and _find(one.owner, one.name) is None
    ]
    gone += [
        f"{one.owner}.{one.name} (SGLang has one of its own)"
        for one in ATTRIBUTES
        if hasattr(_resolve_name(one.owner), one.name)
    ]
    gone += [f"{one.owner}.{one.name}" for one in USED if is_here(one) and not is_there(one)]
    batch = _find(*_BATCH.rsplit(".", 1))
    bases = batch.__mro__ if batch else ()
    names = {name for base in bases for name in inspect.get_annotations(base)}
    return gone + [f"{_BATCH}.{name}" for name in FIELDS if name not in names]


def applied(point: HookPoint) -> bool:
    """Whether the live function has ours in its chain of wrappers, or is none of this version's.

    SGLang's registry logs and continues when a target is gone, so we look at the function itself.
    """
    if not is_here(point):
        return True
    found = _find(*point.target.rsplit(".", 1))
    if found is None:
        return False
    ours = _resolve(point.ours)
    found = getattr(found, "__func__", found)
    while found is not None:
        cells = getattr(found, "__closure__", None) or ()
        if any(cell.cell_contents is ours for cell in cells):
            return True
        found = getattr(found, "__wrapped__", None)
    return False


def _find(owner: str, name: str) -> Any:
    """The attribute of a module or class, or None."""
    return getattr(_resolve_name(owner), name, None)


def is_here(one: HookPoint | Override | Used) -> bool:
    """Whether it is about the SGLang version that runs."""
    return one.versions[0] <= versions.sglang_version() <= one.versions[1]


def is_there(one: Used) -> bool:
    """Whether this SGLang has the name."""
    cls = _resolve_name(one.owner)
    if not one.by_init:
        return hasattr(cls, one.name)
    return cls is not None and one.name in cls.__init__.__code__.co_names


def _resolve_name(path: str) -> Any:
    """The module or class, or None."""
    try:
        return pkgutil.resolve_name(path)
    except (ImportError, AttributeError):
        return None


def _resolve(path: str) -> Any:
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)
