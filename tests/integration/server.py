"""Start and stop ``python -m sglang.launch_server`` for tests, and talk to it."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import requests

ARGS = [
    "--device",
    "cpu",
    "--attention-backend",
    "torch_native",
    "--dtype",
    "float32",
    "--max-running-requests",
    "8",
    "--mem-fraction-static",
    "0.3",
    "--max-total-tokens",
    "16384",
    "--skip-server-warmup",
    "--grammar-backend",
    "none",
    "--sleep-on-idle",
    "--host",
    "127.0.0.1",
]


def environment(sglang: Path | None = None) -> dict[str, str]:
    """What a CPU server needs; ``sglang`` is the folder of another SGLang."""
    env = dict(os.environ)
    env.update(
        SGLANG_USE_CPU_ENGINE="1",
        OMP_NUM_THREADS="1",
        HF_HUB_OFFLINE="1",
        TRANSFORMERS_OFFLINE="1",
        TOKENIZERS_PARALLELISM="false",
    )
    env.pop("KVSHARE_LAUNCHER", None)
    if sglang is not None:
        env["PYTHONPATH"] = str(sglang)
    return env


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Server:
    """A running server: ``url`` and ``log``."""

    def __init__(self, url: str, log: Path, process: subprocess.Popen[bytes]) -> None:
        self.url, self.log, self.process = url, log, process

    def generate(self, prompt: list[int] | str, *, new: int = 8, **more: Any) -> dict[str, Any]:
        """One greedy /generate; ``custom`` is custom_params."""
        custom = more.pop("custom", None)
        sampling = {"temperature": 0, "max_new_tokens": new, "ignore_eos": True}
        sampling.update(more.pop("sampling", {}))
        if custom is not None:
            sampling["custom_params"] = custom
        body = {"text" if isinstance(prompt, str) else "input_ids": prompt}
        reply = self.post("/generate", {**body, "sampling_params": sampling, **more})
        reply.raise_for_status()
        answer: dict[str, Any] = reply.json()
        return answer

    def post(self, path: str, body: dict[str, Any] | None = None, **kw: Any) -> requests.Response:
        return requests.post(self.url + path, json=body, timeout=120, **kw)


@contextlib.contextmanager
def serve(model: Path, folder: Path, *args: str, sglang: Path | None = None) -> Iterator[Server]:
    """A server for the length of a ``with`` block, or AssertionError with its log."""
    port = free_port()
    log = folder / f"server-{port}.log"
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model)]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, "--port", str(port), *ARGS, *args],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment(sglang),
            start_new_session=True,
        )
    server = Server(f"http://127.0.0.1:{port}", log, process)
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise AssertionError(f"the server ended: {log.read_text()[-3000:]}")
            with contextlib.suppress(requests.RequestException):
                if requests.get(server.url + "/health", timeout=5).status_code == 200:
                    break
            time.sleep(0.2)
        else:
            raise AssertionError(f"the server is not healthy: {log.read_text()[-3000:]}")
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def refuse(model: Path, *args: str) -> str:
    """Start a server that must refuse to start; what it printed."""
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model)]
    done = subprocess.run(
        [*command, *ARGS, *args], capture_output=True, text=True, timeout=120, env=environment()
    )
    assert done.returncode != 0, done.stdout
    return done.stdout + done.stderr
