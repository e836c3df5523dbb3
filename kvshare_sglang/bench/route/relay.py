"""A stand between a worker's stream and who reads it, that can be cut or made to lag."""

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any

MOST = 1 << 16  # bytes read at once
_SCHEME = "ipc://"


class Relay:
    """Hands bytes on between unix sockets, both ways, in a thread of its own.

    ``endpoint``: where readers connect; ``upstream``: the worker's stream. Both ``ipc://PATH``.
    """

    def __init__(self, endpoint: str, upstream: str) -> None:
        self._path, self._upstream = (_path(name) for name in (endpoint, upstream))
        self._lag_s = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        self._listening: asyncio.Server | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.mend()

    def cut(self) -> None:
        """Nobody gets through: connections end, new ones are refused. The worker lives on."""
        self._do(self._cut())

    def mend(self) -> None:
        self._do(self._listen())

    def lag(self, seconds: float) -> None:
        """From now on what the worker says is told so much later; 0: at once."""
        self._lag_s = seconds

    def close(self) -> None:
        self.cut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _listen(self) -> None:
        if self._listening is None:
            self._listening = await asyncio.start_unix_server(self._meet, self._path)

    async def _cut(self) -> None:
        if self._listening is not None:
            self._listening.close()
            self._listening = None
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _meet(self, down: asyncio.StreamReader, down_end: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        ends = [down_end]
        try:
            up, up_end = await asyncio.open_unix_connection(self._upstream)
            ends.append(up_end)
            async with asyncio.TaskGroup() as both:
                both.create_task(self._tell(up, down_end))
                both.create_task(_hand_on(down, up_end))
        except* (OSError, asyncio.CancelledError):
            pass  # one end is gone, or it was cut; a reader connects again
        finally:
            for end in ends:
                end.close()
            self._tasks.discard(task)

    async def _tell(self, up: asyncio.StreamReader, down: asyncio.StreamWriter) -> None:
        """What the worker says, in order, each piece ``lag`` seconds after it came."""
        clock = self._loop.time
        waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def take() -> None:
            while data := await up.read(MOST):
                waiting.put_nowait((clock(), data))
            raise ConnectionResetError

        async with asyncio.TaskGroup() as both:
            both.create_task(take())
            while True:
                came, data = await waiting.get()
                await asyncio.sleep(max(came + self._lag_s - clock(), 0))
                down.write(data)
                await down.drain()


async def _hand_on(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    while data := await source.read(MOST):
        target.write(data)
        await target.drain()
    raise ConnectionResetError


def _path(endpoint: str) -> str:
    if not endpoint.startswith(_SCHEME):
        raise ValueError(f"endpoint must be {_SCHEME}PATH, got {endpoint!r}")
    return endpoint.removeprefix(_SCHEME)
