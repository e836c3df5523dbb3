"""FuzzyRadixCache: SGLang's RadixCache with a fuzzy index over all that it holds.

The plain branch of the tree holds exact KV only. A request that reused anything is exact up to
``exact_len``: that much of it enters the plain branch. The rest hangs there in a *blended* branch,
whose key no request can name; requests that accept reuse are led over (``branches.py``). New text
of blended branches may be a source for others; copies never are: their sources are.

This class only says where SGLang's tree changes; the parts in this folder say what follows.
"""

import dataclasses
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from sglang.srt.mem_cache.base_prefix_cache import EvictParams, EvictResult, MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey, TreeNode

from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.policy.select.base import Selector
from kvshare_sglang.radix_fuzzy.tree import FuzzyTree
from kvshare_sglang.runtime import versions
from kvshare_sglang.runtime.cache.branches import Branches
from kvshare_sglang.runtime.cache.copies import Copies
from kvshare_sglang.runtime.cache.eviction import ByFrequency, Usage
from kvshare_sglang.runtime.cache.index_sync import NOBODYS, BranchKey, IndexSync, named
from kvshare_sglang.runtime.cache.pins import Pins
from kvshare_sglang.runtime.cache.queue import WaitingQueue
from kvshare_sglang.runtime.cache.retain import Retainer
from kvshare_sglang.runtime.cache.sources import Sources
from kvshare_sglang.runtime.report import Fallback, Report
from kvshare_sglang.runtime.request import RequestReuse, reuse_of, told
from kvshare_sglang.runtime.shadow import Shadow

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


AHEAD = 256  # this part of the pool is the least that an eviction frees


@dataclasses.dataclass(frozen=True)
class Choosing:
    """Who chooses rows on this server: the selector asked for, the one that serves every prompt,
    and why the first serves none here, if so."""

    asked: Selector
    structural: Selector
    unserved: Fallback | None = None


class FuzzyRadixCache(RadixCache):
    """What SGLang builds for ``--radix-cache-backend kvshare``."""

    def __init__(
        self,
        params: Any,
        *,
        config: KVShareConfig,
        report: Report,
        choosing: Choosing,
        shadow: Shadow,
        accepts: Callable[["Req"], bool],
    ) -> None:
        """``accepts``: whether a request may be served from KV that is not exact."""
        self.shadow = shadow
        self.config, self.report, self.choosing, self._accepts = config, report, choosing, accepts
        self.serves_adapters = False
        self._adapter_spaces: set[object] = set()  # by their short names
        self.fuzzy = FuzzyTree(secret=secrets.randbits(64), later=True)
        self.usage = Usage(params.token_to_kv_pool_allocator.size)
        self.sync = IndexSync(self.fuzzy)
        self.sources = Sources(self, self.usage)
        self.branches = Branches(self)
        self.copies = Copies(self)
        self.retainer = Retainer(self, self.branches)
        self.queue = WaitingQueue(self) if config.schedule == "kvshare" else None
        self.pins = Pins(self) if config.ttl else None
        super().__init__(params)
        if config.eviction == "frequency":
            self.eviction_strategy = ByFrequency(self.usage)

    # ---- the fuzzy tree follows every change of the exact one -----------------------------

    def reset(self) -> None:
        super().reset()
        if self.pins is not None:
            self.pins.forget(unlock=False)
        self.sources.forget()
        self.branches.forget()
        self.copies.forget()
        self._adapter_spaces.clear()
        self.fuzzy.clear()

    def new_weights(self) -> None:
        """Other weights than those that made what is here: SGLang may go on with its exact
        prefixes, if it was told not to flush; we neither copy from them nor lead into branches."""
        self.sources.give_back()
        if self.pins is not None:
            self.pins.forget(unlock=True)
        self.branches.forget()
        self.sync.new_weights()
        self.shadow.new_weights()
        if self.queue is not None:
            self.queue.new_weights()

    def match_prefix(self, params: MatchPrefixParams) -> Any:
        """SGLang's match; for a request that accepts it, a blended one that covers more."""
        match = super().match_prefix(params)
        req = params.req
        if self.disable or req is None:
            return match
        space = versions.namespace(req)
        # What an adapter computed is declined, see scheduler.py.
        if not self.branches.are_in(space) or self.is_adapters(space):
            return match
        if not self._accepts(req):  # asked last: for each waiting request, in every round
            return match
        return self.branches.step_over(params.key, match)

    def note_adapter(self, space: object) -> None:
        """An adapter computes in this namespace."""
        self._adapter_spaces.add(named(space))

    def is_adapters(self, space: object) -> bool:
        """Whether an adapter has computed in this namespace since all was flushed."""
        return bool(self._adapter_spaces) and named(space) in self._adapter_spaces

    def _insert_helper(
        self, node: TreeNode, key: RadixKey, value: Any, *args: Any, **kw: Any
    ) -> Any:
        prefix_len, last_node = result = super()._insert_helper(node, key, value, *args, **kw)
        if prefix_len < len(key):
            if not isinstance(key.extra_key, BranchKey):  # its parts say themselves what they are
                self.sync.added(last_node, self.root_node)
            self.usage.took_in(len(last_node.key))
        return result

    def _split_node(self, key: RadixKey, child: TreeNode, split_len: int) -> TreeNode:
        upper = super()._split_node(key, child, split_len)
        self.sync.split(upper, child, split_len)
        self.copies.note(upper)
        return upper

    def _delete_leaf(self, node: TreeNode) -> None:
        super()._delete_leaf(node)
        self.sync.removed(node)
        self.branches.removed(node)
        if self.pins is not None:
            self.pins.removed(node)

    def evict(self, params: EvictParams) -> EvictResult:
        """Where all that may be evicted is not enough, pins are given back and evicted too, then
        sources: SGLang is about to allocate, and raises when it falls short. A little more than is
        asked for goes at once, for each eviction looks at all leaves and copies."""
        ahead = min(self.token_to_kv_pool_allocator.size // AHEAD, self.evictable_size())
        result = self._evict(dataclasses.replace(params, num_tokens=max(params.num_tokens, ahead)))
        while (short := params.num_tokens - result.num_tokens_evicted) > 0 and (
            (self.pins is not None and self.pins.give_back(short)) or self.sources.give_back()
        ):
            more = self._evict(dataclasses.replace(params, num_tokens=short))
            result.num_tokens_evicted += more.num_tokens_evicted
        return result

    def _evict(self, params: EvictParams) -> EvictResult:
        """Cold copies that text hangs on go first."""
        started = time.perf_counter()
        if copies := self.copies.evict_cold(params.num_tokens):
            self.update_eviction_metrics(copies, started)
        result = super().evict(dataclasses.replace(params, num_tokens=params.num_tokens - copies))
        result.num_tokens_evicted += copies
        return result

    # ---- what a request leaves, in the words of each SGLang version -----------------------

    def checkpoint(self, req: "Req", *, up_to: int, **kw: Any) -> None:
        """0.5.22 and later: for a request that continues, and for one that has ended."""
        if (state := self._reusing(req)) is None:
            with self._made_by_those_of(req):
                super().checkpoint(req, up_to=up_to, **kw)
        elif req.finished():
            versions.kv_row(req).cache_protected_len = self.retainer.store(req, state, up_to)
        else:
            self.retainer.keep(req, state, chunked=False)

    def cache_unfinished_req(self, req: "Req", chunked: bool = False, **kw: Any) -> None:
        """Up to 0.5.21: for a request that continues."""
        if (state := self._reusing(req)) is None:
            with self._made_by_those_of(req):
                super().cache_unfinished_req(req, chunked=chunked, **kw)
        else:
            self.retainer.keep(req, state, chunked=chunked)

    def insert_req(self, req: "Req", *, up_to: int, **kw: Any) -> None:
        """0.5.18 to 0.5.21: for one that has ended; the caller frees the rest."""
        if (state := self._reusing(req)) is None:
            with self._made_by_those_of(req):
                super().insert_req(req, up_to=up_to, **kw)
        else:
            versions.kv_row(req).cache_protected_len = self.retainer.store(req, state, up_to)

    def on_release(self, req: "Req", **kw: Any) -> None:
        """0.5.18 and later: the row is freed."""
        super().on_release(req, **kw)
        self._ended(req)

    def cache_finished_req(self, req: "Req", is_insert: bool = True, **kw: Any) -> None:
        """0.5.17: for one that has ended; frees the rest itself."""
        state = self._reusing(req)
        if state is None:
            with self._made_by_those_of(req):
                super().cache_finished_req(req, is_insert=is_insert, **kw)
        else:
            up_to = kw["kv_len_to_handle"]
            row = versions.kv_row(req)
            start = row.cache_protected_len
            if is_insert:
                start = self.retainer.store(req, state, up_to)
            kv_indices = self.req_to_token_pool.req_to_token[row.req_pool_idx, :up_to]
            self.token_to_kv_pool_allocator.free_segments([(kv_indices[start:], start)])
            if req.last_node is not None:
                self.dec_lock_ref(req.last_node)
        self._ended(req)

    def _ended(self, req: "Req") -> None:
        """The row of a request is free, and its locks are gone."""
        self.release(req)
        if self.pins is not None and not self.disable:
            self.pins.ended(req)

    def release(self, req: "Req") -> None:
        """Forget a request that finished, was aborted or retracted, or is planned anew."""
        if self.queue is not None:
            self.queue.released(req)
        state: RequestReuse | None = getattr(req, "kvshare", None)
        if state is not None:
            self.let_go(req, state)
            # Retracted in the middle of its prompt: it is counted when it is through.
            through = bool(state.record) and told(state.record) >= len(req.origin_input_ids)
            state.release(goes_on=not (req.finished() or through))
            req.kvshare = None

    def let_go(self, req: "Req", state: RequestReuse) -> None:
        """Free what a request holds that is not admitted, or not as it was planned."""
        self.sources.unlock(state)
        self.retainer.release(req, state)

    def _made_by_those_of(self, req: "Req") -> AbstractContextManager[None]:
        """What the request leaves was made by the weights that it was admitted under. What its
        tokens do not tell is nobody's source."""
        state: RequestReuse | None = getattr(req, "kvshare", None)
        weights = self.sync.weights if state is None else state.weights
        if versions.brings_embeddings(req):
            weights = NOBODYS
        return self.sync.made_by(weights, answers_from=self.prompt_end(req))

    def prompt_end(self, req: "Req") -> int:
        """Where the last whole page of its prompt ends."""
        return len(req.origin_input_ids) // self.page_size * self.page_size

    def _reusing(self, req: "Req") -> RequestReuse | None:
        return None if self.disable else reuse_of(req)

    def check(self) -> None:
        """Restate how the two trees agree; AssertionError on the first that does not hold."""
        self.sync.check(self.root_node, page=self.page_size)
        self.copies.check()


def prometheus_labels(server_args: Any) -> Mapping[str, str] | None:
    """The labels of SGLang's own metrics, if it has any."""
    if not server_args.enable_metrics:
        return None
    return {"model_name": str(server_args.served_model_name or server_args.model_path)}
