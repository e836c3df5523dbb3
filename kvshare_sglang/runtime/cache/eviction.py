"""Evict first what was used least, with age: the counts that SGLang's tree nodes carry."""

import itertools
from typing import TYPE_CHECKING

from sglang.srt.mem_cache.evict_policy import EvictionStrategy

from kvshare_sglang.policy.evict import COPY, gone_on, rank, touched

if TYPE_CHECKING:
    from sglang.srt.mem_cache.radix_cache import TreeNode


MANY = 16  # children of a node that no conversation alone has
MOST_PIECES = 64  # of an answer that is looked at; a longer one counts as another text
OPENING = 4  # tokens at the end of a prompt that may be missing from it in the next turn


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

    def rank(self, node: "TreeNode") -> int:
        """What has the smallest goes first. What is no source, the copies of blended branches,
        counts for less: it can be copied again."""
        note = node.kvshare
        return rank(note.frequency, now=self.fills, less=COPY if note.segment is None else 0)

    def touch_path(self, node: "TreeNode", root: "TreeNode", *, new: int) -> None:
        """The path to ``node`` serves a request as its exact prefix; ``new`` tokens follow."""
        own = is_next_turn(node, new=new)
        while node is not root:
            own = own and self.is_own(node)
            if own:
                self.go_on(node)
            else:
                self.touch(node, 1.0)
            node = node.parent

    def is_own(self, node: "TreeNode") -> bool:
        """Whether what a conversation goes on from is its own: nothing else hangs on it, and
        nothing else did lately, or it would rank above text that was never used."""
        return _num_others(node, most=1) <= 1 and self.rank(node) <= 0


def is_next_turn(node: "TreeNode", *, new: int) -> bool:
    """Whether ``new`` tokens behind a node are the next turn of a conversation: nothing goes on
    from there but one answer, or several. Clients leave a model's thoughts out of what they send
    with the next turn, so that it parts where the answer began. Next to no new text is the same
    prompt again."""
    return new > OPENING and _num_others(node, most=0) == 0


def _num_others(node: "TreeNode", *, most: int) -> int:
    """Texts that go on from a node, without what single requests answered. Counted until there are
    more than ``most``; of many children all count, for a shared text may have thousands."""
    if len(node.children) > MANY:
        return len(node.children)
    others = (child for child in node.children.values() if not _is_answer(child))
    return sum(1 for _ in itertools.islice(others, most + 1))


def _is_answer(node: "TreeNode") -> bool:
    """Whether there is nothing here but what one request answered, in a branch in several pieces,
    and the last words of its prompt: templates open the thoughts there."""
    answers_from = node.kvshare.answers_from
    if node.kvshare.start + OPENING < answers_from:
        return False
    for _ in range(MOST_PIECES):
        if not node.children:
            return True
        if len(node.children) > 1:
            return False
        (node,) = node.children.values()
        if node.kvshare.answers_from != answers_from:
            return False
    return False


class ByFrequency(EvictionStrategy):
    """SGLang evicts the leaf of smallest priority: ties go to what was used longest ago."""

    def __init__(self, usage: Usage) -> None:
        self._usage = usage

    def get_priority(self, node: "TreeNode") -> tuple[int, float]:
        return self._usage.rank(node), node.last_access_time
