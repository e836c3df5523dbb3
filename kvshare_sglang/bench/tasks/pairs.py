"""Prompts that share text with cached ones: spliced, refilled, steered, asked as a list. Pure."""

import random
from collections.abc import Sequence
from dataclasses import replace

from kvshare_sglang.bench.tasks.draws import Size
from kvshare_sglang.bench.tasks.edits import Pair, other_values
from kvshare_sglang.bench.tasks.facts import Document, consistent, read
from kvshare_sglang.bench.tasks.samples import Sample, make

_SLOTS = frozenset({"code", "price", "keeps", "weighs", "role", "unit", "means"})


def splice(rng: random.Random, sample: Sample, *, foreign: Sequence[Document]) -> Pair:
    """The sample, and prompts that held its documents in another order, others between them."""
    own = list(sample.documents)
    rng.shuffle(own)
    half = (len(own) + 1) // 2
    cached = []
    for part in (own[:half], own[half:]):
        if part:
            others = rng.sample(list(foreign), min(len(foreign), 2))
            mixed = [*others[:1], *part, *others[1:]]
            cached.append(replace(sample, documents=tuple(mixed)))
    return Pair("splice", tuple(cached), sample)


def template(rng: random.Random, sample: Sample, *, slots: int = 6) -> Pair:
    """The sample, and the same frame with other values in some slots. The answer changes with
    them wherever it can."""
    places = [
        (d, i)
        for d, doc in enumerate(sample.documents)
        for i, fact in enumerate(doc.facts)
        if fact.kind in _SLOTS
    ]
    best = None
    for _ in range(200):
        documents = [list(d.facts) for d in sample.documents]
        for d, i in rng.sample(places, min(slots, len(places))):
            fact = documents[d][i]
            documents[d][i] = rng.choice([fact._replace(value=v) for v in other_values(rng, fact)])
        before = tuple(
            doc._replace(facts=tuple(facts))
            for doc, facts in zip(sample.documents, documents, strict=True)
        )
        if not consistent(before):
            continue
        cached = replace(sample, documents=before)
        best = best or cached
        if cached.answer not in (None, sample.answer):
            return Pair("template", (cached,), sample)
    if best is None:
        raise ValueError("no other values found that are consistent")
    return Pair("template", (best,), sample)


def adversarial(rng: random.Random, sample: Sample) -> Pair | None:
    """The sample, and a prompt whose first half was rewritten so that the second half, word for
    word the sample's, meant something else: the answer differs. None if it can't be made to."""
    half = len(sample.documents) // 2
    for _ in range(50):
        attack = tuple(
            doc._replace(
                facts=tuple(
                    fact._replace(value=rng.choice(other_values(rng, fact)))
                    if fact.kind in _SLOTS
                    else fact
                    for fact in doc.facts
                )
            )
            for doc in sample.documents[:half]
        )
        cached = replace(sample, documents=attack + sample.documents[half:])
        own = replace(sample, documents=sample.documents[half:])
        steered = cached.answer not in (None, sample.answer)
        if steered and own.answer != sample.answer and consistent(cached.documents):
            return Pair("adversarial", (cached,), sample)
    return None


def listing(
    rng: random.Random, task: str, size: Size, *, keys: int, filler: Sequence[str] = ()
) -> tuple[Pair, list[tuple[str, str]]]:
    """A template pair whose question names no key, and the list that answers it: what is
    before each value, and the value. Which rows matter shows only as the keys are written."""
    sample = make(task, rng, size, keys=keys, filler=filler)
    pair = template(rng, sample, slots=10)
    known = read(sample.documents)
    parts = [
        (f" {key}" if i == 0 else f", {key}", f" {known[sample.ask.topic, key].answer}")
        for i, key in enumerate(sample.ask.keys)
    ]
    return pair, parts
