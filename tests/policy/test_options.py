"""What a request may ask for under ``custom_params["kvshare"]``, and what is refused."""

import math

import pytest

from kvshare_sglang.errors import ConfigError
from kvshare_sglang.policy.options import RequestOptions, parse_options

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
