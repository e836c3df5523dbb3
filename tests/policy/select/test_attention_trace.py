"""Traces choose what is attended to, step by step, within their budget."""

import math
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from wishes import SEAM, copied_whole, wishes

from kvshare_sglang.plan import Blend, Join, ReusePlan, Rows, Run, merge_ranges
from kvshare_sglang.policy.refresh import Watch
from kvshare_sglang.policy.select import attention_trace
from kvshare_sglang.policy.select.attention_trace import (
    AFTER_EDIT,
    AFTER_EDITS,
    CARRIED_FROM,
    SHARES,
    AttentionTrace,
    probe_layer,
)
from kvshare_sglang.policy.select.base import (
    budget_rows,
    repair_rows,
    required_rows,
    rows_after_edits,
)

SELECTOR = AttentionTrace(SEAM)


def bought(wish):
    return budget_rows(wish.plan.runs, prefix_len=wish.plan.prefix_len, budget=wish.budget)


def trace_of(wish, **options):
    return SELECTOR.trace(wish.plan, budget=wish.budget, **options)


def finished(trace, rng):
    """Feed noise to the end; the query rows of each step."""
    queries = []
    while not trace.done:
        queries.append(trace.query)
        assert not trace.query - trace.rows
        trace.feed(rng.random(trace.length))
    return queries


@given(wishes(), st.lists(st.floats(0.1, 1), min_size=1, max_size=4), st.integers(0, 100))
def test_a_trace_spends_its_budget_on_reused_rows(wish, shares, seed):
    plan = wish.plan
    trace = trace_of(wish, shares=shares)
    free = plan.reused_rows - required_rows(plan, suffix=SEAM)
    queries = finished(trace, np.random.default_rng(seed))
    assert not trace.chosen - free
    assert trace.chosen.num == min(free.num, bought(wish))
    assert len(queries) <= len(shares)
    if queries:
        assert queries[0].stop == plan.prompt_len  # the question asks first


@given(wishes(), st.integers(0, 100))
def test_no_more_rows_run_than_admission_was_told(wish, seed):
    trace = trace_of(wish)
    finished(trace, np.random.default_rng(seed))
    rows = required_rows(wish.plan, suffix=SEAM) | trace.chosen
    most = SELECTOR.most_rows(wish.plan, budget=wish.budget)
    assert wish.plan.recompute(rows).computed <= most <= wish.plan.prompt_len


@given(wishes(), st.integers(0, 9), st.integers(0, 100))
def test_each_step_takes_what_the_one_before_attends_to_most(wish, stretch, seed):
    """Of the rows that may be chosen, those near one that is attended to, and of these the ones
    that are attended to themselves: a look at each pair."""
    rng = np.random.default_rng(seed)
    trace = AttentionTrace(SEAM, stretch).trace(wish.plan, budget=wish.budget)
    free = wish.plan.reused_rows - required_rows(wish.plan, suffix=SEAM)
    while not trace.done:
        mass, before = rng.random(trace.length), trace.chosen
        at = (free - before).positions
        near = np.abs(at[:, None] - at[None]) <= stretch
        trace.feed(mass)
        wide = mass.copy()
        wide[at] = (near * mass[at]).max(axis=1, initial=0)
        rank = list(zip(wide, mass, strict=True))
        taken, left = trace.rows, free - trace.chosen
        assert trace.chosen - before == taken
        if left and taken:
            assert min(rank[i] for i in taken.positions) >= max(rank[i] for i in left.positions)


def after_edits(plan):
    """The runs behind an edit, moved or not: by what each token is, one by one."""
    new = set(range(plan.prefix_len, plan.prompt_len)) - {
        at for run in plan.runs for at in range(run.dst_start, run.dst_stop)
    }
    return [
        run
        for run in plan.runs
        if run.join is Join.EDIT or (run.join is Join.SEAM and run.dst_start - 1 in new)
    ]


@given(wishes())
def test_each_step_has_its_share_and_rows_after_edits_come_first(wish):
    trace = trace_of(wish)
    first, count = trace.chosen, bought(wish)
    assert first.num <= AFTER_EDITS * count
    starts = {run.dst_start for run in after_edits(wish.plan)}
    for stretch in first.ranges:
        assert stretch.start in starts
        assert stretch.num <= AFTER_EDIT
    assert not first - trace.rows  # the question sees them as they are now
    left, found = count - first.num, []
    while not trace.done:
        before = trace.chosen.num
        trace.feed(np.ones(trace.length))
        found.append(trace.chosen.num - before)
    free = wish.plan.reused_rows - required_rows(wish.plan, suffix=SEAM)
    if trace.chosen == free:
        return  # it took all there was
    wanted = np.cumsum(SHARES) / sum(SHARES) * left
    assert np.abs(np.cumsum(found) - wanted[: len(found)]).max(initial=0) < len(SHARES)


def test_few_edits_have_all_their_rows_and_many_share():
    runs = (Run(1, 40, 40, 100, join=Join.EDIT), Run(2, 0, 140, 160))
    plan = copied_whole(runs, prefix_len=30, prompt_len=310)
    chosen = AttentionTrace(8).trace(plan, budget=0.1).chosen
    assert chosen.positions.tolist() == [40, 41, 42, 43]
    # What goes on behind another run, with the edit further up, is no edit of its own.
    on = copied_whole((runs[0], runs[1]._replace(join=Join.ON)), prefix_len=30, prompt_len=310)
    assert AttentionTrace(8).trace(on, budget=0.1).chosen == chosen
    # Nor is a passage that moved; but where new text is in front of it, that may have cut a word.
    cut = copied_whole((runs[0], Run(2, 0, 147, 153)), prefix_len=30, prompt_len=310)
    first = AttentionTrace(8).trace(cut, budget=0.1).chosen
    assert set(first.positions) >= {40, 41, 42, 43, 147, 148, 149}
    assert not set(first.positions) & {144, 145, 146}
    both = copied_whole((runs[0], runs[1]._replace(join=Join.EDIT)), prefix_len=30, prompt_len=310)
    few = AttentionTrace(8).trace(both, budget=0.1).chosen
    assert few.positions.tolist() == [40, 41, 42, 43, 140, 141, 142]  # a quarter of 28 rows


@given(wishes(), st.integers(0, 6), st.integers(0, 30))
def test_rows_after_edits_use_up_their_limit(wish, each, limit):
    edits = after_edits(wish.plan)
    rows = rows_after_edits(wish.plan, each=each, limit=limit)
    assert rows.num == min(limit, each * len(edits))  # a run is longer than any window here
    shares = [rows.clip(run.dst_start, run.dst_stop).num for run in edits]
    assert max(shares, default=0) - min(shares, default=0) <= 1


@pytest.mark.parametrize("window", [0, 4, 16, 32, 64])
def test_a_run_after_an_edit_is_traced_whatever_the_window(window):
    """The window belongs to another selector; it once hid runs from the trace."""
    from kvshare_sglang.policy.select.window import Window

    runs = (Run(1, 0, 0, 200), Run(1, 202, 202, 60, join=Join.EDIT))
    asked = {"prompt_len": 300, "prefix_len": 0, "budget": 0.15}
    assert AttentionTrace(16).plan(runs, **asked).runs == runs
    assert (len(Window(16, window).plan(runs, **asked).runs) == 2) == (window <= 16)


@given(wishes(), st.integers(1, 40), st.integers(0, 1000))
def test_what_is_watched_was_copied_however_few_ranges_the_backend_takes(wish, limit, seed):
    """A trace chooses rows; the backend merges them; what it runs beside them is not watched."""
    trace = trace_of(wish)
    finished(trace, np.random.default_rng(seed))
    rows = required_rows(wish.plan, suffix=SEAM) | trace.chosen
    (rows,) = merge_ranges([rows], limit=limit)
    plan = wish.plan.recompute(rows)
    watched = np.flatnonzero(Watch.of_plan(plan).open)
    assert watched.tolist() == (wish.plan.reused_rows - rows).positions.tolist()
    assert not len(watched) or watched[0] >= plan.exact_len


@pytest.mark.parametrize(("layers", "depth", "layer"), [(12, 0.0, 0), (12, 1.0, 11), (32, 0.25, 8)])
def test_the_probe_layer_lies_at_its_depth(layers, depth, layer):
    assert probe_layer(layers, depth) == layer


# ---- repair: rows before what is to run ---------------------------------------------------------


@given(wishes(), st.integers(0, 100), st.data())
def test_open_rows_of_the_prefix_hit_are_chosen_up_to_a_limit(wish, seed, data):
    plan = wish.plan
    if plan.prefix_len < 2:
        return
    start = data.draw(st.integers(0, plan.prefix_len - 1))
    blend = Blend(start, Rows([(start, plan.prefix_len)]), depth=1)
    plan = plan.behind(blend)
    allowed = repair_rows(plan, budget=wish.budget)
    most = data.draw(st.one_of(st.none(), st.integers(0, 40)))
    limit = allowed if most is None else min(most, allowed)
    trace = SELECTOR.trace(plan, budget=wish.budget, most_open=most)
    finished(trace, np.random.default_rng(seed))
    repaired = trace.chosen.clip(0, plan.prefix_len)
    assert repaired.num <= limit
    assert not repaired - blend.open
    assert trace.chosen.num <= bought(wish) + limit
    rows = SELECTOR.rows(plan, trace)
    assert plan.recompute(rows).blend.open == blend.open - repaired
    assert rows.num <= SELECTOR.most_rows(plan, budget=wish.budget)


@given(wishes(), st.integers(0, 100), st.data())
def test_with_the_last_chunk_run_its_new_text_the_question_and_what_was_copied_or_built_on_it(
    wish, seed, data
):
    plan = wish.plan
    if plan.prompt_len - plan.prefix_len < 2:
        return
    start = data.draw(st.integers(plan.prefix_len, plan.prompt_len - 1))
    trace = SELECTOR.trace(plan, budget=wish.budget, start=start)
    query = trace.query
    finished(trace, np.random.default_rng(seed))
    rows = SELECTOR.rows(plan, trace, start)
    required = required_rows(plan, suffix=SEAM)
    assert not required.clip(start, plan.prompt_len) - rows
    assert not query - rows
    assert query.stop == plan.prompt_len
    # Before the chunk nothing runs that is as full prefill has it: it has no copy before it.
    exact = plan.copies[0].dst_start if plan.copies else plan.prompt_len
    early = rows.clip(0, start) - required_rows(plan, suffix=SEAM)
    assert not early or early.start >= exact
    # In one chunk it is the trace of a whole prompt.
    if start == plan.prefix_len:
        assert rows == required | trace.chosen


@pytest.mark.parametrize(
    ("most_open", "copied", "want"),
    [
        (None, True, [(100, 900), (1000, 5096)]),
        (0, True, [(2000, 5096)]),  # none of what it was computed over can be put right
        (None, False, [(100, 900)]),  # a repair is for copies
    ],
)
def test_text_of_earlier_chunks_over_open_rows_may_run_again_where_something_is_copied(
    most_open, copied, want
):
    blend = Blend(100, Rows([(100, 900)]), depth=1)
    runs = (Run(1, 40, 2000, 500),) if copied else ()
    plan = copied_whole(runs, prefix_len=1000, prompt_len=6000).behind(blend)
    trace = SELECTOR.trace(plan, budget=0.15, start=5096, most_open=most_open)
    assert Rows.where(trace.candidates) | trace.chosen == Rows(want)  # four follow new text


@pytest.mark.parametrize("start", [1000, 1016])
def test_a_turn_that_only_repairs_runs_the_lower_layers_of_its_question_once(start):
    """Not where an earlier chunk has run some of it."""
    blend = Blend(100, Rows([(100, 900)]), depth=1)
    plan = ReusePlan.computing(
        Rows([(1000, 1030)]), prompt_len=1030, prefix_len=1000, runs=(), blend=blend
    )
    trace = SELECTOR.trace(plan, budget=0.15, start=start)
    assert not trace.carried()  # there was no pass yet
    finished(trace, np.random.default_rng(0))
    assert trace.carried() == Rows([(1000, 1030)][: start == 1000])
    passes = 30 if start == 1000 else 14 + 16
    half, quarter = (math.ceil(repair_rows(plan, budget=0.15) * part) for part in (1 / 2, 1 / 4))
    assert trace.ran == passes + half + quarter


@given(wishes(), st.integers(0, 100))
def test_what_is_carried_on_is_new_text_that_neither_asks_nor_was_found(wish, seed):
    trace = trace_of(wish)
    new = required_rows(wish.plan, suffix=SEAM) - trace.query
    assert not new - trace.rows  # the first pass ran it
    if not finished(trace, np.random.default_rng(seed)):
        new = Rows()  # there was no pass
    assert trace.carried() == (new if new.num >= CARRIED_FROM else Rows())
    with mock.patch.object(attention_trace, "CARRIED_FROM", 1):
        assert trace.carried() == new
    assert not new - SELECTOR.rows(wish.plan, trace)


@given(wishes(), st.floats(0.01, 10), st.integers(0, 2**32 - 1))
def test_a_prior_that_is_the_same_for_all_rows_changes_nothing(wish, same, seed):
    prior = np.full(wish.plan.prompt_len, same)
    plain, known = trace_of(wish, shares=(1.0,)), trace_of(wish, prior=prior)
    finished(plain, np.random.default_rng(seed))
    finished(known, np.random.default_rng(seed))
    assert plain.chosen == known.chosen


@given(wishes(), st.integers(0, 2**32 - 1))
def test_of_rows_that_get_the_same_attention_those_go_that_rest_on_other_text(wish, seed):
    """And rows that rest on nothing else only where no others are left."""
    rng = np.random.default_rng(seed)
    prior = rng.permutation(wish.plan.prompt_len) * rng.integers(0, 2, wish.plan.prompt_len) * 1.0
    trace = trace_of(wish, prior=prior)
    at_first, free = trace.chosen, trace.candidates.copy()
    if not trace.done:
        trace.feed(np.ones(trace.length))
    assert trace.done  # such a trace takes one step
    taken = (trace.chosen - at_first).positions
    left = np.flatnonzero(free & ~trace.chosen.mask(trace.length))
    shared = wish.plan.blend.open.mask(trace.length) if wish.plan.blend else free & False
    taken, left = taken[~shared[taken]], left[~shared[left]]  # of those only so many may go
    assert prior[taken].min(initial=np.inf) >= prior[left].max(initial=-np.inf)
