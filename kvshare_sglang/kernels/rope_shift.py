"""Re-rotate cached K to new positions: angles once a batch, one rotation in fp32 a layer."""

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Shift(NamedTuple):
    """Cosine and sine of what each copied token is rotated by; [n, 1, rotary_dim / 2], fp32."""

    cos: torch.Tensor
    sin: torch.Tensor


def plan_shift(
    cos_sin_cache: torch.Tensor, old_positions: torch.Tensor, new_positions: torch.Tensor
) -> Shift:
    """Angles from the model's own table, so that every scaling of RoPE holds.

    ``cos_sin_cache`` [max_position, rotary_dim] holds m cos(p f), m sin(p f) side by side, with
    any frequencies f and magnitude m (yarn's is not 1). By the addition theorems
    ``cos((new - old) f) = (cos_new cos_old + sin_new sin_old) / m^2``, and alike for the sine.
    Raises ValueError if a position is outside the table (on a CPU).
    """
    limit = cos_sin_cache.shape[0]
    if old_positions.shape != new_positions.shape or old_positions.ndim != 1:
        raise ValueError(
            "positions must be two vectors of one length, got "
            f"{tuple(old_positions.shape)} and {tuple(new_positions.shape)}"
        )
    if len(new_positions) and not old_positions.is_cuda:  # a check on a GPU would wait for it
        low = int(torch.minimum(old_positions.min(), new_positions.min()))
        top = int(torch.maximum(old_positions.max(), new_positions.max()))
        if low < 0 or top >= limit:
            raise ValueError(f"positions must be in [0, {limit}), got [{low}, {top}]")
    cos_old, sin_old = cos_sin_cache[old_positions].float().chunk(2, dim=-1)
    cos_new, sin_new = cos_sin_cache[new_positions].float().chunk(2, dim=-1)
    scale = cos_old.square().add_(sin_old.square()).reciprocal_()
    cos = (cos_new * cos_old + sin_new * sin_old) * scale
    sin = (sin_new * cos_old - cos_new * sin_old) * scale
    return Shift(cos[:, None], sin[:, None])


def rotate_keys(keys: torch.Tensor, shift: Shift, *, is_neox: bool) -> torch.Tensor:
    """``keys`` [n, heads, dim] at their new positions, in their own dtype; computed in fp32.

    Dimensions past ``rotary_dim`` are passed through (partial rotary).
    """
    half = shift.cos.shape[-1]
    if 2 * half > keys.shape[-1] or len(keys) != len(shift.cos):
        raise ValueError(
            f"keys of shape {tuple(keys.shape)} do not fit {len(shift.cos)} angles of "
            f"rotary_dim {2 * half}"
        )
    turn = keys[..., : 2 * half].float()
    turned = torch.empty_like(turn, memory_format=torch.contiguous_format)
    # Which dimensions are pairs; written in place, for fresh memory costs a CPU more than the sums.
    first, second = (
        (slice(half), slice(half, None)) if is_neox else (slice(0, None, 2), slice(1, None, 2))
    )
    a, b = turn[..., first], turn[..., second]
    torch.mul(a, shift.cos, out=turned[..., first]).addcmul_(b, shift.sin, value=-1)
    torch.mul(b, shift.cos, out=turned[..., second]).addcmul_(a, shift.sin)
    if keys.dtype.itemsize == 1:  # fp8: a pair can turn past the range, and the cast gives nan
        top = torch.finfo(keys.dtype).max
        turned = turned.clamp_(-top, top)
    turned = turned.to(keys.dtype)
    rest = keys[..., 2 * half :]
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def copy_kv(
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    src: torch.Tensor,
    dst: torch.Tensor,
    old: torch.Tensor,
    new: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    *,
    is_neox: bool,
    first_layer: int = 0,
) -> None:
    """Copy slots ``src`` [n] to ``dst`` [n] in all layers from ``first_layer`` on: V as it is, K
    from positions ``old`` [n] to ``new`` [n]. No slot may be in both. ``keys`` and ``values``: by
    layer, [slots, kv_heads, dim], written in place. Raises ValueError as ``plan_shift``."""
    shift = plan_shift(cos_sin_cache, old, new)
    for key, value in zip(keys[first_layer:], values[first_layer:], strict=True):
        _put(key, dst, rotate_keys(rows_of(key, src), shift, is_neox=is_neox))
        _put(value, dst, rows_of(value, src))


def rows_of(buffer: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """``buffer[slots]``, twice as fast on a CPU. Bytes for fp8, which not every device can pick."""
    if buffer.dtype.itemsize == 1:
        return buffer.view(torch.uint8).index_select(0, slots).view(buffer.dtype)
    return buffer.index_select(0, slots)


def _put(buffer: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor) -> None:
    if buffer.dtype.itemsize == 1:
        buffer, rows = buffer.view(torch.uint8), rows.view(torch.uint8)
    buffer[slots] = rows
