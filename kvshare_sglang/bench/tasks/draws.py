"""How the words of a scene are drawn, and how facts are spread over its documents. Pure."""

import random
from typing import NamedTuple

from kvshare_sglang.bench.tasks.facts import PHRASES, Fact
from kvshare_sglang.bench.tasks.words import NUMBERS, PEOPLE, THINGS


class Size(NamedTuple):
    """How long and how varied a scene is."""

    facts: int  # sentences in all
    documents: int = 3
    depth: int = 3  # of the longest chain
    phrases: int = 3  # phrasings that may be used
    shared: float = 0.2  # how often two kinds of fact speak of the same thing
    prose: float = 0.06  # sentences of filler, for each fact
    hints: float = 0.0  # how often what follows from a fact is spelled out; for training only
    rivals: float = 0.0  # how often all headers are of one kind; for training only


class Words:
    """Draws words of a scene; things may come back for another kind of fact."""

    def __init__(self, rng: random.Random, size: Size) -> None:
        self._rng, self._size = rng, size
        self._things = rng.sample(THINGS, len(THINGS))
        self._told: dict[str, list[str]] = {}  # things by the kind of fact
        self.people = rng.sample(PEOPLE, len(PEOPLE))
        self.numbers = rng.sample(NUMBERS, len(NUMBERS))

    def things(self, kind: str, count: int) -> list[str]:
        """Things of which no such fact was told yet; some are known from facts of other kinds."""
        told = self._told.setdefault(kind, [])
        used = [t for things in self._told.values() for t in things if t not in told]
        old = [t for t in dict.fromkeys(used) if self._rng.random() < self._size.shared]
        old = self._rng.sample(old, min(len(old), count // 2))
        fresh = [self._things.pop() for _ in range(min(count - len(old), len(self._things)))]
        picked = old + fresh
        told += picked
        self._rng.shuffle(picked)
        return picked

    def number(self) -> str:
        if not self.numbers:
            self.numbers = self._rng.sample(NUMBERS, len(NUMBERS))
        return self.numbers.pop()

    def fact(self, kind: str, key: str, value: str) -> Fact:
        phrases = min(self._size.phrases, len(PHRASES[kind]))
        return Fact(kind, key, value, self._rng.randrange(phrases))


def scatter(
    rng: random.Random, facts: list[Fact], count: int, *, ordered: bool = False
) -> list[list[Fact]]:
    """Each fact in one of ``count`` documents; ``ordered`` facts keep their order over all."""
    places = [rng.randrange(count) for _ in facts]
    if ordered:
        places.sort()
    out: list[list[Fact]] = [[] for _ in range(count)]
    for fact, place in zip(facts, places, strict=True):
        out[place].append(fact)
    return out


def merge(rng: random.Random, lists: list[list[Fact]]) -> list[Fact]:
    """One list with all of them, each in its own order."""
    turns = [i for i, facts in enumerate(lists) for _ in facts]
    rng.shuffle(turns)
    left = [iter(facts) for facts in lists]
    return [next(left[i]) for i in turns]
