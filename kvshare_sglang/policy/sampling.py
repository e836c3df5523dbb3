"""Sampling parameters that SGLang takes and then fails on: its ``verify`` lets them pass, and the
tensor, the table or the comparison that they meet later raises where that ends the server. Pure."""

from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any, NamedTuple

from kvshare_sglang.errors import ConfigError

_MOST = 1e30  # still a number of 32 bits divided by the least temperature
_LEAST_TEMPERATURE = 1e-6  # below, SGLang takes the likeliest token
_LEAST_PENALTY = 1e-20  # logits are divided by it, then by the temperature
_INT32 = 2**31 - 1


class _Rule(NamedTuple):
    """``instead``: what a request runs with that is refused in the scheduler, for a token."""

    name: str
    serves: Callable[[Any], bool]
    allowed: str
    instead: Any


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral)


def _is_any_number(value: Any) -> bool:
    return isinstance(value, Real)


def _is_number(value: Any, *, least: float = -_MOST, most: float = _MOST) -> bool:
    return _is_any_number(value) and least <= value <= most


def _or_none(serves: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or serves(value)


def _are_whole(values: Any) -> bool:
    return isinstance(values, set | frozenset | list | tuple) and all(map(_is_whole, values))


# What is made of a request's words: None and -1 stand for their meaning by then.
_RULES = (
    _Rule("max_new_tokens", _or_none(_is_whole), "a whole number", 1),
    _Rule("min_new_tokens", _is_any_number, "a number", 0),
    _Rule(
        "top_k",
        lambda value: _is_whole(value) and value <= _INT32,
        f"a whole number up to {_INT32}",
        1,
    ),
    _Rule("beam_width", _or_none(_is_whole), "a whole number", None),
    _Rule(
        "temperature",
        lambda value: _is_number(value, least=_LEAST_TEMPERATURE),
        f"0 or a number in [{_LEAST_TEMPERATURE:g}, {_MOST:g}]",
        1.0,
    ),
    _Rule(
        "repetition_penalty",
        lambda value: _is_number(value, least=_LEAST_PENALTY),
        f"a number of at least {_LEAST_PENALTY:g}",
        1.0,
    ),
    _Rule("stop_token_ids", _or_none(_are_whole), "a list of whole numbers", None),
    _Rule("stream_interval", _or_none(_is_any_number), "a number", None),
    _Rule("skip_special_tokens", lambda value: isinstance(value, bool), "true or false", True),
    *(
        _Rule(name, _or_none(lambda value: isinstance(value, str)), "a text", None)
        for name in ("json_schema", "regex", "ebnf", "structural_tag")
    ),
    _Rule("logit_bias", _or_none(lambda value: isinstance(value, Mapping)), "an object", None),
)


def check(params: Any) -> None:
    """Raise ConfigError for the first of a request's parameters (a ``SamplingParams`` of SGLang's
    that it has verified) that would raise later. A version's parameters may be fewer."""
    for rule in _RULES:
        value = getattr(params, rule.name, rule.instead)
        if not rule.serves(value):
            raise ConfigError(rule.name, value, rule.allowed)
    for token, bias in (params.logit_bias or {}).items():
        if not _is_number(bias):
            allowed = f"a number in [{-_MOST:g}, {_MOST:g}]"
            raise ConfigError(f"logit_bias of token {int(token)}", bias, allowed)


def reset(params: Any) -> None:
    """Leave nothing in the parameters that ``check`` would refuse."""
    for rule in _RULES:
        if hasattr(params, rule.name):
            setattr(params, rule.name, rule.instead)
