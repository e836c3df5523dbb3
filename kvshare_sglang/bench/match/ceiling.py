"""What there is to find: every span of earlier prompts, and what of it is worth a copy. Pure."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from kvshare_sglang.plan import Rows, Run
from kvshare_sglang.radix_fuzzy.fingerprints import SPAN, Tokens
from kvshare_sglang.radix_fuzzy.index import Bools
from kvshare_sglang.sim.life import Served
from kvshare_sglang.sim.useful import useful


def ceiling(
    prompts: Sequence[Tokens], spaces: Sequence[object], *, span: int = SPAN
) -> list[Bools]:
    """Which tokens of each prompt lie in a span of so many tokens seen in an earlier one. Exact.

    Grams get numbers by doubling: equal numbers of two halves make equal numbers of the whole, so
    no hash can collide; the halves overlap where ``span`` is no power of two. O(n log n) for all
    prompts together.
    """
    numbers = {space: i for i, space in enumerate(dict.fromkeys(spaces))}
    owner = np.repeat(np.arange(len(prompts)), [len(p) for p in prompts])
    space = np.array([numbers[s] for s in spaces], np.int64)[owner]
    ids = np.concatenate(prompts).astype(np.int64) + (space << 32)
    size = 1
    while size < span:
        ids = np.unique(ids, return_inverse=True)[1].astype(np.int64)
        step = min(size, span - size)
        ids = (ids[:-step] << 32) + ids[step:]
        size += step
    numbered = np.unique(ids, return_inverse=True)[1]
    whole = owner[: len(ids)] == owner[span - 1 :]  # not over the border of two prompts
    first = np.full(numbered.max(initial=0) + 1, len(prompts))
    np.minimum.at(first, numbered[whole], owner[: len(ids)][whole])
    seen = whole & (first[numbered] < owner[: len(ids)])
    edges = np.zeros(len(owner) + 1, np.int64)
    edges[: len(seen)] += seen
    edges[span : span + len(seen)] -= seen
    covered = np.cumsum(edges)[:-1] > 0
    return np.split(covered, np.cumsum([len(p) for p in prompts])[:-1])


def ceiling_row(served: Sequence[Served], covered: Sequence[Bools]) -> dict[str, Any]:
    """What there is to find after the prefix. A stretch counts as one run, so that its useful
    share is more than any matcher can have."""
    runs = [_stretches(c, s.prefix_len) for c, s in zip(covered, served, strict=True)]
    total = sum(len(c) for c in covered)
    worth = sum(
        r.length for one, c in zip(runs, covered, strict=True) for r in useful(one, stop=len(c) - 1)
    )
    beyond = sum(r.length for one in runs for r in one)
    nothing = dict.fromkeys(
        ("lookup_ms_p50", "lookup_ms_p99", "insert_ms_p50", "bytes_per_token"), None
    )
    return {
        "prefix_share": sum(s.prefix_len for s in served) / total,
        "beyond_share": beyond / total,
        "useful_share": worth / total,
        "saved_share": (sum(s.prefix_len for s in served) + worth) / total,
        "share_of_ceiling": 1.0 if beyond else None,
        "runs_mean": float(np.mean([len(one) for one in runs])),
        "edits_mean": 0.0,
        **nothing,
    }


def _stretches(mask: Bools, start: int) -> list[Run]:
    ranges = Rows.where(mask).clip(start, len(mask)).ranges
    return [Run(0, 0, at.start, at.num) for at in ranges]
