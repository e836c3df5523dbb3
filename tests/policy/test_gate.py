"""The gate: what a request may ask for, what takes the exact path, and when reuse pays."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.errors import ConfigError
from kvshare_sglang.policy.gate import (
    Decline,
    RequestOptions,
    RequestView,
    may_reuse,
    parse_options,
    pays,
)
from kvshare_sglang.radix_fuzzy.types import Range, ReusePlan, Run

AUTO, EXACT = RequestOptions(), RequestOptions("exact")


@pytest.mark.parametrize(
    ("custom_params", "options"),
    [
        (None, AUTO),
        ({}, AUTO),
        ({"other": 1}, AUTO),
        ({"kvshare": None}, AUTO),
        ({"kvshare": {}}, AUTO),
        ({"kvshare": "auto"}, AUTO),
        ({"kvshare": "exact"}, EXACT),
        ({"kvshare": {"mode": "exact"}, "other": 1}, EXACT),
        ({"kvshare": {"budget": None}}, AUTO),
        ({"kvshare": {"budget": 0}}, RequestOptions(budget=0.0)),
        ({"kvshare": {"budget": 1}}, RequestOptions(budget=1.0)),
        ({"kvshare": {"mode": "auto", "budget": 0.3}}, RequestOptions(budget=0.3)),
    ],
)
def test_what_a_request_may_ask_for_is_understood(custom_params, options):
    assert parse_options(custom_params) == options


@pytest.mark.parametrize(
    ("asked", "name", "value", "allowed"),
    [
        ("fuzzy", ".mode", "'fuzzy'", "one of auto, exact"),
        ("", ".mode", "''", "one of auto, exact"),
        ({"mode": "Exact"}, ".mode", "'Exact'", "one of auto, exact"),
        ({"mode": None}, ".mode", "None", "one of auto, exact"),
        ({"mode": ["exact"]}, ".mode", r"\['exact'\]", "one of auto, exact"),
        ({"budget": -0.01}, ".budget", "-0.01", r"a number in \[0, 1\]"),
        ({"budget": 1.01}, ".budget", "1.01", r"a number in \[0, 1\]"),
        ({"budget": math.nan}, ".budget", "nan", r"a number in \[0, 1\]"),
        ({"budget": math.inf}, ".budget", "inf", r"a number in \[0, 1\]"),
        ({"budget": 10**400}, ".budget", "10", r"a number in \[0, 1\]"),
        ({"budget": True}, ".budget", "True", r"a number in \[0, 1\]"),
        ({"budget": "0.1"}, ".budget", "'0.1'", r"a number in \[0, 1\]"),
        ({"budgte": 0.1, "a": 1}, "", r"\['a', 'budgte'\]", "made of the keys mode and budget"),
        ({1: 0.1, "a": 1}, "", r"\['1', 'a'\]", "made of the keys mode and budget"),
        (True, "", "True", "a mode or"),
        (0.1, "", "0.1", "a mode or"),
        (["exact"], "", r"\['exact'\]", "a mode or"),
    ],
)
def test_anything_else_is_refused_by_name_value_and_what_is_allowed(asked, name, value, allowed):
    message = rf"custom_params\.kvshare{name} must be {allowed}.*, got {value}"
    with pytest.raises(ConfigError, match=message):
        parse_options({"kvshare": asked})


@pytest.mark.parametrize("custom_params", ["exact", ["exact"], 5, True])
def test_custom_params_that_are_no_object_are_refused(custom_params):
    with pytest.raises(ConfigError, match="custom_params must be an object, got"):
        parse_options(custom_params)


def test_what_a_client_sent_does_not_come_back_in_full():
    with pytest.raises(ConfigError) as caught:
        parse_options({"kvshare": "x" * 200_000})
    assert len(str(caught.value)) < 300
    assert "(200002 characters)" in str(caught.value)
    assert caught.value.value == "x" * 200_000


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
    compute = (Range(10 + copied, 10 + rows),)
    return ReusePlan(10 + rows, 10, (run,), (run,), compute)


def test_a_plan_without_runs_has_no_match():
    plan = ReusePlan(100, 10, (), (), (Range(10, 100),))
    assert pays(plan, KVShareConfig()) is Decline.NO_MATCH


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
    verdict = pays(plan, KVShareConfig(min_reuse=min_reuse, min_share=min_share))
    enough = copied >= min_reuse and copied >= min_share * rows
    assert verdict is (None if enough else Decline.TOO_LITTLE)


@pytest.mark.parametrize("copied", [63, 64, 65])
def test_the_fewest_tokens_is_inclusive(copied):
    verdict = pays(plan_with(copied, 100), KVShareConfig(min_reuse=64, min_share=0))
    assert (verdict is None) == (copied >= 64)


def test_text_found_in_runs_too_short_is_too_little_not_no_match():
    empty = ReusePlan(100, 0, (), (), (Range(0, 100),))
    assert pays(empty, KVShareConfig()) is Decline.NO_MATCH
    assert pays(empty, KVShareConfig(), found=True) is Decline.TOO_LITTLE
