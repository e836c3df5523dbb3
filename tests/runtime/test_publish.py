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
from kvshare_sglang.errors import ConfigError
from kvshare_sglang.radix_fuzzy.tree import FuzzyTree
from kvshare_sglang.runtime import preflight, stream
from kvshare_sglang.runtime.stream import Feed, Load, Pace, Publisher, Table

SPACE = ((None, None), 0)
TOKEN = "a token of the tests, long enough"


def text(seed, length=40):
    return np.random.default_rng(seed).integers(0, 1000, length).astype(np.int32)


def told_by(feed):
    table = Table()
    while not feed.changes.empty():
        table.apply(feed.changes.get())
    return {one.id: one.tokens for one in table.segments.values()}


def held_by(tree):
    return {seg.id: seg.tokens.tobytes() for seg in tree.segments()}


def test_a_feed_that_nobody_reads_stays_bounded_and_then_tells_the_whole_tree():
    tree = FuzzyTree()
    feed = Feed(tree, most=5)
    for i in range(50):
        tree.insert(SPACE, text(i))
    assert feed.changes.qsize() == 5
    while not feed.changes.empty():
        feed.changes.get()
    tree.trim(3, 10)
    assert feed.changes.qsize() == 1
    assert told_by(feed) == held_by(tree)


def test_a_feed_of_a_tree_that_has_text_begins_with_it():
    tree = FuzzyTree()
    seg = tree.insert(SPACE, text(1))
    tree.insert(SPACE, text(2), start=20, parent=seg.id)
    feed = Feed(tree)
    assert told_by(feed) == held_by(tree)
    tree.clear()
    assert told_by(feed) == {}


def test_the_pace_is_that_of_rows_while_requests_wait():
    pace = Pace()
    for now, waiting, done in ((0, 0, 0), (1, 3, 100), (2, 3, 200), (4, 3, 700), (5, 0, 9999)):
        pace.note(now, Load(waiting=waiting, rows_done=done))
    assert pace.rows_per_s == pytest.approx((700 - 100) / 3)


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
        sock.send(wire.SNAPSHOT)
        snapshot = hear(sock, wire.Snapshot)
        assert [one.tokens for one in snapshot.segments] == [seg.tokens.tobytes()]
        assert (snapshot.secret, snapshot.page) == (5, 1)
        assert KVShareConfig(**snapshot.config) == KVShareConfig()  # no endpoint, no token
        for number in range(1, 4):
            tree.insert(SPACE, text(10 + number))
            changes = hear(sock, wire.Changes)
            assert (changes.run, changes.number) == (snapshot.run, snapshot.number + number)
        beat = hear(sock, wire.Beat)
        assert (beat.run, beat.number) == (snapshot.run, snapshot.number + 3)


def test_a_router_that_does_not_read_is_forgotten_and_the_others_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "MOST_UNSENT", 4)
    with publishing(tmp_path) as (tree, publisher, endpoint), router(endpoint, most=1) as slow:
        slow.send(wire.SNAPSHOT)
        hear(slow, wire.Snapshot)
        with router(endpoint) as fast:
            fast.send(wire.SNAPSHOT)
            hear(fast, wire.Snapshot)
            assert len(publisher._routers) == 2
            last = 0
            for i in range(4000):
                if len(publisher._routers) == 1:
                    break
                tree.insert(SPACE, text(i, 4000))
                last = hear(fast, wire.Changes).number
            assert len(publisher._routers) == 1
            tree.insert(SPACE, text(1))
            assert hear(fast, wire.Changes).number == last + 1


def test_a_fault_of_the_thread_is_logged_and_the_stream_starts_anew(tmp_path, caplog):
    def broken():
        raise RuntimeError("planned")

    with publishing(tmp_path) as (tree, publisher, endpoint), router(endpoint) as sock:
        tree.insert(SPACE, text(1))
        sock.send(wire.SNAPSHOT)
        first = hear(sock, wire.Snapshot)
        publisher._load = broken
        while "planned" not in caplog.text:
            time.sleep(0.02)
        publisher._load = Load
        for seed in range(2, 100):
            tree.insert(SPACE, text(seed))
            sock.send(wire.SNAPSHOT)
            with contextlib.suppress(AssertionError):
                again = hear(sock, wire.Snapshot, wait_s=0.5)
                break
        assert again.number > first.number
        told = {one.id: one.tokens for one in again.segments}
        assert told.items() <= held_by(tree).items()
        assert len(told) > 1


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
        assert sock.getsockopt(zmq.LAST_ENDPOINT)  # nobody took it over
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
        friend.send(wire.SNAPSHOT)
        snapshot = hear(friend, wire.Snapshot)
        with contextlib.suppress(zmq.Again):
            stranger.send(wire.SNAPSHOT, zmq.NOBLOCK)
        assert not stranger.poll(500)
    assert TOKEN not in repr(snapshot)
    assert str(tmp_path) not in repr(snapshot)
