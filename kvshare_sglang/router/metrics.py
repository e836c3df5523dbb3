"""The router's Prometheus metrics, in a registry of their own."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_BUCKETS = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.5)


class Metrics:
    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        name = "kvshare_router_"
        self.decided = Counter(
            f"{name}decisions",
            "Requests by who chose the worker: index, load, gateway, or after a fault.",
            ["by"],
            registry=registry,
        )
        self.served = Counter(
            f"{name}served", "Answers by whether the worker that was meant served.",
            ["as_meant"], registry=registry,
        )  # fmt: skip
        self.tokenise = Histogram(
            f"{name}tokenise_seconds", "Time to read and tokenise a body.",
            buckets=_BUCKETS, registry=registry,
        )  # fmt: skip
        self.choose = Histogram(
            f"{name}choose_seconds", "Time to choose a worker.",
            buckets=_BUCKETS, registry=registry,
        )  # fmt: skip
        self.failed = Counter(
            f"{name}gateway_errors", "Requests for which the gateway could not be reached.",
            registry=registry,
        )  # fmt: skip
        self.indexed = Gauge(
            f"{name}indexed_tokens", "Tokens of a worker that are in the index; -1: none known.",
            ["worker"], registry=registry,
        )  # fmt: skip

    def page(self) -> bytes:
        text: bytes = generate_latest(self.registry)
        return text
