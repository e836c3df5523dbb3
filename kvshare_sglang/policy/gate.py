"""Decide whether one request may and should reuse. Pure: sees a view, returns a reason or None."""

from collections.abc import Mapping
from enum import StrEnum
from typing import NamedTuple

from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.errors import ConfigError
from kvshare_sglang.radix_fuzzy.types import ReusePlan


class Decline(StrEnum):
    """Why a request takes the exact path; the value is the label in logs and metrics."""

    EXACT_REQUESTED = "exact_requested"
    LORA = "lora"
    PROMPT_LOGPROBS = "prompt_logprobs"
    HIDDEN_STATES = "hidden_states"
    PREFILL_ONLY = "prefill_only"
    MULTIMODAL = "multimodal"
    SESSION = "session"
    BEAM_SEARCH = "beam_search"
    NO_MATCH = "no_match"
    TOO_LITTLE = "too_little"
    DEVIATION = "deviation"
    NO_ROOM = "no_room"
    FAULT = "fault"


class RequestView(NamedTuple):
    """All the gate may see of a request."""

    mode: str = "auto"
    lora: bool = False
    prompt_logprobs: bool = False
    hidden_states: bool = False
    prefill_only: bool = False
    multimodal: bool = False
    session: bool = False
    beam_search: bool = False


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


def may_reuse(view: RequestView) -> Decline | None:
    """Why the request must not reuse at all, whatever the cache holds."""
    if view.mode == "exact":
        return Decline.EXACT_REQUESTED
    for wanted, reason in (
        (view.lora, Decline.LORA),
        (view.prompt_logprobs, Decline.PROMPT_LOGPROBS),
        (view.hidden_states, Decline.HIDDEN_STATES),
        (view.prefill_only, Decline.PREFILL_ONLY),
        (view.multimodal, Decline.MULTIMODAL),
        (view.session, Decline.SESSION),
        (view.beam_search, Decline.BEAM_SEARCH),
    ):
        if wanted:
            return reason
    return None


def pays(plan: ReusePlan, config: KVShareConfig, *, found: bool = False) -> Decline | None:
    """Why the plan is not worth it: it must save enough tokens, and enough of the prompt.

    ``found`` says that the cache holds some of the prompt, in runs too short for the plan or not.
    """
    if not plan.runs:
        return Decline.TOO_LITTLE if found else Decline.NO_MATCH
    rows = plan.prompt_len - plan.prefix_len
    if plan.copied < max(config.min_reuse, config.min_share * rows):
        return Decline.TOO_LITTLE
    return None
