"""Copy cached KV into the slots of a prefill batch, K re-rotated."""

import copy
import logging
from typing import Any, NamedTuple

import torch

from kvshare_sglang.kernels import ops, rope_shift
from kvshare_sglang.plan import Range, Run
from kvshare_sglang.runtime import profiles
from kvshare_sglang.runtime.batch import together
from kvshare_sglang.runtime.request import RequestReuse

logger = logging.getLogger(__name__)


class Copy(NamedTuple):
    """KV rows to copy: slots and positions on both sides, int64 [n] each."""

    src_slots: torch.Tensor
    dst_slots: torch.Tensor
    old_positions: torch.Tensor
    new_positions: torch.Tensor


def _rotary(runner: Any) -> Any:
    return runner.model.model.layers[0].self_attn.rotary_emb


def _rope_table(rotary: Any) -> torch.Tensor:
    """cos and sin by position in fp32; recomputed where the model keeps them in less.

    It has as many rows as the model's own, which SGLang makes as long as the context: past what
    the checkpoint says where a longer context is asked for.
    """
    own = rotary.cos_sin_cache
    if own.dtype == torch.float32:
        return own
    table = getattr(rotary, "kvshare_table", None)
    if table is None or len(table) < len(own):
        twin = copy.copy(rotary)
        first = rotary._compute_cos_sin_cache().to(own.device, torch.float32)
        twin._buffers = {"cos_sin_cache": first}
        twin._ensure_cos_sin_cache_length(len(own) - 1)
        table = rotary.__dict__["kvshare_table"] = twin.cos_sin_cache
    return table


def rows_of(
    state: RequestReuse, copies: tuple[Run, ...], chunk: Range, slots: torch.Tensor
) -> Copy:
    """What of ``copies``, parts of the plan's runs, is in a chunk of the request's prompt.

    ``slots`` [chunk.num] are those of the chunk's tokens.
    """
    assert state.plan is not None
    device = slots.device
    src, old, new = [], [], []
    runs, i, base = state.plan.runs, 0, 0  # base: of the i-th run in src_slots
    for part in copies:
        while runs[i].dst_stop <= part.dst_start:
            base += runs[i].length
            i += 1
        lo, hi = max(part.dst_start, chunk.start), min(part.dst_stop, chunk.stop)
        if lo < hi:
            first = base - runs[i].dst_start
            src.append(state.src_slots[first + lo : first + hi])
            new.append(torch.arange(lo, hi))
            old.append(new[-1] - part.shift)
    if not src:
        empty = torch.empty(0, dtype=torch.int64, device=device)
        return Copy(empty, empty, empty, empty)
    old_positions, positions = together([torch.cat(old), torch.cat(new)], device)
    return Copy(
        src_slots=torch.cat(src),
        dst_slots=slots[positions - chunk.start],
        old_positions=old_positions,
        new_positions=positions,
    )


def joined(parts: list[Copy]) -> Copy:
    return Copy(*(torch.cat(side) for side in zip(*parts, strict=True)))


def copy_kv(runner: Any, rows: Copy, *, first_layer: int = 0) -> None:
    """Copy K and V of ``rows`` from ``first_layer`` on, all layers at once where a kernel can, and
    what is known of them."""
    _, keys, values, backend = _buffers(runner)
    rotary = _rotary(runner)
    how: dict[str, Any] = {"is_neox": rotary.is_neox_style, "first_layer": first_layer}
    ops.copy_kv(keys, values, *rows, _rope_table(rotary), **how, backend=backend)
    kept = profiles.of_runner(runner)
    if kept is not None:
        kept.copy(rows.src_slots, rows.dst_slots)


def warm_up(runner: Any) -> None:
    """Compile the kernel, so that no request waits for it: the slot that SGLang pads batches with
    is copied to itself."""
    if not ops.has_triton(runner.device):
        return
    zero = torch.zeros(1, dtype=torch.int64, device=runner.device)
    try:
        copy_kv(runner, Copy(zero, zero, zero, zero))
    except Exception:
        logger.exception("KVShare's copy kernel does not run here; KV is copied layer by layer")
        runner.kvshare_copier = (*_buffers(runner)[:3], "torch")


def _buffers(runner: Any) -> tuple[Any, list[torch.Tensor], list[torch.Tensor], str]:
    """The pool, its buffers of K and V by layer, and the backend of ``ops.copy_kv``."""
    pool = runner.token_to_kv_pool
    known = getattr(runner, "kvshare_copier", None)
    if known is None or known[0] is not pool:
        ids = [layer.self_attn.attn.layer_id for layer in runner.model.model.layers]
        keys = [pool.get_key_buffer(i) for i in ids]
        values = [pool.get_value_buffer(i) for i in ids]
        known = runner.kvshare_copier = (pool, keys, values, "auto")
    found: tuple[Any, list[torch.Tensor], list[torch.Tensor], str] = known
    return found


def moved_kv(runner: Any, rows: Copy, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K (re-rotated) and V of ``rows`` in one layer [n, kv_heads, dim], copied nowhere."""
    _, keys, values, _ = _buffers(runner)
    rotary = _rotary(runner)
    shift = rope_shift.plan_shift(_rope_table(rotary), rows.old_positions, rows.new_positions)
    k, v = (rope_shift.rows_of(side[layer], rows.src_slots) for side in (keys, values))
    return ops.rotate_keys(k, shift, is_neox=rotary.is_neox_style), v
