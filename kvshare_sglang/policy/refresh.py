"""Whether a request that decodes is watched, and when its copied rows are refreshed. Pure."""

from dataclasses import dataclass

import numpy as np

from kvshare_sglang.radix_fuzzy.types import ReusePlan

IDLE = 3  # refreshes in a row that changed nothing end the watch


@dataclass(slots=True)
class Watch:
    """Copied rows of a request that decodes.

    ``open`` [prompt_len]: rows that were copied and not refreshed. ``wait``: output tokens until
    the next look. ``idle``: refreshes in a row after which the rows were what they had been.
    """

    open: np.ndarray
    wait: int = 0
    idle: int = 0

    @classmethod
    def of_plan(cls, plan: ReusePlan) -> "Watch":
        """What the plan copies, no more: a row that ran for any reason is as good as it gets, and
        one before the first copy is shared with the tree, where nothing may be written."""
        copied = np.zeros(plan.prompt_len, bool)
        for run in plan.copies:
            copied[run.dst_start : run.dst_stop] = True
        return cls(copied)

    @property
    def over(self) -> bool:
        """Nothing is stale, as far as can be told."""
        return self.idle >= IDLE or not self.open.any()

    def due(self) -> bool:
        """Whether to look in this step; counts the step."""
        self.wait = max(0, self.wait - 1)
        return self.wait == 0

    def wants(self, paid: np.ndarray, *, above: float) -> bool:
        """Whether the newest token reads a copied row: ``paid`` [prompt_len] is the weight that
        its strongest head gives to each position."""
        return bool((paid[self.open] > above).any())

    def refreshed(self, rows: np.ndarray, *, far: float, pause: int, unchanged: float) -> None:
        """``rows`` ran again, and their values moved by ``far`` on average."""
        self.open[rows] = False
        self.idle = self.idle + 1 if far <= unchanged else 0
        self.wait = pause
