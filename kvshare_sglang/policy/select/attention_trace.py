"""The default choice: which reused rows an answer rests on, followed back from the question. Pure.

The question's rows attend to the rows that answer it; those attend to what they were concluded
from; and so on. A row that is computed again is right only if what it rests on is right too, so
the rows of all steps run together, in order of position.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from kvshare_sglang.plan import ReusePlan, Rows, Run
from kvshare_sglang.policy.select.base import (
    Sees,
    budget_rows,
    copy_all,
    query_rows,
    repair_rows,
    required_rows,
    rows_after_edits,
    rows_at_most,
)
from kvshare_sglang.policy.select.dependence import LEAST

# One share of the row budget per backward step. The first step finds most rows, and what it
# misses the later ones miss too, so it gets half.
SHARES = (0.5, 0.25, 0.25)
# Where it is known which rows are likely to be off, those it rests on are among them, and what
# further steps would cost buys more rows instead.
KNOWING = (1.0,)
# New text of so many rows in front of the question is not run twice, see ``Trace.carried``.
CARRIED_FROM = 64
# Rows after each edit, and the share of all rows that may go there: the rest of a statement whose
# beginning was edited. More of them take from the steps what those need.
AFTER_EDIT, AFTER_EDITS = 4, 0.25


class AttentionTrace(NamedTuple):
    """``seam``: so many tokens at the end of the prompt always run. ``stretch``: with a row that is
    attended to come so many on either side of it, see ``spread``."""

    seam: int
    stretch: int = 0
    name: str = "trace"
    sees: Sees = Sees.ATTENTION

    def plan(
        self, runs: Sequence[Run], *, prompt_len: int, prefix_len: int, budget: float
    ) -> ReusePlan:
        return copy_all(runs, prompt_len=prompt_len, prefix_len=prefix_len, suffix=self.seam)

    def most_rows(self, plan: ReusePlan, *, budget: float) -> int:
        return rows_at_most(plan, budget=budget, suffix=self.seam)

    def trace(
        self,
        plan: ReusePlan,
        *,
        budget: float,
        start: int | None = None,
        most_open: int | None = None,
        shares: Sequence[float] | None = None,
        prior: Any = None,
    ) -> "Trace":
        """A trace from the question back over as many rows as the budget buys. The first of them
        follow edits: nothing attends to rows that meant another thing there.

        ``start``: the rows before it have KV by now, by default those of the prefix hit. Where a
        prompt came in chunks, those that were copied and the new text computed over copies may run
        once more, and where a prefix hit has open rows, ``most_open`` of these, by default what the
        budget buys of them. ``prior`` [prompt_len]: see ``Trace``. ``shares``: by default one step
        with a prior, three without.
        """
        start = plan.prefix_len if start is None else start
        required = self.required(plan, start)
        repaired = repair_rows(plan, budget=budget)
        if most_open is not None:
            repaired = min(repaired, most_open)
        shared = plan.blend.open if plan.blend and repaired else Rows()
        over = Rows()  # where nothing is copied the budget is for open rows
        if plan.copies:
            stale = plan.prefix_len if shared else plan.copies[0].dst_start
            over = plan.fresh_rows.clip(stale, max(start, stale))
        candidates = (plan.reused_rows | over | shared) - required
        count = budget_rows(plan.runs, prefix_len=plan.prefix_len, budget=budget)
        after = rows_after_edits(plan, each=AFTER_EDIT, limit=int(AFTER_EDITS * count)) - required
        rows = required | after
        query = rows.clip(query_rows(plan, suffix=self.seam).start, plan.prompt_len)
        return Trace(
            candidates.mask(plan.prompt_len),
            rows=rows,
            query=query,
            count=count + repaired,
            at_first=after,
            shared=(shared.mask(plan.prompt_len), repaired),
            shares=shares or (SHARES if prior is None else KNOWING),
            stretch=self.stretch,
            prior=prior,
            asks_once=not plan.runs and start == plan.prefix_len,
        )

    def required(self, plan: ReusePlan, start: int) -> Rows:
        """What runs in any case from ``start`` on; the question too where it began before."""
        first = min(start, query_rows(plan, suffix=self.seam).start)
        return required_rows(plan, suffix=self.seam).clip(first, plan.prompt_len)

    def rows(self, plan: ReusePlan, trace: "Trace", start: int | None = None) -> Rows:
        """The rows that run once a trace of the plan is done."""
        return self.required(plan, plan.prefix_len if start is None else start) | trace.chosen


class Trace:
    """Steps back from some rows, each a small pass through the lower layers.

    Until ``done``: run ``rows`` up to the probe layer, and ``feed`` the attention that ``query``,
    the last of them, pay to the prompt there. At the end ``chosen`` holds ``count`` of the
    candidates (bool [prompt_len]): those ``at_first``, and of the rest ``shares[i]`` from step
    ``i``. ``shared``: of these candidates only so many may be chosen. ``stretch``: see ``spread``.
    ``prior`` [length]: how much a row is likely to be off (``dependence.py``), which counts as
    much as the square root of the attention to it: a row that nobody looks at may be wrong, and one
    that is right may be looked at. ``asks_once``: the question's lower layers run once, see
    ``carried``. ``ran``: rows of all passes so far.
    """

    def __init__(
        self,
        candidates: np.ndarray,
        *,
        rows: Rows,
        query: Rows,
        count: int,
        at_first: Rows | None = None,
        shared: tuple[np.ndarray, int] | None = None,
        shares: Sequence[float] = SHARES,
        stretch: int = 0,
        prior: Any = None,
        asks_once: bool = False,
    ) -> None:
        self._candidates = candidates.copy()
        self.prior: Any = prior  # on the device where the steps choose there
        self.stretch = stretch
        self._left = count
        self._shared, self._left_shared = shared or (np.zeros(len(candidates), bool), 0)
        self._shares = list(shares)
        self._chosen = np.zeros(len(candidates), bool)
        self.rows, self.query = rows, query
        self._first, self._asking = rows, Rows() if asks_once else query
        self.ran = 0
        if at_first is not None:
            self._take(at_first)

    @property
    def length(self) -> int:
        """Of the prompt, in tokens."""
        return len(self._candidates)

    @property
    def candidates(self) -> np.ndarray:
        """bool [length]; not to be written."""
        return self._candidates

    @property
    def num_candidates(self) -> int:
        return int(self._candidates.sum())

    @property
    def first_candidate(self) -> int:
        """Its position; ``length`` without any."""
        return int(self._candidates.argmax()) if self._candidates.any() else self.length

    @property
    def takes_shared(self) -> bool:
        """Whether shared candidates may be chosen: then a step's count depends on the attention."""
        return self._left_shared > 0 and bool((self._shared & self._candidates).any())

    @property
    def left(self) -> int:
        """How many rows are still to be chosen, as far as there are candidates."""
        return self._left

    @property
    def shares(self) -> tuple[float, ...]:
        """Of the steps to come."""
        return tuple(self._shares)

    @property
    def most_chosen(self) -> int:
        """How many rows will have been chosen in the end, at most."""
        return int(self._chosen.sum()) + max(self._left, 0)

    @property
    def done(self) -> bool:
        return not self._shares or self._left <= 0 or not self._candidates.any()

    @property
    def chosen(self) -> Rows:
        return Rows.where(self._chosen)

    def carried(self) -> Rows:
        """Once done: new text whose lower layers, which the first step ran, need not run again.

        They saw copies that were not repaired yet; the layers above, and the question, see those
        repaired. In a turn that goes on from text which reused, and copies nothing, so does the
        question in its upper layers alone: it costs twice as much otherwise as what is repaired.
        """
        if self.rows is self._first:  # there was no step
            return Rows()
        rows = self._first - self._asking - self.chosen
        return rows if rows.num >= (CARRIED_FROM if self._asking else 1) else Rows()

    def feed(self, mass: np.ndarray) -> None:
        """``mass`` [prompt_len]: attention of the query rows to each position. Of a stretch that
        does not fit as a whole, those go first that are attended to. O(n log n)."""
        count = math.ceil(self._left * (self._shares[0] / sum(self._shares)))
        where = np.flatnonzero(self._candidates)
        wide = spread(np.where(self._candidates, mass, 0), self.stretch)
        if self.prior is not None:
            wide = self.prior * np.sqrt(wide + LEAST)
        order = where[np.lexsort((-mass[where], -wide[where]))]
        shared = self._shared[order]
        order = order[~shared | (np.cumsum(shared) <= self._left_shared)]
        rows = Rows.at(np.sort(order[:count]))
        self._take(rows)
        self._shares.pop(0)
        self.ran += self.rows.num
        self.rows = self.query = rows

    def _take(self, rows: Rows) -> None:
        self._candidates[rows.positions] = False
        self._chosen[rows.positions] = True
        self._left -= rows.num
        self._left_shared -= int(self._shared[rows.positions].sum())


def spread(mass: np.ndarray, stretch: int) -> np.ndarray:
    """Each position gets the most that one within ``stretch`` of it has: a statement is right only
    if its neighbours are, and attention points at a few of its tokens. O(n * stretch).

    >>> spread(np.array([0, 0, 5, 0, 0, 1]), 1).tolist()
    [0, 5, 5, 5, 1, 1]
    """
    if not stretch:
        return mass
    wide = np.pad(mass, stretch)  # attention is never negative
    windows = np.lib.stride_tricks.sliding_window_view(wide, 2 * stretch + 1)
    return np.asarray(windows.max(axis=-1))


def probe_layer(layers: int, depth: float) -> int:
    """Number of the layer at ``depth`` in [0, 1] of a model.

    >>> probe_layer(12, 0.25)
    3
    """
    return round(depth * (layers - 1))
