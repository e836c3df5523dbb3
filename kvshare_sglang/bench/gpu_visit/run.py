"""Run the stages of a visit: each in a process group with a time limit, results after each.

Nothing that a stage does stops another: one that fails, hangs or crashes is ended and told. Needs
the standard library alone.
"""

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from kvshare_sglang.bench.gpu_visit.plan import Stage
from kvshare_sglang.bench.gpu_visit.results import write_archive, write_json

NO_TIME_S = 10  # a stage is not begun with less time left
MARK = "GPU_VISIT_STAGE"  # in the environment of all that a stage starts


class How(NamedTuple):
    """How to run stages: ``command(stage)`` and ``env()`` of a process, and ``lacks(stage)``: why
    it cannot run, or None."""

    command: Callable[[Stage], Sequence[str]]
    env: Callable[[], dict[str, str]]
    lacks: Callable[[Stage], str | None]


class Visit:
    """Runs stages and keeps ``OUT/summary.json`` and ``OUT/results.tgz`` up to date."""

    def __init__(self, out: Path, scratch: Path, how: How, *, seconds: float, jobs: int) -> None:
        self.out, self.scratch, self.how = out, scratch, how
        self.seconds, self.jobs = seconds, jobs
        self.started = time.perf_counter()
        self.about: dict[str, Any] = {}
        self.stages: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()
        self._live: set[subprocess.Popen[bytes]] = set()
        self._stopping = False

    @property
    def left_s(self) -> float:
        return self.seconds - (time.perf_counter() - self.started)

    @property
    def ok(self) -> bool:
        return all(stage["verdict"] == "ok" for stage in self.stages.values())

    def run(self, groups: Sequence[Sequence[Stage]]) -> None:
        """All stages, group after group. Whatever ends this ends what it started."""
        pool = ThreadPoolExecutor(self.jobs)
        try:
            for group in groups:
                list(pool.map(self.do, group))
        finally:
            self.stop()
            pool.shutdown(cancel_futures=True)
            self._note(None, {})

    def do(self, stage: Stage) -> None:
        """Run a stage to its end, or to the end of its time. Whatever goes wrong is told."""
        try:
            self._do(stage)
        except Exception as error:  # of ours: a kit's broken environment, a full disk
            self._note(
                stage, {"verdict": "FAILED", "why": f"{type(error).__name__}: {error}"[:800]}
            )

    def _do(self, stage: Stage) -> None:
        why = "no time left" if self._stopping or self.left_s < NO_TIME_S else self.how.lacks(stage)
        if why is not None:
            self._note(stage, {"verdict": "skipped", "why": why})
            return
        self._note(stage, {"verdict": "running"}, archive=False)
        begun = time.perf_counter()
        error = self._attempt(stage)
        found = self._found(stage)
        if error is not None:
            found = {**found, "ok": False, "error": error}
            write_json(self.scratch / f"{stage.name}.json", found)
        failed = [
            f"{row['name']}: {row['value']}" for row in found.get("checks", ()) if not row["ok"]
        ]
        why = "; ".join([*filter(None, [found.get("error")]), *failed[:5]])
        told = {
            "verdict": "ok" if found.get("ok") else "FAILED",
            "seconds": round(time.perf_counter() - begun, 1),
            **({"why": why[-800:]} if why else {}),
            **({"figures": found["figures"]} if found.get("figures") else {}),
        }
        self._note(stage, told)

    def _attempt(self, stage: Stage) -> str | None:
        """What went wrong with the process of a stage, if anything."""
        limit = min(stage.limit_s, self.left_s)
        mark = f"{os.getpid()}-{stage.name}"
        with (self.scratch / f"{stage.name}.log").open("wb") as log:
            process = subprocess.Popen(
                list(self.how.command(stage)),
                env={**self.how.env(), MARK: mark},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        with self._lock:
            self._live.add(process)
            stopping = self._stopping
        try:
            process.wait(0 if stopping else limit)
        except subprocess.TimeoutExpired:
            return f"stopped after {limit:.0f} s"
        finally:
            end_group(process, mark)
            with self._lock:
                self._live.discard(process)
        if process.returncode:
            return f"its process ended with code {process.returncode}; see {stage.name}.log"
        return None

    def _found(self, stage: Stage) -> dict[str, Any]:
        """What the stage's process wrote, the last time that it wrote."""
        try:
            found: dict[str, Any] = json.loads((self.scratch / f"{stage.name}.json").read_text())
        except (OSError, ValueError):
            if stage.step == "install":  # a kit's own script
                return {"ok": True}
            return {"ok": False, "error": f"it left no result; see {stage.name}.log"}
        return found

    def stop(self) -> None:
        """End what still runs; what has not begun is skipped."""
        with self._lock:
            self._stopping = True
            live = list(self._live)
        for process in live:  # all at once, so that their time to end runs side by side
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for process in live:
            end_group(process, None)

    def _note(self, stage: Stage | None, told: dict[str, Any], *, archive: bool = True) -> None:
        with self._lock:
            if stage is not None:
                self.stages[stage.name] = told
                self._say(f"{stage.name} {told['verdict']} {told.get('why', '')[:300]}")
                if stage.step == "env" and "figures" in told:
                    self.about |= told.pop("figures")
            figures = {n: s["figures"] for n, s in self.stages.items() if "figures" in s}
            stages = {
                n: {k: v for k, v in s.items() if k != "figures"} for n, s in self.stages.items()
            }
            summary = {
                "ok": self.ok,
                "seconds": round(time.perf_counter() - self.started, 1),
                **self.about,
                "stages": stages,
                "figures": figures,
            }
            write_json(self.out / "summary.json", summary)
            if archive:
                write_archive(self.out / "results.tgz", self.scratch)

    def _say(self, text: str) -> None:
        print(f"[{time.perf_counter() - self.started:5.0f} s] {text}".rstrip(), flush=True)


def end_group(process: "subprocess.Popen[bytes]", mark: str | None) -> None:
    """End a stage's processes: first asked to, so that a benchmark can stop its servers. Then
    those with the mark that left the group: servers of a benchmark that was killed hold the GPU."""
    for sig, wait_s in ((signal.SIGTERM, 15.0), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(process.pid, sig)
        except ProcessLookupError:
            break
        deadline = time.monotonic() + wait_s
        while _group_lives(process) and time.monotonic() < deadline:
            time.sleep(0.05)
    process.poll()
    for pid in marked(mark) if mark else ():
        try:
            os.kill(pid, signal.SIGKILL)
        except OSError:
            continue  # gone meanwhile


def marked(mark: str) -> list[int]:
    """Processes that a stage started, directly or not."""
    word = f"{MARK}={mark}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if word in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:
            continue  # gone, or another user's
    return found


def _group_lives(process: "subprocess.Popen[bytes]") -> bool:
    process.poll()  # reap the leader, or it stays in its group for ever
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True
