"""Break parts in mid-run and count the requests that are lost, with the router and without.

Each fault happens while requests go on, eight at once. A client waits ``PATIENCE_S`` for an answer.
Where the router breaks off before it answered, it asks the gateway, as a deployment would: such
requests are counted as ``again``, and as lost only if that fails too.
"""

import dataclasses
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from kvshare_sglang.bench.route.replay import body
from kvshare_sglang.bench.route.stack import Stack
from kvshare_sglang.bench.server import Server, wait_ready

AT_ONCE, NUM = 8, 96
PATIENCE_S = 60.0
FROZEN_S = 6.0


def measure(
    arm: str, servers: list[Server], streams: Sequence[str], model: Path, prompts: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """For each fault how its requests fared. No server is left frozen, and the one that is killed
    is started again, in its place in ``servers``."""
    out = {}
    with Stack(arm, servers, streams, model) as stack:
        out["none"] = during(stack, prompts, lambda: None)
        out["frozen worker"] = during(stack, prompts, lambda: freeze(servers[0]))
        out["kill -9 worker"] = during(stack, prompts, lambda: kill(servers[0]))
        servers[0].stop()
        servers[0] = start_again(servers[0])
        if stack.router is not None:
            out["kill -9 router"] = during(stack, prompts, stack.router.kill)
    return out


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
