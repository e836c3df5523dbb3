"""A prompt and how it read before one fact of it was edited. Pure."""

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal, NamedTuple

from kvshare_sglang.bench.tasks.facts import HINTS, Fact, consistent
from kvshare_sglang.bench.tasks.samples import Sample
from kvshare_sglang.bench.tasks.words import (
    CATEGORIES,
    CATEGORY_OF,
    LABELS,
    MEANINGS,
    NUMBERS,
    PEOPLE,
    ROLES,
    SIGNS,
    THINGS,
    UNITS,
)  # fmt: skip

Where = Literal["near", "far", "any"]
EditKind = Literal["substitution", "insertion", "deletion"]


class Pair(NamedTuple):
    """Prompts that were served before, and the one to answer now."""

    case: str
    cached: tuple[Sample, ...]
    prompt: Sample
    kind: str = ""
    where: str = ""

    @property
    def changes(self) -> bool:
        """Whether the answer differs from the one that the first cached prompt had."""
        return self.cached[0].answer != self.prompt.answer


def edit(
    rng: random.Random, sample: Sample, kind: EditKind, *, changes: bool, where: Where = "any"
) -> Pair | None:
    """The sample, and a prompt from before it was edited in one fact.

    ``far`` edits lie in the first third of the facts, ``near`` ones after the middle, with a
    fifth of the facts after them. None if this sample has no such edit: a deletion changes an
    answer only where a header falls away.
    """
    places = [(d, i) for d, doc in enumerate(sample.documents) for i in range(len(doc.facts))]
    num = len(places)
    if where != "any":
        part = (0, max(1, num // 3)) if where == "far" else (num * 11 // 20, max(1, num * 4 // 5))
        places = places[slice(*part)]
    rng.shuffle(places)
    for d, i in places:
        for before in _before(rng, sample.documents[d].facts, i, kind):
            documents = list(sample.documents)
            documents[d] = documents[d]._replace(facts=before)
            cached = replace(sample, documents=tuple(documents))
            told_apart = kind == "insertion" or cached.answer is not None
            if (
                before
                and (cached.answer != sample.answer) == changes
                and told_apart
                and consistent(cached.documents)
            ):
                return Pair("edit", (cached,), sample, kind, where)
    return None


def _before(
    rng: random.Random, facts: tuple[Fact, ...], i: int, kind: EditKind
) -> Iterator[tuple[Fact, ...]]:
    """What a document may have said before an edit at fact ``i`` made it what it is."""
    fact = facts[i]
    if kind == "insertion":
        if fact.kind != "prose" and fact.kind not in HINTS:
            yield facts[:i] + facts[i + 1 :]
    elif kind == "substitution":
        for value in other_values(rng, fact):
            yield (*facts[:i], fact._replace(value=value), *facts[i + 1 :])
    else:
        headers = [f for f in facts[: i + 1] if f.kind in ("role", "unit")]
        for other in [*headers[-1:], *rng.sample(facts, min(3, len(facts)))]:
            for extra in _one_more(rng, other):
                yield (*facts[: i + 1], extra, *facts[i + 1 :])


def _pool(kind: str) -> list[str]:
    pools = {
        "code": NUMBERS, "price": NUMBERS, "keeps": NUMBERS, "weighs": NUMBERS, "same": PEOPLE,
        "demo": LABELS, "role": PEOPLE, "guards": ROLES, "unit": UNITS, "means": MEANINGS,
        "bears": SIGNS,
    }  # fmt: skip
    return pools.get(kind, [])


def other_values(rng: random.Random, fact: Fact) -> list[str]:
    """What else it might say, in random order."""
    pool = [v for v in _pool(fact.kind) if v != fact.value]
    return rng.sample(pool, len(pool))


def _one_more(rng: random.Random, like: Fact) -> list[Fact]:
    """Facts that may have been beside this one: a header told anew, or one on another key."""
    if like.kind in ("role", "unit"):
        return [like._replace(value=v) for v in other_values(rng, like)[:4]]
    keys = {"keeps": PEOPLE, "same": PEOPLE}.get(like.kind, THINGS)
    if like.kind in ("prose", "means") or like.kind in HINTS:
        return []
    if like.kind == "demo":
        keys = CATEGORIES[CATEGORY_OF[like.key]]
    value = like.value if like.kind == "demo" else rng.choice(_pool(like.kind))
    return [like._replace(key=k, value=value) for k in rng.sample(keys, 4) if k != like.key]
