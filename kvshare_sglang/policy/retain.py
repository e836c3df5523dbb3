"""What of a request that reused may be a source for others, beside its exact part. Pure.

Text that it computed after reused text may be one, if it is not built on reuse too often. Copies
are left to their sources.
"""

from collections.abc import Sequence
from typing import NamedTuple

from kvshare_sglang.plan import Range, ReusePlan, Rows


class Stretch(NamedTuple):
    """New text at prompt ``[start, stop)`` whose KV builds on ``depth`` levels of reuse."""

    start: int
    stop: int
    depth: int


def depth_after(plan: ReusePlan, position: int) -> int:
    """Depth of text that is computed behind prompt ``position``: 0 where all before it is exact."""
    depths = [run.depth_after for run in plan.runs if run.dst_start < position]
    if plan.blend:
        depths.append(plan.blend.depth)
    if plan.rest and plan.rest.start <= position:
        depths += [run.depth_after for run in plan.rest.runs if run.dst_start <= position]
    return max(depths, default=0)


def fresh_stretches(plan: ReusePlan, length: int, *, max_depth: int) -> list[Stretch]:
    """New text after the exact part of a request of ``length`` tokens, output included."""
    behind = max(plan.exact_len, plan.prefix_len)
    out = []
    for start, stop in plan.reused_rows.complement(behind, length).ranges:
        depth = depth_after(plan, start)
        if 0 < depth <= max_depth:
            out.append(Stretch(start, stop, depth))
    return out


def future_sources(plan: ReusePlan, *, max_depth: int, watched: bool) -> Rows:
    """New rows of a prompt that others may reuse once they are computed. ``watched``: decoding may
    refresh its copies, so that nothing behind the exact part is kept before the answer is done."""
    exact = plan.fresh_rows.clip(0, plan.exact_len)
    if watched:
        return exact
    stretches = fresh_stretches(plan, plan.prompt_len, max_depth=max_depth)
    return exact | Rows((stretch.start, stretch.stop) for stretch in stretches)


def page_borders(start: int, chunks: Sequence[Range], *, page: int) -> tuple[int, list[int]]:
    """Where chunks of a stretch at ``start`` begin and end in whole pages: the first position,
    and the end of each chunk, which may be equal to the one before.

    >>> page_borders(10, [Range(0, 20), Range(20, 25)], page=16)
    (16, [16, 32])
    """
    first = -(-(start + chunks[0].start) // page) * page
    return first, [(start + chunk.stop) // page * page for chunk in chunks]
