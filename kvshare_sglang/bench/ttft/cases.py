"""Prompts to time: passages cached elsewhere, in another order; or real requests."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kvshare_sglang.bench.models import Model
from kvshare_sglang.bench.texts import read_prompts
from kvshare_sglang.radix_fuzzy.fingerprints import Tokens

PASSAGE = 500  # tokens


class Case(NamedTuple):
    """Prompts to cache first, and the prompt that is timed."""

    sources: list[Tokens]
    prompt: Tokens


def random_tokens(rng: np.random.Generator, count: int, vocab: int) -> Tokens:
    """Ids without the special ones. No eight in a row are met twice, as far as chance goes."""
    return rng.integers(8, vocab, count).astype(np.int32)


def moved_case(rng: np.random.Generator, size: int, vocab: int, *, reused: float) -> Case:
    """A prompt of passages that are in other prompts, in an order without old neighbours.

    They are the share ``reused`` of it. Half of the fresh text is between the passages, the
    other half after them.
    """
    moved = round(reused * size)
    count = max(2, round(moved / PASSAGE))
    passages = np.array_split(random_tokens(rng, moved, vocab), count)
    order = np.arange(count)
    while any(order[1:] == order[:-1] + 1):
        order = rng.permutation(count)
    between = (size - moved) // 2 // count
    prompt = [part for i in order for part in (random_tokens(rng, between, vocab), passages[i])]
    prompt.append(random_tokens(rng, size - moved - between * count, vocab))
    sources = [
        np.concatenate([random_tokens(rng, 64, vocab), *passages[i : i + 4]])
        for i in range(0, count, 4)
    ]
    return Case(sources, np.concatenate(prompt))


def request_cases(
    path: Path, model: Model, *, history: int, repeats: int, max_tokens: int
) -> Iterator[Case]:
    """Real requests: the last of every ``history + 1`` is timed, those before it are cached."""
    step = history + 1
    tokenizer = model.tokenizer()
    ids = [
        np.asarray(tokenizer.encode(text).ids, np.int32)
        for text in read_prompts(path, limit=step * repeats)
    ]
    for first in range(0, len(ids) - history, step):
        group = [tokens[: model.max_len - 8] for tokens in ids[first : first + step]]
        if sum(map(len, group)) < max_tokens:
            yield Case(group[:-1], group[-1])
