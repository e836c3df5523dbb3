"""Keep what a finished turn left from eviction until the turn that follows it, or its time is over.

A *turn* is a request that ended. It is watched at the tree node where its prompt ended: a request
whose prefix hit holds that node is its return. As long as its time to live it is also *pinned*: one
lock on the deepest node of its text, as running requests hold them. So admission waits rather than
evict it; what runs comes before it: where memory falls short, pins go first. Splits leave the lower
part of a node the same object, so both nodes stay what they are.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams

from kvshare_sglang.errors import ConfigError
from kvshare_sglang.policy.options import parse_options
from kvshare_sglang.policy.ttl import HORIZON, Learned
from kvshare_sglang.runtime import versions

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.radix_cache import TreeNode

    from kvshare_sglang.runtime.cache.radix import FuzzyRadixCache

logger = logging.getLogger(__name__)

MOST_TURNS = 4096  # that are watched


@dataclass(slots=True)
class Turn:
    """``prompt``: the node that is watched; ``last``: the one that is locked, None once it is not.
    Times are of the clock, in seconds."""

    prompt: "TreeNode"
    last: "TreeNode | None"
    ended: float
    until: float


class Pins:
    """The finished turns of one cache."""

    def __init__(
        self, cache: "FuzzyRadixCache", clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._cache, self.clock = cache, clock
        self.learned = Learned()
        self._turns: dict[int, Turn] = {}  # by id of the node that is watched, oldest first
        self.tokens = 0  # that are pinned, each once
        self._next = math.inf  # when the time of the next one is over

    @property
    def num(self) -> int:
        return sum(turn.last is not None for turn in self._turns.values())

    # ---- what requests do ----------------------------------------------------------------

    def ended(self, req: "Req") -> None:
        """A request was released: watch it, and pin what it left if that pays."""
        self.expire()
        reason = req.finished_reason
        if not req.finished() or reason is None or reason.to_json()["type"] == "abort":
            return
        try:
            self._watch(req)
        except Exception:
            # Its answer is done: a turn that is not kept must not end the server.
            logger.exception("KVShare could not keep what request %s left", req.rid)

    def came(self, req: "Req") -> None:
        """A request goes to prefill and holds its prefix hit: what it goes on from is back."""
        if not self._turns or req.last_node is None:
            return
        try:
            for node in self._path(req.last_node):
                turn = self._turns.pop(node.id, None)
                if turn is not None:
                    self._is_back(turn)
        except Exception:
            logger.exception("KVShare could not see which turn request %s goes on from", req.rid)

    # ---- what ends them ------------------------------------------------------------------

    def expire(self) -> None:
        """Let go of those whose time is over. O(1) until the next one's is, then O(turns)."""
        now = self.clock()
        if now < self._next:
            return
        for turn in list(self._turns.values()):
            if turn.last is not None and turn.until <= now:
                self._cache.report.pin("expired", self.tokens)
                self._unlock(turn)
            if turn.ended + HORIZON <= now and turn.last is None:
                self._is_over(turn)
        ends = (turn.ended + HORIZON for turn in self._turns.values() if turn.last is None)
        self._next = min([*ends, *(turn.until for turn in self._pinned())], default=math.inf)

    def give_back(self, tokens: int) -> bool:
        """Memory is short: unpin those turns that would be kept the shortest from now on, until so
        many tokens more can be evicted; False if there is none. They are still watched. O(turns log
        turns)."""
        pinned = sorted(self._pinned(), key=lambda turn: turn.until)
        enough = self._cache.evictable_size() + tokens
        for turn in pinned:
            self._cache.report.pin("given_back", self.tokens)
            self._unlock(turn)
            if self._cache.evictable_size() >= enough:
                break
        return bool(pinned)

    def removed(self, node: "TreeNode") -> None:
        """``node`` was evicted: its turn has not come back for so long as there was room for it,
        which is what keeping it would have bought."""
        if self._turns.pop(node.id, None) is not None:
            self.learned.gap(math.inf)

    def forget(self, *, unlock: bool) -> None:
        """All text is gone, and its locks with it, or nobody is to find it (``unlock``)."""
        for turn in self._turns.values() if unlock else ():
            self._unlock(turn)
        self._turns.clear()
        self.tokens = 0
        self._cache.report.pinned(0)

    # ---- inside --------------------------------------------------------------------------

    def _watch(self, req: "Req") -> None:
        stats = req.time_stats
        record = (req.customized_info or {}).get("kvshare")
        rows = sum(record[0][f"{kind}_tokens"] for kind in ("recomputed", "fresh")) if record else 0
        self.learned.served(
            wait=stats.forward_entry_time - stats.wait_queue_entry_time,
            prefill=stats.prefill_finished_time - stats.forward_entry_time,
            rows=rows,
        )
        cache = self._cache
        tokens = req.origin_input_ids + req.output_ids
        key = versions.make_key(tokens, req)
        last = prompt = cache.match_prefix(MatchPrefixParams(key=key, req=req)).last_device_node
        if last is cache.root_node:
            return
        border = cache.prompt_end(req)
        while prompt.kvshare.start >= border and prompt.parent is not cache.root_node:
            prompt = prompt.parent
        if (before := self._turns.pop(prompt.id, None)) is not None:
            self._unlock(before)  # the same prompt again
        now = self.clock()
        turn = self._turns[prompt.id] = Turn(prompt, None, now, now)
        self._next = min(self._next, now + HORIZON)
        ttl = self._asked(req)
        if ttl is None:
            ttl = self.learned.ttl(last.kvshare.start + len(last.key))
        if ttl > 0:
            self._pin(turn, last, now + ttl)
        while len(self._turns) > MOST_TURNS:
            self._is_over(next(iter(self._turns.values())))

    def _pinned(self) -> Iterator[Turn]:
        return (turn for turn in self._turns.values() if turn.last is not None)

    def _asked(self, req: "Req") -> float | None:
        """Seconds that the request asks for, as far as the server lets it; None: it does not."""
        try:
            asked = parse_options(req.sampling_params.custom_params).ttl
        except ConfigError:
            return None  # admission has said so
        return None if asked is None else min(asked, self._cache.config.ttl_longest)

    def _path(self, node: "TreeNode") -> Iterator["TreeNode"]:
        while node is not self._cache.root_node:
            yield node
            node = node.parent

    def _pin(self, turn: Turn, last: "TreeNode", until: float) -> None:
        cache = self._cache
        new = sum(len(node.key) for node in self._path(last) if not node.kvshare.pins)
        most = cache.config.ttl * cache.token_to_kv_pool_allocator.size
        if self.tokens + new > most:
            cache.report.pin("no_room", self.tokens)
            return
        for node in self._path(last):
            node.kvshare.pins += 1
        cache.inc_lock_ref(last)
        turn.last, turn.until = last, until
        self._next = min(self._next, until)
        self.tokens += new
        cache.report.pin("taken", self.tokens)
        cache.report.pinned(self.tokens)

    def _unlock(self, turn: Turn) -> None:
        if turn.last is None:
            return
        for node in self._path(turn.last):
            node.kvshare.pins -= 1
            if not node.kvshare.pins:
                self.tokens -= len(node.key)
        self._cache.dec_lock_ref(turn.last)
        turn.last = None
        self._cache.report.pinned(self.tokens)

    def _is_back(self, turn: Turn) -> None:
        if turn.last is not None:
            self._cache.report.pin("returned", self.tokens)
            self._unlock(turn)
        self.learned.gap(self.clock() - turn.ended)

    def _is_over(self, turn: Turn) -> None:
        """It is not watched any more: nobody came."""
        self.learned.gap(math.inf)
        self._unlock(turn)
        del self._turns[turn.prompt.id]
