"""Requests of documents that few or many ask for: counted, or written out as tokens. Pure."""

from collections.abc import Iterable, Iterator

import numpy as np

from kvshare_sglang.radix_fuzzy.fingerprints import Tokens
from kvshare_sglang.sim.serving import Job


def requests(
    count: int, *, rate: float, documents: int = 20_000, each: int = 6, size: int = 200,
    new_text: int = 60, new_tokens: int = 4, seed: int = 0,
) -> Iterator[Job]:  # fmt: skip
    """``count`` requests, ``rate`` a second (Poisson), each with ``each`` documents of about
    ``size`` tokens in an order of its own and ``new_text`` tokens of its own.

    Document ``i`` is asked for in proportion to ``1 / i`` (Zipf), as measured for the web (Breslau
    et al., 1999).
    """
    rng = np.random.default_rng(seed)
    weight = 1 / np.arange(1, documents + 1)
    until = np.cumsum(weight) / weight.sum()
    sizes = rng.integers(size // 2, size + size // 2 + 1, documents)
    at = 0.0
    for number in range(count):
        at += float(rng.exponential(1 / rate))
        drawn = np.searchsorted(until, rng.random(2 * each)).tolist()
        chosen = tuple(dict.fromkeys(min(one, documents - 1) for one in drawn))[:each]
        held = tuple((one, int(sizes[one])) for one in chosen)
        tokens = new_text + sum(length for _, length in held)
        yield Job(number, at, tokens, new_tokens, documents=held)


def written(jobs: Iterable[Job], *, vocab: int = 50_000) -> Iterator[Job]:
    """The same with text: random tokens, the same for the same document, others at the end."""
    texts: dict[int, Tokens] = {}
    for job in jobs:
        for number, length in job.documents:
            if number not in texts:
                rng = np.random.default_rng((1, number))
                texts[number] = rng.integers(0, vocab, length).astype(np.int32)
        parts = [texts[number] for number, _ in job.documents]
        own = job.tokens - sum(map(len, parts))
        rng = np.random.default_rng((2, job.number))
        job.prompt = np.concatenate([*parts, rng.integers(0, vocab, own).astype(np.int32)])
        yield job
