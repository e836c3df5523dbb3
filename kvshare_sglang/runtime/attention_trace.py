"""Follow attention from the question back to the copied rows that its answer rests on.

Each step is a small pass of a few rows through the lower layers, over the KV that was copied; it
ends at the probe layer, whose attention tells the next step. Then the batch runs, with the rows
that the steps found among those that are computed again.
"""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from kvshare_sglang.plan import ReusePlan, Rows
from kvshare_sglang.policy.admit import Decline
from kvshare_sglang.policy.select.attention_trace import AttentionTrace, Trace, probe_layer
from kvshare_sglang.runtime import attention, carry, felt, profiles, repair, trace_on_device
from kvshare_sglang.runtime.batch import (
    BatchedRequest,
    BatchReuse,
    DeviceRows,
    Entry,
    Part,
    cut_tokens,
    few_enough,
    few_enough_of,
    is_greedy,
    keep_tokens,
    on_cpu,
    together,
)
from kvshare_sglang.runtime.probe import Asking, attention_of

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

logger = logging.getLogger(__name__)

MOST_MERGED = 4  # times as many rows as wanted, once ranges are merged

Forward = Callable[[Any], Any]
MakePart = Callable[[Rows], Part]


@dataclass
class TraceStage:
    """A batch whose last choice of rows waits for traces; ``rows`` is what it has till then."""

    selector: AttentionTrace
    jobs: list[BatchedRequest]
    rows: list[Rows]
    probe_at: float
    watch: bool
    on_done: Callable[[Sequence[Rows]], None]

    def run(self, fb: "ForwardBatch", runner: "ModelRunner", forward: Forward) -> Any:
        """Trace the jobs by small passes through ``forward``, cut the batch down to the rows that
        are left to run, those before it included, and run it. Where a trace goes wrong, every row
        of the batch runs."""
        try:
            traces = self._traces(fb, runner, repair_hits=True)
            choose: Callable[..., Any] = self._choose
            run: Callable[..., Any] = self._run_chosen
            if trace_on_device.serves(traces, self.jobs, self.rows, runner):
                choose, run = self._choose_on_device, self._run_chosen_on_device
            chosen = choose(traces, fb, runner, forward)
        except Exception:
            logger.exception("KVShare's trace failed; the batch runs all its rows")
            for job in self.jobs:
                job.state.stop_copying(Decline.FAULT, at=job.chunk.start)
            self.on_done(self.rows)
            fb.kvshare = BatchReuse(rows=self.rows)
            return forward(fb)
        return run(chosen, fb, runner, forward)

    def _traces(
        self, fb: "ForwardBatch", runner: "ModelRunner", *, repair_hits: bool
    ) -> list[Trace]:
        """By job. Without ``repair_hits`` no rows of a prefix hit are among their candidates."""
        page = runner.token_to_kv_pool_allocator.page_size
        kept, table = profiles.of_runner(runner), runner.req_to_token_pool.req_to_token
        traces = []
        for job in self.jobs:
            spare = job.state.spare if repair_hits else None
            most_open = 0 if spare is None else len(spare) // page
            prior = None
            if kept is not None:
                # a slice, not a number, of what is on the device: see ``attention.keys_of``
                owner = fb.req_pool_indices[job.number : job.number + 1]
                prior = kept.prior(job.plan, table[owner, : job.plan.prompt_len][0])
            traces.append(
                self.selector.trace(
                    job.plan,
                    budget=job.state.budget,
                    start=job.chunk.start,
                    most_open=most_open,
                    prior=prior,
                )
            )
        return traces

    def _choose(
        self, traces: list[Trace], fb: "ForwardBatch", runner: "ModelRunner", forward: Forward
    ) -> "_Chosen":
        try:
            return self._follow(traces, fb, runner, forward)
        except repair.NoSlots:  # ranges were merged over rows that others read
            return self._follow(self._traces(fb, runner, repair_hits=False), fb, runner, forward)

    def _follow(
        self, traces: list[Trace], fb: "ForwardBatch", runner: "ModelRunner", forward: Forward
    ) -> "_Chosen":
        """Take the traces to their ends. Raises NoSlots."""
        for trace in traces:
            trace.prior = profiles.on_host(trace.prior)
        rows = list(self.rows)
        parts = [functools.partial(repair.part_of, fb, runner, job) for job in self.jobs]
        layer = self._layer(runner)
        keep = carry.serves(fb, runner, layer)
        layers = len(runner.model.model.layers)
        until = felt.layer_of(layers, layer) if self._feels(runner) else None
        passed: list[Part] = []
        firsts = follow(
            traces, parts, fb, runner, forward, layer=layer, keep=keep, until=until, first=passed
        )
        further: dict[int, int] = {}  # rows by layers, by request
        if until is not None:
            there = {part.number: part for part in passed}
            further = {number: part.rows.num * (until - layer) for number, part in there.items()}
            for job in self.jobs:
                if job.number in there and _may_doubt(job):
                    job.state.felt = felt.before(there[job.number], runner, until)
        for job, trace in zip(self.jobs, traces, strict=True):
            rows[job.number] = self.selector.rows(job.plan, trace, job.chunk.start)
        rows = few_enough_of(rows, [job.number for job in self.jobs], runner)
        earlier = []
        for job, make in zip(self.jobs, parts, strict=True):
            before = rows[job.number].clip(0, job.chunk.start)
            if before:
                earlier.append(make(before))
        kept: dict[int, tuple[Rows, carry.First]] = {}
        for job, trace, first in zip(self.jobs, traces, firsts, strict=False):
            if carried := trace.carried():
                kept[job.number] = (carried, first)
        halves = {number: mine for number, (mine, _) in kept.items()}
        for job, trace in zip(self.jobs, traces, strict=True):
            once = halves.get(job.number, Rows()).num
            ran = (trace.ran - once) * layer + further.get(job.number, 0)
            job.state.traced(ran / layers)
        return _Chosen(rows, earlier, self._plans(rows, halves), kept)

    def _run_chosen(
        self, chosen: "_Chosen", fb: "ForwardBatch", runner: "ModelRunner", forward: Forward
    ) -> Any:
        rows, earlier, plans, kept = chosen
        self._settle(plans)
        self.on_done(rows)
        here = list(rows)
        for job in self.jobs:
            here[job.number] = rows[job.number].clip(*job.chunk)
        if here != self.rows or earlier:
            cut_tokens(fb, self.rows, here, runner, earlier)
        for part in earlier:
            assert isinstance(part.rows, Rows)
            here[part.number] = part.rows | here[part.number]
        return carry.run(fb, here, kept, runner, forward, layer=self._layer(runner))

    def _choose_on_device(
        self, traces: list[Trace], fb: "ForwardBatch", runner: "ModelRunner", forward: Forward
    ) -> list[DeviceRows]:
        there = [
            trace_on_device.DeviceTrace(
                trace, self.selector.required(job.plan, job.chunk.start), fb.input_ids.device
            )
            for trace, job in zip(traces, self.jobs, strict=True)
        ]
        recorded = runner.attn_backend.kvshare.recorded
        layer = self._layer(runner)
        trace_on_device.follow(there, self.jobs, fb, forward, layer=layer, recorded=recorded)
        for job, trace in zip(self.jobs, there, strict=True):
            job.state.traced(trace.ran * layer / len(runner.model.model.layers))
        return [trace.chosen() for trace in there]

    def _run_chosen_on_device(
        self,
        chosen: list[DeviceRows],
        fb: "ForwardBatch",
        runner: "ModelRunner",
        forward: Forward,
    ) -> Any:
        """As ``_run_chosen``, but the rows are known here only once the batch is on its way."""
        here: list[Rows | DeviceRows] = list(self.rows)
        keep, base = [], 0
        for old in self.rows:
            keep.append(torch.arange(base, base + old.num, device=fb.input_ids.device))
            base += old.num
        for job, mine in zip(self.jobs, chosen, strict=True):
            here[job.number] = mine
            keep[job.number] = trace_on_device.places_of(job, mine)
        coming = trace_on_device.OnTheirWay(chosen)
        keep_tokens(fb, torch.cat(keep), [one.num for one in here], runner)
        fb.kvshare = BatchReuse(rows=here)
        out = forward(fb)
        rows = list(self.rows)
        for job, ran in zip(self.jobs, coming.wait(), strict=True):
            rows[job.number] = ran
        self._settle(self._plans(rows, {}))
        self.on_done(rows)
        return out

    def _layer(self, runner: "ModelRunner") -> int:
        return probe_layer(len(runner.model.model.layers), self.probe_at)

    def _feels(self, runner: "ModelRunner") -> bool:
        """Whether the first pass goes on to where it is felt what the choice changes."""
        apart = attention.has_kernel(runner) or not on_cpu(runner)  # recorded passes end before
        return not apart and any(map(_may_doubt, self.jobs))

    def _plans(self, rows: Sequence[Rows], carried: Mapping[int, Rows]) -> list[ReusePlan]:
        """By job: what is copied once ``rows`` ran, of which those ``carried`` ran their lower
        layers before it was chosen what else runs."""
        plans = []
        for job in self.jobs:
            now, ran = rows[job.number], _ran(job)
            halves = carried.get(job.number, Rows())
            early = _over_copies(job, ran) - now
            plans.append(job.plan.recompute(now | ran, early=early, carried=halves))
        return plans

    def _settle(self, plans: Sequence[ReusePlan]) -> None:
        for job, plan in zip(self.jobs, plans, strict=True):
            job.state.settle(plan, watch=self.watch, otherwise=Decline.TOO_LITTLE)


class _Chosen(NamedTuple):
    """``rows`` by request, those before the batch included, which ``earlier`` holds; by job what is
    copied then; and by request what is ``kept`` of the first pass."""

    rows: list[Rows]
    earlier: list[Part]
    plans: list[ReusePlan]
    kept: dict[int, tuple[Rows, carry.First]]


def _may_doubt(job: BatchedRequest) -> bool:
    return bool(job.state.doubt and job.state.doubt_shift) and is_greedy(job.req)


def _ran(job: BatchedRequest) -> Rows:
    """The rows that earlier chunks of the prompt have computed."""
    return job.plan.compute.clip(job.plan.prefix_len, job.chunk.start)


def _over_copies(job: BatchedRequest, ran: Rows) -> Rows:
    """Of rows that earlier chunks computed, those behind the first row that they copied."""
    copies = job.plan.copies
    return ran.clip(copies[0].dst_start, job.chunk.start) if copies else Rows()


def follow(
    traces: Sequence[Trace],
    parts: Sequence[MakePart],
    fb: "ForwardBatch",
    runner: "ModelRunner",
    forward: Forward,
    *,
    layer: int,
    keep: bool = False,
    until: int | None = None,
    first: list[Part] | None = None,
) -> list[carry.First]:
    """Take the traces to their ends. ``parts[i]`` makes the tokens of trace ``i``'s request. By
    trace, what its first pass gave, if that is to be kept. The first pass goes on ``until`` a
    layer; ``first`` gets what it ran."""
    firsts: list[carry.First] = []
    entry = Entry(layer) if keep else None
    if keep:
        attention.watch_entry(runner, layer)
    while live := [i for i, trace in enumerate(traces) if not trace.done]:
        rows = few_enough([traces[i].rows for i in live], runner)
        check_few(rows, [traces[i] for i in live])
        made = [parts[i](mine) for i, mine in zip(live, rows, strict=True)]
        device = fb.input_ids.device
        asking = []
        for i, ran in zip(live, rows, strict=True):
            query = traces[i].query
            hosts = [torch.from_numpy(query.places_in(ran)), torch.from_numpy(query.positions)]
            places, positions = together(hosts, device)
            asking.append(Asking(places, positions, traces[i].length))
        recorded = runner.attn_backend.kvshare.recorded
        mass = torch.cat(
            attention_of(
                fb, made, asking, forward, layer=layer, recorded=recorded, entry=entry, until=until
            )
        )
        if first is not None and not first:
            first += made
        if entry is not None and len(live) == len(traces):
            firsts = carry.firsts_of(entry, rows, runner)
        entry = until = None  # only the first pass runs all new text
        cuts = np.cumsum([one.length for one in asking])[:-1]
        for i, mine in zip(live, np.split(mass.cpu().numpy(), cuts), strict=True):
            traces[i].feed(mine)
    return firsts


def check_few(rows: Sequence[Rows], traces: Sequence[Trace]) -> None:
    """Raise RuntimeError if merging ranges for the backend made many rows out of few: better no
    trace than one that runs most of the prompt."""
    for mine, trace in zip(rows, traces, strict=True):
        wanted = max(trace.rows.num, trace.chosen.num)
        if mine.num > MOST_MERGED * wanted + 256:
            raise RuntimeError(
                f"{wanted} rows became {mine.num} in as many ranges as --max-running-requests"
            )
