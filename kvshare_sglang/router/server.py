"""The proxy in front of the gateway: reads a request, names a worker, hands the answer on. IO.

Bodies of requests are read whole, they must be tokenised; answers pass chunk by chunk. A client
that reads slowly slows the gateway down: nothing is read from it while the client's buffer is
full. A client that goes away ends the request at the gateway.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import aiohttp
import orjson
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route

from kvshare_sglang.errors import ConfigError
from kvshare_sglang.policy.options import HEADER, SALT_HEADER, asked_of, salt_of
from kvshare_sglang.router.brain import Brain, Decision
from kvshare_sglang.router.chats import CHAT, MESSAGES, RESPONSES
from kvshare_sglang.router.prompts import COMPLETIONS, GENERATE, OPTION_PATHS, PATHS, Reading
from kvshare_sglang.router.salt import salted, written
from kvshare_sglang.router.stream import follow

logger = logging.getLogger(__name__)

KEY, SERVED = "x-smg-routing-key", "x-smg-routed-worker-id"
TARGET = "x-smg-target-worker"  # comes before the key at the gateway
MOST_BODY = 512 << 20  # bytes, as smg
MOST_READ = 1 << 16  # bytes of an answer that are held for a client that does not read
MOST_HEADER = 1 << 16  # bytes of one header of an answer
LONG = 1 << 14  # bytes of a body that is read in a thread of its own: requests need not wait for it
PROBES = 20  # keys tried for one worker
RETRY_S = 2.0
MOST_RETRY_S = 300.0
# Of one connection alone, RFC 9110 7.6.1; and what is written anew.
_OWN = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization te trailer transfer-encoding"
    b" upgrade proxy-connection host expect".split()
)
# What aiohttp would add by itself.
_ADDED = ("user-agent", "accept", "accept-encoding", "content-type")

# The path that a body is for, by a key of it; else ``/generate``.
_PICKED = (("system", MESSAGES), ("messages", CHAT), ("prompt", COMPLETIONS), ("input", RESPONSES))

Headers = list[tuple[str, str]]


class Settings(NamedTuple):
    """``streams``: each worker's endpoint, empty where it has none. ``api_key``: of the workers, as
    their ``--api-key``."""

    gateway: str
    streams: tuple[str, ...]
    token: str = ""
    api_key: str = ""


class _Gone(Exception):
    """The client went away."""


class _Strange(Exception):
    """The gateway answers, and names no worker that is known here."""


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
        self._next: dict[int, tuple[float, float]] = {}  # by worker: not before, and how long then
        self._missed: set[int] = set()  # doubted, and not to be found so far
        self._refused: set[str] = set()  # who wants another key, and that it does was said
        key = settings.api_key
        self._own: dict[str, str] = {"authorization": f"Bearer {key}"} if key else {}

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        # As many connections as there are clients and no time limit: the gateway has its own.
        # Bodies stay compressed as they are; a cookie is its client's, not the next one's.
        self._client = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=5),
            auto_decompress=False,
            read_bufsize=MOST_READ,
            max_line_size=MOST_HEADER,
            max_field_size=MOST_HEADER,
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=_ADDED,
        )
        streams = enumerate(self._settings.streams)
        jobs = [
            follow(self._brain.index, n, endpoint, self._settings.token)
            for n, endpoint in streams
            if endpoint
        ]
        jobs += [_for_ever(self._compare_all), self._probe_all()]
        tasks = [asyncio.create_task(job) for job in jobs]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._client.close()

    # ---- what it serves itself ---------------------------------------------------------------

    async def pick(self, request: Request) -> Response:
        """Whom to send the body to, for those who proxy themselves; its keys say for which path it
        is. The request does not count as sent. ``routing_key`` null: no key is known to lead
        there."""
        try:
            raw = await _read(request.receive)
        except _Gone:
            return Response(status_code=499)
        if raw is None:
            message = f"a body of more than {MOST_BODY} bytes"
            return JSONResponse({"error": message}, status_code=413)
        try:
            asked = asked_of(request.headers.items())
            salt = salt_of(request.headers.items())
            reading = await _aside(raw, lambda: self._picked(raw, asked, salt))
        except orjson.JSONDecodeError as error:
            return JSONResponse({"error": f"the body is no JSON: {error}"}, status_code=400)
        except ConfigError as error:
            return JSONResponse({"error": str(error)}, status_code=400)
        decision = self._brain.choose(reading)
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

    def _picked(self, raw: bytes, asked: str | None, salt: str | None) -> Reading | None:
        body = salted(orjson.loads(raw), salt)
        paths = (path for key, path in _PICKED if isinstance(body, dict) and key in body)
        return self._brain.read(next(paths, GENERATE), body, asked)

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
        headers = [(_text(name), _text(value)) for name, value in _passed_on(scope["headers"])]
        try:
            asked_of(headers)
            headers, body = await _salted(scope, headers, body)
        except ConfigError as error:
            await _error(send, 400, str(error))
            return
        decision = await self._decide(scope, headers, body)
        if decision.body is not None:
            headers, body = _with_length(headers, decision.body), decision.body
        if decision.key is not None:
            headers.append((KEY, decision.key))
        decision = self._brain.sent(decision)
        pump = asyncio.create_task(self._pump(scope, headers, body, decision, send))
        gone = asyncio.create_task(_wait_gone(receive))
        try:
            await asyncio.wait({pump, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not pump.done():
                pump.cancel()
            self._brain.ended(decision)
            with contextlib.suppress(asyncio.CancelledError, _Gone):
                await pump

    async def _decide(self, scope: Any, headers: Headers, body: bytes) -> Decision:
        """A client that names a key or a worker itself has its way: we name none, its options are
        moved all the same. So has one that sends what is no JSON."""
        path, given = scope["path"], dict(headers)
        asked = given.get(HEADER)
        names = path in PATHS and KEY not in given and TARGET not in given
        moves = path in OPTION_PATHS and asked is not None
        if scope["method"] not in ("POST", "PUT") or not (names or moves):
            return Decision()

        def read() -> Reading | None:
            parsed = orjson.loads(body)
            if names:
                return self._brain.read(path, parsed, asked)
            return self._brain.read_options(path, parsed, asked)

        try:
            reading = await _aside(body, read)
        except orjson.JSONDecodeError:
            return Decision()
        return self._brain.choose(reading, names=names)

    async def _pump(
        self, scope: Any, headers: Headers, body: bytes, decision: Decision, send: Any
    ) -> None:
        query = scope["query_string"].decode("latin-1")
        raw = scope.get("raw_path", b"").decode("latin-1") or scope["path"]
        if not raw.startswith("/"):  # it would be read as a part of the gateway's own address
            await _error(send, 400, "the target of a request is a path")
            return
        url = self._settings.gateway + raw.partition("?")[0] + (f"?{query}" if query else "")
        began = False
        try:
            async with self._client.request(
                scope["method"],
                _as_it_is(url),
                headers=headers,
                data=body or None,  # of nothing, too, it would tell the length
                allow_redirects=False,
            ) as reply:
                self._brain.served(decision, reply.headers.get(SERVED))
                began = True
                await send(
                    {
                        "type": "http.response.start",
                        "status": reply.status,
                        "headers": _passed_on(reply.raw_headers),
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

    async def _compare_all(self) -> None:
        """Ask each worker how it tokenises, in each of its lives: only what comes out alike on all
        of them is handed on as tokens."""
        workers = range(len(self._brain.urls))
        left = [n for n in workers if not self._brain.is_compared(n)]
        await asyncio.gather(*map(self._compare, left))

    async def _compare(self, worker: int) -> None:
        """Nothing is learned of a worker that does not answer."""
        brain, url = self._brain, self._brain.urls[worker]
        run = brain.index.workers[worker].run
        trials = brain.prompts.trials()
        alike = {of for of, _ in trials}
        try:
            info = await self._json("GET", f"{url}/server_info")
            if not _is_of_the_model(info):
                alike.discard(CHAT)
            for of, trial in trials:
                answer = await self._json("POST", f"{url}/tokenize", trial)
                theirs = answer.get("tokens") if isinstance(answer, dict) else None
                if not brain.prompts.agrees(of, trial, theirs):
                    alike.discard(of)
        except (aiohttp.ClientError, TimeoutError):
            return
        for of in {of for of, _ in trials} - alike:
            logger.warning("%s: %s tokenises in another way; text is passed on", of, url)
        model = info.get("served_model_name") if isinstance(info, dict) else None
        brain.compared(worker, run, frozenset(alike), model if isinstance(model, str) else None)

    async def _json(self, method: str, url: str, body: Any = None) -> Any:
        """What a worker answers, None where that is no JSON. Raises ClientError, TimeoutError where
        it does not, has a fault, or wants another key."""
        limit = aiohttp.ClientTimeout(total=10)
        sent = {"headers": self._own} if body is None else _as_json(body, self._own)
        async with self._client.request(method, url, timeout=limit, **sent) as reply:
            if self._is_refused(url, reply.status) or reply.status >= 500:
                raise aiohttp.ClientError(f"{url}: {reply.status}")
            with contextlib.suppress(orjson.JSONDecodeError):
                return orjson.loads(await reply.read())
        return None

    def _is_refused(self, url: str, status: int) -> bool:
        refused = status in (401, 403)
        who = "://".join(urlsplit(url)[:2])
        if refused and who not in self._refused:
            self._refused.add(who)
            logger.warning("%s refuses the router's own requests: it needs an API key", who)
        return refused

    async def _probe_all(self) -> None:
        """Until the gateway names workers by ids that are not known here: then nothing could be
        learned from its answers, ever."""
        try:
            await _for_ever(lambda: self._probe_due(time.monotonic()), ends=_Strange)
        except _Strange as strange:
            logger.warning(
                "the gateway names a worker as %s, which is no --worker: keys are not verified, and"
                " requests may go elsewhere than they are meant to",
                strange,
            )

    async def _probe_due(self, now: float) -> None:
        """Try for each worker, and again for each that was passed over, whether its key leads
        there, as soon as the gateway and it are up; each time in vain twice as long after."""
        doubted = self._brain.doubted
        for worker in sorted(doubted):
            due, wait = self._next.setdefault(worker, (now, RETRY_S))
            if now < due or not await self._healthy(self._brain.urls[worker]):
                self._missed.add(worker)
            elif await self._probe(worker):
                del doubted[worker], self._next[worker]
                if worker in self._missed:  # who stood in for it seemed to have its keys
                    self._missed.discard(worker)
                    for other in range(len(self._brain.urls)):
                        if other != worker:
                            doubted.setdefault(other, None)
            else:
                self._missed.add(worker)
                self._next[worker] = now + wait, min(2 * wait, MOST_RETRY_S)

    async def _healthy(self, url: str) -> bool:
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            limit = aiohttp.ClientTimeout(total=5)
            async with self._client.get(f"{url}/health", timeout=limit) as reply:
                return reply.status == 200
        return False

    async def _probe(self, worker: int) -> bool:
        """Whether a key is known to lead to a worker. Where the gateway sends other keys there, but
        not the one in doubt, its ring is another one: all that was computed for the worker goes,
        and one of those others stays."""
        keys, urls = self._brain.keys, self._brain.urls
        others = [i for i in range(len(urls)) if i != worker]
        named = keys.key([worker, *others])
        key = self._brain.doubted.get(worker) or (named and named[0])
        if key and await self._asked(key) == worker:
            return True
        for _ in range(PROBES):
            spare = keys.spare()
            by = await self._asked(spare)
            if by is None:
                return False
            if by != worker:
                continue
            # The gateway knows it. It may have learned that a moment ago: once more.
            by = await self._asked(key) if key else None
            if key and by is not None and by != worker:
                logger.warning("key %s leads to %s", key, urls[by])
                keys.served(key, by)
                keys.only(worker, spare)
            elif by is None:
                keys.served(spare, worker)
            return True
        return False

    async def _asked(self, key: str) -> int | None:
        """The worker that a key leads to now; None: no answer. Raises _Strange, with the id."""
        body = {"input_ids": [1], "sampling_params": {"max_new_tokens": 1}}
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            limit = aiohttp.ClientTimeout(total=60)
            url, sent = self._settings.gateway + GENERATE, _as_json(body, {**self._own, KEY: key})
            async with self._client.post(url, timeout=limit, **sent) as reply:
                by = self._brain.number(reply.headers.get(SERVED))
                if by is None and not self._is_refused(url, reply.status) and reply.status < 400:
                    raise _Strange(reply.headers.get(SERVED, "(no id)")[:200])
                return by
        return None


def _as_json(body: Any, headers: Mapping[str, str]) -> dict[str, Any]:
    """A body of the router's own. Its session adds no header by itself, and SGLang and the gateway
    refuse a body that does not say that it is JSON."""
    return {
        "data": orjson.dumps(body),
        "headers": {"content-type": "application/json", **headers},
    }


async def _for_ever(
    step: Callable[[], Awaitable[None]], *, ends: type[Exception] | tuple[()] = ()
) -> None:
    """A step now and then, whatever becomes of it; the first of faults in a row is logged."""
    told = False
    while True:
        try:
            await step()
            told = False
        except ends:
            raise
        except Exception:
            if not told:
                logger.exception("the router goes on without what it could not find out")
            told = True
        await asyncio.sleep(RETRY_S)


async def _salted(scope: Any, headers: Headers, body: bytes) -> tuple[Headers, bytes]:
    """What goes on of a request whose header names its tenant. Raises ConfigError where that would
    be lost on the way."""
    # Of all that came: a client may say that the edge's header is its connection's alone.
    salt = salt_of((_text(name).lower(), _text(value)) for name, value in scope["headers"])
    if salt is None or scope["method"] not in ("POST", "PUT"):
        return headers, body
    new = await asyncio.to_thread(written, scope["path"], body, salt)
    kept = [pair for pair in headers if pair[0] != SALT_HEADER]
    return _with_length(kept, new), new


def _with_length(headers: Headers, body: bytes) -> Headers:
    kept = [pair for pair in headers if pair[0] != "content-length"]
    return [*kept, ("content-length", str(len(body)))]


async def _aside(body: bytes, read: Callable[[], Reading | None]) -> Reading | None:
    """In a thread where it takes long."""
    return await asyncio.to_thread(read) if len(body) > LONG else read()


def _is_of_the_model(info: Any) -> bool:
    """Whether a server's chats are written by a Jinja template. Named templates of SGLang's bring
    stop strings with them, which it does not add to a request that comes as tokens."""
    if not isinstance(info, dict) or "chat_template" not in info:
        return False
    name = info["chat_template"]
    return name is None or (isinstance(name, str) and name.endswith(".jinja"))


def _passed_on(pairs: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Headers without those of one connection, and those that it names as its own. Names in small
    letters, as ASGI wants them."""
    pairs = [(name.lower(), value) for name, value in pairs]
    named = b",".join(value for name, value in pairs if name == b"connection").lower().split(b",")
    own = _OWN | {one.strip() for one in named}
    return [(name, value) for name, value in pairs if name not in own]


def _text(raw: bytes) -> str:
    """aiohttp writes headers in UTF-8; what is not comes out in it."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("latin-1")


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
