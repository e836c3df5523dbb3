"""Start and stop ``python -m sglang.launch_server`` for tests, and talk to it."""

import contextlib
import dataclasses
import os
import runpy
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import requests
from lab import imported

from kvshare_sglang.bench import server as bench
from kvshare_sglang.bench.processes import free_port

SPEC = bench.ServerSpec(
    "server", Path(), threads=1, max_total_tokens=16384, mem_fraction=0.3, overlap=True
)
ARGS = SPEC.flags()


def environment(sglang: Path | None = None) -> dict[str, str]:
    """What a CPU server needs; ``sglang`` is the folder of another SGLang."""
    # A version that is tried must be let in by the server too.
    tried = {name: value for name, value in os.environ.items() if name == "KVSHARE_TRY_SGLANG"}
    path = {} if sglang is None else {"PYTHONPATH": str(sglang)}
    return {**SPEC.environment(), **tried, **path}


class Server(bench.Server):
    """A running server, asked like any HTTP client would."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

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
    """A server for the length of a ``with`` block, or ScriptError with the end of its log."""
    port = free_port()
    spec = dataclasses.replace(
        SPEC, name=f"server-{port}", model=model, port=port, args=args, env=environment(sglang)
    )
    server = Server(spec, folder)
    try:
        bench.wait_ready([server])
        yield server
    finally:
        server.stop()


class Done(NamedTuple):
    """How a process ended, and what it printed."""

    returncode: int
    said: str


def forked(run: Callable[..., None], *args: Any) -> Done:
    """A function in a process of its own that has imported SGLang and no more: no plug-ins."""
    with tempfile.NamedTemporaryFile("r", errors="replace") as out:
        process = imported().Process(target=_forked, args=(out.name, environment(), run, args))
        process.start()
        process.join(120)
        if process.is_alive():
            process.kill()
            process.join()
            raise AssertionError(
                f"it did not end; the end of what it printed: {out.read()[-3000:]}"
            )
        assert process.exitcode is not None
        return Done(process.exitcode, out.read())


def _forked(out: str, env: dict[str, str], run: Callable[..., None], args: Sequence[Any]) -> None:
    sys.stdout.flush()
    with open(out, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)  # what is printed stands in order
    os.environ.clear()
    os.environ.update(env)
    run(*args)


def main(module: str, *argv: str) -> None:
    """As ``python -m module`` with these arguments."""
    sys.argv = [module, *argv]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def script(path: str, *argv: str) -> None:
    """As ``python path`` with these arguments."""
    sys.argv = [path, *argv]
    runpy.run_path(path, run_name="__main__")


def refuse(model: Path, *args: str) -> str:
    """Start a server that must refuse to start; what it printed."""
    done = forked(main, "sglang.launch_server", "--model-path", str(model), *ARGS, *args)
    assert done.returncode != 0, done.said
    return done.said
