"""How much a cached row rests on text that is not with it any more: what it attended to when it was
computed. Pure.

A row that looked at its own passage alone is right wherever the passage goes; one that looked at
what stood before the passage is not. That is known when the source is computed, so a prompt that
copies it need not compute anything to find the rows that copies get wrong. Attention to other text
as the measure of what a copy loses: Cache-Craft (arXiv 2502.15734), there of whole chunks.

A *profile* [EDGES] is what a row gave to the keys that are at least so far behind it, mean over
heads, without the first token, to which attention goes that has nowhere to go.
"""

from collections.abc import Sequence

import numpy as np

from kvshare_sglang.plan import Join, ReusePlan, Run

EDGES = (0, *(1 << i for i in range(18)))  # distances in tokens, 0 and powers of two to 131,072
NEAR = 64  # tokens by which an edit may move what is behind it, and that still be the same text
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
    as the others do on average. None where nothing is known of any. O(rows + runs^2)."""
    found = np.full(plan.prompt_len, np.nan)
    for i, run in enumerate(plan.runs):
        here = profiles[run.dst_start : run.dst_stop]
        at = np.arange(run.src_start, run.src_stop)
        away = beyond(here, at - run.src_start + 1, at)  # to all before the run
        for start, stop in _with(run, plan.runs[:i], plan.prefix_len):
            away -= beyond(here, at - stop + 1, at) - beyond(here, at - start + 1, at)
        found[run.dst_start : run.dst_stop] = away.clip(0)
    known = ~np.isnan(found)
    if not known.any():
        return None
    found[~known] = found[known].mean()
    return found


def _with(run: Run, before: Sequence[Run], prefix_len: int) -> list[tuple[int, int]]:
    """Ranges of its source that stand before the run here as they stood before it there: runs of
    the same source, and the prefix hit where the run goes on behind an edit of that text."""
    goes_on = run.join is not Join.SEAM and abs(run.shift) <= NEAR
    ranges = [(0, min(prefix_len, run.src_start))] if prefix_len and goes_on else []
    return ranges + [
        (one.src_start, one.src_stop)
        for one in before
        if one.source == run.source
        and one.src_stop <= run.src_start
        and abs(one.shift - run.shift) <= NEAR
    ]
