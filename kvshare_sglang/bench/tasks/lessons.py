"""What the reader is trained on: scenes, and questions about them without end. Pure."""

import random
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from kvshare_sglang.bench.tasks.draws import Size
from kvshare_sglang.bench.tasks.facts import HINTS, PHRASES, TOPICS, Ask, Known, read
from kvshare_sglang.bench.tasks.samples import pick, scene
from kvshare_sglang.bench.tasks.words import (
    CATEGORY_OF,
    LABELS,
    MEANINGS,
    NUMBERS,
    PEOPLE,
    ROLES,
    SIGNS,
    THINGS,
    TITLES,
    UNITS,
)  # fmt: skip


class Piece(NamedTuple):
    """Text, and what it is to a loss: an ``answer`` to be learned, or the rest."""

    text: str
    task: str = ""  # of an answer
    depth: int = 0


def lesson(
    rng: random.Random, shares: dict[str, int], size: Size, filler: Sequence[str] = ()
) -> Iterator[Piece]:
    """A scene and then questions without end: many answers for each token of the documents.

    Most lines ask for a list of keys, or give such a list without naming it first.
    """
    documents = scene(rng, shares, size, pick(rng, filler))
    known = read(documents)
    for i, document in enumerate(documents):
        yield Piece(f"{document.title}:" if i == 0 else f"\n{document.title}:")
        for fact in document.facts:
            if fact.kind in HINTS:
                topic = fact.kind.removeprefix("so ")
                head, tail = str(fact).rsplit(f" {fact.value}", 1)
                yield Piece(f" {head}")
                yield Piece(f" {fact.value}", TOPICS[topic].task, known[topic, fact.key].depth)
                yield Piece(tail)
            else:
                yield Piece(f" {fact}")
    shown = {f.key for d in documents for f in d.facts if f.kind == "demo"}
    by_topic: dict[str, list[str]] = {}
    for topic, key in known:
        if topic != "label" or key not in shown or rng.random() < 0.2:
            by_topic.setdefault(topic, []).append(key)
    if not by_topic:
        return
    while True:
        # topics with more keys are asked more often
        topic = rng.choice([t for t, keys in by_topic.items() for _ in keys[:12]])
        keys = by_topic[topic]
        count = 1 if rng.random() < 0.35 else rng.randint(1, 8)
        yield from _asked(rng, topic, rng.sample(keys, min(count, len(keys))), known)


def _asked(
    rng: random.Random, topic: str, keys: list[str], known: dict[tuple[str, str], Known]
) -> Iterator[Piece]:
    task = TOPICS[topic].task
    if len(keys) == 1:
        found = known[topic, keys[0]]
        yield Piece(f"\nQ: {Ask(topic, tuple(keys))} A:")
        yield Piece(f" {found.answer}", task, found.depth)
        yield Piece(".")
        return
    named = rng.random() < 0.4
    yield Piece(f"\nQ: {Ask(topic, tuple(keys)) if named else TOPICS[topic].listing + '?'} A:")
    for i, key in enumerate(keys):
        found = known[topic, key]
        yield Piece(f" {key}" if i == 0 else f", {key}")
        yield Piece(f" {found.answer}", task, found.depth)
    yield Piece(".")


def closed_words() -> list[str]:
    """Every word and mark that the tasks are made of, with the space before it where it has one."""
    words = [*PEOPLE, *THINGS, *ROLES, *SIGNS, *MEANINGS, *UNITS, *LABELS, *NUMBERS, *CATEGORY_OF]
    lines = [p for phrases in PHRASES.values() for p in phrases]
    lines += [t.question for t in TOPICS.values()]
    lines += [f"{t.listing} of?" for t in TOPICS.values()]
    frame = re.findall(r"[A-Za-z]+|->", re.sub(r"\{\w+\}", "", " ".join(lines)))
    spaced = [f" {w}" for w in dict.fromkeys([*words, *frame, "A", "Q"])]
    return [*spaced, *TITLES, "Text", "Q"]
