"""Tell routers what this worker's fuzzy tree holds and how loaded it is, from a thread of its own.

::

    scheduler thread   fuzzy tree --> Feed --queue--> Publisher thread --> ROUTER socket --> routers
                       (a put of immutable arrays)    (table of segments)

The scheduler never waits. A router that does not take what it is told is forgotten, and asks anew;
where the thread itself is behind, changes are dropped and it reads the whole tree with its next
beat, beside the running scheduler.
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
from kvshare_sglang.errors import ConfigError, TreeError
from kvshare_sglang.radix_fuzzy.segments import Segment
from kvshare_sglang.radix_fuzzy.tree import FuzzyTree
from kvshare_sglang.runtime import versions
from kvshare_sglang.runtime.cache.radix import FuzzyRadixCache

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Scheduler

logger = logging.getLogger(__name__)

MOST_QUEUED = 1 << 16  # changes that wait for the thread
MOST_UNSENT = 512  # messages that wait for one router
MOST_UNSENT_BYTES = 64 << 20  # of them, beside a snapshot
MOST_BYTES = 256 << 20  # that wait for all routers; a snapshot is told only below, or alone
LONGEST_WORD = 1024  # bytes of a message of a router's; a handshake has some 300
SNAPSHOT_S = 1.0  # between two snapshots for one router
MOST_ROUTERS = 16
MOST_EVENTS = 1024  # in one message
POLL_S = 0.02
SMOOTH = 0.2  # weight of the newest interval in the pace
AGED_S = 10.0  # what a worker did under other load says nothing of what it will do


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
    comes when it is full is ``lost``, as all is that was before: then the thread takes ``whole``.
    """

    def __init__(self, tree: FuzzyTree, *, most: int = MOST_QUEUED) -> None:
        self.changes: queue.SimpleQueue[Change] = queue.SimpleQueue()
        self._tree, self._most, self.lost = tree, most, True
        tree.watcher = self

    def inserted(self, segment: Segment) -> None:
        self._put(_as_change(segment))

    def trimmed(self, segment_id: int, stop: int) -> None:
        self._put(_Trimmed(segment_id, stop))

    def cleared(self) -> None:
        self._put(_Whole([]))

    def whole(self) -> _Whole:
        """The tree as it is; for the thread. What changes meanwhile comes as a change too, and may
        be in it already. The tree changes before it tells, its list of segments is copied in one
        step, and one that goes is empty before what it hung on changes: so parents are read first.
        """
        while not self.changes.empty():
            self.changes.get()
        self.lost = False
        told = map(_as_change, self._tree.segments())
        return _Whole([one for one in told if len(one.tokens)])

    def _put(self, change: Change) -> None:
        """Called when the tree has changed already."""
        if self.lost:
            return
        if self.changes.qsize() >= self._most:
            self.lost = True
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
        """What to tell of a change; nothing where it is in already (see ``Feed.whole``). Raises
        TreeError where it cannot be: ids are used again, and all must be read anew."""
        match change:
            case _Inserted():
                if change.id in self.segments:
                    if self.segments[change.id] != _as_told(change):
                        raise TreeError(f"segment {change.id} is here, and is another one")
                    return []
                return [self._add(change)]
            case _Trimmed(seg_id, stop):
                old = self.segments.get(seg_id)
                if old is None or stop >= old.start + len(old.tokens) // 4:
                    return []
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
        told = self.segments[one.id] = _as_told(one)
        return told


def _as_told(one: _Inserted) -> wire.Insert:
    names, weights = one.space
    return wire.Insert(*one._replace(space=(*names, weights), tokens=one.tokens.tobytes()))


class Load(NamedTuple):
    """What a beat says beside its numbers; see ``wire.Beat``."""

    weights: int = 0
    running: int = 0
    waiting: int = 0
    rows: int = 0
    rows_done: int = 0  # since the start
    default: str = ""


class Pace:
    """Rows per second at which a queue is worked off: counted while requests wait, smoothed; 0,
    not known, once none has waited for ``AGED_S``."""

    def __init__(self) -> None:
        self.rows_per_s = 0.0
        self._since: tuple[float, int] | None = None
        self._waited = 0.0  # when requests did last

    def note(self, now: float, load: Load) -> None:
        if not load.waiting:
            self._since = None
            if now - self._waited >= AGED_S:
                self.rows_per_s = 0.0
            return
        self._waited = now
        if self._since is None:
            self._since = now, load.rows_done
        elif now - self._since[0] >= 2:
            pace = (load.rows_done - self._since[1]) / (now - self._since[0])
            old = self.rows_per_s or pace
            self.rows_per_s = (1 - SMOOTH) * old + SMOOTH * pace
            self._since = now, load.rows_done


@dataclasses.dataclass(slots=True)
class _Router:
    """``end``: when it lapses. ``told``: when it got its last snapshot, and of how many bytes.
    ``sent``: what ZeroMQ may not have written yet, by size."""

    end: float = 0.0
    told: float = 0.0
    whole: int = 0
    sent: list[tuple[Any, int]] = dataclasses.field(default_factory=list)

    def unsent(self) -> int:
        """Bytes that wait for it."""
        self.sent = [(tracker, size) for tracker, size in self.sent if not tracker.done]
        return sum(size for _, size in self.sent)


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
        self._table: Table | None = None  # None: the whole tree must be read
        self._number, self._pace, self._next_beat = 0, Pace(), 0.0
        self._routers: dict[bytes, _Router] = {}
        self._owed: dict[bytes, _Router] = {}  # forgotten, while ZeroMQ holds what it did not take
        self._stopped = threading.Event()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, MOST_UNSENT)
        self._socket.copy_threshold = (
            0  # else ZeroMQ would copy what is short, and count it nowhere
        )
        self._socket.setsockopt(zmq.MAXMSGSIZE, LONGEST_WORD)  # who says more is cut off
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
                for who in list(self._routers):
                    self._forget(who)
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
            for who in [who for who, one in self._routers.items() if one.end <= now]:
                self._forget(who)
            self._owed = {who: one for who, one in self._owed.items() if one.unsent()}
            if self._table is None or self._feed.lost:
                whole = self._feed.whole()
                self._table = self._table or Table()
                self._tell(self._table.apply(whole))
            load = self._load()
            self._pace.note(now, load)
            of = load.weights, load.running, load.waiting, load.rows, self._pace.rows_per_s
            self._send(wire.encode(wire.Beat(self._run, self._number, *of, load.default)))

    def _answer(self, who: bytes, what: bytes) -> None:
        now = time.monotonic()
        if what == wire.SNAPSHOT and self._may_have_all(who, now):
            segments = list(self._table.segments.values()) if self._table else []
            whole = msgspec.structs.replace(self._head, number=self._number, segments=segments)
            data = wire.encode(whole)
            if self._held() + len(data) <= max(MOST_BYTES, len(data)):
                self._routers[who] = _Router(told=now, whole=len(data))
                self._send(data, who)
        if one := self._routers.get(who):
            one.end = now + wire.LAPSE_S

    def _may_have_all(self, who: bytes, now: float) -> bool:
        """Not who has not taken the last one, nor who has had it a moment ago: it asks again."""
        if self._table is None or who in self._owed:
            return False
        if one := self._routers.get(who):
            return now - one.told >= SNAPSHOT_S and not one.unsent()
        return len(self._routers) < MOST_ROUTERS

    def _held(self) -> int:
        return sum(one.unsent() for one in (*self._routers.values(), *self._owed.values()))

    def _forget(self, who: bytes) -> None:
        one = self._routers.pop(who)
        if one.unsent():
            self._owed[who] = one

    def _send_changes(self) -> None:
        """Before the tree was read there are none; what is told then is in it."""
        events: list[wire.Insert | wire.Trim | wire.Clear] = []
        if self._table is not None:
            for _ in range(self._feed.changes.qsize()):
                events += self._table.apply(self._feed.changes.get())
        self._tell(events)

    def _tell(self, events: list[wire.Insert | wire.Trim | wire.Clear]) -> None:
        for at in range(0, len(events), MOST_EVENTS):
            self._number += 1
            changes = wire.Changes(self._run, self._number, events[at : at + MOST_EVENTS])
            self._send(wire.encode(changes))

    def _send(self, data: bytes, who: bytes | None = None) -> None:
        """To one router, or to all; one that does not take it is forgotten, and will ask again."""
        for name in [who] if who is not None else list(self._routers):
            one = self._routers[name]
            if one.unsent() > one.whole + MOST_UNSENT_BYTES:
                self._forget(name)
                continue
            try:
                # Not copied: all routers share it, and the tracker says when it has gone out.
                parts = [name, data]
                tracker = self._socket.send_multipart(parts, zmq.NOBLOCK, copy=False, track=True)
                if tracker and not tracker.done:
                    one.sent.append((tracker, len(data)))
            except zmq.ZMQError:  # it is gone, or MOST_UNSENT wait for it
                self._forget(name)


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
    The tokens that wait, and those of the batch in prefill, are taken to run the share that those
    before them ran."""
    waiting = list(scheduler.waiting_queue)
    running = set() if scheduler.running_batch is None else set(scheduler.running_batch.reqs)
    batch, chunked = scheduler.cur_batch_for_debug, getattr(scheduler, "chunked_req", None)
    ahead = sum(len(req.origin_input_ids) for req in waiting)
    if batch is not None and batch.forward_mode.is_extend():
        running.update(list(batch.reqs))
        ahead += batch.extend_num_tokens or 0
    if chunked is not None:
        running.add(chunked)
        ahead += versions.not_yet_given(chunked)
    tokens = Counter(cache.report.tokens)
    done = tokens["recomputed"] + tokens["fresh"]
    seen = done + tokens["exact"] + tokens["blended"] + tokens["copied"]
    share = done / seen if seen else 1.0
    rows, default = int(share * ahead), cache.shadow.default
    return Load(cache.sync.weights, len(running), len(waiting), rows, done, default)
