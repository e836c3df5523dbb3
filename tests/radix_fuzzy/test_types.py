"""Runs and ranges: cutting keeps the mapping, complement and clip lose no position."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import prompts_with_runs

from kvshare_sglang.radix_fuzzy.types import Range, Run, check_runs, clip, complement


@st.composite
def ranges(draw):
    borders = sorted(draw(st.lists(st.integers(0, 60), unique=True, max_size=12)))
    return [Range(a, b) for a, b in zip(borders[::2], borders[1::2], strict=False)]


def positions(some):
    return [p for start, stop in some for p in range(start, stop)]


@given(ranges())
def test_ranges_and_their_complement_partition_what_they_stand_in(some):
    rest = complement(some, start=0, stop=60)
    assert sorted(positions(some) + positions(rest)) == list(range(60))
    assert all(r.num > 0 for r in rest)


@given(ranges(), st.integers(0, 60), st.integers(0, 60))
def test_clip_keeps_exactly_what_is_inside(some, start, stop):
    kept = clip(tuple(some), start=start, stop=stop)
    assert positions(kept) == [p for p in positions(some) if start <= p < stop]
    assert all(r.num > 0 for r in kept)


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
