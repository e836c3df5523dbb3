"""Who goes first on a worker, and to which worker a request goes: what exists, as plain functions.

An order takes those that wait (in order of arrival) and their worker, and gives the positions of
those that may be let in, first to last. A route takes a request and all workers, and gives one.
"""

import importlib
import random as chance
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kvshare_sglang.bench.common import ScriptError
from kvshare_sglang.policy import schedule
from kvshare_sglang.radix_fuzzy.fingerprints import winnow
from kvshare_sglang.router import cost
from kvshare_sglang.sim.caches import Nothing
from kvshare_sglang.sim.radix import RadixTree, lru
from kvshare_sglang.sim.serving import Choose, Job, Order, Work, Worker

MOST_MATCHED = 128  # requests that wait; with more, SGLang goes by arrival
NEAR = 8  # requests at the head of an order whose cost is looked up again
EXACTLY = 3  # workers that are asked what they would do, where there are more than four
SHARD = 64  # workers of one index: a bit of its masks for each
BEAT_S = 0.2  # between two words of a worker about its queue


# ---- orders --------------------------------------------------------------------------------


def fcfs(waiting: Sequence[Job], worker: Worker) -> Sequence[int]:
    """As they came."""
    return range(len(waiting))


def lpm(waiting: Sequence[Job], worker: Worker) -> Sequence[int]:
    """SGLang's longest prefix match."""
    if len(waiting) > MOST_MATCHED:
        return fcfs(waiting, worker)
    hits = [worker.cache.prefix(job) for job in waiting]
    return sorted(range(len(waiting)), key=lambda i: -hits[i])


def hrrn(waiting: Sequence[Job], worker: Worker) -> Sequence[int]:
    """SGLang's highest response ratio: rows let in since it came over its tokens behind the
    prefix."""
    if len(waiting) > MOST_MATCHED:
        return fcfs(waiting, worker)
    ratio = [
        (worker.let_in - job.came_at) / max(job.tokens - worker.cache.prefix(job), 1)
        for job in waiting
    ]
    return sorted(range(len(waiting)), key=lambda i: -ratio[i])


def shortest(waiting: Sequence[Job], worker: Worker) -> Sequence[int]:
    """Fewest rows first, looked up anew each time, and nobody is protected from starving: about the
    least mean wait that an order can give, to hold others to. No server should be run so."""
    rows = [worker.cache.look(job).rows for job in waiting]
    return sorted(range(len(waiting)), key=lambda i: rows[i])


def kvshare(*, bound: int) -> Order:
    """The plug-in's own order, ``policy.schedule``, over real costs: looked up once when a request
    is first seen, and again near the head. Nobody waits for a twin here."""

    def cost(job: Job) -> int:
        assert job.work is not None
        return schedule.cost_of(rows=job.work.rows, copied=job.work.copied, tokens=job.tokens)

    def once(waiting: Sequence[Job], worker: Worker) -> list[int]:
        nothing = np.zeros(len(waiting), np.int64)
        queue = schedule.Queue(
            cost=np.array([cost(job) for job in waiting], np.int64),
            tokens=np.array([job.tokens for job in waiting], np.int64),
            age=np.array([worker.let_in - job.came_at for job in waiting], np.int64),
            overtaken=np.array([job.overtaken for job in waiting], np.int64),
            shared=nothing,
            patience=nothing,
        )
        return schedule.order(queue, bound=bound).first

    def order(waiting: Sequence[Job], worker: Worker) -> Sequence[int]:
        for job in waiting:
            if job.work is None:
                job.work = worker.cache.look(job)
        first = once(waiting, worker)
        before = [waiting[i].work for i in first[:NEAR]]
        for i in first[:NEAR]:
            waiting[i].work = worker.cache.look(waiting[i])
        if [waiting[i].work for i in first[:NEAR]] != before:
            first = once(waiting, worker)
        return first

    return order


ORDERS: dict[str, Callable[..., Order]] = {
    "fcfs": lambda bound: fcfs,
    "lpm": lambda bound: lpm,
    "hrrn": lambda bound: hrrn,
    "shortest": lambda bound: shortest,
    "kvshare": lambda bound: kvshare(bound=bound),
}


def order_of(name: str, *, bound: int) -> Order:
    """One of ``ORDERS``, or the function that ``MODULE:FUNCTION`` names."""
    if name in ORDERS:
        return ORDERS[name](bound=bound)
    return _given(name, "--order", ORDERS)  # type: ignore[no-any-return]


# ---- routes --------------------------------------------------------------------------------


def least_load(job: Job, workers: Sequence[Worker]) -> int:
    """Fewest requests."""
    return min(range(len(workers)), key=lambda i: workers[i].load)


def random(seed: int = 0) -> Choose:
    rng = chance.Random(seed)
    return lambda job, workers: rng.randrange(len(workers))


def cache_aware() -> Choose:
    """As the gateways: the worker to which the longest prefix of this prompt was routed, if that
    is more than 0.3 of it, else the one to which least text was; the one with fewest requests
    where loads differ by more than 32 and by half."""
    trees: list[RadixTree] = []

    def choose(job: Job, workers: Sequence[Worker]) -> int:
        while len(trees) < len(workers):
            trees.append(RadixTree(Nothing(), capacity=None, policy=lru))
        loads = [one.load for one in workers]
        text = job.prompt
        if text is None:  # documents that are counted: each stands for one token here
            text = np.array([number for number, _ in job.documents], np.int32)
        hits = [tree.prefix_len(job.space, text) for tree in trees]
        best = max(range(len(trees)), key=lambda i: hits[i])
        if max(loads) - min(loads) > 32 and max(loads) > 1.5 * min(loads):
            best = min(range(len(loads)), key=lambda i: loads[i])
        elif hits[best] <= 0.3 * len(text):
            best = min(range(len(trees)), key=lambda i: trees[i].resident)
        trees[best].store(job.space, text)
        return best

    return choose


Rank = Callable[[Job, Sequence[Worker], dict[int, Work]], int]  # what each would do: the best one


def cheapest() -> Choose:
    """The worker where a request is done first: rows that run, copies and what is before it."""

    def best(job: Job, workers: Sequence[Worker], works: dict[int, Work]) -> int:
        def cost(i: int) -> tuple[float, int]:
            rows = works[i].rows + schedule.COPY * works[i].copied + _rows_before(workers[i])
            return rows, workers[i].cache.held  # like costs: new text goes where there is least

        return min(works, key=cost)

    return _looking(best)


def kvshare_route() -> Choose:
    """The router's own choice, ``router.cost``."""

    return _looking(_router)


def _router(job: Job, workers: Sequence[Worker], works: dict[int, Work]) -> int:
    found = [
        cost.Work(rows=works[i].rows, copied=works[i].copied, exact=works[i].exact)
        if i in works
        else None
        for i in range(len(workers))
    ]
    standings = [
        cost.Standing(rows=_rows_before(one), running=len(one.running), held=one.cache.held)
        for one in workers
    ]
    return cost.order(found, standings, prompt_len=job.tokens)[0]


def sharded(*, named: int = 2) -> Choose:
    """As a front before shards of ``SHARD`` workers with an index each would: it asks the ``named``
    shards that the prompt's documents name and the one with least to do, and the router's own
    choice decides among their workers. A document names a shard by its hash; of those of a prompt
    the least hashes count, so that prompts with many documents in common meet (Broder, 1997).
    What a shard has to do is that of the last beat, and what was sent there since."""
    to_do: list[float] = []
    told_s = -BEAT_S

    def choose(job: Job, workers: Sequence[Worker]) -> int:
        nonlocal to_do, told_s
        shards = [range(i, min(i + SHARD, len(workers))) for i in range(0, len(workers), SHARD)]
        if job.due_s - told_s >= BEAT_S:
            to_do = [float(sum(_rows_before(workers[i]) for i in shard)) for shard in shards]
            told_s = job.due_s
        hashes = sorted(hash((number, 7)) for number, _ in job.documents)
        asked = {one % len(shards) for one in hashes[:named]} | {int(np.argmin(to_do))}
        places = [i for shard in sorted(asked) for i in shards[shard]]
        works = {j: workers[i].cache.look(job) for j, i in enumerate(places)}
        chosen = _router(job, [workers[i] for i in places], works)
        to_do[places[chosen] // SHARD] += works[chosen].rows
        return places[chosen]

    return choose


def _looking(best: Rank) -> Choose:
    """Asks workers what they would do, and ``best`` whose answer is taken. Of more than four that
    hold text, three are asked: those with most of its grams, and the one with least to do."""
    held: dict[int, int] = {}  # gram: a bit for each worker that had it routed
    bits = np.arange(SHARD, dtype=np.uint64)

    def choose(job: Job, workers: Sequence[Worker]) -> int:
        asked: Sequence[int] = range(len(workers))
        grams: list[int] = []
        if len(workers) > 4 and job.prompt is not None:
            grams = winnow(job.prompt, seed=0).hashes.tolist()
            masks = np.array([held.get(gram, 0) for gram in grams], np.uint64)
            known = ((masks[:, None] >> bits) & np.uint64(1)).sum(0)[: len(workers)]
            most = np.argsort(-known.astype(np.int64), kind="stable")[: EXACTLY - 1].tolist()
            asked = [*most, min(range(len(workers)), key=lambda i: _rows_before(workers[i]))]
        chosen = best(job, workers, {i: workers[i].cache.look(job) for i in asked})
        for gram in grams:
            held[gram] = held.get(gram, 0) | 1 << chosen
        return chosen

    return choose


def _rows_before(worker: Worker) -> float:
    """Rows that a new request finds before it; of those that were not looked up, their tokens."""
    rows = sum(job.tokens if job.work is None else job.work.rows for job in worker.waiting)
    return float(rows + worker.rows + (worker.cut[1] if worker.cut else 0))


ROUTES: dict[str, Callable[[], Choose]] = {
    "random": random,
    "least_load": lambda: least_load,
    "cache_aware": cache_aware,
    "cheapest": cheapest,
    "kvshare": kvshare_route,
    "sharded": sharded,
}


def route_of(name: str) -> Choose:
    """One of ``ROUTES``, or the function that ``MODULE:FUNCTION`` names."""
    if name in ROUTES:
        return ROUTES[name]()
    return _given(name, "--route", ROUTES)  # type: ignore[no-any-return]


def _given(name: str, flag: str, known: dict[str, Any]) -> Any:
    module, found, function = name.partition(":")
    if not found:
        raise ScriptError(f"{flag} {name} is none of {', '.join(known)}, nor MODULE:FUNCTION")
    value = getattr(_module(module), function, None)
    if not callable(value):
        raise ScriptError(f"{flag} {name}: {module} has no function {function}")
    return value


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ScriptError(f"there is no module {error.name}") from None
