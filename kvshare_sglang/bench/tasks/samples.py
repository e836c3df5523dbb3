"""One prompt as data: its documents, its question and the answer that they give. Pure."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from kvshare_sglang.bench.tasks import families
from kvshare_sglang.bench.tasks.draws import Size, Words, merge, scatter
from kvshare_sglang.bench.tasks.facts import TOPICS, Ask, Document, Fact, read
from kvshare_sglang.bench.tasks.python_docs import prose
from kvshare_sglang.bench.tasks.words import TITLES

TASKS = ("lookup", "hops", "few", "state")


@dataclass(frozen=True)
class Sample:
    """A prompt, as data: the documents, the question and its answer."""

    task: str
    documents: tuple[Document, ...]
    ask: Ask
    depth: int = 0
    continuation: str = ""  # what follows a text that is to be continued

    @property
    def question(self) -> str:
        return str(self.ask)

    @property
    def answer(self) -> str | None:
        """The answer, or None where the documents do not tell it."""
        if self.task == "text":
            return self.continuation
        known = read(self.documents)
        found = [known.get((self.ask.topic, key)) for key in self.ask.keys]
        parts = [k.answer for k in found if k is not None]
        if len(parts) < len(found):
            return None
        if len(parts) == 1:
            return parts[0]
        return ", ".join(f"{k} {a}" for k, a in zip(self.ask.keys, parts, strict=True))

    @property
    def prompt(self) -> str:
        """The text up to the answer, which starts with a space and ends with a full stop."""
        lines = [str(document) for document in self.documents]
        if self.task == "text":
            return "\n".join(lines)
        return "\n".join([*lines, f"Q: {self.question} A:"])


def scene(
    rng: random.Random, shares: dict[str, int], size: Size, prose: Sequence[str] = ()
) -> tuple[Document, ...]:
    """Documents with so many facts of each task, mixed, in an order in which they make sense."""
    words = Words(rng, size)
    makers: dict[str, Callable[..., list[list[Fact]]]] = {
        "lookup": families.lookup,
        "hops": families.hops,
        "few": families.few,
        "state": families.state,
    }
    parts = [makers[task](rng, words, count, size) for task, count in shares.items() if count]
    if prose:
        filler = [Fact("prose", "", s) for s in prose if rng.random() < size.prose * size.facts]
        parts.append(scatter(rng, filler, size.documents))
    documents = [merge(rng, [part[i] for part in parts]) for i in range(size.documents)]
    return tuple(Document(rng.choice(TITLES), tuple(facts)) for facts in documents if facts)


def make(
    task: str, rng: random.Random, size: Size, *, keys: int = 1, depth: int | None = None,
    filler: Sequence[str] = (),
) -> Sample:  # fmt: skip
    """A sample of a task among facts of the others, asking about ``keys`` keys.

    ``depth`` wants a chain of just that many hops. The scene is drawn anew until it has one.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {TASKS}, got {task!r}")
    for _ in range(200):
        documents = scene(rng, _shares(task, rng, size), size, pick(rng, filler))
        asks = [
            (topic, key)
            for (topic, key), found in read(documents).items()
            if TOPICS[topic].task == task and depth in (None, found.depth)
        ]
        shown = {f.key for d in documents for f in d.facts if f.kind == "demo"}
        asks = [a for a in asks if a[0] != "label" or a[1] not in shown]
        if not asks:
            continue
        topic = rng.choice(asks)[0]
        of_topic = [key for t, key in asks if t == topic]
        if len(of_topic) < keys:
            continue
        ask = Ask(topic, tuple(rng.sample(of_topic, keys)))
        known = read(documents)
        return Sample(task, documents, ask, max(known[topic, k].depth for k in ask.keys))
    raise ValueError(f"no {task} with {keys} keys and depth {depth} in scenes of {size}")


def _shares(task: str, rng: random.Random, size: Size) -> dict[str, int]:
    main = max(3, round(size.facts * rng.uniform(0.45, 0.7)))
    others = rng.sample([t for t in TASKS if t != task], 2)
    left = max(0, size.facts - main)
    return {task: main, others[0]: left - left // 2, others[1]: left // 2}


def pick(rng: random.Random, filler: Sequence[str]) -> list[str]:
    """One sentence of filler, where there is any."""
    return [rng.choice(filler)] if filler else []


def text(rng: random.Random, *, split: Literal["train", "test"], paragraphs: int = 3) -> Sample:
    """Prose in documents, the last of them cut in two: a beginning, and how it went on."""
    picked = rng.sample(prose(split), paragraphs)
    words = picked[-1].split(" ")
    cut = len(words) // 3
    picked[-1] = " ".join(words[:cut])
    documents = tuple(Document("Text", (Fact("prose", "", p),)) for p in picked)
    return Sample("text", documents, Ask("", ()), continuation=" ".join(words[cut:]))


def listing_prompt(sample: Sample) -> str:
    """The sample's prompt, its question without the keys."""
    lines = [str(document) for document in sample.documents]
    return "\n".join([*lines, f"Q: {TOPICS[sample.ask.topic].listing}? A:"])
