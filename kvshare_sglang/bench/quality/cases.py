"""Which prompts are asked: for each task and case what is cached before, and what is asked then."""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from kvshare_sglang.bench import tasks

CASES = ("splice", "edit near", "edit far", "edit same", "template", "adversarial")
MOST_OF_ANSWER = 96  # tokens of a true continuation that perplexity is taken over
TRIES = 100  # samples in a row without such a pair, and there is none
SIZE = tasks.Size(34, 4, prose=0.06)


T = TypeVar("T")


class Prompt(NamedTuple):
    """A prompt, what was cached before it, and its answer."""

    cached: list[np.ndarray]
    ids: np.ndarray
    answer: np.ndarray  # tokens, the full stop included


class NoPrompt(ValueError):
    """A task has no prompts of a case."""


class Encoder:
    """Text to token ids, by the tokenizer of a model directory."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))

    def __call__(self, text: str, *, start: bool = False) -> np.ndarray:
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=start).ids, np.int32)


def cells(wanted: Sequence[str], cases: Sequence[str]) -> list[tuple[str, str]]:
    """Task and case of each part of the table. Only what depends on other text can be steered."""
    return [
        (task, case)
        for task in wanted
        for case in (cases if task != "text" else ["splice"])
        if case != "adversarial" or task in ("hops", "state")
    ]


def drawn(draw: Callable[[], T | None], *, missing: str) -> Iterator[T]:
    """What ``draw`` gives, without end, where that is not None. Raises NoPrompt, saying what is
    ``missing``, where ``TRIES`` draws in a row give none."""
    missed = 0
    while missed < TRIES:
        made = draw()
        missed += 1
        if made is not None:
            missed = 0
            yield made
    raise NoPrompt(missing)


def prompts(
    encode: Encoder, task: str, case: str, *, n: int, size: tasks.Size, max_len: int, draw: int = 0
) -> Iterator[Prompt]:
    """Test prompts of a task: always the same ones. Those that the model cannot hold are left
    out and replaced. ``draw``: other ones, of the same kind; what was decided on prompts was on
    those of draw 0. Raises NoPrompt if none is found in ``TRIES`` samples."""
    rng = random.Random(f"test quality {task} {case}" + (f" {draw}" if draw else ""))
    filler = tasks.sentences("test")

    def one() -> Prompt | None:
        pair = pair_of(rng, task, case, size, filler)
        if pair is None:
            return None
        ids = encode(pair.prompt.prompt, start=True)
        cached = [encode(p.prompt, start=True) for p in pair.cached]
        if max(map(len, (ids, *cached))) + MOST_OF_ANSWER > max_len:
            return None
        answer = pair.prompt.answer
        assert answer is not None
        tail = answer if task == "text" else f"{answer}."
        return Prompt(cached, ids, encode(f" {tail}")[:MOST_OF_ANSWER])

    missing = (
        f"{task}, {case}: none of {TRIES} samples of {size.facts} facts gives a prompt that"
        f" fits into {max_len} tokens"
    )
    yield from itertools.islice(drawn(one, missing=missing), n)


def pair_of(
    rng: random.Random, task: str, case: str, size: tasks.Size, filler: Sequence[str]
) -> tasks.Pair | None:
    """One pair of a task and case; None where this draw of the sample has none."""
    if task == "text":
        sample = tasks.text(rng, split="test", paragraphs=5)
        others = tasks.text(rng, split="test", paragraphs=4)
        return tasks.splice(rng, sample, foreign=others.documents)
    depth = rng.randint(1, 3) if task == "hops" and case == "adversarial" else None
    sample = tasks.make(task, rng, size, filler=filler, depth=depth)
    if case == "splice":
        foreign = tasks.scene(rng, {task: size.facts // 2}, size)
        return tasks.splice(rng, sample, foreign=foreign)
    if case == "template":
        return tasks.template(rng, sample)
    if case == "adversarial":
        return tasks.adversarial(rng, sample)
    kind: tasks.EditKind = rng.choice(("substitution", "insertion", "deletion"))
    places: dict[str, tasks.Where] = {"edit near": "near", "edit far": "far", "edit same": "any"}
    return tasks.edit(rng, sample, kind, changes=case != "edit same", where=places[case])
