"""Sampling parameters: what is let through fits what SGLang makes of it, whatever it is."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare_sglang.errors import ConfigError
from kvshare_sglang.policy import sampling

GOOD = {
    "max_new_tokens": None, "min_new_tokens": 0, "top_k": 1 << 30, "temperature": 1.0,
    "repetition_penalty": 1.0, "stop_token_ids": None, "stream_interval": None,
    "skip_special_tokens": True, "json_schema": None, "regex": None, "ebnf": None,
    "structural_tag": None, "logit_bias": None, "beam_width": None,
}  # fmt: skip
LOGITS = np.array([-np.inf, -300.0, 0.0, 300.0], np.float32)  # the first is forbidden by a grammar

numbers = st.integers() | st.integers(-(2**65), 2**65) | st.floats()
scalars = st.none() | st.booleans() | numbers | st.text(max_size=3)
words = scalars | st.lists(scalars, max_size=2) | st.dictionaries(st.text(max_size=2), scalars)
biases = st.dictionaries(st.integers(0, 3).map(str), scalars, max_size=4)


def passes(**odd: Any) -> bool:
    try:
        sampling.check(SimpleNamespace(**{**GOOD, **odd}))
    except ConfigError:
        return False
    return True


@given(st.sampled_from(sorted(GOOD)), words)
def test_what_passes_can_be_counted_compared_looked_up_and_written(name: str, value: Any) -> None:
    """As SGLang does with it."""
    if not passes(**{name: value}):
        return
    match name:
        case "max_new_tokens" | "beam_width" if value is not None:
            assert [5, 6][: max(value, 0)] is not None
        case "top_k":
            assert np.int32(value) == value
            assert isinstance(range(max(value, 0)), range)
        case "stream_interval" if value:
            assert (value <= 7) in (True, False)
        case "skip_special_tokens":
            assert value is True or value is False
        case "json_schema" | "regex" | "ebnf" | "structural_tag":
            assert hash(value) is not None
        case "stop_token_ids" if value:
            assert (7 in value) in (True, False)


@given(st.just(1.0) | st.floats(0), st.just(1.0) | st.floats(0, 2), biases)
def test_of_what_passes_a_token_can_be_drawn(
    temperature: float, penalty: float, bias: dict[str, Any]
) -> None:
    """Logits in 32 bits: divided, shifted and divided again, they are numbers, or forbidden."""
    if not passes(temperature=temperature, repetition_penalty=penalty, logit_bias=bias):
        return
    logits = np.where(LOGITS > 0, LOGITS / np.float32(penalty), LOGITS * np.float32(penalty))
    for token, value in bias.items():
        logits[int(token)] += np.float32(value)
    logits /= np.float32(temperature)
    assert np.isfinite(logits[1:]).all()
    assert logits[0] == -np.inf


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        ({"top_k": 2**31}, "top_k must be a whole number up to 2147483647, got 2147483648"),
        ({"logit_bias": {"5": "x"}}, "logit_bias of token 5 must be a number in .*, got 'x'"),
        ({"logit_bias": {"5": float("nan")}}, "logit_bias of token 5 must be .*, got nan"),
        ({"logit_bias": ""}, "logit_bias must be an object, got ''"),
        ({"stream_interval": "x"}, "stream_interval must be a number, got 'x'"),
        ({"max_new_tokens": 8.0}, "max_new_tokens must be a whole number, got 8.0"),
        ({"skip_special_tokens": 0}, "skip_special_tokens must be true or false, got 0"),
        ({"json_schema": {"type": "object"}}, "json_schema must be a text, got {'type': 'object'}"),
        ({"temperature": 1e39}, "temperature must be 0 or a number in .*, got 1e.39"),
        ({"repetition_penalty": 1e-40}, "repetition_penalty must be a number of at least 1e-20"),
    ],
)
def test_a_refusal_names_the_parameter_what_it_may_be_and_what_it_is(
    odd: dict[str, Any], words: str
) -> None:
    params = SimpleNamespace(**{**GOOD, **odd})
    with pytest.raises(ConfigError, match=words):
        sampling.check(params)
    sampling.reset(params)
    sampling.check(params)


@given(st.dictionaries(st.sampled_from(sorted(GOOD)), words))
def test_nothing_is_refused_once_it_is_reset(odd: dict[str, Any]) -> None:
    params = SimpleNamespace(**{**GOOD, **odd})
    sampling.reset(params)
    sampling.check(params)


def test_what_users_ask_for_passes() -> None:
    for odd in (
        {"top_k": 50, "temperature": 0.7, "repetition_penalty": 1.1},
        {"logit_bias": {"5": -100, "6": 2.5, 7: 1e9}},
        {"stop_token_ids": {1, 2}, "min_new_tokens": 3, "max_new_tokens": 9},
        {"stream_interval": 8, "regex": "a+"},
        {"top_k": np.int64(5), "max_new_tokens": np.int32(5)},
    ):
        assert passes(**odd), odd
    sampling.check(SimpleNamespace(**{name: GOOD[name] for name in GOOD if name != "beam_width"}))
