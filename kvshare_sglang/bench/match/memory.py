"""Resident memory of a data structure, built in a process that has held nothing before."""

import contextlib
import ctypes
import gc
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kvshare_sglang.sim.matcher import Text

_CONTEXT = multiprocessing.get_context("forkserver")
_PAGE = os.sysconf("SC_PAGE_SIZE")


def rss() -> int:
    """Bytes resident now, with what the allocator can give back given back."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another libc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE


def start() -> None:
    """Import now what clean processes need, so that all of a run sees the same code."""
    _CONTEXT.set_forkserver_preload(["kvshare_sglang.bench.match.scale"])
    before = os.environ.get("PYTHONPATH")
    # The server that forks them looks for modules where this says, not where this process does.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    try:
        in_clean_process(rss)
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


def in_clean_process(work: Callable[..., Any], *args: Any) -> Any:
    """``work(*args)`` in a process forked from one that only imported its modules."""
    pool = _CONTEXT.Pool(1)
    try:
        return pool.apply(work, args)
    finally:
        pool.close()
        pool.join()


def measure(make: Callable[[], Any], log: list[tuple[str, tuple[Any, ...]]]) -> int:
    """Bytes that a matcher and all its Python objects take after the calls of ``log``."""
    return int(in_clean_process(_replay, make, log))


def _replay(make: Callable[[], Any], log: list[tuple[str, tuple[Any, ...]]]) -> int:
    warm = make()  # what is imported and allocated once must not be counted
    warm.insert(Text(None, np.arange(4096, dtype=np.int32)))
    del warm
    before = rss()
    matcher = make()
    for verb, args in log:
        getattr(matcher, verb)(*args)
    return rss() - before
