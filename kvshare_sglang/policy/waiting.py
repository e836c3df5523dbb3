"""What is known of the requests that wait: costs in arrays, and who holds which text. Pure.

A lookup takes as long as deciding the order of thousands, so a request is looked up when it comes
and its cost is kept. A tree that changes says by which hashes; an inverted map from hashes to
waiting prompts finds those whose cost may have changed. The same map tells who waits for what.
Hashes are opaque 64-bit words, a few of each text; no hash is of two namespaces.
"""

from collections.abc import Hashable, Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from kvshare_sglang.policy.schedule import Ints, Queue

Words = npt.NDArray[np.uint64]

SAMPLE = np.uint64(4)  # of so many kept hashes one is held here: of 64 shared tokens there is one
# with a chance of 97%, and what is missed is seen by the lookup at admission


def in_sample(hashes: Words) -> npt.NDArray[np.bool_]:
    """Which of a text's hashes it is known by here. bool [n]."""
    mask: npt.NDArray[np.bool_] = hashes % SAMPLE == 0
    return mask


def sample(hashes: Words) -> Words:
    """Those in the sample, each once, ascending."""
    return np.unique(hashes[in_sample(hashes)])


# Of each request, int64 [n], beside those of ``Queue``: ``arrived`` by the clock; ``waited``: rows
# let in while it waited for a twin; ``number``: its own in the map; ``held``: its hashes there, of
# which ``computed`` are in prefill; ``here``: it was not let in since others left; ``waits``: for a
# twin; ``group``: its own to say.
_COLUMNS = (
    *("cost", "tokens", "arrived", "overtaken", "waited", "here", "waits", "group"),
    *("number", "held", "computed", "known", "dirty", "twins"),
)


class Inverted:
    """Maps hashes to the numbers that they were added with.

    Sorted arrays of geometric sizes, merged as they grow (a log-structured merge tree), so that
    adding costs amortised O(log n) a hash, and asking for some is a few binary searches of all.
    """

    def __init__(self) -> None:
        self._levels: list[tuple[Words, Ints]] = []

    def __len__(self) -> int:
        return sum(len(keys) for keys, _ in self._levels)

    def add(self, number: int, hashes: Words) -> None:
        """``number`` holds ``hashes``, which ascend."""
        if len(hashes):
            self._levels.append((hashes, np.full(len(hashes), number, np.int64)))
        while len(self._levels) > 1 and 2 * len(self._levels[-1][0]) > len(self._levels[-2][0]):
            self._levels.append(_merged(self._levels.pop(), self._levels.pop()))

    def counts(self, hashes: Words, size: int) -> Ints:
        """How many of ``hashes``, which ascend, each number below ``size`` holds. int64 [size]."""
        found = [np.empty(0, np.int64)]
        for keys, numbers in self._levels:
            start = keys.searchsorted(hashes)
            some = keys.take(start, mode="clip") == hashes
            start = start[some]
            length = keys.searchsorted(hashes[some], "right") - start
            places = np.repeat(start + length - length.cumsum(), length)
            places += np.arange(len(places))
            found.append(numbers[places])
        return np.bincount(np.concatenate(found), minlength=size)

    def renumber(self, new: Ints) -> None:
        """Number i is ``new[i]`` from now on, or gone where that is -1."""
        every = [(keys, new[numbers]) for keys, numbers in self._levels]
        kept = [(keys[moved >= 0], moved[moved >= 0]) for keys, moved in every]
        self._levels = [level for level in kept if len(level[0])]


def _merged(a: tuple[Words, Ints], b: tuple[Words, Ints]) -> tuple[Words, Ints]:
    keys = np.concatenate([a[0], b[0]])
    by_key = np.argsort(keys, kind="stable")  # of two sorted runs that is one merge
    return keys[by_key], np.concatenate([a[1], b[1]])[by_key]


class Waiting:
    """The requests that wait, in order of arrival, known by keys of the host's.

    ``clock``: rows let in so far. A request that is ``dirty`` may cost something else than its
    ``cost`` says; one that came is, and costs all its tokens until it is looked up.
    """

    def __init__(self) -> None:
        self.clock = 0
        self._keys: list[Hashable] = []
        self._place: dict[Hashable, int] = {}
        self._columns = {name: np.zeros(0, np.int64) for name in _COLUMNS}
        self._map = Inverted()
        self._next_number = 0
        self._computing: dict[Hashable, set[int]] = {}  # hashes of the text in prefill
        self._computed_by: dict[int, set[Hashable]] = {}  # the same, by hash

    def __len__(self) -> int:
        return len(self._place)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._place

    @property
    def keys(self) -> Sequence[Hashable]:
        """In order of arrival; who was let in stays until others ``leave``, so that the places
        of a round hold."""
        return self._keys

    def places(self, group: int | None = None) -> Ints:
        """Of those that wait, of one group or all, by arrival. O(n)."""
        here = self._columns["here"] > 0
        if group is not None:
            here &= self._columns["group"] == group
        return np.flatnonzero(here)

    def place_of(self, key: Hashable) -> int:
        """Where it stands by arrival. KeyError if it does not wait."""
        return self._place[key]

    def cost_at(self, place: int) -> int:
        return int(self._columns["cost"][place])

    def overtaken_at(self, place: int) -> int:
        """Rows of later requests that were let in before it."""
        return int(self._columns["overtaken"][place])

    # ---- who waits ----------------------------------------------------------------------

    def come(self, arrivals: Iterable[tuple[Hashable, int, int]]) -> None:
        """New requests: key, tokens of the prompt, at least 1, and group. O(n)."""
        rows = []
        for key, tokens, group in arrivals:
            self._place[key] = len(self._keys)
            self._keys.append(key)
            new = {"cost": tokens, "tokens": tokens, "arrived": self.clock, "dirty": 1}
            new |= {"number": self._next_number, "here": 1, "group": group}
            rows.append([new.get(name, 0) for name in _COLUMNS])
            self._next_number += 1
        if rows:
            table = np.array(rows, np.int64)
            for i, (name, column) in enumerate(self._columns.items()):
                self._columns[name] = np.concatenate([column, table[:, i]])

    def leave(self, keys: Iterable[Hashable]) -> None:
        """They wait no more, and those that were let in are forgotten. O(n)."""
        stay = self._columns["here"] > 0
        stay[[self._place[key] for key in keys if key in self._place]] = False
        if stay.all():
            return
        self._keys = [self._keys[i] for i in np.flatnonzero(stay)]
        self._place = {key: i for i, key in enumerate(self._keys)}
        self._columns = {name: column[stay] for name, column in self._columns.items()}
        if self._next_number > 4096 + 2 * len(self._keys):
            new = np.full(self._next_number, -1, np.int64)
            new[self._columns["number"]] = np.arange(len(self._keys))
            self._map.renumber(new)
            self._columns["number"] = np.arange(len(self._keys))
            self._next_number = len(self._keys)

    def let_in(self, key: Hashable, cost: int, *, among: Ints | None = None) -> int:
        """One goes to prefill for ``cost`` rows: all older ones are overtaken, of those at the
        places ``among`` if given. The most that any of them was so far, in rows. A few array
        operations; the place stays taken until others ``leave``."""
        place = self._place.pop(key)
        self._columns["here"][place] = 0
        older = self.places() if among is None else among
        older = older[older < place]
        overtaken = self._columns["overtaken"]
        overtaken[older] += cost
        self._columns["waited"] += cost * self._columns["waits"]
        self.clock += cost
        return int(overtaken[older].max(initial=0))

    # ---- what they cost -----------------------------------------------------------------

    def note_text(self, key: Hashable, hashes: Words) -> None:
        """The sample of its text, once. Amortised O(log n) a hash."""
        place = self._place[key]
        self._columns["held"][place] = len(hashes)
        self._columns["computed"][place] = sum(h in self._computed_by for h in hashes.tolist())
        self._map.add(int(self._columns["number"][place]), hashes)

    def looked_up(self, key: Hashable, *, cost: int, twins: bool) -> None:
        """``twins``: whether it could reuse what another request computes."""
        place = self._place[key]
        for name, value in (("cost", cost), ("dirty", 0), ("known", 1), ("twins", int(twins))):
            self._columns[name][place] = value

    def costs(self, key: Hashable, cost: int) -> None:
        """What it would cost as it is now."""
        self._columns["cost"][self._place[key]] = cost

    def forget_texts(self) -> None:
        """All is looked up anew: texts have other hashes from now on."""
        self._map = Inverted()
        self._computing.clear()
        self._computed_by.clear()
        for name, value in (("held", 0), ("computed", 0), ("known", 0), ("dirty", 1)):
            self._columns[name][:] = value

    @property
    def unknown(self) -> Sequence[Hashable]:
        """Those that were never looked up, in order of arrival."""
        return [self._keys[i] for i in np.flatnonzero(self._columns["known"] == 0)]

    def changed(self, hashes: Words) -> None:
        """Text of this sample came to the tree, or went: who holds some of it is dirty, and nobody
        computes it any more. O(hashes log n), and O(1) for each that a waiting prompt holds."""
        if len(self):
            self._columns["dirty"][self._held(hashes) > 0] = 1
        gone = [h for h in hashes.tolist() if h in self._computed_by]
        for h in gone:
            for key in self._computed_by.pop(h):
                self._computing[key].discard(h)
        self._count(-1, gone)

    def all_changed(self) -> None:
        self._columns["dirty"][:] = 1

    def dirty(self, order: Iterable[int]) -> Iterator[int]:
        """Those of ``order`` that are dirty."""
        flags = self._columns["dirty"]
        return (i for i in order if flags[i])

    def _held(self, hashes: Words) -> Ints:
        """How many of the hashes each prompt holds."""
        return self._map.counts(hashes, self._next_number)[self._columns["number"]]

    # ---- what is being computed ---------------------------------------------------------

    def computes(self, key: Hashable, hashes: Words) -> None:
        """A request went to prefill with new text of this sample, that others may reuse."""
        self.computed(key)
        mine = self._computing[key] = set(hashes.tolist())
        self._count(1, [h for h in mine if h not in self._computed_by])
        for h in mine:
            self._computed_by.setdefault(h, set()).add(key)

    def computed(self, key: Hashable) -> None:
        """Its prompt is through, or it will compute none of it."""
        gone = []
        for h in self._computing.pop(key, ()):
            self._computed_by[h].discard(key)
            if not self._computed_by[h]:
                del self._computed_by[h]
                gone.append(h)
        self._count(-1, gone)

    def _count(self, sign: int, hashes: list[int]) -> None:
        """Text of these hashes came to prefill, or left it."""
        if hashes and len(self):
            self._columns["computed"] += sign * self._held(np.array(sorted(hashes), np.uint64))

    @property
    def computing(self) -> Sequence[Hashable]:
        return list(self._computing)

    def wait(self, keys: Iterable[Hashable]) -> None:
        """Those that wait for a twin from now on: rows that are let in count for them."""
        self._columns["waits"][:] = 0
        self._columns["waits"][[self._place[key] for key in keys if key in self._place]] = 1

    def patient_for(self, key: Hashable, rows: int) -> None:
        """It will wait for so many rows less."""
        self._columns["waited"][self._place[key]] += rows

    def that_wait_for(self, hashes: Words, least: int) -> Iterator[Hashable]:
        """Of those that wait for a twin, who has ``least`` tokens of text of this sample. O(n)."""
        tokens = (self._held(hashes) * self.tokens_each).astype(np.int64)
        some = (tokens >= least) & (self._columns["waits"] > 0) & (self._columns["here"] > 0)
        return (self._keys[i] for i in np.flatnonzero(some))

    @property
    def tokens_each(self) -> npt.NDArray[np.float64]:
        """How many tokens of each prompt a hash of its sample stands for. [n]."""
        each: npt.NDArray[np.float64] = self._columns["tokens"] / np.maximum(
            self._columns["held"], 1
        )
        return each

    # ---- the view that decides ----------------------------------------------------------

    def queue(self, *, bound: int) -> Queue:
        """All at ``keys``, for ``schedule.order``. Who could not reuse what another computes has no
        patience. O(n)."""
        cost, tokens, arrived, overtaken = (
            self._columns[name] for name in ("cost", "tokens", "arrived", "overtaken")
        )
        shared = (self._columns["computed"] * self.tokens_each).astype(np.int64)
        patience = np.where(self._columns["twins"] > 0, bound - self._columns["waited"], 0)
        return Queue(cost, tokens, self.clock - arrived, overtaken, shared, patience)
