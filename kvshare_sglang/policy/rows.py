"""Which reused rows to compute again, once a check layer has seen how far they are off. Pure.

All selectors answer one question: of the rows that reuse found (``plan.runs``), which ones run in
the layers behind the check? New text, edits and the suffix always run. ``SELECTORS`` holds ours
and, for comparison, those of the literature, under one interface.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from kvshare_sglang.radix_fuzzy.reuse import head_lengths
from kvshare_sglang.radix_fuzzy.types import Join, Range, ReusePlan, Run, complement

Floats = np.ndarray  # float32 or float64
ASKING = 64  # of so many rows the attention is looked at, the last ones
DILATION = 2  # a row is chosen with so many neighbours to each side


class Check(NamedTuple):
    """What the check layer saw of the reused rows; all arrays [n], in order of position.

    ``keys`` and ``values`` are relative deviations ``|fresh - cached| / |fresh|``; ``attention``
    is the mean weight that the rows behind the last run give to the row, over heads.
    """

    positions: np.ndarray
    keys: Floats
    values: Floats
    attention: Floats


class Wish(NamedTuple):
    """What a selector is asked for."""

    plan: ReusePlan
    budget: float  # share of the reused rows to compute again, in [0, 1]
    seam: int
    window: int
    check: Check | None = None
    seed: int = 0

    @property
    def rows(self) -> int:
        """How many reused rows may run."""
        return int(self.budget * self.plan.reused)


Selector = Callable[[Wish], np.ndarray]


def reused_positions(plan: ReusePlan) -> np.ndarray:
    """Prompt positions of all rows in the plan's runs, ascending, int64."""
    return _together([np.arange(run.dst_start, run.dst_stop) for run in plan.runs])


def _together(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def must_run(plan: ReusePlan, *, suffix: int) -> np.ndarray:
    """Positions that no selector may leave out: new text, and the last ``suffix`` tokens."""
    every = np.ones(plan.prompt_len, bool)
    every[: plan.prefix_len] = False
    every[reused_positions(plan)] = False
    every[plan.prompt_len - max(suffix, 1) :] = True
    return np.flatnonzero(every)


def compute(name: str, wish: Wish) -> list[Range]:
    """The ranges that run, ascending. Raises ValueError on a selector that is not known."""
    if name not in SELECTORS:
        raise ValueError(f"the selector must be one of {', '.join(SELECTORS)}, got {name!r}")
    chosen = SELECTORS[name](wish)
    rows = np.union1d(must_run(wish.plan, suffix=wish.seam), chosen)
    return as_ranges(rows)


def asking_rows(plan: ReusePlan, *, seam: int) -> Range:
    """The rows whose attention says which reused rows matter: the last of those behind all runs,
    and at least the end of the prompt."""
    behind = min(plan.runs[-1].dst_stop, plan.prompt_len - max(seam, 1))
    return Range(max(behind, plan.prompt_len - ASKING, plan.prefix_len), plan.prompt_len)


def rows_behind_edits(plan: ReusePlan, *, each: int, limit: int) -> np.ndarray:
    """The first ``each`` rows of each run behind an edit; where those are more than ``limit``, as
    many of each run as of any other, and of the first runs one more. Positions, ascending, int64.
    """
    runs = [run for run in plan.runs if run.join is Join.EDIT]
    share, more = divmod(limit, max(len(runs), 1))
    lengths = [min(each, run.length, share + (i < more)) for i, run in enumerate(runs)]
    return _together(
        [np.arange(run.dst_start, run.dst_start + n) for run, n in zip(runs, lengths, strict=True)]
    )


def without_far_runs(wish: Wish, *, limit: float) -> Wish:
    """The wish without the runs whose mean value deviation is above ``limit``: they were computed
    behind text that gave them another meaning, and all their rows run."""
    assert wish.check is not None
    check, runs = wish.check, []
    keep = np.zeros(len(check.positions), bool)
    base = 0
    for run in wish.plan.runs:
        mine = slice(base, base + run.length)
        base += run.length
        if check.values[mine].mean() <= limit:
            runs.append(run)
            keep[mine] = True
    plan = wish.plan._replace(runs=tuple(runs))
    return wish._replace(plan=plan, check=Check(*(part[keep] for part in check)))


def replanned(plan: ReusePlan, compute: list[Range]) -> ReusePlan:
    """The plan with these rows computed and all else of its runs copied; runs of which nothing
    is copied go. O(runs + ranges): a trace leaves thousands of gaps."""
    gaps = complement(compute, start=plan.prefix_len, stop=plan.prompt_len)
    runs: list[Run] = []
    copies: list[Run] = []
    at = 0  # the first gap that reaches past the start of the run
    for run in plan.runs:
        before = len(copies)
        while at < len(gaps) and gaps[at].start < run.dst_stop:
            start, stop = max(gaps[at].start, run.dst_start), min(gaps[at].stop, run.dst_stop)
            if start < stop:
                copies.append(run.cut(start, stop))
            if gaps[at].stop > run.dst_stop:
                break  # the rest of the gap may lie in the next run
            at += 1
        if len(copies) > before:
            runs.append(run)
    return plan._replace(runs=tuple(runs), copies=tuple(copies), compute=tuple(compute))


def as_ranges(rows: np.ndarray) -> list[Range]:
    """
    >>> as_ranges(np.array([1, 2, 5]))
    [Range(start=1, stop=3), Range(start=5, stop=6)]
    """
    if not len(rows):
        return []
    cuts = np.flatnonzero(np.diff(rows) != 1)
    starts = rows[np.concatenate(([0], cuts + 1))]
    stops = rows[np.concatenate((cuts, [len(rows) - 1]))] + 1
    return [Range(int(a), int(b)) for a, b in zip(starts, stops, strict=True)]


# ---- selectors -------------------------------------------------------------------------------


def _all(wish: Wish) -> np.ndarray:
    return reused_positions(wish.plan)


def _none(wish: Wish) -> np.ndarray:
    return np.empty(0, np.int64)


def _heads(wish: Wish, *, grow: bool) -> np.ndarray:
    runs = list(wish.plan.runs)
    heads = head_lengths(runs, wish.budget, wish.seam, wish.window, grow=grow)
    parts = [
        np.arange(run.dst_start, run.dst_start + h) for run, h in zip(runs, heads, strict=True)
    ]
    return _together(parts)


def _structural(wish: Wish) -> np.ndarray:
    """Windows behind edits and seams, grown up to the budget: what the server does today."""
    return _heads(wish, grow=True)


def _epic(wish: Wish) -> np.ndarray:
    """EPIC (LegoLink): the first rows of each run, the same number in each."""
    runs = sorted(wish.plan.runs, key=lambda run: run.length)
    left, parts = wish.rows, []
    for i, run in enumerate(runs):
        take = min(run.length, left // (len(runs) - i))
        parts.append(np.arange(run.dst_start, run.dst_start + take))
        left -= take
    return _together(parts)


def _random(wish: Wish) -> np.ndarray:
    rng = np.random.default_rng(wish.seed)
    return rng.choice(reused_positions(wish.plan), wish.rows, replace=False)


def _top(score: Callable[[Check], Floats]) -> Selector:
    """The rows with the largest score, wherever they stand."""

    def choose(wish: Wish) -> np.ndarray:
        assert wish.check is not None
        order = np.argsort(-score(wish.check), kind="stable")
        return wish.check.positions[order[: wish.rows]]

    return choose


def _dhd(wish: Wish) -> np.ndarray:
    """Windows and seams first, then the rows of largest deviation times attention, dilated."""
    assert wish.check is not None
    heads = _heads(wish, grow=False)
    score = wish.check.values * wish.check.attention
    return _dilated(wish.check.positions, score, taken=heads, count=wish.rows)


def _dilated(
    positions: np.ndarray, score: Floats, *, taken: np.ndarray, count: int, by: int = DILATION
) -> np.ndarray:
    """``taken`` and, up to ``count`` rows in all, those of largest score within ``by`` positions.

    A row scores the mean of its neighbourhood, nearer rows counting more; a stretch is chosen for
    the best row in it. O(n log n).
    """
    chosen = np.isin(positions, taken)
    left = count - int(chosen.sum())
    if left <= 0 or not len(positions):
        return positions[chosen]
    first = int(positions[0])
    at = positions - first + by
    line = np.zeros(int(positions[-1]) - first + 1 + 2 * by)
    line[at] = score
    kernel = by + 1.0 - np.abs(np.arange(-by, by + 1))  # the row itself counts most
    smooth = np.full(len(line) + 2 * by, -np.inf)
    smooth[at + by] = np.convolve(line, kernel / kernel.sum(), mode="same")[at]
    best = np.max([smooth[by + d + at] for d in range(-by, by + 1)], axis=0)
    best[chosen] = -np.inf
    order = np.argsort(-best, kind="stable")
    chosen[order[:left]] = True
    return positions[chosen]


SELECTORS: dict[str, Selector] = {
    "full": _all,
    "copy": _none,
    "epic": _epic,
    "random": _random,
    "edit-window": _structural,
    "cacheblend": _top(lambda check: check.keys**2),
    "attention": _top(lambda check: check.attention),
    "deviation": _top(lambda check: check.values),
    "dhd": _dhd,
}
CHECKED = frozenset({"cacheblend", "attention", "deviation", "dhd"})  # need a check layer
