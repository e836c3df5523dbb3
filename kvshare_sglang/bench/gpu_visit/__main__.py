"""One visit to a GPU machine: pack what must travel here, measure and check there.

Start it with scripts/gpu_visit.sh. Each stage runs this module again in a process of its own.
"""

import argparse
import json
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvshare_sglang.bench.gpu_visit import env
from kvshare_sglang.bench.gpu_visit.env import ROOT
from kvshare_sglang.bench.gpu_visit.pack import LIMIT_MIB, MARK, MIB, PackError, pack
from kvshare_sglang.bench.gpu_visit.plan import ASKED, STEPS, Stage, gpu_gib, stages
from kvshare_sglang.bench.gpu_visit.run import How, Visit
from kvshare_sglang.bench.gpu_visit.stage import run as run_stage


class Place:
    """Where stages run: an environment that changes once, when a kit has been installed."""

    def __init__(self, args: argparse.Namespace, scratch: Path) -> None:
        self.args, self.scratch = args, scratch
        kit = {"KIT_SITE": str(scratch / "site"), "PYTHON": sys.executable}
        self.env = {**env.base(args.device, scratch), **kit}
        self.lacks, self._plugin = env.probe(self.env)
        self._installed = False
        self._lock = threading.Lock()

    def command(self, stage: Stage) -> list[str]:
        if stage.step == "install":
            return ["bash", str(self.args.kit / "install.sh"), str(self.args.kit)]
        words = [str(self.scratch), self.args.device, *map(str, stage)]
        return [sys.executable, "-m", "kvshare_sglang.bench.gpu_visit", "stage", *words]

    def environment(self) -> dict[str, str]:
        return self.env

    def why_not(self, stage: Stage) -> str | None:
        """Why a stage cannot run, or is of no use after those before it."""
        if stage.step == "env":
            with self._lock:
                self._take_in()
        if not stage.needs_sglang:
            return None
        if error := self._error_of("env"):
            return error
        with self._lock:
            self._take_in()
        if self.lacks:
            return f"this Python lacks: {', '.join(self.lacks)}"
        if stage.needs_smoke and self._error_of(f"smoke_{stage.backend}"):
            return f"no server with {stage.backend} started"
        return None

    def _error_of(self, stage: str) -> str | None:
        """What broke a stage, if it has run and broke; a law that does not hold is no error."""
        path = self.scratch / f"{stage}.json"
        error: str | None = json.loads(path.read_text()).get("error") if path.is_file() else None
        return error

    def _take_in(self) -> None:
        """Use a kit's environment, once it is there; give SGLang the plug-in's entry point."""
        site = self.scratch / "site.env"
        if self.lacks and site.is_file() and not self._installed:
            self._installed = True
            self.env = env.with_kit(self.env, site)
            self.lacks, self._plugin = env.probe(self.env)
        if not self.lacks and not self._plugin:
            env.write_metadata(self.scratch / "metadata")
            path = env.joined(str(self.scratch / "metadata"), self.env["PYTHONPATH"])
            self.env = {**self.env, "PYTHONPATH": path}
            self._plugin = True


def run(args: argparse.Namespace) -> int:
    args.out.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="visit-", dir=args.scratch))
    (scratch / "tmp").mkdir()
    place = Place(args, scratch)
    groups = [
        [stage for stage in group if wanted(stage, args, place)]
        for group in stages(args.device, args.backends, gpu_gib=gpu_gib(), ttft=args.ttft)
    ]
    how = How(place.command, place.environment, place.why_not)
    visit = Visit(args.out, scratch, how, seconds=args.seconds, jobs=args.jobs)

    def leave(number: int, _frame: Any) -> None:
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)
    try:
        visit.run(groups)
    finally:
        if args.scratch is None:
            shutil.rmtree(scratch, ignore_errors=True)
    bad = [name for name, stage in visit.stages.items() if stage["verdict"] != "ok"]
    print(f"{'FAIL: ' + ', '.join(bad) if bad else 'PASS'}; {args.out / 'summary.json'}")
    return 1 if bad else 0


def wanted(stage: Stage, args: argparse.Namespace, place: Place) -> bool:
    asked = args.steps or [step for step in STEPS if step not in ASKED]
    if stage.step == "install":  # not a figure of its own: whatever needs it asks for it
        return args.kit is not None and bool(place.lacks) and bool({*asked} - {"env", "kernels"})
    return stage.step in asked


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/gpu_visit.sh", description=__doc__.split("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("pack", help="lay out what must travel").add_argument
    add("carry", type=Path, metavar="CARRY_DIR", help="made anew; what was packed before goes")
    add("--kit", type=Path, metavar="DIR", help="also take this kit along, as CARRY_DIR/kit")
    add("--limit-mib", type=float, default=LIMIT_MIB, help="what a transfer takes")
    inner = commands.add_parser("run", help="measure and check, on the GPU machine")
    add = inner.add_argument
    add("out", type=Path, metavar="OUT", help="folder for summary.json and results.tgz")
    add("--device", choices=("cuda", "cpu"), default="cuda",
        help="cpu: rehearse the same code without a GPU, in a small shape")  # fmt: skip
    add("--steps", help=f"only these, of {','.join(STEPS)}")
    add("--backends", help="attention backends, the one that is timed first "
        "(default: flashinfer,triton; on cpu: torch_native)")  # fmt: skip
    add("--ttft", choices=("full", "short", "deep"), default="full",
        help="short: 8k alone, 98%% cached; deep: 8k to 32k, by trace 5, 15 and 30%%")  # fmt: skip
    add("--seconds", type=float, default=540, help="time for all; what is late is skipped")
    add("--jobs", type=int, help="stages at a time where order is no matter (default: 6; cpu: 1)")
    add("--kit", type=Path, metavar="DIR",
        help="folder with an install.sh, for a machine without SGLang "
        "(default: kit, if packed)")  # fmt: skip
    add("--scratch", type=Path, metavar="DIR", help="work below this folder and keep all files")
    add = commands.add_parser("stage").add_argument  # what run starts
    add("scratch", type=Path)
    add("device")
    add("stage", nargs=5)
    args = parser.parse_args(argv)
    if args.command != "run":
        return args
    on_cpu = args.device == "cpu"
    args.out = args.out.resolve()
    args.backends = (args.backends or ("torch_native" if on_cpu else "flashinfer,triton")).split(
        ","
    )
    args.jobs = args.jobs or (1 if on_cpu else 6)
    if args.steps is not None:
        args.steps = args.steps.split(",")
        if unknown := set(args.steps) - set(STEPS):
            inner.error(f"--steps knows {', '.join(STEPS)}; got {', '.join(sorted(unknown))}")
    if args.jobs < 1:
        inner.error(f"--jobs must be at least 1, got {args.jobs}")
    if args.kit is None and (ROOT / MARK).is_file() and (ROOT / "kit").is_dir():
        args.kit = ROOT / "kit"
    if args.kit is not None and not (args.kit / "install.sh").is_file():
        inner.error(f"--kit must be a folder with an install.sh, {args.kit} has none")
    if args.kit is not None:
        args.kit = args.kit.resolve()
    if args.scratch is not None:
        args.scratch = args.scratch.resolve()
        args.scratch.mkdir(parents=True, exist_ok=True)
    return args


def main() -> int:
    args = parse()
    if args.command == "pack":
        try:
            kit, limit = args.kit, args.limit_mib * MIB
            print(pack(ROOT, ROOT / "scripts" / "gpu_visit.list", args.carry, kit=kit, limit=limit))
        except PackError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        return 0
    if args.command == "stage":
        step, limit_s, backend, page, what = args.stage
        stage = Stage(step, float(limit_s), backend, int(page), what)
        run_stage(stage, args.scratch, args.device)
        return 0
    try:
        return run(args)
    except KeyboardInterrupt:
        print("interrupted; everything that was started has been stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
