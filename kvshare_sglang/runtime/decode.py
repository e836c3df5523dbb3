"""DHD in decode: copied rows that decoding turns to are computed again.

A decode step of a watched request is observed in the layer that traces look at. If a head of the
newest token reads a copied row, the step ends there; that row, and what it rests on in turn, runs
through the model in a small pass that overwrites slots which no one else reads; then the step
runs again. Where such passes change nothing, the watch ends.
"""

import functools
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.kernels.ops import attention_mass, deviation
from kvshare_sglang.plan import Rows
from kvshare_sglang.policy.select.attention_trace import Trace, probe_layer
from kvshare_sglang.runtime import versions
from kvshare_sglang.runtime.attention_trace import Forward, MakePart, check_few, follow
from kvshare_sglang.runtime.batch import (
    STOP,
    Answering,
    BatchReuse,
    LayerView,
    Stop,
    StopForward,
    few_enough,
    on_cpu,
    part_of_row,
    sub_batch,
    to_device,
)
from kvshare_sglang.runtime.cache.index_sync import tokens_so_far
from kvshare_sglang.runtime.cache.radix import FuzzyRadixCache
from kvshare_sglang.runtime.report import Report
from kvshare_sglang.runtime.request import reuse_of

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

logger = logging.getLogger(__name__)


def watch(
    fb: "ForwardBatch", batch: "ScheduleBatch", runner: "ModelRunner", cache: FuzzyRadixCache
) -> BatchReuse | None:
    """Say whom to watch in a decode batch. Called as it is launched, so that every request in it
    still owns its slots."""
    config = cache.config
    if not config.refresh_every or (on_cpu(runner) and runner.decode_cuda_graph_runner):
        return None  # a compiled step of SGLang's CPU graphs can't be observed
    watched = []
    for i, req in enumerate(batch.reqs):
        state = reuse_of(req)
        if state is None or state.watch is None:
            continue
        if state.watch.over:
            state.watch = None
        elif state.watch.tick():
            watched.append(Answering(i, int(fb.seq_lens_cpu[i]), req, state))
    if not watched:
        return None
    layer = probe_layer(len(runner.model.model.layers), config.probe_at)
    stage = RefreshStage(layer, watched, config, cache.report)
    return BatchReuse(observer=ReadObserver(layer, watched, config.refresh_above), stage=stage)


class ReadObserver:
    """Notes which watched requests read copied rows, and stops the step if any does."""

    narrows = False

    def __init__(self, layer: int, watched: list[Answering], above: float) -> None:
        self.layer = layer
        self.wanted: list[tuple[Answering, np.ndarray]] = []
        self._watched, self._above = watched, above

    def observe(self, view: LayerView) -> Stop | None:
        try:
            for one in self._watched:
                i, watch = one.number, one.state.watch
                assert watch is not None
                at = torch.full((1,), one.length - 1, device=view.q.device)
                mass = attention_mass(
                    view.q[i : i + 1],
                    at,
                    view.keys(i, one.length),
                    scaling=view.scaling,
                    strongest_head=True,
                )
                found = mass[: len(watch.open)].cpu().numpy()
                if watch.wants(found, above=self._above):
                    self.wanted.append((one, found))
        except Exception:
            logger.exception("KVShare could not look at a decode step; it watches no longer")
            self.wanted.clear()
            for one in self._watched:
                one.state.watch = None
        return STOP if self.wanted else None


@dataclass
class RefreshStage:
    """A decode batch in which some requests are watched."""

    layer: int
    watched: list[Answering]
    config: KVShareConfig
    report: Report

    def run(self, fb: "ForwardBatch", runner: "ModelRunner", forward: Forward) -> Any:
        """Run the decode batch through ``forward``, once more if rows were refreshed for it."""
        observer: ReadObserver = fb.kvshare.observer
        try:
            return forward(fb)
        except StopForward:
            pass
        fb.kvshare = None
        wanted = [(one, mass) for one, mass in observer.wanted if _owns_its_copies(one)]
        try:
            if wanted:
                self._refresh(wanted, fb, runner, forward)
        except Exception:
            # Rows that were written by then are no worse than those that were copied.
            logger.exception("KVShare's refresh failed; decoding continues without")
            for one, _ in wanted:
                one.state.watch = None
        return forward(fb)

    def _refresh(
        self,
        wanted: list[tuple[Answering, np.ndarray]],
        fb: "ForwardBatch",
        runner: "ModelRunner",
        forward: Forward,
    ) -> None:
        config = self.config
        values = runner.token_to_kv_pool.get_value_buffer(self.layer)
        table = runner.req_to_token_pool.req_to_token
        parts: list[MakePart] = []
        traces, old = [], []
        for one, mass in wanted:
            watch = one.state.watch
            assert watch is not None
            row = versions.kv_row(one.req).req_pool_idx
            tokens = tokens_so_far(one.req)
            parts.append(
                functools.partial(part_of_row, fb, one.number, tokens=tokens, table=table[row])
            )
            trace = Trace(watch.open, rows=Rows(), query=Rows(), count=config.refresh_rows)
            trace.feed(mass)
            traces.append(trace)
            old.append(values[table[row, : len(watch.open)].long()])
        follow(traces, parts, fb, runner, forward, layer=self.layer)
        rows = few_enough([trace.chosen for trace in traces], runner)
        check_few(rows, traces)
        made = [make(mine) for make, mine in zip(parts, rows, strict=True)]
        forward(sub_batch(fb, made, None))
        for (one, _), mine, before in zip(wanted, rows, old, strict=True):
            watch = one.state.watch
            assert watch is not None
            here = to_device(torch.from_numpy(mine.positions), values.device)
            now = values[table[versions.kv_row(one.req).req_pool_idx, here].long()]
            far = float(deviation(now, before[here]).mean())
            watch.refreshed(
                mine.positions,
                far=far,
                pause=config.refresh_every,
                unchanged=config.refresh_unchanged,
            )
            one.state.refreshed(mine)
        self.report.refreshed(requests=len(wanted), rows=sum(mine.num for mine in rows))


def _owns_its_copies(one: Answering) -> bool:
    """Whether all rows that a refresh may write are after the exact part, which alone the tree
    may share with others. Always so; if not, the watch ends and nothing is written."""
    assert one.state.watch is not None
    first = int(np.flatnonzero(one.state.watch.open)[0])
    shared = versions.kv_row(one.req).cache_protected_len
    if first >= shared:
        return True
    logger.error(
        "KVShare watches row %d, which is shared: all before %d are; it watches no longer",
        first, shared,
    )  # fmt: skip
    one.state.watch = None
    return False
