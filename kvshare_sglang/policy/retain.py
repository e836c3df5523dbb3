"""What of a request that reused may be a source for others, beside its exact part. Pure.

Text that it computed after reused text may be one, if it is not built on reuse too often. Copies
are left to their sources.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

from kvshare_sglang.plan import Range, ReusePlan, Rows, Run


class Stretch(NamedTuple):
    """New text at prompt ``[start, stop)`` whose KV builds on ``depth`` levels of reuse."""

    start: int
    stop: int
    depth: int


def depths_after(plan: ReusePlan, positions: Iterable[int]) -> list[int]:
    """Depth of text that is computed behind each prompt position: 0 where all before it is exact.
    O(runs + positions * log runs)."""
    starts, deepest = _deepest(plan.runs)
    rest_starts, rest_deepest = _deepest(plan.rest.runs if plan.rest else ())
    out = []
    for position in positions:
        depth = max(deepest[bisect_left(starts, position)], plan.blend.depth if plan.blend else 0)
        if plan.rest and plan.rest.start <= position:
            depth = max(depth, rest_deepest[bisect_right(rest_starts, position)])
        out.append(depth)
    return out


def _deepest(runs: Sequence[Run]) -> tuple[list[int], list[int]]:
    """Where ``runs`` begin, and how deep text behind the first i of them is."""
    depths = accumulate((run.depth_after for run in runs), max, initial=0)
    return [run.dst_start for run in runs], list(depths)


def fresh_stretches(plan: ReusePlan, length: int, *, max_depth: int) -> list[Stretch]:
    """New text after the exact part of a request of ``length`` tokens, output included."""
    behind = max(plan.exact_len, plan.prefix_len)
    ranges = plan.reused_rows.complement(behind, length).ranges
    depths = depths_after(plan, (start for start, _ in ranges))
    return [
        Stretch(start, stop, depth)
        for (start, stop), depth in zip(ranges, depths, strict=True)
        if 0 < depth <= max_depth
    ]


def future_sources(plan: ReusePlan, *, max_depth: int, watched: bool) -> Rows:
    """New rows of a prompt that others may reuse once they are computed. ``watched``: decoding may
    refresh its copies, so that nothing behind the exact part is kept before the answer is done."""
    exact = plan.fresh_rows.clip(0, plan.exact_len)
    if watched:
        return exact
    stretches = fresh_stretches(plan, plan.prompt_len, max_depth=max_depth)
    return exact | Rows((stretch.start, stretch.stop) for stretch in stretches)


def page_borders(start: int, chunks: Sequence[Range], *, page: int) -> tuple[int, list[int]]:
    """Where the pages begin and end that hold chunks of a stretch at ``start``: the first position,
    where the page may hold other text too, and the end of each chunk, which may be equal to the
    one before.

    >>> page_borders(10, [Range(0, 20), Range(20, 25)], page=16)
    (0, [16, 32])
    """
    first = (start + chunks[0].start) // page * page
    return first, [(start + chunk.stop) // page * page for chunk in chunks]
