"""Deficit round robin: nobody who waits is ever far behind another, however cheap its requests."""

from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare_sglang.policy.fair import Next, Shares

QUANTUM = 500
costs = st.lists(st.integers(1, 3000), min_size=1, max_size=20)


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
    found = shares.order(lists, room=10**9)
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
        for tenant in shares.order(lists, room=room):
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
        for item in shares.order(lists, room=1000)[:20]:
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
    found = shares.order({"a": [(0, 500)] * 4, "b": [(1, 500)] * 4}, room=10**6)
    assert sum(found[:4]) == 2


def test_a_request_of_many_quanta_is_reached_without_as_many_turns() -> None:
    shares = Shares(1)
    shares.wait(["a", "b"])
    lists = {"a": [(0, 10**9)], "b": [(1, 10**9 + 1)]}
    assert shares.order(lists, room=10**12) == [0, 1]
    shares.served("b", 10**9)


def test_a_quantum_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        Shares(0)
