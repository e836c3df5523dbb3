"""The kinds of prompts that the demo asks, and one of them on both servers."""

import argparse
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

from kvshare_sglang.bench import common
from kvshare_sglang.bench.server import Answer, Server
from kvshare_sglang.bench.texts import Corpus

NEW_TOKENS = 16


class Case(NamedTuple):
    """Prompts that were served before, and the prompt that is timed."""

    cached: list[str]
    prompt: str


class Timing(NamedTuple):
    """One prompt on both servers."""

    prompt_tokens: int
    plain_s: float
    kvshare_s: float
    tokens: dict[str, int]
    agreement: float  # of the reusing answer with the plain server's, leading tokens
    exact_agreement: float | None  # of the answer in exact mode, where it was asked
    declined: str | None
    plain_cpu_s: float
    kvshare_cpu_s: float


@dataclass
class Scenario:
    """A kind of request, how to make one, and what was measured."""

    title: str
    make: Callable[[Corpus, int], Case]
    timings: list[Timing] = field(default_factory=list)

    def mean(self, get: Callable[[Timing], float]) -> float:
        return sum(map(get, self.timings)) / len(self.timings)

    def share(self, kind: str) -> float:
        return self.mean(lambda t: t.tokens[kind] / t.prompt_tokens)

    @property
    def plain_s(self) -> float:
        return common.median([t.plain_s for t in self.timings])

    @property
    def kvshare_s(self) -> float:
        return common.median([t.kvshare_s for t in self.timings])

    @property
    def ratio(self) -> float:
        """Of the pairs, so that what slows the machine for a while slows both sides."""
        return common.median([t.plain_s / t.kvshare_s for t in self.timings])

    @property
    def cpu_ratio(self) -> float:
        """The same of processor time, which other work on the machine does not lengthen."""
        return common.median([t.plain_cpu_s / max(t.kvshare_cpu_s, 1e-3) for t in self.timings])

    @property
    def exact_agreement(self) -> float:
        asked = [t.exact_agreement for t in self.timings if t.exact_agreement is not None]
        return sum(asked) / len(asked)


def moved(corpus: Corpus, size: int) -> Case:
    document = corpus.take(size)
    old = f"You are a careful assistant. {corpus.take(40)}\n\nRead this:\n\n"
    new = f"Today's notes: {corpus.take(90)}\n\nHere is a text.\n\n"
    return Case([old + document + "\n\nWhat is it about?"], new + document + "\n\nSum it up.")


def edited(corpus: Corpus, size: int) -> Case:
    words = corpus.take(size).split(" ")
    changed = list(words)
    first, second, third = (int(len(words) * part) for part in (0.03, 0.4, 0.75))
    del changed[third : third + 8]
    changed[second:second] = corpus.take(12).split(" ")
    changed[first : first + 2] = ["quite", "something", "else"]
    ask = "\n\nReview this document."
    return Case([" ".join(words) + ask], " ".join(changed) + ask)


def shuffled(corpus: Corpus, size: int) -> Case:
    passages = [corpus.take(size // 10) for _ in range(10)]
    order = (7, 2, 9, 4, 0, 6, 3, 8, 1, 5)

    def ask(picked: list[str], question: str) -> str:
        return "\n\n".join([f"{corpus.take(16)}", *picked, question])

    before = [ask(passages[:5], "Which is longest?"), ask(passages[5:], "Which is shortest?")]
    return Case(before, ask([passages[i] for i in order], "Answer with the passages above."))


def unrelated(corpus: Corpus, size: int) -> Case:
    return Case([corpus.take(size)], corpus.take(size))


def scenarios() -> list[Scenario]:
    return [
        Scenario("same text, other preface", moved),
        Scenario("document with 3 edits", edited),
        Scenario("RAG passages, other order", shuffled),
        Scenario("unrelated text", unrelated),
    ]


def agreement(answer: list[int], reference: list[int]) -> float:
    """Share of the answer before it first differs from the reference."""
    same = 0
    for a, b in zip(answer, reference, strict=True):
        if a != b:
            break
        same += 1
    return same / len(reference)


def measure(plain: Server, shared: Server, case: Case, corpus: Corpus, *, turn: int) -> Timing:
    """Serve a case on both servers, emptied first; ``turn`` says which is asked first.

    The exact mode is asked in the first turn only: it costs another full prefill.
    """
    cached = [corpus.encode(text) for text in case.cached]
    prompt = corpus.encode(case.prompt)

    def prime(server: Server) -> None:
        server.flush()
        for ids in cached:
            server.ask(ids)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(prime, (plain, shared)))
    answers: dict[str, Answer] = {}
    for server in (plain, shared) if turn % 2 == 0 else (shared, plain):
        answers[server.spec.name] = server.ask(prompt, max_new_tokens=NEW_TOKENS, cpu=True)
    alone, ours = answers["plain"], answers["kvshare"]
    exact = None
    if turn == 0:
        exact = shared.ask(prompt, max_new_tokens=NEW_TOKENS, kvshare="exact").output_ids
    info = ours.kvshare
    tokens = {
        "prefix": info["exact_tokens"],
        "copied": info["copied_tokens"],
        "recomputed": info["recomputed_tokens"],
    }
    return Timing(
        prompt_tokens=len(prompt),
        plain_s=alone.ttft_s,
        kvshare_s=ours.ttft_s,
        tokens={**tokens, "new": len(prompt) - sum(tokens.values())},
        agreement=agreement(ours.output_ids, alone.output_ids),
        exact_agreement=None if exact is None else agreement(exact, alone.output_ids),
        declined=info["declined"],
        plain_cpu_s=alone.cpu_s,
        kvshare_cpu_s=ours.cpu_s,
    )


def measure_all(
    plain: Server, shared: Server, corpus: Corpus, args: argparse.Namespace
) -> list[Scenario]:
    kinds = scenarios()
    turns = [(turn, kind) for turn in range(args.repeats) for kind in kinds]
    with common.Progress(len(turns)) as bar:
        bar.say("warming up")
        measure(plain, shared, moved(corpus, args.tokens // 3), corpus, turn=1)
        for turn, kind in turns:
            bar.say(kind.title)
            case = kind.make(corpus, args.tokens)
            kind.timings.append(measure(plain, shared, case, corpus, turn=turn))
            bar.update()
        bar.say("measured")
    return kinds
