"""More use never ranks lower, age halves it, and no use outlives the cache for ever."""

from hypothesis import given
from hypothesis import strategies as st

from kvshare_sglang.policy.evict import COPY, NEW, Frequency, aged, gone_on, rank, touched

USES = st.floats(0, 1000)
TIMES = st.floats(0, 50)
FREQUENCIES = st.builds(Frequency, USES, TIMES)


@given(FREQUENCIES, USES, TIMES)
def test_a_use_is_counted_in_full_and_what_was_before_by_its_age(frequency, amount, later):
    now = frequency.at + later
    after = touched(frequency, amount, now=now)
    assert after.at == now
    assert abs(after.uses - (frequency.uses / 2**later + amount)) < 1e-6
    assert rank(after, now=now) >= rank(frequency, now=now)


@given(FREQUENCIES, TIMES, TIMES)
def test_age_never_adds_rank(frequency, soon, late):
    soon, late = sorted((soon, late))
    assert rank(frequency, now=frequency.at + late) <= rank(frequency, now=frequency.at + soon)


@given(USES, TIMES)
def test_in_the_end_all_ranks_as_new(uses, at):
    assert rank(Frequency(uses, at), now=at + 20) == rank(NEW, now=0.0) == 0


@given(FREQUENCIES, TIMES)
def test_ages_add_up(frequency, later):
    half = touched(frequency, 0.0, now=frequency.at + later / 2)
    assert (
        abs(aged(half, now=frequency.at + later) - aged(frequency, now=frequency.at + later)) < 1e-6
    )


@given(FREQUENCIES, st.lists(st.floats(0, 0.2), max_size=30), st.booleans())
def test_turns_of_a_conversation_never_add_up(frequency, gaps, copied):
    """However many, it ranks as text that nobody else asked for, once its other uses are old."""
    at, now = frequency, frequency.at
    for gap in gaps:
        now += gap
        at = gone_on(at, now=now, copied=copied)
    assert aged(at, now=now) <= max(aged(frequency, now=now), 1.0 if copied else 0.0) + 1e-6
    last = gone_on(at, now=now + 20, copied=copied)
    assert rank(last, now=now + 20, less=COPY if copied else 0) == 0
