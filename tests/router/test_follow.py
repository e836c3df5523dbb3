"""Following a worker over a real socket: what is lost is asked for again, and once."""

import asyncio
import time

import msgspec
import numpy as np
import pytest
import zmq
import zmq.asyncio

from kvshare_sglang import wire
from kvshare_sglang.router import stream
from kvshare_sglang.router.index import Index
from kvshare_sglang.router.mirror import Mirror


def insert(number, length=50):
    tokens = np.random.default_rng(number).integers(0, 900, length).astype(np.int32)
    return wire.Insert(number, (None, None, 0), 0, 0, 0, 0, 0, tokens.tobytes())


class Worker:
    """The other end of the stream, by hand."""

    def __init__(self, endpoint, run=1):
        self.heard = []
        self.run, self.asked, self.who, self.segments, self.number = run, 0, None, [insert(1)], 1
        self.sock = zmq.asyncio.Context.instance().socket(zmq.ROUTER)
        self.sock.bind(endpoint)
        self.task = asyncio.create_task(self._answer())

    async def _answer(self):
        while True:
            self.who, what = await self.sock.recv_multipart()
            self.heard.append(what)
            if what == wire.SNAPSHOT:
                self.asked += 1
                await self.say(wire.Snapshot(self.run, self.number, 0, 1, {}, self.segments))
                await self.beat()

    async def say(self, message):
        data = message if isinstance(message, bytes) else wire.encode(message)
        await self.sock.send_multipart([self.who, data])

    async def beat(self):
        await self.say(wire.Beat(self.run, self.number, 0, 0, 0, 0, 0.0))

    async def change(self, *events, skip=0):
        self.number += 1 + skip
        await self.say(wire.Changes(self.run, self.number, list(events)))

    async def stop(self):
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        self.sock.close(0)


def following(tmp_path, monkeypatch, story, silent_s=0.3):
    monkeypatch.setattr(stream, "ASK_AGAIN_S", 0.05)
    monkeypatch.setattr(stream, "SILENT_S", silent_s)
    endpoint = f"ipc://{tmp_path}/s"

    async def run():
        index, worker = Index(1), Worker(endpoint)
        task = asyncio.create_task(stream.follow(index, 0, endpoint, ""))

        async def held(tokens):
            for _ in range(1500):
                mirror = index.workers[0].mirror
                if (mirror.num_tokens if mirror else None) == tokens:
                    return
                await asyncio.sleep(0.01)
            raise AssertionError(f"not {tokens} tokens within 15 s")

        try:
            await held(50)
            await story(worker, held, endpoint)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(run())


def test_changes_are_followed_and_a_gap_brings_a_new_snapshot(tmp_path, monkeypatch):
    async def story(worker, held, endpoint):
        await worker.change(insert(2))
        await held(100)
        await worker.change(wire.Trim(1, 10))
        await held(60)
        worker.segments = [insert(i) for i in range(1, 6)]
        await worker.change(insert(9), skip=1)
        await asyncio.sleep(0.1)
        await worker.beat()
        await held(250)
        await worker.change(wire.Clear())
        await held(0)
        await worker.stop()

    following(tmp_path, monkeypatch, story)


def test_a_snapshot_that_takes_long_leaves_the_worker_alive_and_in_touch(tmp_path, monkeypatch):
    """It forgets a router that says nothing, and what it says meanwhile waits unread."""
    monkeypatch.setattr(wire, "LAPSE_S", 0.2)
    monkeypatch.setattr(stream, "SLICE", 1)
    apply = Mirror.apply

    def slow(self, events):
        time.sleep(0.02)
        apply(self, events)

    monkeypatch.setattr(Mirror, "apply", slow)

    async def story(worker, held, endpoint):
        worker.segments = [insert(i) for i in range(1, 31)]
        worker.heard = []
        await worker.change(insert(99), skip=1)
        await asyncio.sleep(0.1)
        await worker.beat()
        await held(1500)
        assert worker.heard.count(wire.ALIVE) >= 5
        await worker.stop()

    following(tmp_path, monkeypatch, story)


def bad_snapshot(secret=0, page=1, config=None, **fields):
    named = dict(zip(insert(1).__struct_fields__, msgspec.structs.astuple(insert(1)), strict=True))
    segment = ["insert", *({**named, **fields}.values())]
    return wire.encode(["snapshot", 1, 1, secret, page, config or {}, [segment]])


BAD = [
    *(b"", b"\x93garbage", wire.encode(["snapshot", 1]), b"\xc0" * 99),
    *(bad_snapshot(tokens=b"abc"), bad_snapshot(start=2**63), bad_snapshot(depth=40_000)),
    *(bad_snapshot(id=-1, parent=-1), bad_snapshot(page=0), bad_snapshot(context=-1)),
    *(bad_snapshot(start=-5), bad_snapshot(secret=-(2**63)), bad_snapshot(config={"new": 1})),
    bad_snapshot(near=2**64 - 1, context=2**64 - 1, start=1),
]


@pytest.mark.parametrize("bad", BAD)
def test_what_cannot_be_read_is_asked_for_again(tmp_path, monkeypatch, bad):
    async def story(worker, held, endpoint):
        worker.segments = [insert(1), insert(2)]
        await worker.say(bad)
        await worker.change(insert(9), skip=1)  # where it was not bad enough
        await worker.beat()
        await held(100)
        await worker.stop()

    following(tmp_path, monkeypatch, story)


def test_a_worker_that_comes_back_is_asked_once(tmp_path, monkeypatch):
    async def story(worker, held, endpoint):
        await worker.stop()
        await held(None)
        await asyncio.sleep(1)  # it is asked for in vain
        again = Worker(endpoint, run=2)
        again.segments = [insert(i) for i in range(1, 4)]
        await held(150)
        await asyncio.sleep(0.1)
        assert again.asked <= 2  # of those of a second, a last one may have been on its way
        await again.stop()

    following(tmp_path, monkeypatch, story)


def test_a_snapshot_that_takes_long_to_come_is_waited_for(tmp_path, monkeypatch):
    """It is one message, and no beat passes it."""

    class Late(Worker):
        async def say(self, message):
            if isinstance(message, wire.Snapshot):
                await asyncio.sleep(1.0)  # more than thrice SILENT_S
            await super().say(message)

    async def story(worker, held, endpoint):
        await worker.stop()
        await held(None)
        again = Late(endpoint, run=2)
        again.segments = [insert(1), insert(2)]
        await held(100)
        assert again.asked <= 2  # one of those asked in vain before may have waited for it
        await again.stop()

    following(tmp_path, monkeypatch, story)


def test_a_configuration_that_is_none_of_ours_is_no_reason_to_stop(tmp_path, monkeypatch):
    async def story(worker, held, endpoint):
        worker.segments = [insert(1), insert(2)]
        await worker.say(wire.Snapshot(1, 1, 0, 1, {"unknown": 1}, []))
        await held(100)
        await worker.stop()

    following(tmp_path, monkeypatch, story)


def test_any_fault_of_the_index_is_logged_once_and_followed_again(tmp_path, monkeypatch, caplog):
    class Odd(Exception):
        pass

    real, left = Index.hear, [3]

    def hear(self, *args):
        if left[0]:
            left[0] -= 1
            raise Odd("planned")
        return real(self, *args)

    async def story(worker, held, endpoint):
        monkeypatch.setattr(Index, "hear", hear)
        worker.segments = [insert(1), insert(2)]
        await worker.change(insert(3))
        while left[0]:
            await asyncio.sleep(0.01)
        await held(100)
        await worker.stop()

    following(tmp_path, monkeypatch, story)
    assert caplog.text.count("planned") == 1
