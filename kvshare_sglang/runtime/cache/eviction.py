"""Evict first what was used least, with age: the counts that SGLang's tree nodes carry."""

from typing import TYPE_CHECKING

from sglang.srt.mem_cache.evict_policy import EvictionStrategy

from kvshare_sglang.policy.evict import COPY, gone_on, rank, touched

if TYPE_CHECKING:
    from sglang.srt.mem_cache.radix_cache import TreeNode


class Usage:
    """Counts uses of nodes. ``fills``: tokens taken in, in units of the pool's size."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self.fills = 0.0

    def took_in(self, tokens: int) -> None:
        self.fills += tokens / self._capacity

    def touch(self, node: "TreeNode", amount: float) -> None:
        """``amount`` in [0, 1]: the share of the node that was used."""
        note = node.kvshare
        note.frequency = touched(note.frequency, amount, now=self.fills)

    def go_on(self, node: "TreeNode") -> None:
        """The conversation whose own it is has its next turn."""
        note = node.kvshare
        copied = note.segment is None
        note.frequency = gone_on(note.frequency, now=self.fills, copied=copied)

    def touch_path(self, node: "TreeNode", root: "TreeNode") -> None:
        """The path to ``node`` serves a request as its exact prefix. One that goes on from the end
        of a leaf is the next turn of a conversation, and what no other text hangs on is its own."""
        own = not node.children
        while node is not root:
            own = own and len(node.children) <= 1
            if own:
                self.go_on(node)
            else:
                self.touch(node, 1.0)
            node = node.parent


class ByFrequency(EvictionStrategy):
    """SGLang evicts the leaf of smallest priority: ties go to what was used longest ago. What is
    no source, the copies of blended branches, counts for less: it can be copied again."""

    def __init__(self, usage: Usage) -> None:
        self._usage = usage

    def get_priority(self, node: "TreeNode") -> tuple[int, float]:
        note = node.kvshare
        less = COPY if note.segment is None else 0
        return rank(note.frequency, now=self._usage.fills, less=less), node.last_access_time
