"""Lock the text that a request copies, and let it go: when it is copied, or when memory is short.

Two books must agree: lock references on SGLang's tree nodes, which keep them from eviction, and
the fuzzy tree's pins, which refuse to trim what is pinned.
"""

import logging
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from kvshare_sglang.plan import Join
from kvshare_sglang.policy.admit import Decline
from kvshare_sglang.runtime.cache.eviction import Usage, is_next_turn
from kvshare_sglang.runtime.request import RequestReuse

if TYPE_CHECKING:
    from sglang.srt.mem_cache.radix_cache import TreeNode

    from kvshare_sglang.runtime.cache.radix import FuzzyRadixCache

logger = logging.getLogger(__name__)


class Sources:
    """What requests between admission and their last copy hold."""

    def __init__(self, cache: "FuzzyRadixCache", usage: Usage) -> None:
        self._cache, self._usage = cache, usage
        self._holders: dict[int, RequestReuse] = {}  # by identity

    def lock(self, state: RequestReuse) -> None:
        """Keep the sources of a plan from eviction, and read their slots."""
        assert state.plan is not None
        cache = self._cache
        self._holders[id(state)] = state
        slots = []
        for run in state.plan.runs:
            pieces = [
                (node, lo, hi)
                for segment, start, stop in cache.fuzzy.pieces(run)
                for node, lo, hi in segment.payload.covering(start, stop)
            ]
            last, _, end = pieces[-1]
            new = state.plan.prompt_len - run.dst_stop - cache.page_size
            goes_on = run.join is not Join.SEAM and end == len(last.value)
            own = goes_on and is_next_turn(last, new=new)
            for node, lo, hi in reversed(pieces):
                own = own and self._usage.is_own(node)
                state.touched.append((node, 0.0 if own else (hi - lo) / len(node.value)))
            slots += [node.value[lo:hi] for node, lo, hi in pieces]
            pin = cache.fuzzy.pin(run)
            cache.copies.hold(last)
            state.locked.append((pin, last))
        state.src_slots = torch.cat(slots) if slots else None

    def note_use(self, state: RequestReuse, *, again: bool) -> None:
        """The request was admitted: its sources, locked a moment ago, are used. ``again``: as they
        were before it was retracted."""
        now = time.monotonic()
        for node, share in state.touched:
            node.last_access_time = now
            if not again:
                self._usage.touch(node, share)
        state.touched.clear()

    def unlock(self, state: RequestReuse) -> None:
        """Let the sources go; safe to call again."""
        for pin, node in state.locked:
            self._cache.fuzzy.unpin(pin)
            self._cache.copies.let_go(node)
        state.locked.clear()
        state.touched.clear()
        self._holders.pop(id(state), None)

    def give_back(self) -> bool:
        """Unlock the sources of all requests in mid-prefill; False if there are none.

        What they have not copied yet they will compute: memory is short, and reuse must not cost
        another request its place.
        """
        holders = [state for state in self._holders.values() if state.reuses and state.locked]
        for state in holders:
            self.unlock(state)
            state.stop_copying(Decline.NO_ROOM)
        return bool(holders)

    def held(self) -> "Iterator[TreeNode]":
        """Each node that is held, once for each hold. For checks."""
        return (node for state in self._holders.values() for _, node in state.locked)

    def forget(self) -> None:
        """The tree was flushed: what was locked is gone, and so are the pins."""
        for state in self._holders.values():
            state.locked.clear()
        self._holders.clear()
