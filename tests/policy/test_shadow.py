"""The gate closes where twins surely agree too seldom, and not before; twins are spread evenly."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare_sglang.policy.shadow import FLOOR, LEAST, WINDOW, Gate, Twin, Z, upper_bound


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_bound_is_the_highest_rate_that_the_score_test_does_not_reject(
    pair: tuple[int, int],
) -> None:
    agree, twins = pair

    def rejected(rate: float) -> bool:
        return abs(agree / twins - rate) > Z * math.sqrt(rate * (1 - rate) / twins)

    bound = upper_bound(agree, twins)
    assert agree / twins <= bound <= 1
    if bound < 1 - 1e-9:
        assert not rejected(bound - 1e-9)
        assert rejected(bound + 1e-9)


@given(
    st.lists(
        st.lists(st.booleans(), max_size=80) | st.sampled_from(["on", "off", "new weights"]),
        max_size=12,
    ),
    st.floats(0, 1),
)
def test_the_gate_does_what_its_window_and_hands_say(
    events: list[list[bool] | str], floor: float
) -> None:
    """Against the definition, over the whole history: new weights open what twins closed, hands
    open all."""
    gate = Gate(share=1.0, floor=floor)
    since: list[bool] = []
    closed, off, prompt = False, False, 0
    for event in events:
        if isinstance(event, str):
            if event == "new weights":
                gate.forget()
            else:
                gate.switch(on=event == "on")
                off = event == "off"
            since, closed = [], off
        for one in event if isinstance(event, list) else ():
            closes = gate.add(Twin(one, 0.5, prompt))
            since.append(one)
            window = since[-WINDOW:]
            low = len(window) >= LEAST and upper_bound(sum(window), len(window)) < floor
            assert closes == (low and not closed)
            closed = closed or low
            assert (gate.twins, gate.agreeing) == (len(window), sum(window))
            assert gate.kl == pytest.approx(0.5)
            assert gate.knows(prompt)
            assert gate.knows(prompt - len(window) + 1)
            assert not gate.knows(prompt - len(window))
            prompt += 1
        assert (gate.closed, gate.by_hand) == (closed, off)


@given(st.lists(st.booleans(), max_size=400).filter(lambda all_: all_.count(False) <= 3))
def test_three_bad_twins_switch_nothing_off(agrees: list[bool]) -> None:
    gate = Gate(share=1.0, floor=FLOOR)
    assert not any(gate.add(Twin(one, 0.0, i)) for i, one in enumerate(agrees))


@given(st.lists(st.booleans(), max_size=400))
def test_without_a_floor_nothing_is_switched_off(agrees: list[bool]) -> None:
    gate = Gate(share=1.0, floor=0.0)
    assert not any(gate.add(Twin(one, 0.0, i)) for i, one in enumerate(agrees))


def test_a_model_that_agrees_with_nothing_is_switched_off_as_soon_as_may_be() -> None:
    gate = Gate(share=1.0, floor=FLOOR)
    closes = [gate.add(Twin(False, 9.0, i)) for i in range(LEAST + 5)]
    assert closes.index(True) == LEAST - 1
    assert closes.count(True) == 1


@given(st.floats(0, 1), st.integers(0, 300))
def test_so_many_requests_get_twins_as_the_share_says(share: float, requests: int) -> None:
    gate = Gate(share=share, floor=FLOOR)
    taken = [gate.takes() for _ in range(requests)]
    for n in range(requests + 1):
        assert abs(sum(taken[:n]) - share * n) <= 1 + 1e-6
    if share and requests:
        assert taken[0]  # the first request says something already
