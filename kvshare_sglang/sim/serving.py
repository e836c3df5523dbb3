"""Servers in simulated time: who waits, who is let into a batch, how long a step takes. SimPy.

A worker does what SGLang's scheduler does, step by step: as long as someone waits and fits, a
prefill batch of up to a chunk of rows; else one token for all that decode. Which request goes
first and to which worker it goes are plain functions, so that the very code of a server or of a
router can be given; so is what a cache holds. Nothing here depends on a clock or on chance.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import simpy

from kvshare_sglang.radix_fuzzy.fingerprints import Tokens


class Work(NamedTuple):
    """What becomes of a prompt: ``exact`` tokens are its prefix hit, of the rest ``rows`` run and
    ``copied`` are copied."""

    exact: int
    copied: int
    rows: int


@dataclass(slots=True, eq=False)
class Job:
    """One request. What it says is ``prompt`` (token ids, under a namespace), or for a cache that
    only counts ``documents``: numbers and lengths of what stands before its own text.

    The rest is written while it is served: ``came_at`` is the worker's ``let_in`` when it came,
    ``overtaken`` the rows of later ones that were let in before it.
    """

    number: int
    due_s: float
    tokens: int
    new_tokens: int
    prompt: Tokens | None = None
    space: object = None
    documents: tuple[tuple[int, int], ...] = ()
    worker: int = -1
    came_at: int = 0
    overtaken: int = 0
    note: Any = None  # of the cache: what a lookup found, and when
    work: Work | None = None
    first_s: float = -1.0
    end_s: float = -1.0
    left: int = 0  # tokens that it has yet to answer
    read: int = 0  # tokens of its answer that were seen

    @property
    def attends(self) -> float:
        """Tokens that a row of it attends to, on average: its rows are the last ones, or nearly."""
        return self.tokens - self.work.rows / 2 if self.work else 0.0


class Cache(Protocol):
    """What a worker holds."""

    @property
    def held(self) -> int:
        """Tokens."""

    def prefix(self, job: Job) -> int:
        """Its prefix hit. Cheap, and changes nothing."""

    def look(self, job: Job) -> Work:
        """What would become of the prompt now. Changes nothing."""

    def take(self, job: Job) -> Work:
        """The job is let in: its text counts as used."""

    def leave(self, job: Job) -> None:
        """Its prompt was computed: store what it leaves, evict what that displaces."""


class StepCosts(NamedTuple):
    """Seconds of a prefill step: ``step + row * rows + pair * pairs + copy * copied + request *
    requests``, and of a decode step: ``decode_step + decode_request * requests``. ``pairs`` are
    rows times what each attends to; ``overhead`` is what a request takes outside its steps (tokens
    in, tokens out). Here the overheads of any number of requests pass side by side; a real server
    tokenises one after the other, which shows only under load. ``late``: an answer is read after
    the step that follows, if one does: where steps run on the scheduler's own thread, as on a CPU,
    SGLang's overlap has launched that step, and so run it, by then. ``pads``: attention of a
    piece of a prompt that copies nothing costs as much as of all up to its end, as SGLang's does on
    a CPU."""

    step: float = 0.004
    row: float = 0.0004
    pair: float = 0.0
    copy: float = 0.000004
    request: float = 0.001
    decode_step: float = 0.01
    decode_request: float = 0.001
    overhead: float = 0.01
    late: bool = False
    pads: bool = False

    def pairs_of(self, job: Job, piece: int, left: int) -> float:
        """Of ``piece`` rows of a job that is let in, ``left`` of which are still to come."""
        if self.pads and job.work is not None and not job.work.copied:
            return (job.tokens - left) ** 2 / 2
        return piece * job.attends

    def prefill(self, rows: int, copied: int, requests: int, pairs: float = 0.0) -> float:
        each = self.row * rows + self.pair * pairs + self.copy * copied + self.request * requests
        return self.step + each

    def decode(self, requests: int) -> float:
        return self.decode_step + self.decode_request * requests


class Limits(NamedTuple):
    """Of each worker: rows in a prefill step, requests that decode, tokens of all that run."""

    chunk: int = 2048
    max_running: int = 8
    memory: int = 65536


Order = Callable[[Sequence[Job], "Worker"], Sequence[int]]  # who is let in, first to last
Choose = Callable[[Job, Sequence["Worker"]], int]  # the worker that a new request goes to


@dataclass(eq=False)
class Worker:
    """One server. ``step``: requests whose prefill ends with the step that runs now, and ``rows``
    of that step. ``let_in``: rows of all that were let in so far."""

    number: int
    env: simpy.Environment
    cache: Cache
    order: Order
    costs: StepCosts
    limits: Limits
    waiting: list[Job] = field(default_factory=list)
    running: list[Job] = field(default_factory=list)
    step: list[Job] = field(default_factory=list)
    rows: int = 0
    cut: tuple[Job, int] | None = None  # a prompt in several chunks, and its rows to come
    let_in: int = 0
    busy_s: float = 0.0
    unread: list[Job] = field(default_factory=list)  # who has a token of the last step
    arrived: Any = None  # an event, while it has nothing to do

    def add(self, job: Job) -> None:
        job.worker, job.came_at = self.number, self.let_in
        self.waiting.append(job)
        if self.arrived is not None:
            self.arrived.succeed()
            self.arrived = None

    def run(self) -> Any:
        """The process of this worker."""
        while True:
            if not (self.waiting or self.running or self.cut):
                self._read_all()
                self.arrived = self.env.event()
                yield self.arrived
            batch = self._prefill()
            if batch is not None:
                seconds, done = batch
                yield self._takes(seconds)
                self.step, self.rows = [], 0
                for job in done:
                    job.left = job.new_tokens
            elif not self.running:  # what was not read holds all that there is
                self._read_all()
                continue
            else:
                yield self._takes(self.costs.decode(len(self.running)))
                done, self.running = self.running, []
            for job in done:
                job.left -= 1
                if job.left > 0:
                    self.running.append(job)
            if self.costs.late:
                done, self.unread = self.unread, done
            for job in done:
                self._read(job)

    @property
    def load(self) -> int:
        """Requests that wait or run."""
        return len(self.waiting) + len(self.step) + len(self.running)

    def _takes(self, seconds: float) -> Any:
        self.busy_s += seconds
        return self.env.timeout(seconds)

    def _read(self, job: Job) -> None:
        """It has another token; its prompt is stored with the first one."""
        if job.first_s < 0:
            self.cache.leave(job)
            job.first_s = self.env.now
        job.read += 1
        if job.read >= job.new_tokens:
            job.end_s = self.env.now

    def _read_all(self) -> None:
        for job in self.unread:
            self._read(job)
        self.unread = []

    def _prefill(self) -> tuple[float, list[Job]] | None:
        """Let a batch in: how long its step takes and who is then done; None if nobody is."""
        room, copied, requests, pairs = self.limits.chunk, 0, 0, 0.0
        done: list[Job] = []
        ended = [job for job in self.unread if job.left <= 0]  # which nobody knows yet
        running = [*self.running, *ended]
        memory = self.limits.memory - sum(one.tokens + one.new_tokens for one in running)
        if self.cut is not None:
            job, rows = self.cut
            memory -= job.tokens + job.new_tokens
            pairs = self.costs.pairs_of(job, min(rows, room), max(rows - room, 0))
            room, requests = room - min(rows, room), 1
            self.cut = (job, rows - self.limits.chunk) if rows > self.limits.chunk else None
            if self.cut is None:
                done.append(job)
        if room and self.waiting:
            let_in: list[Job] = []
            for i in self.order(self.waiting, self):
                job = self.waiting[i]
                memory -= job.tokens + job.new_tokens
                alone = not (requests or running)
                full = len(running) + requests >= self.limits.max_running
                if room == 0 or full or (memory < 0 and not alone):
                    break
                job.work = work = self.cache.take(job)
                let_in.append(job)
                requests, copied = requests + 1, copied + work.copied
                piece = min(work.rows, room)
                pairs += self.costs.pairs_of(job, piece, work.rows - piece)
                if work.rows > room:
                    self.cut, room = (job, work.rows - room), 0
                else:
                    room -= work.rows
                    done.append(job)
            self._note(let_in)
        if not requests:
            if self.waiting and not running:
                raise RuntimeError(f"worker {self.number}: nobody of those who wait was let in")
            return None
        self.step, self.rows = done, self.limits.chunk - room
        return self.costs.prefill(self.rows, copied, requests, pairs), done

    def _note(self, let_in: Sequence[Job]) -> None:
        """Take those that were let in out of the queue, and count whom they overtook."""
        gone = set(map(id, let_in))
        for job in let_in:
            assert job.work is not None
            self.let_in += job.work.rows
            for other in self.waiting:
                if other is job:
                    break
                if id(other) not in gone:
                    other.overtaken += job.work.rows
        if let_in:
            self.waiting = [one for one in self.waiting if id(one) not in gone]


class Result(NamedTuple):
    """All jobs, served; ``queue`` are counts of those that wait, whenever one came; ``busy_s`` of
    each worker."""

    jobs: list[Job]
    queue: list[int]
    busy_s: list[float]

    @property
    def waits(self) -> "np.ndarray[Any, np.dtype[np.float64]]":
        """Seconds from when each was due to its first token, [n]."""
        return np.array([job.first_s - job.due_s for job in self.jobs])


def simulate(
    jobs: Sequence[Job],
    caches: Sequence[Cache],
    *,
    order: Order,
    choose: Choose,
    costs: StepCosts,
    limits: Limits,
    tick: Callable[[], None] = lambda: None,
) -> Result:
    """Serve ``jobs`` (ascending ``due_s``) with a worker for each cache, until all are done.

    Half of ``overhead`` passes before a job reaches its worker, half before its first token is
    seen. ``tick`` is called for each job that comes. O(jobs * (tokens they answer + order)).
    """
    env = simpy.Environment()
    workers = [Worker(i, env, cache, order, costs, limits) for i, cache in enumerate(caches)]
    for worker in workers:
        env.process(worker.run())
    queue: list[int] = []

    def arrivals() -> Any:
        for job in jobs:
            yield env.timeout(max(job.due_s + costs.overhead / 2 - env.now, 0))
            queue.append(sum(len(worker.waiting) for worker in workers))
            workers[choose(job, workers)].add(job)
            tick()

    env.process(arrivals())
    env.run()  # until nothing is left to happen: idle workers wait for ever
    for job in jobs:
        if job.end_s < 0:
            raise RuntimeError(f"job {job.number} was never served")
        job.first_s += costs.overhead / 2
        job.end_s += costs.overhead / 2
    return Result(list(jobs), queue, [worker.busy_s for worker in workers])
