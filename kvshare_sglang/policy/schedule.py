"""In what order waiting requests go to prefill, and which of them wait for text that is being
computed. Pure: arrays in, order out; no clock but rows.

Short work first: highest response ratio next (Brinch Hansen, 1971), ``(age + cost) / cost``, where
the cost of a request is the rows that it will run and its age the rows that were let in since it
came. A ratio alone starves: new short requests can go before a long one for ever. So whatever the
ratios say, those that came later may go before a request with ``bound`` rows in all, not one more.

Whoever overtakes a request overtakes all that are older, so of those that wait the oldest was
overtaken by most: no other must be asked.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

COPY = 0.01  # rows that copying a token costs as much as, see ``admit.MOST_CHUNKS``
LOOKUP = 0.001  # rows that finding out where a token is costs as much as
LEVELS = 2  # ratios and costs that differ by less than 2 ** (1 / LEVELS) are alike
HITS = 4  # hit rates that differ by less than 1 / HITS are alike
CHECKS = 256  # texts compared in one round, a few microseconds each

Ints = npt.NDArray[np.int64]


class Queue(NamedTuple):
    """Waiting requests in order of arrival; all arrays are int64 [n], in rows or tokens.

    ``cost``: what each will cost, at least 1, see ``cost_of``. ``tokens``: of its prompt. ``age``:
    rows let in since it came. ``overtaken``: rows of later ones let in before it. ``shared``: new
    tokens of it that requests in prefill are computing. ``patience``: rows that may yet be let in
    while it waits for them; below 1 it waits no more, or never would.
    """

    cost: Ints
    tokens: Ints
    age: Ints
    overtaken: Ints
    shared: Ints
    patience: Ints

    def only(self, which: Ints) -> "Queue":
        """The queue of some of them; ``which`` ascends."""
        return Queue(*(column[which] for column in self))


class Twins(NamedTuple):
    """What waiting for text that another request computes is worth. ``min_reuse`` tokens and
    ``min_share`` of its cost are the least that it must save; of each token ``care`` rows run all
    the same. ``text(i)``: hashes of new text of request i, each of about ``each[i]`` tokens;
    ``gives(i)``: those of them that others may reuse once it has computed them."""

    min_reuse: int
    min_share: float
    care: float
    text: Callable[[int], frozenset[int]]
    gives: Callable[[int], frozenset[int]]
    each: npt.NDArray[np.float64]


class Order(NamedTuple):
    """``first``: who may be let in, in this order; ``held``: who waits for text that is being
    computed, or will be by one of the first; ``later``: who may not go before one of these, or has
    yet to be compared."""

    first: list[int]
    held: list[int]
    later: list[int]


def cost_of(*, rows: int, copied: int, tokens: int) -> int:
    """What a request of ``tokens`` tokens costs, in rows: those that run, and what copying and
    finding take. At least 1.

    >>> cost_of(rows=100, copied=1000, tokens=2000)
    112
    """
    return max(1, round(rows + COPY * copied + LOOKUP * tokens))


def preference(queue: Queue) -> Ints:
    """Who should go first, if no one had to be guarded: highest response ratio; among like ratios
    like costs stand together, the small ones first, and among these like hit rates. O(n log n)."""
    cost = queue.cost.astype(np.float64)
    ratio = np.floor(LEVELS * np.log2(1 + queue.age / cost))
    size = np.floor(LEVELS * np.log2(cost))
    hit = np.floor(HITS * np.clip(1 - cost / np.maximum(queue.tokens, 1), 0, 1))
    # The last key counts most; ties go to who came first.
    return np.lexsort((np.arange(len(cost)), -hit, size, -ratio)).astype(np.int64)


def order(queue: Queue, *, bound: int, room: int = 0, twins: Twins | None = None) -> Order:
    """Who goes to prefill and who waits for a twin.

    Let in in this order, no request is ever overtaken by more than ``bound`` rows. ``room``: rows
    that a batch takes; only what is placed within it will this batch compute, so only for that
    others wait. O(n log n), and comparing at most ``CHECKS`` texts; those that are left of a room
    that is still open wait for the next round.
    """
    num = len(queue.cost)
    cost, overtaken = queue.cost.tolist(), queue.overtaken.tolist()
    # Rows of all that came before each. They are placed when it is the oldest that is not, so
    # what is placed beyond them came later, and overtakes it.
    before = np.concatenate([[0], np.cumsum(queue.cost)]).tolist()
    need = _worth_waiting_for(queue, twins)
    waits = waits_for_prefill(queue, twins).tolist()
    could = np.isfinite(need).tolist()
    in_batch: set[int] = set()
    placed = [False] * num
    first: list[int] = []
    held: set[int] = set()
    later: set[int] = set()
    total = oldest = checks = 0

    def place(i: int) -> None:
        nonlocal total
        placed[i] = True
        first.append(i)
        if twins is not None and total < room:
            in_batch.update(twins.gives(i))
        total += cost[i]

    def stays(i: int) -> bool:
        """Whether it goes in a later round: those in prefill compute enough of its text, with those
        placed in the batch, or this was not found out."""
        nonlocal checks
        if i in held or i in later:
            return True
        if waits[i]:
            held.add(i)
        elif twins is not None and total < room and could[i] and in_batch:
            checks += 1
            if checks > CHECKS:
                later.add(i)
            elif queue.shared[i] + len(twins.text(i) & in_batch) * twins.each[i] >= need[i]:
                held.add(i)
        return i in held or i in later

    for i in preference(queue).tolist():
        while not placed[i]:
            while placed[oldest]:
                oldest += 1
            ahead = overtaken[oldest] + total - before[oldest]
            if stays(i):
                break
            if i == oldest or ahead + cost[i] <= bound:
                place(i)
            elif stays(oldest):
                later.add(i)  # it may not pass one that waits
                break
            else:
                place(oldest)
    return Order(first, sorted(held), sorted(later))


def waits_for_prefill(queue: Queue, twins: Twins | None) -> npt.NDArray[np.bool_]:
    """Who waits for those in prefill, whatever this batch will compute. bool [n]."""
    waits: npt.NDArray[np.bool_] = queue.shared >= _worth_waiting_for(queue, twins)
    return waits


def _worth_waiting_for(queue: Queue, twins: Twins | None) -> npt.NDArray[np.float64]:
    """How many new tokens of each request others must compute for it to wait: so many that what
    it saves is worth a copy. Infinite where no number is enough. [n]."""
    never = np.full(len(queue.cost), np.inf)
    if twins is None or twins.care >= 1:
        return never
    need = np.maximum(twins.min_reuse, twins.min_share * queue.cost) / (1 - twins.care)
    return np.where((need <= queue.cost) & (queue.patience > 0), need, never)
