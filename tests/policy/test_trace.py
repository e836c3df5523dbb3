"""Traces choose what is attended to, step by step; a watch ends where nothing was stale."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_rows import SEAM, wishes

from kvshare_sglang.policy.refresh import IDLE, Watch
from kvshare_sglang.policy.rows import (
    as_ranges,
    must_run,
    replanned,
    reused_positions,
    rows_behind_edits,
)
from kvshare_sglang.policy.trace import (
    BEHIND_EDIT,
    BEHIND_EDITS,
    SHARES,
    Trace,
    probe_layer,
    rows_of,
)
from kvshare_sglang.radix_fuzzy.reuse import plan_reuse
from kvshare_sglang.radix_fuzzy.types import Join, Range, Run, check_runs


def finished(trace, rng):
    """Feed noise to the end; all rows that were asked, by step."""
    asked = []
    while not trace.done:
        asked.append(trace.asking)
        assert np.isin(trace.asking, trace.rows).all()
        assert (np.diff(trace.rows) > 0).all()
        trace.feed(rng.random(trace.length))
    return asked


def trace_of(wish, **options):
    return Trace.of_plan(wish.plan, budget=wish.budget, seam=SEAM, **options)


@given(wishes(), st.lists(st.floats(0.1, 1), min_size=1, max_size=4), st.integers(0, 100))
def test_a_trace_spends_its_budget_on_reused_rows_once_each(wish, shares, seed):
    plan = wish.plan
    trace = trace_of(wish, shares=shares)
    must = must_run(plan, suffix=SEAM)
    free = np.setdiff1d(reused_positions(plan), must)
    asked = finished(trace, np.random.default_rng(seed))
    assert len(trace.chosen) == len(set(trace.chosen.tolist()))
    assert np.isin(trace.chosen, free).all()
    assert len(trace.chosen) == min(len(free), rows_of(plan, wish.budget))
    assert np.array_equal(np.flatnonzero(trace.open_rows), np.setdiff1d(free, trace.chosen))
    assert len(asked) <= len(shares)
    if asked:
        assert asked[0][-1] == plan.prompt_len - 1  # the question asks first


@given(wishes(), st.integers(0, 100))
def test_each_step_takes_what_the_one_before_attends_to_most(wish, seed):
    rng = np.random.default_rng(seed)
    trace = trace_of(wish)
    while not trace.done:
        paid, before = rng.random(trace.length), trace.open_rows.copy()
        trace.feed(paid)
        taken = trace.rows
        left = np.flatnonzero(trace.open_rows)
        assert before[taken].all()
        if len(left) and len(taken):
            assert paid[taken].min() >= paid[left].max()


@given(wishes())
def test_each_step_has_its_share_and_rows_behind_edits_come_first(wish):
    trace = trace_of(wish)
    first = trace.chosen
    count = rows_of(wish.plan, wish.budget)
    assert len(first) <= BEHIND_EDITS * count
    starts = {run.dst_start for run in wish.plan.runs if run.join is Join.EDIT}
    for stretch in as_ranges(first):
        assert stretch.start in starts
        assert stretch.num <= BEHIND_EDIT
    assert np.isin(first, trace.rows).all()  # the question sees them as they are now
    left, found = count - len(first), []
    while not trace.done:
        before = len(trace.chosen)
        trace.feed(np.ones(trace.length))
        found.append(len(trace.chosen) - before)
    wanted = np.cumsum(SHARES) / sum(SHARES) * left
    if not trace.open_rows.any():
        return  # it took all there was
    assert np.abs(np.cumsum(found) - wanted[: len(found)]).max(initial=0) < len(SHARES)


def test_few_edits_have_all_their_rows_and_many_share():
    runs = (Run(1, 40, 40, 100, join=Join.EDIT), Run(2, 0, 140, 160))
    plan = plan_reuse(runs, prompt_len=310, prefix_len=30, budget=0.1, seam=8, window=5)
    assert Trace.of_plan(plan, budget=0.1, seam=8).chosen.tolist() == [40, 41, 42, 43]
    both = plan._replace(runs=(runs[0], runs[1]._replace(join=Join.EDIT)))
    few = Trace.of_plan(both, budget=0.1, seam=8)
    assert few.chosen.tolist() == [40, 41, 42, 43, 140, 141, 142]  # a quarter of 28 rows


@given(wishes(), st.integers(0, 6), st.integers(0, 30))
def test_rows_behind_edits_use_up_their_limit(wish, each, limit):
    edits = [run for run in wish.plan.runs if run.join is Join.EDIT]
    rows = rows_behind_edits(wish.plan, each=each, limit=limit)
    assert len(rows) == min(limit, each * len(edits))  # a run is longer than any window here
    shares = [sum(run.dst_start <= row < run.dst_stop for row in rows) for run in edits]
    assert max(shares, default=0) - min(shares, default=0) <= 1


@given(wishes(), st.integers(0, 100))
def test_the_plan_of_chosen_rows_copies_all_the_others(wish, seed):
    plan = wish.plan
    trace = trace_of(wish)
    finished(trace, np.random.default_rng(seed))
    rows = np.union1d(must_run(plan, suffix=SEAM), trace.chosen)
    new = replanned(plan, as_ranges(rows))
    copied = [i for c in new.copies for i in range(c.dst_start, c.dst_stop)]
    every = range(plan.prefix_len, plan.prompt_len)
    assert sorted([*copied, *rows.tolist()]) == list(every)
    check_runs(new.copies, start=plan.prefix_len, stop=plan.prompt_len)
    for copy in new.copies:
        (run,) = [r for r in plan.runs if r.dst_start <= copy.dst_start < r.dst_stop]
        assert (copy.source, copy.shift) == (run.source, run.shift)
    assert new.compute == tuple(as_ranges(rows))
    assert all(any(r.dst_start <= c.dst_start < r.dst_stop for c in new.copies) for r in new.runs)


@pytest.mark.parametrize(("layers", "depth", "layer"), [(12, 0.0, 0), (12, 1.0, 11), (32, 0.25, 8)])
def test_the_probe_layer_lies_at_its_depth(layers, depth, layer):
    assert probe_layer(layers, depth) == layer


def test_a_watch_looks_pauses_and_ends():
    watch = Watch(np.array([False, True, True, True, True, True]))
    paid = np.array([0.9, 0.0, 0.3, 0.0, 0.0, 0.0])
    assert watch.due()
    assert watch.wants(paid, above=0.2)
    assert not watch.wants(paid, above=0.3)
    watch.refreshed(np.array([2]), far=0.5, pause=3, unchanged=0.02)
    assert not watch.wants(paid, above=0.2)  # what was refreshed is read in peace
    assert [watch.due() for _ in range(4)] == [False, False, True, True]
    for row in (1, 3, 4)[:IDLE]:
        assert not watch.over
        watch.refreshed(np.array([row]), far=0.0, pause=1, unchanged=0.02)
    assert watch.over


def test_a_watch_is_over_once_all_is_refreshed():
    watch = Watch(np.array([True, False]))
    watch.refreshed(np.array([0]), far=1.0, pause=1, unchanged=0.02)
    assert watch.over


def test_a_plan_without_copies_keeps_no_run():
    run = Run(1, 0, 10, 100)
    plan = plan_reuse((run,), prompt_len=120, prefix_len=10, budget=0.1, seam=8, window=16)
    assert replanned(plan, [Range(10, 120)])[3:] == ((), (Range(10, 120),))


def test_new_text_among_what_is_reused_gives_a_trace_more_rows():
    few, many, behind = (
        plan_reuse(
            (Run(1, 0, at, 200),), prompt_len=at + 200 + tail, prefix_len=0, budget=0.1, seam=8,
            window=4,
        )
        for at, tail in ((0, 20), (100, 20), (0, 120))
    )  # fmt: skip
    assert [rows_of(plan, 0.1) for plan in (few, many, behind)] == [20, 40, 20]
    assert (rows_of(many, 0.0), rows_of(many, 1.0)) == (0, 200)
