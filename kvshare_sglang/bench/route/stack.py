"""The gateway, and in one arm the router before it, as processes over servers that run."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from kvshare_sglang.bench.common import ScriptError
from kvshare_sglang.bench.processes import free_port
from kvshare_sglang.bench.server import Server
from kvshare_sglang.router import gateway

ARMS = ("cache_aware", "router")
READY_S = 90
# The same checks of health in both arms; the arms differ in the policy alone.
_COMMON = ("--log-level", "error", "--prometheus-port")


class Stack:
    """``url``: where requests go; ``gateway_url``: the gateway itself."""

    def __init__(
        self, arm: str, servers: Sequence[Server], streams: Sequence[str], model: Path
    ) -> None:
        self.arm, self._model = arm, model
        self.workers = [f"http://127.0.0.1:{server.port}" for server in servers]
        self._streams = streams
        port, self.port = free_port(), free_port()
        self.gateway_url = f"http://127.0.0.1:{port}"
        self.url = self.gateway_url if arm == "cache_aware" else f"http://127.0.0.1:{self.port}"
        more = [*_COMMON, str(free_port())]
        if arm == "cache_aware":
            more += ["--policy", "cache_aware"]  # the last one counts
        words = gateway.command(self.workers, host="127.0.0.1", port=port, more=more)
        self.gateway = gateway.start(words)
        self.router = None if arm == "cache_aware" else self._start_router(self.port)
        self._others: list[subprocess.Popen[bytes]] = []

    def second_router(self) -> str:
        """Start one more, side by side with the first; its URL, once it holds what they hold."""
        port = free_port()
        self._others.append(self._start_router(port))
        url = f"http://127.0.0.1:{port}"
        self.wait(lambda: self.has_index(url), "a second router")
        return url

    def _start_router(self, port: int) -> "subprocess.Popen[bytes]":
        named = [
            f"--worker={url}={stream}"
            for url, stream in zip(self.workers, self._streams, strict=True)
        ]
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "kvshare_sglang.router", "--gateway", self.gateway_url),
                *("--port", str(port), "--model-path", str(self._model)),
                *("--log-level", "warning", *named),
            ],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def __enter__(self) -> "Stack":
        try:
            self.wait(self.is_ready, self.arm)
        except BaseException:
            self.close()
            raise
        return self

    def wait(self, ready: Callable[[], bool], what: str) -> float:
        """Seconds until it is; who does not answer is not. Raises ScriptError after ``READY_S``."""
        begun = time.monotonic()
        while not _answers(ready):
            if time.monotonic() > begun + READY_S:
                raise ScriptError(f"{what}: not ready after {READY_S} s")
            time.sleep(0.1)
        return time.monotonic() - begun

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        for process in (*self._others, self.router, self.gateway):
            if process is not None:
                gateway.stop(process)

    def is_ready(self) -> bool:
        """Whether the gateway knows both workers, and the router holds what they hold."""
        ready = httpx.get(f"{self.gateway_url}/workers", timeout=5).json()
        known = [one for one in ready["workers"] if one.get("is_healthy")]
        if len(known) < len(self.workers):
            return False
        return self.router is None or self.has_index()

    def has_index(self, url: str = "") -> bool:
        """Whether a router, by default the first, hears all streams and hands tokens on."""
        told: dict[str, Any] = httpx.get(f"{url or self.url}/health", timeout=5).json()
        tokens = [one["indexed_tokens"] for one in told["workers"]]
        return None not in tokens and "/generate" in told["tokens_handed_on"]


def _answers(ready: Callable[[], bool]) -> bool:
    """False also where nobody answers yet, or not with that."""
    try:
        return ready()
    except (httpx.HTTPError, ValueError, KeyError):
        return False
