"""What a server would do with a prompt, worked out in this process: rows, and their FLOPs.

The mirror holds what a server's cache holds after it served some prompts *exactly* and evicted
nothing. It asks the plug-in's own pure planner, so its rows are those that the server must run.
"""

import bisect
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.policy.gate import pays
from kvshare_sglang.radix_fuzzy.fingerprints import Tokens
from kvshare_sglang.radix_fuzzy.reuse import plan_reuse, thin_out
from kvshare_sglang.radix_fuzzy.segments import common_prefix
from kvshare_sglang.radix_fuzzy.tree import FuzzyTree
from kvshare_sglang.radix_fuzzy.types import Range, ReusePlan, Run, clip

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
        """All that the matcher finds behind the exact prefix."""
        return self.tree.match(
            _NAMESPACE,
            tokens,
            start=self.prefix_len(tokens),
            max_depth=config.source_depth,
            tolerance=config.edit_tolerance,
        )

    def wish(self, tokens: Tokens, config: KVShareConfig) -> ReusePlan:
        """What could be reused, whether or not it pays: runs too short to copy are out already."""
        return plan_reuse(
            self.match(tokens, config),
            prompt_len=len(tokens),
            prefix_len=self.prefix_len(tokens),
            budget=config.budget,
            seam=config.seam,
            window=config.window,
        )

    def plan(self, tokens: Tokens, config: KVShareConfig) -> ReusePlan:
        """What the server copies and computes; a plan without copies where it declines."""
        plan = self.wish(tokens, config)
        if pays(plan, config) is None:
            return plan
        everything = (Range(plan.prefix_len, plan.prompt_len),)
        return plan._replace(runs=(), copies=(), compute=everything)

    def _longest_prefix(self, tokens: Tokens) -> tuple[int, _Stored | None]:
        best: tuple[int, _Stored | None] = (0, None)
        for stored in self._stored:
            length = common_prefix(stored.tokens, tokens)
            if length > best[0]:
                best = length, stored
        return best


def row_positions(plan: ReusePlan, *, chunk: int, max_rows: int | None = None) -> np.ndarray:
    """Positions of the rows that run, ascending. Each chunk of a prefill runs its last token.

    ``max_rows`` is the number of contiguous stretches that the attention backend takes, if any.
    """
    rows: list[np.ndarray] = []
    for start in range(plan.prefix_len, plan.prompt_len, chunk):
        stop = min(start + chunk, plan.prompt_len)
        ranges = clip(plan.compute, start=start, stop=stop)
        if not ranges or ranges[-1].stop < stop:
            ranges.append(Range(stop - 1, stop))
        if max_rows is not None:
            (ranges,) = thin_out([ranges], limit=max_rows)
        rows += [np.arange(*r) for r in ranges]
    return np.concatenate(rows)


def prefill_flops(config: dict[str, Any], positions: Sequence[int] | np.ndarray) -> float:
    """FLOPs of a dense Llama's prefill of the rows at ``positions``; logits for the last alone."""
    layer = [layer_flops(config, positions)] * config["num_hidden_layers"]
    return sum(layer) + 2.0 * config["hidden_size"] * config["vocab_size"]


def layer_flops(config: dict[str, Any], positions: Sequence[int] | np.ndarray) -> float:
    """FLOPs of one layer for the rows at ``positions``."""
    hidden, heads, kv_heads, head_dim = _shape(config)
    at = np.asarray(positions, float)
    attention_weights = hidden * head_dim * (2 * heads + 2 * kv_heads)
    mlp_weights = 3 * hidden * config["intermediate_size"]
    linear = 2.0 * (attention_weights + mlp_weights) * len(at)
    attention = 4.0 * heads * head_dim * float((at + 1).sum())
    return linear + attention


def checked_flops(
    config: dict[str, Any], by_layer: Sequence[np.ndarray], *, checked: int, at_layer: int
) -> float:
    """FLOPs of a prefill whose rows differ by layer; ``checked`` rows were projected to Q, K and V
    in layer ``at_layer``."""
    hidden, heads, kv_heads, head_dim = _shape(config)
    extra = max(0, checked - len(by_layer[at_layer]))
    qkv = 2.0 * extra * hidden * head_dim * (heads + 2 * kv_heads)
    layers = sum(layer_flops(config, rows) for rows in by_layer)
    return layers + qkv + 2.0 * hidden * config["vocab_size"]


def peeked_flops(config: dict[str, Any], rows: np.ndarray, *, at_layer: int) -> float:
    """FLOPs of a pass of ``rows`` up to their Q, K and V in layer ``at_layer``."""
    hidden, heads, kv_heads, head_dim = _shape(config)
    qkv = 2.0 * len(rows) * hidden * head_dim * (heads + 2 * kv_heads)
    return at_layer * layer_flops(config, rows) + qkv


def _shape(config: dict[str, Any]) -> tuple[int, int, int, int]:
    """Hidden size, query heads, KV heads and the size of a head."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    return hidden, heads, kv_heads, config.get("head_dim") or hidden // heads
