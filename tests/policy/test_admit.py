"""Admission: what takes the exact path, and when reuse pays."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.plan import ReusePlan, Run
from kvshare_sglang.policy.admit import Decline, RequestView, may_reuse, pays


def test_a_plain_request_may_reuse():
    assert may_reuse(RequestView()) is None


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("lora", Decline.LORA),
        ("prompt_logprobs", Decline.PROMPT_LOGPROBS),
        ("hidden_states", Decline.HIDDEN_STATES),
        ("prefill_only", Decline.PREFILL_ONLY),
        ("multimodal", Decline.MULTIMODAL),
        ("session", Decline.SESSION),
        ("beam_search", Decline.BEAM_SEARCH),
    ],
)
def test_each_kind_of_request_that_is_not_served_is_declined_by_its_name(name, reason):
    assert may_reuse(RequestView(**{name: True})) is reason
    assert reason.value == name
    assert may_reuse(RequestView(mode="exact", **{name: True})) is Decline.EXACT_REQUESTED


def test_every_field_of_the_view_matters():
    flags = set(RequestView._fields) - {"mode"}
    assert all(may_reuse(RequestView(**{flag: True})) for flag in flags)
    assert may_reuse(RequestView(mode="exact")) is Decline.EXACT_REQUESTED


def test_labels_of_declines_are_distinct_and_fit_a_metric():
    labels = [reason.value for reason in Decline]
    assert len(set(labels)) == len(labels)
    assert all(label.replace("_", "").isalpha() and label.islower() for label in labels)


def plan_with(copied, rows):
    run = Run(1, 0, 10, copied)
    return ReusePlan(10 + rows, 10, (run,), (run,))


def test_a_plan_without_runs_has_no_match():
    plan = ReusePlan(100, 10, (), ())
    assert pays(plan, KVShareConfig(), rows=90) is Decline.NO_MATCH


@given(
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.integers(1, 500),
    st.floats(0, 1),
)
def test_reuse_pays_iff_it_saves_enough_tokens_and_enough_of_the_prompt(
    copied, fresh, min_reuse, min_share
):
    rows = copied + fresh
    plan = plan_with(copied, rows)
    verdict = pays(plan, KVShareConfig(min_reuse=min_reuse, min_share=min_share), rows=fresh)
    enough = copied >= min_reuse and copied >= min_share * rows
    assert verdict is (None if enough else Decline.TOO_LITTLE)


@pytest.mark.parametrize("copied", [63, 64, 65])
def test_the_fewest_tokens_is_inclusive(copied):
    config = KVShareConfig(min_reuse=64, min_share=0)
    verdict = pays(plan_with(copied, 100), config, rows=100 - copied)
    assert (verdict is None) == (copied >= 64)


def test_text_found_in_runs_too_short_is_too_little_not_no_match():
    empty = ReusePlan(100, 0, (), ())
    assert pays(empty, KVShareConfig(), rows=100) is Decline.NO_MATCH
    assert pays(empty, KVShareConfig(), rows=100, found=True) is Decline.TOO_LITTLE


def test_it_is_the_rows_that_run_which_are_judged_not_what_the_plan_starts_from():
    """A trace starts from a plan that copies everything; its rows come later."""
    plan = plan_with(100, 120)
    assert pays(plan, KVShareConfig(), rows=20) is None
    assert pays(plan, KVShareConfig(), rows=57) is Decline.TOO_LITTLE
