"""What a training step shows: the curriculum, and batches drawn from a seed and a step alone."""

import random
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from kvshare_sglang.bench import tasks


class Level(NamedTuple):
    """What lessons look like at a step of the curriculum."""

    length: int  # tokens of a row
    facts: tuple[int, int]
    documents: int
    mixed: int  # tasks in one lesson
    size: tasks.Size  # its first two fields are drawn anew for each lesson


def _size(depth: int, phrases: int, *, shared: float, prose: float, hints: float) -> tasks.Size:
    return tasks.Size(0, 0, depth, phrases, shared, prose, hints, rivals=0.5)


LEVELS = (
    Level(64, (3, 4), 1, 1, _size(1, 1, shared=0, prose=0, hints=0.5)),
    Level(96, (4, 6), 1, 1, _size(1, 2, shared=0, prose=0, hints=0.5)),
    Level(128, (4, 8), 2, 1, _size(2, 3, shared=0, prose=0, hints=0.5)),
    Level(192, (5, 12), 3, 2, _size(2, 3, shared=0.1, prose=0.02, hints=0.4)),
    Level(256, (6, 16), 4, 2, _size(3, 3, shared=0.2, prose=0.04, hints=0.3)),
    Level(384, (8, 24), 4, 3, _size(3, 3, shared=0.2, prose=0.06, hints=0.2)),
    Level(512, (10, 34), 5, 3, _size(3, 3, shared=0.2, prose=0.06, hints=0.15)),
    Level(768, (12, 56), 6, 4, _size(3, 3, shared=0.2, prose=0.06, hints=0.1)),
    Level(1024, (16, 80), 8, 4, _size(3, 3, shared=0.2, prose=0.06, hints=0.1)),
)
REST = 0.1  # of the tokens that are no answers are learned too


class Rows(NamedTuple):
    """A batch: tokens, the positions to learn, and the answers among them."""

    ids: np.ndarray
    weights: np.ndarray  # of each token as a target
    answers: list[tuple[int, int, int, str]]  # row, start, stop, task and depth


class Lessons:
    """Batches of one level; the same seed and step give the same batch."""

    def __init__(self, tokenizer: Any, *, seed: int, split: Any = "train") -> None:
        self._seed = seed
        self.encode = lru_cache(1 << 18)(
            lambda text: tuple(tokenizer.encode(text, add_special_tokens=False).ids)
        )
        self._prose = [self.encode(p + "\n") for p in tasks.prose(split)]
        self._filler = tasks.sentences(split)

    def batch(
        self, step: int, level: Level, *, rows: int, mix: dict[str, float], prose: float
    ) -> Rows:
        rng = random.Random(f"{self._seed}:{step}")
        ids = np.full((rows, level.length + 1), 2, np.int64)
        weights = np.zeros((rows, level.length + 1), np.float32)
        answers: list[tuple[int, int, int, str]] = []
        for row in range(rows):
            fill = self._read if rng.random() < prose else self._learn
            fill(rng, level, mix, ids[row], weights[row], row, answers)
        return Rows(ids, weights, answers)

    def _read(self, rng: Any, level: Level, mix: Any, ids: Any, weights: Any, *_: Any) -> None:
        tokens = [0]
        while len(tokens) < len(ids):
            tokens += rng.choice(self._prose)
        ids[:] = tokens[: len(ids)]
        weights[1:] = 0.3

    def _learn(
        self, rng: Any, level: Level, mix: dict[str, float], ids: Any, weights: Any, row: int,
        answers: list[tuple[int, int, int, str]],
    ) -> None:  # fmt: skip
        facts = rng.randint(*level.facts)
        size = level.size._replace(facts=facts, documents=rng.randint(1, level.documents))
        names = list(mix)
        first = rng.choices(names, [mix[n] for n in names])[0]
        others = [n for n in names if n != first and rng.random() < 0.7][: level.mixed - 1]
        rng.shuffle(others)
        shares = {first: facts}
        for name in others:
            shares[name] = shares[first] // 3
            shares[first] -= shares[name]
        at = 1
        ids[0] = 0
        for text, task, depth in tasks.lesson(rng, shares, size, self._filler):
            tokens = self.encode(text)
            if at + len(tokens) > len(ids):
                break
            ids[at : at + len(tokens)] = tokens
            if task:
                weights[at : at + len(tokens)] = 1.0
                answers.append((row, at, at + len(tokens), f"{task}{depth or ''}"))
            at += len(tokens)
        rest = (weights == 0) & (np.arange(len(ids)) < at)
        rest[0] = False
        picked = np.random.default_rng(rng.randrange(1 << 32)).random(len(ids)) < REST
        weights[rest & picked] = 0.15
