"""Break parts in mid-run and count the requests that are lost, with the router and without.

Each fault happens while requests go on, eight at once. A client waits ``PATIENCE_S`` for an answer,
and where it cannot connect to the router it asks the gateway, as a deployment would.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from kvshare_sglang.bench.route.replay import body
from kvshare_sglang.bench.route.stack import Stack
from kvshare_sglang.bench.server import Server

AT_ONCE, NUM = 8, 96
PATIENCE_S = 60.0
FROZEN_S = 6.0


def measure(
    arm: str, servers: Sequence[Server], streams: Sequence[str], model: Path, prompts: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """For each fault: requests, how many were lost, the longest wait. No server is left frozen; the
    killed router and gateway are this arm's own."""
    out = {}
    with Stack(arm, servers, streams, model) as stack:
        out["none"] = during(stack, prompts, lambda: None)
        out["frozen worker"] = during(stack, prompts, lambda: freeze(servers[0]))
        if stack.router is not None:
            out["kill -9 router"] = during(stack, prompts, stack.router.kill)
    return out


def freeze(server: Server) -> None:
    os.killpg(server.process.pid, signal.SIGSTOP)
    try:
        time.sleep(FROZEN_S)
    finally:
        os.killpg(server.process.pid, signal.SIGCONT)


def during(stack: Stack, prompts: Sequence[str], fault: Callable[[], Any]) -> dict[str, Any]:
    """Send ``NUM`` requests; a quarter of the way in, the fault happens."""
    lost, waits, lock = [0], [0.0], threading.Lock()
    started, broken = threading.Semaphore(0), threading.Event()
    limits = httpx.Timeout(PATIENCE_S, connect=5)
    with httpx.Client(timeout=limits, trust_env=False) as http:

        def one(i: int) -> None:
            started.release()
            begun, good = time.perf_counter(), False
            for url in dict.fromkeys((stack.url, stack.gateway_url)):
                try:
                    asked = body(prompts[i % len(prompts)], 4)
                    good = http.post(f"{url}/generate", json=asked).status_code == 200
                except httpx.ConnectError:
                    continue
                except httpx.HTTPError:
                    good = False
                break
            with lock:
                lost[0] += not good
                waits[0] = max(waits[0], time.perf_counter() - begun)

        def break_it() -> None:
            for _ in range(NUM // 4):
                started.acquire()
            fault()
            broken.set()

        thread = threading.Thread(target=break_it)
        thread.start()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(one, range(NUM)))
        thread.join()
    return {"requests": NUM, "lost": lost[0], "longest_s": waits[0]}
