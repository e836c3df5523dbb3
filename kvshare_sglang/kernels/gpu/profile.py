"""What each row gives to the keys at least so far behind it, over paged KV, fp32. Triton.

As ``rows.py`` attends, with a sum for each distance in place of the values: no weight is ever
written. Most keys are far behind a tile, and a step of them is behind the same distances for all
of its rows; only where a distance ends within a step are its pairs looked at one by one.
"""

import torch
import triton
import triton.language as tl

from kvshare_sglang.kernels.gpu import LOG2_E
from kvshare_sglang.kernels.gpu.rows import Plan, Shape, _scores


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
    tile = tl.program_id(1)
    split = tl.program_id(2)
    first = tl.load(tiles + tile)
    count = tl.load(tiles + num_tiles + tile)
    owner = tl.load(owners + tl.load(tiles + 2 * num_tiles + tile)).to(tl.int64)

    m = tl.arange(0, BLOCK_M)
    r, g = m // GROUP, m % GROUP
    live = r < count
    row = (first + r).to(tl.int64)
    positions += offset
    at = tl.load(positions + row, mask=live, other=-1).to(tl.int32)
    lo = tl.load(positions + first).to(tl.int32)
    hi = tl.load(positions + first + tl.maximum(count, 1) - 1).to(tl.int32) + 1
    hi = tl.where(count > 0, hi, 0)

    d = tl.arange(0, DIM)
    e = tl.arange(0, EDGES_P2)
    head = kv_head * GROUP + g
    x = tl.load(
        q + row[:, None] * q_stride + head[:, None] * DIM + d[None, :],
        mask=live[:, None],
        other=0.0,
    )
    known = e < EDGES
    edge = tl.load(edges + e, mask=known, other=0)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, EDGES_P2), tl.float32)

    each = tl.cdiv(tl.cdiv(hi, BLOCK_N), tl.num_programs(2)) * BLOCK_N
    start = split * each
    stop = tl.minimum(start + each, hi)
    page = page_table + owner * table_stride
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
    top = tl.full((HEADS_P2,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS_P2,), tl.float32)
    acc = tl.zeros((HEADS_P2, EDGES_P2), tl.float32)
    for i in range(splits):
        at = (i * num_rows + row) * HEADS + h
        one = tl.load(lse + at, mask=live, other=0.0)
        best = tl.maximum(top, one)
        safe = tl.where(best == float("-inf"), 0.0, best)
        mine, others = tl.exp2(one - safe), tl.exp2(top - safe)
        part = tl.load(parts + at[:, None] * EDGES + e[None, :], mask=there, other=0.0)
        total = total * others + mine
        acc = acc * others[:, None] + part * mine[:, None]
        top = best
    mean = tl.sum(acc / total[:, None], 0) / HEADS
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
