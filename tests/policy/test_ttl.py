"""The time to live is where what is spared, less the time that memory is held, is largest."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare_sglang.policy import ttl
from kvshare_sglang.policy.ttl import Learned, best_ttl, prior_ttl

gaps = st.lists(st.floats(0, 30) | st.just(math.inf), min_size=1, max_size=30)
gains = st.floats(0, 60)


def value(t: float, seen: list[float], gain: float) -> float:
    """The definition: the share of gaps that are over by t, times the gain, less t."""
    return sum(gap <= t for gap in seen) / len(seen) * gain - t


@given(gaps, gains)
def test_no_other_time_is_better(seen, gain) -> None:
    best = best_ttl(seen, gain)
    others = [0.0, *np.linspace(0, 31, 200), *(gap for gap in seen if gap < math.inf)]
    assert value(best, seen, gain) >= max(value(t, seen, gain) for t in others) - 1e-9 or best == 0
    assert best in (0.0, *seen)
    assert best < math.inf


@given(gaps, gains, gains)
def test_more_to_gain_never_keeps_shorter(seen, gain, more) -> None:
    assert best_ttl(seen, gain + more) >= best_ttl(seen, gain)


@given(gains)
def test_the_prior_is_best_for_exponential_gaps(gain) -> None:
    def expected(t: float) -> float:
        return (1 - math.exp(-t)) * gain - t

    best = prior_ttl(gain)
    assert expected(best) >= max(expected(t) for t in np.linspace(0, 10, 500)) - 1e-9


@pytest.mark.parametrize(
    ("seen", "gain", "kept"),
    [
        ([0.1] * 10, 1.0, 0.1),  # quick tools
        ([20.0] * 10, 5.0, 0.0),  # slow ones: memory is held for longer than it saves
        ([math.inf] * 10, 50.0, 0.0),  # programs that end
        ([0.1] * 5 + [20.0] * 5, 5.0, 0.1),
        ([0.1] * 5 + [20.0] * 5, 50.0, 20.0),
    ],
)
def test_what_is_kept_for_which_tools(seen, gain, kept) -> None:
    assert best_ttl(seen, gain) == kept


def test_what_was_seen_replaces_the_prior_and_the_old_is_forgotten() -> None:
    it = Learned()
    it.served(wait=2.0, prefill=1.0, rows=1000)
    assert it.ttl(3000) == pytest.approx(math.log(2.0 + 3.0))
    for _ in range(ttl.PRIOR_UNTIL):
        it.gap(0.5)
    assert it.ttl(3000) == 0.5
    for _ in range(ttl.KEEP):
        it.gap(math.inf)
    assert it.ttl(3000) == 0.0


def test_a_server_that_served_nothing_keeps_nothing() -> None:
    assert Learned().ttl(10_000) == 0.0


def test_means_follow_what_was_served() -> None:
    it = Learned()
    for _ in range(200):
        it.served(wait=3.0, prefill=2.0, rows=1000)
    assert (it.wait, it.row) == (pytest.approx(3.0), pytest.approx(0.002))
    for _ in range(200):  # turns of one row take a step, and say nothing of a long text
        it.served(wait=3.0, prefill=0.03, rows=1)
        it.served(wait=3.0, prefill=2.0, rows=1000)
    assert it.row == pytest.approx(0.002, rel=0.05)
    it.served(wait=-1.0, prefill=-1.0, rows=0)  # a clock that was set back
    assert it.wait >= 0
    assert it.row >= 0
