"""Keep the fuzzy tree in step with SGLang's: inserts, splits and deletions of tree nodes.

A *segment* of the fuzzy tree is text that was inserted at once; SGLang may split its node later.
``NodeSpan`` remembers which nodes hold a segment, ``NodeNote`` on a node points back.
"""

import bisect
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kvshare_sglang.policy.evict import NEW, Frequency
from kvshare_sglang.radix_fuzzy.fingerprints import Tokens
from kvshare_sglang.radix_fuzzy.segments import Segment
from kvshare_sglang.radix_fuzzy.tree import FuzzyTree
from kvshare_sglang.runtime import versions

if TYPE_CHECKING:
    from sglang.srt.mem_cache.radix_cache import TreeNode


class TaggedKey:
    """The ``extra_key`` of inexact KV. Equal only to itself, so no user's key is ever equal."""

    __slots__ = ("context", "depth", "namespace", "start")

    def __init__(self, namespace: object, *, start: int, depth: int, context: int) -> None:
        self.namespace, self.start, self.depth = namespace, start, depth
        self.context = context  # FuzzyTree.context_of what was before


class NodeSpan:
    """The tree nodes that hold one segment: node i starts at path position ``starts[i]``."""

    __slots__ = ("nodes", "starts")

    def __init__(self, start: int, node: "TreeNode") -> None:
        self.starts, self.nodes = [start], [node]

    def split(self, start: int, upper: "TreeNode", *, at: int) -> None:
        """The node at ``start`` became ``upper`` and, from ``at`` on, its lower rest."""
        i = bisect.bisect_left(self.starts, start)
        self.starts.insert(i + 1, at)
        self.nodes.insert(i, upper)

    def drop_last(self) -> None:
        self.starts.pop()
        self.nodes.pop()

    def covering(self, start: int, stop: int) -> Iterator[tuple["TreeNode", int, int]]:
        """``(node, lo, hi)``: offsets in each node's value that hold ``[start, stop)``."""
        i = bisect.bisect_right(self.starts, start) - 1
        while i < len(self.nodes) and self.starts[i] < stop:
            base = self.starts[i]
            size = len(self.nodes[i].key)
            yield self.nodes[i], max(start - base, 0), min(stop - base, size)
            i += 1


@dataclass(slots=True)
class NodeNote:
    """What a tree node carries as ``node.kvshare``: the segment it is part of, the path position
    where it starts, and how often it was used."""

    segment: Segment
    start: int
    frequency: Frequency = NEW


class IndexSync:
    """Tells the fuzzy tree what SGLang's tree does. ``root``: the node that has no text."""

    def __init__(self, fuzzy: FuzzyTree) -> None:
        self.fuzzy = fuzzy

    def added(self, node: "TreeNode", root: "TreeNode") -> None:
        """``node`` is new, at the end of its path."""
        tag = node.key.extra_key
        start = depth = context = 0
        space: object = versions.namespace(node.key)
        if isinstance(tag, TaggedKey):
            start, depth, space, context = tag.start, tag.depth, tag.namespace, tag.context
        parent = None
        if node.parent is not root:
            above = node.parent.kvshare
            parent, start = above.segment.id, above.start + len(node.parent.key)
        segment = self.fuzzy.insert(
            space,
            as_tokens(node.key.token_ids),
            start=start,
            parent=parent,
            depth=depth,
            context=context,
        )
        segment.payload = NodeSpan(start, node)
        node.kvshare = NodeNote(segment, start)

    def split(self, upper: "TreeNode", lower: "TreeNode", at: int) -> None:
        """``upper`` took over the first ``at`` tokens of the node that is ``lower`` now."""
        note = lower.kvshare
        upper.kvshare = NodeNote(note.segment, note.start, note.frequency)
        note.start += at
        note.segment.payload.split(upper.kvshare.start, upper, at=note.start)

    def removed(self, node: "TreeNode") -> None:
        """``node``, a leaf, was evicted."""
        note = node.kvshare
        note.segment.payload.drop_last()
        self.fuzzy.trim(note.segment.id, note.start)

    def check(self, root: "TreeNode") -> None:
        """Restate how the two trees agree; AssertionError on the first that does not hold."""
        self.fuzzy.check()
        seen: set[int] = set()
        total = 0
        stack = list(root.children.values())
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            segment, start = node.kvshare.segment, node.kvshare.start
            total += len(node.key)
            seen.add(segment.id)
            assert segment is self.fuzzy.segment(segment.id)
            held = segment.payload.nodes[segment.payload.starts.index(start)]
            assert held is node
            have = self.fuzzy.path_tokens(segment.id, start, start + len(node.key))
            assert have.tolist() == as_tokens(node.key.token_ids).tolist()
            # Inexact KV is under tagged keys only, and exact KV never is.
            assert (segment.depth > 0) == isinstance(node.key.extra_key, TaggedKey)
        assert total == self.fuzzy.num_tokens
        assert len(seen) == self.fuzzy.num_segments


def as_tokens(token_ids: Any) -> Tokens:
    """SGLang's ``array('q')`` (or any ints) as int32 [n]."""
    if isinstance(token_ids, array) and token_ids.typecode == "q":
        return np.frombuffer(token_ids, dtype=np.int64).astype(np.int32)
    return np.asarray(token_ids, dtype=np.int64).astype(np.int32)
