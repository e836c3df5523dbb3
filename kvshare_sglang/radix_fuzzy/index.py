"""Where a fingerprint was seen: a hash table of two NumPy arrays, a few places a key. Pure.

Open addressing with triangular probing, all operations on whole arrays. An entry is 16 bytes; at
one entry per about five tokens that is 4 to 9 bytes a cached token. Nothing is deleted: whoever
looks up must ask whether a place is still alive. An insertion takes the first slot of its chain
that is empty or dead, so under churn the table stays as large as what lives in it.
"""

from collections.abc import Callable
from itertools import count

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]
Bools = npt.NDArray[np.bool_]

PLACES = 4  # per key: the best, and of equal ones the newest

_EMPTY = np.uint64(0)
_ONE = np.uint64(1)
_MAX_LOAD = 0.7


class FingerprintIndex:
    """Maps non-zero 64-bit keys to a few 64-bit values each.

    ``alive(values) -> mask`` says which entries still count. ``better(old, new) -> mask`` says
    which old values of a key are better than the new ones. ``dropped()`` is called when
    a rebuild has thrown all dead entries out.
    """

    def __init__(
        self,
        alive: Callable[[Words], Bools],
        *,
        better: Callable[[Words, Words], Bools] = lambda old, new: np.zeros(len(old), bool),
        dropped: Callable[[], None] = lambda: None,
        capacity: int = 1 << 12,
    ) -> None:
        if capacity < 1 or capacity & (capacity - 1):
            raise ValueError(f"capacity must be a power of two, got {capacity}")
        self._alive = alive
        self._better = better
        self._dropped = dropped
        self._min_capacity = capacity
        self._allocate(capacity)

    def __len__(self) -> int:
        """Entries held, dead ones included."""
        return self._used

    @property
    def nbytes(self) -> int:
        return self._keys.nbytes + self._values.nbytes

    def find(self, keys: Words) -> tuple[npt.NDArray[np.int64], Words]:
        """All values of all keys: ``which`` key each belongs to, ascending, and the values.

        Dead values are among them. Expected O(len(keys)).
        """
        which, values = [np.empty(0, np.int64)], [np.empty(0, np.uint64)]
        pending = np.arange(len(keys))
        slots = keys & self._mask
        for step in count(_ONE, _ONE):
            found = self._keys[slots]
            hit = found == keys[pending]
            if hit.any():
                which.append(pending[hit])
                values.append(self._values[slots[hit]])
            on = found != _EMPTY
            pending, slots = pending[on], (slots[on] + step) & self._mask
            if not len(pending):
                break
        together = np.concatenate(which)
        order = np.argsort(together, kind="stable")
        return together[order], np.concatenate(values)[order]

    def put(self, keys: Words, values: Words) -> None:
        """Add one value (non-zero) to each key; of equal keys the first counts. Amortised O(n)."""
        if len(keys) == 0:
            return
        if self._used + len(keys) > _MAX_LOAD * len(self._keys):
            self._rebuild(len(keys))
        ordered = np.sort(keys)
        if (ordered[1:] == ordered[:-1]).any():
            # One writer per key, so that no key is met twice in a round. The first of equal grams
            # is the one from which a match can be extended furthest.
            keys, first = np.unique(keys, return_index=True)
            values = values[first]
        self._put_unique(keys, values.copy())

    def compact(self) -> None:
        """Drop the dead entries now. O(entries)."""
        self._rebuild(0)

    def items(self) -> tuple[Words, Words]:
        """All keys and values, dead ones included, in no particular order."""
        full = self._keys != _EMPTY
        return self._keys[full], self._values[full]

    def _put_unique(self, keys: Words, values: Words) -> None:
        pending = np.arange(len(keys))
        slots = keys & self._mask
        places = np.zeros(len(keys), np.int8)
        for step in count(_ONE, _ONE):
            found, old, wanted = self._keys[slots], self._values[slots], keys[pending]
            empty = found == _EMPTY
            same = found == wanted
            living = self._alive(old)
            places[pending[same & living]] += 1
            take = empty | ~living
            # Two keys may want one slot: the one written last has it, the others go on.
            self._keys[slots[take]] = wanted[take]
            won = take & (self._keys[slots] == wanted)
            self._values[slots[won]] = values[pending[won]]
            self._used += int(np.count_nonzero(won & empty))
            swap = np.flatnonzero(same & ~take)
            if len(swap):
                # An insertion sort: the new value goes before those that are not better, and
                # carries the next one on.
                swap = swap[~self._better(old[swap], values[pending[swap]])]
                self._values[slots[swap]] = values[pending[swap]]
                values[pending[swap]] = old[swap]
            on = ~won & (places[pending] < PLACES)
            pending, slots = pending[on], (slots[on] + step) & self._mask
            if not len(pending):
                break

    def _rebuild(self, room: int) -> None:
        unique = np.unique(self.items()[0])
        which, values = self.find(unique)
        keep = self._alive(values)
        keys, values = unique[which[keep]], values[keep]
        capacity = self._min_capacity
        # Growth leaves as much room as there is text, so that rebuilds are rare.
        while len(keys) + room > 0.8 * _MAX_LOAD * capacity:
            capacity *= 2
        self._allocate(capacity)
        # Each round has every key once, and puts its places before those of the round before.
        ranks = _rank(keys)
        for rank in range(PLACES - 1, -1, -1):
            mine = ranks == rank
            self._put_unique(keys[mine], values[mine])
        self._dropped()

    def _allocate(self, capacity: int) -> None:
        self._keys = np.zeros(capacity, np.uint64)
        self._values = np.zeros(capacity, np.uint64)
        self._mask = np.uint64(capacity - 1)
        self._used = 0


def _rank(keys: Words) -> npt.NDArray[np.int64]:
    """How many equal keys are side by side before each; ``keys`` ascend."""
    first = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]])[: len(keys)]
    ranks: npt.NDArray[np.int64] = np.arange(len(keys)) - np.repeat(
        first, np.diff(np.r_[first, len(keys)])
    )
    return ranks
