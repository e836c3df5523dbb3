"""Short work first, and no request is overtaken by more than the bound, whatever comes."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare_sglang.policy import schedule
from kvshare_sglang.policy.schedule import Order, Queue, Twins, cost_of, order


def queue(
    cost: list[int],
    *,
    tokens: list[int] | None = None,
    age: list[int] | None = None,
    overtaken: list[int] | None = None,
    shared: list[int] | None = None,
    patience: list[int] | None = None,
) -> Queue:
    zeros = [0] * len(cost)
    columns = (cost, tokens or cost, age or zeros, overtaken or zeros, shared or zeros)
    return Queue(
        *(np.array(column, np.int64) for column in (*columns, patience or [1] * len(cost)))
    )


def twins(text: Callable[[int], set[int]], num: int, *, care: float = 0.0) -> Twins:
    """Each hash stands for ten tokens."""
    mine = [frozenset(text(i)) for i in range(num)]
    return Twins(64, 0.1, care, mine.__getitem__, mine.__getitem__, np.full(num, 10.0))


def own(i: int) -> set[int]:
    """New text that no other request has."""
    return {1000 + i}


# ---- no one is overtaken for ever ------------------------------------------------------------


class Server:
    """Lets in what an order says, up to ``room`` rows a round; counts by the definition: of each
    request, the rows of all that came later and were let in before it."""

    def __init__(self, room: int, decide: Callable[[Queue], Order]) -> None:
        self.room, self.decide = room, decide
        self.came: list[int] = []  # cost, by arrival
        self.let_in: list[int] = []  # arrivals, in the order that they were let in
        self.first_seen: list[int] = []  # what had been let in when each came

    def come(self, cost: int) -> None:
        self.came.append(cost)
        self.first_seen.append(len(self.let_in))

    @property
    def waiting(self) -> list[int]:
        return [i for i in range(len(self.came)) if i not in self.let_in]

    def overtaken(self, i: int) -> int:
        stop = self.let_in.index(i) if i in self.let_in else len(self.let_in)
        return sum(self.came[j] for j in self.let_in[:stop] if j > i)

    def round(self, shared: Callable[[int], int] = lambda i: 0) -> None:
        waiting = self.waiting
        if not waiting:
            return
        view = queue(
            [self.came[i] for i in waiting],
            age=[sum(self.came[j] for j in self.let_in[self.first_seen[i] :]) for i in waiting],
            overtaken=[self.overtaken(i) for i in waiting],
            shared=[shared(i) for i in waiting],
        )
        rows = 0
        for place in self.decide(view).first:
            if rows and rows + self.came[waiting[place]] > self.room:
                break
            rows += self.came[waiting[place]]
            self.let_in.append(waiting[place])


rounds = st.lists(st.lists(st.integers(1, 400), max_size=6), min_size=1, max_size=12)


@given(rounds, st.integers(1, 600), st.integers(0, 1500), st.randoms(use_true_random=False))
def test_no_request_is_overtaken_by_more_than_the_bound(arrivals, room, bound, random) -> None:
    """Also where requests are held for twins that never end."""

    def decide(view: Queue) -> Order:
        text = [set(range(random.choice([0, 7, 40]))) for _ in view.cost]
        return order(view, bound=bound, room=room, twins=twins(text.__getitem__, len(text)))

    server = Server(room, decide)
    for costs in arrivals:
        for cost in costs:
            server.come(cost)
        server.round(lambda i: random.choice([0, 300]))
    assert max(map(server.overtaken, range(len(server.came))), default=0) <= bound


def flood(decide: Callable[[Queue], Order]) -> Server:
    """A long request, and a hot tenant whose short ones never end."""
    server = Server(100, decide)
    server.come(90)
    for _ in range(200):
        server.come(40)
        server.come(40)
        server.round()
    return server


def test_under_a_flood_of_short_requests_the_bound_lets_the_long_one_in() -> None:
    assert 0 in flood(lambda view: order(view, bound=1000)).let_in


def test_without_the_bound_a_long_request_starves() -> None:
    """By hit rate or by cost alone, as cache-aware schedulers order; a ratio lets it in, but as
    late as the arrivals like."""
    by_cost = flood(lambda view: Order(np.argsort(view.cost, kind="stable").tolist(), [], []))
    assert 0 not in by_cost.let_in
    assert by_cost.overtaken(0) > 10_000


def test_a_bound_of_nothing_is_first_come_first_served() -> None:
    view = queue([900, 5, 400, 1], age=[3, 2, 1, 0])
    assert order(view, bound=0).first == [0, 1, 2, 3]


@given(st.lists(st.integers(1, 1000), max_size=30), st.integers(0, 3000))
def test_every_request_is_either_first_or_held_or_later(costs, bound) -> None:
    shared = [cost if cost % 3 == 0 else 0 for cost in costs]
    alone = twins(own, len(costs))
    found = order(queue(costs, shared=shared), bound=bound, room=500, twins=alone)
    every = [*found.first, *found.held, *found.later]
    assert sorted(every) == list(range(len(costs)))


def test_what_may_still_go_before_the_oldest_is_filled_and_not_passed() -> None:
    """At 30 of 100 rows, the short ones take what is left, and then it is its turn."""
    view = queue([1000, 20, 20, 20, 20], overtaken=[30, 0, 0, 0, 0])
    assert order(view, bound=100).first == [1, 2, 3, 0, 4]


# ---- short work first ------------------------------------------------------------------------


def test_the_highest_ratio_goes_first_and_equal_ones_as_they_came() -> None:
    view = queue([1000, 10, 100, 10], age=[4000, 5, 5, 5])
    assert order(view, bound=10**6).first == [0, 1, 3, 2]


@given(st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 5000)), max_size=40))
def test_no_one_goes_first_whose_ratio_is_a_level_lower(requests) -> None:
    costs, ages = [cost for cost, _ in requests], [age for _, age in requests]
    first = order(queue(costs, age=ages), bound=10**9).first
    ratios = [(costs[i] + ages[i]) / costs[i] for i in first]
    for before, after in pairwise(ratios):
        assert after < before * 2 ** (1 / schedule.LEVELS) * 1.0001


def test_like_costs_and_like_hit_rates_stand_together() -> None:
    rng = np.random.default_rng(3)
    size = rng.choice([100, 1000], 40)
    tokens = np.where(rng.random(40) < 0.5, size, 10 * size)
    view = queue(size.tolist(), tokens=tokens.tolist())
    kinds = [(int(size[i]), int(tokens[i])) for i in order(view, bound=10**9).first]
    changes = sum(a != b for a, b in pairwise(kinds))
    assert changes == len(set(kinds)) - 1 == 3


def test_a_cost_counts_rows_copies_and_the_lookup_and_is_never_nothing() -> None:
    assert cost_of(rows=1, copied=0, tokens=1) == 1
    assert cost_of(rows=0, copied=0, tokens=0) == 1
    assert cost_of(rows=100, copied=1000, tokens=1100) == 111


# ---- twins -----------------------------------------------------------------------------------


def document(i: int) -> set[int]:
    """A new document of 300 tokens that all have, and a question of their own."""
    return {*range(30), 1000 + i}


def test_of_eight_with_the_same_new_text_one_goes_and_seven_wait() -> None:
    found = order(queue([320] * 8), bound=10**6, room=4096, twins=twins(document, 8))
    assert found == Order([0], [1, 2, 3, 4, 5, 6, 7], [])


def test_nobody_waits_for_what_a_request_of_the_batch_will_not_give() -> None:
    """All have the same new text; what the first computes no one may reuse."""
    text = twins(document, 4)
    gives = [frozenset(), frozenset(document(1)), frozenset(), frozenset()]
    found = order(
        queue([320] * 4), bound=10**6, room=4096, twins=text._replace(gives=gives.__getitem__)
    )
    assert found == Order([0, 1], [2, 3], [])


def test_who_waited_long_enough_waits_no_more() -> None:
    view = queue([320] * 8, patience=[1, 1, 0, 1, 1, 1, 1, 1])
    assert order(view, bound=10**6, room=4096, twins=twins(document, 8)).first == [0, 2]


def test_text_that_prefill_computes_already_is_waited_for() -> None:
    view = queue([300, 300, 300], shared=[0, 280, 30])
    assert order(view, bound=10**6, room=4096, twins=twins(own, 3)) == Order([0, 2], [1], [])


def test_text_that_prefill_and_the_batch_compute_counts_together() -> None:
    view = queue([300, 300], shared=[0, 40])
    text = twins(lambda i: {1, 2, 3}, 2)
    assert order(view, bound=10**6, room=4096, twins=text) == Order([0], [1], [])
    assert order(view, bound=10**6, room=300, twins=text).held == []


@pytest.mark.parametrize(
    ("cost", "shared", "care", "waits"),
    [
        (300, 64, 0.0, True),
        (300, 63, 0.0, False),  # too little to be worth a copy
        (1000, 99, 0.0, False),  # too small a share
        (1000, 100, 0.0, True),
        (300, 75, 0.15, False),  # a budget computes much of it again
        (300, 76, 0.15, True),
        (300, 300, 1.0, False),
        (40, 300, 0.0, False),  # its prompt is in the cache already, but for 40 rows
    ],
)
def test_it_waits_where_that_saves_what_makes_reuse_worth_it(cost, shared, care, waits) -> None:
    alone = twins(own, 1, care=care)
    found = order(queue([cost], shared=[shared]), bound=10**6, room=4096, twins=alone)
    assert found.held == ([0] if waits else [])


def test_nobody_waits_for_what_this_batch_does_not_take() -> None:
    """Once the third has filled the room its twin is for a later batch, and free."""
    view = queue([300, 300, 300, 300])
    text = [{1}, {2}, {*range(10, 40)}, {*range(10, 40)}]
    for room, held in ((900, []), (901, [3])):
        found = order(view, bound=10**6, room=room, twins=twins(text.__getitem__, 4))
        assert found.held == held


def test_texts_that_are_too_many_to_compare_wait_for_the_next_round() -> None:
    num = schedule.CHECKS + 10
    found = order(queue([100] * num), bound=10**6, room=10**6, twins=twins(own, num))
    assert found.first == list(range(schedule.CHECKS + 1))
    assert (len(found.held), len(found.later)) == (0, 9)  # no one says that they wait for twins


def test_nobody_passes_one_that_waits_once_its_bound_is_reached() -> None:
    """It does not wait much longer itself: rows that are let in meanwhile end its patience."""
    alone = twins(own, 3)
    waiting = queue([300, 60, 60], shared=[290, 0, 0])
    assert order(waiting, bound=120, room=4096, twins=alone) == Order([1, 2], [0], [])
    assert order(waiting, bound=60, room=4096, twins=alone) == Order([1], [0], [2])
    later = queue([300, 60], shared=[290, 0], overtaken=[60, 0], patience=[0, 60])
    assert order(later, bound=60, room=4096, twins=alone) == Order([0, 1], [], [])
