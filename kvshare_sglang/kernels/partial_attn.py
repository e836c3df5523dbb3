"""Attention of some rows of each request over its whole KV, on CPU: plan once, run per layer.

Rows of a request, in order of position, are taken in blocks; each block is one
``scaled_dot_product_attention`` against the keys up to its last row, under the mask
``key position <= row position``. Query heads that share a KV head are stacked as further rows, so
nothing is repeated in memory and small blocks fill the kernel's tiles.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

# PyTorch's CPU kernel takes queries 64 at a time from here on, and half as fast below. More rows
# would save nothing a row and waste keys that the block's early rows may not see.
BLOCK_QUERIES = 192


class Block(NamedTuple):
    """Rows ``[start, stop)`` of the batch, which see the first ``kv_len`` keys under ``mask``.

    ``mask`` [group * (stop - start), kv_len] is 0 where a row sees a key and -inf where not.
    """

    start: int
    stop: int
    kv_len: int
    mask: torch.Tensor


class RequestRows(NamedTuple):
    """The rows of one request, and the KV slot of each of its positions: a tensor, or a slice
    where the slots are side by side (then K and V are read in place)."""

    slots: torch.Tensor | slice
    blocks: list[Block]


def plan(
    rows: Sequence[tuple[torch.Tensor, torch.Tensor]],
    *,
    group: int,
    dtype: torch.dtype = torch.float32,
) -> list[RequestRows]:
    """Blocks for a batch. Each request gives ``positions`` [rows], ascending, and ``slots``
    [at least last position + 1]: the KV slot of each of its positions; ``ValueError`` otherwise.
    ``group`` query heads share a KV head. O(group x rows x kv) memory for scattered rows; blocks
    of side-by-side rows share one mask.
    """
    out: list[RequestRows] = []
    base = 0
    size = max(1, BLOCK_QUERIES // group)
    widest = max((int(positions[-1]) + 1 for positions, _ in rows if len(positions)), default=0)
    shared: dict[int, torch.Tensor] = {}  # by rows: the mask of side-by-side rows at the very end
    for positions, slots in rows:
        if bool((positions.diff() <= 0).any()):
            raise ValueError("the positions of a request's rows must ascend, each once")
        blocks = []
        for first in range(0, len(positions), size):
            at = positions[first : first + size]
            num, kv_len = len(at), int(at[-1]) + 1
            if kv_len > len(slots):
                raise ValueError(f"position {kv_len - 1} is outside the {len(slots)} slots given")
            if kv_len - int(at[0]) > num:
                mask = _mask(at, kv_len, dtype).repeat(group, 1)
            else:
                if num not in shared:
                    last = torch.arange(widest - num, widest)
                    shared[num] = _mask(last, widest, dtype).repeat(group, 1)
                mask = shared[num][:, widest - kv_len :]
            blocks.append(Block(base + first, base + first + num, kv_len, mask))
        out.append(RequestRows(_side_by_side(slots[: blocks[-1].kv_len if blocks else 0]), blocks))
        base += len(positions)
    return out


def _mask(at: torch.Tensor, kv_len: int, dtype: torch.dtype) -> torch.Tensor:
    """[rows, kv_len]: 0 where a row at position ``at`` sees a key, -inf where not."""
    mask = torch.zeros(len(at), kv_len, dtype=dtype)
    lo = int(at[0]) + 1  # only keys past the first row can be hidden from any row
    mask[:, lo:].masked_fill_(torch.arange(lo, kv_len)[None] > at[:, None], float("-inf"))
    return mask


def _side_by_side(slots: torch.Tensor) -> torch.Tensor | slice:
    """The same slots as a slice, if they are consecutive."""
    if len(slots) == 0 or bool((slots.diff() != 1).any()):
        return slots
    first = int(slots[0])
    return slice(first, first + len(slots))


def run(
    requests: Sequence[RequestRows],
    q: torch.Tensor,
    key_buffer: torch.Tensor,
    value_buffer: torch.Tensor,
    *,
    scaling: float,
) -> torch.Tensor:
    """Attention output [rows, q_heads, v_dim] of ``q`` [rows, q_heads, dim].

    ``key_buffer`` and ``value_buffer`` [slots, kv_heads, dim] must already hold the rows' own
    K and V of this layer: later rows see what earlier rows wrote.
    """
    kv_heads = key_buffer.shape[1]
    group = q.shape[1] // kv_heads
    if q.shape[1] != group * kv_heads:
        raise ValueError(f"{q.shape[1]} query heads are not a multiple of {kv_heads} KV heads")
    out = q.new_empty(q.shape[0], q.shape[1], value_buffer.shape[2])
    for slots, blocks in requests:
        k = key_buffer[slots].to(q.dtype).transpose(0, 1)
        v = value_buffer[slots].to(q.dtype).transpose(0, 1)
        for start, stop, kv_len, mask in blocks:
            num = stop - start
            rows = q[start:stop].view(num, kv_heads, group, -1).permute(1, 2, 0, 3)
            seen = F.scaled_dot_product_attention(
                rows.reshape(1, kv_heads, group * num, -1),
                k[None, :, :kv_len],
                v[None, :, :kv_len],
                attn_mask=mask,
                scale=scaling,
            )
            seen = seen.view(kv_heads, group, num, -1).permute(2, 0, 1, 3)
            out[start:stop] = seen.flatten(1, 2)
    return out
