"""Rows are sets of positions, runs map positions, plans partition a prompt and edit themselves."""

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import prompts_with_runs

from kvshare_sglang.plan import Blend, Join, ReusePlan, Rows, Run, check_runs, merge_ranges
from kvshare_sglang.policy.retain import depths_after

SETS = st.sets(st.integers(0, 60))


def rows_of(some):
    return Rows.at(np.array(sorted(some), np.int64))


def positions(ranges):
    return [p for start, stop in ranges for p in range(start, stop)]


# ---- rows: each operation against Python's own sets ------------------------------------------


@given(SETS)
def test_both_views_and_the_mask_say_the_same(some):
    rows = rows_of(some)
    assert rows.positions.tolist() == positions(rows.ranges) == sorted(some)
    assert np.flatnonzero(rows.mask(61)).tolist() == sorted(some)
    assert (rows.num, rows.num_ranges, bool(rows)) == (len(some), len(rows.ranges), bool(some))
    assert rows.stop == max(some, default=-1) + 1
    assert not some or rows.start == min(some)


@given(SETS)
def test_equal_sets_are_equal_values_however_they_were_made(some):
    rows = rows_of(some)
    one_by_one = Rows((p, p + 1) for p in sorted(some))
    assert rows == one_by_one == Rows.where(rows.mask(61)) == Rows(rows.ranges)
    assert hash(rows) == hash(one_by_one)
    assert all(a.stop < b.start for a, b in pairwise(rows.ranges))


@given(SETS, SETS, st.integers(0, 60), st.integers(0, 60))
def test_operations_are_those_of_sets(a, b, start, stop):
    mine, other, inside = rows_of(a), rows_of(b), set(range(start, stop))
    assert mine | other == rows_of(a | b)
    assert mine - other == rows_of(a - b)
    assert mine.clip(start, stop) == rows_of(a & inside)
    assert mine.complement(start, stop) == rows_of(inside - a)
    assert (mine | other).places_in(rows_of(range(61))).tolist() == sorted(a | b)
    assert (mine | other).positions[mine.places_in(mine | other)].tolist() == sorted(a)


@given(SETS, SETS)
def test_a_row_that_is_not_there_has_no_place(a, b):
    mine, there = rows_of(a), rows_of(b)
    if a <= b:
        assert there.positions[mine.places_in(there)].tolist() == sorted(a)
    else:
        with pytest.raises(ValueError, match="is not among the rows that are there"):
            mine.places_in(there)


@pytest.mark.parametrize("bad", [[(3, 3)], [(4, 2)], [(0, 3), (2, 5)], [(5, 6), (0, 1)]])
def test_ranges_out_of_order_are_refused(bad):
    with pytest.raises(ValueError, match="ranges must ascend, be disjoint and not empty, got"):
        Rows(bad)


@pytest.mark.parametrize("bad", [[3, 3], [4, 2]])
def test_positions_out_of_order_are_refused(bad):
    with pytest.raises(ValueError, match="positions must ascend, got"):
        Rows.at(np.array(bad))


# ---- merging for backends that bound the number of ranges ------------------------------------

BATCHES = st.lists(st.sets(st.integers(0, 200), max_size=40).map(rows_of), max_size=5)


@given(BATCHES, st.integers(0, 30))
def test_merging_keeps_the_limit_every_position_and_every_request(rows, limit):
    merged = merge_ranges(rows, limit=limit)
    count = sum(one.num_ranges for one in rows)
    assert len(merged) == len(rows)
    assert sum(one.num_ranges for one in merged) == min(
        count, max(limit, sum(1 for one in rows if one))
    )
    for before, after in zip(rows, merged, strict=True):
        # Only whole gaps are filled: the borders are some of the borders there were.
        assert {r.start for r in after.ranges} <= {r.start for r in before.ranges}
        assert {r.stop for r in after.ranges} <= {r.stop for r in before.ranges}
        assert not before - after


@given(BATCHES, st.integers(0, 30))
def test_merging_fills_the_smallest_gaps(rows, limit):
    def gaps(some):
        return sorted(b.start - a.stop for one in some for a, b in pairwise(one.ranges))

    merged, every = gaps(merge_ranges(rows, limit=limit)), gaps(rows)
    assert merged == every[len(every) - len(merged) :]


# ---- runs ------------------------------------------------------------------------------------


@given(st.integers(0, 50), st.integers(0, 50), st.integers(1, 50), st.data())
def test_a_cut_run_maps_the_same_positions(src, dst, length, data):
    run = Run(1, src, dst, length)
    a, b = sorted(data.draw(st.tuples(*[st.integers(dst, dst + length)] * 2)))
    part = run.cut(a, b)
    assert (part.dst_start, part.dst_stop, part.shift) == (a, b, run.shift)
    assert part.source == run.source
    assert run.src_start <= part.src_start <= part.src_stop <= run.src_stop


@pytest.mark.parametrize(("start", "stop"), [(9, 12), (10, 16), (13, 12)])
def test_a_cut_outside_the_run_is_refused(start, stop):
    with pytest.raises(ValueError, match=r"outside run \[10, 15\)"):
        Run(1, 0, 10, 5).cut(start, stop)


@given(prompts_with_runs())
def test_runs_in_order_are_accepted(case):
    runs, prefix_len, prompt_len = case
    check_runs(runs, start=prefix_len, stop=prompt_len)


@pytest.mark.parametrize(
    "runs",
    [
        (Run(1, 0, 10, 0),),
        (Run(1, 0, 9, 5),),
        (Run(1, 0, 96, 5),),
        (Run(1, -1, 20, 5),),
        (Run(1, 0, 10, 5), Run(1, 0, 14, 5)),
        (Run(1, 0, 40, 5), Run(1, 0, 20, 5)),
    ],
)
def test_runs_that_are_empty_overlap_or_leave_the_prompt_are_refused(runs):
    with pytest.raises(ValueError, match=r"must be non-empty and lie in \["):
        check_runs(runs, start=10, stop=100)


# ---- plans -----------------------------------------------------------------------------------


@st.composite
def plans(draw):
    """A plan that computes any rows, new text among them."""
    runs, prefix_len, prompt_len = draw(prompts_with_runs())
    every = set(range(prefix_len, prompt_len))
    fresh = every - set(Rows.of_runs(runs).positions.tolist())
    cuts = sorted(draw(st.sets(st.integers(prefix_len, prompt_len), max_size=30)))
    more = set(positions(zip(cuts[::2], cuts[1::2], strict=False)))
    rows = rows_of(fresh | more)
    return ReusePlan.computing(rows, prompt_len=prompt_len, prefix_len=prefix_len, runs=runs), runs


def mapped(runs):
    """Prompt position -> (source, source position), of all that the runs cover."""
    return {
        p: (run.source, p - run.shift) for run in runs for p in range(run.dst_start, run.dst_stop)
    }


@given(plans())
def test_a_plan_partitions_what_is_not_cached_into_copies_and_rows(case):
    plan, runs = case
    copied = set(mapped(plan.copies))
    computed = set(plan.compute.positions.tolist())
    assert copied | computed == set(range(plan.prefix_len, plan.prompt_len))
    assert not copied & computed
    assert (plan.copied, plan.computed) == (len(copied), len(computed))
    assert plan.reused == plan.copied + plan.recomputed
    assert plan.exact_len == min(copied, default=plan.prompt_len)
    assert plan.depth == max((copy.depth for copy in plan.copies), default=0)
    assert mapped(plan.copies).items() <= mapped(runs).items()
    assert set(plan.runs) <= set(runs)
    assert (plan.reused_rows | plan.fresh_rows).num == plan.prompt_len - plan.prefix_len
    for run in plan.runs:
        assert copied & set(range(run.dst_start, run.dst_stop))


def recomputed_by_definition(plan, rows):
    """Every gap cut to every run: slow, hard to get wrong."""
    gaps = rows.complement(plan.prefix_len, plan.prompt_len).ranges
    parts = [
        [
            run.cut(max(gap.start, run.dst_start), min(gap.stop, run.dst_stop))
            for gap in gaps
            if gap.start < run.dst_stop and run.dst_start < gap.stop
        ]
        for run in plan.runs
    ]
    runs = tuple(run for run, cut in zip(plan.runs, parts, strict=True) if cut)
    return ReusePlan(
        plan.prompt_len, plan.prefix_len, runs, tuple(copy for cut in parts for copy in cut)
    )


@given(plans(), st.sets(st.integers(0, 3000), max_size=200))
def test_recompute_runs_those_rows_and_copies_all_else(case, more):
    plan, _ = case
    inside = set(range(plan.prefix_len, plan.prompt_len))
    rows = plan.fresh_rows | rows_of(more & inside)
    new = plan.recompute(rows)
    assert new.compute == rows
    assert new == recomputed_by_definition(plan, rows)


@given(
    plans(),
    st.sets(st.integers(0, 3000), max_size=200),
    st.sets(st.integers(0, 3000)),
    st.sets(st.integers(0, 3000)),
)
def test_text_that_ran_while_there_were_copies_before_it_is_not_exact(case, more, early, half):
    plan, _ = case
    rows = plan.fresh_rows | rows_of(more & set(range(plan.prefix_len, plan.prompt_len)))
    ran_early = rows_of(early & set(rows.positions.tolist()))
    begun = rows_of(half & set(rows.positions.tolist()))
    new = plan.recompute(rows, early=ran_early, carried=begun)
    first = plan.runs[0].dst_start if plan.runs else plan.prompt_len
    ran, whole = set(rows.positions.tolist()), set(ran_early.positions.tolist())
    ran_early = whole | set(begun.positions.tolist())
    exact = plan.prefix_len  # row by row: run from the bottom, or before any copy, all before exact
    while exact in ran and not (exact in ran_early and exact >= first):
        exact += 1
    assert new.exact_len == exact
    assert new.inexact == (exact < plan.prompt_len)
    assert dataclasses.replace(new, rest=None) == plan.recompute(rows)
    for row in ran_early:  # as deep as what was copied before it, whatever ran again since
        before = [run.depth_after for run in plan.runs if run.dst_start < row]
        deepest = max(before, default=0)
        assert depths_after(new, [row])[0] >= (deepest if row in whole else min(deepest, 1))
    every = range(plan.prompt_len + 1)
    assert depths_after(new, every) == [depth_by_definition(new, at) for at in every]
    if new.rest:
        assert new.nothing().exact_len == exact
        assert new.stop_at(plan.prompt_len).rest == new.rest


def depth_by_definition(plan: ReusePlan, position: int) -> int:
    """Of text that is computed behind a position."""
    depths = [run.depth_after for run in plan.runs if run.dst_start < position]
    depths += [plan.blend.depth] if plan.blend else []
    if plan.rest and plan.rest.start <= position:
        depths += [run.depth_after for run in plan.rest.runs if run.dst_start <= position]
    return max(depths, default=0)


@given(plans(), st.integers(0, 3000))
def test_what_is_no_longer_copied_is_new_text(case, stop):
    """A request that gave its sources back in the head of a run has computed that head itself."""
    plan, _ = case
    short = plan.stop_at(stop)
    was = mapped(plan.copies)
    assert mapped(short.copies) == {p: at for p, at in was.items() if p < stop}
    assert all(run.dst_stop <= max(stop, 0) for run in short.runs)
    assert not set(mapped(short.runs)) - set(mapped(plan.runs))
    assert short.copied + short.computed == plan.copied + plan.computed


@given(plans(), st.data())
def test_without_some_runs_their_text_is_computed(case, data):
    plan, _ = case
    dropped = data.draw(st.sets(st.sampled_from(plan.runs))) if plan.runs else set()
    left = plan.without(dropped)
    assert set(left.runs) == set(plan.runs) - dropped
    gone = set(mapped(dropped))
    assert mapped(left.copies) == {p: at for p, at in mapped(plan.copies).items() if p not in gone}


@pytest.mark.parametrize(
    ("runs", "copies", "said"),
    [
        ((), (Run(1, 0, 20, 10),), "is of no run of the plan"),
        ((Run(1, 0, 20, 40),), (Run(1, 0, 10, 20),), "is of no run of the plan"),
        ((Run(1, 0, 20, 40),), (Run(2, 0, 20, 40),), "is no part of"),
        ((Run(1, 0, 20, 40),), (Run(1, 1, 20, 40),), "is no part of"),
        ((Run(1, 0, 20, 40),), (Run(1, 0, 20, 50),), "outside run"),
        ((Run(1, 0, 20, 40),), (), "nothing is copied of"),
        ((Run(1, 0, 20, 40), Run(2, 0, 60, 30)), (Run(2, 0, 60, 30),), "nothing is copied of"),
        ((Run(1, 0, 90, 40),), (Run(1, 0, 90, 40),), "must be non-empty and lie in"),
        ((Run(1, 0, 5, 40),), (Run(1, 0, 5, 40),), "must be non-empty and lie in"),
    ],
)
def test_a_plan_that_does_not_hold_together_is_refused(runs, copies, said):
    with pytest.raises(ValueError, match=said):
        ReusePlan(100, 10, runs, copies)


def test_rows_that_are_neither_computed_nor_in_a_run_are_named():
    with pytest.raises(ValueError, match=r"Range\(start=50, stop=100\) is neither computed nor"):
        ReusePlan.computing(Rows(), prompt_len=100, prefix_len=0, runs=[Run(1, 0, 0, 50)])


# ---- behind a prefix hit that is not exact --------------------------------------------------


def behind(plan, start, open_rows, depth=1):
    return plan.behind(Blend(start, rows_of(open_rows), depth))


@given(plans(), st.data())
def test_a_plan_behind_a_blend_is_exact_up_to_the_blend_whatever_is_done_to_it(case, data):
    plan, _ = case
    if plan.prefix_len == 0:
        return
    start = data.draw(st.integers(0, plan.prefix_len - 1))
    held = data.draw(st.sets(st.integers(start, plan.prefix_len - 1), max_size=30))
    blended = behind(plan, start, held)
    again = data.draw(st.sets(st.integers(0, plan.prompt_len - 1), max_size=60))
    ran = blended.recompute(plan.fresh_rows | rows_of(again))
    cut = blended.stop_at(data.draw(st.integers(0, plan.prompt_len)))
    for one in (blended, ran, cut, blended.nothing(), blended.without(plan.runs)):
        assert one.exact_len == start
        assert one.inexact
        assert one.depth >= 1
    assert ran.blend.open == rows_of(held - again)
    assert ran.open == rows_of((held | set(mapped(plan.runs))) - again)
    assert cut.blend == blended.blend
    assert blended.nothing().computed == plan.prompt_len - plan.prefix_len


@pytest.mark.parametrize(
    ("blend", "said"),
    [
        (Blend(10, Rows(), 1), "is not in the prefix hit of 10"),
        (Blend(3, Rows([(2, 5)]), 1), "lies outside the blended part"),
        (Blend(3, Rows([(8, 12)]), 1), "lies outside the blended part"),
    ],
)
def test_a_blend_lies_in_the_prefix_hit(blend, said):
    with pytest.raises(ValueError, match=said):
        ReusePlan(100, 10, (), (), blend)


def test_depth_rises_at_seams_only():
    depths = {
        (join, depth): Run(1, 0, 0, 5, depth, join).depth_after for join in Join for depth in (0, 2)
    }
    assert depths == {
        (Join.SEAM, 0): 1, (Join.EDIT, 0): 1, (Join.ON, 0): 1, (Join.SAME, 0): 0,
        (Join.SEAM, 2): 3, (Join.EDIT, 2): 2, (Join.ON, 2): 2, (Join.SAME, 2): 2,
    }  # fmt: skip
