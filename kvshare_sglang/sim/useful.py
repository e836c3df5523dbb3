"""What of the found text is worth a copy, by structure; one definition for every matcher. Pure.

A run costs its head, as the structural selector says: the window after an edit, or the seam where
other text was before it. Of the rest, stretches that a plan would not copy are dropped.
"""

from collections.abc import Sequence

from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.plan import Run
from kvshare_sglang.policy.select.base import MERGE_GAP, MIN_COPY
from kvshare_sglang.policy.select.window import Window

_CONFIG = KVShareConfig()
HEADS = Window(_CONFIG.seam, _CONFIG.window)
LEAST = max(MIN_COPY, MERGE_GAP + 1)


def useful(runs: Sequence[Run], *, stop: int, heads: Window = HEADS) -> list[Run]:
    """The useful part of each run that has one, up to prompt position ``stop``.

    ``runs`` ascend and are disjoint. O(len(runs)).

    >>> from kvshare_sglang.plan import Join
    >>> useful([Run(1, 0, 10, 60), Run(1, 80, 71, 70, join=Join.EDIT)], stop=1000)[1].dst_start
    103
    """
    out: list[Run] = []
    for run in runs:
        start, end = run.dst_start + heads.head(run), min(run.dst_stop, stop)
        if end - start >= LEAST:
            out.append(run.cut(start, end))
    return out
