"""What a server would do with a prompt, worked out in this process: its plan and its rows. Pure.

The mirror holds what a server's cache holds after it served some prompts *exactly* and evicted
nothing. It asks the server's own selectors and admission, so its rows are those that the server
must run.
"""

import bisect
from typing import NamedTuple

import numpy as np

from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.plan import ReusePlan, Rows, Run, merge_ranges
from kvshare_sglang.policy.admit import pays
from kvshare_sglang.policy.select.base import Selector
from kvshare_sglang.policy.select.window import Window
from kvshare_sglang.radix_fuzzy.fingerprints import Tokens
from kvshare_sglang.radix_fuzzy.segments import common_prefix
from kvshare_sglang.radix_fuzzy.tree import FuzzyTree

_NAMESPACE = (None, None)


class _Stored(NamedTuple):
    """A prompt and the segments of its path: segment ``ids[i]`` starts at ``starts[i]``."""

    tokens: Tokens
    starts: list[int]
    ids: list[int]


class Mirror:
    """A cache without limits that was given prompts in order."""

    def __init__(self) -> None:
        self.tree = FuzzyTree()
        self._stored: list[_Stored] = []
        self._owners: dict[int, int] = {}

    def add(self, tokens: Tokens) -> None:
        """Store what exact serving of a prompt stores. O(prompts stored + len(tokens))."""
        shared, source = self._longest_prefix(tokens)
        starts: list[int] = []
        ids: list[int] = []
        if source is not None and shared:
            upto = bisect.bisect_left(source.starts, shared)
            starts, ids = source.starts[:upto], source.ids[:upto]
        if shared < len(tokens):
            parent = ids[-1] if ids else None
            segment = self.tree.insert(_NAMESPACE, tokens[shared:], start=shared, parent=parent)
            starts, ids = [*starts, shared], [*ids, segment.id]
            self._owners[segment.id] = len(self._stored)
        self._stored.append(_Stored(tokens, starts, ids))

    def prefix_len(self, tokens: Tokens) -> int:
        """Tokens of the prompt that SGLang alone reuses: never the last one."""
        return min(self._longest_prefix(tokens)[0], len(tokens) - 1)

    def prefix_owner(self, tokens: Tokens) -> int:
        """Number of the first stored prompt with the longest prefix of this one."""
        _, stored = self._longest_prefix(tokens)
        return next(i for i, one in enumerate(self._stored) if one is stored)

    def owner(self, run: Run) -> int:
        """Number of the stored prompt of whose path the run is a part."""
        return self._owners[run.source]

    def match(self, tokens: Tokens, config: KVShareConfig) -> tuple[Run, ...]:
        """All that the matcher finds after the exact prefix."""
        return self.tree.match(
            _NAMESPACE,
            tokens,
            start=self.prefix_len(tokens),
            max_depth=config.source_depth,
            tolerance=config.edit_tolerance,
        )

    def proposal(
        self, tokens: Tokens, config: KVShareConfig, selector: Selector | None = None
    ) -> ReusePlan:
        """What ``selector`` (by default the structural one) would reuse, whether or not it pays."""
        selector = selector or Window(config.seam, config.window)
        return selector.plan(
            self.match(tokens, config),
            prompt_len=len(tokens),
            prefix_len=self.prefix_len(tokens),
            budget=config.budget,
        )

    def plan(
        self, tokens: Tokens, config: KVShareConfig, selector: Selector | None = None
    ) -> ReusePlan:
        """What the server reuses; a plan without copies where it declines."""
        selector = selector or Window(config.seam, config.window)
        plan = self.proposal(tokens, config, selector)
        if pays(plan, config, rows=selector.most_rows(plan, budget=config.budget)) is None:
            return plan
        return ReusePlan(plan.prompt_len, plan.prefix_len, (), ())

    def _longest_prefix(self, tokens: Tokens) -> tuple[int, _Stored | None]:
        best: tuple[int, _Stored | None] = (0, None)
        for stored in self._stored:
            length = common_prefix(stored.tokens, tokens)
            if length > best[0]:
                best = length, stored
        return best


def row_positions(plan: ReusePlan, *, chunk: int, max_rows: int | None = None) -> np.ndarray:
    """Positions of the rows that run, ascending. Each chunk of a prefill runs its last token.

    ``max_rows`` is the number of contiguous ranges that the attention backend takes, if any.
    """
    out: list[np.ndarray] = []
    for start in range(plan.prefix_len, plan.prompt_len, chunk):
        stop = min(start + chunk, plan.prompt_len)
        rows = plan.compute.clip(start, stop) | Rows([(stop - 1, stop)])
        if max_rows is not None:
            (rows,) = merge_ranges([rows], limit=max_rows)
        out.append(rows.positions)
    return np.concatenate(out)
