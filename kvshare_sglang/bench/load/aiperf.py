"""Sends a trace to a server on schedule with aiperf, which lives in an environment of its own."""

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvshare_sglang.bench import common
from kvshare_sglang.bench.common import ROOT, ScriptError
from kvshare_sglang.bench.load.outcomes import Outcome, outcomes
from kvshare_sglang.bench.load.trace import Timed, schedule_lines
from kvshare_sglang.bench.processes import signals_ignored, signals_raise, stop_group

COMMAND = ROOT / ".venv" / "aiperf" / "bin" / "aiperf"  # where scripts/load_test.sh puts it
# It looks up a tokenizer only where the hub may be asked, though ours lies on disk; its cache of
# traces would grow in the user's home.
_UNSET = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "PYTHONPATH")
_SET = {"HF_HUB_DISABLE_TELEMETRY": "1", "AIPERF_DATASET_MMAP_CACHE_ENABLED": "false",
        "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip


def find(command: Path) -> Path:
    """The command, or ScriptError saying in one line how it is set up."""
    if not os.access(command, os.X_OK):
        raise ScriptError(
            f"aiperf is not set up at {command}: run scripts/load_test.sh, which installs "
            "requirements/aiperf.txt there, or name another with --aiperf"
        )
    return command


def arguments(command: Path, url: str, schedule: Path, tokenizer: Path, out: Path) -> list[str]:
    return [
        *(str(command), "profile", "--model", "default", "--url", url),
        *("--endpoint-type", "completions", "--streaming"),
        *("--input-file", str(schedule), "--custom-dataset-type", "mooncake-trace"),
        "--fixed-schedule",
        *("--tokenizer", str(tokenizer), "--use-server-token-count"),
        *("--export-level", "raw", "--artifact-dir", str(out), "--workers-max", "2"),
        *("--ui", "none", "--no-gpu-telemetry", "--no-server-metrics"),
    ]


def drive(
    url: str,
    trace: Sequence[Timed],
    *,
    tokenizer: Path,
    command: Path,
    timeout_s: float,
    title: str,
) -> list[Outcome]:
    """Send each request when it is due, whatever became of the others; what became of each.

    Raises ScriptError, with the end of aiperf's log, where it fails or takes more than
    ``timeout_s``. It is ended whatever happens.
    """
    folder = Path(tempfile.mkdtemp(prefix="kvshare-load-"))
    try:
        schedule, log, out = folder / "trace.jsonl", folder / "log", folder / "out"
        schedule.write_text("".join(schedule_lines(trace)), encoding="utf-8")
        env = {name: value for name, value in os.environ.items() if name not in _UNSET}
        with signals_raise(), log.open("wb") as said:
            process = subprocess.Popen(
                arguments(command, url, schedule, tokenizer, out),
                env=env | _SET,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                _wait(process, out, len(trace), timeout_s, title)
            finally:
                with signals_ignored():
                    stop_group(process)
        records = out / "profile_export_raw.jsonl"
        if process.returncode or not records.is_file():
            tail = "\n".join("  | " + x[:300] for x in log.read_text().splitlines()[-15:])
            raise ScriptError(
                f"aiperf ended with code {process.returncode} before it was done "
                f"(limit {timeout_s:.0f} s). The end of what it said:\n{tail}"
            )
        with records.open(encoding="utf-8") as lines:
            return outcomes(map(json.loads, lines), trace)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _wait(
    process: "subprocess.Popen[bytes]", out: Path, requests: int, timeout_s: float, title: str
) -> None:
    """Show how many answers are there until it ends or the time is over."""
    deadline = time.monotonic() + timeout_s
    done = 0
    with common.Progress(requests, unit=" answers") as bar:
        bar.say(title)
        while process.poll() is None and time.monotonic() < deadline:
            now = sum(map(_num_lines, out.glob("raw_records/*.jsonl")))
            bar.update(max(now - done, 0))
            done = max(now, done)
            time.sleep(0.5)
        if process.returncode == 0:
            bar.update(requests - done)


def _num_lines(file: Path) -> int:
    with file.open("rb") as data:
        return sum(1 for _ in data)


def as_line(outcome: Outcome, **more: Any) -> str:
    """A record as a line of a file of records."""
    return json.dumps({**more, **outcome._asdict()}) + "\n"
