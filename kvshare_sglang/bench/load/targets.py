"""What a load test sends to: servers that it starts and stops, or addresses that are there."""

import argparse
import contextlib
import re
import shlex
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import httpx

from kvshare_sglang.bench.common import ScriptError, metric
from kvshare_sglang.bench.server import ServerSpec, serve

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,31}")


class Configuration(NamedTuple):
    """Something under test: arguments for a server of its own, or the address of one that runs."""

    name: str
    flags: tuple[str, ...] = ()
    url: str | None = None


DEFAULT = (Configuration("plain"), Configuration("kvshare", ("--kvshare",)))


def own(text: str) -> Configuration:
    """``NAME=FLAGS``, as ``lpm=--kvshare --schedule-policy lpm``; without flags, plain SGLang."""
    name, flags = _named(text)
    return Configuration(name, tuple(shlex.split(flags)))


def running(text: str) -> Configuration:
    """``NAME=URL`` of a server, gateway or router that runs already."""
    name, url = _named(text)
    if not re.match(r"https?://[^/]+/?$", url):
        raise argparse.ArgumentTypeError(f"{text!r}: after = comes http://HOST:PORT, got {url!r}")
    return Configuration(name, url=url.rstrip("/"))


def _named(text: str) -> tuple[str, str]:
    name, found, value = text.partition("=")
    if not found or not _NAME.fullmatch(name):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=...")
    return name, value


def check_names(configurations: Sequence[Configuration]) -> None:
    names = [one.name for one in configurations]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ScriptError(f"two configurations are called {', '.join(twice)}")


class Targets:
    """Gives the address of a configuration, warm and with an empty cache.

    ``together``: all servers of ours run side by side from the first to the last request, and
    rest while another is asked. Otherwise one runs at a time, started anew for each run.
    """

    def __init__(self, specs: dict[str, ServerSpec], *, together: bool) -> None:
        self._specs, self._together = specs, together
        self._up: dict[str, str] = {}

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        if not self._together or not self._specs:
            yield
            return
        with serve(*self._specs.values()) as servers:
            self._up = {one.spec.name: f"http://127.0.0.1:{one.port}" for one in servers}
            yield

    @contextlib.contextmanager
    def ready(self, one: Configuration) -> Iterator[str]:
        url = one.url or self._up.get(one.name)
        if url is not None:
            make_ready(url, one.name)
            yield url
            return
        with serve(self._specs[one.name]) as (server,):
            url = f"http://127.0.0.1:{server.port}"
            make_ready(url, one.name)
            yield url


def make_ready(url: str, name: str) -> None:
    """Two short requests, then an empty cache. Raises ScriptError where it does not answer so."""
    body = {"model": "default", "prompt": "Nothing is asked here.", "max_tokens": 2}
    try:
        with httpx.Client(base_url=url, timeout=120, trust_env=False) as client:
            for _ in range(2):
                client.post("/v1/completions", json=body).raise_for_status()
            client.post("/flush_cache", params={"timeout": 30}).raise_for_status()
    except httpx.HTTPError as error:
        raise ScriptError(f"'{name}' at {url} could not be made ready: {error}") from None


def overtaken_rows(url: str) -> int | None:
    """The most rows of later requests that went before a waiting one, since the server started;
    None where its ``/metrics`` does not say: another order, another server, or a gateway."""
    try:
        page = httpx.get(f"{url}/metrics", timeout=30, trust_env=False).text
        found = metric(page, "sglang:kvshare_overtaken_rows_max")
    except (httpx.HTTPError, ValueError):
        return None
    return max((int(rows) for _, rows in found), default=None)
