"""What kvshare knows of one request, from lookup to release: the sole writer of plan and record.

::

    planned -> admitted -> copied -> released

Without a plan, from the start or because it was dropped on the way, a request is exact to its end.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from kvshare_sglang.plan import Range, ReusePlan, Rows
from kvshare_sglang.policy.admit import Decline
from kvshare_sglang.policy.refresh import Watch
from kvshare_sglang.policy.select.base import Selector
from kvshare_sglang.runtime.report import Fallback, Report


class Stage(Enum):
    PLANNED = "planned"  # waits in the queue; the plan is redone when what it rests on changes
    ADMITTED = "admitted"  # goes to prefill; its sources are locked until all is copied
    COPIED = "copied"  # all copies are enqueued, the sources are free
    RELEASED = "released"


@dataclass(slots=True)
class RequestReuse:
    """SGLang's ``Req`` carries it as ``req.kvshare``.

    ``plan`` is None for a request that takes the exact path, from the start or because memory got
    short before anything was copied. ``selector`` chooses the rows; where it is not the one
    ``asked`` for, ``fallback`` says why. ``budget``: share of the reused rows that may run again.
    ``src_slots`` holds the KV slots of ``plan.runs``, one after the other; they stay what they
    are while ``locked`` holds the tree nodes that own them. ``based_on``: what the lookup rested
    on. ``record``: what the answer says of the request.
    """

    report: Report
    plan: ReusePlan | None = None
    decline: Decline | None = None
    asked: str = ""
    selector: Selector | None = None
    budget: float = 0.0
    based_on: Any = None
    fallback: Fallback | None = None
    stage: Stage = Stage.PLANNED
    src_slots: Any = None
    locked: list[Any] = field(default_factory=list)
    touched: list[Any] = field(default_factory=list)  # nodes and the share of each that is copied
    watch: Watch | None = None
    done: int = 0  # prompt positions below this have been through a forward pass
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def reuses(self) -> bool:
        """Whether the request was admitted with a plan and still has it."""
        return self.plan is not None and self.stage in (Stage.ADMITTED, Stage.COPIED)

    def admit(self, *, exact: int) -> None:
        """The request goes to prefill with a prefix hit of ``exact`` tokens."""
        self.stage = Stage.ADMITTED
        self.report.count(exact=exact)
        if self.decline is not None:
            self.report.declined(self.decline)
        elif self.fallback is not None and self.selector is not None:
            self.report.fell_back(asked=self.asked, ran=self.selector.name, reason=self.fallback)
        # Rows are counted as they run.
        self.record = {
            "exact_tokens": exact,
            "copied_tokens": 0,
            "recomputed_tokens": 0,
            "fresh_tokens": 0,
            "source_depth": self.plan.depth if self.plan else 0,
            "select": self.selector.name if self.plan and self.selector else None,
            "select_reason": self.fallback.value if self.plan and self.fallback else None,
            "declined": self.decline.value if self.decline else None,
        }

    def use(self, selector: Selector, plan: ReusePlan, reason: Fallback) -> None:
        """Before admission: another selector than the one asked for chooses, by this plan."""
        self.selector, self.plan, self.fallback = selector, plan, reason

    def fall_back(self, reason: Decline) -> None:
        """Drop the plan; the request is computed in full. Records and counts the reason."""
        self.plan = None
        self.watch = None
        self.decline = reason
        self.record["declined"] = reason.value
        self.record["source_depth"] = 0
        self.record["select"] = self.record["select_reason"] = None
        self.report.declined(reason)

    def settle(self, plan: ReusePlan, *, watch: bool, otherwise: Decline) -> None:
        """A selector has chosen: what is copied in the end, and whether decoding watches it.
        ``otherwise``: the reason where nothing is."""
        if not plan.copies:
            self.fall_back(otherwise)
            return
        self.plan = plan
        if watch:
            self.watch = Watch.of_plan(plan)

    def stop_copying(self, reason: Decline) -> None:
        """What is not copied yet is computed: its sources are gone, or a copy failed."""
        assert self.plan is not None
        self.plan = self.plan.stop_at(self.done)
        if not self.plan.copies:
            self.fall_back(reason)
        elif reason is Decline.FAULT:  # shown even where some of the prompt was reused before
            self.record["declined"] = reason.value
            self.report.declined(reason)

    def ran(self, chunk: Range, rows: Rows, plan: ReusePlan | None) -> int:
        """``rows`` of a prefill chunk ran, the others were copied by ``plan``; how many were."""
        copied = chunk.num - rows.num
        found = plan.reused_rows.clip(chunk.start, chunk.stop).num if plan else 0
        kinds = {"copied": copied, "recomputed": found - copied, "fresh": chunk.num - found}
        for kind, count in kinds.items():
            self.record[f"{kind}_tokens"] += count
        self.report.count(**kinds)
        return copied

    def advance(self, stop: int) -> bool:
        """The prompt is through up to ``stop``; whether all that is copied has been enqueued."""
        self.done = stop
        if self.plan is None or stop < self.plan.prompt_len:
            return False
        self.stage = Stage.COPIED
        return True

    def refreshed(self, count: int) -> None:
        """``count`` copied rows ran again while the request decodes."""
        self.record["refreshed_tokens"] = self.record.get("refreshed_tokens", 0) + count


def reuse_of(req: Any) -> RequestReuse | None:
    """The reuse of an admitted request, or None where it takes the exact path."""
    state: RequestReuse | None = getattr(req, "kvshare", None)
    return state if state is not None and state.reuses else None


class OncePerAnswer(list[Any]):
    """A ``customized_info`` column that says one thing once, not one thing a token.

    SGLang sends ``column[sent:now]`` with each batch of tokens and joins the parts, so
    ``meta_info["kvshare"]`` is ``[record]`` however long the answer is.
    """

    def __init__(self, record: dict[str, Any], req: Any) -> None:
        super().__init__([record])
        # An answer of no tokens is sent as [0:0]; before a first token that would be too early.
        self._first_stop = min(1, req.sampling_params.max_new_tokens)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            first = not key.start and (key.stop is None or key.stop >= self._first_stop)
            return list(self) if first else []
        return super().__getitem__(key)
