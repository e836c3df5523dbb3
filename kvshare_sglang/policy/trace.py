"""Which reused rows an answer rests on, followed back from the question. Pure.

The question's rows attend to the rows that answer it; those attend to what they were concluded
from; and so on. A row computed again puts right what it concluded, provided that what it rests on
is right too, so the rows of all steps run together, in order of position.
"""

import numpy as np

from kvshare_sglang.policy.rows import asking_rows, must_run, reused_positions
from kvshare_sglang.radix_fuzzy.types import ReusePlan

TRACE_STEPS = 3  # answers that rest on answers are followed so far


def probe_layer(layers: int, depth: float) -> int:
    """Number of the layer at ``depth`` in [0, 1] of a model.

    >>> probe_layer(12, 0.25)
    3
    """
    return round(depth * (layers - 1))


class Trace:
    """Steps back from some rows, each a small pass through the lower layers.

    Until ``done``: run ``rows`` (positions, ascending) up to the layer that is looked at, and
    ``feed`` the attention that ``asking``, the last of them, pay to the prompt there. At the end
    ``chosen`` holds ``count`` of the ``open`` rows, the same number from each step.
    """

    def __init__(
        self, open_rows: np.ndarray, *, rows: np.ndarray, asking: np.ndarray, count: int, steps: int
    ) -> None:
        self._open = open_rows.copy()
        self._left = count
        self._steps = steps
        self._chosen: list[np.ndarray] = []
        self.rows, self.asking = rows, asking

    @classmethod
    def of_plan(cls, plan: ReusePlan, *, budget: float, seam: int, steps: int) -> "Trace":
        """From the question back over the share ``budget`` of the plan's reused rows."""
        rows = must_run(plan, suffix=seam)
        open_rows = np.zeros(plan.prompt_len, bool)
        open_rows[reused_positions(plan)] = True
        open_rows[rows] = False
        first = np.searchsorted(rows, asking_rows(plan, seam=seam).start)
        count = int(budget * plan.reused)
        return cls(open_rows, rows=rows, asking=rows[first:], count=count, steps=steps)

    @property
    def length(self) -> int:
        """Of the prompt, in tokens."""
        return len(self._open)

    @property
    def done(self) -> bool:
        return self._steps == 0 or self._left <= 0 or not self._open.any()

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
        count = -(-self._left // self._steps)
        where = np.flatnonzero(self._open)
        best = where[np.argsort(-paid[where], kind="stable")[:count]]
        best.sort()
        self._open[best] = False
        self._chosen.append(best)
        self._left -= len(best)
        self._steps -= 1
        self.rows = self.asking = best
