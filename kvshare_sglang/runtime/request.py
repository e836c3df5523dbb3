"""What kvshare knows of one request, from lookup to release: the sole writer of plan and record.

::

    planned -> admitted -> copied -> released

Without a plan, from the start or because it was dropped on the way, a request is exact to its end.
A request whose prefix hit is not exact always has one, though it may copy nothing more.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from kvshare_sglang.plan import Range, ReusePlan, Rows
from kvshare_sglang.policy.admit import Decline
from kvshare_sglang.policy.refresh import Watch
from kvshare_sglang.policy.select.base import Selector
from kvshare_sglang.runtime.report import Fallback, Report

KINDS = ("exact", "blended", "copied", "recomputed", "fresh")  # of prompt tokens: they add up


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
    ``doubt``: margin in nats below which a greedy token makes all of them run (0: none does);
    ``doubt_shift``: of whom the end moves less as they do, less of it (0: all of it for all), and
    ``felt`` is where that end was.
    ``src_slots`` holds the KV slots of ``plan.runs``, one after the other; they stay what they
    are while ``locked`` holds the tree nodes that own them. ``based_on``: what the lookup rested
    on. ``spare``: free slots for rows of the prefix hit that run again; ``private``: the rows that
    have such slots. ``closed``: rows that were refreshed while decoding. ``record``: what the
    answer says of the request. ``told``: whether it was counted before; a request that was
    retracted is counted once.
    """

    report: Report
    plan: ReusePlan | None = None
    decline: Decline | None = None
    asked: str = ""
    selector: Selector | None = None
    budget: float = 0.0
    doubt: float = 0.0
    doubt_shift: float = 0.0
    felt: Any = None
    based_on: Any = None
    weights: int = 0  # how often they had been replaced when the request was planned
    fallback: Fallback | None = None
    stage: Stage = Stage.PLANNED
    src_slots: Any = None
    locked: list[Any] = field(default_factory=list)
    touched: list[Any] = field(default_factory=list)  # nodes, and what share of a use each is
    watch: Watch | None = None
    done: int = 0  # prompt positions below this have been through a forward pass
    spare: Any = None
    private: Rows = field(default_factory=Rows)
    closed: Rows = field(default_factory=Rows)
    again: Rows = field(default_factory=Rows)  # reused rows that ran, chunks before the next
    record: dict[str, Any] = field(default_factory=dict)
    marks: list[dict[str, int]] = field(default_factory=list)  # of the record, before each chunk
    told: bool = False

    @property
    def reuses(self) -> bool:
        """Whether the request was admitted with a plan and still has it."""
        return self.plan is not None and self.stage in (Stage.ADMITTED, Stage.COPIED)

    def admit(self, *, prefix_len: int) -> None:
        """The request goes to prefill with a prefix hit of so many tokens."""
        self.stage = Stage.ADMITTED
        blend = self.plan.blend if self.plan else None
        # Rows are told as they run.
        self.again = Rows()
        self.record = {
            "exact_tokens": blend.start if blend else prefix_len,
            "blended_tokens": prefix_len - blend.start if blend else 0,
            "copied_tokens": 0,
            "recomputed_tokens": 0,
            "fresh_tokens": 0,
            "source_depth": self.plan.depth if self.plan else 0,
            "select": self.selector.name if self.chooses and self.selector else None,
            "select_reason": self.fallback.value if self.chooses and self.fallback else None,
            "declined": self.decline.value if self.decline else None,
        }

    @property
    def chooses(self) -> bool:
        """Whether there is anything to choose from: rows that were copied, now or earlier."""
        return self.plan is not None and bool(self.plan.runs or self.plan.open)

    def use(self, selector: Selector, plan: ReusePlan, reason: Fallback) -> None:
        """Before admission: another selector than the one asked for chooses, by this plan."""
        self.selector, self.plan, self.fallback = selector, plan, reason

    def fall_back(self, reason: Decline) -> None:
        """Copy nothing: all after the prefix hit is computed. Records the reason."""
        assert self.plan is not None
        self.plan = self.plan.nothing() if self.plan.blend or self.plan.rest else None
        self.watch = None
        self.decline = reason
        self.record["declined"] = reason.value
        self.record["source_depth"] = self.plan.depth if self.plan else 0
        self.record["select"] = self.record["select_reason"] = None

    def settle(self, plan: ReusePlan, *, watch: bool, otherwise: Decline) -> None:
        """A selector has chosen: what is copied in the end, and whether decoding watches it.
        ``otherwise``: the reason where nothing is."""
        if self.plan is not None and self.plan.copies and not plan.copies:
            self.plan = plan
            self.fall_back(otherwise)
            return
        self.plan = plan
        if watch and plan.copies:
            self.watch = Watch.of_plan(plan)

    def stop_copying(self, reason: Decline, *, at: int | None = None) -> None:
        """From prompt position ``at`` on, by default all that has not run, nothing is copied: the
        sources are gone, or a copy or the choice of rows failed."""
        assert self.plan is not None
        if not self.plan.copies and reason is not Decline.FAULT:
            return
        self.plan = self.plan.stop_at(self.done if at is None else at)
        if not self.plan.copies:
            self.fall_back(reason)
        elif reason in (Decline.FAULT, Decline.EVERY_ROW):  # shown though some was reused before
            self.record["declined"] = reason.value

    def ran(self, chunk: Range, rows: Rows, plan: ReusePlan | None) -> int:
        """``rows`` of a prefill chunk ran, and of the prompt before it; the other rows of the chunk
        were copied by ``plan``, without which all ran. Returns how many."""
        record = self.record
        self.mark()
        if plan is None:
            record["fresh_tokens"] += chunk.num
            return 0
        here, before = rows.clip(*chunk), rows.clip(0, chunk.start)
        copied = chunk.num - here.num
        found = plan.reused_rows.clip(*chunk).num
        record["copied_tokens"] += copied
        record["recomputed_tokens"] += found - copied
        record["fresh_tokens"] += chunk.num - found
        if before:
            record["repaired_tokens"] = record.get("repaired_tokens", 0) + before.num
            blended = before.clip(0, plan.prefix_len).num
            reused = before - (before - plan.reused_rows)
            copied_before = (reused - self.again).num  # a chunk's last row ran there in any case
            hit = min(blended, record["blended_tokens"])  # fewer where it was retracted: ``go_on``
            copied_there = min(blended - hit + copied_before, record["copied_tokens"])
            record["blended_tokens"] -= hit
            record["copied_tokens"] -= copied_there
            record["recomputed_tokens"] += hit + copied_there
            twice = before.num - blended - copied_before
            record["traced_tokens"] = record.get("traced_tokens", 0) + twice
        if chunk.stop < plan.prompt_len:  # a later chunk may run some of them once more
            self.again |= here - (here - plan.reused_rows)
        return copied

    def mark(self) -> None:
        """Keep what is told of the prompt up to here, in case it is retracted."""
        self.marks.append({f"{kind}_tokens": self.record[f"{kind}_tokens"] for kind in KINDS})

    def traced(self, rows: float) -> None:
        """Passes through some of the layers cost as much as so many rows through all, to choose,
        beside the batch; with those that ``ran`` a second time they are the work that is in no
        other count."""
        self.record["traced_tokens"] = round(rows)

    def advance(self, stop: int) -> bool:
        """The prompt is through up to ``stop``; whether all that is copied has been enqueued."""
        self.done = stop
        if self.plan is None or stop < self.plan.prompt_len:
            return False
        self.stage = Stage.COPIED
        return True

    def go_on(self, before: list[dict[str, int]]) -> None:
        """Admitted once more: ``before`` are the ``marks`` of a request that was retracted in the
        middle of its prompt. What had run then and is found now is no hit: it stays what it was."""
        found = told(self.record)
        known = [mark for mark in before if told(mark) <= found]
        if not known:
            return
        done, ran = told(known[-1]), told(before[-1])
        exact = max(self.record["exact_tokens"] - done, 0)
        fresh = min(exact, ran - done)  # of a chunk of which not all is found
        self.record |= known[-1]
        self.record["fresh_tokens"] += fresh
        self.record["exact_tokens"] += exact - fresh
        self.record["blended_tokens"] += found - done - exact

    def release(self, *, goes_on: bool = False) -> None:
        """The request is over, or is planned anew: count once what its answer says, later where
        its prompt ``goes_on``."""
        self.stage = Stage.RELEASED
        record = self.record
        if not record or self.told or goes_on:
            return
        self.report.count(**{kind: record[f"{kind}_tokens"] for kind in KINDS})
        if record["declined"] is not None:
            self.report.declined(Decline(record["declined"]))
        if record["select_reason"] is not None:
            reason = Fallback(record["select_reason"])
            self.report.fell_back(asked=self.asked, ran=record["select"], reason=reason)

    def refreshed(self, rows: Rows) -> None:
        """Copied rows ran again while the request decodes."""
        self.closed |= rows
        self.record["refreshed_tokens"] = self.record.get("refreshed_tokens", 0) + rows.num


def told(record: dict[str, Any]) -> int:
    """Of how many prompt tokens a record says what was done with them."""
    return sum(record[f"{kind}_tokens"] for kind in KINDS)


def settle_all(req: Any, state: RequestReuse, rows: int) -> None:
    """A token was in doubt, and so many rows ran: nothing of the request is a copy any more. Told
    by what its answer says, also where that is of the time before it was retracted."""
    state.plan = state.watch = None
    state.record["settled_tokens"] = rows
    if shown := (req.customized_info or {}).get("kvshare"):
        shown[0]["settled_tokens"] = rows


def was_settled(req: Any) -> bool:
    """Whether the request had a token in doubt, and its prompt ran in full: it is exact from then
    on, also where it was retracted since."""
    shown = (req.customized_info or {}).get("kvshare")
    return bool(shown and "settled_tokens" in shown[0])


def reuse_of(req: Any) -> RequestReuse | None:
    """The reuse of an admitted request, or None where it takes the exact path."""
    state: RequestReuse | None = getattr(req, "kvshare", None)
    return state if state is not None and state.reuses else None


class OncePerAnswer(list[Any]):
    """A ``customized_info`` column that says one thing once, not one thing a token.

    SGLang sends ``column[sent:now]`` with each batch of tokens and joins the parts, so
    ``meta_info["kvshare"]`` is ``[record]`` however long the answer is. Where a later token was in
    doubt the record follows once more, as it is then.
    """

    def __init__(self, state: RequestReuse, req: Any) -> None:
        super().__init__([state.record])
        self.marks = state.marks
        # An answer of no tokens is sent as [0:0]; before a first token that would be too early.
        self._first_stop = min(1, req.sampling_params.max_new_tokens)
        self._sent: bool | None = None  # whether as that of a request that was settled

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            first = not key.start and (key.stop is None or key.stop >= self._first_stop)
            settled = "settled_tokens" in self[0]
            if first or (settled and self._sent is False):
                self._sent = settled
                return list(self)
            return []
        return super().__getitem__(key)
