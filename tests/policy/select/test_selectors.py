"""Every selector keeps to its budget, never leaves out what must run, chooses what it says."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from wishes import SEAM, WINDOW, copied_whole, runs_in_a_prompt, wishes

from kvshare_sglang.bench.calibrate.choice import BUDGETS
from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.plan import Blend, Join, ReusePlan, Rows, Run
from kvshare_sglang.policy.select.attention_trace import AttentionTrace
from kvshare_sglang.policy.select.base import (
    NEW,
    REACH,
    SINK,
    RowScores,
    Sees,
    SelectionRequest,
    budget_rows,
    copy_all,
    repair_rows,
    required_rows,
)
from kvshare_sglang.policy.select.baselines import SCORES, baseline
from kvshare_sglang.policy.select.dhd import DILATION, Dhd
from kvshare_sglang.policy.select.window import Window
from kvshare_sglang.runtime.calibration import UNMEASURED_BUDGET

BASELINES = ("full", "copy", "epic", "random", *SCORES)
ALL = [
    Window(SEAM, WINDOW),
    AttentionTrace(SEAM),
    Dhd(SEAM, WINDOW),
    *(baseline(name, seam=SEAM, seed=1) for name in BASELINES),
]
SCORED = [selector for selector in ALL if selector.sees is Sees.SCORES]


def rows_of(selector, wish):
    """The rows that run in the end, for selectors that choose by structure or by scores."""
    plan = wish.plan
    if selector.sees is Sees.SCORES:
        return selector.select(wish).compute
    asked = {"prompt_len": plan.prompt_len, "prefix_len": plan.prefix_len}
    return selector.plan(plan.runs, **asked, budget=wish.budget).compute


def chosen(selector, wish):
    return rows_of(selector, wish) - required_rows(wish.plan, suffix=SEAM)


@given(runs_in_a_prompt(), st.floats(0, 1), st.integers(1, 300))
def test_moved_text_is_no_sink_whatever_selector_copies_it(case, budget, shift):
    runs, prefix_len, prompt_len = case
    moved = [run._replace(src_start=run.src_start + shift) for run in runs]
    for selector in ALL:
        plan = selector.plan(moved, prompt_len=prompt_len, prefix_len=prefix_len, budget=budget)
        first = Rows([(prefix_len, SINK)][: prefix_len < SINK])
        assert not first - plan.compute, selector.name
        assert not plan.copies or plan.copies[0].dst_start >= SINK, selector.name


@given(runs_in_a_prompt(), st.floats(0, 1))
def test_a_plan_holds_whatever_selector_made_it(case, budget):
    runs, prefix_len, prompt_len = case
    for selector in ALL:
        plan = selector.plan(runs, prompt_len=prompt_len, prefix_len=prefix_len, budget=budget)
        most = selector.most_rows(plan, budget=budget)
        assert not plan.fresh_rows - plan.compute, selector.name
        assert plan.compute.stop == prompt_len, selector.name
        assert plan.compute.clip(prompt_len - SEAM, prompt_len).num == min(
            SEAM, prompt_len - prefix_len
        )
        if selector.sees is Sees.NOTHING:
            assert most == plan.computed, selector.name
            # Of a run that is chosen but for less than a copy is worth nothing is left.
            every = copy_all(runs, prompt_len=prompt_len, prefix_len=prefix_len, suffix=SEAM)
            bought = budget_rows(every.runs, prefix_len=prefix_len, budget=budget)
            extra = plan.compute - required_rows(plan, suffix=SEAM)
            assert selector.name == "full" or extra.num <= bought, selector.name
        else:
            assert plan.computed <= most <= prompt_len - prefix_len, selector.name


@given(wishes(), st.sampled_from(SCORED))
def test_a_selector_that_sees_scores_keeps_to_what_it_said(wish, selector):
    plan = selector.select(wish)
    required = required_rows(wish.plan, suffix=SEAM)
    assert not required - plan.compute
    assert (plan.compute - required).num <= wish.num_rows
    assert plan.computed <= selector.most_rows(wish.plan, budget=wish.budget)


@given(wishes())
def test_the_ends_of_the_scale(wish):
    every = wish.plan.reused_rows - required_rows(wish.plan, suffix=SEAM)
    assert chosen(baseline("full", seam=SEAM), wish) == every
    assert chosen(baseline("copy", seam=SEAM), wish) == Rows()
    for selector in ALL:
        if selector.name not in ("copy", "trace"):
            assert chosen(selector, wish._replace(budget=1.0)) == every, selector.name


@given(wishes(), st.sampled_from(sorted(SCORES)))
def test_a_scoring_baseline_takes_the_largest_scores(wish, name):
    fields = {"cacheblend": "keys", "deviation": "values"}
    score = fields.get(name, "attention")
    values = getattr(wish.scores, score)
    best = np.sort(values)[::-1][: wish.num_rows]
    expected = Rows.at(wish.scores.positions[np.isin(values, best)])
    expected -= required_rows(wish.plan, suffix=SEAM)
    assert chosen(baseline(name, seam=SEAM), wish) == expected


@given(wishes())
def test_dhd_takes_windows_and_seams_before_any_score(wish):
    heads = {Join.SEAM: SEAM, Join.EDIT: WINDOW, Join.ON: 0, Join.SAME: 0}
    need = Rows(
        (run.dst_start, run.dst_start + heads[run.join])
        for run in wish.plan.runs
        if heads[run.join]
    )
    if need.num <= wish.num_rows:
        assert not need - rows_of(Dhd(SEAM, WINDOW), wish)


def test_dhd_takes_neighbours_along():
    run = Run(1, 0, 10, 200, join=Join.SAME)
    plan = copied_whole((run,), prefix_len=10, prompt_len=230)
    score = np.zeros(200)
    score[100] = 1.0
    scores = RowScores(plan.reused_rows.positions, score, score, score + 1)
    wish = SelectionRequest(plan, (2 * DILATION + 1) / 200, scores)
    rows = chosen(Dhd(SEAM, WINDOW), wish)
    assert rows == Rows([(110 - DILATION, 111 + DILATION)])


@given(wishes(), st.floats(0, 1))
def test_runs_that_are_too_far_off_run_whole(wish, tau):
    plan = Dhd(SEAM, WINDOW, tau).select(wish)
    base = 0
    for run in wish.plan.runs:
        far = wish.scores.values[base : base + run.length].mean()
        base += run.length
        assert (far <= tau) or not any(
            run.dst_start <= copy.dst_start < run.dst_stop for copy in plan.copies
        )


def test_an_unknown_selector_is_refused_by_name():
    with pytest.raises(ValueError, match=r"the selector must be one of full, .*, got 'best'"):
        baseline("best", seam=SEAM)


def test_one_budget_buys_the_same_whatever_the_selector():
    few, many, after = (
        copied_whole((Run(1, 0, at, 200),), prefix_len=0, prompt_len=at + 200 + tail)
        for at, tail in ((0, 20), (100, 20), (0, 120))
    )
    bought = [budget_rows(plan.runs, prefix_len=0, budget=0.1) for plan in (few, many, after)]
    assert bought == [20, 40, 20]  # new text among what is reused buys more, a question none
    for selector in (Window(8, 4), AttentionTrace(8), Dhd(8, 4)):
        most = [
            selector.most_rows(
                selector.plan(plan.runs, prompt_len=plan.prompt_len, prefix_len=0, budget=0.1),
                budget=0.1,
            )
            for plan in (few, many, after)
        ]
        assert most == [20 + 20, 100 + 40 + 20, 20 + 120], selector.name
    assert budget_rows(many.runs, prefix_len=0, budget=0.0) == 0
    assert budget_rows(many.runs, prefix_len=0, budget=1.0) == 200


@given(runs_in_a_prompt(), st.floats(0, 1), st.sampled_from([1, 7, 40]))
def test_what_goes_on_behind_a_change_counts_as_far_as_that_reaches(case, budget, times):
    """Row by row."""
    runs, prefix_len, _ = case
    long = [
        run._replace(dst_start=run.dst_start * times, length=run.length * times) for run in runs
    ]
    prefix_len *= times
    reach = REACH if budget <= 0.5 else REACH * budget / (1 - min(budget, 1 - 1e-9))
    counted, changed = 0, prefix_len
    for run in long:
        if run.join in (Join.SEAM, Join.EDIT):
            changed = run.dst_start
        for row in range(run.dst_start, run.dst_stop):
            counted += run.join is Join.SEAM or row < changed + reach
    new = long[-1].dst_stop - prefix_len - sum(run.length for run in long)
    want = min(sum(run.length for run in long), budget * (counted + NEW * new))
    bought = budget_rows(long, prefix_len=prefix_len, budget=budget)
    assert abs(bought - want) <= 1 + budget
    if times == 1:  # short prompts: the plain share
        every = sum(run.length for run in long)
        assert bought == min(every, int(budget * (every + NEW * new)))


@given(st.floats(0, 1), st.floats(0, 1), st.integers(4, 5000))
def test_a_turn_repairs_a_share_of_its_text_and_more_only_where_it_is_asked_for(budget, more, new):
    def repair(share):
        open_rows = Blend(0, Rows([(0, 9000)]), depth=1)
        return repair_rows(ReusePlan(9000 + new, 9000, (), (), open_rows), budget=share)

    assert repair(min(budget, more)) <= repair(max(budget, more))
    default = KVShareConfig().budget
    # What servers take by themselves: measured, or of a model that never was.
    for share in (default, UNMEASURED_BUDGET * default, *BUDGETS):
        assert repair(share) == int(0.18 * max(new, 84) + 1e-9)
    assert repair(1.0) == max(new, 84)
    assert repair(0.0) == 0


@given(st.integers(84, 5000), st.floats(0, 0.5))
def test_a_turn_costs_a_quarter_more_than_its_text_with_the_passes_of_its_repair(new, depth):
    """A pass runs ``depth`` of the layers; those of the turn's own text run once."""
    blend = Blend(0, Rows([(0, 9000)]), depth=1)
    plan = ReusePlan.computing(
        Rows([(9000, 9000 + new)]), prompt_len=9000 + new, prefix_len=9000, runs=(), blend=blend
    )
    trace = AttentionTrace(SEAM).trace(plan, budget=KVShareConfig().budget)
    while not trace.done:
        trace.feed(np.ones(trace.length))
    ran = new + trace.chosen.num + depth * (trace.ran - trace.carried().num)
    assert ran <= 1.25 * new + 2


def test_a_longer_conversation_buys_no_more_behind_the_same_edit():
    bought = []
    for turns in range(1, 60):
        document = Run(1, 20, 20, 1800)
        said = [Run(2 + i, at := 1820 + 120 * i, at, 120, join=Join.ON) for i in range(turns)]
        bought.append(budget_rows([document, *said], prefix_len=0, budget=0.15))
    assert bought == sorted(bought)
    assert bought[0] < bought[-1] == bought[2] == int(0.15 * (REACH + NEW * 20))
