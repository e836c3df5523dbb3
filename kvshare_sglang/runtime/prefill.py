"""What a prefill batch copies and which of its rows run, now or once a selector has seen enough."""

import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvshare_sglang.plan import Range, ReusePlan, Rows
from kvshare_sglang.policy.admit import Decline
from kvshare_sglang.policy.select.attention_trace import AttentionTrace
from kvshare_sglang.policy.select.base import Sees
from kvshare_sglang.policy.select.dhd import Dhd
from kvshare_sglang.runtime import copying, support
from kvshare_sglang.runtime.attention_trace import TraceStage
from kvshare_sglang.runtime.batch import BatchedRequest, BatchReuse, cut_tokens, few_enough, pads
from kvshare_sglang.runtime.cache.radix import FuzzyRadixCache
from kvshare_sglang.runtime.dhd import DhdObserver
from kvshare_sglang.runtime.request import RequestReuse, Stage, reuse_of

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

logger = logging.getLogger(__name__)

# For measurement: every prefill runs all its rows through our own attention.
_ALL_ROWS = os.environ.get("KVSHARE_MEASURE_ALL_ROWS") == "1"


@dataclass
class _Member:
    """A request of the batch and its part of the prompt. ``plan``: as the batch found it, None
    where nothing is reused. ``later``: a selector chooses its rows during the forward pass."""

    req: "Req"
    chunk: Range
    state: RequestReuse | None
    plan: ReusePlan | None
    later: bool = False

    @property
    def whole(self) -> Rows:
        return Rows([self.chunk])

    def planned_rows(self) -> Rows:
        """The rows to compute; all of the chunk where nothing is reused."""
        chunk = self.chunk
        if self.plan is None or self.later or chunk.start >= self.plan.prompt_len:
            return self.whole
        rows = self.plan.compute.clip(chunk.start, chunk.stop)
        if rows.stop < chunk.stop:  # a request without rows has no logits
            rows |= Rows([(chunk.stop - 1, chunk.stop)])
        return rows


def narrow(
    fb: "ForwardBatch", batch: "ScheduleBatch", runner: "ModelRunner", cache: FuzzyRadixCache
) -> BatchReuse | None:
    """Copy what the requests reuse and cut the batch down to the rows to compute.

    Changes ``fb`` and, through the KV pool, slots that the requests own. Returns what the batch
    carries; None where SGLang's own batch runs.
    """
    members = _members(fb, batch)
    every_row = rows = [member.whole for member in members]
    reuse = BatchReuse(rows=every_row) if _ALL_ROWS else None
    whole = support.needs_every_row(fb, batch)
    if whole:
        _copy_nothing(members)
    planned = any(member.plan is not None for member in members)
    if planned and not _ALL_ROWS and not whole:
        for member in members:
            member.later = _chooses_later(member)
        rows = few_enough([member.planned_rows() for member in members], runner)
    sharing = [
        member for member, mine in zip(members, rows, strict=True)
        if member.later or mine != member.whole
    ]  # fmt: skip
    narrowed = bool(sharing) and _copy_and_cut(fb, batch, runner, cache, members, rows, sharing)
    if isinstance(narrowed, BatchReuse):
        reuse = narrowed
    else:
        _count(batch, members, every_row)
        if reuse is None and pads(runner) and any(m.plan and m.plan.blend for m in members):
            # Rows over text that reused, as samples are: not bound to SGLang's own sums.
            reuse = BatchReuse(rows=every_row)
    for member in members:
        # Whatever overwrites the sources later is enqueued after the copies.
        if member.state and (member.state.plan is None or member.state.advance(member.chunk.stop)):
            cache.sources.unlock(member.state)
    return reuse


def _members(fb: "ForwardBatch", batch: "ScheduleBatch") -> list[_Member]:
    out = []
    lengths = zip(fb.extend_prefix_lens_cpu, fb.extend_seq_lens_cpu, strict=True)
    for req, (start, length) in zip(batch.reqs, lengths, strict=True):
        state = reuse_of(req)
        plan = state.plan if state else None
        out.append(_Member(req, Range(start, start + length), state, plan))
    return out


def _copy_nothing(members: Sequence[_Member]) -> None:
    """All rows of the batch run, so what they leave is exact as far as what is before them. Nor
    does what follows of a prompt in chunks copy: rare, and simple."""
    for member in members:
        if member.state is not None and member.state.stage is Stage.ADMITTED:
            member.state.stop_copying(Decline.EVERY_ROW)
            member.plan = member.state.plan


def _chooses_later(member: _Member) -> bool:
    """Whether a selector chooses rows of the request during this forward pass: one that sees
    attention does so with the last chunk, where the question is; one that compares copies with
    fresh KV must have all of the prompt at once, as admission has made sure of."""
    state, plan = member.state, member.plan
    if state is None or plan is None or state.stage is not Stage.ADMITTED:
        return False
    if not state.chooses or state.selector is None or member.chunk.stop < plan.prompt_len:
        return False
    if state.selector.sees is Sees.ATTENTION:
        # Of a prefix hit alone nothing runs again where no slots could be set aside.
        return bool(plan.runs) or state.spare is not None
    if state.selector.sees is Sees.NOTHING or not plan.runs:
        return False
    if member.chunk.start == plan.prefix_len:
        return True
    logger.error("KVShare: %s is in parts, though admitted whole; it is computed", member.req.rid)
    state.stop_copying(Decline.FAULT)
    member.plan = state.plan
    return False


def _copy_and_cut(
    fb: "ForwardBatch",
    batch: "ScheduleBatch",
    runner: "ModelRunner",
    cache: FuzzyRadixCache,
    members: list[_Member],
    rows: list[Rows],
    sharing: list[_Member],
) -> BatchReuse | bool:
    """Copy, then cut; False if the copy failed: then every row must run, which overwrites it."""
    started = time.perf_counter()
    try:
        compared = _copy(fb, runner, cache, members, sharing)
    except Exception:
        logger.exception("KVShare copy failed; the batch runs all its rows")
        for member in sharing:
            assert member.state is not None
            member.state.stop_copying(Decline.FAULT)
            cache.sources.unlock(member.state)
        return False
    num_all = int(fb.extend_num_tokens)
    seconds = time.perf_counter() - started
    every_row = [member.whole for member in members]

    def done(ran: Sequence[Rows]) -> None:
        """The rows are known: count and log them."""
        copied = _count(batch, members, ran)
        cache.report.copied(
            seconds,
            requests=len(sharing),
            copied=copied,
            rows=sum(one.num for one in ran),
            all_rows=num_all,
            selectors=Counter(_chooser(member) for member in sharing),
        )

    if rows != every_row:
        cut_tokens(fb, every_row, rows, runner)
    jobs = _jobs(members, rows)
    if not jobs:
        done(rows)
        return BatchReuse(rows=rows)
    return _choose_later(jobs, rows, compared, runner, cache, done)


def _copy(
    fb: "ForwardBatch",
    runner: "ModelRunner",
    cache: FuzzyRadixCache,
    members: list[_Member],
    sharing: list[_Member],
) -> tuple[Any, Any] | None:
    """Copy KV into the batch's slots. Returns K and V of the check layer, where one compares."""
    now: list[copying.Copy] = []
    later: list[copying.Copy] = []
    base = 0
    ids = {id(member) for member in sharing}
    for member in members:
        slots = fb.out_cache_loc[base : base + member.chunk.num]
        base += member.chunk.num
        if id(member) not in ids:
            continue
        assert member.state is not None
        assert member.plan is not None
        # What is chosen later is copied whole: the rows that run then overwrite their copies.
        runs = member.plan.runs if member.later else member.plan.copies
        part = copying.rows_of(member.state, runs, member.chunk, slots)
        (later if member.later else now).append(part)
    scores = cache.choosing.asked.sees is Sees.SCORES
    if now:
        copying.copy_kv(runner, copying.joined(now))
    if later and not scores:
        copying.copy_kv(runner, copying.joined(later))
    if not later or not scores:
        return None
    # Up to the check layer every row is fresh; there the copies are only compared.
    layer, copies = cache.config.check_layer, copying.joined(later)
    copying.copy_kv(runner, copies, first_layer=layer + 1)
    return copying.moved_kv(runner, copies, layer)


def _jobs(members: list[_Member], rows: list[Rows]) -> list[BatchedRequest]:
    """The requests whose rows are chosen later, and where their tokens begin in the cut batch."""
    jobs, base = [], 0
    for i, (member, mine) in enumerate(zip(members, rows, strict=True)):
        if member.later and member.state is not None and member.plan is not None:
            jobs.append(
                BatchedRequest(i, base, member.req, member.chunk, member.state, member.plan)
            )
        base += mine.num
    return jobs


def _choose_later(
    jobs: list[BatchedRequest],
    rows: list[Rows],
    compared: tuple[Any, Any] | None,
    runner: "ModelRunner",
    cache: FuzzyRadixCache,
    done: Callable[[Sequence[Rows]], None],
) -> BatchReuse:
    """What the batch carries until its rows are chosen."""
    config = cache.config
    watch = bool(config.refresh_every)
    match cache.choosing.asked:
        case AttentionTrace() as selector:
            stage = TraceStage(selector, jobs, rows, config.probe_at, watch, done)
            return BatchReuse(rows=rows, stage=stage)
        case Dhd() as selector:
            assert compared is not None
            observer = DhdObserver(
                config.check_layer,
                selector,
                jobs,
                rows,
                *compared,
                config.seam,
                watch,
                runner,
                done,
            )
            return BatchReuse(rows=rows, observer=observer)
        case other:
            raise AssertionError(f"{other.name} chooses no rows during the forward pass")


def _chooser(member: _Member) -> str:
    state = member.state
    assert state is not None
    assert state.selector is not None
    return state.selector.name + (f" ({state.fallback.value})" if state.fallback else "")


def _count(batch: "ScheduleBatch", members: list[_Member], ran: Sequence[Rows]) -> int:
    """Report what each request of the batch really ran: planned rows and forced ones. Returns how
    many tokens were copied in all."""
    decoding = {id(req) for req in batch.decoding_reqs or ()}
    total = 0
    for member, rows in zip(members, ran, strict=True):
        state: RequestReuse | None = getattr(member.req, "kvshare", None)
        if state is not None and id(member.req) not in decoding:
            total += state.ran(member.chunk, rows, member.plan)
    return total
