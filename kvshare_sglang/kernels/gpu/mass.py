"""The attention that some rows pay to each key, fp32; no score is ever written. Triton.

Three launches: the log-sum-exp of each row and head in parts of the keys, its merge, then the
weights, summed over rows. Query heads that share a KV head are stacked: a key is read once for all.
"""

import torch
import triton
import triton.language as tl

from kvshare_sglang.kernels.gpu import LOG2_E

KEYS_OF_SPLIT = 2048


@triton.jit
def _rows_of(
    q, first, num_rows, kv_head, q_stride, m, d,
    GROUP: tl.constexpr, GROUP_P2: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Queries [BLOCK_M, DIM], by row and head of the group, and where they stand."""
    r = first + m // GROUP_P2
    g = m % GROUP_P2
    live = (r < num_rows) & (g < GROUP)
    head = kv_head * GROUP + g
    at = q + r[:, None].to(tl.int64) * q_stride + head[:, None] * DIM + d[None, :]
    return tl.load(at, mask=live[:, None], other=0.0), r, head, live


@triton.jit
def _keys_of(keys, key, kv, kv_head, k_stride, d, DIM: tl.constexpr):
    """Keys [DIM, BLOCK_N], zero past the last."""
    at = keys + key[None, :].to(tl.int64) * k_stride + kv_head * DIM + d[:, None]
    return tl.load(at, mask=(key < kv)[None, :], other=0.0)


@triton.jit(do_not_specialize=["num_rows", "kv", "each"])
def _lse(
    q,  # [rows, heads, dim]
    keys,  # [kv, kv_heads, dim]
    positions,  # [rows]
    lse,  # fp32 [splits, rows, heads], base 2
    num_rows,
    kv,
    each,  # keys of a split
    scale,
    q_stride,
    k_stride,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_P2: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, DIM)
    n = tl.arange(0, BLOCK_N)
    first = tl.program_id(0) * (BLOCK_M // GROUP_P2)
    x, r, head, live = _rows_of(q, first, num_rows, kv_head, q_stride, m, d, GROUP, GROUP_P2, DIM)
    at = tl.load(positions + r, mask=live, other=-1).to(tl.int32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    stop = tl.minimum(tl.minimum(split * each + each, kv), tl.max(at, 0) + 1)
    for begin in range(split * each, stop, BLOCK_N):
        key = begin + n
        k = _keys_of(keys, key, kv, kv_head, k_stride, d, DIM)
        s = tl.dot(x, k.to(x.dtype), input_precision="ieee") * scale
        s = tl.where(key[None, :] <= at[:, None], s, float("-inf"))
        best = tl.maximum(top, tl.max(s, 1))
        safe = tl.where(best == float("-inf"), 0.0, best)
        total = total * tl.exp2(top - safe) + tl.sum(tl.exp2(s - safe[:, None]), 1)
        top = best
    o = (split * num_rows + r.to(tl.int64)) * HEADS + head
    tl.store(lse + o, top + tl.log2(total), mask=live)  # -inf where nothing was seen


@triton.jit(do_not_specialize=["num", "splits"])
def _merge_lse(parts, lse, num, splits, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = i < num
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        part = tl.load(parts + split * num + i, mask=live, other=0.0)
        best = tl.maximum(top, part)  # the first part is never -inf: every row sees key 0
        total = total * tl.exp2(top - best) + tl.exp2(part - best)
        top = best
    tl.store(lse + i, top + tl.log2(total), mask=live)


@triton.jit(do_not_specialize=["num_rows", "kv"])
def _mass(
    q,
    keys,
    positions,
    lse,  # fp32 [rows, heads], base 2
    mass,  # fp32 [kv]
    num_rows,
    kv,
    share,  # what a row counts for
    scale,
    q_stride,
    k_stride,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_P2: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STRONGEST: tl.constexpr,
):
    ROWS: tl.constexpr = BLOCK_M // GROUP_P2
    key = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, DIM)
    acc = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, num_rows, ROWS):
        over = tl.zeros((ROWS, BLOCK_N), tl.float32)
        for kv_head in range(HEADS // GROUP):
            x, r, head, live = _rows_of(
                q, first, num_rows, kv_head, q_stride, m, d, GROUP, GROUP_P2, DIM
            )
            whole = tl.load(lse + r * HEADS + head, mask=live, other=0.0)
            k = _keys_of(keys, key, kv, kv_head, k_stride, d, DIM)
            s = tl.dot(x, k.to(x.dtype), input_precision="ieee") * scale
            p = tl.where(live[:, None], tl.exp2(s - whole[:, None]), 0.0)
            by_head = tl.reshape(p, (ROWS, GROUP_P2, BLOCK_N))
            if STRONGEST:
                over = tl.maximum(over, tl.max(by_head, 1))
            else:
                over += tl.sum(by_head, 1)
        row = first + tl.arange(0, ROWS)
        at = tl.load(positions + row, mask=row < num_rows, other=-1).to(tl.int32)
        acc += tl.sum(tl.where(key[None, :] <= at[:, None], over, 0.0), 0)
    tl.store(mass + key, acc * share, mask=key < kv)


def blocks_of(dim: int, dtype: torch.dtype) -> tuple[int, int]:
    """Stacked rows and keys of a step, so that they fit a multiprocessor's memory."""
    return (64, 32) if dim > 128 or dtype.itemsize > 2 else (128, 64)


def run(
    q: torch.Tensor,
    positions: torch.Tensor,
    keys: torch.Tensor,
    *,
    scaling: float,
    strongest_head: bool = False,
) -> torch.Tensor:
    """As ``kernels.row_scores.attention_mass``; ``dim`` is a power of two, and at most 64 heads
    share a KV head."""
    rows, heads, dim = q.shape
    kv, kv_heads, _ = keys.shape
    group = heads // kv_heads
    kind = {"HEADS": heads, "GROUP": group, "GROUP_P2": triton.next_power_of_2(group), "DIM": dim}
    block_m, block_n = blocks_of(dim, q.dtype)
    kind |= {"BLOCK_M": block_m, "BLOCK_N": block_n}
    strides = (scaling * LOG2_E, q.stride(0), keys.stride(0))
    splits = triton.cdiv(kv, KEYS_OF_SPLIT)
    parts = q.new_empty((splits, rows, heads), dtype=torch.float32)
    blocks = triton.cdiv(rows, block_m // kind["GROUP_P2"])
    _lse[(blocks, kv_heads, splits)](
        q, keys, positions, parts, rows, kv, KEYS_OF_SPLIT, *strides, **kind, num_warps=8
    )
    lse = q.new_empty((rows, heads), dtype=torch.float32)
    _merge_lse[(triton.cdiv(rows * heads, 256),)](parts, lse, rows * heads, splits, BLOCK=256)
    mass = q.new_empty(kv, dtype=torch.float32)
    share = 1.0 / (rows if strongest_head else rows * heads)
    _mass[(triton.cdiv(kv, block_n),)](
        q, keys, positions, lse, mass, rows, kv, share, *strides,
        **kind, STRONGEST=strongest_head, num_warps=8,
    )  # fmt: skip
    return mass
