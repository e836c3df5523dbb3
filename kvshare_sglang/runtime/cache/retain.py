"""What a request that reused leaves in the tree, and which of its slots the tree owns then.

::

    position   0 .......... exact_len ................................ up_to
    KV         | exact     | copy |recomputed| fresh | copy | fresh | output |
    in tree    | plain key | blended branch: fresh text and output may be sources  |
    slot owner | the tree  | the tree, once the prompt is through                  |

Before the request is released its prefix hit is in the tree already: ``[0, protected)`` is shared,
except rows that the request computes again in slots of their own (``RequestReuse.private``).
Slots that the request owns are freed by SGLang on release.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, MatchPrefixParams

from kvshare_sglang.plan import Rows
from kvshare_sglang.runtime import versions
from kvshare_sglang.runtime.cache.branches import Branches, Row
from kvshare_sglang.runtime.cache.index_sync import BranchKey
from kvshare_sglang.runtime.request import RequestReuse, Stage, settle_all

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.radix_cache import TreeNode

    from kvshare_sglang.runtime.cache.radix import FuzzyRadixCache


class Retainer:
    """Inserts what requests leave."""

    def __init__(self, cache: "FuzzyRadixCache", branches: Branches) -> None:
        self._cache, self._branches = cache, branches

    def keep(self, req: "Req", state: RequestReuse, *, chunked: bool) -> None:
        """The request continues: insert what will not change any more and move its lock there. In
        the middle of a prompt, and while decoding watches copies, that is the exact part: rows
        after it may be computed again."""
        cache = self._cache
        row = versions.kv_row(req)
        token_ids = req.get_fill_ids()
        slots = cache.req_to_token_pool.req_to_token[row.req_pool_idx, : len(token_ids)]
        if state.stage is Stage.COPIED:
            self._give_back_spare(state)  # nothing of the prompt runs any more
        if state.stage is Stage.COPIED and state.watch is None:
            node, protected = self._store(req, state, token_ids, ended=False)
        elif state.plan is not None and state.plan.blend:
            node, protected = req.last_node, row.cache_protected_len
        else:
            node, protected = self._store_exact_part(req, state, token_ids, chunked=chunked)
        row.cache_protected_len = protected
        versions.move_lock(cache, req, node, slots.to(torch.int64, copy=True))

    def store(self, req: "Req", state: RequestReuse, up_to: int) -> int:
        """The request has ended: insert all of it, in whole pages. Returns how much of its row the
        tree owns."""
        token_ids = (req.origin_input_ids + req.output_ids)[:up_to]
        return self._store(req, state, token_ids, ended=True)[1]

    def _store(
        self, req: "Req", state: RequestReuse, token_ids: Any, *, ended: bool
    ) -> tuple["TreeNode", int]:
        """Insert the exact part, and all behind it in a blended branch; what other weights than
        today's made is no blend that anyone may step into. The last node, and where it ends."""
        assert state.plan is not None
        cache, row = self._cache, versions.kv_row(req)
        old = state.weights != cache.sync.weights
        if old and row.cache_protected_len > state.plan.exact_len:
            return req.last_node, row.cache_protected_len  # its branch stays as far as it is
        above, exact_len = self._store_exact_part(req, state, token_ids, chunked=False)
        if old or not state.plan.inexact:
            return above, exact_len
        slots = cache.req_to_token_pool.req_to_token[row.req_pool_idx]
        still_open = state.plan.open - state.closed
        mine = Row(slots, row.cache_protected_len, state.private, still_open)
        with cache.sync.made_by(state.weights, answers_from=cache.prompt_end(req)):
            node, state.private = self._branches.store(
                req, state.plan, token_ids, mine, above, ended=ended
            )
        return node, len(token_ids) // cache.page_size * cache.page_size

    def _store_exact_part(
        self, req: "Req", state: RequestReuse, token_ids: Any, *, chunked: bool
    ) -> tuple["TreeNode", int]:
        """Put ``[0, exact_len)`` in the plain branch and take over the slots that it has already.
        The node where it ends, and where that is."""
        assert state.plan is not None
        cache, row = self._cache, versions.kv_row(req)
        page = cache.page_size
        exact_len = min(state.plan.exact_len, len(token_ids)) // page * page
        key = versions.make_key(token_ids[:exact_len], req)
        slots = cache.req_to_token_pool.req_to_token[row.req_pool_idx, :exact_len]
        protected = row.cache_protected_len
        if protected < exact_len:
            value = slots.to(dtype=torch.int64, copy=True)
            with cache.sync.made_by(state.weights, answers_from=cache.prompt_end(req)):
                result = cache.insert(versions.insert_params(key, value, req, chunked=chunked))
            if protected < result.prefix_len:
                cache.token_to_kv_pool_allocator.free_segment(
                    slots[protected : result.prefix_len], start_pos=protected
                )
        if protected > exact_len:  # all of it is in the tree, and blended text behind it
            return _above(req.last_node), exact_len
        match = cache.match_prefix(MatchPrefixParams(key=key))
        if protected < exact_len:
            exact = versions.path_slots(cache, match)
            assert len(exact) == exact_len, f"{len(exact)=} {exact_len=}"
            cache.req_to_token_pool.write(
                (row.req_pool_idx, slice(protected, exact_len)), exact[protected:]
            )
            row.cache_protected_len = exact_len
        return match.last_device_node, exact_len

    def reserve(self, req: "Req", state: RequestReuse, *, num: int) -> None:
        """Set free slots aside for ``num`` rows of the prefix hit that may run again: others may
        read the old ones. Where memory does not have them, nothing is repaired: no request that is
        in prefill gives its sources back for it."""
        if num:
            state.spare = self._free_slots(req, num * self._cache.page_size)

    def make_room(self, req: "Req", state: RequestReuse, rows: Rows) -> bool:
        """Set free slots aside for all of ``rows`` that the tree owns; False where memory does not
        have them."""
        page = self._cache.page_size
        shared = rows.clip(0, versions.kv_row(req).cache_protected_len) - state.private
        have = 0 if state.spare is None else len(state.spare)
        short = len(np.unique(shared.positions // page)) * page - have
        if short <= 0:
            return True
        more = self._free_slots(req, short)
        if more is not None:
            state.spare = more if state.spare is None else torch.cat([state.spare, more])
        return more is not None

    def make_exact(self, req: "Req", state: RequestReuse, length: int) -> None:
        """All rows behind its exact part ran, in slots of its own: the request goes on as one that
        never reused. What it hit of a branch is left to the others."""
        assert state.plan is not None
        cache, row = self._cache, versions.kv_row(req)
        exact_len = state.plan.exact_len
        row.cache_protected_len = min(
            row.cache_protected_len, exact_len // cache.page_size * cache.page_size
        )
        state.private = Rows()  # behind what is protected all are
        self._give_back_spare(state)
        slots = cache.req_to_token_pool.req_to_token[row.req_pool_idx, :length]
        versions.move_lock(cache, req, _above(req.last_node), slots.to(torch.int64, copy=True))
        settle_all(req, state, length - exact_len)

    def _free_slots(self, req: "Req", need: int) -> torch.Tensor | None:
        """So many, evicting what nobody holds if it must; None where that is not enough."""
        cache = self._cache
        allocator = cache.token_to_kv_pool_allocator
        if allocator.available_size() < need:
            cache.inc_lock_ref(req.last_node)  # not evicted to make room for its repair
            short = need - allocator.available_size()
            if short <= cache.evictable_size():
                cache.evict(EvictParams(num_tokens=short))
            cache.dec_lock_ref(req.last_node)
        return allocator.alloc(need) if allocator.available_size() >= need else None

    def release(self, req: "Req", state: RequestReuse) -> None:
        """The row is freed: so are the slots that the request has beside it."""
        if state.private:
            row = versions.kv_row(req)
            slots = self._cache.req_to_token_pool.req_to_token[row.req_pool_idx]
            private = torch.from_numpy(state.private.positions).to(slots.device)
            self._cache.token_to_kv_pool_allocator.free(slots[private].long())
            state.private = Rows()
        self._give_back_spare(state)

    def _give_back_spare(self, state: RequestReuse) -> None:
        if state.spare is not None and len(state.spare):
            self._cache.token_to_kv_pool_allocator.free(state.spare)
        state.spare = None


def _above(node: "TreeNode") -> "TreeNode":
    """The node at which the branch of a blended one hangs; a plain one itself."""
    while isinstance(node.key.extra_key, BranchKey):
        node = node.parent
    return node
