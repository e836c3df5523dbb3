"""DHD in prefill: which rows go on behind the check layer, seen from inside it. Root layer.

Up to the check layer every row of a checked request runs. There copied K and V can be compared
with fresh ones, and the question's attention is known; the layers behind run the rows that the
policy chooses. No model code is touched: attention returns fewer rows than it was given, and two
hooks make the rest of the model follow.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.kernels.deviation import attention_paid, deviation
from kvshare_sglang.policy import rows as policy
from kvshare_sglang.policy.gate import Decline
from kvshare_sglang.policy.refresh import Watch
from kvshare_sglang.policy.rows import replanned
from kvshare_sglang.radix_fuzzy.types import Range, ReusePlan
from kvshare_sglang.report import Report
from kvshare_sglang.request import RequestReuse, turn_exact

logger = logging.getLogger(__name__)


class Job(NamedTuple):
    """A request under check: the ``number``-th of the batch; all of its tokens behind the prefix
    are there, from the batch's row ``base`` on."""

    number: int
    base: int
    state: RequestReuse

    @property
    def plan(self) -> ReusePlan:
        assert self.state.plan is not None
        return self.state.plan


@dataclass
class Pending:
    """A batch on its way to the check layer.

    ``rows``: what runs up to there, by request. ``keys`` and ``values`` [n, kv_heads, dim]: the
    copies of that layer, for the runs of all jobs one after the other.
    """

    layer: int
    jobs: list[Job]
    rows: list[list[Range]]
    keys: torch.Tensor
    values: torch.Tensor
    config: KVShareConfig
    report: Report
    on_done: Callable[[list[list[Range]]], None]
    keep: torch.Tensor | None = None  # of the batch's rows, once chosen


def may_check(state: RequestReuse | None, chunk: Range) -> bool:
    """Whether a request can be checked: its whole rest is in this batch, and there is a choice."""
    if state is None or state.plan is None:
        return False
    plan = state.plan
    return chunk == Range(plan.prefix_len, plan.prompt_len) and 0 < state.budget < 1


def choose(
    pending: Pending,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    keys_of: Callable[[int, int], torch.Tensor],
    scaling: float,
    few_enough: Callable[[list[list[Range]]], list[list[Range]]],
) -> list[list[Range]]:
    """The rows of each request that go on; sets the plans of the jobs to what is then copied.

    ``q`` [rows, q_heads, dim], ``k``, ``v`` [rows, kv_heads, dim]: the layer's, rotated.
    ``keys_of(i, n)``: the layer's K of the first n tokens of request i, fresh ones included.
    ``few_enough`` merges rows into as few stretches as the backend takes.
    Whatever goes wrong, every row goes on: then the request is computed in full.
    """
    rows = list(pending.rows)
    try:
        checks = _look(pending, q, k, v, keys_of, scaling)
        plans = []
        for job, found in zip(pending.jobs, checks, strict=True):
            plan, rows[job.number] = _choose_one(job, found, pending.config)
            plans.append(plan)
        rows = few_enough(rows)
        for job, plan in zip(pending.jobs, plans, strict=True):
            _settle(job.state, replanned(plan, rows[job.number]), pending)
    except Exception:
        logger.exception("KVShare's check failed; the batch goes on with all its rows")
        for job in pending.jobs:
            rows[job.number] = pending.rows[job.number]
            if job.state.plan is not None:  # else it was declined a moment ago
                turn_exact(job.state, Decline.FAULT, pending.report)
    return rows


def _look(
    pending: Pending,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys_of: Callable[[int, int], torch.Tensor],
    scaling: float,
) -> list[policy.Check]:
    """One check for each job; waits once for the device."""
    where = [policy.reused_positions(job.plan) for job in pending.jobs]
    fresh = torch.from_numpy(
        np.concatenate(
            [at + job.base - job.plan.prefix_len for at, job in zip(where, pending.jobs)]  # noqa: B905
        )
    ).to(q.device)
    far_k = deviation(k[fresh], pending.keys)
    far_v = deviation(v[fresh], pending.values)
    paid = []
    for at, job in zip(where, pending.jobs, strict=True):
        asking = policy.asking_rows(job.plan, seam=pending.config.seam)
        first = job.base - job.plan.prefix_len
        weights = attention_paid(
            q[first + asking.start : first + asking.stop],
            torch.arange(*asking, device=q.device),
            keys_of(job.number, job.plan.prompt_len),
            scaling=scaling,
        )
        paid.append(weights[torch.from_numpy(at).to(q.device)])
    table = torch.stack((far_k, far_v, torch.cat(paid))).cpu().numpy()
    cuts = np.cumsum([len(at) for at in where])[:-1]
    parts = np.split(table, cuts, axis=1)
    return [policy.Check(at, *part) for at, part in zip(where, parts, strict=True)]


def _choose_one(
    job: Job, found: policy.Check, config: KVShareConfig
) -> tuple[ReusePlan, list[Range]]:
    """The plan without the runs that are too far off, and the rows of the request that go on."""
    wish = policy.Wish(job.plan, job.state.budget, config.seam, config.window, found)
    wish = policy.without_far_runs(wish, limit=config.tau)
    return wish.plan, policy.compute("dhd", wish)


def _settle(state: RequestReuse, plan: ReusePlan, pending: Pending) -> None:
    """Note what is copied in the end."""
    if not plan.copies:
        turn_exact(state, Decline.DEVIATION, pending.report)
        return
    state.plan = plan
    if pending.config.refresh_every:
        state.watch = Watch.of_plan(plan)


# ---- the model behind the check --------------------------------------------------------------


def follow(layers: Any, backend: Any) -> None:
    """Make a model go on with the rows that attention kept.

    Its decoder layers are called with (positions, hidden states, batch, residual), and norm the
    residual together with what attention returned, as in SGLang's Llama, Qwen2, Qwen3 and Mistral.
    """

    def cut_residual(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        pending = backend.kvshare_check
        if pending is None or pending.keep is None or len(args) < 2:
            return None
        hidden, residual, *rest = args
        if residual is None or len(hidden) == len(residual):
            return None
        return (hidden, residual[pending.keep], *rest)

    def cut_positions(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        pending = backend.kvshare_check
        if pending is None or pending.keep is None:
            return None
        _, hidden, fb, *rest = args
        return (fb.positions, hidden, fb, *rest)

    for layer in layers:
        layer.register_forward_pre_hook(cut_positions)
        layer.post_attention_layernorm.register_forward_pre_hook(cut_residual)
