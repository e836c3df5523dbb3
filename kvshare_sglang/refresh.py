"""DHD in decode: copied rows that decoding turns to are computed again. Root layer.

A decode step of a watched request is looked at in the layer that traces look at. If a head of the
newest token reads a copied row, the step ends there; that row, and what it rests on in turn, runs
through the model in a small pass that overwrites slots which no one else reads; then the step
runs again. Where such passes change nothing, the watch ends.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kvshare_sglang import attend, compat
from kvshare_sglang.cache import FuzzyRadixCache, as_tokens
from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.copying import to_device
from kvshare_sglang.kernels.deviation import attention_paid, deviation
from kvshare_sglang.policy.refresh import Watch
from kvshare_sglang.policy.rows import as_ranges
from kvshare_sglang.policy.trace import Trace, probe_layer
from kvshare_sglang.report import Report
from kvshare_sglang.request import reuse_of
from kvshare_sglang.tracing import Enough, check_few, follow

logger = logging.getLogger(__name__)


@dataclass
class Pending:
    """A decode batch in which some requests, by number in it, are watched."""

    layer: int
    watched: list[tuple[int, Any]]  # requests of SGLang's
    config: KVShareConfig
    report: Report


def before_decode(fb: Any, batch: Any, runner: Any, cache: FuzzyRadixCache) -> None:
    """Say whom to watch in a decode batch. Called as it is launched, so that every request in it
    still owns its slots."""
    config = cache.config
    if not config.refresh_every or (attend.on_cpu(runner) and runner.decode_cuda_graph_runner):
        return  # a compiled step of SGLang's CPU graphs can't be looked at
    watched = []
    for i, req in enumerate(batch.reqs):
        state = reuse_of(req)
        if state is None or state.watch is None:
            continue
        if state.watch.over:
            state.watch = None
        elif state.watch.due():
            watched.append((i, req))
    if watched:
        layer = probe_layer(len(runner.model.model.layers), config.probe_at)
        fb.kvshare_refresh = Pending(layer, watched, config, cache.report)


def run(pending: Pending, fb: Any, runner: Any, forward: Callable[[Any], Any]) -> Any:
    """Run the decode batch through ``forward``, once more if rows were refreshed for it."""
    wanted: list[tuple[int, Any, np.ndarray]] = []

    def see(
        q: torch.Tensor, keys: Callable[[int, int], torch.Tensor], _: Any, scaling: float
    ) -> None:
        try:
            for i, req in pending.watched:
                length = int(fb.seq_lens_cpu[i])
                at = torch.full((1,), length - 1, device=q.device)
                paid = attention_paid(
                    q[i : i + 1], at, keys(i, length), scaling=scaling, strongest_head=True
                )
                found = paid[: len(req.kvshare.watch.open)].cpu().numpy()
                if req.kvshare.watch.wants(found, above=pending.config.refresh_above):
                    wanted.append((i, req, found))
        except Exception:
            logger.exception("KVShare could not look at a decode step; it watches no longer")
            wanted.clear()
            for _, req in pending.watched:
                req.kvshare.watch = None
        if wanted:
            raise Enough

    fb.kvshare_look = attend.Look(pending.layer, see)
    try:
        return forward(fb)
    except Enough:
        pass
    fb.kvshare_look = None
    wanted = [one for one in wanted if _owns_its_copies(one[1])]
    try:
        if wanted:
            _refresh(pending, wanted, fb, runner, forward)
    except Exception:
        # Rows that were written by then are no worse than those that were copied.
        logger.exception("KVShare's refresh failed; decoding goes on without")
        for _, req, _ in wanted:
            req.kvshare.watch = None
    return forward(fb)


def _refresh(
    pending: Pending,
    wanted: list[tuple[int, Any, np.ndarray]],
    fb: Any,
    runner: Any,
    forward: Callable[[Any], Any],
) -> None:
    config = pending.config
    values = runner.token_to_kv_pool.get_value_buffer(pending.layer)
    table = runner.req_to_token_pool.req_to_token
    none = np.empty(0, np.int64)
    makers: list[Callable[[np.ndarray], attend.Part]] = []
    traces, old = [], []
    for i, req, paid in wanted:
        watch: Watch = req.kvshare.watch
        row = compat.kv_row(req)
        tokens = _tokens(req)

        def part(
            at: np.ndarray, i: int = i, tokens: np.ndarray = tokens, own: int = row.req_pool_idx
        ) -> attend.Part:
            ids = to_device(torch.from_numpy(tokens[at]), fb.input_ids.device)
            slots = table[own, to_device(torch.from_numpy(at), fb.input_ids.device)]
            return attend.Part(i, at, ids.to(fb.input_ids.dtype), slots.to(fb.out_cache_loc.dtype))

        makers.append(part)
        trace = Trace(watch.open, rows=none, asking=none, count=config.refresh_rows)
        trace.feed(paid)
        traces.append(trace)
        old.append(values[table[row.req_pool_idx, : len(watch.open)].long()])
    follow(traces, makers, fb, runner, forward, layer=pending.layer)
    rows = attend.few_enough([as_ranges(trace.chosen) for trace in traces], runner)
    flat = [np.concatenate([np.arange(*r) for r in ranges]) for ranges in rows]
    check_few(flat, traces)
    forward(attend.part_of(fb, [make(at) for make, at in zip(makers, flat, strict=True)]))
    for (_, req, _), at, before in zip(wanted, flat, old, strict=True):
        here = to_device(torch.from_numpy(at), values.device)
        now = values[table[compat.kv_row(req).req_pool_idx, here].long()]
        far = float(deviation(now, before[here]).mean())
        state = req.kvshare
        state.watch.refreshed(
            at, far=far, pause=config.refresh_every, unchanged=config.refresh_unchanged
        )
        state.info["refreshed_tokens"] = state.info.get("refreshed_tokens", 0) + len(at)
    pending.report.refreshed(requests=len(wanted), rows=sum(map(len, flat)))


def _owns_its_copies(req: Any) -> bool:
    """Whether all rows that a refresh may write stand behind the exact part, which alone the tree
    may share with others. Always so; if not, the watch ends and nothing is written."""
    first = int(np.flatnonzero(req.kvshare.watch.open)[0])
    shared = compat.kv_row(req).cache_protected_len
    if first >= shared:
        return True
    logger.error(
        "KVShare watches row %d, which is shared: all before %d are; it watches no longer",
        first, shared,
    )  # fmt: skip
    req.kvshare.watch = None
    return False


def _tokens(req: Any) -> np.ndarray:
    """Prompt and output; a request that was retracted had part of its output as prompt."""
    return np.concatenate([as_tokens(req.origin_input_ids), as_tokens(req.output_ids)])
