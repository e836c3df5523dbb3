"""SGLang's radix tree without a server: token paths, the matcher that follows them, eviction. Pure.

Every node is a piece of the segment that one insertion made. The tree tells its matcher of each
segment and of each trim, and keeps a log of what it told.
"""

import bisect
import heapq
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from kvshare_sglang.plan import Run
from kvshare_sglang.policy import evict
from kvshare_sglang.radix_fuzzy.fingerprints import Tokens
from kvshare_sglang.radix_fuzzy.segments import common_prefix
from kvshare_sglang.sim.matcher import Matcher, Text


class Node:
    """A node of the radix tree: path positions ``[start, stop)`` of one segment."""

    __slots__ = (
        "children",
        "depth",
        "frequency",
        "key",
        "last_access",
        "parent",
        "segment",
        "serial",
        "start",
        "stop",
    )

    count = itertools.count()

    def __init__(self, start: int, stop: int, *, parent: "Node | None", now: int) -> None:
        self.serial = next(Node.count)  # breaks ties: runs must repeat
        self.start, self.stop, self.parent = start, stop, parent
        self.children: dict[object, Node] = {}
        self.key: object = None  # under which the parent holds it
        self.segment: Segment = None  # type: ignore[assignment]  # the root has none
        self.last_access = now
        self.frequency = evict.NEW
        self.depth = 0

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def tokens(self) -> Tokens:
        seg = self.segment
        return seg.path[self.start - seg.root : self.stop - seg.root]


class Segment:
    """What one insertion added, and the nodes it was split into since."""

    __slots__ = ("nodes", "parent", "path", "root", "starts")

    def __init__(self, path: Tokens, root: int, parent: "Segment | None", node: Node) -> None:
        self.path, self.root, self.parent = path, root, parent
        self.starts, self.nodes = [node.start], [node]


# What is evicted first has the smallest score; fills count tokens taken in, in capacities.
Policy = Callable[[Node, float], Any]


def lru(node: Node, fills: float) -> int:
    """SGLang's default."""
    return node.last_access


def by_frequency(node: Node, fills: float) -> tuple[int, int]:
    """The plug-in's own."""
    return evict.rank(node.frequency, now=fills), node.last_access


class RadixTree:
    """A tree of at most ``capacity`` tokens (None: without limit). ``now`` is the number of the
    request that is served; ``told_s`` and ``taken_in`` add up until they are set back."""

    def __init__(self, matcher: Matcher, *, capacity: int | None, policy: Policy) -> None:
        self.matcher, self.capacity, self.policy = matcher, capacity, policy
        self.now = 0
        self.resident = 0  # tokens
        self.fills = 0.0
        self.told_s = 0.0  # time of the matcher's calls
        self.taken_in = 0  # tokens
        self.log: list[tuple[str, tuple[Any, ...]]] = []
        self.segments: dict[int, Segment] = {}
        self._roots: dict[object, Node] = {}
        self._tags = Node(0, 0, parent=None, now=0)
        self._ids: dict[Segment, int] = {}
        self._leaves: set[Node] = set()

    @property
    def tags(self) -> Node:
        """Over all that is stored apart from the plain branches."""
        return self._tags

    def id_of(self, node: Node) -> int:
        """The matcher's number of the segment that a node is a piece of."""
        return self._ids[node.segment]

    def walk(self, space: object, tokens: Tokens) -> tuple[Node, int]:
        """As ``_walk``, and counts as a use of all on the way, but for what only a conversation has
        that goes on."""
        node, at = self._walk(space, tokens)
        self._touch_path(node)
        return node, at

    def _walk(self, space: object, tokens: Tokens) -> tuple[Node, int]:
        """The node at which the longest cached prefix ends, and its length. May split a node."""
        if space not in self._roots:
            self._roots[space] = Node(0, 0, parent=None, now=self.now)
        node, at = self._roots[space], 0
        while at < len(tokens) and (child := node.children.get(int(tokens[at]))) is not None:
            size = common_prefix(child.tokens, tokens[at:])
            at += size
            node = child
            if size < len(child):
                node = self._split(child, child.start + size)
                break
        return node, at

    def _touch_path(self, node: Node) -> None:
        """As the plug-in does, ``runtime.cache.eviction``."""
        own, at = not node.children, node
        while at.parent is not None:
            own = own and self.is_own(at)
            self.touch(at, 0.0 if own else 1.0)
            at = at.parent

    def is_own(self, node: Node) -> bool:
        """Whether nothing else hangs on what a conversation goes on from, nor did lately."""
        return len(node.children) <= 1 and evict.rank(node.frequency, now=self.fills) <= 0

    def prefix_len(self, space: object, tokens: Tokens) -> int:
        """The length of the longest cached prefix. Changes nothing."""
        node, at = self._roots.get(space), 0
        while node is not None and at < len(tokens):
            node = node.children.get(int(tokens[at]))
            if node is not None:
                size = common_prefix(node.tokens, tokens[at:])
                at += size
                if size < len(node):
                    break
        return at

    def touch(self, node: Node, amount: float) -> None:
        """``amount`` in [0, 1]: the share of the node that was used."""
        node.last_access = self.now
        node.frequency = evict.touched(node.frequency, amount, now=self.fills)

    def _split(self, node: Node, at: int) -> Node:
        """Cut a node in two; the upper one."""
        assert node.parent is not None
        upper = Node(node.start, at, parent=node.parent, now=self.now)
        upper.segment, upper.key, upper.depth = node.segment, node.key, node.depth
        upper.frequency = node.frequency
        node.parent.children[upper.key] = upper
        seg = node.segment
        i = bisect.bisect_left(seg.starts, node.start)
        seg.starts.insert(i + 1, at)
        seg.nodes.insert(i, upper)
        node.start, node.parent = at, upper
        node.key = int(seg.path[at - seg.root])
        upper.children[node.key] = node
        return upper

    def store(self, space: object, tokens: Tokens) -> None:
        """Put tokens in the plain branch."""
        node, have = self._walk(space, tokens)
        if have < len(tokens):
            text = Text(space, tokens, start=have)
            self.add(node, text, key=int(tokens[have]))

    def add(self, parent: Node, text: Text, *, key: object) -> Node:
        """A new segment under ``parent``, which is told to the matcher."""
        above = parent.segment
        text = text._replace(parent=None if above is None else self._ids[above])
        node = Node(text.start, text.root + len(text.path), parent=parent, now=self.now)
        node.segment = Segment(text.path, text.root, above, node)
        node.depth, node.key = text.depth, key
        parent.children[key] = node
        self._leaves.discard(parent)
        self._leaves.add(node)
        self.resident += len(node)
        if self.capacity:
            self.fills += len(node) / self.capacity
        self.taken_in += len(node)
        segment_id = self.tell("insert", text)
        self.segments[segment_id] = node.segment
        self._ids[node.segment] = segment_id
        return node

    def tell(self, verb: str, *args: Any) -> Any:
        """Call the matcher, and note what was called for those who want to do it again."""
        self.log.append((verb, args))
        started = time.perf_counter()
        result = getattr(self.matcher, verb)(*args)
        self.told_s += time.perf_counter() - started
        return result

    def make_room(self, rows: int, locked: set[Node]) -> bool:
        """Evict leaves, lowest score first, until ``rows`` more tokens fit; whether they do."""
        if self.capacity is None or self.resident + rows <= self.capacity:
            return True
        heap = [
            (self.policy(leaf, self.fills), leaf.serial, leaf) for leaf in self._leaves - locked
        ]
        heapq.heapify(heap)
        while heap and self.resident + rows > self.capacity:
            parent = self._delete(heapq.heappop(heap)[2])
            if parent in self._leaves and parent not in locked:
                heapq.heappush(heap, (self.policy(parent, self.fills), parent.serial, parent))
        return self.resident + rows <= self.capacity

    def _delete(self, leaf: Node) -> Node:
        """Take a leaf out; its parent."""
        parent, seg = leaf.parent, leaf.segment
        assert parent is not None
        del parent.children[leaf.key]
        self._leaves.remove(leaf)
        self.resident -= len(leaf)
        seg.starts.pop()
        seg.nodes.pop()
        self.tell("trim", self._ids[seg], leaf.start)
        if not seg.nodes:
            del self.segments[self._ids.pop(seg)]
        if not parent.children and parent.segment is not None:
            self._leaves.add(parent)
        return parent

    def nodes_of(self, run: Run) -> Iterator[Node]:
        """The nodes that hold a run's source, from the last to the first."""
        segment: Segment | None = self.segments[run.source]
        last = run.src_stop - 1
        while segment is not None and last < segment.starts[0]:
            segment = segment.parent
        assert segment is not None
        node: Node | None = segment.nodes[bisect.bisect_right(segment.starts, last) - 1]
        while node is not None and node.segment is not None:
            yield node
            if node.start <= run.src_start:
                return
            node = node.parent

    def num_unequal(self, run: Run, prompt: Tokens) -> int:
        """Tokens of a run that differ in source and prompt; all of them if the source is gone."""
        seg = self.segments.get(run.source)
        if seg is None or run.src_stop > seg.nodes[-1].stop or run.src_start < seg.root:
            return run.length
        cached = seg.path[run.src_start - seg.root : run.src_stop - seg.root]
        return int(np.count_nonzero(cached != prompt[run.dst_start : run.dst_stop]))

    def distinct_share(self, gram: int = 8) -> float:
        """Which share of the resident tokens begins a gram that is nowhere before. Exact."""
        grams = []
        for segment in self.segments.values():
            stop = segment.nodes[-1].stop - segment.root
            path = segment.path[max(segment.starts[0] - segment.root - gram + 1, 0) : stop]
            if len(path) >= gram:
                windows = np.lib.stride_tricks.sliding_window_view(path, gram)
                grams.append(np.ascontiguousarray(windows).view(f"V{4 * gram}").ravel())
        if not grams:
            return 1.0
        together = np.concatenate(grams)
        return len(np.unique(together)) / len(together)
