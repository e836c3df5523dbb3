"""Keep the fuzzy tree in step with SGLang's: inserts, splits and deletions of tree nodes.

A *segment* of the fuzzy tree is text that was inserted at once; SGLang may split its node later.
``NodeSpan`` remembers which nodes hold a segment, ``NodeNote`` on a node points back.
"""

import bisect
import contextlib
import dataclasses
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kvshare_sglang.policy.evict import NEW, Frequency
from kvshare_sglang.radix_fuzzy.fingerprints import Tokens
from kvshare_sglang.radix_fuzzy.segments import Segment
from kvshare_sglang.radix_fuzzy.tree import FuzzyTree
from kvshare_sglang.runtime import versions
from kvshare_sglang.wire import name_of

if TYPE_CHECKING:
    from sglang.srt.mem_cache.radix_cache import TreeNode


class BranchKey:
    """The ``extra_key`` of blended KV of one namespace, made by the weights of its time. Equal only
    to itself, so no user's key is ever equal. ``num_nodes``: how many tree nodes carry it."""

    __slots__ = ("namespace", "num_nodes")

    def __init__(self, namespace: object) -> None:
        self.namespace, self.num_nodes = namespace, 0


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
    """What a tree node carries as ``node.kvshare``: the path position where it starts, the segment
    it is part of (None where it is no source), and how often it was used. In a blended branch also
    ``open`` [len], its rows that are copies, and ``depth``, of text computed after it.
    ``pins``: how many finished turns keep it. ``passed``: of a copy, how often a source behind it
    is held. ``answers_from``: position where the prompt of the request that left it ended, in whole
    pages."""

    segment: Segment | None
    start: int
    frequency: Frequency = NEW
    open: npt.NDArray[np.bool_] | None = None
    depth: int = 0
    pins: int = 0
    passed: int = 0
    answers_from: int = 0


NOBODYS = -1  # weights that no request runs by


def named(namespace: Any) -> tuple[str | None, ...]:
    """Key and salt as routers know them, whose hashes of text must be the same; short, where what
    clients say may be megabytes."""
    return tuple(None if name is None else name_of(str(name)) for name in namespace)


class IndexSync:
    """Tells the fuzzy tree what SGLang's tree does. ``weights``: how often they were replaced;
    nothing that others made is a source."""

    def __init__(self, fuzzy: FuzzyTree) -> None:
        self.fuzzy = fuzzy
        self.weights = self._made_by = self._answers_from = 0

    def new_weights(self) -> None:
        self.weights += 1
        self._made_by = self.weights

    @contextlib.contextmanager
    def made_by(self, weights: int, *, answers_from: int) -> Iterator[None]:
        """What is added meanwhile was made by these weights: a request may outlive its own. Its
        prompt ends at ``answers_from``."""
        self._made_by, self._answers_from = weights, answers_from
        try:
            yield
        finally:
            self._made_by = self.weights

    def space_of(self, namespace: object) -> object:
        """Where a request looks: the fuzzy tree's namespace is its own, and the weights."""
        return named(namespace), self.weights

    def added(self, node: "TreeNode", root: "TreeNode") -> None:
        """``node``, of exact KV, is new, at the end of its path."""
        space = named(versions.namespace(node.key)), self._made_by
        parent, start = None, 0
        if node.parent is not root:
            above = node.parent.kvshare
            start = above.start + len(node.parent.key)
            if above.segment.namespace == space:  # else other weights made it
                parent = above.segment.id
        segment = self.fuzzy.insert(
            space, as_tokens(node.key.token_ids), start=start, parent=parent
        )
        segment.payload = NodeSpan(start, node)
        node.kvshare = NodeNote(segment, start, answers_from=self._answers_from)

    def added_blended(
        self,
        node: "TreeNode",
        *,
        space: object,
        start: int,
        depth: int,
        open_rows: npt.NDArray[np.bool_],
        source_depth: int | None,
        before: Tokens,
    ) -> None:
        """``node`` of a blended branch is new. A source (with a depth) that goes on right after
        another one is of the same path; ``before``: all tokens before it. They may reach into the
        node's first page, of which other text is no source."""
        node.key.extra_key.num_nodes += 1
        node.kvshare = NodeNote(
            None, start, open=open_rows, depth=depth, answers_from=self._answers_from
        )
        if source_depth is None:
            return
        space = self.space_of(space)
        above = node.parent.kvshare.segment if start else None
        goes_on = above is not None and (above.namespace, above.depth) == (space, source_depth)
        goes_on = goes_on and len(before) == start
        segment = self.fuzzy.insert(
            space,
            as_tokens(node.key.token_ids)[len(before) - start :],
            start=len(before),
            parent=above.id if above is not None and goes_on else None,
            depth=source_depth,
            before=before,
        )
        segment.payload = NodeSpan(start, node)
        node.kvshare.segment = segment

    def split(self, upper: "TreeNode", lower: "TreeNode", at: int) -> None:
        """``upper`` took over the first ``at`` tokens of the node that is ``lower`` now."""
        note = lower.kvshare
        upper.kvshare = dataclasses.replace(note)
        note.start += at
        if note.open is not None:
            upper.kvshare.open, note.open = note.open[:at].copy(), note.open[at:].copy()
            lower.key.extra_key.num_nodes += 1
        if note.segment is not None:
            note.segment.payload.split(upper.kvshare.start, upper, at=note.start)

    def removed(self, node: "TreeNode") -> None:
        """``node``, which has no children any more, was evicted."""
        note = node.kvshare
        if note.segment is not None:
            note.segment.payload.drop_last()
            self.fuzzy.trim(note.segment.id, max(note.start, note.segment.start))

    def check(self, root: "TreeNode", *, page: int) -> None:
        """Restate how the two trees agree; AssertionError on the first that does not hold."""
        self.fuzzy.check()
        seen: set[int] = set()
        total = 0
        stack = list(root.children.values())
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            segment, start = node.kvshare.segment, node.kvshare.start
            blended = isinstance(node.key.extra_key, BranchKey)
            if blended:
                assert len(node.kvshare.open) == len(node.key) == len(node.value)
            else:
                # Exact KV hangs on exact KV only.
                assert not isinstance(node.parent.key.extra_key, BranchKey)
            if segment is None:
                assert blended
                continue
            first = max(start, segment.start)  # in the node's first page
            assert first - start < page
            total += start + len(node.key) - first
            seen.add(segment.id)
            assert segment is self.fuzzy.segment(segment.id)
            held = segment.payload.nodes[segment.payload.starts.index(start)]
            assert held is node
            have = self.fuzzy.path_tokens(segment.id, first, start + len(node.key))
            assert have.tolist() == as_tokens(node.key.token_ids)[first - start :].tolist()
            assert (segment.depth > 0) == blended
        assert total == self.fuzzy.num_tokens
        assert len(seen) == self.fuzzy.num_segments


def tokens_so_far(req: Any) -> Tokens:
    """Prompt and answer, as far as the host knows them, int32 [n]; a request that was retracted had
    part of its answer as prompt."""
    return np.concatenate([as_tokens(req.origin_input_ids), as_tokens(req.output_ids)])


def as_tokens(token_ids: Any) -> Tokens:
    """SGLang's ``array('q')`` (or any ints) as int32 [n]."""
    if isinstance(token_ids, array) and token_ids.typecode == "q":
        return np.frombuffer(token_ids, dtype=np.int64).astype(np.int32)
    return np.asarray(token_ids, dtype=np.int64).astype(np.int32)
