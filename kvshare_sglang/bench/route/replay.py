"""Replay requests through a stack: what was reused; what the router adds to a request."""

import argparse
import statistics
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil

from kvshare_sglang.bench.common import KINDS, Progress
from kvshare_sglang.bench.route.stack import Stack

REPEATS = 60  # requests by each way, for what the router adds


def client() -> httpx.Client:
    return httpx.Client(timeout=httpx.Timeout(600, connect=10), trust_env=False)


def body(text: str, new: int) -> dict[str, Any]:
    sampling = {"temperature": 0, "max_new_tokens": new, "ignore_eos": True}
    return {"text": text, "sampling_params": sampling}


def replay(stack: Stack, prompts: Sequence[str], args: argparse.Namespace) -> dict[str, Any]:
    """Tokens by kind, by worker too; failures."""
    tokens: Counter[str] = Counter()
    served: Counter[str] = Counter()
    times: list[float] = []
    failed, lock = [0], threading.Lock()
    with client() as http, Progress(len(prompts), unit=" requests") as bar:
        bar.say(stack.arm)

        def one(text: str) -> None:
            started = time.perf_counter()
            reply = http.post(f"{stack.url}/generate", json=body(text, args.max_new_tokens))
            took = time.perf_counter() - started
            with lock:
                bar.update()
                if reply.status_code != 200:
                    failed[0] += 1
                    return
                record = reply.json()["meta_info"]["kvshare"][-1]
                tokens.update({kind: record[f"{kind}_tokens"] for kind in KINDS})
                served[reply.headers["x-smg-routed-worker-id"]] += 1
                times.append(took)

        with ThreadPoolExecutor(args.at_once) as pool:
            list(pool.map(one, prompts))
    every = sum(tokens.values())
    reused = tokens["exact"] + tokens["blended"] + tokens["copied"]
    return {
        "requests": len(prompts),
        "failed": failed[0],
        "tokens": dict(tokens),
        "reused_share": reused / every,
        "exact_share": tokens["exact"] / every,
        "found_share": (reused + tokens["recomputed"]) / every,
        "spread": max(served.values()) / sum(served.values()),
        "p50_s": statistics.median(times),
    }


def ratio(arms: dict[str, Any]) -> float:
    """Tokens reused by the router over those of ``cache_aware``."""
    share = arms["router"]["reused_share"] / arms["cache_aware"]["reused_share"]
    return float(share)


def added(stack: Stack, prompts: Sequence[str]) -> dict[str, Any]:
    """What a request takes longer through the router than through its gateway: the same prompt, all
    of it cached, by turns on one worker; tokenised by the worker there and by the router here. On a
    busy machine the router's own CPU time says more."""
    assert stack.router is not None
    text = sorted(prompts, key=len)[len(prompts) // 2]
    ways: dict[str, list[float]] = {stack.url: [], stack.gateway_url: []}
    router = psutil.Process(stack.router.pid)
    cpu = 0.0
    with client() as http:
        first = http.post(f"{stack.url}/generate", json=body(text, 1))
        time.sleep(1)  # it is in the index
        picked = http.post(f"{stack.url}/pick", json=body(text, 1)).json()
        before = http.get(f"{stack.url}/metrics").text
        for turn in range(2 * REPEATS):
            way = list(ways)[turn % 2]
            key = {"x-smg-routing-key": picked["routing_key"]} if turn % 2 else {}
            used = _cpu(router)
            started = time.perf_counter()
            reply = http.post(f"{way}/generate", json=body(text, 1), headers=key)
            took = time.perf_counter() - started
            cpu += 0 if turn % 2 else _cpu(router) - used
            if reply.headers.get("x-smg-routed-worker-id") == picked["worker"]:
                ways[way].append(took)
        after = http.get(f"{stack.url}/metrics").text
    here, there = (statistics.median(ways[way]) for way in (stack.url, stack.gateway_url))
    return {
        "tokens": first.json()["meta_info"]["prompt_tokens"],
        "samples": [len(times) for times in ways.values()],
        "router_p50_ms": 1e3 * here,
        "gateway_p50_ms": 1e3 * there,
        "total_ms": 1e3 * (here - there),
        "router_cpu_ms": 1e3 * cpu / REPEATS,
        "tokenise_ms": 1e3 * _mean(before, after, "tokenise_seconds"),
        "choose_ms": 1e3 * _mean(before, after, "choose_seconds"),
    }


def _cpu(process: Any) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _mean(before: str, after: str, name: str) -> float:
    """Of what a histogram counted in between, in seconds."""
    pages = [
        dict(line.rsplit(" ", 1) for line in page.splitlines() if line[:1] != "#")
        for page in (before, after)
    ]
    name = f"kvshare_router_{name}"
    total, count = (
        float(pages[1][f"{name}_{part}"]) - float(pages[0][f"{name}_{part}"])
        for part in ("sum", "count")
    )
    return total / count
