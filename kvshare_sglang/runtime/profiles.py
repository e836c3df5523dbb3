"""What cached rows attended to when they were computed, by KV slot: see ``dependence.py``.

Noted in one layer of every prefill, behind its attention, which stays what it is. A copy keeps what
its source has, for the source may be gone when a prompt's last chunk asks. Rows of answers have
none. On CPUs only: for a GPU there is no kernel yet.
"""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.kernels import row_scores
from kvshare_sglang.plan import ReusePlan
from kvshare_sglang.policy.select.attention_trace import probe_layer
from kvshare_sglang.policy.select.dependence import EDGES, outside
from kvshare_sglang.runtime.batch import on_cpu

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.model_runner import ModelRunner

logger = logging.getLogger(__name__)


class Profiles:
    """Of one server: ``[slots, EDGES]`` in fp16, 38 bytes a token; NaN where nothing is known."""

    def __init__(self, slots: int, layer: int) -> None:
        self.layer = layer
        self._by_slot = np.full((slots, len(EDGES)), np.nan, np.float16)
        self._edges = torch.tensor(EDGES)

    def forget(self, slots: torch.Tensor) -> None:
        """Other rows are written to these slots."""
        self._by_slot[slots.numpy()] = np.nan

    def copy(self, src: torch.Tensor, dst: torch.Tensor) -> None:
        self._by_slot[dst.numpy()] = self._by_slot[src.numpy()]

    def of(self, slots: torch.Tensor) -> np.ndarray:
        """fp32 [n, EDGES]"""
        return self._by_slot[slots.numpy()].astype(np.float32)

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
            self._by_slot[slots[mine].numpy()] = found.numpy()
            base += len(at)

    def give_up(self) -> None:
        """After a fault, in whose handler it is called: nothing is known, and nothing noted."""
        logger.exception("KVShare could not note what rows attend to; it goes on without")
        self.layer = -1
        self._by_slot[:] = np.nan

    def prior(self, plan: ReusePlan, slots: torch.Tensor) -> np.ndarray | None:
        """How much the prompt's copied rows are likely to be off; ``slots`` [prompt_len]."""
        return outside(plan, self.of(slots))


def of_server(runner: "ModelRunner", config: KVShareConfig) -> Profiles | None:
    """What a server keeps, if it is to and can. Once the model is known to be served."""
    if not config.depends_at:
        return None
    if not on_cpu(runner):
        logger.warning("KVShare: --kvshare-depends-at is served on CPUs only; nothing is kept")
        return None
    layers = runner.model.model.layers
    layer = probe_layer(len(layers), config.depends_at)
    slots = len(runner.token_to_kv_pool.get_key_buffer(layers[layer].self_attn.attn.layer_id))
    return Profiles(slots, layer)


def of_runner(runner: Any) -> Profiles | None:
    found: Profiles | None = runner.attn_backend.kvshare.profiles
    return found
