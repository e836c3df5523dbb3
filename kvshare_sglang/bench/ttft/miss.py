"""What a prompt costs that finds nothing to reuse."""

import time
from typing import Any

import numpy as np

from kvshare_sglang.bench import common
from kvshare_sglang.bench.common import ScriptError
from kvshare_sglang.bench.server import Server
from kvshare_sglang.bench.ttft.arms import Bench, prime
from kvshare_sglang.bench.ttft.cases import random_tokens
from kvshare_sglang.radix_fuzzy.tree import FuzzyTree

MISS_LENGTHS = (256, 512)


def lookup_ms(*, cached: int = 100_000, prompt_len: int = 8192, repeats: int = 200) -> float:
    """Median time of a lookup that finds nothing, over a tree of ``cached`` tokens."""
    rng = np.random.default_rng(2)
    tree = FuzzyTree()
    for _ in range(cached // 2000):
        tree.insert((None, None), random_tokens(rng, 2000, 32000))
    times = []
    for _ in range(repeats):
        prompt = random_tokens(rng, prompt_len, 32000)
        started = time.perf_counter()
        runs = tree.match((None, None), prompt)
        times.append(time.perf_counter() - started)
        if runs:
            raise ScriptError(f"a random prompt was found in the cache: {runs}")
    return common.median(times) * 1e3


def measure_miss(bench: Bench, without: Server, ours: Server) -> dict[str, Any]:
    """TTFT of kvshare over that of a server with the same setting but without it, in pairs.

    Both caches hold text already, so that there is something to look through.
    """
    rng = np.random.default_rng(3)
    vocab = bench.vocab
    pairs = bench.args.miss_pairs
    prime([without, ours], [random_tokens(rng, 1024, vocab) for _ in range(4)])
    seconds: dict[str, list[float]] = {"without": [], "kvshare": []}
    with common.Progress(pairs, unit=" pairs") as bar:
        for turn in range(-4, pairs):  # the first four are a warm-up
            bar.say("prompts with nothing to reuse")
            ids = random_tokens(rng, int(rng.integers(*MISS_LENGTHS, endpoint=True)), vocab)
            order = (without, ours) if turn % 2 else (ours, without)
            answers = {server is ours: server.ask(ids.tolist()) for server in order}
            if answers[True].kvshare["copied_tokens"]:
                raise ScriptError(f"kvshare reused in a fresh prompt: {answers[True].kvshare}")
            if turn >= 0:
                seconds["kvshare"].append(answers[True].ttft_s)
                seconds["without"].append(answers[False].ttft_s)
                bar.update()
    pairs_s = zip(seconds["kvshare"], seconds["without"], strict=True)
    ratios = [ours_s / without_s for ours_s, without_s in pairs_s]
    return {
        "ttft_ratio_p50": common.median(ratios),
        "ci95": common.bootstrap_ci95(ratios),
        "ttft_p50_s": {arm: common.median(each) for arm, each in seconds.items()},
    }
