"""What a request that reused leaves in the tree, and which of its slots the tree owns then.

::

    position   0 .......... exact_len ................................ up_to
    KV         | exact     | copy |recomputed| fresh | copy | fresh | output |
    in tree    | plain key |  -       -      |tagged |  -   |tagged | tagged |
    slot owner | the tree  | request         | tree  | req. | tree  | tree   |

Before the request is released its prefix hit is in the tree already: ``[0, protected)`` is shared.
Inserting the exact part takes over ``[protected, exact_len)``, except what another request has
inserted meanwhile, which is freed here. Slots that the request owns are freed by SGLang on release.
"""

from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams

from kvshare_sglang.plan import Range, Rows
from kvshare_sglang.policy.retain import Stretch, fresh_stretches, page_borders
from kvshare_sglang.radix_fuzzy.chunks import Bounds
from kvshare_sglang.radix_fuzzy.fingerprints import SPAN
from kvshare_sglang.runtime import versions
from kvshare_sglang.runtime.cache.index_sync import TaggedKey, as_tokens
from kvshare_sglang.runtime.request import RequestReuse

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.radix_cache import RadixKey

    from kvshare_sglang.runtime.cache.radix import FuzzyRadixCache


class Retainer:
    """Inserts what requests leave. ``kept`` remembers, until a row is freed, what of it the tree
    took over beside the exact part."""

    def __init__(self, cache: "FuzzyRadixCache") -> None:
        self._cache = cache
        config = cache.config
        self._bounds = Bounds(config.chunk_min, config.chunk_target, config.chunk_max)
        self._kept: dict[int, Rows] = {}  # by req_pool_idx

    @property
    def num_kept(self) -> int:
        return len(self._kept)

    def keep_exact_part(self, req: "Req", state: RequestReuse, *, chunked: bool) -> None:
        """The request continues: insert its exact part and move its lock there. All after the
        exact part stays the request's own."""
        cache = self._cache
        row = versions.kv_row(req)
        fill_ids = req.get_fill_ids()
        kv_indices = cache.req_to_token_pool.req_to_token[row.req_pool_idx, : len(fill_ids)]
        key = self._insert_exact_part(req, state, fill_ids, chunked=chunked)
        match = cache.match_prefix(MatchPrefixParams(key=key))
        exact = versions.path_slots(cache, match)
        assert len(exact) == len(key), f"{len(exact)=} {len(key)=}"
        cache.req_to_token_pool.write(
            (row.req_pool_idx, slice(row.cache_protected_len, len(exact))),
            exact[row.cache_protected_len :],
        )
        row.cache_protected_len = len(exact)
        slots = torch.cat([exact, kv_indices[len(exact) :].to(exact.dtype)])
        versions.move_lock(cache, req, match.last_device_node, slots)

    def store(self, req: "Req", state: RequestReuse, up_to: int) -> int:
        """The request has ended: insert its exact part and its fresh text. Returns the exact
        length; ``kept_of`` says what else of the row the tree owns, until it is freed."""
        token_ids = (req.origin_input_ids + req.output_ids)[:up_to]
        key = self._insert_exact_part(req, state, token_ids, chunked=False)
        self._kept[versions.kv_row(req).req_pool_idx] = self._store_fresh(req, state, token_ids)
        return len(key)

    def kept_of(self, req_pool_idx: int) -> Rows:
        return self._kept.get(req_pool_idx, Rows())

    def forget(self, req_pool_idx: int | None) -> None:
        """The row was freed."""
        if req_pool_idx is not None:
            self._kept.pop(req_pool_idx, None)

    def clear(self) -> None:
        self._kept.clear()

    def _insert_exact_part(
        self, req: "Req", state: RequestReuse, token_ids: Any, *, chunked: bool
    ) -> "RadixKey":
        """Put ``[0, exact_len)`` in the plain branch and free the slots it had already."""
        assert state.plan is not None
        cache, row = self._cache, versions.kv_row(req)
        page = cache.page_size
        exact_len = min(state.plan.exact_len, len(token_ids)) // page * page
        key = versions.make_key(token_ids[:exact_len], req)
        slots = cache.req_to_token_pool.req_to_token[row.req_pool_idx, :exact_len]
        value = slots.to(dtype=torch.int64, copy=True)
        result = cache.insert(versions.insert_params(key, value, req, chunked=chunked))
        cache.token_to_kv_pool_allocator.free_segment(
            slots[row.cache_protected_len : result.prefix_len],
            start_pos=row.cache_protected_len,
        )
        return key

    def _store_fresh(self, req: "Req", state: RequestReuse, token_ids: Any) -> Rows:
        """Insert newly computed text after ``exact_len`` under tagged keys. Returns the row ranges
        that the tree now owns."""
        assert state.plan is not None
        taken: list[Range] = []
        for stretch in fresh_stretches(
            state.plan, len(token_ids), max_depth=self._cache.config.source_depth
        ):
            taken += self._store_stretch(req, stretch, token_ids)
        return Rows(taken)

    def _store_stretch(self, req: "Req", stretch: Stretch, token_ids: Any) -> list[Range]:
        """One stretch, cut into chunks; chunks that are stored already at this depth or less are
        left out. Each chunk is a node of its own, so that eviction takes a stretch from its end.
        """
        cache, page = self._cache, self._cache.page_size
        space, tokens = versions.namespace(req), as_tokens(token_ids)
        slots = cache.req_to_token_pool.req_to_token[versions.kv_row(req).req_pool_idx]
        fresh = tokens[stretch.start : stretch.stop]
        taken = []
        for chunks in cache.fuzzy.new_chunks(
            space, fresh, depth=stretch.depth, bounds=self._bounds
        ):
            first, borders = page_borders(
                stretch.start, [Range(chunk.start, chunk.stop) for chunk in chunks], page=page
            )
            if borders[-1] - first < max(SPAN, page):
                continue
            tag = TaggedKey(
                space,
                start=first,
                depth=stretch.depth,
                context=cache.fuzzy.context_of(tokens[:first]),
            )
            node, at = cache.root_node, first
            for chunk, border in zip(chunks, borders, strict=True):
                if border <= at:
                    continue
                # Nothing is under a new tag yet: each chunk follows the one before, and the
                # chain is not walked again.
                key = versions.make_key(token_ids[at:border], req, extra_key=tag)
                value = slots[at:border].to(dtype=torch.int64, copy=True)
                _, node = cache._insert_helper(node, key, value)
                cache.fuzzy.remember_chunk(chunk, node.kvshare.segment)
                at = border
            taken.append(Range(first, borders[-1]))
        return taken
