"""What a prefill batch copies, which of its rows run, and what is counted of it. Root layer."""

import functools
import logging
import os
import time
from collections.abc import Callable
from typing import Any

from kvshare_sglang import attend, check, copying, refresh, tracing
from kvshare_sglang.cache import FuzzyRadixCache
from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.policy.gate import Decline
from kvshare_sglang.policy.trace import probe_layer
from kvshare_sglang.radix_fuzzy.types import Range, ReusePlan, clip
from kvshare_sglang.report import Report
from kvshare_sglang.request import RequestReuse, reuse_of

logger = logging.getLogger(__name__)

# For measurement: every prefill runs all its rows through our own attention (see bench_ttft.py).
_ALL_ROWS = os.environ.get("KVSHARE_MEASURE_ALL_ROWS") == "1"


# ---- hooks -----------------------------------------------------------------------------------


def hook_init_new(
    original: Callable[..., Any], cls: type, batch: Any, runner: Any, **kw: Any
) -> Any:
    """AROUND ``ForwardBatch.init_new``: the batch is built, its inputs are on the device, and we
    are on the forward stream, behind every forward that wrote what we copy."""
    fb = original(cls, batch, runner, **kw)
    cache = getattr(batch, "tree_cache", None)
    if isinstance(cache, FuzzyRadixCache) and fb.forward_mode.is_extend():
        narrow(fb, batch, runner, cache)
    elif isinstance(cache, FuzzyRadixCache) and fb.forward_mode.is_decode():
        refresh.before_decode(fb, batch, runner, cache)
    return fb


def hook_forward(original: Callable[..., Any], runner: Any, fb: Any, *args: Any, **kw: Any) -> Any:
    """AROUND ``ModelRunner.forward``: SGLang rebuilds the batch inside and drops what are no
    fields, so the rows are carried on the backend, for this call only."""

    def forward(part: Any) -> Any:
        backend = runner.attn_backend
        for name in attend.CARRIED:
            setattr(backend, name, getattr(part, name, None))
        try:
            return original(runner, part, *args, **kw)
        finally:
            for name in attend.CARRIED:
                setattr(backend, name, None)

    if (trace := getattr(fb, "kvshare_trace", None)) is not None:
        tracing.run(trace, fb, runner, forward)
    if (watch := getattr(fb, "kvshare_refresh", None)) is not None:
        return refresh.run(watch, fb, runner, forward)
    return forward(fb)


def hook_can_run_graph(
    original: Callable[..., Any], graphs: Any, fb: Any, *args: Any, **kw: Any
) -> bool:
    """AROUND ``can_run_graph`` of both graph runners: a captured prefill runs every row, and a
    captured decode step calls no Python that could look at its attention."""
    if getattr(fb, "kvshare_rows", None) or getattr(fb, "kvshare_look", None):
        return False
    return bool(original(graphs, fb, *args, **kw))


def hook_init_attention_backends(result: Any, runner: Any, *args: Any, **kw: Any) -> None:
    """AFTER ``ModelRunner.init_attention_backends``: wrap what SGLang built."""
    attend.wrap_backend(runner.attn_backend, runner)


# ---- the batch -------------------------------------------------------------------------------


def narrow(fb: Any, batch: Any, runner: Any, cache: FuzzyRadixCache) -> None:
    """Copy what the requests reuse and cut the batch down to the rows to compute.

    Changes ``fb`` and, through the KV pool, slots that the requests own. The rows stay on ``fb``
    as ``kvshare_rows``: for each request ascending ranges of positions, the last token included.
    Requests that a check layer narrows later are on ``fb`` as ``kvshare_check``.
    """
    chunks = [
        Range(start, start + length)
        for start, length in zip(fb.extend_prefix_lens_cpu, fb.extend_seq_lens_cpu, strict=True)
    ]
    states = [reuse_of(req) for req in batch.reqs]
    every_row = rows = [[chunk] for chunk in chunks]
    checked: list[int] = []
    if _ALL_ROWS:
        fb.kvshare_rows = every_row
    elif not _needs_every_row(fb, batch):
        checked = _checked(states, chunks, runner, cache.config)
        rows = [
            [chunk] if i in checked else _rows_of(state, chunk)
            for i, (state, chunk) in enumerate(zip(states, chunks, strict=True))
        ]
        rows = attend.few_enough(rows, runner)
    plans = [state.plan if state else None for state in states]
    count = functools.partial(_count_rows, batch, chunks, plans, cache.report)
    sharing = [i for i, chunk in enumerate(chunks) if i in checked or rows[i] != [chunk]]
    if not sharing or not _copy_and_cut(fb, runner, cache, states, chunks, rows, checked, count):
        count(every_row)
    for state, chunk in zip(states, chunks, strict=True):
        if state is None or state.plan is None:
            continue
        state.done = chunk.stop
        if chunk.stop >= state.plan.prompt_len:
            # The copy is enqueued on the forward stream, and whatever overwrites the sources
            # later is enqueued behind it.
            cache.unlock_sources(state)


def _needs_every_row(fb: Any, batch: Any) -> bool:
    """Whether any request of the batch has inputs or outputs by token that the cut would shift."""
    return (
        any(req.return_hidden_states for req in batch.reqs)
        or fb.input_embeds is not None
        or getattr(fb, "replace_embeds", None) is not None
        or any(mm is not None for mm in fb.mm_inputs or ())
    )


def _checked(
    states: list[RequestReuse | None], chunks: list[Range], runner: Any, config: KVShareConfig
) -> list[int]:
    """Which requests of the batch a check layer narrows; the others run what structure says."""
    if (
        config.select == "window"
        or config.check_layer + 1 >= len(runner.model.model.layers)
        or getattr(runner, "lora_manager", None) is not None  # its segments are per token
        or runner.token_to_kv_pool.get_key_buffer(0).dtype.itemsize == 1  # fp8 is not comparable
    ):
        return []
    return [
        i
        for i, (state, chunk) in enumerate(zip(states, chunks, strict=True))
        if check.may_check(state, chunk)
    ]


def _rows_of(state: RequestReuse | None, chunk: Range) -> list[Range]:
    """The rows to compute in a chunk; all of it where nothing is reused."""
    if state is None or state.plan is None or chunk.start >= state.plan.prompt_len:
        return [chunk]
    rows = clip(state.plan.compute, start=chunk.start, stop=chunk.stop)
    if not rows or rows[-1].stop < chunk.stop:
        rows.append(Range(chunk.stop - 1, chunk.stop))  # a request without rows has no logits
    return rows


def _copy_and_cut(
    fb: Any,
    runner: Any,
    cache: FuzzyRadixCache,
    states: list[RequestReuse | None],
    chunks: list[Range],
    rows: attend.Rows,
    checked: list[int],
    count: Callable[[attend.Rows], int],
) -> bool:
    """Copy, then cut; False if the copy failed: then every row must run, which overwrites it."""
    started = time.perf_counter()
    now, later, config = [], [], cache.config
    sharing = []
    try:
        base = 0
        for i, (state, chunk) in enumerate(zip(states, chunks, strict=True)):
            slots = fb.out_cache_loc[base : base + chunk.num]
            base += chunk.num
            if i not in checked and rows[i] == [chunk]:
                continue
            assert state is not None
            assert state.plan is not None
            sharing.append(state)
            if i in checked:
                later.append(copying.rows_of(state, state.plan.runs, chunk, slots))
            else:
                now.append(copying.rows_of(state, state.plan.copies, chunk, slots))
        if now:
            copying.copy_kv(runner, copying.joined(now))
        if later and config.select == "trace":
            copying.copy_kv(runner, copying.joined(later))
        elif later:
            # Up to the check layer every row is fresh; there the copies are only compared.
            copies = copying.joined(later)
            copying.copy_kv(runner, copies, first_layer=config.check_layer + 1)
            keys, values = copying.moved_kv(runner, copies, config.check_layer)
    except Exception:
        logger.exception("KVShare copy failed; the batch runs all its rows")
        for state in sharing:
            cache.report.declined(Decline.FAULT)
            state.info["declined"] = Decline.FAULT.value
        return False
    num_all = int(fb.extend_num_tokens)
    every_row = [[chunk] for chunk in chunks]
    seconds = time.perf_counter() - started

    def done(ran: attend.Rows) -> None:
        copied = count(ran)
        num_rows = sum(r.num for ranges in ran for r in ranges)
        cache.report.copied(
            seconds, requests=len(sharing), copied=copied, rows=num_rows, all_rows=num_all
        )

    if rows != every_row:
        attend.cut_tokens(fb, every_row, rows, runner)
    fb.kvshare_rows = rows
    if not later:
        done(rows)
        return True
    jobs, base = [], 0
    for i, (state, ranges) in enumerate(zip(states, rows, strict=True)):
        if i in checked and state is not None:
            jobs.append(check.Job(i, base, state))
        base += sum(r.num for r in ranges)
    if config.select == "trace":
        probe = probe_layer(len(runner.model.model.layers), config.probe_at)
        fb.kvshare_trace = tracing.Pending(probe, jobs, rows, config, cache.report, done)
    else:
        fb.kvshare_check = check.Pending(
            config.check_layer, jobs, rows, keys, values, config, cache.report, done
        )
    return True


def _count_rows(
    batch: Any,
    chunks: list[Range],
    plans: list[ReusePlan | None],
    report: Report,
    rows: attend.Rows,
) -> int:
    """Report what each request of the batch really ran: planned rows and forced ones. Returns how
    many tokens were copied in all."""
    decoding = {id(req) for req in batch.decoding_reqs or ()}
    total = 0
    for req, ranges, chunk, plan in zip(batch.reqs, rows, chunks, plans, strict=True):
        state: RequestReuse | None = getattr(req, "kvshare", None)
        if state is None or id(req) in decoding:
            continue
        spans = tuple(Range(run.dst_start, run.dst_stop) for run in plan.runs) if plan else ()
        computed = sum(r.num for r in ranges)
        copied = chunk.num - computed
        found = clip(spans, start=chunk.start, stop=chunk.stop)
        recomputed = sum(r.num for r in found) - copied
        state.info["computed_tokens"] += computed
        state.info["fuzzy_tokens"] += copied
        state.info["recomputed_tokens"] += recomputed
        report.ran(copied=copied, recomputed=recomputed, fresh=computed - recomputed)
        total += copied
    return total
