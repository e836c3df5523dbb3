"""Where a fingerprint was seen last: a hash table of two NumPy arrays. Pure.

Open addressing with linear probing, all operations on whole arrays. An entry is 16 bytes; at one
entry per about five tokens and a load of at most 0.6 that is 3 to 11 bytes a cached token.
Entries are never deleted one by one: whoever looks up must ask whether the place is still alive,
and the table drops the dead when it has to grow.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]
Bools = npt.NDArray[np.bool_]

_EMPTY = np.uint64(0)
_ONE = np.uint64(1)
_MAX_LOAD = 0.6


class FingerprintIndex:
    """Maps non-zero 64-bit keys to 64-bit values; the newest value of a key wins.

    ``alive(values) -> mask`` says which entries are still worth keeping when the table is rebuilt;
    ``dropped()`` is called when all others are gone.
    """

    def __init__(
        self,
        alive: Callable[[Words], Bools],
        *,
        dropped: Callable[[], None] = lambda: None,
        capacity: int = 1 << 12,
    ) -> None:
        if capacity < 1 or capacity & (capacity - 1):
            raise ValueError(f"capacity must be a power of two, got {capacity}")
        self._alive = alive
        self._dropped = dropped
        self._min_capacity = capacity
        self.clear()

    def clear(self) -> None:
        """Forget everything and give the memory back."""
        self._allocate(self._min_capacity)

    def __len__(self) -> int:
        """Entries held, dead ones included."""
        return self._used

    @property
    def nbytes(self) -> int:
        return self._keys.nbytes + self._values.nbytes

    def get(self, keys: Words) -> Words:
        """Value of each key, 0 where there is none. Expected O(len(keys))."""
        out = np.zeros(len(keys), np.uint64)
        pending = np.arange(len(keys))
        slots = keys & self._mask
        while len(pending):
            found = self._keys[slots]
            hit = found == keys[pending]
            out[pending[hit]] = self._values[slots[hit]]
            on = ~hit & (found != _EMPTY)
            pending, slots = pending[on], (slots[on] + _ONE) & self._mask
        return out

    def put(self, keys: Words, values: Words) -> None:
        """Set each key to its value (non-zero); of equal keys the first wins. Amortised O(n)."""
        if len(keys) == 0:
            return
        if self._used + len(keys) > _MAX_LOAD * len(self._keys):
            self._rebuild(len(keys))
        # One writer per key, so that no key is met twice in a round. The first of equal grams is
        # the one from which a match can be extended furthest.
        unique, first = np.unique(keys, return_index=True)
        self._put_unique(unique, values[first])

    def items(self) -> tuple[Words, Words]:
        """All keys and values, dead ones included, in no particular order."""
        full = self._keys != _EMPTY
        return self._keys[full], self._values[full]

    def _put_unique(self, keys: Words, values: Words) -> None:
        pending = np.arange(len(keys))
        slots = keys & self._mask
        while len(pending):
            found, wanted = self._keys[slots], keys[pending]
            free = found == _EMPTY
            self._keys[slots[free]] = wanted[free]  # two keys may want one slot: the last stays
            won = self._keys[slots] == wanted
            self._values[slots[won]] = values[pending[won]]
            self._used += int(np.count_nonzero(won & free))
            pending, slots = pending[~won], (slots[~won] + _ONE) & self._mask

    def compact(self) -> None:
        """Drop the dead entries now. O(entries)."""
        self._rebuild(0)

    def _rebuild(self, room: int) -> None:
        keys, values = self.items()
        keep = self._alive(values)
        keys, values = keys[keep], values[keep]
        capacity = self._min_capacity
        # Twice what is needed, so that the next rebuild is as many insertions away.
        while (len(keys) + room) * 2 > _MAX_LOAD * capacity:
            capacity *= 2
        self._allocate(capacity)
        self._put_unique(keys, values)
        self._dropped()

    def _allocate(self, capacity: int) -> None:
        self._keys = np.zeros(capacity, np.uint64)
        self._values = np.zeros(capacity, np.uint64)
        self._mask = np.uint64(capacity - 1)
        self._used = 0
