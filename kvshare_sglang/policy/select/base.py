"""What every selector answers: which reused rows run again, and how many at most. Pure.

New text, edits and the end of the prompt always run; a selector chooses among the rows that reuse
found. Some choose by structure when the request is planned; others must first see something of the
forward pass, and say beforehand how many rows they will choose at most.
"""

import math
from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple, Protocol

import numpy as np

from kvshare_sglang.plan import Join, ReusePlan, Rows, Run, check_runs

MIN_COPY = 32  # copying fewer tokens in a row than this costs more than it saves
MERGE_GAP = 16  # so few tokens are cheaper to compute than to skip
NEW = 2  # a new row before copies buys as many rows as so many copies do
REACH = 2048  # tokens that a change reaches on in its own text; more where more care is asked for
USUAL, CARE = 0.15, 0.5  # the default budget, and the most that a model is measured to need
REPAIR = 0.18  # open rows before it that a new row buys: a quarter more, passes counted
FEWEST, TURN = 4, 84  # tokens of new text that may ask something, and that it counts as at least
QUERY = 64  # of so many rows the attention is looked at, the last ones
SINK = 4  # the first tokens of a prompt, which draw attention whatever they say


class Sees(StrEnum):
    """What a selector must see of the forward pass before it chooses."""

    NOTHING = "nothing"
    ATTENTION = "attention"  # what some rows pay to the prompt at a probe layer, step by step
    SCORES = "scores"  # how far copied rows are off at a check layer


class RowScores(NamedTuple):
    """What a check layer saw of the reused rows; all arrays [n], in order of position.

    ``keys`` and ``values`` are relative deviations ``|fresh - cached| / |fresh|``; ``attention``
    is the mean weight that the query rows give to the row, over heads.
    """

    positions: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    attention: np.ndarray


class Selector(Protocol):
    """One way to choose rows. ``name`` is the value of ``--kvshare-select``."""

    @property
    def name(self) -> str: ...

    @property
    def sees(self) -> Sees: ...

    def plan(
        self, runs: Sequence[Run], *, prompt_len: int, prefix_len: int, budget: float
    ) -> ReusePlan:
        """The plan for ``runs``, which ascend and are disjoint in ``[prefix_len, prompt_len)``.

        Final where the selector sees nothing; else it copies all that may be copied, and the rows
        that are chosen later run too. Raises ValueError on runs out of order.
        """
        ...

    def most_rows(self, plan: ReusePlan, *, budget: float) -> int:
        """How many rows run at most, new text included; exact where the selector sees nothing."""
        ...


class SelectionRequest(NamedTuple):
    """What a selector that sees scores is asked."""

    plan: ReusePlan
    budget: float  # share in [0, 1], see ``budget_rows``
    scores: RowScores
    seed: int = 0

    @property
    def num_rows(self) -> int:
        """How many reused rows may run."""
        return budget_rows(self.plan.runs, prefix_len=self.plan.prefix_len, budget=self.budget)


def budget_rows(runs: Sequence[Run], *, prefix_len: int, budget: float) -> int:
    """How many reused rows a budget buys: that share of the reused rows, and of ``NEW`` times the
    new ones before the last of them. The more new text is there, the more copies may be off; a
    question after them changes none. The one definition for every selector.

    Text that goes on behind a change counts so far only as the change reaches, ``REACH`` tokens,
    and further where the budget is above ``CARE``: so a turn of a long conversation costs what it
    costs in a short one. A run that was moved counts whole, and a budget of 1 buys every row.

    >>> budget_rows([Run(1, 0, 10, 90)], prefix_len=0, budget=0.1)
    11
    >>> clock = [Run(1, 20, 20, 500), Run(2, 520, 520, 9000, join=Join.ON)]
    >>> [budget_rows(clock, prefix_len=0, budget=budget) for budget in (0.15, 0.3, 1.0)]
    [313, 626, 9500]
    """
    if not runs:
        return 0
    reused = sum(run.length for run in runs)
    new = runs[-1].dst_stop - prefix_len - reused
    reach = REACH * max(1, _odds(budget) / _odds(CARE)) if budget < 1 else math.inf
    counted, changed = 0.0, prefix_len  # where the text before was last changed
    for run in runs:
        if run.join in (Join.SEAM, Join.EDIT):
            changed = run.dst_start
        stop = run.dst_stop if run.join is Join.SEAM else min(run.dst_stop, changed + reach)
        counted += max(0, stop - run.dst_start)
    return min(reused, int(budget * (counted + NEW * new)))


def repair_rows(plan: ReusePlan, *, budget: float) -> int:
    """How many open rows of the prefix hit a budget buys: a share of the new text of the turn,
    which counts as ``TURN`` tokens at least, whatever the length of the conversation. The share
    is ``REPAIR`` for budgets from ``USUAL`` to ``CARE``, less below and up to 1 above.

    >>> from kvshare_sglang.plan import Blend
    >>> blend = Blend(0, Rows([(10, 900)]), depth=1)
    >>> plans = [ReusePlan(1000 + new, 1000, (), (), blend) for new in (1, 9, 400)]
    >>> [[repair_rows(plan, budget=budget) for plan in plans] for budget in (0.06, 0.15, 0.3, 1)]
    [[0, 6, 28], [0, 15, 72], [0, 15, 72], [0, 84, 400]]
    """
    if plan.blend is None:
        return 0
    new = plan.prompt_len - plan.prefix_len - plan.reused
    if new < FEWEST:  # the same prompt again
        return 0
    more = 1 - (1 - REPAIR) * (1 - budget) / (1 - CARE)  # a line from REPAIR at CARE to 1 at 1
    share = max(min(REPAIR, budget * REPAIR / USUAL), more)
    return min(plan.blend.open.num, int(share * max(new, TURN) + 1e-9))


def _odds(share: float) -> float:
    return share / (1 - share)


def copy_all(runs: Sequence[Run], *, prompt_len: int, prefix_len: int, suffix: int) -> ReusePlan:
    """The plan that copies all it can: every run of ``MIN_COPY`` tokens or more before the last
    ``max(suffix, 1)`` tokens, which choose the next token and always run."""
    useful, limit = worth_copying(runs, prompt_len=prompt_len, prefix_len=prefix_len, suffix=suffix)
    copies = [run.cut(run.dst_start, min(run.dst_stop, limit)) for run in useful]
    return ReusePlan(prompt_len, prefix_len, tuple(useful), tuple(copies))


def worth_copying(
    runs: Sequence[Run], *, prompt_len: int, prefix_len: int, suffix: int
) -> tuple[list[Run], int]:
    """Of the runs, behind the sink, those that have ``MIN_COPY`` tokens or more before the last
    ``max(suffix, 1)`` of the prompt; and where these begin. Raises ValueError for runs out of
    order or out of ``[prefix_len, prompt_len)``."""
    check_runs(runs, start=prefix_len, stop=prompt_len)
    limit = prompt_len - max(suffix, 1)
    behind = behind_sink(runs)
    return [run for run in behind if min(run.dst_stop, limit) - run.dst_start >= MIN_COPY], limit


def behind_sink(runs: Sequence[Run]) -> list[Run]:
    """What of the runs may be copied: of moved text nothing to the first ``SINK`` positions. Text
    from the middle of a prompt is no sink (Xiao et al. 2023, arXiv 2309.17453), and without one
    every row behind is off.

    >>> [tuple(run[1:4]) for run in behind_sink([Run(1, 300, 0, 90), Run(1, 0, 90, 60)])]
    [(304, 4, 86), (0, 90, 60)]
    """
    return [
        run.cut(min(max(run.dst_start, SINK), run.dst_stop), run.dst_stop) if run.shift else run
        for run in runs
    ]


def required_rows(plan: ReusePlan, *, suffix: int) -> Rows:
    """Rows that no selector may leave out: new text, and the last ``suffix`` tokens."""
    start = max(plan.prompt_len - max(suffix, 1), plan.prefix_len)
    return plan.fresh_rows | Rows([(start, plan.prompt_len)])


def rows_at_most(plan: ReusePlan, *, budget: float, suffix: int) -> int:
    """How many rows run at most where they are chosen later, new text and repair included."""
    bought = budget_rows(plan.runs, prefix_len=plan.prefix_len, budget=budget)
    every = plan.prompt_len - plan.prefix_len
    most = min(required_rows(plan, suffix=suffix).num + bought, every)
    return most + repair_rows(plan, budget=budget)


def query_rows(plan: ReusePlan, *, suffix: int) -> Rows:
    """The rows whose attention says which reused rows matter: the last of those after all runs,
    and at least the end of the prompt."""
    end = plan.runs[-1].dst_stop if plan.runs else plan.prefix_len
    after = min(end, plan.prompt_len - max(suffix, 1))
    return Rows([(max(after, plan.prompt_len - QUERY, plan.prefix_len), plan.prompt_len)])


def rows_after_edits(plan: ReusePlan, *, each: int, limit: int) -> Rows:
    """Up to ``each`` rows at the start of every run that follows an edit, also where the edited
    text moved: new text in front of a run may have cut a word or a number, whose rest means what
    it meant before. If that exceeds ``limit``, the limit is shared evenly; earlier runs get the
    remainder."""
    ends = [plan.prefix_len, *(run.dst_stop for run in plan.runs)]  # of what is before each run
    runs = [
        run
        for end, run in zip(ends, plan.runs, strict=False)
        if run.join is Join.EDIT or (run.join is Join.SEAM and end < run.dst_start)
    ]
    share, more = divmod(limit, max(len(runs), 1))
    lengths = [min(each, run.length, share + (i < more)) for i, run in enumerate(runs)]
    return Rows(
        (run.dst_start, run.dst_start + n) for run, n in zip(runs, lengths, strict=True) if n
    )
