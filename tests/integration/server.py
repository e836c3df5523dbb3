"""Start and stop ``python -m sglang.launch_server`` for tests, and talk to it."""

import contextlib
import dataclasses
import os
import runpy
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import doors
import requests
from lab import imported

from kvshare_sglang.bench import server as bench
from kvshare_sglang.bench.processes import free_port
from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.runtime import calibration

SGLANG = Path(sys.executable).with_name("sglang")


@dataclasses.dataclass(frozen=True)
class Spec(bench.ServerSpec):
    """With ``options``, a file of them, it is ``sglang serve`` that starts."""

    options: Path | None = None

    def command(self, port: int) -> list[str]:
        if self.options is None:
            return super().command(port)
        where = (str(self.model), "--port", str(port), "--config", str(self.options))
        return [str(SGLANG), "serve", *where, *self.flags()]


SPEC = Spec("server", Path(), threads=1, max_total_tokens=16384, mem_fraction=0.3, overlap=True)
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
        return requests.post(self.url + path, json=body, timeout=600, **kw)

    def stop(self) -> None:
        """All its processes at once: it has nothing to save, and takes seconds to end by itself."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        super().stop()


@contextlib.contextmanager
def serve(
    model: Path,
    folder: Path,
    *args: str,
    sglang: Path | None = None,
    options: str = "",
    env: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """A server for the length of a ``with`` block, or ScriptError with the end of its log.
    ``options``: what stands in a file for ``sglang serve``; ``env``: what it has besides."""
    port = free_port()
    has = environment(sglang) | {"AIP_PREDICT_ROUTE": doors.VERTEX} | dict(env or {})
    name = f"server-{port}"
    spec = dataclasses.replace(SPEC, name=name, model=model, port=port, args=args, env=has)
    if options:
        spec = dataclasses.replace(spec, options=folder / "options.yaml")
        (folder / "options.yaml").write_text(options)
    server = Server(spec, folder)
    try:
        bench.wait_ready([server])
        yield server
    finally:
        server.stop()


def unmeasured(**given: Any) -> str:
    """What the log says of a server's config: nobody measured the answers of a random model."""
    config = calibration.settled(KVShareConfig(**given), given=given, model="random")
    assert config.calibration == calibration.NONE
    return str(config)


class Done(NamedTuple):
    """How a process ended, and what it printed."""

    returncode: int
    said: str


def forked(run: Callable[..., None], *args: Any) -> Done:
    """A function in a process of its own that has imported SGLang and no more: no plug-ins."""
    with tempfile.NamedTemporaryFile("r", errors="replace") as out:
        process = imported().Process(target=_forked, args=(out.name, environment(), run, args))
        process.start()
        process.join(600)
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
