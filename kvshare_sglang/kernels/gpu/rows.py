"""Attention of scattered rows over paged KV, by query position: one launch a layer. Triton.

The rows of a request, ascending, are cut into tiles. The query heads that share a KV head are
stacked, so a tile has ``BLOCK_M`` matrix rows. It walks the request's page table from key 0 to its
last row's position, and masks ``key <= position`` only from its first row's position on: the keys
before are seen by all of its rows. So no mask and no list of keys is ever written, and lone rows
cost what rows side by side cost. The keys of a tile are split over programs, more of them where
tiles are few, and the parts are merged by their log-sum-exp (base 2).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from kvshare_sglang.kernels.gpu import LOG2_E

# Always in two parts: the kernel that writes one as the result needs more registers than there
# are, and takes twice as long. A split of fewer keys costs more than it saves.
FEWEST_SPLITS, MOST_SPLITS, KEYS_OF_SPLIT = 2, 16, 512
ROWS_AT_ONCE = 4096  # bounds the parts: 32 KiB a row for 32 heads of 128


class Shape(NamedTuple):
    """Of a launch: matrix rows and keys of a step, warps, steps in flight."""

    block_m: int
    block_n: int
    warps: int
    stages: int


class Launch(NamedTuple):
    """Rows ``[start, stop)`` of a batch. ``tiles`` int32 [3, tiles], on the device: first row (from
    ``start`` on), rows, number of the request; tiles with most keys first."""

    start: int
    stop: int
    tiles: torch.Tensor
    splits: int


class Plan(NamedTuple):
    """``positions`` [rows] and ``owners`` [requests] (rows of the page table), on the device."""

    launches: list[Launch]
    positions: torch.Tensor
    owners: torch.Tensor


def shape_of(head_dim: int, dtype: torch.dtype, capability: tuple[int, int]) -> Shape:
    """Measured on an H100 in bf16 (benchmarks/gpu-h100); else what compiles without spills."""
    if dtype.itemsize > 2:  # products of fp32 take no tensor cores
        return Shape(32, 32, 4, 1)
    if head_dim > 128:
        return Shape(64, 32, 8, 2)
    return Shape(128, 128, 8, 2) if capability[0] == 9 else Shape(64, 32, 4, 2)


def cut(
    rows: Sequence[tuple[int, int]], *, group: int, block_m: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tiles of a batch, in order of its rows: int32 [3, tiles], and how many keys each sees by
    estimate. ``rows``: by request, how many there are and before which position, which is all that
    the host must know; they are taken to lie evenly. O(tiles).

    >>> cut([(2, 10), (5, 5)], group=4, block_m=16)[0].tolist()
    [[0, 2, 6], [2, 4, 1], [0, 1, 1]]
    """
    size = block_m // group
    first, num, owner, keys = [], [], [], []
    base = 0
    for i, (count, stop) in enumerate(rows):
        starts = np.arange(0, count, size)
        stops = np.minimum(starts + size, count)
        first.append(base + starts)
        num.append(stops - starts)
        owner.append(np.full(len(starts), i))
        keys.append(stops * stop / max(count, 1))
        base += count
    table = np.stack([np.concatenate(part) for part in (first, num, owner)])
    return table.astype(np.int32), np.concatenate(keys)


def plan(
    rows: Sequence[tuple[int, int]],
    positions: torch.Tensor,
    owners: torch.Tensor,
    *,
    group: int,
    kv_heads: int,
    shape: Shape,
    programs: int,
) -> Plan:
    """For a batch: ``rows`` as for ``cut``; their ``positions`` [rows], by request ascending, and
    ``owners`` [requests], their rows of the page table, are on the device.

    ``programs``: how many keep the device busy. Small copies to the device, which nothing waits
    for.
    """
    tiles, keys = cut(rows, group=group, block_m=shape.block_m)
    device = positions.device
    launches = []
    last_rows = tiles[0] + tiles[1]
    at = 0
    while at < tiles.shape[1]:
        start = int(tiles[0, at])
        end = max(at + 1, int(np.searchsorted(last_rows, start + ROWS_AT_ONCE, side="right")))
        mine, seen = tiles[:, at:end].copy(), keys[at:end]
        mine[0] -= start
        # The longest start first, so that none is left over at the end.
        mine = np.ascontiguousarray(mine[:, np.argsort(-seen, kind="stable")])
        host = torch.from_numpy(mine)
        if device.type != "cpu":
            host = host.pin_memory().to(device, non_blocking=True)
        most = int(seen.max()) // KEYS_OF_SPLIT
        splits = _splits((end - at) * kv_heads, programs, most=most)
        launches.append(Launch(start, int(last_rows[end - 1]), host, splits))
        at = end
    return Plan(launches, positions, owners)


def _splits(num: int, programs: int, *, most: int = MOST_SPLITS) -> int:
    """How many parts each of ``num`` programs is cut into, so that ``programs`` run."""
    splits = FEWEST_SPLITS
    while splits < MOST_SPLITS and 2 * splits <= most and num * splits < programs:
        splits *= 2
    return splits


def fixed_plan(
    size: int,
    room: int,
    positions: torch.Tensor,
    owners: torch.Tensor,
    *,
    group: int,
    kv_heads: int,
    shape: Shape,
    programs: int,
) -> Plan:
    """A plan that a CUDA graph can record: ``size`` rows in at most ``room`` tiles, which are
    written into it before each replay (``fixed_tiles``), and so are ``positions`` [size] and
    ``owners``. Prompts are taken to be long."""
    tiles = torch.zeros((3, room), dtype=torch.int32, device=positions.device)
    num = max(1, size * group // shape.block_m) * kv_heads
    return Plan([Launch(0, size, tiles, _splits(num, programs))], positions, owners)


def fixed_tiles(
    rows: Sequence[tuple[int, int]], *, size: int, room: int, group: int, block_m: int
) -> np.ndarray:
    """Tiles of ``rows``, as for ``cut``, and of as many more, for which request 0 stands in, as
    make ``size``; the rest of ``room`` holds no rows. int32 [3, room].

    >>> fixed_tiles([(2, 10), (1, 5)], size=6, room=5, group=4, block_m=8).tolist()
    [[0, 2, 5, 3, 0], [2, 1, 1, 2, 0], [0, 1, 0, 0, 0]]
    """
    padding = size - sum(count for count, _ in rows)
    if padding < 0:
        raise ValueError(f"there must be at most {size} rows, got {size - padding}")
    tiles, seen = cut([*rows, (padding, 1)] if padding else rows, group=group, block_m=block_m)
    if tiles.shape[1] > room:
        raise ValueError(f"there must be at most {room} tiles, got {tiles.shape[1]}")
    tiles[2][tiles[2] == len(rows)] = 0
    out = np.zeros((3, room), np.int32)
    out[:, : tiles.shape[1]] = tiles[:, np.argsort(-seen, kind="stable")]
    return out


@triton.jit
def _tile_of(
    q, positions, offset, tiles, owners, page_table, num_tiles, table_stride, q_stride, kv_head, d,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The program's tile: queries [BLOCK_M, DIM], their rows, heads and positions, which of them
    are live, the first one's position, the key behind the last one's, and the request's pages."""
    tile = tl.program_id(1)
    first = tl.load(tiles + tile)
    count = tl.load(tiles + num_tiles + tile)
    owner = tl.load(owners + tl.load(tiles + 2 * num_tiles + tile)).to(tl.int64)
    m = tl.arange(0, BLOCK_M)
    r, g = m // GROUP, m % GROUP
    live = r < count  # also false for the rest of a tile that GROUP does not divide
    row = (first + r).to(tl.int64)
    positions += offset
    at = tl.load(positions + row, mask=live, other=-1).to(tl.int32)
    lo = tl.load(positions + first).to(tl.int32)  # keys up to here are seen by all rows
    hi = tl.load(positions + first + tl.maximum(count, 1) - 1).to(tl.int32) + 1
    hi = tl.where(count > 0, hi, 0)  # a tile of no rows sees no keys
    head = kv_head * GROUP + g
    x = tl.load(
        q + row[:, None] * q_stride + head[:, None] * DIM + d[None, :],
        mask=live[:, None],
        other=0.0,
    )
    return x, row, head, at, live, lo, hi, page_table + owner * table_stride


@triton.jit
def _split_of(hi, BLOCK_N: tl.constexpr):
    """Keys [start, stop) of the program's split of a tile, whole steps but for the last."""
    each = tl.cdiv(tl.cdiv(hi, BLOCK_N), tl.num_programs(2)) * BLOCK_N
    start = tl.program_id(2) * each
    return start, tl.minimum(start + each, hi)


@triton.jit
def _joined(
    parts, lse, row, num_rows, splits, h, c, there, HEADS: tl.constexpr, WIDTH: tl.constexpr
):
    """What the splits of a row gave, weighed by their log-sum-exp: fp32 [heads, columns], for heads
    ``h`` and columns ``c`` of ``WIDTH``; ``there``: which of both there are."""
    live = h < HEADS
    top = tl.full(h.shape, float("-inf"), tl.float32)
    total = tl.zeros(h.shape, tl.float32)
    acc = tl.zeros((h.shape[0], c.shape[0]), tl.float32)
    for i in range(splits):
        at = (i * num_rows + row) * HEADS + h
        one = tl.load(lse + at, mask=live, other=0.0)
        best = tl.maximum(top, one)
        safe = tl.where(best == float("-inf"), 0.0, best)
        mine, others = tl.exp2(one - safe), tl.exp2(top - safe)
        part = tl.load(parts + at[:, None] * WIDTH + c[None, :], mask=there, other=0.0)
        total = total * others + mine
        acc = acc * others[:, None] + part * mine[:, None]
        top = best
    return acc / total[:, None]


@triton.jit
def _scores(x, k_base, slot, d, k_stride, scale):
    key = tl.load(k_base + slot[None, :] * k_stride + d[:, None])
    return tl.dot(x, key.to(x.dtype), input_precision="ieee") * scale


@triton.jit
def _take_in(s, top, total, acc, x, v_base, slot, d, v_stride, inside, TAIL: tl.constexpr):
    """One step of softmax, over the keys whose scores are ``s`` (base 2). In the ``TAIL`` only
    those ``inside`` are read: what else is in a slot may be nan, and 0 * nan is nan."""
    best = tl.maximum(top, tl.max(s, 1))
    safe = tl.where(best == float("-inf"), 0.0, best)
    p = tl.exp2(s - safe[:, None])
    shrink = tl.exp2(top - safe)
    total = total * shrink + tl.sum(p, 1)
    at = v_base + slot[:, None] * v_stride + d[None, :]
    if TAIL:
        value = tl.load(at, mask=inside[:, None], other=0.0)
    else:
        value = tl.load(at)
    acc = tl.dot(p.to(x.dtype), value.to(x.dtype), acc * shrink[:, None], input_precision="ieee")
    return best, total, acc


@triton.jit(do_not_specialize=["offset", "num_rows", "num_tiles"])
def _attend(
    q,  # [rows, q_heads, dim]
    k_buf,  # [slots, kv_heads, dim]
    v_buf,  # [slots, kv_heads, dim]
    parts,  # fp32 [splits, rows, q_heads, dim]
    lse,  # fp32 [splits, rows, q_heads], base 2
    positions,  # [rows of the batch]
    offset,  # where the launch's rows begin among them
    tiles,  # int32 [3, tiles]
    owners,  # [requests]
    page_table,  # int32 [any, longest]
    scale,  # of scores, times log2(e) and K's scale
    v_scale,
    num_rows,
    num_tiles,
    table_stride,
    q_stride,
    k_stride,
    v_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    kv_head = tl.program_id(0)
    split = tl.program_id(2)
    d = tl.arange(0, DIM)
    x, row, head, at, live, lo, hi, page = _tile_of(
        q, positions, offset, tiles, owners, page_table, num_tiles, table_stride, q_stride,
        kv_head, d, GROUP, DIM, BLOCK_M,
    )  # fmt: skip
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, DIM), tl.float32)

    start, stop = _split_of(hi, BLOCK_N)
    whole = tl.minimum((lo + 1) // BLOCK_N * BLOCK_N, stop)  # up to here no mask is needed
    n = tl.arange(0, BLOCK_N)
    k_base = k_buf + kv_head * DIM
    v_base = v_buf + kv_head * DIM
    for begin in range(start, whole, BLOCK_N):
        slot = tl.load(page + begin + n).to(tl.int64)
        s = _scores(x, k_base, slot, d, k_stride, scale)
        top, total, acc = _take_in(s, top, total, acc, x, v_base, slot, d, v_stride, n, False)
    for begin in range(tl.maximum(whole, start), stop, BLOCK_N):
        key = begin + n
        inside = key < hi
        slot = tl.load(page + key, mask=inside, other=0).to(tl.int64)
        s = _scores(x, k_base, slot, d, k_stride, scale)
        s = tl.where(key[None, :] <= at[:, None], s, float("-inf"))
        top, total, acc = _take_in(s, top, total, acc, x, v_base, slot, d, v_stride, inside, True)

    acc = acc * (tl.where(total > 0, v_scale / total, 0.0))[:, None]
    o = (split * num_rows + row) * (KV_HEADS * GROUP) + head
    tl.store(parts + o[:, None] * DIM + d[None, :], acc, mask=live[:, None])
    tl.store(lse + o, top + tl.log2(total), mask=live)  # -inf where nothing was seen


@triton.jit(do_not_specialize=["num_rows", "splits"])
def _merge(
    parts,  # fp32 [splits, rows, heads, dim]
    lse,  # fp32 [splits, rows, heads], base 2
    out,  # [rows, heads, dim]
    num_rows,
    splits,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HEADS_P2: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, HEADS_P2)
    d = tl.arange(0, DIM)
    live = h < HEADS
    whole = _joined(parts, lse, row, num_rows, splits, h, d, live[:, None], HEADS, DIM)
    o = (row * HEADS + h)[:, None] * DIM + d[None, :]
    tl.store(out + o, whole.to(out.dtype.element_ty), mask=live[:, None])


def run(
    plan: Plan,
    q: torch.Tensor,
    key_buffer: torch.Tensor,
    value_buffer: torch.Tensor,
    page_table: torch.Tensor,
    *,
    scaling: float,
    shape: Shape,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> torch.Tensor:
    """Attention output [rows, q_heads, dim] of ``q`` [rows, q_heads, dim].

    ``key_buffer`` and ``value_buffer`` [slots, kv_heads, dim] must already hold the rows' own K
    and V of this layer; ``page_table`` int32 [any, longest] gives the slot of each position.
    ``dim`` is a power of two. Buffers of 8 bits are multiplied by their scales.
    """
    _, heads, dim = q.shape
    kv_heads = key_buffer.shape[1]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for start, stop, tiles, splits in plan.launches:
        rows, mine = stop - start, q[start:stop]
        parts = q.new_empty((splits, rows, heads, dim), dtype=torch.float32)
        lse = q.new_empty((splits, rows, heads), dtype=torch.float32)
        _attend[(kv_heads, tiles.shape[1], splits)](
            mine,
            key_buffer,
            value_buffer,
            parts,
            lse,
            plan.positions,
            start,
            tiles,
            plan.owners,
            page_table,
            scaling * LOG2_E * k_scale,
            v_scale,
            rows,
            tiles.shape[1],
            page_table.stride(0),
            q.stride(0),
            key_buffer.stride(0),
            value_buffer.stride(0),
            KV_HEADS=kv_heads,
            GROUP=heads // kv_heads,
            DIM=dim,
            BLOCK_M=shape.block_m,
            BLOCK_N=shape.block_n,
            num_warps=shape.warps,
            num_stages=shape.stages,
        )
        _merge[(rows,)](
            parts,
            lse,
            out[start:stop],
            rows,
            splits,
            HEADS=heads,
            DIM=dim,
            HEADS_P2=triton.next_power_of_2(heads),
        )
    return out
