"""Break parts in mid-run and count the requests that are lost, with the router and without.

Each fault happens while requests go on, eight at once. A client waits ``PATIENCE_S`` for an answer.
Where the router breaks off before it answered, it asks the gateway, as a deployment would: such
requests are counted as ``again``, and as lost only if that fails too.
"""

import contextlib
import dataclasses
import itertools
import os
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from kvshare_sglang.bench.route.relay import Relay
from kvshare_sglang.bench.route.replay import body, client
from kvshare_sglang.bench.route.stack import Stack
from kvshare_sglang.bench.server import Server, wait_ready

AT_ONCE, NUM = 8, 96
PATIENCE_S = 60.0
FROZEN_S = 6.0
LAG_S = 5.0
BEAT_S = 0.5  # a worker tells five times a second what waits


def measure(
    arm: str, servers: list[Server], streams: Sequence[str], model: Path, prompts: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """For each fault how its requests fared. With a router, where the fault takes its index away,
    also ``recovered_s``: how long after the stream is mended, or the worker answers again, the
    router has all of it. No server is left frozen, and the one that is killed is started again, in
    its place in ``servers``."""
    out = {}
    with _relays(streams) as relays, Stack(arm, servers, list(relays), model) as stack:

        def try_one(name: str, fault: Callable[[], Any]) -> None:
            out[name] = during(stack, prompts, fault)

        def wait_for_index(name: str) -> None:
            if stack.router is not None:
                out[name]["recovered_s"] = stack.wait(stack.has_index, f"{name}: the index")

        first = next(iter(relays.values()))
        try_one("none", nothing)
        if stack.router is not None:
            try_one("stream cut", first.cut)
            first.mend()
            wait_for_index("stream cut")
            try_one("stream lags", lambda: first.lag(LAG_S))
            first.lag(0)
        try_one("frozen worker", lambda: freeze(servers[0]))
        try_one("kill -9 worker", lambda: kill(servers[0]))
        servers[0].stop()
        servers[0] = start_again(servers[0])
        wait_for_index("kill -9 worker")
        if stack.router is not None:
            try_one("kill -9 router", stack.router.kill)
    return out


def agreement(
    servers: Sequence[Server], streams: Sequence[str], model: Path, prompts: Sequence[str]
) -> dict[str, Any]:
    """Two routers side by side over empty caches, each prompt through one of them by turns: how
    often both name the same worker for the next prompt, and the same rows, at once and a little
    more than a beat after the last was answered; and for how many prompts there was text to find
    (``found``)."""
    same: Counter[str] = Counter()
    for server in servers:
        server.flush()
    with Stack("router", servers, streams, model) as stack, client() as http:
        urls = (stack.url, stack.second_router())

        def compare(when: str, prompt: str) -> bool:
            told = [http.post(f"{url}/pick", json=body(prompt, 4)).json() for url in urls]
            same[when] += told[0]["worker"] == told[1]["worker"]
            same[f"{when}, rows"] += told[0]["predicted_rows"] == told[1]["predicted_rows"]
            return bool(told[0]["predicted_rows"] < told[0]["prompt_tokens"])

        pairs = list(itertools.pairwise(prompts))
        for turn, (prompt, following) in enumerate(pairs):
            http.post(f"{urls[turn % 2]}/generate", json=body(prompt, 4)).raise_for_status()
            compare("at once", following)
            time.sleep(BEAT_S)
            same["found"] += compare("after a beat", following)
    shares = {when: count / len(pairs) for when, count in same.items()}
    return {"requests": len(pairs), **shares}


@contextlib.contextmanager
def _relays(streams: Sequence[str]) -> Iterator[dict[str, Relay]]:
    """A relay before each stream, by the endpoint that its readers connect to."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        relays = {}
        for number, stream in enumerate(streams):
            endpoint = f"ipc://{folder}/{number}"
            relays[endpoint] = stack.enter_context(contextlib.closing(Relay(endpoint, stream)))
        yield relays


def nothing() -> None:
    pass


def kill(server: Server) -> None:
    os.killpg(server.process.pid, signal.SIGKILL)


def start_again(server: Server) -> Server:
    again = Server(dataclasses.replace(server.spec, port=server.port), server.log.parent)
    wait_ready([again])
    return again


def freeze(server: Server) -> None:
    os.killpg(server.process.pid, signal.SIGSTOP)
    try:
        time.sleep(FROZEN_S)
    finally:
        os.killpg(server.process.pid, signal.SIGCONT)


def during(stack: Stack, prompts: Sequence[str], fault: Callable[[], Any]) -> dict[str, Any]:
    """Send ``NUM`` requests; a quarter of the way in, the fault happens."""
    counts: Counter[str] = Counter()
    waits, lock = [0.0], threading.Lock()
    started = threading.Semaphore(0)
    limits = httpx.Timeout(PATIENCE_S, connect=5)
    with httpx.Client(timeout=limits, trust_env=False) as http:

        def one(i: int) -> None:
            started.release()
            begun, good, asked = time.perf_counter(), False, 0
            for url in dict.fromkeys((stack.url, stack.gateway_url)):
                asked += 1
                try:
                    reply = http.post(f"{url}/generate", json=body(prompts[i % len(prompts)], 4))
                    good = reply.status_code == 200
                    break
                except httpx.TimeoutException:
                    break
                except httpx.TransportError:
                    continue
            with lock:
                counts.update(lost=not good, again=asked > 1)
                waits[0] = max(waits[0], time.perf_counter() - begun)

        def break_it() -> None:
            for _ in range(NUM // 4):
                started.acquire()
            fault()

        thread = threading.Thread(target=break_it)
        thread.start()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(one, range(NUM)))
        thread.join()
    return {
        "requests": NUM,
        "lost": counts["lost"],
        "again": counts["again"],
        "longest_s": waits[0],
    }
