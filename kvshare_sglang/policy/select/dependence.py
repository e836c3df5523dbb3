"""How much a cached row rests on text that is not with it any more: what it attended to when it was
computed. Pure.

A row that looked at its own passage alone is right wherever the passage goes; one that looked at
what stood before the passage is not. That is known when the source is computed, so a prompt that
copies it need not compute anything to find the rows that copies get wrong. Attention between chunks
as a measure of what a cached one loses: Cache-Craft (arXiv 2502.15734).

A *profile* [EDGES] is what a row gave to the keys that are at least so far behind it, mean over
heads, without the first token, to which attention goes that has nowhere to go.
"""

from collections.abc import Sequence

import numpy as np

from kvshare_sglang.plan import Join, ReusePlan, Run

EDGES = (0, *(1 << i for i in range(18)))  # distances in tokens, 0 and powers of two to 131,072
NEAR = 64  # tokens by which an edit may move what is behind it, and that still be the same text
RANGES = 8  # of what stays in front of a run that are looked at one by one
LEAST = 1e-6  # attention that any row is taken to get

_EDGES = np.array([0.5, *EDGES[1:]])  # in whose logarithm is interpolated


def beyond(profiles: np.ndarray, distances: np.ndarray, at: np.ndarray) -> np.ndarray:
    """What rows at positions ``at`` [n] gave to keys at least ``distances`` [n] behind them, from
    their ``profiles`` [n, EDGES]: linear in the logarithm of the distance between two edges, or
    between an edge and the start of the text. [n].

    >>> one = np.array([[1, 0.5, 0.5, 0.25] + [0] * 15])
    >>> [float(beyond(one, np.array([d]), np.array([7]))[0]) for d in (0, 1, 2, 4, 8)]
    [1.0, 0.5, 0.5, 0.25, 0.0]
    """
    far = np.maximum(distances, 0.5)
    low = np.searchsorted(_EDGES, far, side="right") - 1
    low = low.clip(0, len(EDGES) - 2)
    start, end = _EDGES[low], np.minimum(_EDGES[low + 1], at + 1.0)
    part = np.log2(far / start) / np.log2(np.maximum(end, start * (1 + 1e-9)) / start)
    rows = np.arange(len(profiles))
    near, next_ = profiles[rows, low], profiles[rows, low + 1]
    return np.asarray(np.where(far > at, 0.0, near + part.clip(0, 1) * (next_ - near)))


def outside(plan: ReusePlan, profiles: np.ndarray) -> np.ndarray | None:
    """By position of the prompt, what a copied row gave to text of its source that does not stand
    before it here. ``profiles`` [prompt_len, EDGES] is NaN where nothing is known: such rows count
    as the others do on average. None where nothing is known of any. O(rows + runs^2), the latter
    for a comparison of two runs."""
    found = np.full(plan.prompt_len, np.nan)
    for run, limits in zip(plan.runs, limits_of(plan), strict=True):
        here = profiles[run.dst_start : run.dst_stop]
        found[run.dst_start : run.dst_stop] = _to_others(run, here, limits)
    known = ~np.isnan(found)
    if not known.any():
        return None
    found[~known] = found[known].mean()
    return found


def limits_of(plan: ReusePlan) -> list[list[int]]:
    """By run of the plan, positions of its source: where it begins, and where each range before it
    that stays begins and ends. At most 1 + 2 ``RANGES``. O(runs^2)."""
    found = []
    stays = [(0, plan.prefix_len)] if plan.prefix_len else []  # of the text that goes on
    for i, run in enumerate(plan.runs):
        match run.join:
            case Join.SEAM:
                stays = _moved_with(run, plan.runs[:i])
            case Join.SAME:
                stays = [(0, run.src_start)]
            case Join.ON:  # the same text stands between them
                stays = [*stays, (max((stop for _, stop in stays), default=0), run.src_start)]
        ranges = _joined(stays, before=run.src_start)
        found.append([run.src_start, *(edge for pair in ranges for edge in pair)])
        stays = [*stays, (run.src_start, run.src_stop)]
    return found


def _to_others(run: Run, profiles: np.ndarray, limits: Sequence[int]) -> np.ndarray:
    """What the run's rows gave to text before it, but for the ranges of its source that stay."""
    at = np.arange(run.src_start, run.src_stop)
    rows = len(at)
    distances = (at - np.array(limits)[:, None] + 1).ravel()
    count = len(limits)
    given = beyond(np.tile(profiles, (count, 1)), distances, np.tile(at, count)).reshape(
        count, rows
    )
    away = given[0].copy()  # to all that is before ``edges[i]``
    for i in range(1, count, 2):
        away -= given[i + 1] - given[i]
    return np.asarray(away.clip(0))


def _joined(ranges: Sequence[tuple[int, int]], *, before: int) -> list[tuple[int, int]]:
    """The ranges up to ``before``, in order, those that touch as one; the nearest ``RANGES``, the
    first of which takes in all that is before it."""
    found: list[tuple[int, int]] = []
    for start, stop in sorted((start, min(stop, before)) for start, stop in ranges):
        if start >= stop:
            continue
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        else:
            found.append((start, stop))
    if len(found) <= RANGES:
        return found
    return [(found[0][0], found[-RANGES][1]), *found[1 - RANGES :]]


def _moved_with(run: Run, before: Sequence[Run]) -> list[tuple[int, int]]:
    """Of a passage that moved and was edited, what stands before the run here as there."""
    return [
        (one.src_start, one.src_stop)
        for one in before
        if one.source == run.source
        and one.src_stop <= run.src_start
        and abs(one.shift - run.shift) <= NEAR
    ]
