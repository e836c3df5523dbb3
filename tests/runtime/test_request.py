"""One request from lookup to release: its record adds up to the prompt in every history."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import prompts_with_runs

from kvshare_sglang.plan import Range, ReusePlan, Rows, Run
from kvshare_sglang.policy.admit import Decline
from kvshare_sglang.policy.retain import fresh_stretches
from kvshare_sglang.policy.select.base import copy_all
from kvshare_sglang.policy.select.window import Window
from kvshare_sglang.runtime.report import Fallback, Report
from kvshare_sglang.runtime.request import RequestReuse, Stage, told

RUNS = (Run(1, 0, 10, 150),)
KINDS = ("exact_tokens", "blended_tokens", "copied_tokens", "recomputed_tokens", "fresh_tokens")


def planned(plan: ReusePlan | None, **more: Any) -> RequestReuse:
    selector = Window(16, 32)
    return RequestReuse(Report(), plan=plan, selector=selector, asked="trace", **more)


@st.composite
def histories(draw: Any) -> tuple[ReusePlan, list[int], str, int]:
    """A plan, chunk borders, what goes wrong and in which chunk."""
    runs, prefix_len, prompt_len = draw(prompts_with_runs())
    prompt_len += 20
    plan = copy_all(runs, prompt_len=prompt_len, prefix_len=prefix_len, suffix=16)
    inner = st.integers(prefix_len + 1, prompt_len - 1)
    cuts = sorted(draw(st.sets(inner, max_size=5))) if prompt_len - prefix_len > 2 else []
    what = draw(st.sampled_from(("nothing", "give back", "fault", "choose")))
    return plan, [prefix_len, *cuts, prompt_len], what, draw(st.integers(0, 5))


@given(histories())
def test_the_record_adds_up_to_the_prompt_whatever_happens(
    history: tuple[ReusePlan, list[int], str, int],
) -> None:
    plan, borders, what, when = history
    state = planned(plan if plan.copies else None)
    state.admit(prefix_len=plan.prefix_len)
    for i, (start, stop) in enumerate(pairwise(borders)):
        now = state.plan
        if i == when and now is not None and what in ("give back", "fault"):
            state.stop_copying(Decline.NO_ROOM if what == "give back" else Decline.FAULT)
            now = state.plan
        chunk = Range(start, stop)
        rows = Rows([chunk])
        if now is not None:
            rows = now.compute.clip(start, stop) | Rows([(stop - 1, stop)])
        state.ran(chunk, rows, now)
        state.advance(stop)
    assert sum(state.record[kind] for kind in KINDS) == plan.prompt_len
    assert state.stage is (Stage.ADMITTED if state.plan is None else Stage.COPIED)
    state.release()
    assert sum(state.report.tokens.values()) == plan.prompt_len
    said = state.record["declined"]
    assert state.report.declines == ({said: 1} if said else {})
    # No copy, no reuse: then the request is exact to its end, and says why if it had a plan.
    if state.plan is None and plan.copies:
        assert state.decline is not None
        assert said == state.decline.value


@given(histories())
def test_what_was_copied_stays_inexact_when_copying_stops(
    history: tuple[ReusePlan, list[int], str, int],
) -> None:
    """A request that stops copying in mid-prefill must not enter the plain branch whole."""
    plan, borders, _, _ = history
    if not plan.copies:
        return
    state = planned(plan)
    state.admit(prefix_len=plan.prefix_len)
    state.advance(borders[1])
    if state.stage is Stage.COPIED:
        return
    copied_before = any(copy.dst_start < borders[1] for copy in plan.copies)
    state.stop_copying(Decline.FAULT)
    assert (state.plan is not None) == copied_before
    if state.plan is not None:
        assert state.plan.exact_len == plan.exact_len
        assert all(copy.dst_stop <= borders[1] for copy in state.plan.copies)


@given(st.sets(st.integers(0, 199)), st.sets(st.integers(0, 199)), st.integers(1, 199))
def test_a_row_that_runs_in_two_chunks_is_counted_once(
    first: set[int], second: set[int], border: int
) -> None:
    """The last row of a chunk runs there, and a trace may choose it again with the last chunk."""
    plan = copy_all(RUNS, prompt_len=200, prefix_len=0, suffix=16)
    new = set(plan.fresh_rows.positions.tolist())
    rows = [{p for p in first | new if p < border}, {p for p in second if p < border}]
    rows[1] |= {p for p in second | new if p >= border}
    state = planned(plan)
    state.admit(prefix_len=0)
    for chunk, mine in zip((Range(0, border), Range(border, 200)), rows, strict=True):
        state.ran(chunk, Rows.at(np.array(sorted(mine), np.int64)), plan)
    ran = rows[0] | rows[1]
    assert state.record["recomputed_tokens"] == len(ran - new)
    assert state.record["copied_tokens"] == 200 - len(ran | new)
    assert state.record["fresh_tokens"] == len(new)


def test_where_every_copy_ran_again_what_was_computed_over_them_stays_inexact() -> None:
    plan = copy_all(RUNS, prompt_len=200, prefix_len=0, suffix=16)
    behind = plan.fresh_rows.clip(plan.runs[0].dst_stop, 200)
    assert behind
    for early, exact_len in ((behind, behind.ranges[0].start), (Rows(), None)):
        state = planned(plan)
        state.admit(prefix_len=0)
        ran = plan.recompute(Rows([(0, 200)]), early=early)
        assert not ran.copies
        state.settle(ran, watch=True, otherwise=Decline.TOO_LITTLE)
        assert state.record["declined"] == "too_little"
        assert state.watch is None
        assert (state.plan and state.plan.exact_len) == exact_len
        if state.plan is not None:
            assert state.plan.inexact
            stored = fresh_stretches(state.plan, 200, max_depth=9)
            assert stored == [(exact_len, 200, max(run.depth_after for run in plan.runs[:1]))]


def test_a_fallback_is_named_and_counted_once_where_the_request_reuses() -> None:
    plan = copy_all(RUNS, prompt_len=200, prefix_len=0, suffix=16)
    state = planned(plan)
    state.use(Window(16, 32), plan, Fallback.CHUNKED)
    state.admit(prefix_len=0)
    assert (state.record["select"], state.record["select_reason"]) == ("window", "chunked")
    state.release()
    assert state.report.fallbacks == {("trace", "window", "chunked"): 1}


def test_a_fallback_of_a_request_that_reuses_nothing_in_the_end_is_not_counted() -> None:
    plan = copy_all(RUNS, prompt_len=200, prefix_len=0, suffix=16)
    state = planned(plan)
    state.use(Window(16, 32), plan, Fallback.CHUNKED)
    state.admit(prefix_len=0)
    state.fall_back(Decline.NO_ROOM)
    assert (state.record["select"], state.record["select_reason"]) == (None, None)
    assert state.record["declined"] == "no_room"
    state.release()
    assert not state.report.fallbacks
    assert state.report.declines == {"no_room": 1}


@pytest.mark.parametrize("reason", [Decline.FAULT, Decline.EVERY_ROW])
def test_a_request_that_stops_copying_twice_is_counted_once(reason: Decline) -> None:
    plan = copy_all(RUNS, prompt_len=200, prefix_len=0, suffix=16)
    state = planned(plan)
    state.admit(prefix_len=0)
    for border in (plan.copies[0].dst_stop, 199):
        state.advance(border)
        state.stop_copying(Decline.FAULT)
        state.stop_copying(reason)
    state.release()
    assert state.report.declines == {state.record["declined"]: 1}


@given(histories(), st.integers(0, 5))
def test_a_prompt_that_was_retracted_in_its_middle_is_told_as_if_it_had_not_been(
    history: tuple[ReusePlan, list[int], str, int], at: int
) -> None:
    """All that had run is found again, as exact text or as text that reused; or nothing is."""
    plan, borders, _, _ = history
    at = borders[min(at, len(borders) - 2)]

    def run(state: RequestReuse, now: ReusePlan | None, borders: list[int]) -> None:
        for start, stop in pairwise(borders):
            rows = Rows([(start, stop)])
            if now is not None:
                rows = now.compute.clip(start, stop) | Rows([(stop - 1, stop)])
            state.ran(Range(start, stop), rows, now)

    whole, first = planned(plan), planned(plan)
    for state, until in ((whole, plan.prompt_len), (first, at)):
        state.admit(prefix_len=plan.prefix_len)
        run(state, plan, [b for b in borders if b <= until])
    first.release(goes_on=True)
    assert not first.report.tokens
    second = planned(None)
    second.admit(prefix_len=at)
    second.go_on([*first.marks, first.record])
    assert [second.record[kind] for kind in KINDS] == [first.record[kind] for kind in KINDS]
    run(second, plan, [b for b in borders if b >= at])
    assert [second.record[kind] for kind in KINDS] == [whole.record[kind] for kind in KINDS]
    lost = planned(None)
    lost.admit(prefix_len=0)
    lost.go_on([*first.marks, first.record])
    assert told(lost.record) == 0


def test_a_declined_request_counts_its_reason_and_no_fallback() -> None:
    state = RequestReuse(Report(), decline=Decline.NO_MATCH, fallback=Fallback.LORA)
    state.admit(prefix_len=5)
    assert not state.reuses
    state.ran(Range(5, 9), Rows([(5, 9)]), None)
    assert [state.record[kind] for kind in KINDS] == [5, 0, 0, 0, 4]
    state.release()
    assert state.report.declines == {"no_match": 1}
    assert not state.report.fallbacks


@pytest.mark.parametrize("stage", list(Stage))
def test_only_an_admitted_plan_reuses(stage: Stage) -> None:
    plan = copy_all(RUNS, prompt_len=200, prefix_len=0, suffix=16)
    state = planned(plan)
    state.stage = stage
    assert state.reuses == (stage in (Stage.ADMITTED, Stage.COPIED))
