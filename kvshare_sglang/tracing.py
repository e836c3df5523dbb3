"""Follow attention from the question back to the copied rows that its answer rests on. Root layer.

Each step is a small pass of a few rows through the lower layers, over the KV that was copied; it
ends at the layer whose attention tells the next step. Then the batch runs, with the rows that the
steps came by among those that are computed again.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kvshare_sglang import attend
from kvshare_sglang.check import Job
from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.copying import to_device
from kvshare_sglang.kernels.deviation import attention_paid
from kvshare_sglang.policy.gate import Decline
from kvshare_sglang.policy.refresh import Watch
from kvshare_sglang.policy.rows import as_ranges, must_run, replanned
from kvshare_sglang.policy.trace import Trace
from kvshare_sglang.report import Report
from kvshare_sglang.request import turn_exact

logger = logging.getLogger(__name__)


MOST_MERGED = 4  # times as many rows as wanted, once stretches are merged


class Enough(Exception):
    """Ends a pass at the layer that it was for."""


@dataclass
class Pending:
    """A batch whose last choice of rows waits for the trace; ``rows`` is what it has till then."""

    layer: int
    jobs: list[Job]
    rows: attend.Rows
    config: KVShareConfig
    report: Report
    on_done: Callable[[attend.Rows], None]


def run(pending: Pending, fb: Any, runner: Any, forward: Callable[[Any], Any]) -> None:
    """Trace the jobs by small passes through ``forward``, then cut the batch down to the rows
    that are left to run. Whatever goes wrong, every row runs."""
    rows = list(pending.rows)
    config = pending.config

    def part(job: Job, at: np.ndarray) -> attend.Part:
        here = to_device(torch.from_numpy(at - job.plan.prefix_len + job.base), fb.input_ids.device)
        return attend.Part(job.number, at, fb.input_ids[here], fb.out_cache_loc[here])

    try:
        traces = [
            Trace.of_plan(job.plan, budget=job.state.budget, seam=config.seam)
            for job in pending.jobs
        ]
        parts = [functools.partial(part, job) for job in pending.jobs]
        follow(traces, parts, fb, runner, forward, layer=pending.layer)
        for job, trace in zip(pending.jobs, traces, strict=True):
            must = must_run(job.plan, suffix=config.seam)
            rows[job.number] = as_ranges(np.union1d(must, trace.chosen))
        rows = attend.few_enough(rows, runner)
    except Exception:
        logger.exception("KVShare's trace failed; the batch runs all its rows")
        rows = list(pending.rows)
        for job in pending.jobs:
            turn_exact(job.state, Decline.FAULT, pending.report)
    else:
        # Of the rows as merged for the backend: what ran beside those chosen was not copied.
        for job in pending.jobs:
            job.state.plan = replanned(job.plan, rows[job.number])
            if config.refresh_every:
                job.state.watch = Watch.of_plan(job.state.plan)
    pending.on_done(rows)
    if rows != pending.rows:
        attend.cut_tokens(fb, pending.rows, rows, runner)
    fb.kvshare_rows = rows


def follow(
    traces: list[Trace],
    parts: Sequence[Callable[[np.ndarray], attend.Part]],
    fb: Any,
    runner: Any,
    forward: Callable[[Any], Any],
    *,
    layer: int,
) -> None:
    """Take the traces to their ends. ``parts[i]`` makes the tokens of trace ``i``'s request."""
    while live := [i for i, trace in enumerate(traces) if not trace.done]:
        thin = attend.few_enough([as_ranges(traces[i].rows) for i in live], runner)
        rows = [np.concatenate([np.arange(*r) for r in ranges]) for ranges in thin]
        check_few(rows, [traces[i] for i in live])
        view = attend.part_of(fb, [parts[i](at) for i, at in zip(live, rows, strict=True)])
        asking = [np.isin(at, traces[i].asking) for i, at in zip(live, rows, strict=True)]
        ends = [traces[i].length for i in live]
        found = look(view, rows, asking, ends, forward, layer=layer)
        for i, paid in zip(live, found, strict=True):
            traces[i].feed(paid)


def check_few(rows: list[np.ndarray], traces: list[Trace]) -> None:
    """Raise RuntimeError if merging stretches for the backend made many rows out of few: better
    no trace than one that runs most of the prompt."""
    for at, trace in zip(rows, traces, strict=True):
        wanted = max(len(trace.rows), len(trace.chosen))
        if len(at) > MOST_MERGED * wanted + 256:
            raise RuntimeError(
                f"{wanted} rows became {len(at)} in as many stretches as --max-running-requests"
            )


def look(
    view: Any,
    rows: list[np.ndarray],
    asking: list[np.ndarray],
    ends: list[int],
    forward: Callable[[Any], Any],
    *,
    layer: int,
) -> list[np.ndarray]:
    """What rows of a batch pay to the first ``ends[i]`` positions of their request, at ``layer``;
    the pass ends there. ``asking[i]`` [rows of request i] says which of its rows count."""
    paid: list[torch.Tensor] = []

    def see(
        q: torch.Tensor, keys: Callable[[int, int], torch.Tensor], _: Any, scaling: float
    ) -> None:
        base = 0
        for i, (at, mine) in enumerate(zip(rows, asking, strict=True)):
            here = to_device(torch.from_numpy(base + np.flatnonzero(mine)), q.device)
            where = to_device(torch.from_numpy(at[mine]), q.device)
            paid.append(
                attention_paid(q[here], where, keys(i, ends[i]), scaling=scaling,
                               strongest_head=True)
            )  # fmt: skip
            base += len(at)
        raise Enough

    view.kvshare_look = attend.Look(layer, see)
    with contextlib.suppress(Enough):
        forward(view)
    return np.split(torch.cat(paid).cpu().numpy(), np.cumsum(ends)[:-1])
