"""FuzzyRadixCache: SGLang's radix tree, plus the fuzzy tree kept in step with it. Root layer.

The plain branch of the tree holds exact KV only. A request that reused anything is exact up to
``exact_len``: only that much of it enters the plain branch. Of the rest, stretches of fresh text
are stored under *tagged* keys, which no prefix walk can follow because the tag is an object that
no request can name; only the fuzzy index leads there. Copies are never stored: their sources are.
"""

import bisect
import dataclasses
import logging
import secrets
import time
from array import array
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from sglang.srt.mem_cache.base_prefix_cache import (
    EvictParams,
    EvictResult,
    MatchPrefixParams,
)
from sglang.srt.mem_cache.evict_policy import EvictionStrategy
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey, TreeNode

from kvshare_sglang import compat
from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.errors import SeamError
from kvshare_sglang.policy.gate import Decline
from kvshare_sglang.policy.worth import NEW, rank, used
from kvshare_sglang.radix_fuzzy.chunks import Bounds
from kvshare_sglang.radix_fuzzy.fingerprints import SPAN, Tokens
from kvshare_sglang.radix_fuzzy.reuse import keep_before
from kvshare_sglang.radix_fuzzy.tree import FuzzyTree
from kvshare_sglang.radix_fuzzy.types import Range, complement
from kvshare_sglang.report import Report
from kvshare_sglang.request import RequestReuse, reuse_of, turn_exact

logger = logging.getLogger(__name__)


class TaggedKey:
    """The ``extra_key`` of inexact KV. Equal only to itself, so no user's key is ever equal."""

    __slots__ = ("context", "depth", "namespace", "start")

    def __init__(self, namespace: object, *, start: int, depth: int, context: int) -> None:
        self.namespace, self.start, self.depth = namespace, start, depth
        self.context = context  # FuzzyTree.context_of what stood before


class Nodes:
    """The tree nodes that hold one segment: node i starts at path position ``starts[i]``."""

    __slots__ = ("nodes", "starts")

    def __init__(self, start: int, node: TreeNode) -> None:
        self.starts, self.nodes = [start], [node]

    def split(self, start: int, upper: TreeNode, *, at: int) -> None:
        """The node at ``start`` became ``upper`` and, from ``at`` on, its lower rest."""
        i = bisect.bisect_left(self.starts, start)
        self.starts.insert(i + 1, at)
        self.nodes.insert(i, upper)

    def drop_last(self) -> None:
        self.starts.pop()
        self.nodes.pop()

    def covering(self, start: int, stop: int) -> Iterator[tuple[TreeNode, int, int]]:
        """``(node, lo, hi)``: offsets in each node's value that hold ``[start, stop)``."""
        i = bisect.bisect_right(self.starts, start) - 1
        while i < len(self.nodes) and self.starts[i] < stop:
            base = self.starts[i]
            size = len(self.nodes[i].key)
            yield self.nodes[i], max(start - base, 0), min(stop - base, size)
            i += 1


class ByWorth(EvictionStrategy):
    """Evict first what was used least, then what was used longest ago."""

    def __init__(self, cache: "FuzzyRadixCache") -> None:
        self._cache = cache

    def get_priority(self, node: TreeNode) -> tuple[int, float]:
        return rank(node.kvshare_worth, now=self._cache.turnover), node.last_access_time


class FuzzyRadixCache(RadixCache):
    """SGLang's RadixCache with a fuzzy index over all that it holds."""

    def __init__(self, params: Any, *, config: KVShareConfig, report: Report) -> None:
        self.config = config
        self.report = report
        self.fuzzy = FuzzyTree(secret=secrets.randbits(64))
        self._holders: dict[int, RequestReuse] = {}  # states that hold locks, by identity
        self._adopted: dict[int, list[Range]] = {}  # req_pool_idx -> what the tree took over
        self.turnover = 0.0  # tokens taken in, in units of the pool's size
        super().__init__(params)
        if config.eviction == "worth":
            self.eviction_strategy = ByWorth(self)

    # ---- the fuzzy tree follows every change of the exact one -----------------------------

    def reset(self) -> None:
        super().reset()
        # The nodes that were locked are gone with the tree, and so are the pins.
        for state in self._holders.values():
            state.locked.clear()
        self._holders.clear()
        self.fuzzy.clear()
        self._adopted.clear()

    def _insert_helper(
        self, node: TreeNode, key: RadixKey, value: Any, *args: Any, **kw: Any
    ) -> Any:
        prefix_len, last_node = result = super()._insert_helper(node, key, value, *args, **kw)
        if prefix_len < len(key):
            self._note_new_node(last_node)
        return result

    def _split_node(self, key: RadixKey, child: TreeNode, split_len: int) -> TreeNode:
        upper = super()._split_node(key, child, split_len)
        segment, start = upper.kvshare = child.kvshare
        child.kvshare = segment, start + split_len
        segment.payload.split(start, upper, at=start + split_len)
        upper.kvshare_worth = child.kvshare_worth
        return upper

    def _delete_leaf(self, node: TreeNode) -> None:
        super()._delete_leaf(node)
        segment, start = node.kvshare
        segment.payload.drop_last()
        self.fuzzy.trim(segment.id, start)

    def _note_new_node(self, node: TreeNode) -> None:
        tag = node.key.extra_key
        start = depth = context = 0
        space: object = compat.namespace(node.key)
        if isinstance(tag, TaggedKey):
            start, depth, space, context = tag.start, tag.depth, tag.namespace, tag.context
        parent = None
        if node.parent is not self.root_node:
            segment, start = node.parent.kvshare
            parent, start = segment.id, start + len(node.parent.key)
        segment = self.fuzzy.insert(
            space,
            as_tokens(node.key.token_ids),
            start=start,
            parent=parent,
            depth=depth,
            context=context,
        )
        segment.payload = Nodes(start, node)
        node.kvshare = segment, start
        node.kvshare_worth = NEW
        self.turnover += len(node.key) / self.token_to_kv_pool_allocator.size

    def evict(self, params: EvictParams) -> EvictResult:
        """Where all that may be evicted is not enough, sources are given back and evicted too:
        SGLang is about to allocate, and raises when it falls short."""
        result = super().evict(params)
        short = params.num_tokens - result.num_tokens_evicted
        if short > 0 and self.yield_sources():
            more = super().evict(dataclasses.replace(params, num_tokens=short))
            result.num_tokens_evicted += more.num_tokens_evicted
        return result

    # ---- what a request leaves behind ------------------------------------------------------

    def checkpoint(self, req: Any, *, up_to: int, **kw: Any) -> None:
        """SGLang 0.5.22 and later: for a request that goes on, and for one that has ended."""
        if (state := reuse_of(req)) is None or self.disable:
            super().checkpoint(req, up_to=up_to, **kw)
        elif req.finished():
            compat.kv_row(req).cache_protected_len = self._store(req, state, up_to)
        else:
            self._keep_exact_part(req, state, chunked=False)

    def cache_unfinished_req(self, req: Any, chunked: bool = False, **kw: Any) -> None:
        """SGLang up to 0.5.21."""
        if (state := reuse_of(req)) is None or self.disable:
            super().cache_unfinished_req(req, chunked=chunked, **kw)
        else:
            self._keep_exact_part(req, state, chunked=chunked)

    def _keep_exact_part(self, req: Any, state: RequestReuse, *, chunked: bool) -> None:
        row = compat.kv_row(req)
        fill_ids = req.get_fill_ids()
        kv_indices = self.req_to_token_pool.req_to_token[row.req_pool_idx, : len(fill_ids)]
        key = self._insert_exact_part(req, state, fill_ids, chunked=chunked)
        match = self.match_prefix(MatchPrefixParams(key=key))
        exact = compat.path_slots(self, match)
        assert len(exact) == len(key), f"{len(exact)=} {len(key)=}"
        self.req_to_token_pool.write(
            (row.req_pool_idx, slice(row.cache_protected_len, len(exact))),
            exact[row.cache_protected_len :],
        )
        row.cache_protected_len = len(exact)
        # Everything behind the exact part stays the request's own.
        slots = torch.cat([exact, kv_indices[len(exact) :].to(exact.dtype)])
        compat.move_lock(self, req, match.last_device_node, slots)

    def insert_req(self, req: Any, *, up_to: int, **kw: Any) -> None:
        """SGLang 0.5.18 to 0.5.21: keep what can be kept; the caller frees the rest."""
        if (state := reuse_of(req)) is None or self.disable:
            super().insert_req(req, up_to=up_to, **kw)
            return
        row = compat.kv_row(req)
        row.cache_protected_len = self._store(req, state, up_to)

    def free_kv_row(self, kv: Any, ranges: list[tuple[int, int]]) -> None:
        """Give back slots, except those that the tree took over a moment ago."""
        adopted = self._adopted.get(kv.req_pool_idx)
        if adopted:
            ranges = [
                (left.start, left.stop)
                for start, stop in ranges
                for left in complement(
                    [r for r in adopted if start <= r.start and r.stop <= stop],
                    start=start,
                    stop=stop,
                )
            ]
        super().free_kv_row(kv, ranges)

    def on_release(self, req: Any, **kw: Any) -> None:
        super().on_release(req, **kw)
        self.release(req)

    def cache_finished_req(self, req: Any, is_insert: bool = True, **kw: Any) -> None:
        """SGLang 0.5.17: keep what can be kept and free the rest."""
        state = reuse_of(req)
        if state is None or self.disable:
            super().cache_finished_req(req, is_insert=is_insert, **kw)
        else:
            up_to = kw["kv_len_to_handle"]
            row = compat.kv_row(req)
            kept = row.cache_protected_len
            if is_insert:
                kept = self._store(req, state, up_to)
            adopted = self._adopted.get(row.req_pool_idx, [])
            kv_indices = self.req_to_token_pool.req_to_token[row.req_pool_idx, :up_to]
            self.token_to_kv_pool_allocator.free_segments(
                [(kv_indices[a:b], a) for a, b in complement(adopted, start=kept, stop=up_to)]
            )
            if req.last_node is not None:
                self.dec_lock_ref(req.last_node)
        self.release(req)

    def _store(self, req: Any, state: RequestReuse, up_to: int) -> int:
        """Store the exact part and the fresh stretches of a finished request; the exact length."""
        token_ids = (req.origin_input_ids + req.output_ids)[:up_to]
        key = self._insert_exact_part(req, state, token_ids, chunked=False)
        self._adopted[compat.kv_row(req).req_pool_idx] = self._adopt(req, state, token_ids)
        return len(key)

    def _insert_exact_part(
        self, req: Any, state: RequestReuse, token_ids: Any, *, chunked: bool
    ) -> RadixKey:
        """Put ``[0, exact_len)`` in the plain branch and free the slots it had already."""
        assert state.plan is not None
        row = compat.kv_row(req)
        exact_len = min(state.plan.exact_len, len(token_ids)) // self.page_size * self.page_size
        key = compat.make_key(token_ids[:exact_len], req)
        slots = self.req_to_token_pool.req_to_token[row.req_pool_idx, :exact_len]
        result = self.insert(
            compat.insert_params(key, slots.to(dtype=torch.int64, copy=True), req, chunked=chunked)
        )
        self.token_to_kv_pool_allocator.free_segment(
            slots[row.cache_protected_len : result.prefix_len],
            start_pos=row.cache_protected_len,
        )
        return key

    def _adopt(self, req: Any, state: RequestReuse, token_ids: Any) -> list[Range]:
        """Store fresh text behind the exact part under tagged keys; the row ranges taken over.

        The text is cut into chunks; chunks that are stored already at this depth or less are left
        out. Each chunk is a node of its own, so that eviction takes a stretch from its end.
        """
        assert state.plan is not None
        plan, page = state.plan, self.page_size
        space = compat.namespace(req)
        tokens = as_tokens(token_ids)
        runs = [Range(run.dst_start, run.dst_stop) for run in plan.runs]
        config = self.config
        bounds = Bounds(config.chunk_min, config.chunk_target, config.chunk_max)
        taken: list[Range] = []
        for start, stop in complement(runs, start=plan.exact_len, stop=len(tokens)):
            before = [run.depth_behind for run in plan.runs if run.dst_stop <= start]
            if not before or (depth := max(before)) > config.source_depth:
                continue
            fresh = tokens[start:stop]
            for chunks in self.fuzzy.unknown_chunks(space, fresh, depth=depth, bounds=bounds):
                a = start + chunks[0].start
                first = -(-a // page) * page
                borders = [(start + chunk.stop) // page * page for chunk in chunks]
                if borders[-1] - first < max(SPAN, page):
                    continue
                context = self.fuzzy.context_of(tokens[:first])
                key_of = TaggedKey(space, start=first, depth=depth, context=context)
                slots = self.req_to_token_pool.req_to_token[compat.kv_row(req).req_pool_idx]
                node, at = self.root_node, first
                for chunk, border in zip(chunks, borders, strict=True):
                    if border <= at:
                        continue
                    # Nothing is under a new tag yet: each chunk hangs on the one before, and the
                    # chain is not walked again.
                    key = compat.make_key(token_ids[at:border], req, extra_key=key_of)
                    value = slots[at:border].to(dtype=torch.int64, copy=True)
                    _, node = self._insert_helper(node, key, value)
                    self.fuzzy.remember_chunk(chunk, node.kvshare[0])
                    at = border
                taken.append(Range(first, borders[-1]))
        return taken

    # ---- sources -----------------------------------------------------------------------------

    def lock_sources(self, state: RequestReuse) -> None:
        """Keep the sources of a plan from eviction, and read their slots."""
        assert state.plan is not None
        self._holders[id(state)] = state
        slots = []
        for run in state.plan.runs:
            last = None
            for segment, start, stop in self.fuzzy.pieces(run):
                for node, lo, hi in segment.payload.covering(start, stop):
                    slots.append(node.value[lo:hi])
                    state.used.append((node, (hi - lo) / len(node.value)))
                    last = node
            pin = self.fuzzy.pin(run)
            self.inc_lock_ref(last)
            state.locked.append((pin, last))
        state.src_slots = torch.cat(slots)

    def note_use(self, state: RequestReuse) -> None:
        """The request was admitted: its sources, locked a moment ago, are used."""
        now = time.monotonic()
        for node, share in state.used:
            node.last_access_time = now
            self._use(node, share)
        state.used.clear()

    def note_prefix_hit(self, node: TreeNode) -> None:
        """The path to ``node`` serves a request as its exact prefix."""
        while node is not self.root_node:
            self._use(node, 1.0)
            node = node.parent

    def _use(self, node: TreeNode, amount: float) -> None:
        node.kvshare_worth = used(node.kvshare_worth, amount, now=self.turnover)

    def unlock_sources(self, state: RequestReuse) -> None:
        """Let the sources go; safe to call again."""
        for pin, node in state.locked:
            self.fuzzy.unpin(pin)
            self.dec_lock_ref(node)
        state.locked.clear()
        self._holders.pop(id(state), None)

    def yield_sources(self) -> bool:
        """Give back the sources of requests that are in mid-prefill; False if there are none.

        What they have not copied yet they will compute: memory is short, and reuse must not cost
        another request its place.
        """
        holders = [state for state in self._holders.values() if state.plan is not None]
        for state in holders:
            assert state.plan is not None
            self.unlock_sources(state)
            state.plan = keep_before(state.plan, state.done)
            if not state.plan.copies:
                turn_exact(state, Decline.NO_ROOM, self.report)
        return bool(holders)

    def release(self, req: Any) -> None:
        """Forget a request that finished, was aborted or retracted."""
        state: RequestReuse | None = getattr(req, "kvshare", None)
        if state is not None:
            self.unlock_sources(state)
            req.kvshare = None
        row = compat.kv_row(req)
        if row.req_pool_idx is not None:
            self._adopted.pop(row.req_pool_idx, None)

    # ---- invariants --------------------------------------------------------------------------

    def check(self) -> None:
        """Restate how the two trees agree; AssertionError on the first that does not hold."""
        self.fuzzy.check()
        seen: set[int] = set()
        total = 0
        stack = list(self.root_node.children.values())
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            segment, start = node.kvshare
            total += len(node.key)
            seen.add(segment.id)
            assert segment is self.fuzzy.segment(segment.id)
            held = segment.payload.nodes[segment.payload.starts.index(start)]
            assert held is node
            have = self.fuzzy.path_tokens(segment.id, start, start + len(node.key))
            assert have.tolist() == as_tokens(node.key.token_ids).tolist()
            # Inexact KV stands under tagged keys only, and exact KV never does.
            assert (segment.depth > 0) == isinstance(node.key.extra_key, TaggedKey)
        assert total == self.fuzzy.num_tokens
        assert len(seen) == self.fuzzy.num_segments


def as_tokens(token_ids: Any) -> Tokens:
    """SGLang's ``array('q')`` (or any ints) as int32 [n]."""
    if isinstance(token_ids, array) and token_ids.typecode == "q":
        return np.frombuffer(token_ids, dtype=np.int64).astype(np.int32)
    return np.asarray(token_ids, dtype=np.int64).astype(np.int32)


def build_cache(ctx: Any) -> FuzzyRadixCache:
    """What SGLang calls for ``--radix-cache-backend kvshare``.

    Raises SeamError or UnsupportedError rather than build a cache without the rest of us.
    """
    from kvshare_sglang import copying, hooks

    config = getattr(ctx.server_args, "_kvshare", None)
    if config is None:
        raise SeamError(["ServerArgs._kvshare (give --kvshare, not --radix-cache-backend)"])
    if gone := hooks.missing():
        raise SeamError(gone)
    copying.check_model(ctx.tp_worker.model_runner, ctx)
    labels = None
    if ctx.server_args.enable_metrics:
        args = ctx.server_args
        labels = {"model_name": str(args.served_model_name or args.model_path)}
    logger.info("KVShare is on: %s", config)
    return FuzzyRadixCache(ctx.params, config=config, report=Report(prometheus_labels=labels))
