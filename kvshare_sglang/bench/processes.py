"""Processes that must end with the program that started them. Needs the standard library alone."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any


def free_port() -> int:
    """A TCP port that nobody listens on, below those that the kernel gives to whoever asks for any:
    one of these is somebody else's before a server has started."""
    draw = random.SystemRandom()
    while True:
        port = draw.randrange(12_000, 30_000)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


def group_lives(process: "subprocess.Popen[bytes]") -> bool:
    """Whether any process of the group that ``process`` leads is left."""
    process.poll()  # reap the leader, or it stays in its group for ever
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def stop_group(*processes: "subprocess.Popen[bytes]") -> None:
    """End these, side by side, and the groups that they lead; safe to call again."""
    for sig, wait_s in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 10.0)):
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, sig)
        deadline = time.monotonic() + wait_s
        while any(map(group_lives, processes)) and time.monotonic() < deadline:
            time.sleep(0.05)


@contextlib.contextmanager
def signals_raise() -> Iterator[None]:
    """SIGTERM and SIGHUP end the script like Ctrl-C, so that the servers are stopped."""

    def leave(number: int, _frame: Any) -> None:
        sys.exit(128 + number)

    with _handlers({signal.SIGTERM: leave, signal.SIGHUP: leave}):
        yield


@contextlib.contextmanager
def signals_ignored() -> Iterator[None]:
    """A second Ctrl-C must not leave servers running."""
    stop = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    with _handlers(dict.fromkeys(stop, signal.SIG_IGN)):
        yield


@contextlib.contextmanager
def _handlers(handlers: dict[Any, Any]) -> Iterator[None]:
    old = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
