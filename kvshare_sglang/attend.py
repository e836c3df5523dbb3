"""Keep some tokens of a prefill batch, and attend for them on SGLang's backends. Root layer.

Requests stay, tokens shrink: the batch keeps its requests, but only the chosen tokens of each.
The attention backend alone sees each contiguous stretch of rows as a request of its own.
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from kvshare_sglang import check, compat
from kvshare_sglang.copying import to_device
from kvshare_sglang.kernels import partial_attn
from kvshare_sglang.policy.rows import as_ranges
from kvshare_sglang.radix_fuzzy.reuse import thin_out
from kvshare_sglang.radix_fuzzy.types import Range

# What a batch carries for its forward pass, beside SGLang's fields, and the backend during it:
# rows: what runs, by request. look: a Look, called in the layer that it names.
# check: what a check layer narrows.
CARRIED = ("kvshare_rows", "kvshare_look", "kvshare_check")

_COUNTS = ("global_num_token_non_padded", "num_token_non_padded")

Rows = list[list[Range]]  # by request: ascending ranges of prompt positions


def on_cpu(runner: Any) -> bool:
    return str(runner.device) == "cpu"


def few_enough(rows: Rows, runner: Any) -> Rows:
    """The rows in no more stretches than the attention backend has room for."""
    if on_cpu(runner):
        return rows
    return thin_out(rows, limit=max(runner.max_running_requests, len(rows)))


def cut_tokens(fb: Any, have: Rows, rows: Rows, runner: Any) -> torch.Tensor:
    """Of a batch that runs ``have`` keep only the tokens of ``rows``; requests, and their last
    tokens, stay. Returns what was kept, as indices into the batch's tokens."""
    keep, counts, base = [], [], 0
    for old, new in zip(have, rows, strict=True):
        keep.append(base + _places(old, new))
        counts.append(len(keep[-1]))
        base += sum(r.num for r in old)
    device = fb.input_ids.device
    picked = to_device(torch.cat(keep), device)
    for name in ("input_ids", "positions", "out_cache_loc"):
        setattr(fb, name, getattr(fb, name)[picked])
    if fb.extend_logprob_start_lens_cpu is not None:
        # A request with fewer rows asks for no prompt logprobs; the others keep their start.
        fb.extend_logprob_start_lens_cpu = [
            start if count == length else count
            for start, count, length in zip(
                fb.extend_logprob_start_lens_cpu, counts, fb.extend_seq_lens_cpu, strict=True
            )
        ]
    fb.extend_seq_lens_cpu = counts
    fb.extend_seq_lens = to_device(torch.tensor(counts, dtype=torch.int32), device)
    fb.extend_start_loc = _starts(fb.extend_seq_lens)
    fb.extend_num_tokens = len(picked)
    compat.set_num_tokens(fb, len(picked))
    fb.kvshare_rows = rows
    if getattr(runner, "lora_manager", None) is not None:  # 0.5.17 has it with LoRA only
        # Its segments were laid out for all tokens when the batch was built.
        runner.lora_manager.prepare_lora_batch(fb)
    return picked


def _places(have: list[Range], rows: list[Range]) -> torch.Tensor:
    """Where the positions of ``rows`` stand among those of ``have``, which holds them all."""
    at = torch.cat([torch.arange(*r) for r in rows])
    if len(have) == 1:
        return at - have[0].start
    return torch.searchsorted(torch.cat([torch.arange(*r) for r in have]), at)


def _starts(lengths: torch.Tensor) -> torch.Tensor:
    """Where each request's tokens start, in the dtype of ``lengths``."""
    return torch.cumsum(lengths, 0, dtype=lengths.dtype) - lengths


def _as_requests(fb: Any, numbers: list[int], counts: list[int], stops: list[int]) -> Any:
    """A view of the batch as other requests: the i-th runs the ``counts[i]`` rows that end at
    position ``stops[i]``, over the KV of the batch's request ``numbers[i]``."""
    view = copy.copy(fb)
    device = fb.input_ids.device
    owner = torch.tensor(numbers)
    view.batch_size = len(numbers)
    view.req_pool_indices = fb.req_pool_indices[to_device(owner, device)]
    if getattr(fb, "req_pool_indices_cpu", None) is not None:
        view.req_pool_indices_cpu = fb.req_pool_indices_cpu[owner]
    view.seq_lens_cpu = torch.tensor(stops, dtype=torch.int64)
    view.seq_lens = to_device(view.seq_lens_cpu.to(fb.seq_lens.dtype), device)
    view.seq_lens_sum = sum(stops)
    starts = [stop - count for stop, count in zip(stops, counts, strict=True)]
    view.extend_prefix_lens_cpu = starts
    view.extend_prefix_lens = to_device(torch.tensor(starts, dtype=torch.int32), device)
    view.extend_seq_lens_cpu = counts
    view.extend_seq_lens = to_device(torch.tensor(counts, dtype=torch.int32), device)
    view.extend_start_loc = _starts(view.extend_seq_lens)
    return view


def runs_as_rows(fb: Any, rows: Rows) -> Any:
    """A view of the batch in which every contiguous range of rows is a request of its own."""
    flat = [(i, r) for i, ranges in enumerate(rows) for r in ranges]
    numbers, ranges = [i for i, _ in flat], [r for _, r in flat]
    return _as_requests(fb, numbers, [r.num for r in ranges], [r.stop for r in ranges])


class Look(NamedTuple):
    """Wants to see a layer's attention: ``see(q, keys, fb, scaling)`` with ``q`` [rows, q_heads,
    dim], rotated, and ``keys(i, n)``: K [n, kv_heads, dim] of the first n tokens of request i."""

    layer: int
    see: Callable[..., None]


class Part(NamedTuple):
    """Some tokens of one request of a batch: the request's ``number`` in it, ``positions`` [n],
    ascending, and on the device their ids and slots [n]."""

    number: int
    positions: np.ndarray
    ids: torch.Tensor
    slots: torch.Tensor


def part_of(fb: Any, parts: list[Part]) -> Any:
    """A prefill batch of its own that runs just these tokens, in place, over the KV there is."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    counts = [len(part.positions) for part in parts]
    stops = [int(part.positions[-1]) + 1 for part in parts]
    at = torch.from_numpy(np.concatenate([part.positions for part in parts]))
    view = _as_requests(fb, [part.number for part in parts], counts, stops)
    view.forward_mode = ForwardMode.EXTEND
    view.input_ids = torch.cat([part.ids for part in parts])
    view.out_cache_loc = torch.cat([part.slots for part in parts])
    view.positions = to_device(at, fb.input_ids.device).to(fb.positions.dtype)
    view.orig_seq_lens = view.seq_lens
    view.extend_num_tokens = sum(counts)
    view.extend_logprob_start_lens_cpu = counts
    view.return_logprob = False
    view.top_logprobs_nums = view.token_ids_logprobs = None
    if fb.rids is not None:
        view.rids = [fb.rids[part.number] for part in parts]
    # Meant for all tokens of the batch, or shared with it and written in place.
    for name in ("replace_embeds", "replace_positions", *_COUNTS):
        if hasattr(view, name):
            setattr(view, name, None)
    compat.set_num_tokens(view, sum(counts))
    for name in CARRIED:
        setattr(view, name, None)
    view.kvshare_rows = [as_ranges(part.positions) for part in parts]
    return view


def wrap_backend(backend: Any, runner: Any) -> None:
    """Teach a backend that SGLang built to attend for partial batches; others run as before."""
    plan, attend = backend.init_forward_metadata, backend.forward_extend
    decode = backend.forward_decode
    cpu = type(backend).__name__ == "TorchNativeAttnBackend"
    attn = runner.model.model.layers[0].self_attn.attn
    group = attn.tp_q_head_num // attn.tp_k_head_num
    backend.kvshare_plan = None
    for name in CARRIED:
        setattr(backend, name, None)
    check.follow(runner.model.model.layers, backend)

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
        pool, pending = backend.token_to_kv_pool, backend.kvshare_check
        if save_kv_cache and k is not None:
            # Stored first, for all rows: later rows see what earlier rows wrote in this layer.
            k = k.view(-1, layer.tp_k_head_num, layer.qk_head_dim)
            v = v.view(-1, layer.tp_v_head_num, layer.v_head_dim)
            scales = (getattr(layer, "k_scale", None), getattr(layer, "v_scale", None))
            if any(scale is not None for scale in scales):
                k, v = k.clone(), v.clone()  # the pool divides by the scales in place
            pool.set_kv_buffer(layer, fb.out_cache_loc, k, v, *scales)
        show(q, layer, fb)
        if pending is not None and layer.layer_id == pending.layer:
            keep = _narrow_here(q, k, v, layer, fb, pending)
            q, k, v = q[keep], k[keep], v[keep]  # backends read fresh K and V from here
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

    def _narrow_here(
        q: Any, k: Any, v: Any, layer: Any, fb: Any, pending: check.Pending
    ) -> torch.Tensor:
        """At the check layer: choose the rows that go on, cut the batch down to them, and say
        which of its rows they were."""
        keys = backend.token_to_kv_pool.get_key_buffer(layer.layer_id)
        table = backend.req_to_token_pool.req_to_token
        owners = fb.req_pool_indices
        rows = check.choose(
            pending,
            q.view(-1, layer.tp_q_head_num, layer.qk_head_dim),
            k.view(-1, layer.tp_k_head_num, layer.qk_head_dim),
            v.view(-1, layer.tp_v_head_num, layer.v_head_dim),
            keys_of=lambda i, n: keys[table[owners[i], :n].long()],
            scaling=layer.scaling,
            few_enough=lambda rows: few_enough(rows, runner),
        )
        pending.on_done(rows)
        pending.keep = cut_tokens(fb, pending.rows, rows, runner)
        backend.kvshare_rows = rows
        init_forward_metadata(fb)
        return pending.keep

    def forward_decode(
        q: Any, k: Any, v: Any, layer: Any, fb: Any, save_kv_cache: bool = True, **kw: Any
    ) -> Any:
        out = decode(q, k, v, layer, fb, save_kv_cache=save_kv_cache, **kw)
        show(q, layer, fb)
        return out

    def show(q: Any, layer: Any, fb: Any) -> None:
        look = backend.kvshare_look
        if look is None or layer.layer_id != look.layer:
            return
        buffer = backend.token_to_kv_pool.get_key_buffer(layer.layer_id)
        table = backend.req_to_token_pool.req_to_token
        owners = fb.req_pool_indices

        def keys(i: int, n: int) -> torch.Tensor:
            # index_select: on CPU four times as fast as indexing
            return buffer.index_select(0, table[owners[i], :n])

        look.see(q.view(-1, layer.tp_q_head_num, layer.qk_head_dim), keys, fb, layer.scaling)

    backend.forward_decode = forward_decode
    backend.init_forward_metadata = init_forward_metadata
    backend.forward_extend = forward_extend


def _plan_cpu(backend: Any, fb: Any, rows: Rows, group: int) -> list[partial_attn.RequestRows]:
    table = backend.req_to_token_pool.req_to_token
    positions = [torch.cat([torch.arange(*r) for r in ranges]) for ranges in rows]
    slots = [
        table[index, : int(at[-1]) + 1].long()
        for index, at in zip(fb.req_pool_indices.tolist(), positions, strict=True)
    ]
    return partial_attn.plan(list(zip(positions, slots, strict=True)), group=group)
