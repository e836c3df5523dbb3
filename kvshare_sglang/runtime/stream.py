"""Tell routers what this worker's fuzzy tree holds and how loaded it is, from a thread of its own.

::

    scheduler thread   fuzzy tree --> Feed --queue--> Publisher thread --> ROUTER socket --> routers
                       (a put of immutable arrays)    (table of segments)

The scheduler never waits. What a slow router has not taken is dropped for it alone; where the
thread itself is behind, changes are dropped and the whole tree is told anew once it is through.
"""

import dataclasses
import logging
import queue
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import zmq

from kvshare_sglang import wire
from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.errors import ConfigError
from kvshare_sglang.radix_fuzzy.segments import Segment
from kvshare_sglang.radix_fuzzy.tree import FuzzyTree
from kvshare_sglang.runtime.cache.radix import FuzzyRadixCache

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Scheduler

logger = logging.getLogger(__name__)

MOST_QUEUED = 1 << 16  # changes that wait for the thread
MOST_UNSENT = 1024  # messages that wait for one router
MOST_ROUTERS = 16
MOST_EVENTS = 1024  # in one message
POLL_S = 0.02
SMOOTH = 0.2  # weight of the newest interval in the pace


class _Inserted(NamedTuple):
    """What a segment was when it was inserted; its array is never written again."""

    id: int
    space: Any
    start: int
    parent: int
    depth: int
    context: int
    near: int
    tokens: Any


class _Trimmed(NamedTuple):
    id: int
    stop: int


class _Whole(NamedTuple):
    """All that is there, in place of what was told before."""

    segments: list[_Inserted]


Change = _Inserted | _Trimmed | _Whole


class Feed:
    """The scheduler's side: a watcher of the tree. ``changes`` holds ``MOST_QUEUED`` at most; what
    comes when it is full is lost, and once it is empty again the tree is told as a whole."""

    def __init__(self, tree: FuzzyTree, *, most: int = MOST_QUEUED) -> None:
        self.changes: queue.SimpleQueue[Change] = queue.SimpleQueue()
        self._tree, self._most, self._lost = tree, most, False
        tree.watcher = self
        self._put(self._whole())

    def inserted(self, segment: Segment) -> None:
        self._put(_as_change(segment))

    def trimmed(self, segment_id: int, stop: int) -> None:
        self._put(_Trimmed(segment_id, stop))

    def cleared(self) -> None:
        self._put(_Whole([]))

    def start_anew(self) -> None:
        """Tell the whole tree with the next change; asked by the thread."""
        self._lost = True

    def _whole(self) -> _Whole:
        return _Whole([_as_change(segment) for segment in self._tree.segments()])

    def _put(self, change: Change) -> None:
        if self._lost:
            if not self.changes.empty():
                return
            self._lost = False
            change = self._whole()  # the change is in it
        elif self.changes.qsize() >= self._most:
            self._lost = True
            logger.warning("KVShare: the stream to the routers is behind; it will start anew")
            return
        self.changes.put(change)


def _as_change(seg: Segment) -> _Inserted:
    above = 0 if seg.parent is None else seg.parent.id
    return _Inserted(
        seg.id, seg.namespace, seg.start, above, seg.depth, seg.context, seg.near, seg.tokens
    )


class Table:
    """All segments as they go out, by id, parents before their children: the thread's own copy."""

    def __init__(self) -> None:
        self.segments: dict[int, wire.Insert] = {}

    def apply(self, change: Change) -> list[wire.Insert | wire.Trim | wire.Clear]:
        """What to tell of a change."""
        match change:
            case _Inserted():
                return [self._add(change)]
            case _Trimmed(seg_id, stop):
                old = self.segments[seg_id]
                if stop > old.start:
                    kept = old.tokens[: 4 * (stop - old.start)]
                    self.segments[seg_id] = msgspec.structs.replace(old, tokens=kept)
                else:
                    del self.segments[seg_id]
                return [wire.Trim(seg_id, stop)]
            case _Whole(segments):
                self.segments = {}
                return [wire.Clear(), *map(self._add, segments)]

    def _add(self, one: _Inserted) -> wire.Insert:
        (extra_key, salt), weights = one.space
        space = (_text(extra_key), _text(salt), weights)
        told = wire.Insert(*one._replace(space=space, tokens=one.tokens.tobytes()))
        self.segments[one.id] = told
        return told


def _text(name: Any) -> str | None:
    return None if name is None else str(name)


class Load(NamedTuple):
    """What a beat says beside its numbers; see ``wire.Beat``."""

    weights: int = 0
    running: int = 0
    waiting: int = 0
    rows: int = 0
    rows_done: int = 0  # since the start


class Pace:
    """Rows per second at which a queue is worked off: counted while requests wait, smoothed."""

    def __init__(self) -> None:
        self.rows_per_s = 0.0
        self._since: tuple[float, int] | None = None

    def note(self, now: float, load: Load) -> None:
        if not load.waiting:
            self._since = None
        elif self._since is None:
            self._since = now, load.rows_done
        elif now - self._since[0] >= 2:
            pace = (load.rows_done - self._since[1]) / (now - self._since[0])
            old = self.rows_per_s or pace
            self.rows_per_s = (1 - SMOOTH) * old + SMOOTH * pace
            self._since = now, load.rows_done


class Publisher(threading.Thread):
    """Owns the socket, from ``__init__`` on, which raises ConfigError where it cannot listen."""

    def __init__(
        self, feed: Feed, load: Callable[[], Load], config: KVShareConfig, *, secret: int, page: int
    ) -> None:
        super().__init__(name="kvshare-stream", daemon=True)
        self._feed, self._load = feed, load
        told = dataclasses.asdict(config)
        del told["stream"], told["stream_token_file"]
        self._run = secrets.randbits(63)
        self._head = wire.Snapshot(self._run, 0, secret, page, told, [])
        self._table: Table | None = None  # None: waits for the whole tree
        self._number, self._pace, self._next_beat = 0, Pace(), 0.0
        self._routers: dict[bytes, float] = {}  # and when each lapses
        self._stopped = threading.Event()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, MOST_UNSENT)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # else what cannot be sent is lost unseen
        try:
            wire.guard(self._socket, wire.token_of(config.stream_token_file), server=True)
            wire.bind(self._socket, config.stream)
        except ConfigError:
            self._context.destroy()
            raise

    def run(self) -> None:
        while not self._stopped.is_set():
            try:
                self._turn()
            except Exception:  # routers route by load meanwhile; requests must not notice
                logger.exception("KVShare: the stream to the routers failed; it will start anew")
                self._table = None
                self._routers.clear()
                self._feed.start_anew()
                self._stopped.wait(1)
        self._socket.close()
        self._context.term()

    def stop(self) -> None:
        self._stopped.set()
        self.join(5)

    def _turn(self) -> None:
        asked = self._socket.poll(int(1000 * POLL_S))
        self._send_changes()
        if asked:
            who, what = self._socket.recv_multipart()[:2]
            self._answer(who, what)
        now = time.monotonic()
        if now >= self._next_beat:
            self._next_beat = now + wire.BEAT_S
            self._routers = {who: end for who, end in self._routers.items() if end > now}
            load = self._load()
            self._pace.note(now, load)
            of = load.weights, load.running, load.waiting, load.rows, self._pace.rows_per_s
            self._send(wire.Beat(self._run, self._number, *of))

    def _answer(self, who: bytes, what: bytes) -> None:
        known = who in self._routers
        if what == wire.SNAPSHOT and self._table and (known or len(self._routers) < MOST_ROUTERS):
            segments = list(self._table.segments.values())
            self._routers[who] = 0.0
            whole = msgspec.structs.replace(self._head, number=self._number, segments=segments)
            self._send(whole, who)
            known = who in self._routers
        if known:
            self._routers[who] = time.monotonic() + wire.LAPSE_S

    def _send_changes(self) -> None:
        events: list[wire.Insert | wire.Trim | wire.Clear] = []
        for _ in range(self._feed.changes.qsize()):
            change = self._feed.changes.get()
            if self._table is None and not isinstance(change, _Whole):
                continue
            self._table = self._table or Table()
            events += self._table.apply(change)
        for at in range(0, len(events), MOST_EVENTS):
            self._number += 1
            self._send(wire.Changes(self._run, self._number, events[at : at + MOST_EVENTS]))

    def _send(self, message: wire.Message, who: bytes | None = None) -> None:
        """To one router, or to all; one that does not take it is forgotten, and will ask again."""
        data = wire.encode(message)
        for one in [who] if who is not None else list(self._routers):
            try:
                self._socket.send_multipart([one, data], zmq.NOBLOCK)
            except zmq.ZMQError:  # it is gone, or MOST_UNSENT wait for it
                del self._routers[one]


# ---- in a server ----------------------------------------------------------------------------


def hook_run_event_loop(original: Callable[..., Any], scheduler: "Scheduler") -> Any:
    """AROUND ``Scheduler.run_event_loop``: the scheduler is built, nothing is served yet."""
    cache = scheduler.tree_cache
    if isinstance(cache, FuzzyRadixCache) and cache.config.stream and not cache.fuzzy.watcher:
        feed = Feed(cache.fuzzy)
        Publisher(
            feed,
            lambda: load_of(scheduler, cache),
            cache.config,
            secret=cache.fuzzy.secret,
            page=cache.page_size,
        ).start()
        logger.info("KVShare: routers are told what is cached at %s", cache.config.stream)
    return original(scheduler)


def load_of(scheduler: Any, cache: FuzzyRadixCache) -> Load:
    """Read beside the running scheduler: each list is taken in one step, and may be a little old.
    The tokens that wait are taken to run the share that those before them ran."""
    waiting = list(scheduler.waiting_queue)
    running = scheduler.running_batch
    tokens = Counter(cache.report.tokens)
    done = tokens["recomputed"] + tokens["fresh"]
    seen = done + tokens["exact"] + tokens["blended"] + tokens["copied"]
    share = done / seen if seen else 1.0
    rows = int(share * sum(len(req.origin_input_ids) for req in waiting))
    num = 0 if running is None else len(running.reqs)
    return Load(cache.sync.weights, num, len(waiting), rows, done)
