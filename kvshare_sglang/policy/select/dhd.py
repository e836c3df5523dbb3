"""DHD's choice: windows and seams, then the rows that a check layer finds far off. Pure."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kvshare_sglang.plan import ReusePlan, Rows, Run
from kvshare_sglang.policy.select.base import (
    RowScores,
    Sees,
    SelectionRequest,
    copy_all,
    required_rows,
    rows_at_most,
)
from kvshare_sglang.policy.select.window import Window

DILATION = 2  # a row is chosen with so many neighbours to each side


class Dhd(NamedTuple):
    """``seam`` and ``window`` as in ``Window``; runs whose values are off by more than ``tau`` on
    average are computed whole."""

    seam: int
    window: int
    tau: float = float("inf")
    name: str = "dhd"
    sees: Sees = Sees.SCORES

    def plan(
        self, runs: Sequence[Run], *, prompt_len: int, prefix_len: int, budget: float
    ) -> ReusePlan:
        return copy_all(runs, prompt_len=prompt_len, prefix_len=prefix_len, suffix=self.seam)

    def most_rows(self, plan: ReusePlan, *, budget: float) -> int:
        """In the layers after the check layer; up to it every row runs."""
        return rows_at_most(plan, budget=budget, suffix=self.seam)

    def select(self, asked: SelectionRequest) -> ReusePlan:
        """What is copied once the scores are known; nothing of it where all runs are too far."""
        asked = without_far_runs(asked, limit=self.tau)
        chosen = self.choose(asked)
        return asked.plan.recompute(required_rows(asked.plan, suffix=self.seam) | chosen)

    def choose(self, asked: SelectionRequest) -> Rows:
        """Windows and seams first, then the rows of largest deviation times attention, dilated."""
        runs = asked.plan.runs
        heads = Window(self.seam, self.window).heads(runs, asked.num_rows, grow=False)
        taken = Rows(
            (run.dst_start, run.dst_start + n) for run, n in zip(runs, heads, strict=True) if n
        )
        scores = asked.scores
        score = scores.values * scores.attention
        return Rows.at(
            dilated(scores.positions, score, taken=taken.positions, count=asked.num_rows)
        )


def without_far_runs(asked: SelectionRequest, *, limit: float) -> SelectionRequest:
    """The request without the runs whose mean value deviation is above ``limit``: they were
    computed after text that gave them another meaning, and all their rows run."""
    scores, far = asked.scores, []
    keep = np.ones(len(scores.positions), bool)
    base = 0
    for run in asked.plan.runs:
        mine = slice(base, base + run.length)
        base += run.length
        if scores.values[mine].mean() > limit:
            far.append(run)
            keep[mine] = False
    return asked._replace(
        plan=asked.plan.without(far), scores=RowScores(*(part[keep] for part in scores))
    )


def dilated(
    positions: np.ndarray, score: np.ndarray, *, taken: np.ndarray, count: int, by: int = DILATION
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
