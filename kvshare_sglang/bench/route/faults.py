"""Break parts in mid-run and count the requests that are lost, with the router and without.

Requests come at a fixed rate (open loop), every other one as a stream; a quarter of the way in the
fault befalls the worker that has served most so far. A client waits ``PATIENCE_S`` for an answer.
Where the router breaks off before it answered, it asks the gateway, as a deployment would: such
requests are counted as ``again``, and as lost only if that fails too.
"""

import contextlib
import dataclasses
import os
import signal
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from kvshare_sglang.bench.route.relay import Relay
from kvshare_sglang.bench.route.replay import body, client
from kvshare_sglang.bench.route.stack import Stack
from kvshare_sglang.bench.server import Server, wait_ready

NUM, RATE = 144, 3.0  # requests, and how many a second
NEW = 48  # tokens of each answer: some are always under way
PATIENCE_S = 60.0
FROZEN_S = 30.0
LAG_S = 5.0
BEAT_S = 0.5  # a worker tells five times a second what waits
BURST = 4  # requests that two routers get at once


class Shot(NamedTuple):
    """A request: seconds since the first was due, who served it, how often it was asked."""

    begun_s: float
    ended_s: float
    worker: str | None
    good: bool
    asked: int


def measure(
    arm: str, servers: list[Server], streams: Sequence[str], model: Path, prompts: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """For each fault how its requests fared. With a router, where the fault takes its index away,
    also ``recovered_s``: how long after it is mended, or the worker answers again, the router has
    all of it. No server is left frozen, and the one that is killed is started again, in its place
    in ``servers``."""
    out: dict[str, dict[str, Any]] = {}
    with _relays(streams) as relays, Stack(arm, servers, list(relays), model) as stack:
        stands = list(relays.values())

        def try_one(name: str, fault: Callable[[int], Any], mend: Callable[[int], Any]) -> None:
            out[name] = during(stack, prompts, fault)
            mend(int(out[name]["victim"]))
            if stack.router is not None:
                out[name]["recovered_s"] = stack.wait(stack.has_index, f"{name}: the index")
            stack.wait(stack.is_ready, f"{name}: the gateway")  # knows of both workers again

        def again(victim: int) -> None:
            servers[victim].stop()
            servers[victim] = start_again(servers[victim])

        try_one("none", nothing, nothing)
        if stack.router is not None:
            try_one("stream cut", lambda v: stands[v].cut(), lambda v: stands[v].mend())
            try_one("stream lags", lambda v: stands[v].lag(LAG_S), lambda v: stands[v].lag(0))
        try_one("frozen worker", lambda v: freeze(servers[v]), nothing)
        try_one("kill -9 worker", lambda v: kill(servers[v]), again)
        if stack.router is not None:
            router = stack.router
            out["kill -9 router"] = during(stack, prompts, lambda _: router.kill())
    return out


def agreement(
    servers: Sequence[Server], streams: Sequence[str], model: Path, prompts: Sequence[str]
) -> dict[str, Any]:
    """Two routers side by side over empty caches, prompts in bursts through the two by turns: how
    often both name the same worker for the next prompt, and the same rows, at once, while the burst
    is under way, and a little more than a beat later; and for how many prompts there was text to
    find (``found``)."""
    same: Counter[str] = Counter()
    for server in servers:
        server.flush()
    with (
        Stack("router", servers, streams, model) as stack,
        client() as http,
        ThreadPoolExecutor(4 * BURST) as pool,
    ):
        urls = (stack.url, stack.second_router())

        def send(turn: int) -> None:
            url = urls[turn % 2]
            http.post(f"{url}/generate", json=body(prompts[turn], NEW)).raise_for_status()

        def compare(when: str, prompt: str) -> bool:
            told = [http.post(f"{url}/pick", json=body(prompt, NEW)).json() for url in urls]
            same[when] += told[0]["worker"] == told[1]["worker"]
            same[f"{when}, rows"] += told[0]["predicted_rows"] == told[1]["predicted_rows"]
            return bool(told[0]["predicted_rows"] < told[0]["prompt_tokens"])

        turns = range(0, len(prompts) - BURST, BURST)
        sent = []
        for turn in turns:
            sent += [pool.submit(send, one) for one in range(turn, turn + BURST)]
            time.sleep(0.02)  # they are with the routers
            following = prompts[turn + BURST]
            compare("at once", following)
            time.sleep(BEAT_S)
            same["found"] += compare("after a beat", following)
        for one in sent:
            one.result()
    shares = {when: count / len(turns) for when, count in same.items()}
    return {"requests": len(turns), "burst": BURST, **shares}


@contextlib.contextmanager
def _relays(streams: Sequence[str]) -> Iterator[dict[str, Relay]]:
    """A relay before each stream, by the endpoint that its readers connect to."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        relays = {}
        for number, stream in enumerate(streams):
            endpoint = f"ipc://{folder}/{number}"
            relays[endpoint] = stack.enter_context(contextlib.closing(Relay(endpoint, stream)))
        yield relays


def nothing(_: int) -> None:
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


def during(stack: Stack, prompts: Sequence[str], fault: Callable[[int], Any]) -> dict[str, Any]:
    """Send ``NUM`` requests, ``RATE`` a second; a quarter of the way in, the fault happens to the
    worker that served most of those before (``victim``). ``inside``: requests under way with it
    then, as far as they were answered by it in the end, or lost."""
    shots: list[Shot] = []
    broken: dict[str, Any] = {}
    begin = time.perf_counter()
    limits = httpx.Timeout(PATIENCE_S, connect=5)
    free = httpx.Limits(max_connections=None)
    with httpx.Client(timeout=limits, limits=free, trust_env=False) as http:

        def one(i: int) -> None:
            time.sleep(max(0.0, begin + i / RATE - time.perf_counter()))
            due, good, asked, worker = i / RATE, False, 0, None
            for url in dict.fromkeys((stack.url, stack.gateway_url)):
                asked += 1
                try:
                    good, worker = ask(http, url, prompts[i % len(prompts)], stream=i % 2 == 1)
                    break
                except httpx.TimeoutException:
                    break
                except httpx.TransportError:
                    continue
            shots.append(Shot(due, time.perf_counter() - begin, worker, good, asked))

        def break_it() -> None:
            time.sleep(NUM / 4 / RATE)
            broken["victim"] = victim = busiest(stack.workers, shots)
            broken["at_s"] = time.perf_counter() - begin
            fault(victim)

        with ThreadPoolExecutor(NUM + 1) as pool:
            last = pool.submit(break_it)
            list(pool.map(one, range(NUM)))
            last.result()
    return told(shots, broken["at_s"], stack.workers, broken["victim"])


def ask(http: httpx.Client, url: str, prompt: str, *, stream: bool) -> tuple[bool, str | None]:
    """Whether the whole answer came, and which worker served it."""
    asked = body(prompt, NEW) | {"stream": stream}
    with http.stream("POST", f"{url}/generate", json=asked) as reply:
        text = reply.read()
        whole = text.rstrip().endswith(b"[DONE]") and b'"error"' not in text if stream else True
        return reply.status_code == 200 and whole, reply.headers.get("x-smg-routed-worker-id")


def busiest(workers: Sequence[str], shots: Sequence[Shot]) -> int:
    """The number of the worker that served most."""
    served = Counter(shot.worker for shot in shots if shot.worker is not None)
    return max(range(len(workers)), key=lambda i: served[workers[i]])


def told(shots: Sequence[Shot], at_s: float, workers: Sequence[str], victim: int) -> dict[str, Any]:
    """What became of the requests, those before the fault (``before_p50_s``) and all."""
    took = [shot.ended_s - shot.begun_s for shot in shots]
    before = [shot.ended_s - shot.begun_s for shot in shots if shot.ended_s < at_s]
    under_way = [shot for shot in shots if shot.begun_s < at_s < shot.ended_s]
    inside = [one for one in under_way if one.worker == workers[victim] or not one.good]
    after = [shot for shot in shots if shot.begun_s > at_s]
    return {
        "requests": len(shots),
        "lost": sum(not shot.good for shot in shots),
        "again": sum(shot.asked > 1 for shot in shots),
        "longest_s": max(took),
        "before_p50_s": statistics.median(before),
        "victim": victim,
        "under_way": len(under_way),
        "inside": len(inside),
        "victim_served_after": sum(shot.worker == workers[victim] for shot in after),
        "after": len(after),
        "waited_2_s": sum(seconds > 2 for seconds in took),
    }
