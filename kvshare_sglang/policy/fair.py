"""Fair shares of prefill between tenants: deficit round robin. Pure.

Shreedhar and Varghese (SIGCOMM 1995): tenants take turns; in each turn a tenant gets a quantum of
rows more, and its requests go as long as what it has is enough. Who has nothing to send loses what
it saved. Of two tenants that wait since the same moment, none is ever ahead by more than a quantum
and the largest request: a hot cache makes a tenant's requests cheap, not its share larger.
"""

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

Next = tuple[int, int]  # a request of a tenant's, and its cost in rows, at least 1


class Shares:
    """Whose turn it is, and what each tenant that waits has saved."""

    def __init__(self, quantum: int) -> None:
        if quantum < 1:
            raise ValueError(f"quantum must be at least 1, got {quantum}")
        self._quantum = quantum
        self._ring: deque[Hashable] = deque()  # the first one's turn it is
        self._saved: dict[Hashable, int] = {}

    def wait(self, tenants: Iterable[Hashable]) -> None:
        """These tenants wait, and no others; new ones have their turn last. O(tenants)."""
        turn = self._ring[0] if self._ring else None
        here = dict.fromkeys(tenants)
        kept = [tenant for tenant in self._ring if tenant in here]
        new = [tenant for tenant in here if tenant not in self._saved]
        self._ring = deque([*kept, *new])
        self._saved = {tenant: self._saved.get(tenant, 0) for tenant in self._ring}
        if self._ring and self._ring[0] != turn:
            self._saved[self._ring[0]] += self._quantum

    def order(
        self,
        least: Mapping[Hashable, int],
        of: Callable[[Hashable], Sequence[Next]],
        *,
        room: int,
    ) -> list[int]:
        """Items in the order of turns until ``room`` rows are placed, each tenant's as ``of`` has
        them. ``least``: no item of a tenant costs less. Only those are asked whose turn comes
        before the room is filled; what these have beyond it goes last. Changes nothing. O(items of
        those, and the tenants for each placed one that is not of the tenant before it)."""
        later = self._copy()
        later.wait(tenant for tenant in self._ring if tenant in least)
        costs = dict(least)
        left: dict[Hashable, deque[Next]] = {}
        out: list[int] = []
        while later._ring and room > 0:
            tenant = later._next(costs)
            if tenant not in left:
                left[tenant] = deque(of(tenant))
            else:
                item, cost = left[tenant].popleft()
                later._saved[tenant] -= cost
                room -= cost
                out.append(item)
            if left[tenant]:
                costs[tenant] = left[tenant][0][1]
            else:
                del costs[tenant]
                later._end_turn(leaves=True)
        return out + [item for mine in left.values() for item, _ in mine]

    def served(self, tenant: Hashable, cost: int) -> None:
        """A request of a tenant that waits went for ``cost`` rows: time goes on until its turn has
        come and it has them. O(tenants)."""
        if tenant in self._saved:
            self._next({tenant: cost})
            self._saved[tenant] -= cost

    def _copy(self) -> "Shares":
        other = Shares(self._quantum)
        other._ring, other._saved = self._ring.copy(), dict(self._saved)
        return other

    def _end_turn(self, *, leaves: bool = False) -> None:
        tenant = self._ring.popleft()
        if leaves:
            del self._saved[tenant]
        else:
            self._ring.append(tenant)
        if self._ring:
            self._saved[self._ring[0]] += self._quantum

    def _next(self, costs: Mapping[Hashable, int]) -> Hashable:
        """Take turns until one of those that have a next request has enough for it; which one."""
        while True:
            for _ in range(len(self._ring)):
                tenant = self._ring[0]
                if tenant in costs and self._saved[tenant] >= costs[tenant]:
                    return tenant
                self._end_turn()
            # A whole round served none: go on to the last one before someone can be.
            short = min(cost - self._saved[tenant] for tenant, cost in costs.items())
            rounds = max((short - 1) // self._quantum, 0)
            for tenant in self._ring:
                self._saved[tenant] += rounds * self._quantum
