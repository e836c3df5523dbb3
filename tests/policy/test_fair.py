"""Deficit round robin: nobody who waits is ever far behind another, however cheap its requests."""

from collections import deque
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare_sglang.policy.fair import Next, Shares

QUANTUM = 500
costs = st.lists(st.integers(1, 3000), min_size=1, max_size=20)


def asked(
    shares: Shares, lists: dict[Any, list[Next]], *, room: int, least: int | None = None
) -> list[int]:
    """The order where all that is known of a tenant is what its cheapest costs, or less."""
    cheapest = {
        tenant: min(cost for _, cost in mine) if least is None else least
        for tenant, mine in lists.items()
    }
    return shares.order(cheapest, lists.__getitem__, room=room)


def by_definition(quantum: int, waiting: dict[str, list[int]]) -> list[str]:
    """Deficit round robin, written out: in each turn a quantum, then as many as it pays for."""
    left = {tenant: deque(mine) for tenant, mine in waiting.items()}
    saved = dict.fromkeys(left, 0)
    out = []
    while any(left.values()):
        for tenant, mine in left.items():
            if not mine:
                continue
            saved[tenant] += quantum
            while mine and mine[0] <= saved[tenant]:
                saved[tenant] -= mine.popleft()
                out.append(tenant)
    return out


@given(st.dictionaries(st.sampled_from("abcde"), costs, min_size=1), st.integers(1, 4000))
def test_the_order_is_that_of_the_definition(waiting, quantum) -> None:
    shares = Shares(quantum)
    shares.wait(waiting)
    owner: list[str] = []
    lists: dict[str, list[Next]] = {}
    for tenant, mine in waiting.items():
        lists[tenant] = [(len(owner) + i, cost) for i, cost in enumerate(mine)]
        owner += [tenant] * len(mine)
    found = asked(shares, lists, room=10**9, least=1)
    assert asked(shares, lists, room=10**9) == found
    assert [owner[item] for item in found] == by_definition(quantum, waiting)
    for mine in lists.values():
        assert [item for item in found if item in dict(mine)] == list(dict(mine))


@given(
    st.integers(2, 5),
    st.integers(1, 4000),
    st.integers(1, 6000),
    st.data(),
)
def test_of_tenants_that_always_wait_none_is_ahead_by_more_than_a_quantum_and_a_request(
    num, quantum, room, data: st.DataObject
) -> None:
    """Over rounds in which an order is made, a batch of it is let in, and others come; one more
    tenant comes and goes."""
    shares = Shares(quantum)
    served = dict.fromkeys(range(num), 0)
    largest = 1
    for _ in range(data.draw(st.integers(1, 12))):
        lists = {
            tenant: [(tenant, cost) for cost in data.draw(costs)]
            for tenant in (*served, *data.draw(st.sampled_from([(), (99,)])))
        }
        largest = max([largest, *(cost for mine in lists.values() for _, cost in mine)])
        shares.wait(lists)
        at = dict.fromkeys(lists, 0)
        rows = 0
        for tenant in asked(shares, lists, room=room):
            cost = lists[tenant][at[tenant]][1]
            if rows + cost > room and rows:
                break
            rows += cost
            # Admission knows the cost better than the order did.
            cost = max(1, cost + data.draw(st.integers(-20, 20)))
            largest = max(largest, cost)
            at[tenant] += 1
            shares.served(tenant, cost)
            if tenant in served:
                served[tenant] += cost
            if at[tenant] == len(lists[tenant]):
                break  # it would wait no more
        assert max(served.values()) - min(served.values()) <= quantum + largest


def test_a_tenant_with_a_flood_of_cheap_requests_takes_no_more_than_its_share() -> None:
    shares = Shares(QUANTUM)
    served = {"hot": 0, "cold": 0}
    for _ in range(200):
        lists = {"hot": [(0, 10)] * 50, "cold": [(1, 900)] * 3}
        shares.wait(lists)
        for item in asked(shares, lists, room=1000)[:20]:
            tenant, cost = ("hot", 10) if item == 0 else ("cold", 900)
            shares.served(tenant, cost)
            served[tenant] += cost
    assert abs(served["hot"] - served["cold"]) <= QUANTUM + 900
    assert min(served.values()) > 20_000


def test_who_has_nothing_to_send_saves_nothing() -> None:
    shares = Shares(QUANTUM)
    shares.wait(["a", "b"])
    for _ in range(10):
        shares.served("a", 500)
    shares.wait(["a"])  # b, which is far behind, has nothing to send
    shares.wait(["a", "b"])
    found = asked(shares, {"a": [(0, 500)] * 4, "b": [(1, 500)] * 4}, room=10**6)
    assert sum(found[:4]) == 2


def test_a_request_of_many_quanta_is_reached_without_as_many_turns() -> None:
    shares = Shares(1)
    shares.wait(["a", "b"])
    lists = {"a": [(0, 10**9)], "b": [(1, 10**9 + 1)]}
    assert asked(shares, lists, room=10**12) == [0, 1]
    shares.served("b", 10**9)


@given(
    st.dictionaries(st.integers(0, 30), costs, min_size=1),
    st.integers(1, 4000),
    st.integers(1, 9000),
)
def test_who_is_asked_is_whose_turn_comes_before_the_room_is_filled(waiting, quantum, room) -> None:
    """A server of thousands of tenants orders the requests of a few. Those that are placed are the
    first of the whole order."""
    lists = {
        tenant: [(100 * tenant + i, cost) for i, cost in enumerate(mine)]
        for tenant, mine in waiting.items()
    }
    shares = Shares(quantum)
    shares.wait(lists)
    whole = asked(shares, lists, room=10**9)
    of_whom: list[int] = []

    def of(tenant: int) -> list[Next]:
        of_whom.append(tenant)
        return lists[tenant]

    least = {tenant: min(cost for _, cost in mine) for tenant, mine in lists.items()}
    found = shares.order(least, of, room=room)
    sizes = dict(item for mine in lists.values() for item in mine)
    placed, rows = [], 0
    for item in whole:
        if rows >= room:
            break
        placed.append(item)
        rows += sizes[item]
    assert found[: len(placed)] == placed
    assert len(of_whom) == len(set(of_whom))
    assert sorted(found) == sorted(item for tenant in of_whom for item, _ in lists[tenant])
    if max(sizes.values()) <= quantum and all(len(mine) == 1 for mine in lists.values()):
        assert len(of_whom) == len(placed)


def test_who_has_nothing_that_may_go_after_all_loses_its_turn_in_this_order() -> None:
    shares = Shares(QUANTUM)
    shares.wait("abc")
    lists: dict[str, list[Next]] = {"a": [], "b": [(1, 400)], "c": [(2, 400)]}
    assert shares.order(dict.fromkeys("abc", 300), lists.__getitem__, room=10**6) == [1, 2]


def test_a_quantum_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        Shares(0)
