"""A file of requests, one after another: what reuse of those before does to each."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import psutil

from kvshare_sglang.bench.common import ScriptError
from kvshare_sglang.bench.text.arms import Arm, compared
from kvshare_sglang.bench.text.chat import Texts, truth
from kvshare_sglang.sim.engine import KV, Lab, Model

WRITTEN = 48  # tokens of an answer


def check_memory(model: Model, many: list[np.ndarray]) -> None:
    """Raise ScriptError unless KV of all prompts fits in half of the memory that is free."""
    of_a_token = model.room(1)
    need = sum(part.nbytes for part in of_a_token) * sum(len(ids) + WRITTEN for ids in many)
    free = psutil.virtual_memory().available
    if need > free / 2:
        raise ScriptError(
            f"KV of {len(many)} prompts takes {need / 1e9:.1f} GB, more than half of the"
            f" {free / 1e9:.1f} GB that are free: lower --n"
        )


class Played:
    """Requests in order of arrival over one cache, in which each leaves what full prefill makes of
    it."""

    def __init__(self, model: Model, words: Texts, lab: Lab, arms: dict[str, Arm]) -> None:
        self._model, self._words, self._lab, self._arms = model, words, lab, arms
        self._kv: KV | None = None

    def arriving(self, many: list[np.ndarray]) -> Iterator[np.ndarray]:
        """Each request; the one before is in the cache by then, also where nobody measured it."""
        for ids in many:
            yield ids
            # what its rows attended to is known only where it is computed for that
            self._lab.add(ids, None if self._lab.config.depends_at else self._kv)
            self._kv = None

    def row(self, ids: np.ndarray, *, seed: int = 0) -> dict[str, Any]:
        true = truth(self._model, self._words, ids, None, written=WRITTEN)
        row = compared(self._lab, self._words, true, self._lab.plan(ids), self._arms, seed=seed)
        self._kv = true.kv
        return row
