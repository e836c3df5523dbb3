"""Worth: more use is never worth less, age halves it, and no use outlives the cache for ever."""

from hypothesis import given
from hypothesis import strategies as st

from kvshare_sglang.policy.worth import NEW, Worth, aged, rank, used

USES = st.floats(0, 1000)
TIMES = st.floats(0, 50)
WORTHS = st.builds(Worth, USES, TIMES)


@given(WORTHS, USES, TIMES)
def test_a_use_is_counted_in_full_and_what_was_before_by_its_age(worth, amount, later):
    now = worth.at + later
    after = used(worth, amount, now=now)
    assert after.at == now
    assert abs(after.uses - (worth.uses / 2**later + amount)) < 1e-6
    assert rank(after, now=now) >= rank(worth, now=now)


@given(WORTHS, TIMES, TIMES)
def test_age_never_adds_worth(worth, soon, late):
    soon, late = sorted((soon, late))
    assert rank(worth, now=worth.at + late) <= rank(worth, now=worth.at + soon)


@given(USES, TIMES)
def test_in_the_end_all_is_worth_nothing(uses, at):
    assert rank(Worth(uses, at), now=at + 20) == rank(NEW, now=0.0) == 0


@given(WORTHS, TIMES)
def test_ages_add_up(worth, later):
    half = used(worth, 0.0, now=worth.at + later / 2)
    assert abs(aged(half, now=worth.at + later) - aged(worth, now=worth.at + later)) < 1e-6
