"""What cached rows attended to when they were computed, by KV slot: see ``dependence.py``.

Noted in one layer of every prefill, behind its attention, which stays what it is. A copy keeps what
its source has, for the source may be gone when a prompt's last chunk asks. Rows of answers have
none. Where a kernel attends, all of it stays on the device, and the host waits for nothing.
"""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.kernels import ops, row_scores
from kvshare_sglang.plan import ReusePlan
from kvshare_sglang.policy.select.attention_trace import probe_layer
from kvshare_sglang.policy.select.dependence import EDGES, limits_of, outside
from kvshare_sglang.runtime.batch import on_cpu, together

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.model_runner import ModelRunner

logger = logging.getLogger(__name__)


class Profiles:
    """Of one server: ``[slots, EDGES]`` in fp16, 38 bytes a token; NaN where nothing is known."""

    def __init__(self, slots: int, layer: int, how: ops.Attention | None, device: Any) -> None:
        """``how``: the kernel that notes them, None: torch, on a CPU."""
        self.layer, self.how = layer, how
        self._by_slot = torch.full(
            (slots, len(EDGES)), torch.nan, dtype=torch.float16, device=device
        )
        self._edges = torch.tensor(EDGES, dtype=torch.int32, device=device)

    def forget(self, slots: torch.Tensor) -> None:
        """Other rows are written to these slots."""
        self._by_slot.index_fill_(0, slots.long(), torch.nan)

    def copy(self, src: torch.Tensor, dst: torch.Tensor) -> None:
        self._by_slot.index_copy_(0, dst.long(), self._by_slot.index_select(0, src.long()))

    def of(self, slots: torch.Tensor) -> torch.Tensor:
        """fp32 [n, EDGES]"""
        return self._by_slot.index_select(0, slots.long()).float()

    def note(
        self, q: torch.Tensor, layer: "RadixAttention", slots: torch.Tensor,
        rows: Sequence[tuple[torch.Tensor, torch.Tensor]],
    ) -> None:  # fmt: skip
        """What a batch's rows attend to: ``q`` [rows, heads * dim], ``slots`` [rows]; by request
        its positions [n] and the keys up to the last of them."""
        q = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        base = 0
        for at, keys in rows:
            mine = slice(base, base + len(at))
            how: dict[str, Any] = {"scaling": layer.scaling}
            found = row_scores.attention_profile(q[mine], at, keys, self._edges, **how)
            self._by_slot.index_copy_(0, slots[mine].long(), found.half())
            base += len(at)

    def note_paged(
        self, q: torch.Tensor, layer: "RadixAttention", slots: torch.Tensor,
        rows: Sequence[tuple[int, int]], positions: torch.Tensor, owners: torch.Tensor,
        keys: torch.Tensor, table: torch.Tensor,
    ) -> None:  # fmt: skip
        """The same by the kernel. By request how many ``rows`` it has, and before which position;
        a batch that is padded has more tokens than rows. See ``ops.Attention.plan``."""
        assert self.how is not None
        num = sum(count for count, _ in rows)
        q = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)[:num]
        found = self.how.profile(
            rows, positions[:num], owners, q, keys, table, self._edges, scaling=layer.scaling
        )
        self._by_slot.index_copy_(0, slots[:num].long(), found.half())

    def give_up(self) -> None:
        """After a fault, in whose handler it is called: nothing is known, and nothing noted."""
        logger.exception("KVShare could not note what rows attend to; it goes on without")
        self.layer = -1
        self._by_slot.fill_(torch.nan)

    def prior(self, plan: ReusePlan, slots: torch.Tensor) -> Any:
        """How much the prompt's copied rows are likely to be off, None where nothing is known;
        ``slots`` [prompt_len]. An array; a tensor on the device where the kernel attends."""
        if self.layer < 0 or not plan.runs:
            return None
        if self.how is None:
            return outside(plan, self.of(slots).numpy())
        return outside_on_device(plan, self.of(slots))


def outside_on_device(plan: ReusePlan, profiles: torch.Tensor) -> torch.Tensor:
    """As ``dependence.outside`` of a plan with runs, fp64 [prompt_len] on the device of
    ``profiles`` [prompt_len, EDGES]. Where nothing is known of any row, which the host can't see,
    all count alike: 1."""
    limits = limits_of(plan)
    bounds = np.zeros((len(limits), max(map(len, limits))), np.int64)  # before 0 there is nothing
    for row, some in zip(bounds, limits, strict=True):
        row[: len(some)] = some
    lengths = [run.length for run in plan.runs]
    dst = np.concatenate([np.arange(run.dst_start, run.dst_stop) for run in plan.runs])
    hosts = [
        dst,
        dst - np.repeat([run.shift for run in plan.runs], lengths),
        np.repeat(np.arange(len(limits)), lengths),
        bounds,
        np.array([0.5, *EDGES[1:]]),
    ]
    there = together([torch.from_numpy(one).flatten() for one in hosts], profiles.device)
    new, at, number, flat, edges = there
    far = (at[:, None] + 1 - flat.view(bounds.shape)[number]).double().clamp_min(0.5)
    low = (torch.searchsorted(edges, far, right=True) - 1).clamp(0, len(EDGES) - 2)
    start, end = edges[low], torch.minimum(edges[low + 1], at[:, None] + 1.0)
    part = (far / start).log2() / (torch.maximum(end, start * (1 + 1e-9)) / start).log2()
    mine = profiles[new].double()
    near, following = mine.gather(1, low), mine.gather(1, low + 1)
    given = near + part.clamp(0, 1) * (following - near)
    given = torch.where(far > at[:, None], 0.0, given)
    given[:, 2::2] *= -1  # what went to a range is what went before its end, but not its beginning
    away = given.sum(1).clamp_min(0)
    known = ~away.isnan()
    mean = torch.where(known, away, 0.0).sum() / known.sum().clamp_min(1)
    mean = torch.where(known.any(), mean, 1.0)
    found = mean.repeat(plan.prompt_len)
    found[new] = torch.where(known, away, mean)
    return found


def on_host(prior: Any) -> np.ndarray | None:
    """A prior as an array; the host waits for it where it is on the device."""
    return prior.cpu().numpy() if isinstance(prior, torch.Tensor) else prior


def of_server(runner: "ModelRunner", config: KVShareConfig) -> Profiles | None:
    """What a server keeps, if it is to and can. Once the model is known to be served, and what
    attends for it."""
    if not config.depends_at:
        return None
    how = runner.attn_backend.kvshare.how
    how = how if isinstance(how, ops.Attention) and how.profile_shape is not None else None
    if how is None and not on_cpu(runner):
        logger.warning("KVShare: no kernel notes what rows attend to here; nothing is kept")
        return None
    layers = runner.model.model.layers
    layer = probe_layer(len(layers), config.depends_at)
    attn, pool = layers[layer].self_attn.attn, runner.token_to_kv_pool
    keys = pool.get_key_buffer(attn.layer_id)
    found = Profiles(len(keys), layer, how, runner.device)
    if how is not None:
        try:  # compile, so that no request waits for it; the slot that batches are padded with
            device, table = runner.device, runner.req_to_token_pool.req_to_token
            zero = torch.zeros(1, dtype=torch.int64, device=device)
            width = attn.tp_q_head_num * attn.qk_head_dim
            q = torch.zeros(1, width, dtype=runner.dtype, device=device)
            found.note_paged(q, attn, zero, [(1, 1)], zero, zero, keys, table)
            found.forget(zero)
        except Exception:
            logger.exception("KVShare's kernel of what rows attend to does not run here")
            return None
    return found


def of_runner(runner: Any) -> Profiles | None:
    found: Profiles | None = runner.attn_backend.kvshare.profiles
    return found
