"""DHD in prefill: which rows go on after the check layer, seen from inside it.

Up to the check layer every row of a checked request runs. There copied K and V can be compared
with fresh ones, and the question's attention is known; the layers after it run the rows that the
selector chooses.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from kvshare_sglang.kernels.ops import attention_mass, deviation
from kvshare_sglang.plan import ReusePlan, Rows
from kvshare_sglang.policy.admit import Decline
from kvshare_sglang.policy.select.base import RowScores, SelectionRequest, query_rows
from kvshare_sglang.policy.select.dhd import Dhd
from kvshare_sglang.runtime.batch import BatchedRequest, LayerView, few_enough_of, to_device

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner

logger = logging.getLogger(__name__)


@dataclass
class DhdObserver:
    """A batch on its way to the check layer.

    ``rows``: what runs up to there, by request. ``keys`` and ``values`` [n, kv_heads, dim]: the
    copies of that layer, for the runs of all jobs one after the other.
    """

    layer: int
    selector: Dhd
    jobs: list[BatchedRequest]
    rows: list[Rows]
    keys: torch.Tensor
    values: torch.Tensor
    suffix: int
    watch: bool
    runner: "ModelRunner"
    on_done: Callable[[Sequence[Rows]], None]
    narrows: bool = True

    def observe(self, view: LayerView) -> list[Rows]:
        """The rows of each request that go on; sets the plans of the jobs to what is copied then.
        Whatever goes wrong, every row continues: then the request is computed in full."""
        rows = list(self.rows)
        try:
            chosen = []
            for job, scores in zip(self.jobs, self._scores(view), strict=True):
                asked = SelectionRequest(job.plan, job.state.budget, scores)
                chosen.append(self.selector.select(asked))
                rows[job.number] = chosen[-1].compute
            rows = few_enough_of(rows, [job.number for job in self.jobs], self.runner)
            # Of the rows as merged for the backend: what ran beside those chosen was not copied.
            plans = [
                plan.recompute(rows[job.number])
                for job, plan in zip(self.jobs, chosen, strict=True)
            ]
        except Exception:
            logger.exception("KVShare's check failed; the batch runs all its rows")
            rows = list(self.rows)
            for job in self.jobs:
                job.state.stop_copying(Decline.FAULT, at=job.chunk.start)
        else:
            self._settle(chosen, plans)
        self.on_done(rows)
        return rows

    def _settle(self, chosen: list[ReusePlan], plans: list[ReusePlan]) -> None:
        for job, before, plan in zip(self.jobs, chosen, plans, strict=True):
            # Without copies before merging all runs were too far off; else merging took the rest.
            reason = Decline.TOO_LITTLE if before.copies else Decline.DEVIATION
            job.state.settle(plan, watch=self.watch, otherwise=reason)

    def _scores(self, view: LayerView) -> list[RowScores]:
        """What the layer shows of each job's reused rows; waits once for the device."""
        assert view.k is not None
        assert view.v is not None
        device = view.q.device
        k = view.k.view(-1, *self.keys.shape[1:])
        v = view.v.view(-1, *self.values.shape[1:])
        where = [job.plan.reused_rows.positions for job in self.jobs]
        places = [
            at + job.base - job.plan.prefix_len for at, job in zip(where, self.jobs, strict=True)
        ]
        fresh = to_device(torch.from_numpy(np.concatenate(places)), device)
        far_k = deviation(k[fresh], self.keys)
        far_v = deviation(v[fresh], self.values)
        mass = []
        for at, job in zip(where, self.jobs, strict=True):
            (query,) = query_rows(job.plan, suffix=self.suffix).ranges
            first = job.base - job.plan.prefix_len
            weights = attention_mass(
                view.q[first + query.start : first + query.stop],
                torch.arange(*query, device=device),
                view.keys(job.number, job.plan.prompt_len),
                scaling=view.scaling,
            )
            mass.append(weights[to_device(torch.from_numpy(at), device)])
        table = torch.stack((far_k, far_v, torch.cat(mass))).cpu().numpy()
        parts = np.split(table, np.cumsum([len(at) for at in where])[:-1], axis=1)
        return [RowScores(at, *part) for at, part in zip(where, parts, strict=True)]
