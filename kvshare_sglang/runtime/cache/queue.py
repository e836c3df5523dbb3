"""Keep SGLang's waiting queue in the order of ``policy/schedule.py``; hold who waits for a twin.

Rows are counted as they are let in to prefill: by what admission knows of a request, not by what
was thought of it while it waited. So the bound holds for what is let in, however stale the order.
"""

import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from kvshare_sglang.policy.fair import Shares
from kvshare_sglang.policy.schedule import Ints, Order, Queue, Twins, cost_of, order
from kvshare_sglang.policy.waiting import Waiting, Words, in_sample, sample
from kvshare_sglang.runtime import versions
from kvshare_sglang.runtime.cache.index_sync import as_tokens
from kvshare_sglang.runtime.request import RequestReuse

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from kvshare_sglang.runtime.cache.radix import FuzzyRadixCache

logger = logging.getLogger(__name__)

LOOKUPS = 16384  # tokens of waiting prompts that are looked up in one round
ROOM = 16384  # rows of a batch where SGLang has no chunks, its --max-prefill-tokens


class WaitingQueue:
    """The order of one scheduler's waiting queue."""

    def __init__(self, cache: "FuzzyRadixCache") -> None:
        self._cache = cache
        self._bound = cache.config.schedule_bound
        self._reset()
        cache.fuzzy.listener = self._tree_changed

    def _reset(self) -> None:
        self._waiting = Waiting()
        quantum = self._cache.config.schedule_quantum
        self._shares = Shares(quantum) if quantum else None
        self._held: set[Req] = set()
        self._text: dict[Req, tuple[np.ndarray, Words]] = {}  # its sample: positions, hashes
        self._new: dict[Req, frozenset[int]] = {}  # a sample of what nothing is cached of
        self._tenants: dict[Req, Any] = {}
        self._started: dict[Req, int] = {}  # in prefill: tokens of the answer when it began

    # ---- in each round of SGLang's loop --------------------------------------------------

    def sort(self, queue: list["Req"], plan: Callable[["Req"], RequestReuse]) -> None:
        """Put ``queue`` in order, in place. ``plan``: what admission would look up."""
        try:
            self._follow(queue)
            budget = self._look_up(self._waiting.unknown, plan, LOOKUPS)
            found = self._order()
            near = [self._waiting.keys[i] for i in self._waiting.dirty(self._near(found))]
            if self._look_up(near, plan, budget) != budget:
                found = self._order()
        except Exception:
            # A queue out of order must fail no request; the fault is logged, not hidden.
            logger.exception("KVShare could not order the queue; this round it is SGLang's")
            self._reset()
            return
        keys = self._waiting.keys
        held = {keys[i] for i in found.held}
        self._cache.report.held(len(held - self._held), queued=len(keys))
        self._held = held
        queue[:] = [keys[i] for i in (*found.first, *found.held)]

    def must_wait(self, req: "Req", state: RequestReuse) -> bool:
        """Whether a request is for a later batch: it waits for a twin, or what it costs would
        overtake the oldest by more than the bound."""
        if req in self._held:
            return True
        if req not in self._waiting:
            return False
        cost = self._cost(req, state)
        self._waiting.costs(req, cost)
        oldest = int(self._places_of(req)[0])
        overtaken = self._waiting.overtaken_at(oldest)
        return self._waiting.place_of(req) != oldest and overtaken + cost > self._bound

    def admitted(self, req: "Req", state: RequestReuse) -> None:
        """A request goes to prefill."""
        if req not in self._waiting:
            return
        cost = self._cost(req, state)
        places = [self._waiting.place_of(one) for one in self._held]
        self._waiting.wait_for_twins(places, cost)
        most = self._waiting.let_in(req, cost, among=self._places_of(req))
        self._cache.report.overtaken(most)
        if self._shares is not None:
            self._shares.served(self._tenants[req], cost)
        new = self._new_of(req, state)
        self._waiting.computes(req, np.array(sorted(new), np.uint64))
        self._started[req] = len(req.output_ids)
        self._forget(req)

    def new_weights(self) -> None:
        """No text is known by the hashes that it had."""
        self._waiting.forget_texts()
        self._text.clear()
        self._new.clear()

    # ---- inside --------------------------------------------------------------------------

    def _follow(self, queue: list["Req"]) -> None:
        """Who came, who went, and whose prompt is through."""
        waiting = self._waiting
        here = set(queue)
        gone = [req for req in waiting.keys if req not in here]
        waiting.leave(gone)
        for req in gone:
            self._forget(req)
        new = [req for req in queue if req not in waiting]
        waiting.come((req, max(1, len(req.origin_input_ids) + len(req.output_ids))) for req in new)
        self._tenants |= {req: versions.namespace(req) for req in new}
        for req, begun in list(self._started.items()):
            if req.finished() or len(req.output_ids) > begun or req in waiting:
                waiting.computed(req)
                del self._started[req]

    def _forget(self, req: "Req") -> None:
        for notes in (self._text, self._new, self._tenants):
            notes.pop(req, None)

    def _look_up(
        self, reqs: Iterable["Req"], plan: Callable[["Req"], RequestReuse], budget: int
    ) -> int:
        """Look requests up, the first ones, for as many tokens as ``budget``, of which what is left
        is returned; 0 or less, and the others keep the cost that they had."""
        for req in reqs:
            if budget <= 0:
                break
            req.init_next_round_input(self._cache)
            req.kvshare = state = plan(req)
            if req not in self._text:
                self._read(req)
            self._new[req] = self._new_of(req, state)
            self._waiting.looked_up(
                req, cost=self._cost(req, state), twins=state.selector is not None
            )
            budget -= len(req.full_untruncated_fill_ids)
        return budget

    def _read(self, req: "Req") -> None:
        space = self._cache.sync.space_of(versions.namespace(req))
        marks = self._cache.fuzzy.marks(space, as_tokens(req.full_untruncated_fill_ids))
        some = in_sample(marks.hashes)
        self._text[req] = marks.positions[some], marks.hashes[some]
        self._waiting.note_text(req, np.unique(marks.hashes[some]))

    def _new_of(self, req: "Req", state: RequestReuse) -> frozenset[int]:
        """A sample of the request's text that nothing is cached of; none if it was never read."""
        if req not in self._text:
            return frozenset()
        positions, hashes = self._text[req]
        new = positions >= versions.prefix_len(req)
        if state.plan is not None:
            new &= ~state.plan.reused_rows.mask(state.plan.prompt_len)[positions]
        return frozenset(hashes[new].tolist())

    @staticmethod
    def _cost(req: "Req", state: RequestReuse) -> int:
        every = len(req.full_untruncated_fill_ids)
        rows, copied = every - versions.prefix_len(req), 0
        if state.plan is not None and state.plan.runs and state.selector is not None:
            rows = min(rows, state.selector.most_rows(state.plan, budget=state.budget))
            copied = every - versions.prefix_len(req) - rows
        return cost_of(rows=rows, copied=copied, tokens=every)

    def _places_of(self, req: "Req") -> Ints:
        """Where those wait that a request may overtake, by arrival: with fair shares, those of its
        own tenant; all others are kept from waiting too long by the turns."""
        every = np.arange(len(self._waiting))
        if self._shares is None:
            return every
        mine = self._tenants[req]
        return every[[self._tenants[one] == mine for one in self._waiting.keys]]

    def _order(self) -> Order:
        queue, keys = self._waiting.queue(bound=self._bound), self._waiting.keys
        every = np.arange(len(keys))
        if self._shares is None:
            return self._order_of(queue, every)
        places: dict[Any, list[int]] = {}
        for i, req in enumerate(keys):
            places.setdefault(self._tenants[req], []).append(i)
        found = {
            tenant: self._order_of(queue.only(np.array(mine)), np.array(mine))
            for tenant, mine in places.items()
        }
        costs = queue.cost.tolist()
        ready = {
            tenant: [(i, costs[i]) for i in mine.first]
            for tenant, mine in found.items()
            if mine.first
        }
        self._shares.wait(ready)
        first = self._shares.order(ready, room=self._room)
        return Order(first, [i for mine in found.values() for i in mine.held])

    def _order_of(self, queue: Queue, places: Ints) -> Order:
        """The order of those at ``places``, whose part of the queue is ``queue``."""
        config, keys = self._cache.config, self._waiting.keys
        twins = Twins(
            min_reuse=config.min_reuse,
            min_share=config.min_share,
            care=config.budget,
            text=lambda i: self._new.get(keys[places[i]], frozenset()),
            each=self._waiting.tokens_each[places],
        )
        found = order(queue, bound=self._bound, room=self._room, twins=twins)
        return Order(places[found.first].tolist(), places[found.held].tolist())

    @property
    def _room(self) -> int:
        return versions.chunk_size() or ROOM

    def _near(self, found: Order) -> list[int]:
        """Those of the first that the next batch may take."""
        room, near = self._room, []
        for i in found.first:
            near.append(i)
            room -= self._waiting.cost_at(i)
            if room <= 0:
                break
        return near

    def _tree_changed(self, hashes: Words | None) -> None:
        """Text of these hashes was inserted or trimmed; None: everything is gone."""
        if hashes is None:
            self._waiting.all_changed()
        elif len(self._waiting):
            self._waiting.changed(sample(hashes))
