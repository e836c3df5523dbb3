"""Follow attention from the question back to the copied rows that its answer rests on.

Each step is a small pass of a few rows through the lower layers, over the KV that was copied; it
ends at the probe layer, whose attention tells the next step. Then the batch runs, with the rows
that the steps found among those that are computed again.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvshare_sglang.kernels.ops import attention_mass
from kvshare_sglang.plan import Rows
from kvshare_sglang.policy.admit import Decline
from kvshare_sglang.policy.select.attention_trace import AttentionTrace, Trace, probe_layer
from kvshare_sglang.runtime import repair
from kvshare_sglang.runtime.batch import (
    STOP,
    BatchedRequest,
    BatchReuse,
    LayerView,
    Part,
    Stop,
    StopForward,
    cut_tokens,
    few_enough,
    few_enough_of,
    sub_batch,
    to_device,
)

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
        are left to run, those before it included, and run it. Whatever goes wrong, every row of
        the batch runs."""
        try:
            try:
                rows, earlier = self._choose(fb, runner, forward, repair_hits=True)
            except repair.NoSlots:  # ranges were merged over rows that others read
                rows, earlier = self._choose(fb, runner, forward, repair_hits=False)
            plans = [job.plan.recompute(rows[job.number] | _ran(job)) for job in self.jobs]
        except Exception:
            logger.exception("KVShare's trace failed; the batch runs all its rows")
            rows, earlier = list(self.rows), []
            for job in self.jobs:
                job.state.stop_copying(Decline.FAULT, at=job.chunk.start)
        else:
            for job, plan in zip(self.jobs, plans, strict=True):
                job.state.settle(plan, watch=self.watch, otherwise=Decline.TOO_LITTLE)
        self.on_done(rows)
        here = list(rows)
        for job in self.jobs:
            here[job.number] = rows[job.number].clip(*job.chunk)
        if here != self.rows or earlier:
            cut_tokens(fb, self.rows, here, runner, earlier)
        for part in earlier:
            here[part.number] = part.rows | here[part.number]
        fb.kvshare = BatchReuse(rows=here)
        return forward(fb)

    def _choose(
        self, fb: "ForwardBatch", runner: "ModelRunner", forward: Forward, *, repair_hits: bool
    ) -> tuple[list[Rows], list[Part]]:
        """The rows that run, by request, and of them the tokens of those before the batch. Raises
        NoSlots, not without ``repair_hits``: then no rows of a prefix hit are among them."""
        rows = list(self.rows)
        page = runner.token_to_kv_pool_allocator.page_size
        traces = []
        for job in self.jobs:
            spare = job.state.spare if repair_hits else None
            most_open = 0 if spare is None else len(spare) // page
            traces.append(
                self.selector.trace(
                    job.plan,
                    budget=job.state.budget,
                    start=job.chunk.start,
                    most_open=most_open,
                )
            )
        parts = [functools.partial(repair.part_of, fb, runner, job) for job in self.jobs]
        layer = probe_layer(len(runner.model.model.layers), self.probe_at)
        follow(traces, parts, fb, runner, forward, layer=layer)
        for job, trace in zip(self.jobs, traces, strict=True):
            rows[job.number] = self.selector.rows(job.plan, trace, job.chunk.start)
        rows = few_enough_of(rows, [job.number for job in self.jobs], runner)
        earlier = []
        for job, make in zip(self.jobs, parts, strict=True):
            before = rows[job.number].clip(0, job.chunk.start)
            if before:
                earlier.append(make(before))
        return rows, earlier


def _ran(job: BatchedRequest) -> Rows:
    """The rows that earlier chunks of the prompt have computed."""
    return job.plan.compute.clip(job.plan.prefix_len, job.chunk.start)


def follow(
    traces: Sequence[Trace],
    parts: Sequence[MakePart],
    fb: "ForwardBatch",
    runner: "ModelRunner",
    forward: Forward,
    *,
    layer: int,
) -> None:
    """Take the traces to their ends. ``parts[i]`` makes the tokens of trace ``i``'s request."""
    while live := [i for i, trace in enumerate(traces) if not trace.done]:
        rows = few_enough([traces[i].rows for i in live], runner)
        check_few(rows, [traces[i] for i in live])
        observer = MassObserver(layer, rows, [traces[i] for i in live])
        view = sub_batch(fb, [parts[i](mine) for i, mine in zip(live, rows, strict=True)], observer)
        with contextlib.suppress(StopForward):
            forward(view)
        for i, mass in zip(live, observer.found(), strict=True):
            traces[i].feed(mass)


def check_few(rows: Sequence[Rows], traces: Sequence[Trace]) -> None:
    """Raise RuntimeError if merging ranges for the backend made many rows out of few: better no
    trace than one that runs most of the prompt."""
    for mine, trace in zip(rows, traces, strict=True):
        wanted = max(trace.rows.num, trace.chosen.num)
        if mine.num > MOST_MERGED * wanted + 256:
            raise RuntimeError(
                f"{wanted} rows became {mine.num} in as many ranges as --max-running-requests"
            )


class MassObserver:
    """Notes the attention of the traces' query rows to each position, and stops the pass."""

    narrows = False

    def __init__(self, layer: int, rows: Sequence[Rows], traces: Sequence[Trace]) -> None:
        self.layer = layer
        self._rows, self._traces = rows, traces
        self._mass: list[torch.Tensor] = []
        self._failed: Exception | None = None

    def observe(self, view: LayerView) -> Stop:
        try:
            base = 0
            for i, (rows, trace) in enumerate(zip(self._rows, self._traces, strict=True)):
                query, at = trace.query, trace.query.places_in(rows)
                here = to_device(torch.from_numpy(base + at), view.q.device)
                where = to_device(torch.from_numpy(query.positions), view.q.device)
                keys = view.keys(i, trace.length)
                self._mass.append(
                    attention_mass(
                        view.q[here], where, keys, scaling=view.scaling, strongest_head=True
                    )
                )
                base += rows.num
        except Exception as error:
            self._failed = error
        return STOP

    def found(self) -> list[np.ndarray]:
        """By trace, fp32 [prompt_len]; waits once for the device. Raises what failed."""
        if self._failed is not None:
            raise self._failed
        cuts = np.cumsum([trace.length for trace in self._traces])[:-1]
        return np.split(torch.cat(self._mass).cpu().numpy(), cuts)
