"""From a request's body to a worker, a routing key and what to learn of the answer. No sockets.

A fault in here must not fail a request: it is logged, and the gateway chooses.
"""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import orjson

from kvshare_sglang.router.index import Choice, Index
from kvshare_sglang.router.metrics import Metrics
from kvshare_sglang.router.prompts import Prompts, Reading, with_options
from kvshare_sglang.router.ring import Keys

logger = logging.getLogger(__name__)


class Decision(NamedTuple):
    """``key`` None: the gateway chooses. ``ticket``: to be given back as soon as it answers."""

    key: str | None = None
    best: int = -1
    second: int = -1
    choice: Choice | None = None
    body: bytes | None = None  # what to hand on in place of what came
    ticket: int = 0
    streams: bool = False


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
        # By worker: the key that did not lead there, to be tried once more; None: any of its own.
        self.doubted: dict[int, str | None] = dict.fromkeys(range(len(self.urls)))
        self._alike: dict[int, tuple[int, frozenset[str]]] = {}
        self._models: dict[int, str | None] = {}
        self._numbers = {url.rstrip("/"): n for n, url in enumerate(self.urls)}

    # ---- do the workers tokenise as it does -----------------------------------------------------

    def sure(self) -> frozenset[str]:
        """The paths of which tokens may be handed on: on all workers, in the lives that they are
        known to be in, they come out alike."""
        if not all(map(self.is_compared, range(len(self.urls)))):
            return frozenset()
        return frozenset.intersection(*(paths for _, paths in self._alike.values()))

    def is_compared(self, worker: int) -> bool:
        known = self._alike.get(worker)
        return known is not None and known[0] == self.index.workers[worker].run

    def compared(
        self, worker: int, run: int, paths: frozenset[str], model: str | None = None
    ) -> None:
        """Its tokens come out alike for these paths; it was asked in this life. ``model``: what it
        calls what it serves."""
        self._alike[worker] = run, paths
        self._models[worker] = model
        self.prompts.models = frozenset(name for name in self._models.values() if name)

    # ---- a request ------------------------------------------------------------------------------

    def decide(self, path: str, body: Any, header: str | None = None) -> Decision:
        """Whom to send a request to; nothing is noted of it yet."""
        return self.choose(self.read(path, body, header))

    def read(self, path: str, body: Any, header: str | None = None) -> Reading | None:
        """What a body says, None where it cannot be told. Takes milliseconds for each 10,000
        characters; any thread may."""
        try:
            started = time.perf_counter()
            reading = self.prompts.read(path, body, header, sure=path in self.sure())
            self.metrics.tokenise.observe(time.perf_counter() - started)
            return reading
        except Exception:
            self._fault("the router could not read a request")
            return None

    def read_options(self, path: str, body: Any, header: str | None) -> Reading | None:
        """As ``read``, but its tokens do not matter."""
        try:
            changed = with_options(path, body, header) if isinstance(body, dict) else None
        except Exception:
            self._fault("the router could not read a request")
            return None
        return Reading(None, body=changed)

    def choose(self, reading: Reading | None, *, names: bool = True) -> Decision:
        """Whom to send it to, where the router ``names`` someone at all, and what to hand on."""
        if reading is None:
            return Decision()
        body = self._written(reading.body)
        if not names:
            return Decision(body=body)
        try:
            return self._decide(reading, body)
        except Exception:
            self._fault("the router could not choose a worker; the gateway will")
            return Decision(body=body)

    def _written(self, body: dict[str, Any] | None) -> bytes | None:
        """None: hand on what came. So too what could be read but cannot be written, as it is nested
        deeper than the writer goes."""
        try:
            return None if body is None else orjson.dumps(body)
        except Exception:
            self._fault("the router could not write a request; it goes on as it came")
            return None

    def _fault(self, what: str) -> None:
        logger.exception("%s", what)
        self.metrics.decided.labels(by="fault").inc()

    def _decide(self, reading: Reading, body: bytes | None) -> Decision:
        started = time.perf_counter()
        choice = self._choose(reading, self._clock())
        named = self.keys.key(choice.order)
        self.metrics.choose.observe(time.perf_counter() - started)
        best, second = choice.order[0], choice.order[min(1, len(choice.order) - 1)]
        if named is None:
            self.metrics.decided.labels(by="gateway").inc()
            return Decision(None, best, second, choice, body, streams=reading.streams)
        by = "load" if choice.work is None else "index"
        self.metrics.decided.labels(by=by).inc()
        return Decision(named[0], best, named[1], choice, body, streams=reading.streams)

    def _choose(self, reading: Reading, now: float) -> Choice:
        if reading.tokens is None:
            return self.index.by_load(now)
        return self.index.choose(reading.tokens, reading.namespace, reading.options, now)

    def sent(self, decision: Decision) -> Decision:
        """The request goes out: it counts as work of its worker until ``answered``, and as one that
        decodes until ``ended``."""
        if decision.key is None or decision.choice is None:
            return decision
        try:
            ticket = self.index.route(
                decision.best, decision.choice, self._clock(), streams=decision.streams
            )
        except Exception:
            self._fault("the router could not note where a request went")
            return decision
        return decision._replace(ticket=ticket)

    def answered(self, decision: Decision) -> None:
        """It has begun to answer. Safe to call again."""
        self._note(decision, self.index.answers, "is answered")

    def ended(self, decision: Decision) -> None:
        """Its answer is through, or never will be. Safe to call again."""
        self._note(decision, self.index.ended, "has ended")

    def _note(self, decision: Decision, note: Callable[[int, int], None], what: str) -> None:
        if not decision.ticket:
            return
        try:
            note(decision.best, decision.ticket)
        except Exception:
            self._fault(f"the router could not note that a request {what}")

    def served(self, decision: Decision, url: str | None) -> None:
        """Learn from who served: ``x-smg-routed-worker-id`` of the answer, if there is one."""
        try:
            self._served(decision, url)
        except Exception:
            self._fault("the router could not note who answered")

    def _served(self, decision: Decision, url: str | None) -> None:
        by = self.number(url)
        if by is None or decision.key is None:
            return
        now, meant = self._clock(), decision.best
        self.metrics.served.labels(as_meant=str(by == meant).lower()).inc()
        self.index.served(meant, by, now)
        if by != meant:
            self.doubted[meant] = decision.key
            self._alike.pop(meant, None)  # it may come back with another tokenizer

    def number(self, url: str | None) -> int | None:
        """Which worker the gateway means."""
        return None if url is None else self._numbers.get(url.rstrip("/"))

    def told(self) -> dict[str, Any]:
        """How each worker stands, for ``/health``."""
        standings = self.index.standings(self._clock())
        workers = []
        for url, one, standing in zip(self.urls, self.index.workers, standings, strict=True):
            held = one.mirror.num_tokens if one.mirror else None
            told = {"url": url, "indexed_tokens": held, "queued_rows": standing.rows}
            workers.append({**told, "running": standing.running, "avoided": standing.avoid})
        return {"workers": workers, "tokens_handed_on": sorted(self.sure())}
