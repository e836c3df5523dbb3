"""The structural choice: rows after edits and at seams, known before anything runs. Pure.

Contiguous rows only: a window after each edit, the seam of each run, then longer heads up to the
budget. Published measurements say that contiguous rows after an edit regain what lone rows chosen
by deviation do not.
"""

from collections.abc import Sequence
from typing import NamedTuple

from kvshare_sglang.plan import Join, ReusePlan, Run
from kvshare_sglang.policy.select.base import MERGE_GAP, MIN_COPY, Sees, budget_rows, worth_copying


class Window(NamedTuple):
    """``seam`` tokens at the start of a run from other text, ``window`` after an edit."""

    seam: int
    window: int
    name: str = "window"
    sees: Sees = Sees.NOTHING

    def plan(
        self, runs: Sequence[Run], *, prompt_len: int, prefix_len: int, budget: float
    ) -> ReusePlan:
        """Where the heads (windows and seams) need more than the budget, they are trimmed in
        proportion, seams before windows; where they need less, every head grows in proportion to
        its run. A run after the text that it was computed after has no head."""
        useful, limit = worth_copying(
            runs, prompt_len=prompt_len, prefix_len=prefix_len, suffix=self.seam
        )
        useful = [run for run in useful if run.length - self.head(run) >= MIN_COPY]
        while True:
            count = budget_rows(useful, prefix_len=prefix_len, budget=budget)
            kept, copies = [], []
            for run, head in zip(useful, self.heads(useful, count), strict=True):
                start, stop = run.dst_start + head, min(run.dst_stop, limit)
                if stop - start > MERGE_GAP:
                    kept.append(run)
                    copies.append(run.cut(start, stop))
            if len(kept) == len(useful):
                return ReusePlan(prompt_len, prefix_len, tuple(kept), tuple(copies))
            useful = kept  # what is dropped takes its share of the budget with it

    def most_rows(self, plan: ReusePlan, *, budget: float) -> int:
        return plan.computed

    def heads(self, runs: Sequence[Run], count: int, *, grow: bool = True) -> list[int]:
        """How many tokens at the start of each run to compute again, ``count`` in all.

        Without ``grow`` a head is never longer than its window or seam.
        """
        total = sum(run.length for run in runs)
        if count >= total:
            return [run.length for run in runs]
        seams = [self.head(run) if run.join is Join.SEAM else 0 for run in runs]
        windows = [self.head(run) if run.join is Join.EDIT else 0 for run in runs]
        if sum(windows) > count:
            return _scale(windows, count)
        if sum(windows) + sum(seams) > count:
            scaled = _scale(seams, count - sum(windows))
            return [w + s for w, s in zip(windows, scaled, strict=True)]
        spare = count - sum(windows) - sum(seams) if grow else 0
        grown = [0 if run.join is Join.SAME else run.length for run in runs]
        return [
            min(run.length, w + s + spare * part // max(sum(grown), 1))
            for run, w, s, part in zip(runs, windows, seams, grown, strict=True)
        ]

    def head(self, run: Run) -> int:
        """Rows that the start of a run needs; none where nothing right before it has changed."""
        heads = {Join.SEAM: self.seam, Join.EDIT: max(self.window, self.seam)}
        return min(run.length, heads.get(run.join, 0))


def _scale(lengths: list[int], allowed: int) -> list[int]:
    total = sum(lengths)
    return [length * allowed // total for length in lengths]
