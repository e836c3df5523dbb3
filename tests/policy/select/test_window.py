"""The structural plan: windows after edits, seams, then heads, within the budget."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import covered
from strategies import prompts_with_runs

from kvshare_sglang.plan import Join, Run
from kvshare_sglang.policy.select.base import (
    MERGE_GAP,
    MIN_COPY,
    NEW,
    behind_sink,
    budget_rows,
)
from kvshare_sglang.policy.select.window import Window

BUDGETS = st.one_of(st.sampled_from((0.0, 0.15, 1.0)), st.floats(0, 1))
HEADS = st.sampled_from((0, 1, 16, 32, 100))


def plan_of(runs, *, prompt_len, prefix_len, budget, seam, window):
    selector = Window(seam, window)
    return selector.plan(runs, prompt_len=prompt_len, prefix_len=prefix_len, budget=budget)


@st.composite
def plans(draw, budget=BUDGETS):
    """A plan and what was asked for."""
    runs, prefix_len, prompt_len = draw(prompts_with_runs())
    asked = {"budget": draw(budget), "seam": draw(HEADS), "window": draw(HEADS)}
    return plan_of(runs, prompt_len=prompt_len, prefix_len=prefix_len, **asked), runs, asked


def tail_clip(plan, seam):
    """Reused tokens among the last ones of the prompt, which are computed in any case."""
    limit = plan.prompt_len - max(seam, 1)
    return sum(max(run.dst_stop - max(run.dst_start, limit), 0) for run in plan.runs)


@given(plans())
def test_the_end_of_the_prompt_is_always_computed(case):
    plan, _, asked = case
    last = range(max(plan.prompt_len - max(asked["seam"], 1), plan.prefix_len), plan.prompt_len)
    assert covered(plan.copies).isdisjoint(last)


@given(plans())
def test_each_copy_is_the_tail_end_of_one_accepted_run(case):
    plan, runs, asked = case
    limit = plan.prompt_len - max(asked["seam"], 1)
    assert set(plan.runs) <= set(runs)
    for run, copy in zip(plan.runs, plan.copies, strict=True):
        assert copy == run.cut(copy.dst_start, copy.dst_stop)
        assert copy.shift == run.shift
        assert copy.dst_stop == min(run.dst_stop, limit)
        assert copy.length > MERGE_GAP


@given(plans())
def test_no_more_is_computed_again_than_the_budget_and_the_end_allow(case):
    plan, _, asked = case
    bought = budget_rows(plan.runs, prefix_len=plan.prefix_len, budget=asked["budget"])
    assert plan.recomputed <= bought + tail_clip(plan, asked["seam"])


def test_a_run_that_is_dropped_leaves_no_budget_to_the_others():
    runs = (Run(1, 0, 0, 132), Run(2, 0, 132, 136))  # the seam and the prompt's end eat the second
    plan = plan_of(runs, prompt_len=268, prefix_len=0, budget=0.5, seam=100, window=0)
    assert plan.runs == runs[:1]
    assert plan.recomputed <= 0.5 * 132


@given(plans(budget=st.just(0.0)))
def test_without_a_budget_no_row_of_an_accepted_run_is_computed_again(case):
    plan, runs, asked = case
    limit = plan.prompt_len - max(asked["seam"], 1)
    assert plan.recomputed == tail_clip(plan, asked["seam"])
    head = max(asked["seam"], asked["window"])
    for run in runs:
        long = min(run.length - head, limit - run.dst_start) >= MIN_COPY
        assert not long or run in plan.runs


@given(plans(budget=st.just(1.0)))
def test_a_whole_budget_copies_nothing(case):
    plan, _, _ = case
    assert (plan.copies, plan.runs, plan.reused, plan.depth) == ((), (), 0, 0)
    assert plan.exact_len == plan.prompt_len


@given(plans())
def test_heads_are_computed_in_full_where_the_budget_has_room_for_all(case):
    plan, runs, asked = case
    seam, window = asked["seam"], asked["window"]
    of = {Join.SEAM: seam, Join.EDIT: max(seam, window), Join.ON: 0, Join.SAME: 0}
    heads = {run: min(run.length, of[run.join]) for run in behind_sink(runs)}
    if sum(heads.values()) <= budget_rows(
        plan.runs, prefix_len=plan.prefix_len, budget=asked["budget"]
    ):
        for run, copy in zip(plan.runs, plan.copies, strict=True):
            assert copy.dst_start - run.dst_start >= heads[run]


@given(st.integers(200, 2000), st.integers(200, 2000), st.integers(0, 100))
def test_windows_are_served_before_seams_and_what_is_left_goes_to_all(first, second, allowed):
    runs = (Run(1, 0, 10, first), Run(2, 50, 20 + first, second, join=Join.EDIT))
    plan = plan_of(
        runs,
        prompt_len=first + second + 100,
        prefix_len=0,
        budget=(allowed + 0.5) / (first + second + NEW * 20),  # 20 new tokens before the last run
        seam=16,
        window=32,
    )
    seam, window = (c.dst_start - r.dst_start for r, c in zip(plan.runs, plan.copies, strict=True))
    if allowed <= 48:
        assert (seam, window) == (max(allowed - 32, 0), min(allowed, 32))
    else:
        assert seam >= 16
        assert window >= 32
        assert allowed - 2 <= seam + window <= allowed


@pytest.mark.parametrize(("seam", "window"), [(16, 32), (32, 16), (0, 32), (32, 0), (0, 0)])
def test_after_an_edit_the_longer_of_window_and_seam_is_computed(seam, window):
    runs = (Run(1, 0, 10, 1000, join=Join.EDIT), Run(2, 0, 1010, 1000))
    heads = max(seam, window), seam
    plan = plan_of(
        runs, prompt_len=3000, prefix_len=0, budget=sum(heads) / 2000, seam=seam, window=window
    )
    assert plan.copies == (runs[0].cut(10 + heads[0], 1010), runs[1].cut(1010 + heads[1], 2010))


@pytest.mark.parametrize("length", [MIN_COPY - 1, MIN_COPY, MIN_COPY + 1])
def test_the_shortest_copy_is_inclusive(length):
    run = Run(1, 0, 10, length)
    plan = plan_of((run,), prompt_len=100, prefix_len=0, budget=0.0, seam=0, window=0)
    assert plan.copies == ((run,) if length >= MIN_COPY else ())


@pytest.mark.parametrize(
    "runs",
    [
        (Run(1, 0, 50, 100), Run(1, 0, 149, 100)),
        (Run(1, 0, 200, 100), Run(1, 0, 50, 100)),
        (Run(1, 0, 9, 100),),
        (Run(1, 0, 450, 100),),
    ],
)
def test_runs_out_of_order_or_out_of_the_prompt_are_refused(runs):
    with pytest.raises(ValueError, match="must be non-empty and lie in"):
        plan_of(runs, prompt_len=500, prefix_len=10, budget=0.1, seam=16, window=32)


def test_a_run_after_its_own_old_text_is_copied_whole():
    runs = (Run(1, 0, 0, 500, 1, Join.SAME), Run(2, 0, 600, 500))
    asked = {"prompt_len": 1200, "prefix_len": 0, "seam": 16, "window": 32}
    for budget in (0.0, 0.15, 0.5):
        plan = plan_of(runs, budget=budget, **asked)
        assert plan.copies[0] == runs[0]
    assert [run.depth_after for run in runs] == [1, 1]
    assert runs[0]._replace(join=Join.SEAM).depth_after == 2
