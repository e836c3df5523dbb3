"""Which new text of a prompt others may reuse once it is computed."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import prompts_with_runs

from kvshare_sglang.plan import Blend, Join, ReusePlan, Rows, Run
from kvshare_sglang.policy.retain import future_sources


@given(prompts_with_runs(), st.integers(0, 4), st.booleans(), st.integers(0, 3))
@example(((Run(1, 0, 0, 40, 0, Join.SAME),), 0, 80), 1, False, 0)
def test_new_rows_are_sources_where_they_are_exact_or_not_too_deep(
    prompt, max_depth: int, watched: bool, blend_depth: int
) -> None:
    """By the definition, row by row: of what stands before a new row, how deep it is."""
    runs, prefix_len, prompt_len = prompt
    new = Rows.of_runs(runs).complement(prefix_len, prompt_len)
    plan = ReusePlan.computing(new, prompt_len=prompt_len, prefix_len=prefix_len, runs=runs)
    if blend_depth and prefix_len:
        plan = plan.behind(Blend(prefix_len - 1, Rows(), blend_depth))
    found = future_sources(plan, max_depth=max_depth, watched=watched)
    copied = {row for run in runs for row in range(run.dst_start, run.dst_stop)}
    want = []
    for row in range(prefix_len, prompt_len):
        depths = [run.depth_after for run in runs if run.dst_stop <= row]
        depths += [plan.blend.depth] if plan.blend else []
        exact = not plan.blend and not any(run.dst_stop <= row for run in runs)
        deep_enough = 0 < max(depths, default=0) <= max_depth
        if row not in copied and (exact or (deep_enough and not watched)):
            want.append(row)
    assert found.positions.tolist() == want


@pytest.mark.parametrize("watched", [False, True])
def test_a_plan_that_copies_nothing_gives_all(watched: bool) -> None:
    plan = ReusePlan.computing(Rows([(2, 9)]), prompt_len=9, prefix_len=2, runs=[])
    assert future_sources(plan, max_depth=0, watched=watched) == Rows([(2, 9)])
