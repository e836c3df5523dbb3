"""The attention that some rows pay to each key, fp32; no score is ever written. Triton.

Two launches: the log-sum-exp of each row and head, then the weights, summed over rows.
"""

import torch
import triton
import triton.language as tl

LOG2_E = 1.4426950408889634
BLOCK_R, BLOCK_N = 64, 64  # rows and keys of a step
KEYS_OF_SPLIT = 2048


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
    DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    head = tl.program_id(1)
    split = tl.program_id(2)
    live = r < num_rows
    at = tl.load(positions + r, mask=live, other=-1).to(tl.int32)
    d = tl.arange(0, DIM)
    n = tl.arange(0, BLOCK_N)
    x = tl.load(
        q + r[:, None].to(tl.int64) * q_stride + head * DIM + d[None, :],
        mask=live[:, None],
        other=0.0,
    )
    k_base = keys + (head // GROUP) * DIM
    top = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    stop = tl.minimum(tl.minimum(split * each + each, kv), tl.max(at, 0) + 1)
    for begin in range(split * each, stop, BLOCK_N):
        key = begin + n
        k = tl.load(
            k_base + key[None, :].to(tl.int64) * k_stride + d[:, None],
            mask=(key < kv)[None, :],
            other=0.0,
        )
        s = tl.dot(x, k.to(x.dtype)) * scale
        s = tl.where(key[None, :] <= at[:, None], s, float("-inf"))
        best = tl.maximum(top, tl.max(s, 1))
        safe = tl.where(best == float("-inf"), 0.0, best)
        total = total * tl.exp2(top - safe) + tl.sum(tl.exp2(s - safe[:, None]), 1)
        top = best
    o = (split * num_rows + r.to(tl.int64)) * HEADS + head
    tl.store(lse + o, top + tl.log2(total), mask=live)


@triton.jit(do_not_specialize=["num_rows", "kv", "each"])
def _mass(
    q,
    keys,
    positions,
    lse,  # fp32 [rows, heads], base 2
    mass,  # fp32 [splits, kv]
    num_rows,
    kv,
    each,  # rows of a split
    scale,
    q_stride,
    k_stride,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STRONGEST: tl.constexpr,
):
    key = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    inside = key < kv
    d = tl.arange(0, DIM)
    acc = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(split * each, tl.minimum(split * each + each, num_rows), BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        live = r < num_rows
        at = tl.load(positions + r, mask=live, other=-1).to(tl.int32)
        seen = (key[None, :] <= at[:, None]) & live[:, None]
        over = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
        for head in range(HEADS):
            x = tl.load(
                q + r[:, None].to(tl.int64) * q_stride + head * DIM + d[None, :],
                mask=live[:, None],
                other=0.0,
            )
            k = tl.load(
                keys + key[None, :].to(tl.int64) * k_stride + (head // GROUP) * DIM + d[:, None],
                mask=inside[None, :],
                other=0.0,
            )
            whole = tl.load(lse + r * HEADS + head, mask=live, other=0.0)
            p = tl.exp2(tl.dot(x, k.to(x.dtype)) * scale - whole[:, None])
            if STRONGEST:
                over = tl.maximum(over, p)
            else:
                over += p
        acc += tl.sum(tl.where(seen, over, 0.0), 0)
    tl.store(mass + split * kv + key, acc, mask=inside)


def run(
    q: torch.Tensor,
    positions: torch.Tensor,
    keys: torch.Tensor,
    *,
    scaling: float,
    strongest_head: bool = False,
) -> torch.Tensor:
    """As ``kernels.row_scores.attention_mass``; ``dim`` is a power of two."""
    rows, heads, dim = q.shape
    kv, kv_heads, _ = keys.shape
    kind = {"HEADS": heads, "GROUP": heads // kv_heads, "DIM": dim}
    kind |= {"BLOCK_R": BLOCK_R, "BLOCK_N": BLOCK_N}
    strides = (scaling * LOG2_E, q.stride(0), keys.stride(0))
    blocks = triton.cdiv(rows, BLOCK_R)
    splits = triton.cdiv(kv, KEYS_OF_SPLIT)
    parts = q.new_empty((splits, rows, heads), dtype=torch.float32)
    _lse[(blocks, heads, splits)](
        q, keys, positions, parts, rows, kv, KEYS_OF_SPLIT, *strides, **kind, num_warps=4
    )
    lse = torch.logsumexp(parts / LOG2_E, dim=0) * LOG2_E if splits > 1 else parts[0]
    row_splits = min(2, blocks)
    each = triton.cdiv(blocks, row_splits) * BLOCK_R
    mass = q.new_empty((row_splits, kv), dtype=torch.float32)
    _mass[(triton.cdiv(kv, BLOCK_N), row_splits)](
        q, keys, positions, lse, mass, rows, kv, each, *strides,
        **kind, STRONGEST=strongest_head, num_warps=4,
    )  # fmt: skip
    return mass.sum(0) / (rows if strongest_head else rows * heads)
