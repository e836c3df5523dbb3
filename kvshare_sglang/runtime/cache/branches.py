"""Blended branches: a prompt that reused is a prefix from then on, for whom reuse is good enough.

A *blended* row is KV of a request that reused: copied, computed again, or new text computed over
copies. From ``exact_len`` on such KV hangs in SGLang's tree like any other, under a key that no
request can name, at the node where the exact part ends::

    root -- exact part --+-- plain text of others
                         +-- (branch key) copies -- new text -- answer -- next turn ...

A request that accepts reuse walks the plain branch first and steps over into a blended child of
any node on its way where that covers more of its prompt. So the same prompt again, the next turn,
``n > 1`` and a request that was retracted share slots, as in SGLang without us. All blended text
of a namespace at a node hangs under one key, so equal prompts meet in one branch.
"""

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from kvshare_sglang.plan import Blend, Range, ReusePlan, Rows
from kvshare_sglang.policy.retain import depths_after, fresh_stretches, page_borders
from kvshare_sglang.radix_fuzzy.chunks import Bounds, Chunk
from kvshare_sglang.radix_fuzzy.fingerprints import SPAN, Tokens
from kvshare_sglang.runtime import versions
from kvshare_sglang.runtime.batch import to_device
from kvshare_sglang.runtime.cache.index_sync import BranchKey, as_tokens

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.radix_cache import RadixKey, TreeNode

    from kvshare_sglang.runtime.cache.radix import FuzzyRadixCache


class _Piece(NamedTuple):
    """Prompt ``[start, stop)``, one node of a branch; ``chunk``: new text that may be a source and
    begins at ``new``, in the first page."""

    start: int
    stop: int
    chunk: Chunk | None = None
    depth: int = 0
    new: int = 0


class Row(NamedTuple):
    """A request's row of slots: ``slots`` [n], one a token; of these the tree owns those before
    ``protected``, except the ``private`` ones, which are computed again in slots of their own.
    ``open``: the rows whose KV is a copy."""

    slots: torch.Tensor
    protected: int
    private: Rows
    open: Rows


class Branches:
    """The blended branches of one cache."""

    def __init__(self, cache: "FuzzyRadixCache") -> None:
        self._cache = cache
        config = cache.config
        self._bounds = Bounds(config.chunk_min, config.chunk_target, config.chunk_max)
        self._keys: dict[object, BranchKey] = {}  # by namespace

    def removed(self, node: "TreeNode") -> None:
        """``node`` was evicted: a namespace without branches is forgotten."""
        self._cache.copies.removed(node)
        if isinstance(node.key.extra_key, BranchKey):
            self.left(node.key.extra_key)

    def left(self, key: BranchKey) -> None:
        """A node carries ``key`` no more."""
        key.num_nodes -= 1
        if key.num_nodes == 0 and self._keys.get(key.namespace) is key:
            del self._keys[key.namespace]

    def forget(self) -> None:
        """No request steps into what is there now: it was flushed, or other weights made it."""
        self._keys.clear()

    def are_in(self, namespace: object) -> bool:
        """Whether the namespace has a branch that may be stepped into."""
        return namespace in self._keys

    def check(self, counts: Mapping[BranchKey, int]) -> None:
        """AssertionError where a namespace is remembered without a node; ``counts``: of nodes."""
        assert all(key.num_nodes == counts[key] > 0 for key in self._keys.values())

    # ---- lookup --------------------------------------------------------------------------

    def step_over(self, key: "RadixKey", match: Any) -> Any:
        """``match``, the plain one of ``key``, whose namespace has branches, or a blended one where
        that covers more. O(nodes on
        the plain path), and O(tokens) for each branch that begins like the text."""
        mine = self._keys[versions.namespace(key)]
        cache = self._cache
        page = cache.page_size
        length = len(key) // page * page
        node, at = match.last_device_node, versions.match_len(match)
        best, top, top_at = at, None, 0
        while True:
            if at + page <= length:
                rest = _under(key, mine, at, at + page)
                if rest.child_key(page) in node.children:
                    covered = at + self._covered(node, _under(key, mine, at, length))
                    if covered > best:
                        best, top, top_at = covered, node, at
            if node is cache.root_node:
                break
            at -= len(node.key)
            node = node.parent
        if top is None:
            return match
        _, last = cache._match_prefix_helper(top, _under(key, mine, top_at, length))
        return versions.stepped_over(cache, match, last, best)

    def _covered(self, node: "TreeNode", key: "RadixKey") -> int:
        """How many tokens of ``key`` hang under ``node``. Changes nothing."""
        page, done = self._cache.page_size, 0
        while len(key) - done >= page:
            child, same = _next(node, key, done, page)
            if child is None:
                break
            done += same
            if same < len(child.key):
                break
            node = child
        return done

    def blend_of(self, req: "Req") -> Blend | None:
        """What of a request's prefix hit is not exact."""
        node, masks = req.last_node, []
        if node is None or not isinstance(node.key.extra_key, BranchKey):
            return None
        depth = node.kvshare.depth
        while isinstance(node.key.extra_key, BranchKey):
            masks.append(node.kvshare.open)
            node = node.parent
        mask = np.concatenate(masks[::-1])
        start = versions.prefix_len(req) - len(mask)
        return Blend(start, Rows.where(np.concatenate([np.zeros(start, bool), mask])), depth)

    # ---- what a request leaves -----------------------------------------------------------

    def store(
        self, req: "Req", plan: ReusePlan, tokens: Any, row: Row, above: "TreeNode", *, ended: bool
    ) -> tuple["TreeNode", Rows]:
        """Put ``tokens`` from ``exact_len`` on, in whole pages, under ``above``, where the exact
        part ends. What was not there hangs there with the request's slots. Where it was there the
        request takes over the tree's slots, unless its own rows are nearer to full prefill and no
        one else reads the old ones: then the tree takes over the request's.

        Returns the last node, and the rows that are still the request's own, none if it ``ended``:
        those that it repaired, or that are a copy in the tree and none here.
        """
        cache, page = self._cache, self._cache.page_size
        exact = plan.exact_len // page * page
        stop = len(tokens) // page * page
        if stop <= exact:  # no page to store: nor a key, which goes only with its last node
            return above, Rows()
        space = versions.namespace(req)
        mine = self._keys.setdefault(space, BranchKey(space))
        key = versions.make_key(tokens[exact:stop], req, extra_key=mine)
        open_rows, was_private = row.open.mask(stop), row.private.mask(stop)
        own = was_private | (np.arange(stop) >= row.protected)
        node, at = above, exact
        locked = _path(req.last_node)
        still_private = np.zeros(stop, bool)
        freed: list[torch.Tensor] = []
        while at < stop:
            child, same = _next(node, key, at - exact, page)
            if child is None:
                break
            if same < len(child.key):
                child = cache._split_node(child.key, child, same)
            here = Range(at, at + same)
            others = child.lock_ref > (child.id in locked)
            taken = self._take_over(child, here, own, open_rows, others=others)
            left = own[here.start : here.stop] & ~taken
            # It goes on to read its own: what it repaired, or computed where the tree has a copy.
            nearer = (child.kvshare.open & ~open_rows[here.start : here.stop]).reshape(-1, page)
            private = left & (was_private[here.start : here.stop] | np.repeat(nearer.any(1), page))
            if ended:
                private[:] = False
            still_private[here.start : here.stop] = private
            gone = left & ~private
            if gone.any():
                which = to_device(torch.from_numpy(at + np.flatnonzero(gone)), row.slots.device)
                freed.append(row.slots[which].clone())
                row.slots[which] = child.value[which - at].to(row.slots.dtype)
            if taken.any():
                freed.append(self._swap(child, here, row, taken))
            child.last_access_time = time.monotonic()
            node, at = child, at + same
        text = as_tokens(tokens)
        pieces = self._pieces(space, plan, text, at, stop)
        depths = depths_after(plan, (piece.stop for piece in pieces))
        for piece, depth in zip(pieces, depths, strict=True):
            value = row.slots[piece.start : piece.stop].to(dtype=torch.int64, copy=True)
            part = key[piece.start - exact : piece.stop - exact]
            _, node = cache._insert_helper(node, part, value)
            cache.sync.added_blended(
                node,
                space=space,
                start=piece.start,
                depth=depth,
                open_rows=open_rows[piece.start : piece.stop],
                source_depth=piece.depth if piece.chunk else None,
                before=text[: piece.new],
            )
            cache.copies.note(node)
            if piece.chunk is not None:
                cache.fuzzy.remember_chunk(piece.chunk, node.kvshare.segment)
        for slots in freed:
            cache.token_to_kv_pool_allocator.free(slots.to(torch.int64))
        return node, Rows.where(still_private)

    def _take_over(
        self,
        node: "TreeNode",
        here: Range,
        own: np.ndarray,
        open_rows: np.ndarray,
        *,
        others: bool,
    ) -> np.ndarray:
        """Which rows of ``node``, at ``here``, the tree takes over from the request: whole pages of
        its own that close rows and open none. Changes the node's open rows. bool [len]."""
        theirs, ours = node.kvshare.open, open_rows[here.start : here.stop]
        mine = own[here.start : here.stop]
        page = self._cache.page_size
        if others or not mine.any():
            return np.zeros(here.num, bool)
        closes, opens = theirs & ~ours, ours & ~theirs
        better = closes.reshape(-1, page).any(1) & ~opens.reshape(-1, page).any(1)
        taken = np.repeat(better & mine.reshape(-1, page).all(1), page)
        node.kvshare.open = np.where(taken, ours, theirs)
        return taken

    def _swap(self, node: "TreeNode", here: Range, row: Row, taken: np.ndarray) -> torch.Tensor:
        """The node's slots that go; the request's come in their place."""
        which = to_device(torch.from_numpy(np.flatnonzero(taken)), node.value.device)
        old = node.value[which].clone()
        node.value[which] = row.slots[here.start + which].to(node.value.dtype)
        return old

    def _pieces(
        self, namespace: object, plan: ReusePlan, text: Tokens, start: int, stop: int
    ) -> list[_Piece]:
        """Prompt ``[start, stop)`` in nodes: new text that may be a source, in chunks, each a node
        of its own, so that eviction takes a stretch from its end; and all between them."""
        cache, page = self._cache, self._cache.page_size
        space = cache.sync.space_of(namespace)
        sources: list[_Piece] = []
        for stretch in fresh_stretches(plan, stop, max_depth=cache.config.source_depth):
            first = max(stretch.start, start)
            if first >= stretch.stop:
                continue
            found = cache.fuzzy.new_chunks(
                space, text[first : stretch.stop], depth=stretch.depth, bounds=self._bounds
            )
            for chunks in found:
                ranges = [Range(chunk.start, chunk.stop) for chunk in chunks]
                at, borders = page_borders(first, ranges, page=page)
                at = max(at, sources[-1].stop if sources else start)
                new = max(first + ranges[0].start, at)
                if borders[-1] - new < max(SPAN, page):
                    continue
                for chunk, border in zip(chunks, borders, strict=True):
                    if border > at:
                        piece = _Piece(at, border, chunk, stretch.depth, max(new, at))
                        sources.append(piece)
                        at = border
        return _with_gaps(sources, start, stop)


def _with_gaps(sources: Sequence[_Piece], start: int, stop: int) -> list[_Piece]:
    """The sources, and what lies between them in ``[start, stop)``.

    >>> [(p.start, p.stop) for p in _with_gaps([_Piece(4, 6)], 2, 9)]
    [(2, 4), (4, 6), (6, 9)]
    """
    out, at = [], start
    for piece in sources:
        if at < piece.start:
            out.append(_Piece(at, piece.start))
        out.append(piece)
        at = piece.stop
    if at < stop:
        out.append(_Piece(at, stop))
    return out


def _under(key: "RadixKey", mine: BranchKey, start: int, stop: int) -> "RadixKey":
    return versions.make_key(key.token_ids[start:stop], None, extra_key=mine)


def _next(node: "TreeNode", key: "RadixKey", at: int, page: int) -> tuple[Any, int]:
    """The child of ``node`` that goes on like ``key`` from ``at`` on, None if none does, and for
    how many tokens. O(tokens of the child), not of what is left of the key."""
    child = node.children.get(key[at : at + page].child_key(page))
    if child is None:
        return None, 0
    return child, child.key.match(key[at : at + len(child.key)], page_size=page)


def _path(node: Any) -> set[int]:
    """Ids of a node and all above it."""
    ids = set()
    while node is not None:
        ids.add(node.id)
        node = node.parent
    return ids
