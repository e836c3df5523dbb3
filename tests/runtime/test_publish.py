"""The worker's stream: nothing grows without bound, and what was lost is told anew."""

import contextlib
import os
import stat
import time

import numpy as np
import pytest
import zmq

from kvshare_sglang import wire
from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.errors import ConfigError, TreeError
from kvshare_sglang.radix_fuzzy.tree import FuzzyTree
from kvshare_sglang.runtime import preflight, stream
from kvshare_sglang.runtime.cache.index_sync import IndexSync
from kvshare_sglang.runtime.stream import Feed, Load, Pace, Publisher, Table

SPACE = ((None, None), 0)
TOKEN = "a token of the tests, long enough"


def text(seed, length=40):
    return np.random.default_rng(seed).integers(0, 1000, length).astype(np.int32)


def held_by(tree):
    return {seg.id: seg.tokens.tobytes() for seg in tree.segments() if len(seg.tokens)}


class Reader:
    """What the publisher's thread does with a feed, step by step."""

    def __init__(self, tree, **more):
        self.table, self.feed = Table(), Feed(tree, **more)

    def read(self):
        """What is held by what was told."""
        if self.feed.lost:
            self.table.apply(self.feed.whole())
        while not self.feed.changes.empty():
            self.table.apply(self.feed.changes.get())
        return {one.id: one.tokens for one in self.table.segments.values()}


def test_a_feed_that_nobody_reads_stays_bounded_and_then_the_whole_tree_is_read():
    tree = FuzzyTree()
    reader = Reader(tree, most=5)
    reader.read()
    for i in range(50):
        tree.insert(SPACE, text(i))
    assert reader.feed.changes.qsize() == 5
    assert reader.read() == held_by(tree)  # nothing more has to change for that
    tree.trim(3, 10)
    assert reader.feed.changes.qsize() == 1
    assert reader.read() == held_by(tree)


def test_a_feed_of_a_tree_that_has_text_begins_with_it():
    tree = FuzzyTree()
    seg = tree.insert(SPACE, text(1))
    tree.insert(SPACE, text(2), start=20, parent=seg.id)
    reader = Reader(tree)
    assert reader.read() == held_by(tree)
    tree.clear()
    assert reader.read() == {}


@pytest.mark.parametrize("when", range(8))
@pytest.mark.parametrize("seed", range(12))
def test_a_tree_that_changes_while_it_is_read_comes_out_as_it_is(seed, when, monkeypatch):
    """The scheduler goes on at any point of the reading: here between any two segments of it."""
    tree, rng = FuzzyTree(), np.random.default_rng(seed)

    def change():
        alive = tree.segments()
        leaves = [one for one in alive if not one.children]
        what = rng.integers(0, 10)
        if what == 0:
            tree.clear()
        elif what < 5 and leaves:
            leaf = leaves[rng.integers(0, len(leaves))]
            tree.trim(leaf.id, int(rng.integers(leaf.start, leaf.stop + 1)))
        elif what < 8 and alive:
            above = alive[rng.integers(0, len(alive))]
            start = int(rng.integers(above.start + 1, above.stop + 1))
            tree.insert(SPACE, text(rng.integers(1 << 30)), start=start, parent=above.id)
        else:
            tree.insert(SPACE, text(rng.integers(1 << 30)))

    for _ in range(12):
        change()
    reader = Reader(tree)
    real, read = stream._as_change, [0]

    def as_change(segment):
        read[0] += 1
        if reader.feed.lost is False and read[0] == when + 1:
            monkeypatch.setattr(stream, "_as_change", real)
            for _ in range(3):
                change()
        return real(segment)

    monkeypatch.setattr(stream, "_as_change", as_change)
    for _ in range(20):
        with contextlib.suppress(TreeError):
            reader.read()
            break
        reader.feed.lost = True  # as the thread: read anew
    assert reader.read() == held_by(tree)
    above = {seg.id: seg.parent.id for seg in tree.segments() if seg.parent}
    assert {one.id: one.parent for one in reader.table.segments.values() if one.parent} == above


def test_an_id_that_is_used_again_while_the_tree_is_read_is_found_out():
    """The worst of it by hand: the old segment's end is told after the new one was read."""
    tree = FuzzyTree()
    first = tree.insert(SPACE, text(1))
    reader = Reader(tree)
    reader.read()
    changes = reader.feed.changes
    whole = reader.feed.whole()
    old = stream._as_change(first)
    new = whole.segments[0]._replace(tokens=text(2, 60))
    reader.table.apply(whole._replace(segments=[new]))
    changes.put(stream._Trimmed(old.id, 30))
    changes.put(new)
    with pytest.raises(TreeError, match="another one"):
        reader.read()


def test_the_pace_is_that_of_rows_while_requests_wait():
    pace = Pace()
    for now, waiting, done in ((0, 0, 0), (1, 3, 100), (2, 3, 200), (4, 3, 700), (5, 0, 9999)):
        pace.note(now, Load(waiting=waiting, rows_done=done))
    assert pace.rows_per_s == pytest.approx((700 - 100) / 3)
    pace.note(13.9, Load(rows_done=9999))
    assert pace.rows_per_s > 0
    pace.note(14.1, Load(rows_done=9999))  # what it did under another load is long ago
    assert pace.rows_per_s == 0


# ---- over sockets --------------------------------------------------------------------------------


@contextlib.contextmanager
def publishing(folder, **settings):
    endpoint = f"ipc://{folder}/s"
    tree = FuzzyTree()
    config = KVShareConfig(stream=endpoint, **settings)
    publisher = Publisher(Feed(tree), Load, config, secret=5, page=1)
    publisher.start()
    try:
        yield tree, publisher, endpoint
    finally:
        publisher.stop()
        assert not publisher.is_alive()


@contextlib.contextmanager
def router(endpoint, *, most=1000, token=""):
    with zmq.Context() as context, context.socket(zmq.DEALER) as sock:
        sock.setsockopt(zmq.LINGER, 0)
        sock.setsockopt(zmq.RCVHWM, most)
        wire.guard(sock, token, server=False)
        sock.connect(endpoint)
        yield sock


def hear(sock, kind, *, wait_s=15):
    """The next message of a kind."""
    end = time.monotonic() + wait_s
    while time.monotonic() < end:
        if sock.poll(100):
            message = wire.decode(sock.recv())
            if isinstance(message, kind):
                return message
    raise AssertionError(f"no {kind.__name__} within {wait_s} s")


def test_a_snapshot_is_followed_by_changes_without_gap_and_beats(tmp_path):
    with publishing(tmp_path) as (tree, _, endpoint), router(endpoint) as sock:
        seg = tree.insert(SPACE, text(1))
        snapshot = ask(sock)
        assert [one.tokens for one in snapshot.segments] == [seg.tokens.tobytes()]
        assert (snapshot.secret, snapshot.page) == (5, 1)
        assert KVShareConfig(**snapshot.config) == KVShareConfig()  # no endpoint, no token
        for number in range(1, 4):
            tree.insert(SPACE, text(10 + number))
            changes = hear(sock, wire.Changes)
            assert (changes.run, changes.number) == (snapshot.run, snapshot.number + number)
        beat = hear(sock, wire.Beat)
        assert (beat.run, beat.number) == (snapshot.run, snapshot.number + 3)


@pytest.mark.parametrize("key", ["\ud800", "k" * 10**6])
def test_no_name_of_a_tenant_keeps_the_others_text_from_routers(tmp_path, key):
    """Clients name tenants, by half a character too, which no encoding takes."""
    with publishing(tmp_path) as (tree, _, endpoint), router(endpoint) as sock:
        spaces = IndexSync(tree)
        tree.insert(spaces.space_of((key, key)), text(1))
        mine = tree.insert(spaces.space_of(("mine", None)), text(2))
        snapshot = ask(sock)
        odd, plain = (one.space for one in snapshot.segments)
        assert odd == (wire.name_of(key), wire.name_of(key), 0)
        assert plain == (wire.name_of("mine"), None, 0)
        assert snapshot.segments[1].tokens == mine.tokens.tobytes()
        assert max(len(name) for name in odd[:2]) < 100


def test_a_router_that_does_not_read_is_forgotten_and_the_others_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "MOST_UNSENT", 4)
    with publishing(tmp_path) as (tree, publisher, endpoint), router(endpoint, most=1) as slow:
        ask(slow)
        with router(endpoint) as fast:
            ask(fast)
            assert len(publisher._routers) == 2
            last = 0
            for i in range(4000):
                if len(publisher._routers) == 1:
                    break
                tree.insert(SPACE, text(i, 4000))
                last = hear(fast, wire.Changes).number
                fast.send(wire.ALIVE)
            assert len(publisher._routers) == 1
            tree.insert(SPACE, text(1))
            assert hear(fast, wire.Changes).number == last + 1


def test_after_a_fault_of_the_thread_the_stream_starts_anew_though_nothing_changes(
    tmp_path, caplog
):
    def broken():
        raise RuntimeError("planned")

    with publishing(tmp_path) as (tree, publisher, endpoint), router(endpoint) as sock:
        tree.insert(SPACE, text(1))
        first = ask(sock)
        publisher._load = broken
        while "planned" not in caplog.text:
            time.sleep(0.02)
        publisher._load = Load
        again = ask(sock)
        assert again.number > first.number
        assert {one.id: one.tokens for one in again.segments} == held_by(tree)


def ask(sock):
    """A snapshot; asked for as often as it takes."""
    for _ in range(60):
        sock.send(wire.SNAPSHOT)
        with contextlib.suppress(AssertionError):
            return hear(sock, wire.Snapshot, wait_s=0.3)
    raise AssertionError("no snapshot")


def test_who_asks_all_the_time_gets_one_snapshot_a_second(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "SNAPSHOT_S", 1000)
    with publishing(tmp_path) as (_, _, endpoint), router(endpoint) as sock:
        ask(sock)
        for _ in range(200):
            sock.send(wire.SNAPSHOT)
        for _ in range(3):
            kinds = []
            while not kinds or kinds[-1] is not wire.Beat:
                kinds.append(type(wire.decode(sock.recv())))
            assert wire.Snapshot not in kinds


def test_a_router_that_says_more_than_its_words_is_cut_off(tmp_path):
    with publishing(tmp_path) as (_, publisher, endpoint), router(endpoint) as sock:
        ask(sock)
        heard = []
        real = publisher._answer
        publisher._answer = lambda who, what: (heard.append(len(what)), real(who, what))
        sock.send(b"x" * (stream.LONGEST_WORD + 1))
        with router(endpoint) as other:
            ask(other)
        assert set(heard) == {len(wire.SNAPSHOT)}


def test_bytes_that_routers_leave_unread_are_bounded(tmp_path, monkeypatch):
    """Whatever is told in what sizes; and who has not taken its snapshot gets no second one."""
    monkeypatch.setattr(stream, "MOST_UNSENT_BYTES", 1 << 20)
    monkeypatch.setattr(stream, "MOST_BYTES", 4 << 20)
    monkeypatch.setattr(stream, "SNAPSHOT_S", 0)
    with publishing(tmp_path) as (tree, publisher, endpoint):
        for i in range(30):
            tree.insert(SPACE, text(i, 20_000))  # 2.4 MB in all
        with contextlib.ExitStack() as stack:
            for _ in range(6):
                sock = stack.enter_context(router(endpoint, most=1))
                sock.setsockopt(zmq.RCVBUF, 4096)
                for _ in range(3):
                    sock.send(wire.SNAPSHOT)
            seen = 0
            for i in range(5000):
                tree.insert(SPACE, text(100 + i, 20_000))
                time.sleep(0.02)
                seen = max(seen, held_of(publisher))
                if i >= 60 and seen > 1 << 20:  # 4.8 MB more, and a snapshot was told
                    break
            most = 4 << 20
            assert 1 << 20 < seen < most + 6 * ((1 << 20) + (1 << 18))
        with router(endpoint) as sock:  # they are gone: what waited for them, too
            ask(sock)
        until(lambda: not held_of(publisher))


def held_of(publisher):
    """Bytes, read beside the thread."""
    while True:
        with contextlib.suppress(RuntimeError):
            ones = [*publisher._routers.values(), *publisher._owed.values()]
            return sum(size for one in ones for tracker, size in one.sent if not tracker.done)


def until(condition):
    for _ in range(1500):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen within 15 s")


def test_an_address_that_is_taken_ends_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    with zmq.Context() as context, context.socket(zmq.ROUTER) as sock:
        port = sock.bind_to_random_port("tcp://127.0.0.1")
        sock.bind(f"ipc://{tmp_path}/live")
        for taken in (
            f"ipc://{tmp_path}/file",
            f"ipc://{tmp_path}/live",
            f"ipc://{tmp_path}/no/folder",
            f"tcp://127.0.0.1:{port}",
        ):
            config = KVShareConfig(stream=taken)
            with pytest.raises(ConfigError, match="--kvshare-stream"):
                Publisher(Feed(FuzzyTree()), Load, config, secret=0, page=1)
            with pytest.raises(ConfigError, match="--kvshare-stream"):
                preflight.check({"model_path": "dummy"}, config)
        for there in (f"tcp://127.0.0.1:{port}", f"ipc://{tmp_path}/live"):  # nobody took it over
            with context.socket(zmq.DEALER) as peer:
                peer.connect(there)
                peer.send(there.encode())
                assert sock.poll(15_000)
                assert sock.recv_multipart()[1] == there.encode()
    free = KVShareConfig(stream=f"ipc://{tmp_path}/live")  # a socket that a dead server left
    preflight.check({"model_path": "dummy"}, free)


def test_a_start_that_others_could_listen_to_is_refused(monkeypatch):
    monkeypatch.delenv(wire.TOKEN_ENV, raising=False)
    config = KVShareConfig(stream="tcp://0.0.0.0:5555")
    with pytest.raises(ConfigError, match="without --kvshare-stream-token-file"):
        preflight.check({"model_path": "dummy"}, config)


def test_a_unix_socket_is_its_owners_alone(tmp_path):
    with publishing(tmp_path):
        assert stat.S_IMODE(os.stat(tmp_path / "s").st_mode) & 0o077 == 0


def test_a_stream_with_a_token_tells_only_who_has_it_and_tells_no_token(tmp_path):
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    given = {"stream_token_file": str(tmp_path / "token")}
    with (
        publishing(tmp_path, **given) as (_, _, endpoint),
        router(endpoint) as stranger,
        router(endpoint, token=TOKEN) as friend,
    ):
        snapshot = ask(friend)
        with contextlib.suppress(zmq.Again):
            stranger.send(wire.SNAPSHOT, zmq.NOBLOCK)
        assert not stranger.poll(500)
    assert TOKEN not in repr(snapshot)
    assert str(tmp_path) not in repr(snapshot)
