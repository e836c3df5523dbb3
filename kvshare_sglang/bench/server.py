"""Start real SGLang servers, wait for them, ask them, and stop them whatever happens."""

import argparse
import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil

from kvshare_sglang.bench import models
from kvshare_sglang.bench.common import Progress, ScriptError, cores
from kvshare_sglang.bench.processes import (
    free_port,
    signals_ignored,
    signals_raise,
    stop_group,
)

START_TIMEOUT_S = 600
_CPU_ENV = {"SGLANG_USE_CPU_ENGINE": "1"}
_QUIET_ENV = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
_COMMON = ("--skip-server-warmup", "--grammar-backend", "none", "--sleep-on-idle")
_CPU = ("--attention-backend", "torch_native", "--dtype", "float32")
_NOISE = re.compile(r"Warning: |warnings\.warn|Ignore import error|sglang serve --model-path")


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of every command that starts servers."""
    add = parser.add_argument
    add("--threads", type=int, default=min(cores(), 8), help="OpenMP threads of each server")
    add("--server-arg", action="append", default=[], metavar="ARG",
        help="one more argument for every server, as --server-arg=--flag")  # fmt: skip


@dataclass(frozen=True)
class ServerSpec:
    """One server to start. ``args`` are added last, so they win over what is before them."""

    name: str
    model: Path
    device: str = "cpu"
    port: int | None = None
    threads: int = 2
    chunk: int = 8192
    max_total_tokens: int = 32768
    mem_fraction: float = 0.25
    overlap: bool = False  # on a CPU; on a GPU it is SGLang's default
    args: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)

    @property
    def max_running(self) -> int:
        """On a GPU it also bounds into how many ranges the rows of a batch may fall: those of a
        trace are alone, some hundreds to thousands in a long prompt."""
        return 8 if self.device == "cpu" else 2048

    def command(self, port: int) -> list[str]:
        return [
            *(sys.executable, "-m", "sglang.launch_server"),
            *("--model-path", str(self.model), "--host", "127.0.0.1", "--port", str(port)),
            *self.flags(),
        ]

    def flags(self) -> list[str]:
        """What does not depend on model and address."""
        numbers = {
            "--mem-fraction-static": self.mem_fraction,
            "--max-total-tokens": self.max_total_tokens,
            "--max-running-requests": self.max_running,
            "--chunked-prefill-size": self.chunk,
        }
        on_cpu = self.device == "cpu"
        return [
            *("--device", self.device),
            *_COMMON,
            *(_CPU if on_cpu else ()),
            *(("--disable-overlap-schedule",) if on_cpu and not self.overlap else ()),
            *(text for flag, value in numbers.items() for text in (flag, str(value))),
            *self._ours(),
            *self.args,  # last: what was asked for stands, however it is spelled
        ]

    def _ours(self) -> tuple[str, ...]:
        """What kvshare is told besides. Random weights that were made here have no answers to be
        careful with, so the model is served as one whose answers hold. Of any other, requests reuse
        whether or not it was measured: that is what is looked at."""
        if "--kvshare" not in self.args:
            return ()
        named = any(arg.partition("=")[0] == "--kvshare-calibration" for arg in self.args)
        has_no_answers = models.is_made(self.model) and not named
        off = ("--kvshare-calibration", "off") if has_no_answers else ()
        return ("--kvshare-default", "auto", *off)

    def environment(self) -> dict[str, str]:
        """Ours without any ``KVSHARE_*``: a server must be what its spec says, no more."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("KVSHARE_")}
        cpu = {**_CPU_ENV, "OMP_NUM_THREADS": str(self.threads)} if self.device == "cpu" else {}
        return {**inherited, **_QUIET_ENV, **cpu, **self.env}


class Answer(NamedTuple):
    """What a request gave. ``ttft_s`` is the time to the first streamed token, ``total_s`` to the
    last; ``cpu_s`` the server's processor time to the first, where it was asked for."""

    ttft_s: float
    total_s: float
    output_ids: list[int]
    meta: dict[str, Any]
    cpu_s: float = 0.0

    @property
    def kvshare(self) -> dict[str, Any]:
        """What the plug-in says of this request. Raises ScriptError if it says nothing."""
        if not self.meta.get("kvshare"):
            raise ScriptError("the server said nothing of kvshare in meta_info: is it running?")
        return dict(self.meta["kvshare"][-1])


def cpu_of(pid: int) -> float:
    """Seconds of processor time that a process and all below it have used."""
    total = 0.0
    try:
        top = psutil.Process(pid)
        for process in (top, *top.children(recursive=True)):
            try:
                times = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            total += times.user + times.system
    except psutil.NoSuchProcess as error:
        raise ScriptError(f"the server with process id {pid} is gone") from error
    return total


class Server:
    """A running SGLang server, and the client of it."""

    def __init__(self, spec: ServerSpec, log_dir: Path) -> None:
        self.spec = spec
        self.port = spec.port or free_port()
        self.log = log_dir / f"{spec.name}.log"
        self.client = httpx.Client(
            base_url=f"http://127.0.0.1:{self.port}",
            timeout=httpx.Timeout(7200, connect=10),
            limits=httpx.Limits(keepalive_expiry=1),  # SGLang closes after 5 s, maybe as we send
            trust_env=False,
        )
        with self.log.open("wb") as out:
            # A process group of its own: one signal to it reaches all of the server's processes.
            self.process = subprocess.Popen(
                spec.command(self.port),
                env=spec.environment(),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def is_ready(self) -> bool:
        """Whether it answers. Raises ScriptError, with the log's tail, once it is gone."""
        if self.process.poll() is not None:
            raise ScriptError(
                f"the server '{self.spec.name}' ended with code {self.process.returncode} "
                f"while starting. The end of its log:\n{self.log_tail()}"
            )
        try:
            return self.client.get("/health", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def log_tail(self, lines: int = 15) -> str:
        text = self.log.read_text(errors="replace").splitlines()
        telling = [line for line in text if line.strip() and not _NOISE.search(line)]
        return "\n".join("  | " + line[:300] for line in telling[-lines:])

    def stop(self) -> None:
        """End the server and all its processes; safe to call again."""
        self.client.close()
        stop_group(self.process)

    def flush(self) -> None:
        """Empty the cache."""
        self.client.post("/flush_cache", params={"timeout": 300}).raise_for_status()

    def cpu_s(self) -> float:
        """Processor time that the server has used so far."""
        return cpu_of(self.process.pid)

    def ask(
        self, ids: Sequence[int], *, max_new_tokens: int = 1, kvshare: Any = None, cpu: bool = False
    ) -> Answer:
        """Greedy answer to a prompt of token ids; ``kvshare`` is the request's own option. ``cpu``:
        look at processor time too, which takes a millisecond."""
        ttft, last, total, used = None, None, 0.0, 0.0
        before = self.cpu_s() if cpu else 0.0
        for now, last in self.events(ids, max_new_tokens=max_new_tokens, kvshare=kvshare):
            total = now
            if ttft is None and last["output_ids"]:
                ttft = now
                used = self.cpu_s() - before if cpu else 0.0
        if ttft is None or last is None:
            raise ScriptError(f"'{self.spec.name}' sent no token. Log:\n{self.log_tail()}")
        return Answer(ttft, total, list(last["output_ids"]), last["meta_info"], used)

    def complete(
        self, ids: Sequence[int], *, max_new_tokens: int, kvshare: Any = None, likeliest: int
    ) -> Answer:
        """As ``ask``, told at its end: all that became of the request, and in its ``meta`` of each
        token so many log-probabilities."""
        body = _body(ids, max_new_tokens=max_new_tokens, kvshare=kvshare)
        body |= {"return_logprob": True, "top_logprobs_num": likeliest}
        started = time.perf_counter()
        try:
            response = self.client.post("/generate", json=body)
        except httpx.HTTPError as error:
            raise self._broke_off(error) from error
        if response.status_code != 200:
            raise ScriptError(f"{self.spec.name} answered {response.text[:500]}")
        told, seconds = response.json(), time.perf_counter() - started
        return Answer(seconds, seconds, list(told["output_ids"]), told["meta_info"])

    def _broke_off(self, error: Exception) -> ScriptError:
        return ScriptError(
            f"'{self.spec.name}' broke off: {error!r}. The end of its log:\n{self.log_tail()}"
        )

    def events(
        self, ids: Sequence[int], *, max_new_tokens: int, kvshare: Any = None, n: int = 1
    ) -> Iterator[tuple[float, dict[str, Any]]]:
        """What a streamed greedy answer of ``n`` samples brings, and how many seconds after it was
        asked for. Leaving off aborts the request. Raises ScriptError where it fails."""
        body = _body(ids, max_new_tokens=max_new_tokens, kvshare=kvshare) | {"stream": True}
        if n > 1:
            body["sampling_params"]["n"] = n
        started = time.perf_counter()
        try:
            with self.client.stream("POST", "/generate", json=body) as response:
                if response.status_code != 200:
                    raise ScriptError(f"{self.spec.name} answered {response.read().decode()[:500]}")
                for line in response.iter_lines():
                    if not line.startswith("data: {"):
                        continue
                    now = time.perf_counter()
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise ScriptError(f"{self.spec.name} answered {event['error']}")
                    yield now - started, event
        except httpx.HTTPError as error:
            raise self._broke_off(error) from error


def _body(ids: Sequence[int], *, max_new_tokens: int, kvshare: Any) -> dict[str, Any]:
    sampling: dict[str, Any] = {
        "temperature": 0, "max_new_tokens": max_new_tokens, "ignore_eos": True,
    }  # fmt: skip
    if kvshare is not None:
        sampling["custom_params"] = {"kvshare": kvshare}
    return {"input_ids": [int(i) for i in ids], "sampling_params": sampling}


@contextlib.contextmanager
def serve(*specs: ServerSpec) -> Iterator[list[Server]]:
    """Run servers side by side; all are stopped at the end, on errors and on Ctrl-C too."""
    for spec in specs:
        if spec.port is not None:
            require_free(spec.port)
    log_dir = Path(tempfile.mkdtemp(prefix="kvshare-logs-"))
    servers: list[Server] = []
    failed = True
    with signals_raise():
        try:
            for spec in specs:
                servers.append(Server(spec, log_dir))
            wait_ready(servers)
            yield servers
            failed = False
        finally:
            with signals_ignored():
                for server in servers:
                    server.client.close()
                stop_group(*(server.process for server in servers))
            if not failed:
                shutil.rmtree(log_dir, ignore_errors=True)
            elif servers:
                print(f"server logs: {log_dir}", file=sys.stderr)


def require_free(port: int) -> None:
    """Raise ScriptError if something listens on the port."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            raise ScriptError(
                f"port {port} cannot be used ({error}); choose another with --port, or leave "
                "--port out to take any free one"
            ) from None


def wait_ready(servers: Sequence[Server]) -> None:
    """Wait until all answer. Raises ScriptError, with a log's tail, for one that does not."""
    started = time.monotonic()
    waiting = list(servers)
    with Progress(len(servers), unit=" ready") as bar:
        while waiting:
            bar.say("starting " + ", ".join(s.spec.name for s in waiting))
            for server in list(waiting):
                if server.is_ready():
                    waiting.remove(server)
                    bar.update()
            if waiting and time.monotonic() - started > START_TIMEOUT_S:
                late = waiting[0]
                raise ScriptError(
                    f"the server '{late.spec.name}' was not ready after {START_TIMEOUT_S} s. "
                    f"The end of its log:\n{late.log_tail()}"
                )
            time.sleep(0.3)
        bar.say("servers")
