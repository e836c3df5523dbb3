"""What the router knows of its workers, and whom it names for a prompt. Pure: no clock, no wire.

First all workers by what share of the prompt's grams they hold (one ``JointMap``), then the best
few by what they would really do with it (``Mirror`` and the worker's own selectors). Text that was
routed counts as held while it waits and for some seconds. Times are seconds of any one clock.
"""

import math
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvshare_sglang import wire
from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.errors import ConfigError, TreeError
from kvshare_sglang.policy.options import RequestOptions
from kvshare_sglang.radix_fuzzy.fingerprints import GRAM, SPAN, Tokens, winnow
from kvshare_sglang.radix_fuzzy.index import Words
from kvshare_sglang.router.cost import Standing, Work, budget_of, mode_of, order, work_of
from kvshare_sglang.router.joint import MOST_WORKERS, JointMap, coverage
from kvshare_sglang.router.mirror import Mirror, Namespace

EXACTLY = 3  # workers whose work is predicted exactly
MOST_PIECES = 512  # of a prompt that are found exactly: 30 microseconds each, and all else waits
RECENT_S = 10.0  # routed text counts as held for this long, at least half of it
MOST_SENT = 1 << 20  # tokens that a worker counts as holding of which that is not known
MOST_WAITING = 1 << 17  # grams of what waits that are kept longer: of about half a million tokens
SILENT_S = 2.0  # without a beat a worker is not known to live
AVOID_S = 15.0  # by then the gateway has noticed itself, and what is silent is asked again
UNKNOWN = 512  # tokens that a prompt counts as which could not be read
SUSPECT_S = 2.0  # after another one had to stand in for it


_DEFAULTS = KVShareConfig()


class Recent:
    """Grams of what was routed lately, in two generations: the older one is dropped as a whole.
    What waits still, by ticket, goes over into the next."""

    def __init__(self) -> None:
        self._young, self._old, self._since = JointMap(), JointMap(), 0.0
        self._waiting: dict[int, tuple[Words, int]] = {}
        self._size = 0

    def add(self, ticket: int, hashes: Words, worker: int, now: float) -> None:
        self._turn(now)
        hashes = np.unique(hashes)
        self._young.add(hashes, worker)
        if self._size + len(hashes) <= MOST_WAITING:
            self._waiting[ticket] = hashes, worker
            self._size += len(hashes)

    def done(self, ticket: int) -> None:
        """It waits no longer: some seconds are left to it. Safe to call again."""
        if one := self._waiting.pop(ticket, None):
            self._size -= len(one[0])

    def find(self, hashes: Words, now: float) -> Words:
        self._turn(now)
        return self._young.find(hashes) | self._old.find(hashes)

    def drop(self, worker: int) -> None:
        self._young.drop(worker)
        self._old.drop(worker)
        for ticket in [t for t, (_, there) in self._waiting.items() if there == worker]:
            self.done(ticket)

    def _turn(self, now: float) -> None:
        ages = (now - self._since) // (RECENT_S / 2)
        if ages >= 1:
            self._old = self._young if ages == 1 else JointMap()
            self._young, self._since = JointMap(), now
            for worker in {there for _, there in self._waiting.values()}:
                waits = [hashes for hashes, there in self._waiting.values() if there == worker]
                self._young.add(np.unique(np.concatenate(waits)), worker)


def _saved(
    masks: Words, widths: npt.NDArray[np.float32], shares: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """Tokens that each worker need not compute, roughly: all that the prompt begins with, which is
    a prefix hit whatever was asked for, and of what is found behind it a share."""
    front = coverage(np.bitwise_and.accumulate(masks), widths)[: len(shares)]
    return front + shares * (coverage(masks, widths)[: len(shares)] - front)


def _pieces(masks: Words, worker: int) -> int:
    """In how many places what a worker holds of a prompt begins, roughly."""
    held = (masks >> np.uint64(worker)) & np.uint64(1)
    return int(np.count_nonzero(held[1:] > held[:-1]))


@dataclass(slots=True)
class Worker:
    """``mirror`` None: what it holds is not known. ``run``: the last life that it told of, 0: none.
    ``routed``: of requests that were sent there and have not begun to answer, by ticket, the rows
    and when that was, infinite where the first token will be seen. ``open``: the tickets of those
    whose answers have not ended. ``sent``: tokens, about; at most MOST_SENT."""

    mirror: Mirror | None = None
    run: int = 0
    beat: wire.Beat | None = None
    heard: float | None = None
    suspect: float = 0.0  # until then
    failures: int = 0
    routed: dict[int, tuple[int, float]] = field(default_factory=dict)
    open: set[int] = field(default_factory=set)
    sent: int = 0


class Choice(NamedTuple):
    """``order``: all workers, the best first. ``work``: what the best would do, None where that is
    not known. ``tokens``: of the prompt, whose grams are ``hashes``."""

    order: list[int]
    work: Work | None
    tokens: int
    hashes: Words


class Index:
    """Of ``num`` workers, at most 64. ``secret`` seeds the grams."""

    def __init__(self, num: int, *, secret: int = 0) -> None:
        if not 1 <= num <= MOST_WORKERS:
            raise ConfigError("--worker", num, f"given 1 to {MOST_WORKERS} times")
        self.workers = [Worker() for _ in range(num)]
        self._joint, self._recent, self._secret = JointMap(), Recent(), secret
        self._tickets = 0

    @property
    def nbytes(self) -> int:
        mirrors = (one.mirror.nbytes for one in self.workers if one.mirror)
        return self._joint.nbytes + sum(mirrors)

    # ---- in step with the workers ----------------------------------------------------------

    def begin(self, worker: int, snapshot: wire.Snapshot) -> Mirror:
        """Forget what was known of a worker; the mirror into which its snapshot's segments go."""
        self.forget(worker)
        self._trust(worker)
        self.workers[worker].run = snapshot.run
        mirror = Mirror(snapshot, self._joint, worker, seed=self._secret)
        self.workers[worker].mirror = mirror
        return mirror

    def forget(self, worker: int) -> None:
        """What it holds is not known any more: it died, or changes of it were missed."""
        one = self.workers[worker]
        one.mirror = one.beat = None
        self._joint.drop(worker)
        self._recent.drop(worker)

    def reads(self, worker: int, now: float) -> None:
        """Its snapshot is being taken in, and what it says meanwhile waits."""
        self.workers[worker].heard = now

    def hear(self, worker: int, message: wire.Changes | wire.Beat, now: float) -> bool:
        """Take changes or a beat in; False where they do not follow on what is here, and all of
        the worker is forgotten: a snapshot is needed."""
        one = self.workers[worker]
        mirror = one.mirror
        if mirror is None:
            return False
        if message.run != mirror.run:
            self.forget(worker)
            return False
        if isinstance(message, wire.Beat):
            fits = message.number == mirror.number
            one.beat, mirror.weights = message, message.weights
            if message.default not in ("", mirror.config.default):  # reuse was switched off, or on
                mirror.config = replace(mirror.config, default=message.default)
        else:
            fits = message.number == mirror.number + 1
            mirror.number = message.number
            try:
                if fits:
                    mirror.apply(message.events)
            except TreeError:
                fits = False
        if not fits:
            self.forget(worker)
        one.heard = now
        return fits

    # ---- what becomes of requests ------------------------------------------------------------

    def route(self, worker: int, choice: Choice, now: float, *, streams: bool = True) -> int:
        """A request goes there; a ticket for ``answers`` and ``ended``. Of an answer that does not
        ``stream`` it is not seen when its prompt is through: soon the worker's own beats say what
        waits."""
        self._tickets += 1
        self._recent.add(self._tickets, choice.hashes, worker, now)
        one = self.workers[worker]
        rows = choice.work.rows if choice.work else choice.tokens
        one.routed[self._tickets] = rows, math.inf if streams else now
        one.open.add(self._tickets)
        one.sent += choice.tokens
        if one.sent > MOST_SENT:  # halved alike, they still say who got less
            for each in self.workers:
                each.sent //= 2
        return self._tickets

    def answers(self, worker: int, ticket: int) -> None:
        """Its first token is there, or its end: it waits no longer. Safe to call again."""
        self.workers[worker].routed.pop(ticket, None)
        self._recent.done(ticket)

    def ended(self, worker: int, ticket: int) -> None:
        """Its answer is through, or never will be. Safe to call again."""
        self.answers(worker, ticket)
        self.workers[worker].open.discard(ticket)

    def served(self, meant: int, by: int, now: float) -> None:
        """Who served: where another one stood in, the one that was meant is left alone a while, the
        longer the more often that happens."""
        self._trust(by)
        one = self.workers[meant]
        if meant != by and now >= one.suspect:  # many at once are one failure
            one.suspect = now + SUSPECT_S * 2.0 ** min(one.failures, 4)
            one.failures += 1

    def _trust(self, worker: int) -> None:
        self.workers[worker].failures, self.workers[worker].suspect = 0, 0.0

    def standings(self, now: float) -> list[Standing]:
        """How the workers stand in the eyes of ``cost.order``. What one says of its queue is some
        tenths of a second old, what was sent there since is known here: the greater counts. One
        that says nothing decodes what was sent there and has not ended, and holds as much as the
        others, and what it was sent more than the mean."""
        known = [one.mirror.num_tokens for one in self.workers if one.mirror]
        mean_sent = sum(one.sent for one in self.workers) // len(self.workers)
        usual = sum(known) // len(known) - mean_sent if known else 0
        return [self._standing(one, now, held=usual + one.sent) for one in self.workers]

    def _standing(self, one: Worker, now: float, *, held: int) -> Standing:
        """``held``: where that is not known."""
        quiet = now - one.heard if one.heard is not None else 0.0
        beat = one.beat if quiet < SILENT_S else None
        since = now - 2 * wire.BEAT_S if beat else -math.inf
        sent = sum(rows for rows, at in one.routed.values() if at >= since)
        return Standing(
            rows=max(beat.rows if beat else 0, sent),
            running=beat.running if beat else len(one.open),
            rows_per_s=beat.rows_per_s if beat else 0.0,
            held=one.mirror.num_tokens if one.mirror else held,
            avoid=SILENT_S <= quiet < AVOID_S or now < one.suspect,
        )

    # ---- lookup --------------------------------------------------------------------------------

    def choose(
        self, prompt: Tokens, namespace: Namespace, options: RequestOptions, now: float
    ) -> Choice:
        """Whom to send a prompt to. O(n log n) for n tokens, and 64 n for the joint map."""
        n = len(prompt)
        marks = winnow(prompt, seed=Mirror.joint_seed(namespace, self._secret))
        held = self._joint.find(marks.hashes)
        # Each gram stands for the text up to the next one, which is never farther than a span.
        gaps = np.diff(marks.positions, append=marks.positions[-1:] + GRAM)
        widths = np.minimum(gaps, SPAN).astype(np.float32)
        there = held | self._recent.find(marks.hashes, now)
        standings = self.standings(now)
        shares = np.array([self._saves(i, options) for i in range(len(self.workers))], np.float32)
        known = hoped = _saved(held, widths, shares)
        if (there != held).any():
            hoped = _saved(there, widths, shares)
        guesses: list[Work | None] = []
        for reused in hoped.astype(int).tolist():
            guesses.append(Work(max(n - reused, 1), reused, 0))
        first = order(guesses, standings, prompt_len=n)
        works: list[Work | None] = [None] * len(guesses)
        really: list[Work | None] = [None] * len(guesses)
        for i in first[:EXACTLY]:
            works[i] = guesses[i]
            if _pieces(held, i) > MOST_PIECES:
                really[i] = guesses[i]
                continue
            real = self.work(i, prompt, namespace, options)
            if real is not None:
                # What is hoped for is on its way there, and is found when the request runs.
                saved = int(hoped[i] - known[i])
                works[i] = real._replace(rows=max(real.rows - saved, 1))
                really[i] = real
        best = order(works, standings, prompt_len=n)
        ranked = [*best, *(i for i in first if i not in best)]
        return Choice(ranked, really[best[0]], n, marks.hashes)

    def by_load(self, now: float) -> Choice:
        """Whom to send a prompt to that is not known."""
        standings = self.standings(now)
        works = [Work(UNKNOWN, 0, 0)] * len(standings)
        ranked = order(works, standings, prompt_len=UNKNOWN)
        return Choice(ranked, None, UNKNOWN, np.empty(0, np.uint64))

    def _saves(self, worker: int, options: RequestOptions) -> float:
        """The share of what it may copy that a worker does not compute again."""
        mirror = self.workers[worker].mirror
        config = mirror.config if mirror else _DEFAULTS
        return 0.0 if mode_of(config, options) == "exact" else 1 - budget_of(config, options)

    def work(
        self, worker: int, prompt: Tokens, namespace: Namespace, options: RequestOptions
    ) -> Work | None:
        """What a worker would do with a prompt; None where what it holds is not known."""
        mirror = self.workers[worker].mirror
        if mirror is None:
            return None
        prefix_len = mirror.prefix_len(namespace, prompt)
        copies = mode_of(mirror.config, options) != "exact"
        runs = mirror.match(namespace, prompt, start=prefix_len) if copies else ()
        return work_of(runs, mirror.config, options, prompt_len=len(prompt), prefix_len=prefix_len)
