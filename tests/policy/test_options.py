"""What a request may ask for under ``custom_params["kvshare"]``, and what is refused."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare_sglang.errors import ConfigError
from kvshare_sglang.policy.options import (
    HEADER,
    MODES,
    SALT_HEADER,
    RequestOptions,
    asked_of,
    check,
    parse_header,
    parse_options,
    salt_of,
    with_header,
)

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
        ({"kvshare": {"doubt": 1}}, RequestOptions(doubt=1.0)),
        ({"kvshare": {"budget": 0.1, "doubt": 0}}, RequestOptions(budget=0.1, doubt=0.0)),
        ({"kvshare": {"ttl": 0}}, RequestOptions(ttl=0.0)),
        ({"kvshare": {"mode": "exact", "ttl": 3600}}, RequestOptions("exact", ttl=3600.0)),
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
        ({"doubt": -0.1}, ".doubt", "-0.1", r"a number in \[0, 1000\]"),
        ({"doubt": 1001}, ".doubt", "1001", r"a number in \[0, 1000\]"),
        ({"doubt": math.inf}, ".doubt", "inf", r"a number in \[0, 1000\]"),
        ({"ttl": -1}, ".ttl", "-1", r"a number in \[0, 3600\]"),
        ({"ttl": 3601}, ".ttl", "3601", r"a number in \[0, 3600\]"),
        ({"ttl": math.nan}, ".ttl", "nan", r"a number in \[0, 3600\]"),
        ({"ttl": True}, ".ttl", "True", r"a number in \[0, 3600\]"),
        (
            {"budgte": 0.1, "a": 1},
            "",
            r"\['a', 'budgte'\]",
            "made of the keys mode, budget, doubt and ttl",
        ),
        ({1: 0.1, "a": 1}, "", r"\['1', 'a'\]", "made of the keys mode, budget, doubt and ttl"),
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


# ---- what it is given may be anything --------------------------------------------------------


class Hostile:
    """Neither compares nor shows itself."""

    def __eq__(self, other):
        raise RuntimeError("compared")

    __hash__ = object.__hash__

    def __repr__(self):
        raise RuntimeError("shown")


def nested(depth: int) -> Any:
    value: Any = "exact"
    for _ in range(depth):
        value = [value]
    return value


ODD = [
    *(math.nan, -math.inf, 10**5000, -1, 2, True, b"exact", 1j, Fraction(1, 2), object()),
    *(np.array([0.1, 0.2]), np.array(["exact"]), np.float32(0.1), np.bool_(True)),
    *((), [], set(), [[]], {1: 2}, {None: 1}, {("mode",): 1}, {10**5000: 1}),
    *(nested(100_000), "x" * 10**6, "\ud800", "exact\0", Hostile(), {"mode": Hostile()}),
]


@pytest.mark.parametrize("odd", ODD, ids=lambda value: type(value).__name__)
def test_no_object_makes_the_reader_fail_otherwise(odd):
    """An error of another kind would end the scheduler."""
    places = [
        {"kvshare": odd},
        *({"kvshare": {key: odd}} for key in ("mode", "budget", "other")),
    ]
    for asked in places if isinstance(odd, dict) else [odd, *places]:
        with pytest.raises(ConfigError) as caught:
            parse_options(asked)
        assert len(str(caught.value)) < 400


KEYS = st.sampled_from(("mode", "budget", "doubt", "ttl", "kvshare")) | st.text()
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(MODES),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)


@given(json_values, st.sampled_from(MODES))
def test_what_is_understood_is_a_mode_and_a_share(value, default):
    try:
        asked = parse_options({"kvshare": value}, default=default)
    except ConfigError:
        return
    assert asked.mode in MODES
    assert asked.budget is None or 0 <= asked.budget <= 1
    assert asked.ttl is None or 0 <= asked.ttl <= 3600
    said = isinstance(value, str) or bool(
        isinstance(value, dict)
        and ("mode" in value or value.get("budget") is not None or value.get("ttl") is not None)
    )
    assert said or asked == RequestOptions(default)


# ---- who says nothing ------------------------------------------------------------------------


@pytest.mark.parametrize("default", MODES)
def test_the_default_is_for_requests_that_say_nothing(default):
    for nothing in (None, {}, {"a": 1}, {"kvshare": None}, {"kvshare": {}},
                    {"kvshare": {"budget": None}}):  # fmt: skip
        assert parse_options(nothing, default=default) == RequestOptions(default)
    for said in MODES:
        assert parse_options({"kvshare": said}, default=default).mode == said
        assert parse_options({"kvshare": {"mode": said, "budget": 1}}, default=default).mode == said
    assert parse_options({"kvshare": {"budget": 0}}, default=default) == RequestOptions(budget=0.0)


# ---- the header ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("exact", "exact"),
        (" auto\t", "auto"),
        ("0", {"budget": 0.0}),
        ("1", {"budget": 1.0}),
        ("1.0", {"budget": 1.0}),
        (".25", {"budget": 0.25}),
        ("budget=0.3", {"budget": 0.3}),
        ("budget = 0.3", {"budget": 0.3}),
    ],
)
def test_what_a_header_may_say_is_understood_as_a_body_would_be(text, asked):
    assert parse_header(text) == asked
    parse_options({"kvshare": asked})


@pytest.mark.parametrize(
    "text",
    ["", "Exact", "exakt", "exact, exact", "nan", "inf", "1.01", "-0", "+0.1", "1e-1", "0,3", "٠.١",
     "0_1", "0x0", "budget=", "budget=exact", "mode=exact", "exact\0", "9" * 5000],
)  # fmt: skip
def test_any_other_header_is_refused_by_value_and_what_is_allowed(text):
    with pytest.raises(ConfigError, match=r"X-KVShare must be auto, exact, or") as caught:
        parse_header(text)
    assert caught.value.value == text.strip()
    assert len(str(caught.value)) < 300


def test_a_header_that_is_there_twice_is_refused_whatever_it_says():
    for read, name in ((asked_of, HEADER), (salt_of, SALT_HEADER)):
        assert read([("other", "a")]) is None
        assert read([(name, "exact")]) == "exact"
        with pytest.raises(ConfigError, match="must be there once, got 2"):
            read([(name, "exact"), ("other", "a"), (name, "exact")])


@given(st.text())
def test_a_header_that_is_understood_is_a_mode_or_a_share(text):
    try:
        asked = parse_header(text)
    except ConfigError:
        return
    assert parse_options({"kvshare": asked}).mode in MODES


@pytest.mark.parametrize("custom", ["exact", ["exact"], 5, {"kvshare": "exact"}, {"kvshare": 5}])
def test_a_body_that_says_something_comes_before_the_header(custom):
    """Also where what it says is wrong: that must not be hidden."""
    params = {"custom_params": custom}
    assert with_header(params, "auto") == params


@pytest.mark.parametrize("custom", [None, {}, {"a": 1}, {"kvshare": None, "a": 1}])
def test_a_header_speaks_for_a_body_that_does_not(custom):
    params = {"top_k": 1, "custom_params": custom}
    asked = with_header(params, "exact")
    assert asked == {"top_k": 1, "custom_params": {**(custom or {}), "kvshare": "exact"}}
    assert params == {"top_k": 1, "custom_params": custom}, "the caller's own object"


def test_a_header_is_for_every_prompt_of_a_batch_and_leaves_what_it_cannot_read():
    params = [None, {}, {"custom_params": {"kvshare": "auto"}}, 3, [{}]]
    said = {"custom_params": {"kvshare": "exact"}}
    assert with_header(params, "exact") == [said, said, params[2], 3, [said]]
    assert with_header("odd", "exact") == "odd"


def test_every_prompt_of_a_batch_is_judged():
    good = {"custom_params": {"kvshare": "exact"}}
    for fine in (None, {}, good, [good, {}], [], "odd", [3]):
        check(fine)
    for bad in ({"custom_params": 5}, [good, {"custom_params": {"kvshare": "exakt"}}]):
        with pytest.raises(ConfigError):
            check(bad)
