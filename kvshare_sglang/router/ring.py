"""Keys that the gateway's ring of hashes maps to the worker we mean, and then to the next. Pure.

``smg --policy consistent_hashing`` places each worker at ``POINTS`` points, ``blake3(url#i)``, and
serves a key at the first point at or after ``blake3(key)``; where that worker does not answer, the
ring goes on to the next one. So a key that lies before a point of the best worker which is followed
by one of the second best says both. It is an internal of smg: whoever uses a key compares the
worker that served, and where that is not explained by a failure, tells ``Keys``.
"""

import bisect
from collections.abc import Sequence

from blake3 import blake3

POINTS = 150
LONGEST_KEY = 128  # bytes that smg takes
_TRIES = 40  # keys tried for each point of the ring


def place(text: str) -> int:
    """Where a text lies on the ring: the first 8 bytes of its blake3, little endian."""
    return int.from_bytes(blake3(text.encode()).digest()[:8], "little")


class Ring:
    """The gateway's ring for these worker URLs, in the spelling that it knows them by."""

    def __init__(self, urls: Sequence[str]) -> None:
        points = sorted(
            (place(f"{url}#{i}"), n) for n, url in enumerate(urls) for i in range(POINTS)
        )
        self._places = [at for at, _ in points]
        self._owners = [n for _, n in points]
        # The next other worker after each point, from the last to the first, twice around.
        self._next = list(self._owners)
        for i in range(2 * len(points) - 1, -1, -1):
            here, after = i % len(points), (i + 1) % len(points)
            same = self._owners[after] == self._owners[here]
            self._next[here] = self._next[after] if same else self._owners[after]

    def pair(self, key: str) -> tuple[int, int]:
        """The worker that serves a key, and the next one; twice the same where there is one."""
        i = bisect.bisect_left(self._places, place(key)) % len(self._places)
        return self._owners[i], self._next[i]

    def pairs(self) -> set[tuple[int, int]]:
        """All pairs that some key has. With many workers a few of all pairs are missing."""
        return set(zip(self._owners, self._next, strict=True))


class Keys:
    """For each pair of workers a key; corrected by what is seen. ``salt`` keeps the keys of two
    deployments apart."""

    def __init__(self, urls: Sequence[str], *, salt: str = "kvshare") -> None:
        ring = Ring(urls)
        self._salt, self._spares = salt, 0
        self._by_pair: dict[tuple[int, int], str] = {}  # the same twice: the next one is not known
        wanted = ring.pairs()
        # Arcs differ in length: pairs that only short ones have may go without a key.
        for i in range(_TRIES * POINTS * len(urls)):
            key = f"{salt}-{i}"
            pair = ring.pair(key)
            if pair in wanted:
                wanted.remove(pair)
                self._by_pair[pair] = key
                if not wanted:
                    break

    def key(self, order: Sequence[int]) -> tuple[str, int] | None:
        """A key for the first worker of ``order`` and the earliest of the others that one is known
        for, and that other one; None where no key is known to lead to the first."""
        best = order[0]
        for second in [*order[1:], best]:
            key = self._by_pair.get((best, second))
            if key is not None:
                return key, second
        return None

    def served(self, key: str, worker: int) -> None:
        """Learn where a key leads, whatever was computed. Not to be told of a worker that only
        stood in for another that did not answer. O(pairs)."""
        for pair, known in list(self._by_pair.items()):
            if known == key and pair[0] != worker:
                del self._by_pair[pair]
        if not any(known == key for known in self._by_pair.values()):
            self._by_pair.setdefault((worker, worker), key)

    def only(self, worker: int, key: str) -> None:
        """This key leads to a worker, and one that was computed does not: the ring is another one,
        and nothing else that was computed for that worker is worth anything. O(pairs)."""
        others = {pair: known for pair, known in self._by_pair.items() if pair[0] != worker}
        self._by_pair = {**others, (worker, worker): key}

    def spare(self) -> str:
        """A key of which nothing is known, each time another one."""
        self._spares += 1
        return f"{self._salt}-spare-{self._spares}"

    @property
    def num_pairs(self) -> int:
        return len(self._by_pair)
