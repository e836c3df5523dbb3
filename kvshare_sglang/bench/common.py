"""What commands share: statistics, progress, tables, the one form of a result."""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from prometheus_client.parser import text_string_to_metric_families
from tqdm import tqdm

_ABOVE = Path(__file__).resolve().parents[2]
# The checkout; the working directory where the package was installed without one.
ROOT = _ABOVE if (_ABOVE / "setup.py").is_file() else Path.cwd()
_LOAD = os.getloadavg()[0]
# What a record of the plug-in counts prompt tokens by, as ``exact_tokens``; they add up to it.
KINDS = ("exact", "blended", "copied", "recomputed", "fresh")


class ScriptError(Exception):
    """Something the user can mend; shown as one message, without a traceback."""


def has_gpu() -> bool:
    """Whether ``nvidia-smi`` lists a GPU."""
    return shutil.which("nvidia-smi") is not None and "GPU" in _output("nvidia-smi", "-L")


def default_device() -> str:
    return "cuda" if has_gpu() else "cpu"


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def threads() -> int:
    """OpenMP threads for work of this process: ``OMP_NUM_THREADS`` where it says so, else a thread
    a core. Two processes with a thread a core each spend most of their time waiting."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdecimal() and int(asked) else cores()


class Spread(NamedTuple):
    """Median and quartiles."""

    q25: float
    p50: float
    q75: float

    @property
    def iqr(self) -> float:
        return self.q75 - self.q25


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of at least one value."""
    return Spread(*(float(q) for q in np.quantile(np.asarray(values, float), (0.25, 0.5, 0.75))))


def median(values: Sequence[float]) -> float:
    return spread(values).p50


def bootstrap_ci95(
    values: Sequence[float],
    *,
    statistic: Callable[..., Any] = np.median,
    seed: int = 0,
    rounds: int = 10_000,
) -> list[float]:
    """95% percentile interval of ``statistic``, by resampling the values with replacement."""
    sample = np.asarray(values, float)
    picks = np.random.default_rng(seed).integers(len(sample), size=(rounds, len(sample)))
    low, high = np.quantile(statistic(sample[picks], axis=1), (0.025, 0.975))
    return [float(low), float(high)]


class Progress(tqdm):  # type: ignore[type-arg]
    """A progress bar with a text before it; where stderr is no terminal, a line now and then."""

    def __init__(self, total: float, *, unit: str = "") -> None:
        self._live = sys.stderr.isatty()
        super().__init__(
            total=total,
            bar_format="{desc:34} |{bar:28}| {n:.0f}/{total:.0f}" + unit + " [{elapsed}]",
            mininterval=0.2 if self._live else 15,
            ascii=None if self._live else True,
        )

    def say(self, text: str) -> None:
        """Set the text before the bar, and show how the time goes by."""
        self.set_description_str(text, refresh=self._live)


def environment(**more: Any) -> dict[str, Any]:
    """Versions, machine and commit of this run, and whatever else is given."""
    packages = ("sglang", "torch", "transformers", "numpy", "kvshare-sglang")
    gpu = _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    return {
        "versions": {"python": platform.python_version(), **{p: _version(p) for p in packages}},
        "cpu": _cpu_model(),
        "cores": cores(),
        "gpu": gpu or None,
        "load_1min_at_start": round(_LOAD, 2),
        "commit": _commit(),
        **more,
    }


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments for a result, paths by their last part: they name no machine."""

    def plain(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [plain(one) for one in value]
        return value.name if isinstance(value, Path) else value

    return {name: plain(value) for name, value in vars(args).items()}


def how_busy() -> str:
    """A line that says whether times measured here mean anything: the load as this began."""
    noisy = 0.5 * cores() < _LOAD
    verdict = "busy, times will be noisy" if noisy else "quiet"
    return f"machine: load {_LOAD:.1f} on {cores()} cores, {verdict}"


def warn_if_busy() -> None:
    """Say so if other work runs on this machine: times measured beside it mean little."""
    if 0.5 * cores() < _LOAD:
        print(f"note: {how_busy()}", file=sys.stderr)


def write_json(path: Path, value: Any) -> None:
    """Write a result in one step: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(draft, path)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain text table: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = (
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join([first, *others])

    return "\n".join([line(head), "  ".join("-" * width for width in widths), *map(line, rows)])


def columns(rows: Sequence[dict[str, Any]], /, **parts: str) -> str:
    """A table with a column for each of ``parts``: its name, ``_`` for a blank, and how a row is
    written in it.

    >>> print(columns([{"n": 3, "right": 0.5}], n="{n}", right_of_all="{right:.1%}"))
    n  right of all
    -  ------------
    3         50.0%
    """
    head = [name.replace("_", " ") for name in parts]
    return table(head, [[part.format_map(row) for part in parts.values()] for row in rows])


def write_result(args: argparse.Namespace, result: dict[str, Any], **env: Any) -> None:
    """Write a result where ``--json`` says, if it does: always with its command, its arguments
    and what it was measured with, under ``env``. May be called again during a run."""
    if args.json:
        env = environment(**(settings(args) | env))
        write_json(args.json, {**result, "env": env})


def report(args: argparse.Namespace, text: str, result: dict[str, Any], **env: Any) -> None:
    """Print a result, and write it."""
    print(text)
    write_result(args, result, **env)
    if args.json:
        print(f"numbers: {args.json}")


def read_result(path: Path, *needed: str) -> dict[str, Any]:
    """An earlier result. Raises ScriptError where the file is none, or lacks a part."""
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ScriptError(f"--result {path} cannot be read: {error}") from None
    if lacking := [name for name in needed if name not in result]:
        raise ScriptError(f"--result {path} lacks {', '.join(lacking)}")
    return result


def metric(page: str, name: str) -> list[tuple[dict[str, str], float]]:
    """A metric of a server's ``/metrics`` page, by its full name: labels and value of each of its
    samples. Raises ValueError where the page is none."""
    return [
        (sample.labels, sample.value)
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == name
    ]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _commit() -> str | None:
    """The commit that is checked out, with ``+`` after it if files differ from it."""
    packed = ROOT / "commit.txt"  # where scripts/gpu_visit.sh pack laid the files out
    if packed.is_file():
        return packed.read_text().strip()
    head = _output("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain")
    return (head + ("+" if changed else "")) or None


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
