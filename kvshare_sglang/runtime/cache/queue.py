"""Keep SGLang's waiting queue in the order of ``policy/schedule.py``; hold who waits for a twin.

Rows are counted as they are let in to prefill: by what admission knows of a request, not by what
was thought of it while it waited. So the bound holds for what is let in, however stale the order.
"""

import functools
import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar, cast

import numpy as np

from kvshare_sglang.policy.fair import Shares
from kvshare_sglang.policy.retain import future_sources
from kvshare_sglang.policy.schedule import (
    Ints,
    Order,
    Queue,
    Twins,
    cost_of,
    order,
    waits_for_prefill,
)
from kvshare_sglang.policy.select.base import Sees
from kvshare_sglang.policy.waiting import Waiting, Words, in_sample, sample
from kvshare_sglang.runtime import versions
from kvshare_sglang.runtime.cache.index_sync import as_tokens
from kvshare_sglang.runtime.request import RequestReuse

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from kvshare_sglang.runtime.cache.radix import FuzzyRadixCache

logger = logging.getLogger(__name__)

LOOKUPS = 16384  # tokens of waiting prompts after which no other is looked up in a round
ROOM = 16384  # rows of a batch where SGLang has no chunks, its --max-prefill-tokens
PERSISTENT = 8  # rounds that fail before the order stays SGLang's: with each, waits begin anew

NOTHING: frozenset[int] = frozenset()

P = ParamSpec("P")
R = TypeVar("R")
_Method = Callable[Concatenate["WaitingQueue", P], R]


def _guarded(otherwise: R) -> Callable[[_Method[P, R]], _Method[P, R]]:
    """A queue out of order must fail no request: a method that raises, or is called when the order
    is off, returns ``otherwise``. The fault is counted."""

    def wrap(method: _Method[P, R]) -> _Method[P, R]:
        @functools.wraps(method)
        def call(queue: "WaitingQueue", /, *args: P.args, **kw: P.kwargs) -> R:
            if queue.off:
                return otherwise
            try:
                return method(queue, *args, **kw)
            except Exception:
                queue.failed()
                return otherwise

        return call

    return wrap


class WaitingQueue:
    """The order of one scheduler's waiting queue. ``off``: it failed too often, and SGLang's own
    stands."""

    def __init__(self, cache: "FuzzyRadixCache") -> None:
        self._cache = cache
        self._bound = cache.config.schedule_bound
        self.off = False
        self._round, self._failed_in, self._failed_rounds = 0, -1, 0
        self._reset()
        cache.fuzzy.listener = self._tree_changed

    def _reset(self) -> None:
        self._waiting = Waiting()
        quantum = self._cache.config.schedule_quantum
        self._shares = Shares(quantum) if quantum else None
        self._held: set[Req] = set()  # they wait for a twin
        self._later: set[Req] = set()  # they go in a later round for other reasons
        self._hoped: dict[Req, int] = {}  # the twin is through: what they cost without it
        self._text: dict[Req, tuple[np.ndarray, Words]] = {}  # its sample: positions, hashes
        # Samples of what nothing is cached of, and what of that others may reuse from it.
        self._new: dict[Req, tuple[frozenset[int], frozenset[int]]] = {}
        self._tenants: dict[Req, Any] = {}
        # In prefill: tokens of the answer when it began, and what others may reuse from it.
        self._started: dict[Req, tuple[int, Words]] = {}

    def failed(self) -> None:
        """Called as a fault is handled. The first one is logged; the counts begin anew."""
        self._cache.report.schedule_failed()
        if self._failed_in < 0:
            logger.exception(
                "KVShare could not order the queue; this round it is SGLang's. Further faults are "
                "counted only"
            )
        if self._failed_in != self._round:
            self._failed_rounds += 1
            self._failed_in = self._round
        if self._failed_rounds >= PERSISTENT:
            self.off = True
            logger.error(
                "KVShare could not order the queue in %d rounds: from now on the order is "
                "first come, first served",
                PERSISTENT,
            )
        self._reset()

    # ---- in each round of SGLang's loop --------------------------------------------------

    @_guarded(None)
    def sort(self, queue: list["Req"], plan: Callable[["Req"], RequestReuse]) -> None:
        """Put ``queue`` in order, in place. ``plan``: what admission would look up."""
        self._round += 1
        self._follow(queue)
        budget = self._look_up(self._waiting.unknown, plan, LOOKUPS)
        found = self._order()
        # Held ones last: what those near the head cost now says whether they are held at all.
        for again in (self._near, self._in_vain):
            left = self._look_up(list(again(found)), plan, budget)
            if left != budget:
                found = self._order()
            budget = left
        keys = self._waiting.keys
        held = {keys[i] for i in found.held}
        self._cache.report.held(len(held - self._held), queued=len(keys))
        self._held, self._later = held, {keys[i] for i in found.later}
        self._waiting.wait(held)
        queue[:] = [keys[i] for i in (*found.first, *sorted([*found.held, *found.later]))]

    @_guarded(False)
    def must_wait(self, req: "Req", state: RequestReuse, *, alone: bool) -> bool:
        """Whether a request is for a later batch: it waits for a twin, or what it costs would
        overtake the oldest by more than the bound. ``alone``: nothing runs and nothing was let in,
        so there is no one to wait for, whatever was thought."""
        if not alone and (req in self._held or req in self._later):
            return True
        if req not in self._waiting:
            return False
        if not alone and req not in self._text and self._has_a_twin(req, state):
            return True
        cost = self._cost(req, state)
        self._waiting.costs(req, cost)
        oldest = int(self._places_of(req)[0])
        overtaken = self._waiting.overtaken_at(oldest)
        return self._waiting.place_of(req) != oldest and overtaken + cost > self._bound

    @_guarded(None)
    def admitted(self, req: "Req", state: RequestReuse) -> None:
        """A request goes to prefill."""
        if req not in self._waiting:
            return
        cost = self._cost(req, state)
        most = self._waiting.let_in(req, cost, among=self._places_of(req))
        self._cache.report.overtaken(most)
        if self._shares is not None:
            self._shares.served(self._tenants[req], cost)
        gives = np.array(sorted(self._new_of(req, state)[1]), np.uint64)
        if len(gives):
            self._waiting.computes(req, gives)
            self._started[req] = len(req.output_ids), gives
        self._forget(req)

    @_guarded(None)
    def released(self, req: "Req") -> None:
        """A request has ended, was aborted or retracted: it computes nothing."""
        if req in self._started:
            self._stops(req)

    @_guarded(None)
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
        self._tenants |= {req: versions.namespace(req) for req in new}
        waiting.come(
            (req, max(1, len(req.origin_input_ids) + len(req.output_ids)), self._group(req))
            for req in new
        )
        for req, (begun, _) in list(self._started.items()):
            if len(req.output_ids) > begun:
                self._stops(req)

    def _stops(self, req: "Req") -> None:
        """A request computes no prompt any more. If it is through, those that waited for it must
        cost less now: which do not is found out before they wait for the next one."""
        begun, gives = self._started.pop(req)
        self._waiting.computed(req)
        if self._held and len(req.output_ids) > begun:
            for one in self._waiting.that_wait_for(gives, self._cache.config.min_reuse):
                place = self._waiting.place_of(one)
                self._hoped.setdefault(cast("Req", one), self._waiting.cost_at(place))

    def _forget(self, req: "Req") -> None:
        for notes in (self._text, self._new, self._tenants, self._hoped):
            notes.pop(req, None)
        self._held.discard(req)
        self._later.discard(req)

    def _look_up(
        self, reqs: Iterable["Req"], plan: Callable[["Req"], RequestReuse], budget: int
    ) -> int:
        """Look requests up, the first ones, each whole, until ``budget`` tokens are done. What is
        left of it is returned; 0 or less, and the others keep the cost that they had."""
        for req in reqs:
            if budget <= 0:
                break
            req.init_next_round_input(self._cache)
            req.kvshare = state = plan(req)
            self._note(req, state)
            budget -= len(req.full_untruncated_fill_ids)
        return budget

    def _note(self, req: "Req", state: RequestReuse) -> None:
        """What was found of a request."""
        if req not in self._text:
            self._read(req)
        self._new[req] = self._new_of(req, state)
        cost = self._cost(req, state)
        reuses = state.selector is not None and state.budget < 1
        self._waiting.looked_up(req, cost=cost, twins=reuses)
        if cost >= self._hoped.pop(req, cost + 1):  # nothing came of its wait: the last one
            self._waiting.patient_for(req, self._bound)

    def _has_a_twin(self, req: "Req", state: RequestReuse) -> bool:
        """Whether one that admission looked up, for those before it took all that a round looks
        up, would wait for those in prefill. It does from now on."""
        self._note(req, state)
        place = np.array([self._waiting.place_of(req)])
        queue = self._waiting.queue(bound=self._bound).only(place)
        if not waits_for_prefill(queue, self._twins(place)).all():
            return False
        self._held.add(req)
        self._waiting.wait(self._held)
        self._cache.report.held(1, queued=len(self._waiting))
        return True

    def _read(self, req: "Req") -> None:
        space = self._cache.sync.space_of(versions.namespace(req))
        marks = self._cache.fuzzy.marks(space, as_tokens(req.full_untruncated_fill_ids))
        some = in_sample(marks.hashes)
        self._text[req] = marks.positions[some], marks.hashes[some]
        self._waiting.note_text(req, np.unique(marks.hashes[some]))

    def _new_of(self, req: "Req", state: RequestReuse) -> tuple[frozenset[int], frozenset[int]]:
        """A sample of the request's text that nothing is cached of, none if it was never read; and
        what of that others may reuse once it has computed it."""
        if req not in self._text:
            return NOTHING, NOTHING
        (positions, hashes), plan, config = self._text[req], state.plan, self._cache.config
        new = positions >= versions.prefix_len(req)
        if plan is None:
            every = frozenset(hashes[new].tolist())
            return every, every
        new &= ~plan.reused_rows.mask(plan.prompt_len)[positions]
        chooses = state.selector is not None and state.selector.sees is not Sees.NOTHING
        watched = bool(config.refresh_every) and chooses and plan.inexact
        sources = future_sources(plan, max_depth=config.source_depth, watched=watched)
        gives = new & sources.mask(plan.prompt_len)[positions]
        return frozenset(hashes[new].tolist()), frozenset(hashes[gives].tolist())

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
        return self._waiting.places(None if self._shares is None else self._group(req))

    def _group(self, req: "Req") -> int:
        return hash(self._tenants[req])

    def _order(self) -> Order:
        queue, keys = self._waiting.queue(bound=self._bound), self._waiting.keys
        every = np.arange(len(keys))
        if self._shares is None:
            return self._order_of(queue, every)
        waits, costs = waits_for_prefill(queue, self._twins(every)).tolist(), queue.cost.tolist()
        places: dict[Any, list[int]] = {}
        least: dict[Any, int] = {}  # of who has some that may go
        for i, req in enumerate(keys):
            tenant = self._tenants[req]
            places.setdefault(tenant, []).append(i)
            if not waits[i]:
                least[tenant] = min(least.get(tenant, costs[i]), costs[i])
        found: dict[Any, Order] = {}

        def of(tenant: Any) -> list[tuple[int, int]]:
            mine = np.array(places[tenant])
            found[tenant] = self._order_of(queue.only(mine), mine)
            return [(i, costs[i]) for i in found[tenant].first]

        self._shares.wait(least)
        first = self._shares.order(least, of, room=self._room)
        held = [i for mine in found.values() for i in mine.held]
        for i, req in enumerate(keys):
            if self._tenants[req] not in found:  # its turn is beyond this batch
                (held if waits[i] else first).append(i)
        return Order(first, held, [i for mine in found.values() for i in mine.later])

    def _order_of(self, queue: Queue, places: Ints) -> Order:
        """The order of those at ``places``, whose part of the queue is ``queue``."""
        twins = self._twins(places)
        found = order(queue, bound=self._bound, room=self._room, twins=twins)
        return Order(*(places[part].tolist() for part in found))

    def _twins(self, places: Ints) -> Twins:
        config, keys = self._cache.config, self._waiting.keys
        none = NOTHING, NOTHING
        return Twins(
            min_reuse=config.min_reuse,
            min_share=config.min_share,
            care=config.budget,
            text=lambda i: self._new.get(keys[places[i]], none)[0],
            gives=lambda i: self._new.get(keys[places[i]], none)[1],
            each=self._waiting.tokens_each[places],
        )

    @property
    def _room(self) -> int:
        return versions.chunk_size() or ROOM

    def _near(self, found: Order) -> Iterable["Req"]:
        """Those of the first that the next batch may take, if they may cost something else now."""
        room, near = self._room, []
        for i in found.first:
            near.append(i)
            room -= self._waiting.cost_at(i)
            if room <= 0:
                break
        return (self._waiting.keys[i] for i in self._waiting.dirty(near))

    def _in_vain(self, found: Order) -> Iterable["Req"]:
        """Who would wait again though the twin that it waited for is through."""
        every = (self._waiting.keys[i] for i in found.held)
        return (req for req in every if req in self._hoped)

    @_guarded(None)
    def _tree_changed(self, hashes: Words | None) -> None:
        """Text of these hashes was inserted or trimmed; None: everything is gone."""
        if hashes is None:
            self._waiting.all_changed()
        elif len(self._waiting) or self._waiting.computing:
            self._waiting.changed(sample(hashes))
