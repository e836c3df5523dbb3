"""Ranges of rows are merged for a backend that takes few, and only where rows are still there."""

from types import SimpleNamespace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kvshare_sglang.plan import Rows
from kvshare_sglang.runtime.batch import few_enough, few_enough_of

ROWS = st.sets(st.integers(0, 120), min_size=1, max_size=40).map(
    lambda some: Rows.at(np.array(sorted(some), np.int64))
)


def runner(limit: int, *, own: bool = False) -> SimpleNamespace:
    backend = SimpleNamespace(kvshare=SimpleNamespace(own=own))
    return SimpleNamespace(max_running_requests=limit, attn_backend=backend)


@given(st.lists(ROWS, min_size=1, max_size=5), st.data(), st.integers(1, 40))
def test_only_the_requests_that_were_asked_for_change(rows, data, limit):
    numbers = sorted(data.draw(st.sets(st.integers(0, len(rows) - 1), min_size=1)))
    merged = few_enough_of(rows, numbers, runner(limit))
    for i, (before, after) in enumerate(zip(rows, merged, strict=True)):
        if i in numbers:
            assert not before - after
        else:
            assert after == before
    others = sum(one.num_ranges for i, one in enumerate(rows) if i not in numbers)
    ranges = sum(one.num_ranges for one in merged)
    assert ranges <= max(limit, others + len(numbers), len(rows))


@given(st.lists(ROWS, min_size=1, max_size=5), st.integers(1, 40))
def test_for_all_requests_it_is_the_plain_merge(rows, limit):
    everyone = list(range(len(rows)))
    assert few_enough_of(rows, everyone, runner(limit)) == few_enough(rows, runner(limit))


@given(st.lists(ROWS, min_size=1, max_size=5), st.integers(1, 5))
def test_our_own_attention_takes_any_ranges(rows, limit):
    assert few_enough(rows, runner(limit, own=True)) == rows
    assert few_enough_of(rows, [0], runner(limit, own=True)) == rows
