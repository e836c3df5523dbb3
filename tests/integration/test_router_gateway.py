"""The router before the real gateway, smg, with workers that compute nothing."""

import concurrent.futures
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from fake_worker import TEXTS

from kvshare_sglang.bench.processes import free_port

pytest.importorskip("smg", reason="the gateway is not installed")
HERE = Path(__file__).parent
# Its breaker leaves a worker alone for 60 s by default.
GATEWAY = "--log-level warn --cb-timeout-duration-secs 1 --health-check-interval-secs 1"
GATEWAY += " --cb-failure-threshold 2"


class Stack:
    """Two workers, the gateway, the router."""

    def __init__(self, folder: Path) -> None:
        self.ports = [free_port() for _ in range(2)]
        self.url = f"http://127.0.0.1:{free_port()}"
        self.gateway = f"http://127.0.0.1:{free_port()}"
        self._streams = [f"ipc://{folder}/{port}" for port in self.ports]
        self._log = (folder / "log").open("wb")
        self.workers = [self.start_worker(i) for i in range(2)]
        self.router = self.start_router()

    def _start(self, *words: str) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            [sys.executable, *words],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )

    def start_worker(self, i: int, *, stream: bool = True) -> "subprocess.Popen[bytes]":
        more = [self._streams[i]] if stream else []
        return self._start(str(HERE / "fake_worker.py"), str(self.ports[i]), str(i), *more)

    def start_router(self) -> "subprocess.Popen[bytes]":
        named = [
            f"--worker=http://127.0.0.1:{port}={stream}"
            for port, stream in zip(self.ports, self._streams, strict=True)
        ]
        return self._start(
            *("-m", "kvshare_sglang.router", "--port", self.url.rsplit(":", 1)[1]),
            *("--launch-gateway", "--gateway-port", self.gateway.rsplit(":", 1)[1]),
            *("--drain-seconds", "5"),
            *(f"--gateway-arg={word}" for word in GATEWAY.split()),
            *named,
        )

    def ask(self, text: int, *, url: str = "", **body: Any) -> int:
        """Ask for an answer to a prompt; the port of the worker that served."""
        prompt = prompt_with(text)
        reply = requests.post(
            (url or self.url) + "/generate", json={"input_ids": prompt, **body}, timeout=30
        )
        assert reply.status_code == 200, reply.text
        if not body.get("stream"):
            return int(reply.json()["port"])
        events = [line[6:] for line in reply.text.splitlines() if line]
        assert events.pop() == "[DONE]"
        assert [json.loads(event)["n"] for event in events] == [0, 1, 2]
        return int(json.loads(events[0])["port"])

    def gateway_uses_both(self) -> bool:
        body = {"input_ids": [1, 2, 3]}
        replies = [requests.post(self.gateway + "/generate", json=body) for _ in range(8)]
        good = [reply.json()["port"] for reply in replies if reply.status_code == 200]
        return len(good) == 8 and len(set(good)) == 2

    def indexed(self) -> list[Any]:
        try:
            told = requests.get(self.url + "/health", timeout=30)
        except requests.RequestException:
            return []
        return [told.status_code, *(one["indexed_tokens"] for one in told.json()["workers"])]

    def close(self) -> None:
        self.router.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.router.wait(20)
        for process in (self.router, *self.workers):
            process.kill()
            process.wait()
        self._log.close()


def prompt_with(text: int) -> list[int]:
    """A prompt that begins with new words and holds text 0 or 1."""
    return [7, 8, 9, *TEXTS[text].tolist(), 10]


def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.1)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    it = Stack(tmp_path_factory.mktemp("stack"))
    try:
        until(lambda: it.indexed() == [200, 400, 400], "the stack did not come up")
        yield it
    finally:
        it.close()


def test_each_text_goes_to_the_worker_that_holds_it_and_a_dead_one_loses_no_request(
    stack: Stack,
) -> None:
    """One story, since a stack takes seconds to start."""
    until(stack.gateway_uses_both, "the gateway did not find its workers")
    for text in (0, 1, 1, 0):
        assert stack.ask(text) == stack.ports[text]
        assert stack.ask(text, stream=True) == stack.ports[text]

    # kill -9 in mid-run: what has not begun to answer is served by the next one.
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(stack.ask, i % 2, hold=stack.ports[0]) for i in range(8)]
        time.sleep(0.2)
        stack.workers[0].kill()
        stack.workers[0].wait()
        after = [pool.submit(stack.ask, i % 2) for i in range(8)]
        served = [job.result() for job in (*waiting, *after)]
    assert set(served) == {stack.ports[1]}
    until(lambda: stack.indexed() == [200, None, 400], "the dead worker's text stayed")

    # It comes back without a stream: the router serves on, by load, and its text is not guessed.
    stack.workers[0] = stack.start_worker(0, stream=False)
    until(stack.gateway_uses_both, "the gateway did not take it back")
    assert stack.ask(1) == stack.ports[1]
    assert stack.ask(0) in stack.ports

    # And with one again.
    stack.workers[0].kill()
    stack.workers[0].wait()
    stack.workers[0] = stack.start_worker(0)
    until(lambda: stack.indexed() == [200, 400, 400], "it was not indexed again")

    # A router that is stopped stops its gateway.
    assert requests.get(stack.gateway + "/health", timeout=5).status_code == 200
    os.kill(stack.router.pid, signal.SIGTERM)
    stack.router.wait(20)
    with pytest.raises(requests.ConnectionError):
        requests.get(stack.gateway + "/health", timeout=5)
