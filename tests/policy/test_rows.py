"""Selectors keep to their budget, never leave out what must run, and choose what they say."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare_sglang.policy.refresh import Watch
from kvshare_sglang.policy.rows import (
    CHECKED,
    DILATION,
    SELECTORS,
    Check,
    Wish,
    as_ranges,
    compute,
    must_run,
    replanned,
    reused_positions,
)
from kvshare_sglang.policy.trace import Trace
from kvshare_sglang.radix_fuzzy.reuse import plan_reuse, thin_out
from kvshare_sglang.radix_fuzzy.types import Join, Range, Run, clip, complement

SEAM, WINDOW = 8, 16


@st.composite
def wishes(draw):
    runs, at = [], draw(st.integers(0, 5))
    prefix = at
    for _ in range(draw(st.integers(1, 5))):
        at += draw(st.integers(0, 6))
        length = draw(st.integers(60, 150))
        join = draw(st.sampled_from(list(Join)))
        runs.append(Run(1, at, at, length, join=join))
        at += length
    plan = plan_reuse(
        tuple(runs), prompt_len=at + draw(st.integers(1, 30)), prefix_len=prefix,
        budget=0.1, seam=SEAM, window=WINDOW,
    )  # fmt: skip
    where = reused_positions(plan)
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    check = Check(where, *(rng.random(len(where)) for _ in range(3)))
    return Wish(plan, draw(st.floats(0, 1)), SEAM, WINDOW, check, seed=1)


def chosen(name, wish):
    rows = np.concatenate([np.arange(*r) for r in compute(name, wish)])
    return np.setdiff1d(rows, must_run(wish.plan, suffix=SEAM))


@given(wishes(), st.sampled_from(sorted(SELECTORS)))
def test_what_must_run_runs_and_the_budget_holds(wish, name):
    ranges = compute(name, wish)
    rows = np.concatenate([np.arange(*r) for r in ranges])
    assert (np.diff(rows) > 0).all()
    assert rows[0] >= wish.plan.prefix_len
    assert rows[-1] == wish.plan.prompt_len - 1
    assert np.isin(must_run(wish.plan, suffix=SEAM), rows).all()
    extra = np.setdiff1d(rows, must_run(wish.plan, suffix=SEAM))
    assert np.isin(extra, reused_positions(wish.plan)).all()
    if name != "full":
        assert len(extra) <= wish.rows


@given(wishes())
def test_the_ends_of_the_scale(wish):
    every = np.setdiff1d(reused_positions(wish.plan), must_run(wish.plan, suffix=SEAM))
    assert np.array_equal(chosen("full", wish), every)
    assert len(chosen("copy", wish)) == 0
    for name in sorted(set(SELECTORS) - {"copy"}):
        assert np.array_equal(chosen(name, wish._replace(budget=1.0)), every), name


@given(wishes())
def test_a_checked_selector_takes_the_largest_scores(wish):
    check = wish.check
    for name, score in (
        ("cacheblend", check.keys), ("attention", check.attention), ("deviation", check.values)
    ):  # fmt: skip
        best = np.sort(score)[::-1][: wish.rows]
        expected = check.positions[np.isin(score, best)]
        expected = np.setdiff1d(expected, must_run(wish.plan, suffix=SEAM))
        assert np.array_equal(chosen(name, wish), expected)


@given(wishes())
def test_dhd_takes_windows_and_seams_before_any_score(wish):
    heads = {Join.SEAM: SEAM, Join.EDIT: WINDOW, Join.SAME: 0}
    need = [np.arange(r.dst_start, r.dst_start + heads[r.join]) for r in wish.plan.runs]
    need = np.concatenate(need) if need else np.empty(0, int)
    if len(need) <= wish.rows:
        must = must_run(wish.plan, suffix=SEAM)
        assert np.isin(need, np.union1d(chosen("dhd", wish), must)).all()


def test_dhd_takes_neighbours_along():
    run = Run(1, 0, 10, 200, join=Join.SAME)
    plan = plan_reuse((run,), prompt_len=230, prefix_len=10, budget=0.1, seam=SEAM, window=WINDOW)
    score = np.zeros(200)
    score[100] = 1.0
    where = reused_positions(plan)
    wish = Wish(plan, (2 * DILATION + 1) / 200, SEAM, WINDOW, Check(where, score, score, score + 1))
    assert list(chosen("dhd", wish)) == list(range(110 - DILATION, 111 + DILATION))


def test_an_unknown_selector_is_refused_by_name():
    run = Run(1, 0, 0, 100)
    plan = plan_reuse((run,), prompt_len=120, prefix_len=0, budget=0.1, seam=SEAM, window=WINDOW)
    with pytest.raises(ValueError, match=r"the selector must be one of full, .*, got 'best'"):
        compute("best", Wish(plan, 0.1, SEAM, WINDOW))
    assert set(SELECTORS) >= CHECKED


@given(st.sets(st.integers(0, 60)))
def test_ranges_hold_the_rows_and_no_two_touch(rows):
    ranges = as_ranges(np.array(sorted(rows), np.int64))
    assert sorted(i for r in ranges for i in range(*r)) == sorted(rows)
    assert all(a.stop < b.start for a, b in pairwise(ranges))


def replanned_by_definition(plan, compute):
    """Every gap cut to every run: slow, hard to get wrong."""
    left = tuple(complement(compute, start=plan.prefix_len, stop=plan.prompt_len))
    parts = [
        [run.cut(*r) for r in clip(left, start=run.dst_start, stop=run.dst_stop)]
        for run in plan.runs
    ]
    runs = tuple(run for run, cut in zip(plan.runs, parts, strict=True) if cut)
    copies = tuple(copy for cut in parts for copy in cut)
    return plan._replace(runs=runs, copies=copies, compute=tuple(compute))


@given(wishes(), st.data())
def test_a_new_plan_is_what_its_definition_says(wish, data):
    plan = wish.plan
    inside = st.integers(plan.prefix_len, plan.prompt_len)
    cuts = sorted(data.draw(st.sets(inside, max_size=80)))
    rows = [Range(a, b) for a, b in zip(cuts[::2], cuts[1::2], strict=False)]
    assert replanned(plan, rows) == replanned_by_definition(plan, rows)


@given(wishes(), st.integers(1, 40), st.integers(0, 1000))
def test_what_is_watched_was_copied_however_few_stretches_the_backend_takes(wish, limit, seed):
    """A trace chooses rows; the backend merges them; what it runs beside them is not watched."""
    rng = np.random.default_rng(seed)
    trace = Trace.of_plan(wish.plan, budget=wish.budget, seam=SEAM)
    while not trace.done:
        trace.feed(rng.random(trace.length))
    must = must_run(wish.plan, suffix=SEAM)
    (rows,) = thin_out([as_ranges(np.union1d(must, trace.chosen))], limit=limit)
    plan = replanned(wish.plan, rows)
    watched = np.flatnonzero(Watch.of_plan(plan).open)
    ran = np.concatenate([np.arange(*r) for r in rows])
    assert np.array_equal(watched, np.setdiff1d(reused_positions(wish.plan), ran))
    assert np.isin(watched, np.flatnonzero(trace.open_rows)).all()
    assert not len(watched) or watched[0] >= plan.exact_len
