"""A cache's life without a server: SGLang's radix tree, eviction, what requests leave behind.

Requests are served one at a time and answer nothing: what they would generate is not cached. As in
the plug-in, a request that reuses leaves its exact part in the tree and its fresh text in branches
of their own, one level deeper than what it reused; copies are not kept, their sources are.
"""

import bisect
import heapq
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from _matchers import SPAN, Matcher, Text
from _useful import useful

from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.policy import worth
from kvshare_sglang.radix_fuzzy.fingerprints import Tokens
from kvshare_sglang.radix_fuzzy.segments import common_prefix
from kvshare_sglang.radix_fuzzy.types import Join, Range, Run, complement

ANY_DEPTH = 32_000
EDIT_GAP = 512  # cached text that goes on so soon goes on behind an edit


class Node:
    """A node of the radix tree: path positions ``[start, stop)`` of one segment."""

    __slots__ = (
        "children",
        "created",
        "depth",
        "hits",
        "key",
        "last_access",
        "parent",
        "segment",
        "serial",
        "start",
        "stop",
        "worth",
    )

    count = itertools.count()

    def __init__(self, start: int, stop: int, *, parent: "Node | None", now: int) -> None:
        self.serial = next(Node.count)  # breaks ties: runs must repeat
        self.start, self.stop, self.parent = start, stop, parent
        self.children: dict[object, Node] = {}
        self.key: object = None  # under which the parent holds it
        self.segment: Segment = None  # type: ignore[assignment]  # the root has none
        self.created = self.last_access = now
        self.hits = 0  # requests that had it in their prefix
        self.worth = worth.NEW
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


# What is evicted first has the smallest score; turnover counts tokens taken in, in capacities.
Policy = Callable[[Node, float], Any]


def lru(node: Node, turnover: float) -> int:
    """SGLang's default."""
    return node.last_access


def by_worth(node: Node, turnover: float) -> tuple[int, int]:
    """The plug-in's own."""
    return worth.rank(node.worth, now=turnover), node.last_access


class Served(NamedTuple):
    """One request: its exact prefix, the runs found behind it and what of them is useful."""

    prompt_len: int
    prefix_len: int
    runs: list[Run]
    useful: list[Run]
    lookup_s: float
    insert_s: float
    inserted: int  # tokens
    unequal: int  # mapped tokens that differ in source and destination, or whose source is gone

    @property
    def found(self) -> int:
        return sum(run.length for run in self.runs)

    @property
    def num_useful(self) -> int:
        return sum(run.length for run in self.useful)

    @property
    def edits(self) -> int:
        return sum(run.join is Join.EDIT for run in self.runs)


class Life:
    """A cache of ``capacity`` tokens (None: without limit) and the matcher that follows it.

    ``keep_all``: every request leaves its whole prompt in the plain branch, as if a copy were as
    good as exact. Otherwise the rule above, with sources of at most ``max_depth``.
    """

    def __init__(
        self,
        matcher: Matcher,
        *,
        capacity: int | None = None,
        max_depth: int = ANY_DEPTH,
        keep_all: bool = False,
        policy: Policy = lru,
        config: KVShareConfig | None = None,
    ) -> None:
        self.matcher = matcher
        self.capacity, self.max_depth, self.keep_all = capacity, max_depth, keep_all
        self.policy = policy
        self.config = config or KVShareConfig()
        self.resident = 0
        self.not_stored = 0  # requests that did not fit
        self.log: list[tuple[str, tuple[Any, ...]]] = []
        self._roots: dict[object, Node] = {}
        self._tags = Node(0, 0, parent=None, now=0)
        self._segments: dict[int, Segment] = {}
        self._ids: dict[Segment, int] = {}
        self._leaves: set[Node] = set()
        self._now = 0
        self.turnover = 0.0
        self._insert_s = 0.0
        self._inserted = 0

    def serve(self, space: object, prompt: Tokens) -> Served:
        """Match a prompt, make room for it, and keep what it leaves behind."""
        self._now += 1
        self._insert_s, self._inserted = 0.0, 0
        node, seen = self._look(space, prompt)
        rows = seen.prompt_len - seen.prefix_len
        copies = seen.useful
        if seen.num_useful < max(self.config.min_reuse, self.config.min_share * rows):
            copies = []
        sources = {self._touch(copy) for copy in copies}
        if not self._make_room(rows, {node, *sources}):
            copies = []  # as the plug-in does where it does not fit with its sources locked
            if not self._make_room(rows, {node}):
                self.not_stored += 1
                return seen
        if self.keep_all or not copies:
            self._store(space, prompt)
        else:
            self._store(space, prompt[: copies[0].dst_start])
            used = [
                run
                for run in seen.runs
                if any(run.dst_start <= c.dst_start < run.dst_stop for c in copies)
            ]
            self._store_fresh(space, prompt, used)
        return seen._replace(insert_s=self._insert_s, inserted=self._inserted)

    def look(self, space: object, prompt: Tokens) -> Served:
        """What a prompt would find. Marks its prefix as used, and may split a node."""
        return self._look(space, prompt)[1]

    def _look(self, space: object, prompt: Tokens) -> tuple[Node, Served]:
        node, prefix_len = self._walk(space, prompt[:-1])  # the last token is always computed
        started = time.perf_counter()
        found = self.matcher.match(space, prompt, start=prefix_len, max_depth=self.max_depth)
        lookup_s = time.perf_counter() - started
        unequal = sum(self._unequal(run, prompt) for run in found)
        runs = self._joined(found)
        kept = useful(runs, stop=len(prompt) - 1)
        return node, Served(
            len(prompt),
            prefix_len,
            runs,
            kept,
            lookup_s,
            insert_s=0.0,
            inserted=0,
            unequal=unequal,
        )

    def distinct_share(self, gram: int = 8) -> float:
        """Which share of the resident tokens begins a gram that stands nowhere before. Exact."""
        grams = []
        for segment in self._segments.values():
            stop = segment.nodes[-1].stop - segment.root
            path = segment.path[max(segment.starts[0] - segment.root - gram + 1, 0) : stop]
            if len(path) >= gram:
                windows = np.lib.stride_tricks.sliding_window_view(path, gram)
                grams.append(np.ascontiguousarray(windows).view(f"V{4 * gram}").ravel())
        if not grams:
            return 1.0
        together = np.concatenate(grams)
        return len(np.unique(together)) / len(together)

    # ---- what is in the tree --------------------------------------------------------------

    def _walk(self, space: object, tokens: Tokens) -> tuple[Node, int]:
        """The node at which the longest cached prefix ends, and its length. May split a node."""
        if space not in self._roots:
            self._roots[space] = Node(0, 0, parent=None, now=self._now)
        node, at = self._roots[space], 0
        while at < len(tokens) and (child := node.children.get(int(tokens[at]))) is not None:
            size = common_prefix(child.tokens, tokens[at:])
            child.last_access = self._now
            child.hits += 1
            child.worth = worth.used(child.worth, 1.0, now=self.turnover)
            at += size
            if size < len(child):
                return self._split(child, child.start + size), at
            node = child
        return node, at

    def _split(self, node: Node, at: int) -> Node:
        """Cut a node in two; the upper one."""
        assert node.parent is not None
        upper = Node(node.start, at, parent=node.parent, now=self._now)
        upper.segment, upper.key, upper.depth = node.segment, node.key, node.depth
        upper.created, upper.hits, upper.worth = node.created, node.hits, node.worth
        node.parent.children[upper.key] = upper
        seg = node.segment
        i = bisect.bisect_left(seg.starts, node.start)
        seg.starts.insert(i + 1, at)
        seg.nodes.insert(i, upper)
        node.start, node.parent = at, upper
        node.key = int(seg.path[at - seg.root])
        upper.children[node.key] = node
        return upper

    def _store(self, space: object, tokens: Tokens) -> None:
        """Put tokens in the plain branch."""
        node, have = self._walk(space, tokens)
        if have < len(tokens):
            self._add(space, node, tokens, root=0, start=have, depth=0, key=int(tokens[have]))

    def _store_fresh(self, space: object, prompt: Tokens, used: Sequence[Run]) -> None:
        """Keep the text that stands behind reused runs in branches of its own."""
        taken = [Range(run.dst_start, run.dst_stop) for run in used]
        for start, stop in complement(taken, start=0, stop=len(prompt)):
            before = [run.depth_after for run in used if run.dst_stop <= start]
            if not before or (depth := max(before)) > self.max_depth:
                continue
            started = time.perf_counter()
            stretches = self.matcher.pieces(space, prompt[start:stop], depth=depth)
            self._insert_s += time.perf_counter() - started
            for pieces in stretches:
                if pieces[-1].stop - pieces[0].start < SPAN:
                    continue
                root = start + pieces[0].start
                node, key = self._tags, object()
                for piece in pieces:
                    path = prompt[root : start + piece.stop]
                    first = start + piece.start
                    node = self._add(
                        space,
                        node,
                        path,
                        root=root,
                        start=first,
                        depth=depth,
                        key=key,
                        before=prompt[:root],
                    )
                    if piece.note is not None:
                        self._tell("remember", piece.note, self._ids[node.segment])
                    key = None

    def _add(
        self,
        space: object,
        parent: Node,
        path: Tokens,
        *,
        root: int,
        start: int,
        depth: int,
        key: object,
        before: Tokens | None = None,
    ) -> Node:
        node = Node(start, root + len(path), parent=parent, now=self._now)
        above = parent.segment
        node.segment = Segment(path, root, above, node)
        node.depth, node.hits = depth, 1
        node.key = int(path[start - root]) if key is None else key
        parent.children[node.key] = node
        self._leaves.discard(parent)
        self._leaves.add(node)
        self.resident += len(node)
        if self.capacity:
            self.turnover += len(node) / self.capacity
        self._inserted += len(node)
        parent_id = None if above is None else self._ids[above]
        text = Text(space, path, root, start, parent_id, depth, before)
        segment_id = self._tell("insert", text)
        self._segments[segment_id] = node.segment
        self._ids[node.segment] = segment_id
        return node

    def _tell(self, verb: str, *args: Any) -> Any:
        """Call the matcher, and note what was called for those who want to do it again."""
        self.log.append((verb, args))
        started = time.perf_counter()
        result = getattr(self.matcher, verb)(*args)
        self._insert_s += time.perf_counter() - started
        return result

    # ---- eviction -------------------------------------------------------------------------

    def _make_room(self, rows: int, locked: set[Node]) -> bool:
        """Evict leaves, lowest score first, until ``rows`` more tokens fit; whether they do."""
        if self.capacity is None or self.resident + rows <= self.capacity:
            return True
        heap = [
            (self.policy(leaf, self.turnover), leaf.serial, leaf) for leaf in self._leaves - locked
        ]
        heapq.heapify(heap)
        while heap and self.resident + rows > self.capacity:
            parent = self._delete(heapq.heappop(heap)[2])
            if parent in self._leaves and parent not in locked:
                heapq.heappush(heap, (self.policy(parent, self.turnover), parent.serial, parent))
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
        self._tell("trim", self._ids[seg], leaf.start)
        if not seg.nodes:
            del self._segments[self._ids.pop(seg)]
        if not parent.children and parent.segment is not None:
            self._leaves.add(parent)
        return parent

    # ---- sources --------------------------------------------------------------------------

    def _nodes_of(self, run: Run) -> Iterator[Node]:
        """The nodes that hold a run's source, from the last to the first."""
        segment: Segment | None = self._segments[run.source]
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

    def _touch(self, run: Run) -> Node:
        """Mark a source as used; the node that must stay while it is copied."""
        nodes = list(self._nodes_of(run))
        for node in nodes:
            node.last_access = self._now
            num = min(node.stop, run.src_stop) - max(node.start, run.src_start)
            node.worth = worth.used(node.worth, num / len(node), now=self.turnover)
        return nodes[0]

    def _unequal(self, run: Run, prompt: Tokens) -> int:
        seg = self._segments.get(run.source)
        if seg is None or run.src_stop > seg.nodes[-1].stop or run.src_start < seg.root:
            return run.length
        cached = seg.path[run.src_start - seg.root : run.src_stop - seg.root]
        return int(np.count_nonzero(cached != prompt[run.dst_start : run.dst_stop]))

    def _joined(self, runs: Sequence[Run]) -> list[Run]:
        """The runs with joins by one rule for all matchers; runs that go on without a gap are one.

        A run stands behind an edit if the cached text of the run before it goes on there, at most
        ``EDIT_GAP`` tokens later. The first one is a seam, whatever the exact prefix was.
        """
        out: list[Run] = []
        for run in runs:
            join = run.join if run.join is Join.SAME else Join.SEAM
            if out and 0 <= run.src_start - out[-1].src_stop <= EDIT_GAP:
                before = out[-1]
                if self._same_path(before, run):
                    join = Join.EDIT
                    if (before.src_stop, before.dst_stop) == (run.src_start, run.dst_start):
                        length = before.length + run.length
                        out[-1] = before._replace(source=run.source, length=length)
                        continue
            out.append(run._replace(join=join))
        return out

    def _same_path(self, before: Run, after: Run) -> bool:
        if before.source == after.source:
            return True
        upper = next(self._nodes_of(before))
        node: Node | None = next(self._nodes_of(after))
        while node is not None and node.start >= upper.start:
            if node is upper:
                return True
            node = node.parent
        return False
