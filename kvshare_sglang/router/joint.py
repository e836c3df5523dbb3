"""Which workers hold a gram: one hash table for all of them, a bit a worker. Pure: NumPy.

Open addressing with triangular probing, all operations on whole arrays, 16 bytes a slot.
"""

import numpy as np
import numpy.typing as npt

from kvshare_sglang.radix_fuzzy.index import Bools, Words

MOST_WORKERS = 64

_ONE = np.uint64(1)
_NONE = np.uint64(0)
_MAX_LOAD = 0.6


class JointMap:
    """Maps non-zero 64-bit keys to a mask of workers. ``find`` is expected O(len(keys)), ``add``
    amortised so."""

    def __init__(self, *, capacity: int = 1 << 12) -> None:
        if capacity < 1 or capacity & (capacity - 1):
            raise ValueError(f"capacity must be a power of two, got {capacity}")
        self._least = capacity
        self._allocate(capacity)

    @property
    def nbytes(self) -> int:
        return self._keys.nbytes + self._masks.nbytes

    def find(self, keys: Words) -> Words:
        """The mask of each key, uint64 [n]; 0 where nobody holds it."""
        out = np.zeros(len(keys), np.uint64)
        if not self._used:
            return out
        slots, known = self._slots(keys)
        out[known] = self._masks[slots[known]]
        return out

    def add(self, keys: Words, worker: int) -> Bools:
        """The worker holds these keys (distinct). Which of them it held before, bool [n]."""
        if self._used + len(keys) > _MAX_LOAD * len(self._keys):
            self._rebuild(len(keys))
        slots, _ = self._slots(keys, claim=True)
        bit = _ONE << np.uint64(worker)
        held = (self._masks[slots] & bit) != _NONE
        self._masks[slots] |= bit
        return held

    def discard(self, keys: Words, worker: int) -> None:
        """The worker no longer holds these keys (distinct)."""
        slots, known = self._slots(keys)
        self._masks[slots[known]] &= ~(_ONE << np.uint64(worker))

    def drop(self, worker: int) -> None:
        """The worker holds nothing. O(capacity)."""
        self._masks &= ~(_ONE << np.uint64(worker))

    def _slots(self, keys: Words, *, claim: bool = False) -> tuple[npt.NDArray[np.int64], Bools]:
        """Where each key is, and whether it is there; ``claim``: it gets a slot if it has none."""
        where = np.zeros(len(keys), np.int64)
        known = np.zeros(len(keys), bool)
        pending, slots, step = np.arange(len(keys)), keys & self._mask, _ONE
        while len(pending):
            wanted = keys[pending]
            if claim:
                # Of two keys that want one empty slot the one written last has it.
                empty = self._keys[slots] == _NONE
                self._keys[slots[empty]] = wanted[empty]
                self._used += int(np.count_nonzero(empty & (self._keys[slots] == wanted)))
            found = self._keys[slots]
            hit = found == wanted
            where[pending[hit]] = slots[hit]
            known[pending[hit]] = True
            on = ~hit & (found != _NONE)
            pending, slots = pending[on], (slots[on] + step) & self._mask
            step += _ONE
        return where, known

    def _rebuild(self, room: int) -> None:
        alive = self._masks != _NONE
        keys, masks = self._keys[alive], self._masks[alive]
        capacity = self._least
        while len(keys) + room > 0.7 * _MAX_LOAD * capacity:
            capacity *= 2
        self._allocate(capacity)
        slots, _ = self._slots(keys, claim=True)
        self._masks[slots] = masks

    def _allocate(self, capacity: int) -> None:
        self._keys = np.zeros(capacity, np.uint64)
        self._masks = np.zeros(capacity, np.uint64)
        self._mask = np.uint64(capacity - 1)
        self._used = 0


def coverage(masks: Words, widths: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Sum of ``widths`` [n] over the keys that each worker holds; float32 [64]. O(64 n).

    >>> coverage(np.array([0b01, 0b11], np.uint64), np.array([5, 2], np.float32))[:3].tolist()
    [7.0, 2.0, 0.0]
    """
    if not masks.any():
        return np.zeros(MOST_WORKERS, np.float32)
    raw = masks.astype("<u8").view(np.uint8).reshape(len(masks), 8)
    bits = np.unpackbits(raw, axis=1, bitorder="little")
    out: npt.NDArray[np.float32] = widths @ bits.astype(np.float32)
    return out
