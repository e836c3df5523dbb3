"""What each row gives to the keys at least so far behind it, over paged KV, fp32. Triton.

As ``rows.py`` attends, with a sum for each distance in place of the values: no weight is ever
written. Most keys are far behind a tile, and a step of them is behind the same distances for all
of its rows; only where a distance ends within a step are its pairs looked at one by one.
"""

import torch
import triton
import triton.language as tl

from kvshare_sglang.kernels.gpu import LOG2_E
from kvshare_sglang.kernels.gpu.rows import Plan, Shape, _joined, _scores, _split_of, _tile_of


@triton.jit(do_not_specialize=["offset", "num_rows", "num_tiles"])
def _given(
    q,  # [rows, q_heads, dim]
    k_buf,  # [slots, kv_heads, dim]
    parts,  # fp32 [splits, rows, q_heads, EDGES]
    lse,  # fp32 [splits, rows, q_heads], base 2
    positions,  # [rows of the batch]
    offset,  # where the launch's rows begin among them
    tiles,  # int32 [3, tiles]
    owners,  # [requests]
    page_table,  # int32 [any, longest]
    edges,  # int32 [EDGES]
    scale,  # of scores, times log2(e)
    num_rows,
    num_tiles,
    table_stride,
    q_stride,
    k_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EDGES: tl.constexpr,
    EDGES_P2: tl.constexpr,
):
    kv_head = tl.program_id(0)
    split = tl.program_id(2)
    d = tl.arange(0, DIM)
    e = tl.arange(0, EDGES_P2)
    x, row, head, at, live, lo, hi, page = _tile_of(
        q, positions, offset, tiles, owners, page_table, num_tiles, table_stride, q_stride,
        kv_head, d, GROUP, DIM, BLOCK_M,
    )  # fmt: skip
    known = e < EDGES
    edge = tl.load(edges + e, mask=known, other=0)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, EDGES_P2), tl.float32)

    start, stop = _split_of(hi, BLOCK_N)
    n = tl.arange(0, BLOCK_N)
    k_base = k_buf + kv_head * DIM
    for begin in range(start, stop, BLOCK_N):
        key = begin + n
        slot = tl.load(page + key, mask=key < hi, other=0).to(tl.int64)
        s = _scores(x, k_base, slot, d, k_stride, scale)
        s = tl.where(key[None, :] <= at[:, None], s, float("-inf"))
        best = tl.maximum(top, tl.max(s, 1))
        safe = tl.where(best == float("-inf"), 0.0, best)
        p = tl.exp2(s - safe[:, None])
        shrink = tl.exp2(top - safe)
        total = total * shrink + tl.sum(p, 1)
        top = best
        p = tl.where(key[None, :] == 0, 0.0, p)  # the first key has what has nowhere to go
        nearest = lo - (begin + BLOCK_N - 1)  # of the tile's rows and the step's keys
        farthest = hi - 1 - begin
        all_of_it = tl.where((edge <= nearest) & known, 1.0, 0.0)
        acc = acc * shrink[:, None] + tl.sum(p, 1)[:, None] * all_of_it[None, :]
        for i in range(EDGES):
            far = tl.load(edges + i)
            if (far > nearest) & (far <= farthest):
                given = tl.sum(tl.where(at[:, None] - key[None, :] >= far, p, 0.0), 1)
                acc += tl.where(e[None, :] == i, given[:, None], 0.0)

    acc = acc * (tl.where(total > 0, 1.0 / total, 0.0))[:, None]
    o = (split * num_rows + row) * (KV_HEADS * GROUP) + head
    tl.store(parts + o[:, None] * EDGES + e[None, :], acc, mask=live[:, None] & known[None, :])
    tl.store(lse + o, top + tl.log2(total), mask=live)  # -inf where nothing was seen


@triton.jit(do_not_specialize=["num_rows", "splits"])
def _mean(
    parts,  # fp32 [splits, rows, heads, EDGES]
    lse,  # fp32 [splits, rows, heads], base 2
    out,  # [rows, EDGES]
    num_rows,
    splits,
    HEADS: tl.constexpr,
    HEADS_P2: tl.constexpr,
    EDGES: tl.constexpr,
    EDGES_P2: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, HEADS_P2)
    e = tl.arange(0, EDGES_P2)
    live = h < HEADS
    there = live[:, None] & (e < EDGES)[None, :]
    whole = _joined(parts, lse, row, num_rows, splits, h, e, there, HEADS, EDGES)
    mean = tl.sum(tl.where(live[:, None], whole, 0.0), 0) / HEADS
    tl.store(out + row * EDGES + e, mean.to(out.dtype.element_ty), mask=e < EDGES)


def shape_of(head_dim: int, dtype: torch.dtype) -> Shape:
    """Smaller steps than those of ``rows``: a sum for each distance is in registers too."""
    if dtype.itemsize > 2 or head_dim > 128:
        return Shape(32, 32, 4, 1)
    return Shape(64, 64, 4, 2)


def run(
    plan: Plan,
    q: torch.Tensor,
    key_buffer: torch.Tensor,
    page_table: torch.Tensor,
    edges: torch.Tensor,
    *,
    scaling: float,
    shape: Shape,
) -> torch.Tensor:
    """As ``kernels.row_scores.attention_profile``, for the rows of a batch: fp32 [rows, edges] of
    ``q`` [rows, q_heads, dim].

    ``plan``: of ``rows.plan``, with the same ``shape``. ``key_buffer`` [slots, kv_heads, dim] holds
    the rows' own K already; ``page_table`` int32 [any, longest]; ``edges`` int32, on the device.
    ``dim`` is a power of two.
    """
    _, heads, dim = q.shape
    kv_heads, num = key_buffer.shape[1], len(edges)
    out = q.new_empty((len(q), num), dtype=torch.float32)
    sizes = {"EDGES": num, "EDGES_P2": triton.next_power_of_2(num)}
    for start, stop, tiles, splits in plan.launches:
        rows = stop - start
        parts = q.new_empty((splits, rows, heads, num), dtype=torch.float32)
        lse = q.new_empty((splits, rows, heads), dtype=torch.float32)
        _given[(kv_heads, tiles.shape[1], splits)](
            q[start:stop],
            key_buffer,
            parts,
            lse,
            plan.positions,
            start,
            tiles,
            plan.owners,
            page_table,
            edges,
            scaling * LOG2_E,
            rows,
            tiles.shape[1],
            page_table.stride(0),
            q.stride(0),
            key_buffer.stride(0),
            KV_HEADS=kv_heads,
            GROUP=heads // kv_heads,
            DIM=dim,
            BLOCK_M=shape.block_m,
            BLOCK_N=shape.block_n,
            **sizes,
            num_warps=shape.warps,
            num_stages=shape.stages,
        )
        _mean[(rows,)](
            parts, lse, out[start:stop], rows, splits,
            HEADS=heads, HEADS_P2=triton.next_power_of_2(heads), **sizes,
        )  # fmt: skip
    return out
