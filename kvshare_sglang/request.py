"""What kvshare remembers of one request, from admission to release. Root layer, plain data."""

from dataclasses import dataclass, field
from typing import Any

from kvshare_sglang.policy.gate import Decline
from kvshare_sglang.policy.refresh import Watch
from kvshare_sglang.radix_fuzzy.types import ReusePlan
from kvshare_sglang.report import Report


@dataclass(slots=True)
class RequestReuse:
    """Hangs on SGLang's ``Req`` as ``req.kvshare``.

    ``plan`` is None for a request that takes the exact path, from the start or because memory got
    short before anything was copied. ``budget`` is the share of reused rows that may run again.
    ``src_slots`` holds the KV slots of ``plan.runs``, one after the other; they stay what they are
    while ``locked`` holds the tree nodes that own them.
    """

    plan: ReusePlan | None
    decline: Decline | None
    budget: float = 0.0
    src_slots: Any = None
    locked: list[Any] = field(default_factory=list)
    used: list[Any] = field(default_factory=list)  # nodes and the share of each that is copied
    watch: Watch | None = None
    done: int = 0  # prompt positions below this have been through a forward pass
    info: dict[str, Any] = field(default_factory=dict)


def turn_exact(state: RequestReuse, reason: Decline, report: Report) -> None:
    """Nothing is copied after all: the request is exact to its end, and says why."""
    state.plan = None
    state.info["declined"] = reason.value
    report.declined(reason)


def reuse_of(req: Any) -> RequestReuse | None:
    """The reuse of an admitted request, or None where it takes the exact path."""
    state: RequestReuse | None = getattr(req, "kvshare", None)
    return state if state is not None and state.plan is not None else None


class OncePerAnswer(list[Any]):
    """A ``customized_info`` column that says one thing once, not one thing a token.

    SGLang sends ``column[sent:now]`` with each batch of tokens and joins the parts, so
    ``meta_info["kvshare"]`` is ``[info]`` however long the answer is.
    """

    def __init__(self, info: dict[str, Any], req: Any) -> None:
        super().__init__([info])
        # An answer of no tokens is sent as [0:0]; before a first token that would be too early.
        self._first_stop = min(1, req.sampling_params.max_new_tokens)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            first = not key.start and (key.stop is None or key.stop >= self._first_stop)
            return list(self) if first else []
        return super().__getitem__(key)
