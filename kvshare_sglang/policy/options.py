"""What a request may ask for, by ``custom_params["kvshare"]`` or by a header, and whose it is, by
another header. Pure."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from kvshare_sglang.errors import ConfigError
from kvshare_sglang.policy.ttl import LONGEST

HEADER = "x-kvshare"
MODES = ("auto", "exact")
KEYS = ("mode", "budget", "doubt", "ttl")
MOST_DOUBT = 1000.0  # nats
SALT_HEADER = "x-kvshare-salt"
MOST_SALT = 256  # characters
BORDER = "\0"  # behind a salt, before what else names a namespace; no header's salt has one
_HEADER_SAYS = "auto, exact, or a budget in [0, 1] such as 0.3 or budget=0.3"


class RequestOptions(NamedTuple):
    """What a request asked for under ``custom_params["kvshare"]``."""

    mode: str = "auto"
    budget: float | None = None
    doubt: float | None = None  # margin in nats below which a token makes all of the prompt run
    ttl: float | None = None  # seconds that what it leaves is kept for the turn that follows


def parse_options(custom_params: object, *, default: str = "auto") -> RequestOptions:
    """Read ``{"kvshare": "exact"}`` or ``{"kvshare": {"mode": ..., "budget": ..., "ttl": ...}}``.

    A request that names neither a mode nor a budget gets the mode ``default``; one that names a
    budget wants reuse. Raises ConfigError on anything else, and no other error, whatever objects
    it is given.
    """
    try:
        return _parse(custom_params, default)
    except ConfigError:
        raise
    except Exception as error:  # an object that does not even compare
        raise ConfigError("custom_params.kvshare", custom_params, "plain JSON") from error


def _parse(custom_params: object, default: str) -> RequestOptions:
    if custom_params is None:
        return RequestOptions(default)
    if not isinstance(custom_params, Mapping):
        raise ConfigError("custom_params", custom_params, "an object")
    asked = custom_params.get("kvshare")
    if asked is None:
        return RequestOptions(default)
    if isinstance(asked, str):
        asked = {"mode": asked}
    if not isinstance(asked, Mapping):
        keys = ", ".join(f'"{key}"' for key in KEYS)
        raise ConfigError("custom_params.kvshare", asked, f"a mode or {{{keys}}}")
    if unknown := sorted(map(str, set(asked) - set(KEYS))):
        raise ConfigError(
            "custom_params.kvshare",
            unknown,
            f"made of the keys {', '.join(KEYS[:-1])} and {KEYS[-1]}",
        )
    budget = asked.get("budget")
    mode = asked.get("mode", default if budget is None else "auto")
    if not isinstance(mode, str) or mode not in MODES:
        raise ConfigError("custom_params.kvshare.mode", mode, "one of " + ", ".join(MODES))
    return RequestOptions(
        mode,
        _number("budget", budget, most=1),
        _number("doubt", asked.get("doubt"), most=MOST_DOUBT),
        _number("ttl", asked.get("ttl"), most=LONGEST),
    )


def _number(name: str, value: Any, *, most: float) -> float | None:
    if value is None:
        return None
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value <= most:
        raise ConfigError(f"custom_params.kvshare.{name}", value, f"a number in [0, {most:g}]")
    return float(value)


def parse_header(text: str) -> str | dict[str, float]:
    """What the header ``X-KVShare`` asks for, as it would stand in ``custom_params["kvshare"]``.

    Raises ConfigError on anything but ``auto``, ``exact``, a budget, or ``budget=`` and one.

    >>> parse_header("exact"), parse_header("0.3"), parse_header("budget=0")
    ('exact', {'budget': 0.3}, {'budget': 0.0})
    """
    text = text.strip()
    if text in MODES:
        return text
    if number := re.fullmatch(r"(?:budget\s*=\s*)?([0-9]+(?:\.[0-9]*)?|\.[0-9]+)", text):
        budget = float(number[1])
        if budget <= 1:
            return {"budget": budget}
    raise ConfigError("the header X-KVShare", text, _HEADER_SAYS)


def with_header(sampling_params: Any, asked: str | dict[str, float]) -> Any:
    """A request's ``sampling_params`` (an object, a list with one for each prompt, or None) with
    what its header asks for; what the body says of kvshare comes before it. Copies what it changes.

    >>> with_header({"custom_params": {"kvshare": "exact", "a": 1}}, "auto")
    {'custom_params': {'kvshare': 'exact', 'a': 1}}
    >>> with_header([None, {"top_k": 1}], "exact") == [
    ...     {"custom_params": {"kvshare": "exact"}},
    ...     {"top_k": 1, "custom_params": {"kvshare": "exact"}}]
    True
    """
    if isinstance(sampling_params, list):
        return [with_header(each, asked) for each in sampling_params]
    params = {} if sampling_params is None else sampling_params
    if not isinstance(params, Mapping):
        return sampling_params
    custom = params.get("custom_params")
    if custom is None:
        custom = {}
    if not isinstance(custom, Mapping) or custom.get("kvshare") is not None:
        return sampling_params
    return {**params, "custom_params": {**custom, "kvshare": asked}}


def asked_of(headers: Iterable[tuple[str, str]]) -> str | None:
    """What ``X-KVShare`` says among headers (names in small letters), None without. Raises
    ConfigError for one that ``parse_header`` does not take, and for several."""
    said = _once(headers, HEADER, "X-KVShare")
    if said is not None:
        parse_header(said)
    return said


def salt_of(headers: Iterable[tuple[str, str]]) -> str | None:
    """The salt that ``X-KVShare-Salt`` names among headers (names in small letters), None without.
    Raises ConfigError for one that ``parse_salt`` does not take, and for several."""
    said = _once(headers, SALT_HEADER, "X-KVShare-Salt")
    return None if said is None else parse_salt(said)


def _once(headers: Iterable[tuple[str, str]], name: str, shown: str) -> str | None:
    """Of several it cannot be told which a gateway set and which a client."""
    said = [text for one, text in headers if one == name]
    if len(said) > 1:
        raise ConfigError(f"the header {shown}", len(said), "there once")
    return said[0] if said else None


def parse_salt(text: str) -> str:
    """The salt that the header ``X-KVShare-Salt`` names. Raises ConfigError on what is empty, too
    long or more than a name; the message does not say it.

    >>> parse_salt(" tenant-7 ")
    'tenant-7'
    """
    text = text.strip()
    if re.fullmatch(f"[!-+\\--~]{{1,{MOST_SALT}}}", text):
        return text
    allowed = f"1 to {MOST_SALT} visible ASCII characters without a comma"
    raise ConfigError("the header X-KVShare-Salt", f"{len(text)} characters", allowed)


def with_salt(given: Any, salt: str) -> Any:
    """What a request's body names (a salt, a list with one for each prompt, or None), inside of
    what its header does: no name in a body leads out of ``salt``, nor into another's. What was put
    there before stays. Raises ConfigError on what is no text.

    >>> with_salt(None, "a"), with_salt("b", "a"), with_salt(["b", ""], "a")
    ('a', 'a\\x00b', ['a\\x00b', 'a'])
    >>> with_salt(with_salt("b", "a"), "a")
    'a\\x00b'
    """
    if isinstance(given, list):
        return [_inside(salt, each) for each in given]
    return _inside(salt, given)


def _inside(salt: str, given: Any) -> str:
    if given is None or given == "":
        return salt
    if not isinstance(given, str):
        raise ConfigError("cache_salt", given, "a text, or a list of them")
    inside = given == salt or given.startswith(salt + BORDER)
    return given if inside else salt + BORDER + given


def check(sampling_params: Any) -> None:
    """Raise ConfigError where ``sampling_params``, of one prompt or of several, ask for what
    cannot be had."""
    for each in sampling_params if isinstance(sampling_params, list) else [sampling_params]:
        if isinstance(each, Mapping):
            parse_options(each.get("custom_params"))
