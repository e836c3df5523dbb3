"""The tree at ten million cached tokens, after as many again were evicted: memory and times.

Cached text is random with the word frequencies of text, in documents of 8k tokens that came as a
chain of segments. A time is the best of three rounds for one prompt, so that what else runs on the
machine does not show, and the quantiles are over prompts. Runs in a process of its own.
"""

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from kvshare_sglang.bench.common import Progress, table
from kvshare_sglang.bench.match import memory
from kvshare_sglang.radix_fuzzy.fingerprints import Tokens
from kvshare_sglang.sim.life import Life
from kvshare_sglang.sim.matcher import KVShare, Text

DOC = 8192
VOCAB = 32_768
SMALL, LARGE = 100_000, 10_000_000
SIZES = {"8k": 8192, "32k": 32_768, "100k": 102_400}
PROMPTS = {"8k": 200, "32k": 100, "100k": 20}
ROUNDS = 3


class Store:
    """A tree filled with documents that can be written again from their numbers."""

    def __init__(self) -> None:
        self.matcher = KVShare()
        self.held: list[int] = []  # numbers of the documents, oldest first
        self.insert_s: list[float] = []
        self._segments: dict[int, np.ndarray] = {}  # of a document: (id, start) of each
        self._stops: dict[int, int] = {}

    @property
    def num_tokens(self) -> int:
        return self.matcher.tree.num_tokens

    def add(self, number: int, *, cuts: int | None = None) -> None:
        tokens = document(number)
        rng = np.random.default_rng([2, number])
        cuts = int(rng.integers(0, 16)) if cuts is None else cuts
        borders = [0, *np.sort(rng.choice(np.arange(1, DOC // 64), cuts, False) * 64).tolist(), DOC]
        parent: int | None = None
        held = []
        started = time.perf_counter()
        for a, b in pairwise(borders):
            parent = self.matcher.insert(Text(None, tokens[:b], start=a, parent=parent))
            held.append((parent, a))
        self.insert_s.append(time.perf_counter() - started)
        self.held.append(number)
        self._segments[number] = np.array(held, np.int64)
        self._stops[number] = DOC

    def drop(self, number: int, stop: int) -> None:
        """Evict a document from its end down to ``stop``."""
        segments = self._segments[number]
        for segment, start in segments[::-1].tolist():
            if start >= stop or stop < self._stops[number]:
                self.matcher.trim(segment, max(start, stop))
            if start <= stop:
                break
        self._segments[number] = segments[segments[:, 1] < stop]
        self._stops[number] = stop
        if stop == 0:
            self.held.remove(number)
            del self._segments[number], self._stops[number]

    def fill(self, size: int, first: int, bar: Progress | None = None) -> int:
        """Add documents up to ``size`` tokens; the next number."""
        while self.num_tokens + DOC <= size:
            self.add(first)
            first += 1
            if bar is not None:
                bar.update(DOC)
        return first

    def passage(self, rng: np.random.Generator, size: int) -> Tokens:
        """Cached text from a random place."""
        number = self.held[int(rng.integers(len(self.held)))]
        stop = self._stops[number]
        at = int(rng.integers(max(stop - size, 1)))
        return document(number)[at : min(at + size, stop)]


def document(number: int) -> Tokens:
    return words(np.random.default_rng([1, number]), DOC)


def words(rng: np.random.Generator, num: int) -> Tokens:
    return np.searchsorted(_FREQUENCIES, rng.random(num)).astype(np.int32)


_FREQUENCIES = np.cumsum(1 / (np.arange(VOCAB) + 2.7))
_FREQUENCIES /= _FREQUENCIES[-1]


def prompt_of(passage: Callable[[int], Tokens], rng: np.random.Generator, size: int) -> Tokens:
    """Passages of 128 to 1024 tokens, most with an edit or two, between some fresh text."""
    parts: list[Tokens] = []
    while sum(map(len, parts)) < size:
        cached = passage(int(rng.integers(128, 1025)))
        at = int(rng.integers(len(cached)))
        edit = words(rng, int(rng.integers(0, 9)))
        parts += [cached[:at], edit, cached[at:], words(rng, int(rng.integers(0, 257)))]
    return np.concatenate(parts)[:size].astype(np.int32)


def times(lookups: Sequence[Callable[[], Any]]) -> np.ndarray:
    """Seconds of each lookup: the best of some rounds over all of them."""
    best = np.full(len(lookups), np.inf)
    for _ in range(ROUNDS):
        for i, lookup in enumerate(lookups):
            started = time.perf_counter()
            lookup()
            best[i] = min(best[i], time.perf_counter() - started)
    return best


def quantiles(seconds: np.ndarray) -> dict[str, float]:
    return {
        "ms_p50": float(np.median(seconds) * 1e3),
        "ms_p99": float(np.quantile(seconds, 0.99) * 1e3),
        "n": len(seconds),
    }


def measure(real: Sequence[Tokens], *, large: int = LARGE, seed: int = 0) -> dict[str, Any]:
    """The figures of the JSON's "scale". ``real`` are the prompts of the files."""
    out: dict[str, Any] = {}
    rng = np.random.default_rng(seed)

    def lookup(matcher: KVShare, prompt: Tokens) -> Callable[[], Any]:
        return lambda: matcher.match(None, prompt, start=0, max_depth=0)

    with Progress(2 * large, unit=" tokens") as bar:
        bar.say("scale: filling")
        small = Store()
        small.fill(SMALL, 10**9)
        KVShare().insert(Text(None, document(0)))
        before = memory.rss()
        store = Store()
        following = store.fill(large, 0, bar)
        out["bytes_per_token_filled"] = (memory.rss() - before) / store.num_tokens
        bar.say("scale: eviction churn")
        for _ in range(large // DOC):
            while store.num_tokens + DOC > large:
                if rng.random() < 0.3:  # the end of a conversation goes before its beginning
                    some = store.held[int(rng.integers(len(store.held)))]
                    store.drop(some, int(store._stops[some] * rng.random()) // 64 * 64)
                else:
                    store.drop(store.held[0], 0)
            store.add(following)
            following += 1
            bar.update(DOC)
        out["bytes_per_token"] = (memory.rss() - before) / store.num_tokens
        out["tokens"], out["segments"] = store.num_tokens, store.matcher.tree.num_segments
        out["insert_chain_8k"] = quantiles(np.array(store.insert_s))
        out["insert_chain_8k"]["ms_mean"] = float(np.mean(store.insert_s) * 1e3)
        bar.say("scale: inserts")
        store.insert_s.clear()
        for _ in range(100):
            store.drop(store.held[0], 0)
            store.add(following, cuts=0)
            following += 1
        out["insert_8k"] = quantiles(np.array(store.insert_s))
        bar.say("scale: lookups")
        out["full_match"], out["full_match_at_100k"], out["nothing"] = {}, {}, {}
        both: list[np.ndarray] = []
        for name, size in SIZES.items():
            fresh = [words(rng, size) for _ in range(PROMPTS[name])]
            out["nothing"][name] = quantiles(times([lookup(store.matcher, p) for p in fresh]))
            if name == "100k":
                continue
            pairs: list[Callable[[], Any]] = []  # large and small in turn
            for _ in range(PROMPTS[name]):
                for tree in (store, small):
                    prompt = prompt_of(lambda n, t=tree: t.passage(rng, n), rng, size)  # type: ignore[misc]
                    pairs.append(lookup(tree.matcher, prompt))
            seconds = times(pairs)
            out["full_match"][name] = quantiles(seconds[0::2])
            out["full_match_at_100k"][name] = quantiles(seconds[1::2])
            both.append(np.array([np.median(seconds[0::2]), np.median(seconds[1::2])]))
        out["lookup_ratio"] = float(max(a / b for a, b in both))
        bar.say("scale: real text")
        out["full_match_real"] = _real(real, rng)
        bar.say("scale measured")
    return out


def _real(prompts: Sequence[Tokens], rng: np.random.Generator) -> dict[str, Any]:
    """Lookup of shuffled passages of the files in a tree that holds all the files."""
    life = Life(KVShare(), keep_all=True)
    for prompt in prompts:
        life.serve(None, prompt)

    def passage(num: int) -> Tokens:
        prompt = prompts[int(rng.integers(len(prompts)))]
        at = int(rng.integers(max(len(prompt) - num, 1)))
        return prompt[at : at + num]

    out: dict[str, Any] = {"tokens": life.resident}
    for name in ("8k", "32k"):
        mixed = [prompt_of(passage, rng, SIZES[name]) for _ in range(PROMPTS[name])]
        out[name] = quantiles(
            times([lambda p=p: life.matcher.match(None, p, start=0, max_depth=0) for p in mixed])  # type: ignore[misc]
        )
    return out


def show(result: dict[str, Any]) -> str:
    cells = [
        ("bytes a token, filled", f"{result['bytes_per_token_filled']:.1f}", ""),
        ("bytes a token, churned", f"{result['bytes_per_token']:.1f}", ""),
        ("lookup, times that at 100k", f"{result['lookup_ratio']:.2f}", ""),
    ]
    for group in ("full_match", "full_match_at_100k", "full_match_real", "nothing"):
        for name in SIZES:
            if name in result[group]:
                at = result[group][name]
                title = f"{group.replace('_', ' ')} {name}, ms"
                cells.append((title, f"{at['ms_p50']:.2f}", f"{at['ms_p99']:.2f}"))
    for group in ("insert_8k", "insert_chain_8k"):
        at = result[group]
        title = f"{group.replace('_', ' ')}, ms"
        cells.append((title, f"{at['ms_p50']:.2f}", f"{at['ms_p99']:.2f}"))
    head = (f"{result['tokens']} tokens, {result['segments']} segments", "p50", "p99")
    return table(head, cells)
