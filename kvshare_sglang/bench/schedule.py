"""Measure what deciding the order of a waiting queue takes: the policy alone, no server.

A queue that stays as long as it is: in each round one batch is let in, as many come, and the text
of one batch enters the tree. Prompts are one of some documents and a question; of half of the
documents nothing is cached. Deciding is what each round of the scheduler pays; taking a request up
and noting a change are paid once for each request and each insert, beside its lookup.
"""

import argparse
import itertools
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from kvshare_sglang.bench import common
from kvshare_sglang.policy.schedule import Order, Twins, cost_of, order
from kvshare_sglang.policy.waiting import Waiting, in_sample
from kvshare_sglang.radix_fuzzy.fingerprints import winnow

DOCUMENTS, DOCUMENT, QUESTION = 64, 4000, 100
ROOM, BOUND, BUDGET = 8192, 65536, 0.15


class Queue:
    """Requests that come, wait and are let in. ``ms``: times by what was done; ``cpu_ms``: what of
    them this thread ran."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.documents = [self._words(DOCUMENT) for _ in range(DOCUMENTS)]
        self.waiting = Waiting()
        self.text: dict[Any, frozenset[int]] = {}
        self.ms: dict[str, list[float]] = {"decide": [], "come": [], "let_in": [], "change": []}
        self.cpu_ms: dict[str, list[float]] = {what: [] for what in self.ms}
        self._ids = itertools.count()

    def _words(self, num: int) -> np.ndarray:
        return self.rng.integers(0, 1 << 16, num).astype(np.int32)

    def _timed(self, what: str, do: Callable[[], Any]) -> Any:
        started, ran = time.perf_counter(), time.thread_time()
        out = do()
        self.ms[what].append(1e3 * (time.perf_counter() - started))
        self.cpu_ms[what].append(1e3 * (time.thread_time() - ran))
        return out

    def come(self) -> None:
        which = int(self.rng.integers(DOCUMENTS))
        cached = DOCUMENT * (which % 2)
        marks = winnow(np.concatenate([self.documents[which], self._words(QUESTION)]))
        some = in_sample(marks.hashes)
        rows = DOCUMENT + QUESTION - int((1 - BUDGET) * cached)
        cost = cost_of(rows=rows, copied=cached, tokens=DOCUMENT + QUESTION)
        key = next(self._ids)

        def take_up() -> None:
            self.waiting.come([(key, DOCUMENT + QUESTION, 0)])
            self.waiting.note_text(key, np.unique(marks.hashes[some]))
            self.waiting.looked_up(key, cost=cost, twins=True)

        self._timed("come", take_up)
        new = some & (marks.positions >= cached)
        self.text[key] = frozenset(marks.hashes[new].tolist())

    def decide(self) -> Order:
        waiting, keys = self.waiting, self.waiting.keys

        def text(i: int) -> frozenset[int]:
            return self.text[keys[i]]

        twins = Twins(64, 0.1, BUDGET, text, text, waiting.tokens_each)
        return order(waiting.queue(bound=BOUND), bound=BOUND, room=ROOM, twins=twins)

    def round(self) -> None:
        """One batch: decided, let in, computed, and as many come again."""
        found: Order = self._timed("decide", self.decide)
        batch: list[tuple[Any, int]] = []
        rows = 0
        for i in found.first:
            rows += self.waiting.cost_at(i)
            if batch and rows > ROOM:
                break
            batch.append((self.waiting.keys[i], self.waiting.cost_at(i)))
        gives = {key: np.array(sorted(self.text.pop(key)), np.uint64) for key, _ in batch}

        def let_in() -> None:
            for key, cost in batch:
                self.waiting.let_in(key, cost)
                self.waiting.computes(key, gives[key])

        self._timed("let_in", let_in)
        self.waiting.leave([])
        self._timed("decide", self.decide)  # while they are computed, most wait for twins

        def through() -> None:  # as the server: the text of each is inserted, then all are through
            for key, _ in batch:
                self.waiting.changed(gives[key])
            for key, _ in batch:
                self.waiting.computed(key)

        self._timed("change", through)
        for _ in batch:
            self.come()


def measure(num: int, rounds: int, seed: int) -> dict[str, Any]:
    queue = Queue(seed)
    for _ in range(num):
        queue.come()
    queue.ms["come"].clear()
    queue.cpu_ms["come"].clear()
    for _ in range(rounds):
        queue.round()
    row: dict[str, Any] = {"waiting": num}
    for what, times in queue.ms.items():
        row[f"{what}_ms_p50"] = float(np.quantile(times, 0.5))
        row[f"{what}_ms_p99"] = float(np.quantile(times, 0.99))
        row[f"{what}_cpu_ms_p99"] = float(np.quantile(queue.cpu_ms[what], 0.99))
    return row


def show(rows: list[dict[str, Any]]) -> str:
    return common.columns(
        rows,
        waiting="{waiting}",
        decide_p50="{decide_ms_p50:.2f} ms",
        decide_p99="{decide_ms_p99:.2f} ms",
        of_it_CPU="{decide_cpu_ms_p99:.2f} ms",
        take_one_up="{come_ms_p50:.2f} ms",
        let_a_batch_in="{let_in_ms_p50:.2f} ms",
        insert_it="{change_ms_p50:.2f} ms",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--waiting", type=int, nargs="+", default=[64, 256, 1024, 2048], help="queue lengths")
    add("--rounds", type=int, default=100, help="batches for each")
    add("--seed", type=int, default=0, help="of the texts")


def run(args: argparse.Namespace) -> int:
    common.warn_if_busy()
    rows = [measure(num, args.rounds, args.seed) for num in args.waiting]
    common.report(args, show(rows), {"rows": rows})
    return 0
