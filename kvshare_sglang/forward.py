"""Copy cached KV into a prefill batch and run only the rows that must be computed. Root layer.

Requests stay, tokens shrink: the batch keeps its requests, but only the chosen tokens of each.
The attention backend alone sees each contiguous stretch of rows as a request of its own.
"""

import copy
import logging
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from kvshare_sglang import compat
from kvshare_sglang.cache import FuzzyRadixCache
from kvshare_sglang.errors import UnsupportedError
from kvshare_sglang.kernels import partial_attn, rope_shift
from kvshare_sglang.policy.gate import Decline
from kvshare_sglang.radix_fuzzy.reuse import thin_out
from kvshare_sglang.radix_fuzzy.types import Range, clip
from kvshare_sglang.report import Report
from kvshare_sglang.request import RequestReuse, reuse_of

logger = logging.getLogger(__name__)

# For measurement: every prefill runs all its rows through our own attention (see bench_ttft.py).
_ALL_ROWS = os.environ.get("KVSHARE_MEASURE_ALL_ROWS") == "1"

ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM")


class Copy(NamedTuple):
    """KV rows to copy: slots and positions on both sides, int64 [n] each."""

    src_slots: torch.Tensor
    dst_slots: torch.Tensor
    old_positions: torch.Tensor
    new_positions: torch.Tensor


def check_model(runner: Any, ctx: Any = None) -> None:
    """Raise UnsupportedError unless the model is one whose K can be re-rotated."""
    arch = (runner.model_config.hf_config.architectures or ["unknown"])[0]
    if arch not in ARCHITECTURES:
        raise UnsupportedError(f"the architecture {arch}", "--kvshare or the model")
    sliding = getattr(runner, "sliding_window_size", None)
    if (ctx is not None and (ctx.is_hybrid_swa or ctx.is_hybrid_ssm)) or sliding not in (None, -1):
        raise UnsupportedError("sliding-window and Mamba models", "--kvshare or the model")
    rotary = {id(layer.self_attn.rotary_emb) for layer in runner.model.model.layers}
    table = getattr(_rotary(runner), "cos_sin_cache", None)
    if len(rotary) != 1 or not isinstance(table, torch.Tensor):
        raise UnsupportedError("models without one RoPE table", "--kvshare or the model")
    # Copies address K and V as [slot, head, dim].
    if getattr(runner.token_to_kv_pool, "kv_cache_layout", "nhd") != "nhd":
        raise UnsupportedError("a KV cache with heads before tokens", "SGLANG_USE_HND_KVCACHE")


def _to(host: torch.Tensor, device: Any) -> torch.Tensor:
    """To the batch's device without waiting for it: only pinned memory is copied asynchronously."""
    if torch.device(device).type == "cpu":
        return host
    return host.pin_memory().to(device, non_blocking=True)


def _rotary(runner: Any) -> Any:
    return runner.model.model.layers[0].self_attn.rotary_emb


def _rope_table(rotary: Any, length: int) -> torch.Tensor:
    """cos and sin by position in fp32; recomputed where the model keeps them in less."""
    if rotary.cos_sin_cache.dtype == torch.float32:
        return rotary.cos_sin_cache
    table = getattr(rotary, "kvshare_table", None)
    if table is None or len(table) < length:
        table = rotary._compute_cos_sin_cache().to(rotary.cos_sin_cache.device, torch.float32)
        rotary.__dict__["kvshare_table"] = table
    return table


# ---- hooks -----------------------------------------------------------------------------------


def hook_init_new(
    original: Callable[..., Any], cls: type, batch: Any, runner: Any, **kw: Any
) -> Any:
    """AROUND ``ForwardBatch.init_new``: the batch is built, its inputs are on the device, and we
    are on the forward stream, behind every forward that wrote what we copy."""
    fb = original(cls, batch, runner, **kw)
    cache = getattr(batch, "tree_cache", None)
    if isinstance(cache, FuzzyRadixCache) and fb.forward_mode.is_extend():
        narrow(fb, batch, runner, cache)
    return fb


def hook_forward(original: Callable[..., Any], runner: Any, fb: Any, *args: Any, **kw: Any) -> Any:
    """AROUND ``ModelRunner.forward``: SGLang rebuilds the batch inside and drops what are no
    fields, so the rows are carried on the backend, for this call only."""
    backend = runner.attn_backend
    backend.kvshare_rows = getattr(fb, "kvshare_rows", None)
    try:
        return original(runner, fb, *args, **kw)
    finally:
        backend.kvshare_rows = None


def hook_can_run_graph(
    original: Callable[..., Any], graphs: Any, fb: Any, *args: Any, **kw: Any
) -> bool:
    """AROUND ``PrefillCudaGraphRunner.can_run_graph``: a captured graph runs every row."""
    if getattr(fb, "kvshare_rows", None) is not None:
        return False
    return bool(original(graphs, fb, *args, **kw))


def hook_init_attention_backends(result: Any, runner: Any, *args: Any, **kw: Any) -> None:
    """AFTER ``ModelRunner.init_attention_backends``: wrap what SGLang built."""
    wrap_backend(runner.attn_backend, runner)


# ---- the batch -------------------------------------------------------------------------------


def narrow(fb: Any, batch: Any, runner: Any, cache: FuzzyRadixCache) -> None:
    """Copy what the requests reuse and cut the batch down to the rows to compute.

    Changes ``fb`` and, through the KV pool, slots that the requests own. The rows stay on ``fb``
    as ``kvshare_rows``: for each request ascending ranges of positions, the last token included.
    """
    chunks = [
        Range(start, start + length)
        for start, length in zip(fb.extend_prefix_lens_cpu, fb.extend_seq_lens_cpu, strict=True)
    ]
    states = [reuse_of(req) for req in batch.reqs]
    every_row = [[chunk] for chunk in chunks]
    rows = [_rows_of(state, chunk) for state, chunk in zip(states, chunks, strict=True)]
    if _needs_every_row(fb, batch):
        rows = every_row
    if not on_cpu(runner):
        rows = thin_out(rows, limit=max(runner.max_running_requests, len(rows)))
    if _ALL_ROWS:
        fb.kvshare_rows = rows = every_row
    if rows != every_row and not _copy_and_cut(fb, runner, cache, states, chunks, rows):
        rows = every_row
    _count_rows(batch, chunks, rows, cache.report)
    for state, chunk in zip(states, chunks, strict=True):
        if state is None or state.plan is None:
            continue
        state.done = chunk.stop
        if chunk.stop >= state.plan.prompt_len:
            # The copy is enqueued on the forward stream, and whatever overwrites the sources
            # later is enqueued behind it.
            cache.unlock_sources(state)


def _needs_every_row(fb: Any, batch: Any) -> bool:
    """Whether any request of the batch has inputs or outputs by token that the cut would shift."""
    return (
        any(req.return_hidden_states for req in batch.reqs)
        or fb.input_embeds is not None
        or any(mm is not None for mm in fb.mm_inputs or ())
    )


def _rows_of(state: RequestReuse | None, chunk: Range) -> list[Range]:
    """The rows to compute in a chunk; all of it where nothing is reused."""
    if state is None or state.plan is None or chunk.start >= state.plan.prompt_len:
        return [chunk]
    rows = clip(state.plan.compute, start=chunk.start, stop=chunk.stop)
    if not rows or rows[-1].stop < chunk.stop:
        rows.append(Range(chunk.stop - 1, chunk.stop))  # a request without rows has no logits
    return rows


def _copy_and_cut(
    fb: Any,
    runner: Any,
    cache: FuzzyRadixCache,
    states: list[RequestReuse | None],
    chunks: list[Range],
    rows: list[list[Range]],
) -> bool:
    """Copy, then cut; False if the copy failed: then every row must run, which overwrites it."""
    started = time.perf_counter()
    sharing = [(i, state) for i, state in enumerate(states) if rows[i] != [chunks[i]] and state]
    try:
        parts = [_copy_part(state, chunks[i], fb, i) for i, state in sharing]
        part = Copy(*(torch.cat(side) for side in zip(*parts, strict=True)))
        if len(part.src_slots):
            copy_kv(runner, part)
    except Exception:
        logger.exception("KVShare copy failed; the batch runs all its rows")
        for _, state in sharing:
            cache.report.declined(Decline.FAULT)
            state.info["declined"] = Decline.FAULT.value
        return False
    num_all = int(fb.extend_num_tokens)
    cut_tokens(fb, rows, runner)
    cache.report.copied(
        time.perf_counter() - started,
        requests=len(sharing),
        copied=len(part.src_slots),
        rows=int(fb.extend_num_tokens),
        all_rows=num_all,
    )
    return True


def _count_rows(batch: Any, chunks: list[Range], rows: list[list[Range]], report: Report) -> None:
    """Report what each request of the batch really ran: planned rows and forced ones."""
    decoding = {id(req) for req in batch.decoding_reqs or ()}
    for req, ranges, chunk in zip(batch.reqs, rows, chunks, strict=True):
        state: RequestReuse | None = getattr(req, "kvshare", None)
        if state is None or id(req) in decoding:
            continue
        runs = state.plan.runs if state.plan else ()
        spans = tuple(Range(run.dst_start, run.dst_stop) for run in runs)
        computed = sum(r.num for r in ranges)
        copied = chunk.num - computed
        found = clip(spans, start=chunk.start, stop=chunk.stop)
        recomputed = sum(r.num for r in found) - copied
        state.info["computed_tokens"] += computed
        state.info["fuzzy_tokens"] += copied
        state.info["recomputed_tokens"] += recomputed
        report.ran(copied=copied, recomputed=recomputed, fresh=computed - recomputed)


def _copy_part(state: RequestReuse, chunk: Range, fb: Any, i: int) -> Copy:
    """What of a request's copies stands in its chunk; the request is the batch's ``i``-th."""
    assert state.plan is not None
    start, stop = chunk
    first = sum(fb.extend_seq_lens_cpu[:i])  # of this request, in the batch's tokens
    device = fb.out_cache_loc.device
    src, old, new = [], [], []
    base = 0
    for run in state.plan.copies:
        lo, hi = max(run.dst_start, start), min(run.dst_stop, stop)
        if lo < hi:
            src.append(state.src_slots[base + lo - run.dst_start : base + hi - run.dst_start])
            new.append(torch.arange(lo, hi))
            old.append(new[-1] - run.shift)
        base += run.length
    if not src:
        empty = torch.empty(0, dtype=torch.int64, device=device)
        return Copy(empty, empty, empty, empty)
    positions = _to(torch.cat(new), device)
    return Copy(
        src_slots=torch.cat(src),
        dst_slots=fb.out_cache_loc[first + positions - start],
        old_positions=_to(torch.cat(old), device),
        new_positions=positions,
    )


def copy_kv(runner: Any, rows: Copy) -> None:
    """Copy K and V of ``rows`` in every layer, K re-rotated, through the pool's own writer."""
    pool = runner.token_to_kv_pool
    rotary = _rotary(runner)
    table = _rope_table(rotary, runner.model_config.context_len)
    shift = rope_shift.plan_shift(table, rows.old_positions, rows.new_positions)
    for layer in runner.model.model.layers:
        attn = layer.self_attn.attn
        keys = _picked(pool.get_key_buffer(attn.layer_id), rows.src_slots)
        values = _picked(pool.get_value_buffer(attn.layer_id), rows.src_slots)
        keys = rope_shift.rotate_keys(keys, shift, is_neox=rotary.is_neox_style)
        pool.set_kv_buffer(attn, rows.dst_slots, keys, values)


def _picked(buffer: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """``buffer[slots]``, twice as fast on a CPU. Bytes for fp8, which not every device can pick."""
    if buffer.dtype.itemsize == 1:
        return buffer.view(torch.uint8).index_select(0, slots).view(buffer.dtype)
    return buffer.index_select(0, slots)


def cut_tokens(fb: Any, rows: list[list[Range]], runner: Any) -> None:
    """Keep only the tokens of ``rows`` in a batch; requests, and their last tokens, stay."""
    keep, counts, base = [], [], 0
    for ranges, start, length in zip(
        rows, fb.extend_prefix_lens_cpu, fb.extend_seq_lens_cpu, strict=True
    ):
        keep += [torch.arange(base + r.start - start, base + r.stop - start) for r in ranges]
        counts.append(sum(r.num for r in ranges))
        base += length
    device = fb.input_ids.device
    picked = _to(torch.cat(keep), device)
    for name in ("input_ids", "positions", "out_cache_loc"):
        setattr(fb, name, getattr(fb, name)[picked])
    if fb.extend_logprob_start_lens_cpu is not None:
        # A request with fewer rows asks for no prompt logprobs; the others keep their start.
        fb.extend_logprob_start_lens_cpu = [
            old if count == length else count
            for old, count, length in zip(
                fb.extend_logprob_start_lens_cpu, counts, fb.extend_seq_lens_cpu, strict=True
            )
        ]
    fb.extend_seq_lens_cpu = counts
    fb.extend_seq_lens = _to(torch.tensor(counts, dtype=torch.int32), device)
    fb.extend_start_loc = _starts(fb.extend_seq_lens)
    fb.extend_num_tokens = len(picked)
    compat.set_num_tokens(fb, len(picked))
    fb.kvshare_rows = rows
    if getattr(runner, "lora_manager", None) is not None:  # 0.5.17 has it with LoRA only
        # Its segments were laid out for all tokens when the batch was built.
        runner.lora_manager.prepare_lora_batch(fb)


def _starts(lengths: torch.Tensor) -> torch.Tensor:
    """Where each request's tokens start, in the dtype of ``lengths``."""
    return torch.cumsum(lengths, 0, dtype=lengths.dtype) - lengths


# ---- attention -------------------------------------------------------------------------------


def on_cpu(runner: Any) -> bool:
    return str(runner.device) == "cpu"


def runs_as_rows(fb: Any, rows: list[list[Range]]) -> Any:
    """A view of the batch in which every contiguous range of rows is a request of its own."""
    view = copy.copy(fb)
    device = fb.input_ids.device
    owner = torch.tensor([i for i, ranges in enumerate(rows) for _ in ranges])
    flat = [r for ranges in rows for r in ranges]
    starts, stops = [r.start for r in flat], [r.stop for r in flat]
    view.req_pool_indices = fb.req_pool_indices[_to(owner, device)]
    if getattr(fb, "req_pool_indices_cpu", None) is not None:
        view.req_pool_indices_cpu = fb.req_pool_indices_cpu[owner]
    view.batch_size = len(flat)
    view.seq_lens_cpu = torch.tensor(stops, dtype=torch.int64)
    view.seq_lens = _to(view.seq_lens_cpu.to(fb.seq_lens.dtype), device)
    view.seq_lens_sum = sum(stops)
    view.extend_prefix_lens_cpu = starts
    view.extend_seq_lens_cpu = [r.num for r in flat]
    view.extend_prefix_lens = _to(torch.tensor(starts, dtype=torch.int32), device)
    view.extend_seq_lens = _to(torch.tensor(view.extend_seq_lens_cpu, dtype=torch.int32), device)
    view.extend_start_loc = _starts(view.extend_seq_lens)
    return view


def wrap_backend(backend: Any, runner: Any) -> None:
    """Teach a backend that SGLang built to attend for partial batches; others run as before."""
    plan, attend = backend.init_forward_metadata, backend.forward_extend
    cpu = type(backend).__name__ == "TorchNativeAttnBackend"
    attn = runner.model.model.layers[0].self_attn.attn
    group = attn.tp_q_head_num // attn.tp_k_head_num
    backend.kvshare_rows = None
    backend.kvshare_plan = None

    def init_forward_metadata(fb: Any) -> Any:
        rows = backend.kvshare_rows
        if rows is None:
            backend.kvshare_plan = None
            return plan(fb)
        if cpu:
            # torch_native pads every row's queries to the full length: use our own attention.
            backend.kvshare_plan = _plan_cpu(backend, fb, rows, group)
            return plan(fb)
        backend.kvshare_plan = runs_as_rows(fb, rows)
        return plan(backend.kvshare_plan)

    def forward_extend(
        q: Any, k: Any, v: Any, layer: Any, fb: Any, save_kv_cache: bool = True, **kw: Any
    ) -> Any:
        if backend.kvshare_rows is None:
            return attend(q, k, v, layer, fb, save_kv_cache=save_kv_cache, **kw)
        pool = backend.token_to_kv_pool
        if save_kv_cache and k is not None:
            # Stored first, for all rows: later rows see what earlier rows wrote in this layer.
            k = k.view(-1, layer.tp_k_head_num, layer.qk_head_dim)
            v = v.view(-1, layer.tp_v_head_num, layer.v_head_dim)
            scales = (getattr(layer, "k_scale", None), getattr(layer, "v_scale", None))
            if any(scale is not None for scale in scales):
                k, v = k.clone(), v.clone()  # the pool divides by the scales in place
            pool.set_kv_buffer(layer, fb.out_cache_loc, k, v, *scales)
        if not cpu:
            return attend(q, k, v, layer, backend.kvshare_plan, save_kv_cache=False, **kw)
        out = partial_attn.run(
            backend.kvshare_plan,
            q.view(-1, layer.tp_q_head_num, layer.qk_head_dim),
            pool.get_key_buffer(layer.layer_id),
            pool.get_value_buffer(layer.layer_id),
            scaling=layer.scaling,
        )
        return out.flatten(1)

    backend.init_forward_metadata = init_forward_metadata
    backend.forward_extend = forward_extend


def _plan_cpu(
    backend: Any, fb: Any, rows: list[list[Range]], group: int
) -> list[partial_attn.RequestRows]:
    table = backend.req_to_token_pool.req_to_token
    positions = [torch.cat([torch.arange(*r) for r in ranges]) for ranges in rows]
    slots = [
        table[index, : int(at[-1]) + 1].long()
        for index, at in zip(fb.req_pool_indices.tolist(), positions, strict=True)
    ]
    return partial_attn.plan(list(zip(positions, slots, strict=True)), group=group)
