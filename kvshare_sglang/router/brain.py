"""From a request's body to a worker, a routing key and what to learn of the answer. No sockets.

A fault in here must not fail a request: ``decide`` then answers that the gateway shall choose.
"""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from kvshare_sglang.router.index import Choice, Index
from kvshare_sglang.router.metrics import Metrics
from kvshare_sglang.router.prompts import PATHS, Prompts, Reading
from kvshare_sglang.router.ring import Keys

logger = logging.getLogger(__name__)


class Decision(NamedTuple):
    """``key`` None: the gateway chooses. ``ticket``: to be given back as soon as it answers."""

    key: str | None = None
    best: int = -1
    second: int = -1
    choice: Choice | None = None
    body: dict[str, Any] | None = None  # what to hand on in place of what came
    ticket: int = 0


class Brain:
    """One for a router. ``urls``: the workers, as the gateway knows them."""

    def __init__(
        self,
        urls: Sequence[str],
        prompts: Prompts,
        metrics: Metrics,
        *,
        secret: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.urls = list(urls)
        self.index = Index(len(self.urls), secret=secret)
        self.keys, self.prompts, self.metrics, self._clock = Keys(urls), prompts, metrics, clock
        self.doubted = set(range(len(self.urls)))  # whether their keys lead to them is to be tried
        self._numbers = {url.rstrip("/"): n for n, url in enumerate(self.urls)}

    def decide(self, path: str, body: Any, header: str | None = None) -> Decision:
        """Whom to send a request to; nothing is noted of it yet."""
        if path not in PATHS:
            return Decision()
        try:
            return self._decide(path, body, header)
        except Exception:
            logger.exception("the router could not choose a worker; the gateway will")
            self.metrics.decided.labels(by="fault").inc()
            return Decision()

    def _decide(self, path: str, body: Any, header: str | None) -> Decision:
        started = time.perf_counter()
        reading = self.prompts.read(path, body, header)
        read = time.perf_counter()
        now = self._clock()
        choice = self._choose(reading, now)
        named = self.keys.key(choice.order)
        self.metrics.tokenise.observe(read - started)
        self.metrics.choose.observe(time.perf_counter() - read)
        best, second = choice.order[0], choice.order[min(1, len(choice.order) - 1)]
        if named is None:
            self.metrics.decided.labels(by="gateway").inc()
            return Decision(None, best, second, choice, reading.body)
        by = "load" if choice.work is None else "index"
        self.metrics.decided.labels(by=by).inc()
        return Decision(named[0], best, named[1], choice, reading.body)

    def _choose(self, reading: Reading, now: float) -> Choice:
        if reading.tokens is None:
            return self.index.by_load(now)
        return self.index.choose(reading.tokens, reading.namespace, reading.options, now)

    def sent(self, decision: Decision) -> Decision:
        """The request goes out: it counts as work of its worker until ``answered``."""
        if decision.key is None or decision.choice is None:
            return decision
        ticket = self.index.route(decision.best, decision.choice, self._clock())
        return decision._replace(ticket=ticket)

    def answered(self, decision: Decision) -> None:
        """It has begun to answer, or never will. Safe to call again."""
        if decision.ticket:
            self.index.answers(decision.best, decision.ticket)

    def served(self, decision: Decision, url: str | None) -> None:
        """Learn from who served: ``x-smg-routed-worker-id`` of the answer, if there is one."""
        by = self.number(url)
        if by is None or decision.key is None:
            return
        now, meant = self._clock(), decision.best
        self.metrics.served.labels(as_meant=str(by == meant).lower()).inc()
        self.index.served(meant, by, now)
        if by != meant:
            self.doubted.add(meant)

    def number(self, url: str | None) -> int | None:
        """Which worker the gateway means."""
        return None if url is None else self._numbers.get(url.rstrip("/"))

    def told(self) -> dict[str, Any]:
        """How each worker stands, for ``/health``."""
        now = self._clock()
        workers = []
        for number, (url, one) in enumerate(zip(self.urls, self.index.workers, strict=True)):
            standing = self.index.standing(number, now)
            held = one.mirror.num_tokens if one.mirror else None
            told = {"url": url, "indexed_tokens": held, "queued_rows": standing.rows}
            workers.append({**told, "running": standing.running, "avoided": standing.avoid})
        return {"workers": workers, "tokens_handed_on": sorted(self.prompts.sure)}
