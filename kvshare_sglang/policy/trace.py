"""Which reused rows an answer rests on, followed back from the question. Pure.

The question's rows attend to the rows that answer it; those attend to what they were concluded
from; and so on. A row computed again puts right what it concluded, provided that what it rests on
is right too, so the rows of all steps run together, in order of position.
"""

import math
from collections.abc import Sequence

import numpy as np

from kvshare_sglang.policy.rows import asking_rows, must_run, reused_positions, rows_behind_edits
from kvshare_sglang.radix_fuzzy.types import ReusePlan

# Of the rows, by step back. Answers that rest on answers are followed so far; the first step finds
# the most, and what is missed there is missed by all that follow.
SHARES = (0.5, 0.25, 0.25)
# Rows behind each edit, and of all rows the share that may go there: the rest of a statement whose
# beginning was edited. More of them take from the steps what those need.
BEHIND_EDIT, BEHIND_EDITS = 4, 0.25
NEW = 2  # a new row before copies gives a trace as many rows as so many copies do


def probe_layer(layers: int, depth: float) -> int:
    """Number of the layer at ``depth`` in [0, 1] of a model.

    >>> probe_layer(12, 0.25)
    3
    """
    return round(depth * (layers - 1))


def rows_of(plan: ReusePlan, budget: float) -> int:
    """How many reused rows a trace may choose: the share ``budget`` of the reused rows and of
    ``NEW`` times the new ones before them. The more new text stands there, the more of the copies
    may be off; a question behind them changes none."""
    new = plan.runs[-1].dst_stop - plan.prefix_len - plan.reused
    return min(plan.reused, int(budget * (plan.reused + NEW * new)))


class Trace:
    """Steps back from some rows, each a small pass through the lower layers.

    Until ``done``: run ``rows`` (positions, ascending) up to the layer that is looked at, and
    ``feed`` the attention that ``asking``, the last of them, pay to the prompt there. At the end
    ``chosen`` holds ``count`` of the open rows: what was there ``at_first``, and of the rest
    ``shares[i]`` from step ``i``.
    """

    def __init__(
        self,
        open_rows: np.ndarray,
        *,
        rows: np.ndarray,
        asking: np.ndarray,
        count: int,
        at_first: np.ndarray | None = None,
        shares: Sequence[float] = SHARES,
    ) -> None:
        self._open = open_rows.copy()
        self._left = count
        self._shares = list(shares)
        self._chosen: list[np.ndarray] = []
        self.rows, self.asking = rows, asking
        if at_first is not None:
            self._take(at_first)

    @classmethod
    def of_plan(
        cls,
        plan: ReusePlan,
        *,
        budget: float,
        seam: int,
        shares: Sequence[float] = SHARES,
    ) -> "Trace":
        """From the question back over ``rows_of(plan, budget)`` rows. The first of them stand
        behind edits: nothing attends to rows that meant another thing there."""
        rows = must_run(plan, suffix=seam)
        open_rows = np.zeros(plan.prompt_len, bool)
        open_rows[reused_positions(plan)] = True
        open_rows[rows] = False
        count = rows_of(plan, budget)
        behind = rows_behind_edits(plan, each=BEHIND_EDIT, limit=int(BEHIND_EDITS * count))
        behind = behind[open_rows[behind]]
        rows = np.union1d(rows, behind)
        asking = rows[np.searchsorted(rows, asking_rows(plan, seam=seam).start) :]
        return cls(open_rows, rows=rows, asking=asking, count=count, at_first=behind, shares=shares)

    @property
    def length(self) -> int:
        """Of the prompt, in tokens."""
        return len(self._open)

    @property
    def done(self) -> bool:
        return not self._shares or self._left <= 0 or not self._open.any()

    @property
    def chosen(self) -> np.ndarray:
        """Positions, ascending, int64."""
        return np.sort(np.concatenate([np.empty(0, np.int64), *self._chosen]))

    @property
    def open_rows(self) -> np.ndarray:
        """Which positions could have been chosen and were not, bool [prompt_len]."""
        return self._open

    def feed(self, paid: np.ndarray) -> None:
        """``paid`` [prompt_len]: what the asking rows pay to each position. O(n log n)."""
        count = math.ceil(self._left * (self._shares[0] / sum(self._shares)))
        where = np.flatnonzero(self._open)
        best = np.sort(where[np.argsort(-paid[where], kind="stable")[:count]])
        self._take(best)
        self._shares.pop(0)
        self.rows = self.asking = best

    def _take(self, rows: np.ndarray) -> None:
        self._open[rows] = False
        self._chosen.append(rows)
        self._left -= len(rows)
