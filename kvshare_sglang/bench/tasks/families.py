"""The facts of each task: how lookups, chains, demonstrations and headers are made up. Pure."""

import random

from kvshare_sglang.bench.tasks.draws import Size, Words, scatter
from kvshare_sglang.bench.tasks.facts import PHRASES, Fact
from kvshare_sglang.bench.tasks.words import (
    CATEGORIES,
    CATEGORY_OF,
    LABELS,
    MEANINGS,
    PEOPLE,
    ROLES,
    SIGNS,
    UNITS,
)  # fmt: skip


def lookup(rng: random.Random, words: Words, count: int, size: Size) -> list[list[Fact]]:
    facts: list[Fact] = []
    codes = count if size.phrases == 1 or rng.random() < 0.5 else rng.randint(count // 2, count)
    for kind, n in (("code", codes), ("price", count - codes)):
        facts += [words.fact(kind, thing, words.number()) for thing in words.things(kind, n)]
    rng.shuffle(facts)
    return scatter(rng, facts, size.documents)


def hops(rng: random.Random, words: Words, count: int, size: Size) -> list[list[Fact]]:
    """Chains of people, in any order in which each depends on one who was named before."""
    count = min(count, len(words.people))
    facts: list[Fact] = []
    depth: dict[str, int] = {}
    value: dict[str, str] = {}
    for i in range(count):
        who = words.people[i]
        open_ends = [p for p in depth if depth[p] < size.depth]
        if open_ends and rng.random() < 0.6:
            deepest = max(depth[p] for p in open_ends)
            deep = [p for p in open_ends if depth[p] == deepest]
            other = rng.choice(deep if rng.random() < 0.4 else open_ends)
            depth[who], value[who] = depth[other] + 1, value[other]
            facts.append(words.fact("same", who, other))
            if rng.random() < size.hints:
                facts.append(Fact("so coins", who, value[who]))
        else:
            depth[who], value[who] = 0, words.number()
            facts.append(words.fact("keeps", who, value[who]))
    return scatter(rng, facts, size.documents, ordered=True)


def few(rng: random.Random, words: Words, count: int, size: Size) -> list[list[Fact]]:
    """Demonstrations of a mapping from categories to labels, in one phrasing."""
    names = rng.sample(sorted(CATEGORIES), min(len(CATEGORIES), max(2, (count + 1) // 2)))
    labels = dict(zip(names, rng.sample(LABELS, len(names)), strict=True))
    picked = [rng.choice(CATEGORIES[name]) for name in names[:count]]
    rest = [w for name in names for w in CATEGORIES[name] if w not in picked]
    picked += rng.sample(rest, min(len(rest), count - len(picked)))
    rng.shuffle(picked)
    phrase = rng.randrange(min(size.phrases, len(PHRASES["demo"])))
    facts = [Fact("demo", word, labels[CATEGORY_OF[word]], phrase) for word in picked]
    return scatter(rng, facts, size.documents)


def state(rng: random.Random, words: Words, count: int, size: Size) -> list[list[Fact]]:
    """In each document a header and what depends on it; a header may change half-way."""
    out: list[list[Fact]] = [[] for _ in range(size.documents)]
    used = rng.sample(range(size.documents), min(size.documents, max(1, count // 4)))
    people = rng.sample(PEOPLE, len(PEOPLE))
    legend: dict[str, str] = {}
    # In most scenes few headers of one kind compete, and it does to look for any of them.
    rivals = bool(size.rivals) and rng.random() < size.rivals
    only = rng.choice(("role", "unit")) if rivals else None
    roles = rng.sample(ROLES, 3) if rivals else ROLES
    for i, at in enumerate(sorted(used)):
        room = count // len(used) + (i < count % len(used))
        kind = only or rng.choice(("role", "unit", "means"))
        holds: dict[str, str] = {}  # by role, or by sign; there is one unit
        if kind == "means":
            holds = legend  # for all that follows
            new = [s for s in rng.sample(SIGNS, 1 + (not legend)) if s not in legend]
        else:
            new = rng.sample(roles, min(3, 1 + room // 4)) if kind == "role" else [""]

        def header(name: str, kind: str = kind, holds: dict[str, str] = holds) -> Fact:
            pool = {"role": people, "unit": UNITS, "means": MEANINGS}[kind]
            holds[name] = rng.choice([v for v in pool if v not in holds.values()])
            return words.fact(kind, name, holds[name])

        out[at] += [header(name) for name in new]
        things = words.things(kind, max(1, room - len(new)))
        turn = rng.randrange(1, len(things)) if len(things) > 3 and rng.random() < 0.3 else None
        for j, thing in enumerate(things):
            if j == turn and kind != "means":
                out[at].append(header(rng.choice(new)))
            name = rng.choice(sorted(holds))
            if kind == "unit":
                number = words.number()
                out[at].append(words.fact("weighs", thing, number))
                if size.hints and rng.random() < size.hints:
                    out[at].append(Fact("so weight", thing, f"{number} {holds['']}"))
                continue
            out[at].append(words.fact("guards" if kind == "role" else "bears", thing, name))
            if rng.random() < size.hints:
                told = "so guard" if kind == "role" else "so sign"
                out[at].append(Fact(told, thing, holds[name]))
    return out
