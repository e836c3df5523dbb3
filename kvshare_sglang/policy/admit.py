"""May one request reuse, and does it pay? Pure: sees a view, returns a reason or None."""

from enum import StrEnum
from typing import NamedTuple

from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.plan import ReusePlan


class Decline(StrEnum):
    """Why a request takes the exact path; the value is the label in logs and metrics."""

    EXACT_REQUESTED = "exact_requested"
    DEFAULT_EXACT = "default_exact"  # it said nothing, and that is what the server has for it
    BAD_OPTIONS = "bad_options"
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
    EVERY_ROW = "every_row"  # of its batch must run: a neighbour wants something of each token
    FAULT = "fault"
    SHADOW = "shadow"


MOST_CHUNKS = 32  # that a batch may hold in tokens: copying one costs about 1% of running it


class RequestView(NamedTuple):
    """All that admission may see of a request."""

    mode: str = "auto"
    lora: bool = False
    prompt_logprobs: bool = False
    hidden_states: bool = False
    prefill_only: bool = False
    multimodal: bool = False
    session: bool = False
    beam_search: bool = False


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


def pays(
    plan: ReusePlan, config: KVShareConfig, *, rows: int, found: bool = False
) -> Decline | None:
    """Why the plan is not worth it: it must save enough tokens, and enough of the prompt.

    ``rows`` is how many rows the selector will run at most; ``found`` says that the cache holds
    some of the prompt, in runs too short for the plan or not.
    """
    if not plan.runs:
        return Decline.TOO_LITTLE if found else Decline.NO_MATCH
    every = plan.prompt_len - plan.prefix_len
    if every - rows < max(config.min_reuse, config.min_share * every):
        return Decline.TOO_LITTLE
    return None


def goes_whole(tokens: int, rows: int, *, room: int, chunk: int, held: int = 0) -> bool:
    """Whether a prompt of which ``tokens`` are not in the prefix and at most ``rows`` of them run
    goes to prefill in one piece: it is charged its rows, which must fit the ``room`` that is left
    of the chunk; the tokens that the batch holds in all are bounded too. ``held``: so far."""
    return rows <= room and held + tokens <= MOST_CHUNKS * chunk
