"""DHD in decode: rows of copied KV that decoding turns to are computed again. Root layer.

Now and then one layer tells how much attention the newest token pays to copied rows. Where much
of it falls on rows that were far off at the check layer, these rows run through the model once
more, between two decode steps, and overwrite their own slots, which no one else reads.
"""

import copy
from typing import Any, NamedTuple

import numpy as np
import torch

from kvshare_sglang import compat
from kvshare_sglang.attend import starts_of
from kvshare_sglang.cache import FuzzyRadixCache, as_tokens
from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.copying import to_device
from kvshare_sglang.kernels.deviation import attention_paid
from kvshare_sglang.policy.refresh import rows_to_refresh
from kvshare_sglang.policy.rows import as_ranges
from kvshare_sglang.request import RequestReuse, reuse_of


class Probe(NamedTuple):
    """Requests of a decode batch, by number in it, whose attention is looked at in ``layer``."""

    layer: int
    requests: list[tuple[int, RequestReuse]]


def before_decode(fb: Any, batch: Any, runner: Any, cache: FuzzyRadixCache) -> None:
    """Decide on a decode batch: ``fb.kvshare_refresh`` is a batch of rows to run before it, and
    ``fb.kvshare_probe`` says whose attention to look at in it; neither is set where nothing is
    stale. Called as the batch is launched, so every request in it still owns its slots."""
    config = cache.config
    if not config.refresh_every:
        return
    due, rows = [], []
    for i, req in enumerate(batch.reqs):
        state = reuse_of(req)
        stale = state.stale if state is not None else None
        if state is None or stale is None:
            continue
        if stale.paid is not None:
            found = _rows(req, state, config)
            if len(found):
                rows.append((i, req, found))
        if state.stale is not None and stale.steps % config.refresh_every == 0:
            due.append((i, state))
        stale.steps += 1
    if rows:
        fb.kvshare_refresh = _extend(fb, runner, rows)
        cache.report.refreshed(requests=len(rows), rows=sum(len(found) for *_, found in rows))
    if due:
        layer = round(config.probe_at * (len(runner.model.model.layers) - 1))
        fb.kvshare_probe = Probe(layer, due)


def _rows(req: Any, state: RequestReuse, config: KVShareConfig) -> np.ndarray:
    """The rows to refresh now; they count as fresh from here on."""
    stale = state.stale
    assert stale is not None
    paid, stale.paid = stale.paid.cpu().numpy(), None
    rows = rows_to_refresh(
        stale.positions, stale.far, paid, above=config.refresh_above, count=config.refresh_rows
    )
    if not len(rows):
        return rows
    # Copies stand behind the exact part, which alone the tree may share with others.
    assert rows[0] >= compat.kv_row(req).cache_protected_len
    left = ~np.isin(stale.positions, rows)
    stale.positions, stale.far = stale.positions[left], stale.far[left]
    state.info["refreshed_tokens"] = state.info.get("refreshed_tokens", 0) + len(rows)
    if not len(stale.positions):
        state.stale = None
    return rows


def _extend(fb: Any, runner: Any, rows: list[tuple[int, Any, np.ndarray]]) -> Any:
    """A prefill batch that computes ``rows`` (number, request, positions) in place."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    device = fb.input_ids.device
    table = runner.req_to_token_pool.req_to_token
    view = copy.copy(fb)
    numbers = to_device(torch.tensor([i for i, _, _ in rows]), device)
    counts = [len(at) for _, _, at in rows]
    stops = [int(at[-1]) + 1 for _, _, at in rows]
    tokens = [_tokens(req)[at] for _, req, at in rows]
    slots = [
        table[compat.kv_row(req).req_pool_idx, to_device(torch.from_numpy(at), device)]
        for _, req, at in rows
    ]
    view.forward_mode = ForwardMode.EXTEND
    view.batch_size = len(rows)
    view.input_ids = to_device(torch.from_numpy(np.concatenate(tokens)), device).to(
        fb.input_ids.dtype
    )
    view.positions = to_device(
        torch.from_numpy(np.concatenate([at for _, _, at in rows])), device
    ).to(fb.positions.dtype)
    view.out_cache_loc = torch.cat(slots).to(fb.out_cache_loc.dtype)
    view.req_pool_indices = fb.req_pool_indices[numbers]
    if getattr(fb, "req_pool_indices_cpu", None) is not None:
        view.req_pool_indices_cpu = fb.req_pool_indices_cpu[[i for i, _, _ in rows]]
    view.seq_lens_cpu = torch.tensor(stops, dtype=torch.int64)
    view.seq_lens = to_device(view.seq_lens_cpu, device).to(fb.seq_lens.dtype)
    view.orig_seq_lens = view.seq_lens
    view.seq_lens_sum = sum(stops)
    view.extend_num_tokens = sum(counts)
    view.extend_seq_lens_cpu = counts
    view.extend_seq_lens = to_device(torch.tensor(counts, dtype=torch.int32), device)
    view.extend_prefix_lens_cpu = [s - n for s, n in zip(stops, counts, strict=True)]
    view.extend_prefix_lens = to_device(
        torch.tensor(view.extend_prefix_lens_cpu, dtype=torch.int32), device
    )
    view.extend_start_loc = starts_of(view.extend_seq_lens)
    view.extend_logprob_start_lens_cpu = counts
    view.return_logprob = False
    view.top_logprobs_nums = view.token_ids_logprobs = None
    view.rids = [req.rid for _, req, _ in rows]
    compat.set_num_tokens(view, sum(counts))
    view.kvshare_rows = [as_ranges(at) for _, _, at in rows]
    view.kvshare_refresh = view.kvshare_probe = None
    return view


def _tokens(req: Any) -> np.ndarray:
    """Prompt and output; a request that was retracted had part of its output as prompt."""
    return np.concatenate([as_tokens(req.origin_input_ids), as_tokens(req.output_ids)])


def look(probe: Probe, q: torch.Tensor, keys: torch.Tensor, table: Any, fb: Any, *, scaling: float
         ) -> None:  # fmt: skip
    """Keep what attention each probed request's newest token pays to its stale rows.

    ``q`` [batch, q_heads, dim] and ``keys`` [slots, kv_heads, dim]: the layer's.
    """
    for i, state in probe.requests:
        if state.stale is None:
            continue
        length = int(fb.seq_lens_cpu[i])
        mine = keys[table[fb.req_pool_indices[i], :length].long()]
        at = torch.full((1,), length - 1, device=q.device)
        paid = attention_paid(q[i : i + 1], at, mine, scaling=scaling)
        state.stale.paid = paid[torch.from_numpy(state.stale.positions).to(q.device)]
