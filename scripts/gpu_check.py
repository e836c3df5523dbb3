"""Check kvshare on a GPU in one go: kernels, oracles on each attention backend, TTFT at 8B.

Each step runs in a process of its own and leaves ``OUT/<step>.json`` and ``OUT/<step>.log``; one
that fails, hangs or crashes does not stop the others. ``OUT/summary.json`` is rewritten after
each step. Start it with scripts/gpu_check.sh, which sets the environment up.
"""

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
# Labs start processes that import this file again: nothing here may load torch or sglang.
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "gpu")]

LAWS = ("partial", "choice", "exact", "life")
PAGES = (1, 16)
PACKAGES = (
    "torch",
    "sglang",
    "sglang-kernel",
    "flashinfer-python",
    "triton",
    "transformers",
    "kvshare-sglang",
)
NO_TIME_S = 15  # a step is not begun with less time left
LIMITS_S = {"env": 90, "kernels": 120, "start": 280, "bench": 260}  # laws: 240


class Step(NamedTuple):
    """One thing to check: ``what`` on a backend, with a page size where that matters."""

    what: str
    backend: str = ""
    page: int = 0

    @property
    def name(self) -> str:
        parts = [self.what, self.backend, f"page{self.page}" if self.page else ""]
        return "_".join(part for part in parts if part)

    @classmethod
    def parse(cls, name: str) -> "Step":
        what, _, rest = name.partition("_")
        backend, _, page = rest.partition("_page")
        return cls(what, backend, int(page or 0))


# ---- one step, in its own process --------------------------------------------------------------


def run_step(step: Step, args: argparse.Namespace) -> dict[str, Any]:
    """What the step found: at least ``ok``."""
    if step.what == "env":
        return facts(args)
    if step.what == "bench":
        return bench(step.backend, args)
    oracles = importlib.import_module("gpu_oracles")
    if step.what == "kernels":
        return oracles.check_kernels(args.device).to_json()
    model = oracles.make_model(args.out / "models", small=args.device == "cpu")
    case = oracles.Case(step.backend, step.page or 1, args.device)
    return getattr(oracles, f"check_{step.what}")(case, model).to_json()


def facts(args: argparse.Namespace) -> dict[str, Any]:
    """The card, the driver, and the versions of all that takes part."""
    import torch

    sys.path.insert(0, str(ROOT / "scripts"))
    found: dict[str, Any] = {
        "ok": args.device == "cpu" or torch.cuda.is_available(),
        "versions": {name: _version(name) for name in PACKAGES},
        "python": sys.version.split()[0],
        "cuda of torch": torch.version.cuda,
        "commit": os.environ.get("KVSHARE_COMMIT") or importlib.import_module("_bench")._commit(),
        "cores": len(os.sched_getaffinity(0)),
        "nvidia-smi": _nvidia_smi("name,driver_version,memory.total,memory.used,clocks.max.sm"),
    }
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        found["card"] = card.name
        found["compute capability"] = f"{card.major}.{card.minor}"
        found["memory_gib"] = round(card.total_memory / 2**30, 1)
        found["multiprocessors"] = card.multi_processor_count
    elif not found["ok"]:
        found["error"] = "torch sees no GPU"
    return found


def bench(backend: str, args: argparse.Namespace) -> dict[str, Any]:
    """scripts/bench_ttft.py in the shape of an 8B model; a small one on a CPU."""
    result = args.out / f"ttft_{backend}.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, str(ROOT / "scripts" / "bench_ttft.py"), "--json", str(result)]
    options = bench_options(backend, args.device)
    if isinstance(options, str):
        return {"ok": False, "error": options}
    done = subprocess.run([*command, *options], check=False)
    found: dict[str, Any] = {"ok": done.returncode == 0, "command": [*command[1:], *options]}
    if done.returncode:
        found["error"] = f"bench_ttft.py ended with code {done.returncode}; see the log"
    if result.exists():
        numbers = json.loads(result.read_text())
        found |= {"rows": numbers["rows"], "miss": numbers["miss"]}
    return found


def bench_options(backend: str, device: str) -> list[str] | str:
    """Options of bench_ttft.py, or why there are none."""
    if device == "cpu":
        return [
            *("--device", "cpu", "--model", "replay-5m", "--sizes", "512", "--repeats", "1"),
            *("--miss-pairs", "2", "--chunk", "2048", "--plain-chunk", "2048"),
            *("--threads", "1", "--plain-threads", "1", "--max-total-tokens", "4096"),
        ]
    mib = _nvidia_smi("memory.total").split()
    gib = int(mib[0]) / 1024 if mib and mib[0].isdigit() else 0.0
    # Three servers, each with 16 GB of weights and 128 KiB of KV a token.
    if gib < 76:
        return f"three servers of an 8B model need 76 GiB of GPU memory or more, here are {gib:.0f}"
    sizes, tokens = ("4096,8192,16384,32768", 80000) if gib > 110 else ("4096,8192,16384", 40000)
    server = (
        f"--attention-backend {backend} --sampling-backend pytorch"
        # The servers start side by side and each sees what the others took: the number of tokens,
        # not this share, is what bounds their memory.
        " --mem-fraction-static 0.85"
        " --cuda-graph-max-bs-decode 8 --cuda-graph-bs-prefill 256 1024 4096 8192"
    )
    return [
        *("--device", "cuda", "--model", "llama-8b", "--dummy-weights"),
        *("--sizes", sizes, "--repeats", "3", "--miss-pairs", "24"),
        *("--chunk", "8192", "--plain-chunk", "8192", "--threads", "4", "--plain-threads", "4"),
        *("--max-total-tokens", str(tokens)),
        *(f"--server-arg={word}" for word in server.split()),
    ]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _nvidia_smi(query: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def child(step: Step, args: argparse.Namespace) -> int:
    """The step's process: its JSON is written whatever happens, short of a crash."""
    started = time.perf_counter()
    try:
        found = run_step(step, args)
    except BaseException as error:
        found = {"ok": False, "error": f"{type(error).__name__}: {error}"[-4000:]}
        traceback.print_exc()
    write(args.out / f"{step.name}.json", {"step": step.name, **found, "seconds": _since(started)})
    return 0


# ---- all steps ---------------------------------------------------------------------------------


class Run:
    """Starts steps, waits for them, and keeps the summary. Its methods are called by threads."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.started = time.perf_counter()
        self.lock = threading.Lock()
        self.live: set[subprocess.Popen[bytes]] = set()
        self.stopping = False
        self.steps: dict[str, dict[str, Any]] = {}

    @property
    def left_s(self) -> float:
        return self.args.seconds - (time.perf_counter() - self.started)

    def do(self, step: Step) -> dict[str, Any]:
        """Run a step to its end, or to the end of its time; what it found."""
        if self.args.steps and step.what not in self.args.steps:
            return {"ok": True, "skipped": "not asked for"}
        if self.stopping or self.left_s < NO_TIME_S:
            return self._note(step, {"ok": False, "skipped": "no time left", "seconds": 0.0})
        found = self._attempt(step)
        if not found["ok"] and "address already in use" in found.get("error", "").lower():
            self.say(f"{step.name}: a port was taken meanwhile; once more")
            found = self._attempt(step)
        return self._note(step, found)

    def skip(self, step: Step, why: str) -> None:
        if not self.args.steps or step.what in self.args.steps:
            self._note(step, {"ok": False, "skipped": why, "seconds": 0.0})

    def _attempt(self, step: Step) -> dict[str, Any]:
        path = self.args.out / f"{step.name}.json"
        path.unlink(missing_ok=True)
        limit = min(LIMITS_S.get(step.what, 240), self.left_s)
        self.say(f"{step.name} ...")
        started = time.perf_counter()
        command = [
            *(sys.executable, str(Path(__file__).resolve()), str(self.args.out)),
            *("--run-step", step.name, "--device", self.args.device),
        ]
        with (self.args.out / f"{step.name}.log").open("wb") as log:
            # A session of its own: one signal reaches all processes of the step.
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        with self.lock:
            self.live.add(process)
        error = None
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            error = f"stopped after {limit:.0f} s"
        finally:
            _end_group(process)
            with self.lock:
                self.live.discard(process)
        if error is None and path.exists():
            return json.loads(path.read_text())
        error = error or f"its process ended with code {process.returncode}"
        found = {"step": step.name, "ok": False, "error": error, "seconds": _since(started)}
        write(path, found)
        return found

    def _note(self, step: Step, found: dict[str, Any]) -> dict[str, Any]:
        short = {key: found[key] for key in ("ok", "seconds", "skipped", "error") if key in found}
        failed = [row for row in found.get("checks", ()) if not row["ok"]]
        if failed:
            short["failed"] = failed
        with self.lock:
            self.steps[step.name] = short
            self._write_summary()
        verdict = "ok" if found["ok"] else "skipped" if "skipped" in found else "FAILED"
        why = found.get("skipped") or found.get("error", "").strip().splitlines()[-1:] or ""
        why = why[0] if isinstance(why, list) else why
        why = why or "; ".join(f"{row['name']}: {row['value']}" for row in failed[:3])
        self.say(f"{step.name} {verdict} ({found['seconds']:.0f} s) {why[:300]}".rstrip())
        return found

    def _write_summary(self) -> None:
        env_path = self.args.out / "env.json"
        env = json.loads(env_path.read_text()) if env_path.exists() else {}
        for key in ("step", "ok", "seconds"):
            env.pop(key, None)
        summary = {
            "ok": all(step["ok"] for step in self.steps.values()),
            "device": self.args.device,
            "env": env,
            "seconds": _since(self.started),
            "steps": self.steps,
        }
        write(self.args.out / "summary.json", summary)

    def say(self, text: str) -> None:
        print(f"[{time.perf_counter() - self.started:5.0f} s] {text}", flush=True)

    def stop(self) -> None:
        """End what still runs; steps that have not begun are skipped."""
        self.stopping = True
        with self.lock:
            live = list(self.live)
        for process in live:
            _end_group(process)


def run_all(args: argparse.Namespace) -> bool:
    """Every step, in an order that keeps the GPU and the compilers busy; True if all are ok."""
    run = Run(args)
    first, *others = args.backends
    pool = ThreadPoolExecutor(args.jobs)
    compiling = ThreadPoolExecutor(max(1, len(others)))

    def together(steps: Sequence[Step]) -> list[dict[str, Any]]:
        return list(pool.map(run.do, steps))

    def laws(backend: str, start: dict[str, Any]) -> None:
        steps = [Step(law, backend, page) for law in LAWS for page in PAGES]
        if "error" in start:
            for step in steps:
                run.skip(step, f"no server with {backend} started")
        else:
            together(steps)

    try:
        env, _, start = together([Step("env"), Step("kernels"), Step("start", first)])
        if not env["ok"]:
            run.say("no GPU: nothing else can be checked")
            return False
        # One small server of each other backend waits for its kernels meanwhile.
        starts: dict[str, Future[dict[str, Any]]] = {
            backend: compiling.submit(run.do, Step("start", backend)) for backend in others
        }
        laws(first, start)
        results = {first: start}
        for backend, future in starts.items():
            results[backend] = future.result()
            laws(backend, results[backend])
        for backend in args.backends:  # alone on the machine
            step = Step("bench", backend)
            if "error" in results[backend]:
                run.skip(step, f"no server with {backend} started")
            else:
                run.do(step)
    finally:
        run.stop()
        pool.shutdown(cancel_futures=True)
        compiling.shutdown(cancel_futures=True)
    ok = all(step["ok"] for step in run.steps.values())
    bad = [name for name, step in run.steps.items() if not step["ok"]]
    run.say(f"{'PASS' if ok else 'FAIL: ' + ', '.join(bad)}; {args.out / 'summary.json'}")
    return ok


def _end_group(process: "subprocess.Popen[bytes]") -> None:
    """End a step's processes: first asked to, so that a benchmark can stop its servers."""
    for sig, wait_s in ((signal.SIGTERM, 15.0), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(process.pid, sig)
        except ProcessLookupError:
            break
        deadline = time.monotonic() + wait_s
        while _group_lives(process) and time.monotonic() < deadline:
            time.sleep(0.1)
    process.poll()


def _group_lives(process: "subprocess.Popen[bytes]") -> bool:
    process.poll()  # reap the leader, or it stays in its group for ever
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def _since(started: float) -> float:
    return round(time.perf_counter() - started, 1)


def write(path: Path, value: Any) -> None:
    """In one step: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps(value, indent=2, default=str) + "\n")
    os.replace(draft, path)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/gpu_check.sh", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("out", type=Path, metavar="OUT", help="folder for the results")
    add("--device", choices=("cuda", "cpu"), default="cuda",
        help="cpu: rehearse the same code without a GPU, in a small shape")  # fmt: skip
    add("--backends", default=None, metavar="NAMES",
        help="attention backends (default: triton,flashinfer; on cpu: torch_native)")  # fmt: skip
    add("--steps", default=None, metavar="NAMES",
        help="only these: env,kernels,start,partial,choice,exact,life,bench")  # fmt: skip
    add("--seconds", type=float, default=540, help="time for all; what is late is skipped")
    add("--jobs", type=int, default=None, help="steps at a time (default: 4; cpu: 1)")
    add("--run-step", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    on_cpu = args.device == "cpu"
    args.out = args.out.resolve()
    args.backends = (args.backends or ("torch_native" if on_cpu else "triton,flashinfer")).split(
        ","
    )
    args.jobs = args.jobs or (1 if on_cpu else 4)
    if args.steps is not None:
        known = ("env", "kernels", "start", *LAWS, "bench")
        args.steps = args.steps.split(",")
        if unknown := set(args.steps) - set(known):
            parser.error(f"--steps knows {', '.join(known)}; got {', '.join(sorted(unknown))}")
    if args.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {args.jobs}")
    return args


def main() -> int:
    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.run_step:
        return child(Step.parse(args.run_step), args)

    def leave(number: int, _frame: Any) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGHUP, leave)
    try:
        return 0 if run_all(args) else 1
    except KeyboardInterrupt:
        print("interrupted; everything that was started has been stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
