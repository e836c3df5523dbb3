"""Start ``smg`` as the router needs it, wait for it, and stop it. IO: one child process."""

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import TypeAlias

from kvshare_sglang.errors import StartError

CHECK_S, FAILURES = 2, 3  # how often and how long it asks for health, and how often in vain

# Its own protection against overload would take a worker with a queue out of the ring; our cost
# knows the queue. Without the last flag it tries to fetch tokenizers.
FLAGS = (
    *("--policy", "consistent_hashing", "--disable-worker-overload-protection"),
    *("--health-check-interval-secs", str(CHECK_S), "--health-check-timeout-secs", str(CHECK_S)),
    *("--health-failure-threshold", str(FAILURES), "--worker-startup-check-interval", "1"),
    "--disable-tokenizer-autoload",
)
Process: TypeAlias = subprocess.Popen[bytes]
DRAIN_S = 10  # seconds, where no user waits for an answer


def command(workers: Sequence[str], *, host: str, port: int, more: Sequence[str] = ()) -> list[str]:
    """What starts it. Raises StartError where it is not installed."""
    if importlib.util.find_spec("smg") is None:
        raise StartError("--launch-gateway needs the package smg: pip install smg==1.13.0")
    return [
        *(sys.executable, "-m", "smg", "launch", "--host", host, "--port", str(port)),
        *("--worker-urls", *workers, *FLAGS, *more),
    ]


def start(command: Sequence[str]) -> Process:
    """In a process group of its own: a Ctrl-C reaches the router first."""
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)


def stop(process: Process, *, drain_s: int = DRAIN_S) -> None:
    """End it and all its processes, once requests that run are through or after ``drain_s``; at
    once where a signal comes meanwhile. Safe to call again."""
    try:
        _signal(process, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(drain_s)
    finally:
        if process.poll() is None:
            _signal(process, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)


def _signal(process: Process, sig: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, sig)
