"""Keep the index in step with one worker's stream: ask for a snapshot, follow, ask again. IO."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence

import zmq
import zmq.asyncio

from kvshare_sglang import wire
from kvshare_sglang.router.index import SILENT_S, Index

logger = logging.getLogger(__name__)

SLICE = 4096  # tokens of a snapshot that are taken in at a time, then requests have their turn
ASK_AGAIN_S = 1.2  # a worker answers once a second
FIRST_S = 20.0  # a snapshot is one message: 40 MB may take this long, and no beat passes it
MOST_UNREAD = 4096  # messages; a worker forgets a router that lets more wait


async def follow(
    index: Index,
    worker: int,
    endpoint: str,
    token: str,
    *,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Until cancelled. What cannot be read is logged, the first time in a row, the worker is
    forgotten and asked anew."""
    context = zmq.asyncio.Context.instance()
    told = False
    while True:
        sock = context.socket(zmq.DEALER)
        sock.setsockopt(zmq.LINGER, 0)
        sock.setsockopt(zmq.RCVHWM, MOST_UNREAD)
        sock.setsockopt(zmq.SNDHWM, 16)
        try:
            wire.guard(sock, token, server=False)
            sock.connect(endpoint)
            await _follow(index, worker, sock, clock)
            index.forget(worker)
            told = False
        except Exception as error:  # whatever a worker says: requests go by load meanwhile
            if not told:
                kind = type(error).__name__
                logger.warning("stream %s cannot be followed: %s: %s", endpoint, kind, error)
            told = True
            index.forget(worker)
            await asyncio.sleep(ASK_AGAIN_S)
        finally:
            sock.close()


async def _follow(
    index: Index, worker: int, sock: zmq.asyncio.Socket, clock: Callable[[], float]
) -> None:
    """Until nothing is heard. Then a new socket asks again: in this one what was said meanwhile
    would wait, and the worker be asked many times once it is back."""
    asked = alive = clock()
    patience = FIRST_S
    await _say(sock, wire.SNAPSHOT)
    while await sock.poll(int(1000 * patience)):
        message = wire.decode(await sock.recv())
        if isinstance(message, wire.Snapshot):
            patience = SILENT_S
            mirror = index.begin(worker, message)
            for part in _slices(message.segments):
                mirror.apply(part)
                index.reads(worker, clock())
                await asyncio.sleep(0)
                if clock() - alive >= wire.LAPSE_S / 4:  # or it takes us for gone
                    alive = clock()
                    await _say(sock, wire.ALIVE)
        elif not index.hear(worker, message, clock()) and clock() - asked >= ASK_AGAIN_S:
            asked = clock()
            await _say(sock, wire.SNAPSHOT)
        if clock() - alive >= wire.LAPSE_S / 4:
            alive = clock()
            await _say(sock, wire.ALIVE)


def _slices(segments: Sequence[wire.Insert]) -> Iterator[list[wire.Insert]]:
    part: list[wire.Insert] = []
    size = 0
    for one in segments:
        part.append(one)
        size += len(one.tokens) // 4
        if size >= SLICE:
            yield part
            part, size = [], 0
    yield part


async def _say(sock: zmq.asyncio.Socket, what: bytes) -> None:
    """Where the worker is gone nothing is queued without bound: it is said again later."""
    with contextlib.suppress(zmq.Again):
        await sock.send(what, zmq.NOBLOCK)
