"""The fuzzy radix tree: find cached text at any position, in step with a cache's life. Pure.

The host's own prefix tree splits its nodes as it likes; a segment only ever shrinks from its end,
because a cache evicts leaves.

Payloads are opaque: the host keeps in them where the KV of a segment is.
"""

from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from kvshare_sglang.errors import TreeError
from kvshare_sglang.plan import Join, Run, check_runs
from kvshare_sglang.radix_fuzzy import chunks
from kvshare_sglang.radix_fuzzy.chunks import BOUNDS, Bounds, Chunk
from kvshare_sglang.radix_fuzzy.fingerprints import (
    GRAM,
    SPAN,
    WINDOW,
    Fingerprints,
    Hashes,
    Tokens,
    gram_hashes,
    namespace_seed,
    winnow,
)
from kvshare_sglang.radix_fuzzy.index import Bools, FingerprintIndex, Words
from kvshare_sglang.radix_fuzzy.matching import LOOK_BACK, Hits, find_runs
from kvshare_sglang.radix_fuzzy.segments import (
    Piece,
    Segment,
    common_prefix,
    owner,
    path_tokens,
    pieces,
)

_POSITION_BITS = np.uint64(32)
_POSITION_MASK = np.uint64(2**32 - 1)
MOST_UNINDEXED = 1024  # segments
FAR = 2048  # tokens: whose text is the same for so long is the same text


class Pin(NamedTuple):
    """A claim on the segment that holds the end of a run's source."""

    owner: Segment
    stop: int


class Watcher(Protocol):
    """Is told of every change once it is done; must be quick and must not raise."""

    def inserted(self, segment: Segment) -> None: ...

    def trimmed(self, segment_id: int, stop: int) -> None: ...

    def cleared(self) -> None: ...


class Space:
    """A namespace that has live segments."""

    __slots__ = ("changed", "id", "num_segments", "seed")

    def __init__(self, space_id: int, seed: int) -> None:
        self.id, self.seed, self.num_segments = space_id, seed, 0
        self.changed = 0  # the tree's count of changes at the last one in here


class FuzzyTree:
    """Cached token sequences and an index of their n-grams, by namespace.

    Insert, trim and clear keep it in step with the cache it describes in amortised O(1) a token.
    A namespace is any hashable with a stable ``repr``; nothing ever crosses namespaces. ``secret``
    seeds the hashes: who does not know it cannot make texts whose grams collide. ``later``: what is
    inserted is put in the index when it is next looked at, or by ``settle``: a cache inserts while
    answers wait.
    """

    def __init__(self, *, secret: int = 0, later: bool = False) -> None:
        self._secret, self._later = secret, later
        # Told the kept hashes of text that is inserted or trimmed, None when all is cleared: a
        # prompt that keeps none of them matches what it did before.
        self.listener: Callable[[Hashes | None], None] | None = None
        self._changes = 0
        self.watcher: Watcher | None = None
        self._reset()

    def _reset(self) -> None:
        self._stops = np.zeros(64, np.int64)  # by segment id; 0 once the segment is gone
        self._depths = np.zeros(64, np.int16)
        self._spaces = np.zeros(64, np.int64)
        self._index = FingerprintIndex(self._alive, better=self._shallower, dropped=self._reuse_ids)
        self._unindexed: deque[tuple[Segment, int]] = deque()  # and the seed of its namespace
        self._segments: dict[int, Segment] = {}
        self._namespaces: dict[object, Space] = {}
        self._free_spaces: list[int] = []
        self._chunk_home: dict[int, tuple[int, int]] = {}  # segment, and where it ended then
        # The id of a dead segment is used again only after nothing names it any more; 0 is
        # "nothing".
        self._next_id = 1
        self._dead_ids: list[int] = []
        self._free_ids: list[int] = []
        self._num_tokens = 0

    # ---- what is in it ------------------------------------------------------------------

    def stamp(self, namespace: object) -> int:
        """Equal stamps mean that nothing was inserted or trimmed in the namespace in between, so
        that a match is what it was. 0 where there is nothing."""
        space = self._namespaces.get(namespace)
        return space.changed if space else 0

    @property
    def num_tokens(self) -> int:
        """Tokens alive, over all namespaces."""
        return self._num_tokens

    @property
    def num_segments(self) -> int:
        return len(self._segments)

    @property
    def nbytes(self) -> int:
        """Bytes of the index and of the segments' tokens."""
        self.settle()
        return self._index.nbytes + 4 * self._num_tokens

    @property
    def secret(self) -> int:
        return self._secret

    def segments(self) -> list[Segment]:
        """All that is alive, parents before their children."""
        return list(self._segments.values())

    def segment(self, segment_id: int) -> Segment:
        """The live segment; KeyError once it is gone."""
        return self._segments[segment_id]

    # ---- in step with the cache ---------------------------------------------------------

    def insert(
        self,
        namespace: object,
        tokens: Tokens,
        *,
        start: int = 0,
        parent: int | None = None,
        depth: int = 0,
        before: Tokens | None = None,
        hashed: tuple[int, int] | None = None,
        payload: Any = None,
    ) -> Segment:
        """Add new text after path position ``start`` of ``parent``; the new segment.

        ``before`` holds the tokens that stood before a segment without parent, so that the same
        prompt, continued, knows the text as its own (``Join.SAME``), and one that was edited
        further up as text that goes on (``Join.ON``). A copy of a tree is given ``hashed``, the
        segment's ``(context, near)``, in its place.

        Raises ValueError if the text is empty, does not begin where the parent is alive, or is
        not of the parent's namespace and depth. A segment without parent may begin anywhere.
        O(len(tokens)), amortised.
        """
        above = None if parent is None else self._segments[parent]
        if len(tokens) == 0:
            raise ValueError("tokens must hold at least 1 token, got 0")
        if start < 0:
            raise ValueError(f"start must be at least 0, got {start}")
        if above is not None and not above.start < start <= above.stop:
            raise ValueError(f"start must be in [{above.start + 1}, {above.stop}], got {start}")
        if above is not None and above.depth != depth:  # a run may reach up into the parent
            raise ValueError(f"depth must be the parent's {above.depth}, got {depth}")
        if above is not None and above.namespace != namespace:
            raise ValueError(f"namespace {namespace!r} is not that of the parent segment")
        if hashed is None:
            hashed = self._context_of(before), self._context_of(before, LOOK_BACK)
        space = self._space(namespace)
        seg = Segment(
            id=self._new_id(),
            namespace=namespace,
            tokens=np.array(tokens, np.int32),
            start=start,
            parent=above,
            depth=depth,
            payload=payload,
            root_start=start if above is None else above.root_start,
            context=hashed[0] if above is None else above.context,
            near=hashed[1] if above is None else above.near,
        )
        space.num_segments += 1
        self._note_change(space)
        self._segments[seg.id] = seg
        if above is not None:
            above.children[start, int(seg.tokens[0])] = seg
        self._num_tokens += len(seg.tokens)
        self._stops[seg.id] = seg.stop
        self._depths[seg.id] = depth
        self._spaces[seg.id] = space.id
        self._unindexed.append((seg, space.seed))
        # A listener is told at once; and what was evicted meanwhile is not kept for long.
        if not self._later or self.listener is not None or len(self._unindexed) >= MOST_UNINDEXED:
            self.settle()
        if self.watcher is not None:
            self.watcher.inserted(seg)
        return seg

    def settle(self) -> None:
        """Put in the index what is not in it yet. O(its tokens), amortised."""
        while self._unindexed:
            seg, seed = self._unindexed.popleft()
            if self._segments.get(seg.id) is seg:  # not gone again
                self._index_segment(seg, seed)

    def new_chunks(
        self, namespace: object, tokens: Tokens, *, depth: int, bounds: Bounds = BOUNDS
    ) -> list[list[Chunk]]:
        """Chunks of ``tokens`` that no live segment stores at ``depth`` or less, in stretches.

        What repeats in the text itself is given once. Each stretch is a list of neighbouring
        chunks. Changes nothing. O(len(tokens)).
        """
        seed = namespace_seed((self._secret, namespace))
        out: list[list[Chunk]] = []
        seen: set[int] = set()
        for chunk in chunks.cut(tokens, bounds=bounds, seed=seed):
            home, stop = self._chunk_home.get(chunk.key, (0, 0))
            known = self._segments.get(home)
            whole = known is not None and known.stop >= stop  # eviction may have left its head
            if chunk.key in seen or (known is not None and whole and known.depth <= depth):
                continue
            seen.add(chunk.key)
            if out and out[-1][-1].stop == chunk.start:
                out[-1].append(chunk)
            else:
                out.append([chunk])
        return out

    def remember_chunk(self, chunk: Chunk, segment: Segment) -> None:
        """Note which segment stores a chunk, so that a twin of it is not stored again."""
        self._chunk_home[chunk.key] = segment.id, segment.stop
        if len(self._chunk_home) > 2 * len(self._segments) + 4096:
            alive = self._segments
            self._chunk_home = {k: s for k, s in self._chunk_home.items() if s[0] in alive}

    def trim(self, segment_id: int, stop: int) -> None:
        """Forget path positions from ``stop`` on: the cache evicted them. O(tokens left).

        Raises TreeError if a pinned stretch would lose its source, ValueError if ``stop`` is
        outside the segment.
        """
        seg = self._segments[segment_id]
        if not seg.start <= stop <= seg.stop:
            raise ValueError(f"stop must be in [{seg.start}, {seg.stop}], got {stop}")
        if any(pinned > stop for pinned in seg.pins):
            raise TreeError(f"trim to {stop} would drop tokens pinned up to {max(seg.pins)}")
        if self.listener is not None:
            left = max(stop - (SPAN - 1), seg.root_start)
            self.listener(self.marks(seg.namespace, path_tokens(seg, left, seg.stop)).hashes)
        self._num_tokens -= seg.stop - stop
        self._note_change(self._namespaces[seg.namespace])
        place = seg.start, int(seg.tokens[0])
        seg.tokens = seg.tokens[: stop - seg.start].copy()
        self._stops[seg.id] = stop
        if stop == seg.start:
            if seg.parent is not None and seg.parent.children.get(place) is seg:
                del seg.parent.children[place]
            self._drop(seg)
        if self.watcher is not None:
            self.watcher.trimmed(segment_id, stop)

    def clear(self) -> None:
        """Forget everything (the cache was flushed). Pins die with it."""
        self._reset()
        if self.listener is not None:
            self.listener(None)
        if self.watcher is not None:
            self.watcher.cleared()

    def pin(self, run: Run) -> Pin:
        """The run's source must not be trimmed until the pin is given back.

        Raises KeyError or TreeError if it was trimmed since the match.
        """
        # The run's own segment may go, only the one that holds its end is held.
        holder = owner(self._segments[run.source], run.src_stop - 1)
        if run.src_stop > holder.stop:
            raise TreeError(f"{run} ends past the last position alive, {holder.stop}")
        holder.pins[run.src_stop] += 1
        return Pin(holder, run.src_stop)

    def unpin(self, pin: Pin) -> None:
        """Give a pin back, once. Raises TreeError if it is not held."""
        holder, stop = pin
        if self._segments.get(holder.id) is not holder or not holder.pins[stop]:
            raise TreeError(f"nothing is pinned up to {stop} in segment {holder.id}")
        holder.pins[stop] -= 1
        if holder.pins[stop] == 0:
            del holder.pins[stop]

    @property
    def num_pins(self) -> int:
        return sum(sum(seg.pins.values()) for seg in self._segments.values())

    # ---- lookup -------------------------------------------------------------------------

    def match(
        self,
        namespace: object,
        prompt: Tokens,
        *,
        start: int = 0,
        max_depth: int = 0,
        tolerance: float = 0.5,
    ) -> tuple[Run, ...]:
        """Cached text found in ``prompt[start:]``: ascending, disjoint runs of equal tokens.

        A shared span of ``SPAN`` tokens that one live segment holds is found wherever it is, unless
        its gram is, or was until it was evicted, in more places than the index keeps; in text that
        is made of short finds, only longer ones are (see ``matching.anchors``). Gaps between two
        runs of one cached text are aligned by edit distance. Sources deeper than ``max_depth`` do
        not count. Changes nothing that can be seen. Valid until the next trim or clear. O(n) plus
        the way up the path for each fingerprint hit that no run covers, and O(gap^2) for short
        gaps.
        """
        space = self._namespaces.get(namespace)
        if space is None:
            return ()
        self.settle()
        # Spans that begin before ``start`` count for what they hold after it.
        first = max(start - SPAN + 1, 0)
        marks = winnow(prompt[first:], seed=space.seed)
        which, found = self._index.find(marks.hashes)
        homes = (found >> _POSITION_BITS).astype(np.int64)
        ok = self._alive(found) & (self._depths[homes] <= max_depth)
        ok &= self._spaces[homes] == space.id
        if not ok.any():
            return ()
        hits = Hits(
            marks.positions[which[ok]] + first,
            homes[ok],
            (found[ok] & _POSITION_MASK).astype(np.int64),
        )
        runs = find_runs(prompt, hits, self._segments, start=start, tolerance=tolerance)
        joined: list[Run] = []
        edited: int | None = None  # where the text before was last changed, if that was an edit
        for run, mine in zip(runs, self._own(runs, prompt), strict=True):
            join = Join.SAME if mine else self._join(run, prompt, edited)
            joined.append(run._replace(join=join))
            if join in (Join.SEAM, Join.EDIT):
                edited = run.dst_start if join is Join.EDIT else None
        check_runs(joined, start=start, stop=len(prompt))
        return tuple(joined)

    def marks(self, namespace: object, tokens: Tokens) -> Fingerprints:
        """Kept grams of a text as the tree would index it in the namespace. O(n)."""
        return winnow(tokens, seed=namespace_seed((self._secret, namespace)))

    def _context_of(self, tokens: Tokens | None, last: int | None = None) -> int:
        """Hash of the tokens before a path, or of the ``last`` ones, never 0; 0 where they are not
        known or fewer. O(n)."""
        if tokens is None or (last is not None and len(tokens) < last):
            return 0
        part = np.ascontiguousarray(tokens if last is None else tokens[-last:], np.int32)
        return xxhash.xxh3_64_intdigest(part.tobytes(), self._secret) or 1

    def _join(self, run: Run, prompt: Tokens, edited: int | None) -> Join:
        """A run goes on if what stands before it in the prompt stood there in the cache too: it is
        the same text, edited further up.

        At the start of a path a hash of ``LOOK_BACK`` tokens tells. A run that begins later, where
        another one ends, must follow an edit, at ``edited``, and is compared back to it, for texts
        between which the same words stand are no less moved; at most ``FAR`` tokens, or to the
        start of the path and its hash.
        """
        seg = self._segments[run.source]
        have = run.src_start - seg.root_start
        if run.join is not Join.SEAM or (have and edited is None):
            return run.join
        need = min(max(run.dst_start - (edited or 0), LOOK_BACK), FAR)
        have = min(have, need)
        at = run.dst_start - have
        if at < 0:
            return Join.SEAM
        own = path_tokens(seg, run.src_start - have, run.src_start)
        if not np.array_equal(own, prompt[at : run.dst_start]):
            return Join.SEAM
        if have == need:
            return Join.ON
        same = seg.near and self._context_of(prompt[:at], LOOK_BACK) == seg.near
        return Join.ON if same else Join.SEAM

    def _own(self, runs: Sequence[Run], prompt: Tokens) -> list[bool]:
        """For each run, whether the prompt up to it is what stood before the run's source.

        O(len(prompt)) for each path; no path is compared twice.
        """
        contexts: dict[int, int] = {}  # hash of the prompt up to where a path begins
        reach: dict[int, int] = {}  # by segment: how far the prompt is its path, context included

        def reach_of(seg: Segment) -> int:
            chain = []
            node: Segment | None = seg
            while node is not None and node.id not in reach:
                chain.append(node)
                node = node.parent
            for node in reversed(chain):
                if node.parent is not None:
                    whole = reach[node.parent.id] >= node.start
                else:
                    if node.start not in contexts:
                        contexts[node.start] = self._context_of(prompt[: node.start])
                    whole = contexts[node.start] == node.context
                same = common_prefix(node.tokens, prompt[node.start :]) if whole else -1
                reach[node.id] = node.start + same if whole else -1
            return reach[seg.id]

        out = []
        for run in runs:
            seg = self._segments[run.source]
            possible = not run.shift and seg.context and run.src_start >= seg.root_start
            out.append(bool(possible) and reach_of(owner(seg, run.src_start)) >= run.src_start)
        return out

    def pieces(self, run: Run) -> list[Piece]:
        """The live segments that hold the run's source, in path order."""
        return pieces(self._segments[run.source], run.src_start, run.src_stop)

    def path_tokens(self, segment_id: int, start: int, stop: int) -> Tokens:
        """Tokens at path positions ``[start, stop)`` of a live segment."""
        return path_tokens(self._segments[segment_id], start, stop)

    # ---- invariants ---------------------------------------------------------------------

    def check(self) -> None:
        """Restate the invariants; AssertionError on the first that does not hold. O(all)."""
        self.settle()
        assert self._num_tokens == sum(len(s.tokens) for s in self._segments.values())
        for key, seg in self._segments.items():
            # A segment is known by its id, is never empty, and the arrays agree with it.
            assert key == seg.id < self._next_id
            assert len(seg.tokens) > 0
            assert self._stops[key] == seg.stop
            assert self._depths[key] == seg.depth
            # A child follows a live place of a live parent of its own namespace.
            if seg.parent is not None:
                assert self._segments[seg.parent.id] is seg.parent
                assert seg.parent.start < seg.start <= seg.parent.stop
                assert (seg.parent.namespace, seg.parent.depth) == (seg.namespace, seg.depth)
            # Pins hold what is alive.
            assert all(count > 0 for count in seg.pins.values())
            assert all(seg.start < stop <= seg.stop for stop in seg.pins)
        # Segments that are gone look dead, and every live entry names a gram that is there.
        alive = np.zeros(len(self._stops), bool)
        alive[list(self._segments)] = True
        assert not self._stops[~alive].any()
        keys, values = self._index.items()
        keep = self._alive(values)
        for hashed, value in zip(keys[keep].tolist(), values[keep].tolist(), strict=True):
            seg, at = self._segments[value >> 32], value & (2**32 - 1)
            gram = self.path_tokens(seg.id, at, at + GRAM)
            assert gram_hashes(gram, seed=self._namespaces[seg.namespace].seed)[0] == hashed
        # Namespaces live as long as their segments, and each has an id of its own.
        counts = Counter(seg.namespace for seg in self._segments.values())
        assert counts == {name: s.num_segments for name, s in self._namespaces.items()}
        assert len({space.id for space in self._namespaces.values()}) == len(counts)
        # An id is alive, dead or free, and only one of these.
        ids = [*self._segments, *self._dead_ids, *self._free_ids]
        assert sorted(ids) == list(range(1, self._next_id))

    # ---- inside -------------------------------------------------------------------------

    def _space(self, namespace: object) -> Space:
        space = self._namespaces.get(namespace)
        if space is None:
            space_id = self._free_spaces.pop() if self._free_spaces else len(self._namespaces)
            seed = namespace_seed((self._secret, namespace))
            space = self._namespaces[namespace] = Space(space_id, seed)
        return space

    def _note_change(self, space: Space) -> None:
        self._changes += 1
        space.changed = self._changes

    def _new_id(self) -> int:
        if self._free_ids:
            return self._free_ids.pop()
        self._next_id += 1
        if self._next_id > len(self._stops):
            for name in ("_stops", "_depths", "_spaces"):
                old = getattr(self, name)
                setattr(self, name, np.concatenate([old, np.zeros_like(old)]))
        return self._next_id - 1

    def _drop(self, seg: Segment) -> None:
        """Forget a segment that has no tokens left, and its namespace with the last one."""
        self._stops[seg.id] = 0
        del self._segments[seg.id]
        self._dead_ids.append(seg.id)
        space = self._namespaces[seg.namespace]
        space.num_segments -= 1
        if space.num_segments == 0:
            del self._namespaces[seg.namespace]
            self._free_spaces.append(space.id)
        if len(self._dead_ids) > 4096 + 2 * len(self._segments):
            self._index.compact()  # segments too short for a fingerprint never fill the index

    def _reuse_ids(self) -> None:
        """The index has dropped all that was dead; whatever else names dead segments goes too."""
        self._chunk_home = {k: s for k, s in self._chunk_home.items() if s[0] in self._segments}
        self._free_ids += self._dead_ids
        self._dead_ids.clear()

    def _alive(self, values: Words) -> Bools:
        """Which index entries name a gram that is still there in full."""
        stops = self._stops[(values >> _POSITION_BITS).astype(np.int64)]
        ends = (values & _POSITION_MASK).astype(np.int64) + GRAM
        mask: npt.NDArray[np.bool_] = ends <= stops
        return mask

    def _shallower(self, old: Words, new: Words) -> Bools:
        """Which old entries lead to a smaller depth than the new ones: they stay."""
        depth_of = self._depths
        homes = (old >> _POSITION_BITS).astype(np.int64), (new >> _POSITION_BITS).astype(np.int64)
        mask: Bools = depth_of[homes[0]] < depth_of[homes[1]]
        return mask

    def _index_segment(self, seg: Segment, seed: int) -> None:
        """Index the grams that the whole path keeps and the path above it does not."""
        left = max(seg.start - (SPAN - 1) - (WINDOW - 1), seg.root_start)
        path = path_tokens(seg, left, seg.stop)
        marks = winnow(path, seed=seed)
        # What windows that end above keep was indexed with the parent, and lives as long as it.
        positions, hashes = marks
        if left < seg.start:
            above = winnow(path[: seg.start - left], seed=seed)
            own = ~np.isin(positions, above.positions)
            positions, hashes = positions[own], hashes[own]
        starts = positions + left
        self._index.put(hashes, (np.uint64(seg.id) << _POSITION_BITS) | starts.astype(np.uint64))
        if self.listener is not None:
            self.listener(marks.hashes)
