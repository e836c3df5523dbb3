"""What the user sees: counters, log lines and Prometheus metrics. Root layer, no sglang import."""

import logging
from collections import Counter
from typing import Any

from kvshare_sglang.policy.gate import Decline

logger = logging.getLogger("kvshare_sglang")


class Report:
    """Counts tokens by kind and declines by reason; mirrors them to Prometheus if asked to.

    Kinds: ``exact`` (prefix hit), ``copied``, ``recomputed`` (reused but computed again),
    ``fresh`` (new text), and ``refreshed`` (copied, then computed again while decoding).
    """

    def __init__(self, *, prometheus_labels: dict[str, str] | None = None) -> None:
        self.tokens: Counter[str] = Counter()
        self.declines: Counter[str] = Counter()
        self._metrics = None if prometheus_labels is None else _Metrics(prometheus_labels)

    def admitted(self, exact: int, decline: Decline | None) -> None:
        """One request goes to prefill with a prefix hit of ``exact`` tokens."""
        self._count(exact=exact)
        if decline is not None:
            self.declined(decline)

    def declined(self, reason: Decline) -> None:
        """One request takes the exact path, or what is left of it does."""
        self.declines[reason.value] += 1
        if self._metrics is not None:
            self._metrics.declined(reason.value)

    def ran(self, *, copied: int, recomputed: int, fresh: int) -> None:
        """One request's part of a prefill batch."""
        self._count(copied=copied, recomputed=recomputed, fresh=fresh)

    def _count(self, **tokens: int) -> None:
        self.tokens.update(tokens)
        if self._metrics is not None:
            self._metrics.count(tokens)

    def refreshed(self, *, requests: int, rows: int) -> None:
        """Rows of decoding requests ran once more."""
        self._count(refreshed=rows)
        logger.info("KVShare refresh, #running-seq: %d, #row: %d", requests, rows)

    def looked_up(self, seconds: float) -> None:
        if self._metrics is not None:
            self._metrics.lookup.observe(seconds)

    def copied(
        self, seconds: float, *, requests: int, copied: int, rows: int, all_rows: int
    ) -> None:
        """One prefill batch had KV copied into it; seconds on the host."""
        logger.info(
            "KVShare batch, #reuse-seq: %d, #copied-token: %d, #row: %d of %d, copy: %.1f ms",
            requests,
            copied,
            rows,
            all_rows,
            seconds * 1e3,
        )
        if self._metrics is not None:
            self._metrics.copy.observe(seconds)


class _Metrics:
    """Counters and histograms on SGLang's own ``/metrics`` page."""

    def __init__(self, labels: dict[str, str]) -> None:
        # Imported late: SGLang sets the multiprocess directory before anything may import this.
        from prometheus_client import Counter as PromCounter
        from prometheus_client import Histogram

        names = list(labels)
        buckets = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0)
        self._labels = labels
        self._tokens = PromCounter(
            "sglang:kvshare_tokens",
            "Prompt tokens by what was done with them.",
            [*names, "kind"],
        )
        self._declined = PromCounter(
            "sglang:kvshare_declined_requests",
            "Requests that took the exact path, by reason.",
            [*names, "reason"],
        )
        self.lookup: Any = Histogram(
            "sglang:kvshare_lookup_seconds",
            "Time to find and plan reuse for one request.",
            names,
            buckets=buckets,
        ).labels(**labels)
        self.copy: Any = Histogram(
            "sglang:kvshare_copy_seconds",
            "Host time to copy and re-rotate KV for one prefill batch.",
            names,
            buckets=buckets,
        ).labels(**labels)

    def count(self, tokens: dict[str, int]) -> None:
        for kind, count in tokens.items():
            self._tokens.labels(**self._labels, kind=kind).inc(count)

    def declined(self, reason: str) -> None:
        self._declined.labels(**self._labels, reason=reason).inc()
