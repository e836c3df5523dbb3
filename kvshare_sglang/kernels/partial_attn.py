"""Attention of some rows of each request over its whole KV, on CPU: plan once, run per layer.

Rows of a request, in order of position, are taken in blocks; each block is one
``scaled_dot_product_attention`` against the keys up to its last row, under the mask
``key position <= row position``. Query heads that share a KV head go in as the batch's inner
dimension over one expanded view of K and V, so nothing is repeated in memory.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

BLOCK_ROWS = 256  # more saves nothing a row and wastes keys that early rows may not see


class Block(NamedTuple):
    """Rows ``[start, stop)`` of the batch, which see the first ``kv_len`` keys under ``mask``.

    ``mask`` [stop - start, kv_len] is 0 where a row sees a key and -inf where not.
    """

    start: int
    stop: int
    kv_len: int
    mask: torch.Tensor


class RequestRows(NamedTuple):
    """The rows of one request, and the KV slot of each of its positions."""

    slots: torch.Tensor
    blocks: list[Block]


def plan(
    rows: Sequence[tuple[torch.Tensor, torch.Tensor]], *, dtype: torch.dtype = torch.float32
) -> list[RequestRows]:
    """Blocks for a batch. Each request gives ``positions`` [rows], ascending, and ``slots``
    [at least last position + 1]: the KV slot of each of its positions. O(rows x kv) memory.
    """
    out: list[RequestRows] = []
    base = 0
    for positions, slots in rows:
        blocks = []
        for first in range(0, len(positions), BLOCK_ROWS):
            at = positions[first : first + BLOCK_ROWS]
            kv_len = int(at[-1]) + 1
            if kv_len > len(slots):
                raise ValueError(f"position {kv_len - 1} is outside the {len(slots)} slots given")
            mask = torch.zeros(len(at), kv_len, dtype=dtype)
            # only keys past the block's first row can be hidden from any row of it
            lo = int(at[0]) + 1
            hidden = torch.arange(lo, kv_len)[None] > at[:, None]
            mask[:, lo:].masked_fill_(hidden, float("-inf"))
            blocks.append(Block(base + first, base + first + len(at), kv_len, mask))
        out.append(RequestRows(slots[: blocks[-1].kv_len] if blocks else slots[:0], blocks))
        base += len(positions)
    return out


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
        k = key_buffer[slots].to(q.dtype).transpose(0, 1)[:, None]
        v = value_buffer[slots].to(q.dtype).transpose(0, 1)[:, None]
        for start, stop, kv_len, mask in blocks:
            rows = q[start:stop].view(stop - start, kv_heads, group, -1).permute(1, 2, 0, 3)
            seen = F.scaled_dot_product_attention(
                rows,
                k[:, :, :kv_len].expand(-1, group, -1, -1),
                v[:, :, :kv_len].expand(-1, group, -1, -1),
                attn_mask=mask,
                scale=scaling,
            )
            out[start:stop] = seen.permute(2, 0, 1, 3).flatten(1, 2)
    return out
