"""What the user sees: the record of a request, counters, log lines, Prometheus metrics.

Four words for prompt tokens, the same everywhere: ``exact`` (prefix hit), ``copied``,
``recomputed`` (found, but computed again), ``fresh`` (new text). They add up to the prompt.
"""

import logging
from collections import Counter
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from kvshare_sglang.policy.admit import Decline
from kvshare_sglang.policy.shadow import Gate, Twin

logger = logging.getLogger("kvshare_sglang")


class Fallback(StrEnum):
    """Why another selector than the one asked for chose the rows; the value is a label."""

    CHUNKED = "chunked"  # the prompt comes in several chunks, the selector needs it whole
    LORA = "lora"  # a server with LoRA adapters lays its segments out per token
    FP8_CACHE = "fp8_cache"  # copied and fresh KV cannot be compared in 8 bits
    CHECK_LAYER = "check_layer"  # the check layer is the last one: nothing would be narrowed


class Report:
    """Counts tokens by kind and declines by reason; mirrors them to Prometheus if asked to."""

    def __init__(self, *, prometheus_labels: Mapping[str, str] | None = None) -> None:
        self.tokens: Counter[str] = Counter()
        self.declines: Counter[str] = Counter()
        self.fallbacks: Counter[tuple[str, str, str]] = Counter()
        self.twins: Counter[str] = Counter()  # agree, differ, or why there was none
        self.doubts: Counter[str] = Counter()
        self.waits = self.most_overtaken = self.schedule_faults = 0
        self.pins: Counter[str] = Counter()
        self._metrics = None if prometheus_labels is None else _Metrics(dict(prometheus_labels))

    def count(self, **tokens: int) -> None:
        """Tokens by kind."""
        self.tokens.update(tokens)
        if self._metrics is not None:
            self._metrics.count(tokens)

    def declined(self, reason: Decline) -> None:
        """One request takes the exact path, or what is left of it does."""
        self.declines[reason.value] += 1
        if self._metrics is not None:
            self._metrics.declined.labels(reason=reason.value).inc()

    def fell_back(self, *, asked: str, ran: str, reason: Fallback) -> None:
        """For one request another selector chooses than the one asked for."""
        self.fallbacks[asked, ran, reason.value] += 1
        if self._metrics is not None:
            self._metrics.fell_back.labels(asked=asked, ran=ran, reason=reason.value).inc()

    def refreshed(self, *, requests: int, rows: int) -> None:
        """Rows of decoding requests ran once more."""
        self.count(refreshed=rows)
        logger.info("KVShare refresh, #running-seq: %d, #row: %d", requests, rows)

    def settled(self, *, requests: int, rows: int) -> None:
        """So many requests ran in full after all, for a token that was in doubt."""
        self.doubts["settled"] += requests
        self.count(settled=rows)
        logger.info("KVShare doubt, #running-seq: %d, #row: %d", requests, rows)
        if self._metrics is not None:
            self._metrics.doubts.labels(outcome="settled").inc(requests)

    def doubt_stays(self, why: str) -> None:
        """A request had a token in doubt, or might have, and goes on as it is."""
        self.doubts[why] += 1
        if self._metrics is not None:
            self._metrics.doubts.labels(outcome=why).inc()

    def shadowed(self, twin: Twin, gate: Gate) -> None:
        """The exact twin of a request is known, and counted in the gate."""
        self.twins["agree" if twin.agrees else "differ"] += 1
        logger.info(
            "KVShare shadow, first token: %s, KL: %.3g, agree: %d of %d, mean KL: %.3g",
            "same" if twin.agrees else "another",
            twin.kl,
            gate.agreeing,
            gate.twins,
            gate.kl,
        )
        if self._metrics is not None:
            self._metrics.twins.labels(first_token="same" if twin.agrees else "another").inc()
            self._metrics.twin_kl.observe(twin.kl)
        self.shadow_state(gate)

    def shadow_dropped(self, reason: str) -> None:
        """A request gets no twin after all."""
        self.twins[reason] += 1
        if self._metrics is not None:
            self._metrics.twin_dropped.labels(reason=reason).inc()

    def shadow_state(self, gate: Gate) -> None:
        if self._metrics is not None:
            self._metrics.agreement.set(gate.agreeing / gate.twins if gate.twins else 1.0)
            self._metrics.switched_off.set(gate.closed)

    def held(self, requests: int, *, queued: int) -> None:
        """So many more of the waiting requests wait for text that another one computes."""
        if not requests:
            return
        self.waits += requests
        logger.info("KVShare queue, #queue-req: %d, #new-twin-wait: %d", queued, requests)
        if self._metrics is not None:
            self._metrics.held.inc(requests)

    def overtaken(self, rows: int) -> None:
        """A waiting request was overtaken by so many rows so far."""
        if rows > self.most_overtaken:
            self.most_overtaken = rows
            if self._metrics is not None:
                self._metrics.overtaken.set(rows)

    def schedule_failed(self) -> None:
        """A fault of ours in ordering the queue."""
        self.schedule_faults += 1
        if self._metrics is not None:
            self._metrics.schedule_faults.inc()

    def pin(self, event: str, tokens: int) -> None:
        """Of a finished turn: taken, returned, expired, given_back, or no_room for it; ``tokens``
        were kept for all of them before."""
        self.pins[event] += 1
        if event in ("given_back", "no_room"):
            logger.info("KVShare turn, %s, #pinned-token: %d", event, tokens)
        if self._metrics is not None:
            self._metrics.pins.labels(event=event).inc()

    def pinned(self, tokens: int) -> None:
        """So many tokens are kept for turns that may follow."""
        if self._metrics is not None:
            self._metrics.pinned.set(tokens)

    def looked_up(self, seconds: float) -> None:
        if self._metrics is not None:
            self._metrics.lookup.observe(seconds)

    def copied(
        self,
        seconds: float,
        *,
        requests: int,
        copied: int,
        rows: int,
        all_rows: int,
        selectors: Mapping[str, int],
    ) -> None:
        """One prefill batch had KV copied into it; ``seconds`` on the host, ``selectors``: who
        chose the rows, with the reason where it was not the one asked for, and for how many."""
        logger.info(
            "KVShare batch, #reuse-seq: %d, #copied-token: %d, #row: %d of %d, select: %s, "
            "copy: %.1f ms",
            requests,
            copied,
            rows,
            all_rows,
            ", ".join(f"{name} {num}" for name, num in selectors.items()),
            seconds * 1e3,
        )
        if self._metrics is not None:
            self._metrics.copy.observe(seconds)


class _Bound:
    """A Prometheus metric with the server's labels filled in."""

    def __init__(self, metric: Any, labels: dict[str, str]) -> None:
        self._metric, self._labels = metric, labels

    def labels(self, **more: str) -> Any:
        return self._metric.labels(**self._labels, **more)


class _Metrics:
    """Counters and histograms on SGLang's own ``/metrics`` page."""

    def __init__(self, labels: dict[str, str]) -> None:
        # Imported late: SGLang sets the multiprocess directory before anything may import this.
        from prometheus_client import Counter as PromCounter
        from prometheus_client import Gauge, Histogram

        buckets = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0)

        def counter(name: str, text: str, *more: str) -> _Bound:
            return _Bound(PromCounter(f"sglang:kvshare_{name}", text, [*labels, *more]), labels)

        def seconds(name: str, text: str) -> Any:
            metric = Histogram(f"sglang:kvshare_{name}", text, list(labels), buckets=buckets)
            return metric.labels(**labels)

        self._tokens = counter("tokens", "Prompt tokens by what was done with them.", "kind")
        self.declined = counter(
            "declined_requests", "Requests that took the exact path, by reason.", "reason"
        )
        self.fell_back = counter(
            "selector_fallbacks",
            "Requests whose rows another selector chose than the one asked for.",
            *("asked", "ran", "reason"),
        )
        self.doubts = counter(
            "doubts", "Requests that came to a token in doubt, by what became of it.", "outcome"
        )
        self.held = PromCounter(
            "sglang:kvshare_waits_for_twins",
            "Waiting requests that waited for text which another one was computing.",
            list(labels),
        ).labels(**labels)
        self.overtaken = Gauge(
            "sglang:kvshare_overtaken_rows_max",
            "The most rows of later requests that went to prefill before a waiting one.",
            list(labels),
            multiprocess_mode="max",
        ).labels(**labels)
        self.schedule_faults = PromCounter(
            "sglang:kvshare_schedule_faults",
            "Faults of KVShare in ordering the queue; each leaves a round to SGLang.",
            list(labels),
        ).labels(**labels)
        self.pins = counter(
            "pins", "Finished turns that were kept for the next, by what became of them.", "event"
        )
        self.pinned = Gauge(
            "sglang:kvshare_pinned_tokens",
            "Tokens that are kept for turns that may follow.",
            list(labels),
            multiprocess_mode="mostrecent",
        ).labels(**labels)
        self.lookup = seconds("lookup_seconds", "Time to find and plan reuse for one request.")
        self.copy = seconds(
            "copy_seconds", "Host time to copy and re-rotate KV for one prefill batch."
        )

        self.twins = counter(
            "shadow_twins", "Exact twins of reusing requests, by their first token.", "first_token"
        )
        self.twin_dropped = counter(
            "shadow_dropped", "Reusing requests that got no twin after all.", "reason"
        )
        kls = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0)
        self.twin_kl = Histogram(
            "sglang:kvshare_shadow_kl", "KL of the first token, in nats.", list(labels), buckets=kls
        ).labels(**labels)

        def gauge(name: str, text: str) -> Any:
            metric = Gauge(
                f"sglang:kvshare_shadow_{name}", text, list(labels), multiprocess_mode="mostrecent"
            )
            return metric.labels(**labels)

        self.agreement = gauge("agreement", "Share of the last twins with the same first token.")
        self.agreement.set(1.0)
        self.switched_off = gauge("off", "1 where reuse has switched itself off.")
        self.switched_off.set(0)

    def count(self, tokens: Mapping[str, int]) -> None:
        for kind, count in tokens.items():
            self._tokens.labels(kind=kind).inc(count)
