"""The router's index alone: time and memory for 1 to 64 workers. No servers."""

import time
from typing import Any

import numpy as np

from kvshare_sglang import wire
from kvshare_sglang.bench import common
from kvshare_sglang.policy.options import RequestOptions
from kvshare_sglang.router.cost import SLACK
from kvshare_sglang.router.index import Index

DOCUMENT, PIECES = 600, 6  # tokens of a document, and how many make a prompt
HELD = 120_000  # tokens of a worker
TURNS, LOOKED_AT = 100, 30  # prompts, and those for which all workers are looked at exactly
NONE = (None, None)


def measure() -> dict[str, Any]:
    """Each worker holds documents of a common stock, most of them on a few workers; a prompt is
    some of them in any order and new text."""
    return {"sizes": [_measure(num) for num in (1, 8, 64)]}


def _measure(num: int) -> dict[str, Any]:
    rng = np.random.default_rng(num)
    stock = rng.integers(0, 50_000, (num * HELD // DOCUMENT // 2 + PIECES, DOCUMENT))
    stock = stock.astype(np.int32)
    index = Index(num, secret=1)
    took = []
    for worker in range(num):
        mirror = index.begin(worker, wire.Snapshot(1, 1, worker, 1, {}, []))
        for number in range(1, HELD // (DOCUMENT * PIECES) + 1):
            chosen = rng.choice(len(stock), PIECES, replace=False)
            tokens = stock[chosen].reshape(-1)
            event = wire.Insert(number, (*NONE, 0), 0, 0, 0, 0, 0, tokens.tobytes())
            started = time.perf_counter()
            mirror.apply([event])
            took.append((time.perf_counter() - started) / len(tokens))
        index.hear(worker, wire.Beat(1, 1, 0, 0, 0, 0, 0.0), 0.0)
    times, cpu, best = [], [], 0
    for turn in range(TURNS):
        chosen = rng.choice(len(stock), PIECES, replace=False)
        fresh = rng.integers(0, 50_000, 60).astype(np.int32)
        prompt = np.concatenate([fresh, stock[chosen].reshape(-1), fresh[::-1]])
        started, begun = time.perf_counter(), time.thread_time()
        choice = index.choose(prompt, NONE, RequestOptions(), 0.0)
        times.append(time.perf_counter() - started)
        cpu.append(time.thread_time() - begun)
        if turn < LOOKED_AT:
            works = [index.work(worker, prompt, NONE, RequestOptions()) for worker in range(num)]
            fewest = min(work.rows for work in works if work)
            best += bool(choice.work and choice.work.rows <= fewest + SLACK * len(prompt))
    choose = common.spread(times)
    return {
        "workers": num,
        "tokens": sum(one.mirror.num_tokens for one in index.workers if one.mirror),
        "prompt_tokens": PIECES * DOCUMENT + 120,
        "choose_ms": {"p25": 1e3 * choose.q25, "p50": 1e3 * choose.p50, "p75": 1e3 * choose.q75},
        "choose_cpu_ms": 1e3 * common.median(cpu),
        "about_the_best": best / LOOKED_AT,
        "insert_us_a_token": 1e6 * common.median(took),
        "mib": index.nbytes / 2**20,
    }


def show(result: dict[str, Any]) -> str:
    rows = [{**one, "p50": one["choose_ms"]["p50"]} for one in result["sizes"]]
    return common.columns(
        rows,
        workers="{workers}",
        tokens="{tokens:,}",
        choose_p50="{p50:.2f} ms",
        cpu="{choose_cpu_ms:.2f} ms",
        about_the_best="{about_the_best:.0%}",
        insert="{insert_us_a_token:.2f} us/token",
        memory="{mib:.0f} MiB",
    )
