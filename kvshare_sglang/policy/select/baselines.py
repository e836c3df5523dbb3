"""Rules of the literature and limit cases, for comparison under the same interface. Pure.

A server runs none of them; ``sim`` and ``bench`` do.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from kvshare_sglang.plan import ReusePlan, Rows, Run
from kvshare_sglang.policy.select.base import (
    RowScores,
    Sees,
    SelectionRequest,
    budget_rows,
    copy_all,
    required_rows,
    rows_at_most,
)


class Structural(NamedTuple):
    """Chooses by the runs alone: ``rule(runs, count)`` gives the reused rows that run."""

    name: str
    seam: int
    rule: Callable[[Sequence[Run], int], Rows]
    sees: Sees = Sees.NOTHING

    def plan(
        self, runs: Sequence[Run], *, prompt_len: int, prefix_len: int, budget: float
    ) -> ReusePlan:
        plan = copy_all(runs, prompt_len=prompt_len, prefix_len=prefix_len, suffix=self.seam)
        count = budget_rows(plan.runs, prefix_len=prefix_len, budget=budget)
        chosen = self.rule(plan.runs, count)
        return plan.recompute(required_rows(plan, suffix=self.seam) | chosen)

    def most_rows(self, plan: ReusePlan, *, budget: float) -> int:
        return plan.computed


class TopRows(NamedTuple):
    """Chooses the rows of largest ``score``, wherever they are."""

    name: str
    seam: int
    score: Callable[[RowScores], np.ndarray]
    sees: Sees = Sees.SCORES

    def plan(
        self, runs: Sequence[Run], *, prompt_len: int, prefix_len: int, budget: float
    ) -> ReusePlan:
        return copy_all(runs, prompt_len=prompt_len, prefix_len=prefix_len, suffix=self.seam)

    def most_rows(self, plan: ReusePlan, *, budget: float) -> int:
        return rows_at_most(plan, budget=budget, suffix=self.seam)

    def select(self, asked: SelectionRequest) -> ReusePlan:
        chosen = self.choose(asked)
        return asked.plan.recompute(required_rows(asked.plan, suffix=self.seam) | chosen)

    def choose(self, asked: SelectionRequest) -> Rows:
        order = np.argsort(-self.score(asked.scores), kind="stable")
        return Rows.at(np.sort(asked.scores.positions[order[: asked.num_rows]]))


def every(runs: Sequence[Run], count: int) -> Rows:
    """All of them: full prefill."""
    return Rows.of_runs(runs)


def none(runs: Sequence[Run], count: int) -> Rows:
    """None of them: copies alone."""
    return Rows()


def epic(runs: Sequence[Run], count: int) -> Rows:
    """EPIC (LegoLink, arXiv 2410.15332): the first rows of each run, the same number in each."""
    left, taken = count, {}
    for i, run in enumerate(sorted(runs, key=lambda run: run.length)):
        taken[run] = min(run.length, left // (len(runs) - i))
        left -= taken[run]
    return Rows((run.dst_start, run.dst_start + taken[run]) for run in runs if taken[run])


def random(seed: int) -> Callable[[Sequence[Run], int], Rows]:
    """Rows by lot: the floor under every rule."""

    def rule(runs: Sequence[Run], count: int) -> Rows:
        rng = np.random.default_rng(seed)
        return Rows.at(np.sort(rng.choice(Rows.of_runs(runs).positions, count, replace=False)))

    return rule


def baseline(name: str, *, seam: int, seed: int = 0) -> Structural | TopRows:
    """The rule of that name. Raises ValueError on one that is not known."""
    rules = {"full": every, "copy": none, "epic": epic, "random": random(seed)}
    if name in rules:
        return Structural(name, seam, rules[name])
    if name in SCORES:
        return TopRows(name, seam, SCORES[name])
    known = ", ".join((*rules, *SCORES))
    raise ValueError(f"the selector must be one of {known}, got {name!r}")


# CacheBlend (arXiv 2405.16444) takes the keys that changed most; the others are single terms.
SCORES: dict[str, Callable[[RowScores], np.ndarray]] = {
    "cacheblend": lambda scores: scores.keys**2,
    "attention": lambda scores: scores.attention,
    "prophetkv": lambda scores: scores.attention,  # of all layers, see ``sim.engine``
    "deviation": lambda scores: scores.values,
}
