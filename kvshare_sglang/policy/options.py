"""What a request may ask for under ``custom_params["kvshare"]``. Pure."""

from collections.abc import Mapping
from typing import NamedTuple

from kvshare_sglang.errors import ConfigError


class RequestOptions(NamedTuple):
    """What a request asked for under ``custom_params["kvshare"]``."""

    mode: str = "auto"
    budget: float | None = None


_MODES = ("auto", "exact")


def parse_options(custom_params: object) -> RequestOptions:
    """Read ``{"kvshare": "exact"}`` or ``{"kvshare": {"mode": ..., "budget": ...}}``.

    No such key means the server's own settings. Raises ConfigError on anything else.
    """
    if custom_params is None:
        return RequestOptions()
    if not isinstance(custom_params, Mapping):
        raise ConfigError("custom_params", custom_params, "an object")
    if custom_params.get("kvshare") is None:
        return RequestOptions()
    asked = custom_params["kvshare"]
    if isinstance(asked, str):
        asked = {"mode": asked}
    if not isinstance(asked, Mapping):
        raise ConfigError("custom_params.kvshare", asked, 'a mode or {"mode", "budget"}')
    if unknown := sorted(map(str, set(asked) - {"mode", "budget"})):
        raise ConfigError("custom_params.kvshare", unknown, "made of the keys mode and budget")
    mode, budget = asked.get("mode", "auto"), asked.get("budget")
    if mode not in _MODES:
        raise ConfigError("custom_params.kvshare.mode", mode, "one of " + ", ".join(_MODES))
    if budget is not None:
        number = isinstance(budget, int | float) and not isinstance(budget, bool)
        if not number or not 0 <= budget <= 1:
            raise ConfigError("custom_params.kvshare.budget", budget, "a number in [0, 1]")
        budget = float(budget)
    return RequestOptions(mode, budget)
