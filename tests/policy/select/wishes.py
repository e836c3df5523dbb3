"""Plans with scores for selectors: strategies that several tests share."""

from typing import Any

import numpy as np
from hypothesis import strategies as st

from kvshare_sglang.plan import Join, ReusePlan, Run
from kvshare_sglang.policy.select.base import RowScores, SelectionRequest, copy_all

SEAM, WINDOW = 8, 16


@st.composite
def runs_in_a_prompt(draw: Any) -> tuple[tuple[Run, ...], int, int]:
    """``(runs, prefix_len, prompt_len)``: long runs, little text between them."""
    runs, at = [], draw(st.integers(0, 5))
    prefix = at
    for _ in range(draw(st.integers(1, 5))):
        at += draw(st.integers(0, 6))
        length = draw(st.integers(60, 150))
        runs.append(Run(1, at, at, length, join=draw(st.sampled_from(list(Join)))))
        at += length
    return tuple(runs), prefix, at + draw(st.integers(1, 30))


def copied_whole(runs: tuple[Run, ...], *, prefix_len: int, prompt_len: int) -> ReusePlan:
    return copy_all(runs, prompt_len=prompt_len, prefix_len=prefix_len, suffix=SEAM)


@st.composite
def wishes(draw: Any) -> SelectionRequest:
    """A plan that copies all it can, noise as scores, and any budget."""
    runs, prefix_len, prompt_len = draw(runs_in_a_prompt())
    plan = copied_whole(runs, prefix_len=prefix_len, prompt_len=prompt_len)
    where = plan.reused_rows.positions
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    scores = RowScores(where, *(rng.random(len(where)) for _ in range(3)))
    return SelectionRequest(plan, draw(st.floats(0, 1)), scores, seed=1)
