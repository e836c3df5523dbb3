"""The proxy in front of the gateway: reads a request, names a worker, hands the answer on. IO.

Bodies of requests are read whole, they must be tokenised; answers pass chunk by chunk. A client
that reads slowly slows the gateway down: nothing is read from it while the client's buffer is
full. A client that goes away ends the request at the gateway.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, NamedTuple

import aiohttp
import orjson
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route

from kvshare_sglang.policy.options import HEADER
from kvshare_sglang.router.brain import Brain, Decision
from kvshare_sglang.router.prompts import CHAT, GENERATE, PATHS
from kvshare_sglang.router.stream import follow

logger = logging.getLogger(__name__)

KEY, SERVED = "x-smg-routing-key", "x-smg-routed-worker-id"
MOST_BODY = 512 << 20  # bytes, as smg
MOST_READ = 1 << 16  # bytes of an answer that are held for a client that does not read
PROBES = 20  # keys tried for one worker
RETRY_S = 2.0
# Of one connection alone, RFC 9110 7.6.1; and what is written anew.
_OWN = frozenset(
    "connection keep-alive proxy-authenticate proxy-authorization te trailer transfer-encoding"
    " upgrade proxy-connection host expect".split()
)


class Settings(NamedTuple):
    """``streams``: each worker's endpoint, empty where it has none."""

    gateway: str
    streams: tuple[str, ...]
    token: str = ""


class _Gone(Exception):
    """The client went away."""


def make_app(brain: Brain, settings: Settings) -> Starlette:
    """The router as an ASGI application; its tasks live as long as it does."""
    proxy = Proxy(brain, settings)
    routes = [
        Route("/pick", proxy.pick, methods=["POST"]),
        Route("/health", proxy.health),
        Route("/metrics", proxy.metrics),
        Mount("/", proxy.hand_on),
    ]
    return Starlette(routes=routes, lifespan=proxy.lifespan)


class Proxy:
    def __init__(self, brain: Brain, settings: Settings) -> None:
        self._brain, self._settings = brain, settings
        self._client: aiohttp.ClientSession

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        # As many connections as there are clients, no time limit, no changed bytes: the gateway has
        # its own limits.
        self._client = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=5),
            auto_decompress=False,
            read_bufsize=MOST_READ,
        )
        streams = enumerate(self._settings.streams)
        jobs = [
            follow(self._brain.index, n, endpoint, self._settings.token)
            for n, endpoint in streams
            if endpoint
        ]
        tasks = [asyncio.create_task(job) for job in (*jobs, self._compare(), self._probe_all())]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._client.close()

    # ---- what it serves itself ---------------------------------------------------------------

    async def pick(self, request: Request) -> Response:
        """Whom to send the body to, for those who proxy themselves: as ``/generate`` or, with
        ``messages``, as a chat. The request does not count as sent. ``routing_key`` null: no key is
        known to lead there."""
        try:
            body = orjson.loads(await request.body())
        except orjson.JSONDecodeError as error:
            return JSONResponse({"error": f"the body is no JSON: {error}"}, status_code=400)
        path = CHAT if isinstance(body, dict) and "messages" in body else GENERATE
        decision = self._brain.decide(path, body, request.headers.get(HEADER))
        if decision.choice is None:
            return JSONResponse({"error": "the router failed, see its log"}, status_code=500)
        urls, work = self._brain.urls, decision.choice.work
        return JSONResponse(
            {
                "worker": urls[decision.best],
                "second": urls[decision.second],
                "predicted_rows": work.rows if work else None,
                "predicted_exact_tokens": work.exact if work else None,
                "prompt_tokens": decision.choice.tokens if work else None,
                "routing_key": decision.key,
            }
        )

    async def health(self, request: Request) -> Response:
        """200 where the gateway is healthy, and what is known of each worker."""
        told = self._brain.told()
        try:
            limit = aiohttp.ClientTimeout(total=5)
            async with self._client.get(f"{self._settings.gateway}/health", timeout=limit) as reply:
                status = reply.status
        except (aiohttp.ClientError, TimeoutError):
            status = 503
        return JSONResponse({**told, "gateway": status}, status_code=200 if status == 200 else 503)

    async def metrics(self, request: Request) -> Response:
        for url, one in zip(self._brain.urls, self._brain.index.workers, strict=True):
            held = one.mirror.num_tokens if one.mirror else -1
            self._brain.metrics.indexed.labels(worker=url).set(held)
        return Response(self._brain.metrics.page(), media_type="text/plain; version=0.0.4")

    # ---- what it hands on -------------------------------------------------------------------

    async def hand_on(self, scope: Any, receive: Any, send: Any) -> None:
        """Any request, as an ASGI application."""
        if scope["type"] != "http":
            return
        try:
            body = await _read(receive)
        except _Gone:
            return
        if body is None:
            await _error(send, 413, f"a body of more than {MOST_BODY} bytes")
            return
        headers = {
            name.decode("latin-1"): value.decode("latin-1")
            for name, value in scope["headers"]
            if name.decode("latin-1") not in _OWN
        }
        decision = self._decide(scope, headers, body)
        if decision.body is not None:
            body = orjson.dumps(decision.body)
            headers["content-length"] = str(len(body))
        if decision.key is not None:
            headers[KEY] = decision.key
        decision = self._brain.sent(decision)
        pump = asyncio.create_task(self._pump(scope, headers, body, decision, send))
        gone = asyncio.create_task(_wait_gone(receive))
        try:
            await asyncio.wait({pump, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not pump.done():
                pump.cancel()
            self._brain.answered(decision)
            with contextlib.suppress(asyncio.CancelledError, _Gone):
                await pump

    def _decide(self, scope: Any, headers: Mapping[str, str], body: bytes) -> Decision:
        """A client that names a key itself, or sends what is no JSON, has its way."""
        path = scope["path"]
        if scope["method"] != "POST" or path not in PATHS or KEY in headers:
            return Decision()
        try:
            parsed = orjson.loads(body)
        except orjson.JSONDecodeError:
            return Decision()
        return self._brain.decide(path, parsed, headers.get(HEADER))

    async def _pump(
        self, scope: Any, headers: Mapping[str, str], body: bytes, decision: Decision, send: Any
    ) -> None:
        query = scope["query_string"].decode("latin-1")
        raw = scope.get("raw_path", b"").decode("latin-1") or scope["path"]
        url = self._settings.gateway + raw.partition("?")[0] + (f"?{query}" if query else "")
        began = False
        try:
            async with self._client.request(
                scope["method"], _as_it_is(url), headers=headers, data=body, allow_redirects=False
            ) as reply:
                self._brain.served(decision, reply.headers.get(SERVED))
                began = True
                await send(
                    {
                        "type": "http.response.start",
                        "status": reply.status,
                        "headers": [
                            (name.lower().encode("latin-1"), value.encode("latin-1"))
                            for name, value in reply.headers.items()
                            if name.lower() not in _OWN
                        ],
                    }
                )
                async for chunk in reply.content.iter_any():
                    self._brain.answered(decision)
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                await send({"type": "http.response.body", "body": b""})
        except (aiohttp.ClientError, TimeoutError) as error:
            self._brain.metrics.failed.inc()
            if began:
                raise  # the connection breaks off, as it did at the gateway
            await _error(send, 502, f"the gateway does not answer: {error}")
        except OSError as error:
            raise _Gone from error

    # ---- what it finds out by itself -----------------------------------------------------------

    async def _compare(self) -> None:
        """Ask a worker how it tokenises: only what comes out alike is handed on as tokens."""
        for path in (GENERATE, CHAT):
            trials = [trial for of, trial in self._brain.prompts.trials() if of == path]
            answers = [await self._ask_any("/tokenize", trial) for trial in trials]
            if all(
                isinstance(answer, dict)
                and self._brain.prompts.agrees(path, trial, answer.get("tokens"))
                for trial, answer in zip(trials, answers, strict=True)
            ):
                self._brain.prompts.sure.add(path)
            else:
                logger.warning("%s: the worker tokenises in another way; text is passed on", path)

    async def _ask_any(self, path: str, body: dict[str, Any]) -> Any:
        """The answer of the first worker that has one; waits for it."""
        while True:
            for url in self._brain.urls:
                with contextlib.suppress(aiohttp.ClientError, TimeoutError, orjson.JSONDecodeError):
                    limit = aiohttp.ClientTimeout(total=10)
                    async with self._client.post(url + path, json=body, timeout=limit) as reply:
                        if reply.status < 500:
                            return orjson.loads(await reply.read())
            await asyncio.sleep(RETRY_S)

    async def _probe_all(self) -> None:
        """Try for each worker, and again for each that was passed over, whether its key leads
        there, as soon as the gateway and it are up."""
        doubted = self._brain.doubted
        while True:
            for worker in sorted(doubted):
                if await self._healthy(self._brain.urls[worker]) and await self._probe(worker):
                    doubted.discard(worker)
            await asyncio.sleep(RETRY_S)

    async def _healthy(self, url: str) -> bool:
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            limit = aiohttp.ClientTimeout(total=5)
            async with self._client.get(f"{url}/health", timeout=limit) as reply:
                return reply.status == 200
        return False

    async def _probe(self, worker: int) -> bool:
        """Whether a key is known to lead to a worker. Where the gateway sends other keys there, but
        not the one that was computed, its ring is another one, and these are learned."""
        keys = self._brain.keys
        others = [i for i in range(len(self._brain.urls)) if i != worker]
        named = keys.key([worker, *others])
        if named and await self._asked(named[0]) == worker:
            return True
        for turn in range(PROBES):
            spare = keys.spare(turn)
            if await self._asked(spare) != worker:
                continue
            # The gateway knows it. It may have learned that a moment ago: once more.
            by = await self._asked(named[0]) if named else None
            if by is not None and by != worker and named:
                logger.warning("key %s leads to %s", named[0], self._brain.urls[by])
                keys.served(named[0], by)
            if by != worker:
                keys.served(spare, worker)
            return True
        return False

    async def _asked(self, key: str) -> int | None:
        """The worker that a key leads to now."""
        body = {"input_ids": [1], "sampling_params": {"max_new_tokens": 1}}
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            limit = aiohttp.ClientTimeout(total=60)
            async with self._client.post(
                self._settings.gateway + GENERATE, json=body, headers={KEY: key}, timeout=limit
            ) as reply:
                return self._brain.number(reply.headers.get(SERVED))
        return None


def _as_it_is(url: str) -> Any:
    """A URL that is not quoted once more."""
    from yarl import URL

    return URL(url, encoded=True)


async def _read(receive: Callable[[], Any]) -> bytes | None:
    """The whole body; None where it is too long. Raises _Gone."""
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _Gone
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MOST_BODY:
            return None
        if not message.get("more_body", False):
            return b"".join(parts)


async def _wait_gone(receive: Callable[[], Any]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _error(send: Any, status: int, message: str) -> None:
    """In the form that clients of OpenAI read."""
    body = orjson.dumps({"error": {"message": message, "type": "router_error", "code": status}})
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
