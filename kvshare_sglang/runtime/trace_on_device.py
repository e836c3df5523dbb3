"""A trace whose choices stay on the device: the host waits for nothing until the batch is launched.

How many rows a step takes follows from counts alone, the budget and the candidates; only which rows
depends on attention. So tokens, slots and positions are gathered on the device, and the passes and
the batch follow each other without a gap. The rows come back once the batch is on its way.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import max_pool1d

from kvshare_sglang.plan import Rows
from kvshare_sglang.policy.select.attention_trace import Trace
from kvshare_sglang.policy.select.dependence import LEAST
from kvshare_sglang.runtime import attention, versions
from kvshare_sglang.runtime.batch import (
    BatchedRequest,
    DeviceRows,
    Part,
    together,
)
from kvshare_sglang.runtime.probe import Asking, Recorded, attention_of

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner


def serves(
    traces: Sequence[Trace],
    jobs: Sequence[BatchedRequest],
    rows: Sequence[Rows],
    runner: "ModelRunner",
) -> bool:
    """Whether the traces can run so: our kernel attends, which needs no row on the host; all
    candidates are in the batch, and none of them is shared, for how many of those are taken is in
    the data; and all rows fit a chunk."""
    if not attention.has_kernel(runner):
        return False
    total = sum(one.num for one in rows)
    for trace, job in zip(traces, jobs, strict=True):
        if trace.takes_shared or trace.first_candidate < job.chunk.start:
            return False
        if trace.rows and trace.rows.start < job.chunk.start:
            return False
        total += trace.most_chosen + trace.rows.num - rows[job.number].num
    chunk = versions.chunk_size()
    return chunk is None or total <= chunk


class DeviceTrace:
    """As ``Trace``, step by step; ties go to the same rows."""

    def __init__(self, trace: Trace, must: Rows, device: Any) -> None:
        """``must``: rows that run in any case."""
        self.length = trace.length
        hosts = [
            trace.candidates.copy(),
            (must | trace.chosen).positions,
            trace.rows.positions,
            trace.query.places_in(trace.rows),
            trace.query.positions,
        ]
        there = together([torch.from_numpy(one) for one in hosts], device)
        self._open, kept, rows, places, query = there
        self._num_open = trace.num_candidates
        self._left, self._shares = trace.left, list(trace.shares)
        self._stretch = trace.stretch
        self._prior = None if trace.prior is None else torch.as_tensor(trace.prior, device=device)
        self._kept = [kept]
        self.ran = 0
        self.rows = DeviceRows(trace.rows.num, trace.length, rows)
        self.asking = Asking(places, query, self.length)

    @property
    def done(self) -> bool:
        return not self._shares or self._left <= 0 or self._num_open <= 0

    def feed(self, mass: torch.Tensor) -> None:
        """``mass`` fp32 [length]: attention of the query rows to each position."""
        count = math.ceil(self._left * (self._shares[0] / sum(self._shares)))
        count = min(count, self._num_open)
        self._shares.pop(0)
        # Attention is never negative.
        order = torch.sort(mass.masked_fill(~self._open, -1.0), descending=True, stable=True)
        at = order.indices
        width = 2 * self._stretch
        if width or self._prior is not None:  # like ones in the order of their own mass
            wide = mass.masked_fill(~self._open, 0.0)
            if width:  # as ``spread``
                wide = max_pool1d(wide[None], width + 1, stride=1, padding=width // 2)[0]
            if self._prior is not None:  # as ``Trace.feed``
                wide = self._prior * (wide + LEAST).sqrt()
            wide = wide.masked_fill(~self._open, -1.0)[at]
            at = at[torch.sort(wide, descending=True, stable=True).indices]
        at = at[:count].sort().values
        self._open.index_fill_(0, at, False)
        self._kept.append(at)
        self._left -= count
        self._num_open -= count
        self.ran += self.rows.num
        self.rows = DeviceRows(count, self.length, at)
        self.asking = Asking(torch.arange(count, device=at.device), at, self.length)

    def chosen(self) -> DeviceRows:
        """All that runs, in order of position."""
        at = torch.cat(self._kept).sort().values
        return DeviceRows(len(at), self.length, at)


def follow(
    traces: Sequence[DeviceTrace],
    jobs: Sequence[BatchedRequest],
    fb: "ForwardBatch",
    forward: Callable[[Any], Any],
    *,
    layer: int,
    recorded: Recorded | None,
) -> None:
    """Take the traces to their ends."""
    while live := [i for i, trace in enumerate(traces) if not trace.done]:
        parts = [_part(fb, jobs[i], traces[i].rows) for i in live]
        asking = [traces[i].asking for i in live]
        found = attention_of(fb, parts, asking, forward, layer=layer, recorded=recorded)
        for i, mass in zip(live, found, strict=True):
            traces[i].feed(mass)


def _part(fb: "ForwardBatch", job: BatchedRequest, rows: DeviceRows) -> Part:
    places = places_of(job, rows)
    return Part(job.number, rows, fb.input_ids[places], fb.out_cache_loc[places])


def places_of(job: BatchedRequest, rows: DeviceRows) -> torch.Tensor:
    """Where rows of a request are among the batch's tokens, of which it has its whole chunk."""
    return rows.at + (job.base - job.chunk.start)


class OnTheirWay:
    """Rows that are being copied to the host, meanwhile whatever is launched next runs."""

    def __init__(self, rows: Sequence[DeviceRows]) -> None:
        self._counts = [one.num for one in rows]
        at = torch.cat([one.at for one in rows])
        self._event = None
        if at.device.type == "cpu":
            self._host = at
            return
        self._host = torch.empty(len(at), dtype=at.dtype, pin_memory=True)
        self._host.copy_(at, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    def wait(self) -> list[Rows]:
        if self._event is not None:
            self._event.synchronize()
        return [Rows.at(part.numpy()) for part in self._host.split(self._counts)]
