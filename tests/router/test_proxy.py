"""The proxy's plumbing, between a client and a gateway that are made up here."""

import asyncio
import contextlib
import json
import socket
import threading

import aiohttp
import numpy as np
import pytest
import uvicorn
from aiohttp import web
from multidict import CIMultiDict

from kvshare_sglang import wire
from kvshare_sglang.router import server
from kvshare_sglang.router.brain import Brain, Decision
from kvshare_sglang.router.metrics import Metrics
from kvshare_sglang.router.prompts import (
    CHAT,
    COMPLETIONS,
    GENERATE,
    MESSAGES,
    OPTION_PATHS,
    RESPONSES,
    Prompts,
)
from kvshare_sglang.router.ring import Ring
from kvshare_sglang.router.server import Settings, make_app


class Bytes:
    """A tokenizer: one token a byte."""

    def encode(self, text, add_special_tokens=True):
        return list(text.encode())

    def apply_chat_template(self, messages, **_):
        return "".join(f"<{m['role']}>{m['content']}" for m in messages)


class Gateway:
    """Answers as it is told to, and remembers what came. It is the workers, too."""

    def __init__(self, *, same_tokens=True):
        self.seen, self.answer, self.same_tokens = [], self._echo, same_tokens
        self.ended = asyncio.Event()
        self.urls, self.spelling = [], ""  # of the URLs on its ring
        self.down, self.template, self.probes = set(), None, 0
        self.api_key = ""

    async def handle(self, request):
        body = await request.read()
        open_to_all = not self.api_key or request.path.startswith("/health")  # as SGLang
        if not open_to_all and request.headers.get("authorization") != f"Bearer {self.api_key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        own = request.path == "/tokenize" or body == PROBE
        if own and request.content_type != "application/json":  # as SGLang and smg
            return web.json_response({"message": "Unsupported Media Type"}, status=400)
        if request.path == "/tokenize":
            asked = json.loads(body)
            text = asked.get("prompt") or Bytes().apply_chat_template(asked["messages"])
            return web.json_response({"tokens": list(text.encode())[not self.same_tokens :]})
        if request.path == "/server_info":
            info = {"chat_template": self.template, "served_model_name": "s3://m"}
            return web.json_response(info)
        if request.path == "/health":
            return web.Response()
        key = request.headers.get("x-smg-routing-key")
        if body == PROBE:
            self.probes += 1
            return web.Response(headers=self.served(key))
        self.seen.append((request, body))
        return await self.answer(request)

    def served(self, key):
        best, second = Ring([url + self.spelling for url in self.urls]).pair(key)
        return {"x-smg-routed-worker-id": self.urls[second if best in self.down else best]}

    async def _echo(self, request):
        return web.json_response({"ok": 1}, status=418, headers={"x-of-the-worker": "yes"})


PROBE = b'{"input_ids":[1],"sampling_params":{"max_new_tokens":1}}'


@contextlib.asynccontextmanager
async def running(gateway, prompts=None, *, host="127.0.0.1", api_key=""):
    """The gateway, twice (two workers), and a router before it; the router's URL and its brain."""
    runner = web.AppRunner(_app(gateway), handler_cancellation=True)
    await runner.setup()
    socks = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    urls = [f"http://127.0.0.1:{sock.getsockname()[1]}" for sock in socks]
    for sock in socks[:2]:
        await web.SockSite(runner, sock).start()
    gateway.urls = urls[:2]
    brain = Brain(urls[:2], prompts or Prompts(Bytes()), Metrics())
    settings = Settings(urls[0].replace("127.0.0.1", host), ("", ""), api_key=api_key)
    app = make_app(brain, settings)
    it = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
    task = asyncio.create_task(it.serve(sockets=[socks[2]]))
    try:
        while not it.started:
            await asyncio.sleep(0.01)
        async with aiohttp.ClientSession() as client:
            yield client, urls[2], brain
    finally:
        it.should_exit = True
        await task
        await runner.cleanup()


def _app(gateway):
    app = web.Application(client_max_size=1 << 30)
    app.router.add_route("*", "/{path:.*}", gateway.handle)
    return app


async def until(condition):
    for _ in range(1500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not happen within 15 s")


def test_a_request_goes_on_as_it_came_and_its_answer_comes_back_as_it_is():
    async def run():
        gateway = Gateway()
        async with running(gateway) as (client, url, _):
            path = "/v1/models/a%2Fb?x=%20y&x=2"
            headers = {"x-own": "1", "connection": "x-hop", "authorization": "Bearer me"}
            async with client.put(
                aiohttp.client.URL(url + path, encoded=True), data=b"\x00any", headers=headers
            ) as reply:
                assert (reply.status, reply.headers["x-of-the-worker"]) == (418, "yes")
                assert await reply.json() == {"ok": 1}
            ((request, body),) = gateway.seen
            assert (request.method, request.raw_path, body) == ("PUT", path, b"\x00any")
            assert request.headers["authorization"] == "Bearer me"
            assert "x-smg-routing-key" not in request.headers

    asyncio.run(run())


def test_text_becomes_tokens_where_the_workers_tokenise_alike_and_only_there():
    async def run(same):
        gateway = Gateway(same_tokens=same)
        async with running(gateway) as (client, url, brain):
            await until(lambda: all(map(brain.is_compared, (0, 1))))
            assert brain.sure() == ({GENERATE, CHAT} if same else set())
            assert brain.prompts.models == {"s3://m"}
            turn = {"role": "user", "content": "hi"}
            bodies = [
                (GENERATE, {"text": "hello", "stream": True}),
                (CHAT, {"messages": [turn], "model": "m"}),
                (CHAT, {"messages": [turn], "tools": []}),  # may change the prompt
                (GENERATE, {"text": ["a", "b"]}),
                (GENERATE, {"input_ids": [5, 6]}),
                (GENERATE, {"text": 7}),
            ]
            for path, body in bodies:
                async with client.post(url + path, json=body):
                    pass
            got = [json.loads(body) for _, body in gateway.seen]
            first = {"stream": True, "input_ids": list(b"hello")}
            second = {**bodies[1][1], "input_ids": list(b"<user>hi")}
            alike = [first, second] if same else [body for _, body in bodies[:2]]
            assert got == [*alike, *(body for _, body in bodies[2:])]
            keyed = ["x-smg-routing-key" in request.headers for request, _ in gateway.seen]
            assert all(keyed)  # what is not known goes by load

    asyncio.run(run(True))
    asyncio.run(run(False))


async def asked(url, lines):
    """What comes back to a request of these lines: status line, headers."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
    writer.write(b"\r\n".join([*lines, b"connection: close", b"", b""]))
    answer = await reader.read()
    writer.close()
    status, *pairs = answer.partition(b"\r\n\r\n")[0].split(b"\r\n")
    return status, pairs


def test_headers_pass_as_they_are_both_ways_and_a_cookie_stays_its_clients():
    async def run():
        gateway = Gateway()
        came = [("set-cookie", "a=tenant-a"), ("set-cookie", "b=2"), ("x-long", "y" * 9000)]
        came.append(("x-text", "gr\u00fc\u00dfe \u4e2d"))

        async def cookies(request):
            return web.Response(body=b"", headers=CIMultiDict([*came, ("date", "d")]))

        gateway.answer = cookies
        # A cookie jar keeps nothing of a host that is a number.
        async with running(gateway, host="localhost") as (_, url, _):
            sent = [b"x-twice: 1", b"x-twice: 2", "x-text: \u4e2d".encode(), b"cookie: mine=1"]
            for pairs in (sent, [b"x-other: 1"]):
                _, got = await asked(url, [b"GET /x HTTP/1.1", b"host: me", *pairs])
                got = [pair for pair in got if not pair.startswith((b"content-type", b"server"))]
                told = [f"{name}: {value}".encode() for name, value in [*came, ("date", "d")]]
                assert [one for one in got if one in told] == told
                assert sum(one.startswith(b"set-cookie") for one in got) == 2
                request, _ = gateway.seen[-1]
                arrived = [name.lower() + b": " + value for name, value in request.raw_headers]
                assert [one for one in arrived if not one.startswith(b"host:")] == pairs

    asyncio.run(run())


def test_a_target_that_is_no_path_goes_nowhere():
    async def run():
        gateway = Gateway()
        async with running(gateway) as (_, url, _):
            # The last would make the gateway's address a user's name before another address.
            there = gateway.urls[1].removeprefix("http://").encode()
            for target in (b"@%b/x", b"x@%b/", b"%%2Fx@%b/"):
                line = b"GET " + target % there + b" HTTP/1.1"
                status, _ = await asked(url, [line, b"host: me"])
                assert status.split()[1] in (b"400", b"404")
            assert not gateway.seen

    asyncio.run(run())


@pytest.mark.parametrize("template", ["chatml", "/a/file.json", 7])
def test_a_chat_stays_text_where_a_named_template_brings_stop_strings(template):
    """Tokens alike are not enough: what SGLang adds to a request of such a template is lost."""

    async def run():
        gateway = Gateway()
        gateway.template = template
        async with running(gateway) as (client, url, brain):
            await until(lambda: all(map(brain.is_compared, (0, 1))))
            assert brain.sure() == {GENERATE}
            body = {"messages": [{"role": "user", "content": "hi"}]}
            async with client.post(url + CHAT, json=body):
                pass
            assert json.loads(gateway.seen[-1][1]) == body

    asyncio.run(run())


def test_no_tokens_are_handed_on_before_every_worker_was_asked_in_its_newest_life(monkeypatch):
    monkeypatch.setattr(server, "RETRY_S", 0.02)

    async def run():
        gateway = Gateway()
        async with running(gateway) as (_, _, brain):
            await until(lambda: brain.sure() == {GENERATE, CHAT})
            gateway.same_tokens = False
            brain.index.begin(1, wire.Snapshot(7, 1, 0, 1, {}, []))
            assert not brain.sure()  # at once
            await until(lambda: brain.is_compared(1))
            assert not brain.sure()
            gateway.same_tokens = True
            brain.index.forget(1)
            brain.index.begin(1, wire.Snapshot(7, 9, 0, 1, {}, []))  # the same life
            await asyncio.sleep(0.1)
            assert not brain.sure()
            brain.index.begin(1, wire.Snapshot(8, 1, 0, 1, {}, []))
            await until(lambda: brain.sure() == {GENERATE, CHAT})

    asyncio.run(run())


@pytest.mark.parametrize("key", ["right", "wrong", ""])
def test_workers_that_want_a_key_are_asked_with_it_and_one_that_refuses_teaches_nothing(
    key, monkeypatch, caplog
):
    monkeypatch.setattr(server, "RETRY_S", 0.02)

    async def run():
        gateway = Gateway()
        gateway.api_key = "right"
        async with running(gateway, api_key=key) as (client, url, brain):
            refused = "refuses the router's own requests"
            if key != "right":
                await until(lambda: all(caplog.text.count(one) for one in gateway.urls))
                await asyncio.sleep(0.1)
                assert not any(map(brain.is_compared, (0, 1)))
                assert caplog.text.count(refused) == 2  # once for each
                assert "another way" not in caplog.text
                gateway.api_key = ""
            await until(lambda: brain.sure() == {GENERATE, CHAT} and not brain.doubted)
            assert brain.prompts.models == {"s3://m"}
            assert (refused in caplog.text) == (key != "right")
            # It is the router's own: a client's request goes on with the client's alone.
            gateway.api_key = ""
            async with client.post(url + GENERATE, json={"text": "x"}):
                pass
            assert "authorization" not in gateway.seen[-1][0].headers

    asyncio.run(run())


def test_while_a_long_text_is_tokenised_others_are_served():
    async def run():
        gateway, begun, go_on = Gateway(), threading.Event(), threading.Event()

        class Slow(Bytes):
            def encode(self, text, add_special_tokens=True):
                if len(text) > 20_000:
                    begun.set()
                    assert go_on.wait(15)
                return super().encode(text)

        async with running(gateway, Prompts(Slow())) as (client, url, _):
            long = {"text": "x" * 30_000}
            first = asyncio.create_task(client.post(url + GENERATE, json=long))
            picked = asyncio.create_task(client.post(url + "/pick", json=long))
            await until(begun.is_set)
            async with client.post(url + GENERATE, json={"text": "short"}) as reply:
                assert reply.status == 418
            assert not first.done()
            assert not picked.done()
            go_on.set()
            (await first).close()
            (await picked).close()

    asyncio.run(run())


def test_options_of_a_header_are_moved_whoever_chooses_the_worker():
    async def run():
        gateway = Gateway()
        own = {"x-kvshare": "exact", "x-smg-routing-key": "mine"}
        async with running(gateway) as (client, url, _):
            for path in OPTION_PATHS:
                body = {"input_ids": [1]}
                for headers in (own, {"x-kvshare": "exact"}):
                    async with client.post(url + path, json=body, headers=headers):
                        pass
                    request, got = gateway.seen[-1]
                    params = {"custom_params": {"kvshare": "exact"}}
                    if path == GENERATE:
                        params = {"sampling_params": params}
                    assert json.loads(got) == {**body, **params}
                    if headers is own:
                        assert request.headers.getall("x-smg-routing-key") == ["mine"]
            # The gateway goes by the worker that a client names: no answer is taken for a stand-in.
            target = {"x-smg-target-worker": "1", "x-kvshare": "exact"}
            async with client.post(url + GENERATE, json={"input_ids": [1]}, headers=target):
                pass
            assert "x-smg-routing-key" not in gateway.seen[-1][0].headers
            for path in ("/v1/other", RESPONSES, MESSAGES):
                async with client.post(url + path, json=body, headers=own):
                    pass
                assert json.loads(gateway.seen[-1][1]) == body

    asyncio.run(run())


def test_a_tenant_that_a_header_names_is_in_the_body_that_goes_on():
    async def run():
        gateway, prompts = Gateway(), Prompts(Bytes())
        read = []
        prompts.read = lambda *a, **kw: read.append(Prompts.read(prompts, *a, **kw)) or read[-1]
        async with running(gateway, prompts) as (client, url, _):
            for path in OPTION_PATHS:
                for said, salt in ((None, "edge"), ("t", "edge\0t"), (["t"], ["edge\0t"])):
                    body = {"input_ids": [1], "cache_salt": said}
                    hidden = {"connection": "x-kvshare-salt"}
                    for more in ({}, {"x-smg-routing-key": "mine"}, hidden):
                        headers = {"x-kvshare-salt": "edge", **more}
                        async with client.post(url + path, json=body, headers=headers) as it:
                            assert it.status == 418
                        request, got = gateway.seen[-1]
                        assert json.loads(got) == {"input_ids": [1], "cache_salt": salt}
                        assert "x-kvshare-salt" not in request.headers
            # It is counted so, here and for who asks whom to send it to.
            body, headers = {"input_ids": [1]}, {"x-kvshare-salt": "edge"}
            async with client.post(url + GENERATE, json=body, headers=headers):
                pass
            async with client.post(url + "/pick", json=body, headers=headers) as it:
                assert it.status == 200
            assert [one.namespace for one in read[-2:]] == [(None, wire.name_of("edge"))] * 2

    asyncio.run(run())


def test_what_would_be_every_tenants_behind_the_gateway_is_refused():
    """The gateway drops the header, and these bodies have no place for a salt."""

    async def run():
        gateway = Gateway()
        deep = b'{"input_ids":[1],"a":' + b"[" * 300 + b"]" * 300 + b"}"
        good, bad = b'{"input_ids":[1]}', [(b"x-kvshare-salt", b"edge")]
        cases = [(path, good, bad) for path in (MESSAGES, RESPONSES, "/v1/rerank", "/other")]
        cases += [(GENERATE, body, bad) for body in (b"", b"no", b"[1]", b'"a"', deep)]
        cases += [(GENERATE, b'{"cache_salt": 5}', bad)]
        for salts in ([b""], [b"a b"], [b"x" * 257], [b"a", b"edge"]):
            many = [(b"x-kvshare-salt", salt) for salt in salts]
            cases += [(GENERATE, good, many), ("/pick", good, many)]
        twice = [(b"x-kvshare", b"auto"), (b"x-kvshare", b"exact")]
        cases += [(GENERATE, good, twice), ("/pick", good, twice), (MESSAGES, good, twice)]
        cases += [("/pick", b"[1]", bad)]
        async with running(gateway) as (client, url, _):
            for path, body, headers in cases:
                given = CIMultiDict((name.decode(), value.decode()) for name, value in headers)
                async with client.post(url + path, data=body, headers=given) as it:
                    assert it.status == 400, (path, body, headers)
                    assert len(await it.read()) < 500
            async with client.get(url + "/v1/models", headers={"x-kvshare-salt": "edge"}) as it:
                assert it.status == 418
            assert len(gateway.seen) == 1

    asyncio.run(run())


def test_what_can_be_read_and_not_written_goes_on_as_it_came():
    async def run():
        gateway = Gateway()
        deep = b'{"input_ids":[1],"a":' + b"[" * 300 + b"]" * 300 + b"}"
        async with running(gateway) as (client, url, brain):
            async with client.post(url + GENERATE, data=deep, headers={"x-kvshare": "exact"}) as it:
                assert it.status == 418
            assert gateway.seen[-1][1] == deep
            assert b'decisions_total{by="fault"} 1.0' in brain.metrics.page()

    asyncio.run(run())


def test_a_body_that_is_too_long_is_refused_at_pick_too(monkeypatch):
    monkeypatch.setattr(server, "MOST_BODY", 100)

    async def run():
        gateway = Gateway()
        async with running(gateway) as (client, url, _):
            for path in ("/pick", GENERATE, "/x"):
                async with client.post(url + path, data=b"x" * 101) as reply:
                    assert reply.status == 413
            assert not gateway.seen

    asyncio.run(run())


def test_a_gateway_that_names_workers_otherwise_is_asked_once(monkeypatch, caplog):
    monkeypatch.setattr(server, "RETRY_S", 0.01)

    async def run():
        gateway = Gateway()
        gateway.served = lambda key: {"x-smg-routed-worker-id": "http://elsewhere:1"}
        async with running(gateway):
            await until(lambda: "http://elsewhere:1" in caplog.text)
            await asyncio.sleep(0.2)
            assert gateway.probes == 1
        assert caplog.text.count("http://elsewhere:1") == 1

    asyncio.run(run())


def test_a_key_that_leads_nowhere_is_tried_ever_more_rarely():
    brain = Brain(["http://a:1", "http://b:1"], Prompts(), Metrics())
    proxy = server.Proxy(brain, Settings("", ()))
    times = {0: [], 1: []}

    async def healthy(url):
        return True

    async def probe(worker):
        times[worker].append(now)
        return worker == 1

    proxy._healthy, proxy._probe = healthy, probe
    for now in range(0, 3600, 2):
        asyncio.run(proxy._probe_due(now))
    assert times[1] == [0]
    gaps = np.diff(times[0])
    assert gaps[:5].tolist() == [2, 4, 8, 16, 32]
    assert gaps.max() <= server.MOST_RETRY_S + 2
    assert gaps.min() >= 2


@pytest.mark.parametrize("num", [2, 4, 8, 40])
@pytest.mark.parametrize("others", [0.0, 0.3, 1.0])
def test_on_any_other_ring_each_worker_comes_to_have_a_key_and_no_key_leads_elsewhere(num, others):
    """Of this share of the workers the gateway places other names on its ring."""
    urls = [f"http://10.0.0.{i}:30000" for i in range(num)]
    strange = {f"{url}/" if i < others * num else url for i, url in enumerate(urls)}
    theirs = Ring(sorted(strange, key=lambda url: urls.index(url.rstrip("/"))))
    brain = Brain(urls, Prompts(), Metrics())
    proxy, rng, before = server.Proxy(brain, Settings("", ())), np.random.default_rng(num), []
    computed = dict(brain.keys._by_pair)

    async def healthy(url):
        return True

    async def asked(key):
        return theirs.pair(key)[0]

    proxy._healthy, proxy._asked = healthy, asked
    for now in range(0, 4000, 2):
        asyncio.run(proxy._probe_due(now))
        for _ in range(5):
            order = rng.permutation(num).tolist()
            named = brain.keys.key(order)
            by = None if named is None else theirs.pair(named[0])[0]
            decision = Decision(named and named[0], order[0], order[1])
            brain.served(decision, None if by is None else urls[by])
            before.append(by == order[0])
    assert all(before[-1000:])
    if not others:
        assert brain.keys._by_pair == computed


def test_a_task_that_fails_goes_on_and_says_so_once_for_faults_in_a_row(monkeypatch, caplog):
    monkeypatch.setattr(server, "RETRY_S", 0)
    fates = iter([ValueError("planned"), KeyError("more"), None, OSError("again"), EOFError()])

    async def step():
        if fate := next(fates):
            raise fate

    with pytest.raises(EOFError):
        asyncio.run(server._for_ever(step, ends=EOFError))
    assert [record.exc_info[0] for record in caplog.records] == [ValueError, OSError]


def test_the_key_leads_to_the_worker_that_was_picked():
    async def run():
        gateway = Gateway()
        async with running(gateway) as (client, url, brain):
            text = np.random.default_rng(1).integers(0, 99, 300).tolist()
            hold(brain, 1, text)
            body = {"input_ids": [3, *text]}
            async with client.post(url + "/pick", json=body) as reply:
                picked = await reply.json()
            assert picked["worker"] == gateway.urls[1]
            assert picked["second"] == gateway.urls[0]
            assert picked["prompt_tokens"] == 301
            assert picked["predicted_rows"] < 100
            async with client.post(url + GENERATE, json=body):
                pass
            ((request, _),) = gateway.seen
            key = request.headers["x-smg-routing-key"]
            assert key == picked["routing_key"]
            assert Ring(gateway.urls).pair(key) == (1, 0)
            async with client.post(url + "/pick", data=b"{") as reply:
                assert reply.status == 400
            async with client.get(url + "/health") as reply:
                told = await reply.json()
            assert [one["indexed_tokens"] for one in told["workers"]] == [None, 300]
            async with client.get(url + "/metrics") as reply:
                page = await reply.text()
            assert 'kvshare_router_decisions_total{by="index"} 2.0' in page

    asyncio.run(run())


def test_all_that_can_be_read_goes_where_its_text_is_and_stays_as_it_came():
    async def run():
        gateway = Gateway()
        async with running(gateway) as (client, url, brain):
            await until(lambda: brain.sure() == {GENERATE, CHAT})
            said = "".join(map(chr, np.random.default_rng(1).integers(97, 123, 400)))
            parts = [{"type": "text", "text": said}]
            chat = {"messages": [{"role": "user", "content": parts}]}
            for path, body, prompt in (
                (CHAT, chat, f"<user>{said}"),
                (MESSAGES, {**chat, "system": "s"}, f"<system>s<user>{said}"),
                (RESPONSES, {"input": said}, f"<user>{said}"),
                (COMPLETIONS, {"prompt": list(said.encode())}, said),
                (COMPLETIONS, {"prompt": said}, said),
            ):
                hold(brain, 1, list(prompt.encode()))
                async with client.post(url + path, json=body, headers={"x-kvshare": "auto"}):
                    pass
                request, got = gateway.seen[-1]
                assert Ring(gateway.urls).pair(request.headers["x-smg-routing-key"]) == (1, 0)
                options = {"custom_params": {"kvshare": "auto"}} if path in OPTION_PATHS else {}
                assert json.loads(got) == {**body, **options}
                async with client.post(url + "/pick", json=body) as reply:
                    picked = await reply.json()
                assert picked["prompt_tokens"] == len(prompt)
                assert picked["predicted_exact_tokens"] == len(prompt) - 1

    asyncio.run(run())


def hold(brain, worker, text):
    """The worker says that it holds a text."""
    insert = wire.Insert(1, (None, None, 0), 0, 0, 0, 0, 0, np.array(text, np.int32).tobytes())
    mirror = brain.index.begin(worker, wire.Snapshot(1, 1, 0, 1, {}, []))
    mirror.apply([insert])


def test_chunks_pass_one_by_one_and_a_client_that_leaves_ends_the_request_at_the_gateway():
    async def run():
        gateway = Gateway()
        go_on = asyncio.Event()

        async def slow(request):
            reply = web.StreamResponse(headers={"content-type": "text/event-stream"})
            await reply.prepare(request)
            try:
                for number in range(3):
                    await reply.write(b"data: %d\n\n" % number)
                    await go_on.wait()
                    go_on.clear()
            except asyncio.CancelledError:
                gateway.ended.set()
                raise
            return reply

        gateway.answer = slow
        async with running(gateway) as (client, url, brain):
            reply = await client.post(url + GENERATE, json={"text": "x" * 50, "stream": True})
            for number in range(2):
                assert await reply.content.readany() == b"data: %d\n\n" % number
                go_on.set()
            assert await reply.content.readany() == b"data: 2\n\n"
            assert not any(one.routed for one in brain.index.workers)  # it has begun to answer
            assert sum(len(one.open) for one in brain.index.workers) == 1
            reply.close()
            await asyncio.wait_for(gateway.ended.wait(), 15)
            await until(lambda: not any(one.open for one in brain.index.workers))
            # And one that leaves before anything was answered.
            gateway.ended.clear()
            gateway.answer = lambda request: hang(gateway)
            task = asyncio.create_task(client.post(url + GENERATE, json={"text": "y" * 50}))
            await until(lambda: len(gateway.seen) == 2)
            assert sum(len(one.routed) for one in brain.index.workers) == 1
            task.cancel()
            await asyncio.wait_for(gateway.ended.wait(), 15)
            await until(lambda: not any(one.routed or one.open for one in brain.index.workers))
            # And one that is answered whole.
            gateway.answer = gateway._echo
            async with client.post(url + GENERATE, json={"text": "z" * 50}) as reply:
                assert reply.status == 418
            await until(lambda: not any(one.open for one in brain.index.workers))

    asyncio.run(run())


async def hang(gateway):
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        gateway.ended.set()
        raise


def test_a_client_that_does_not_read_stops_the_gateway():
    async def run():
        gateway, sent = Gateway(), [0]

        async def much(request):
            reply = web.StreamResponse()
            await reply.prepare(request)
            for _ in range(1024):
                await reply.write(bytes(1 << 17))
                sent[0] += 1 << 17
            return reply

        gateway.answer = much
        async with (
            running(gateway) as (client, url, _),
            client.post(url + GENERATE, json={"text": "x"}) as reply,
        ):
            before = -1
            while sent[0] != before:  # until nothing is written for a while
                before = sent[0]
                await asyncio.sleep(0.5)
            assert sent[0] < 48 << 20  # what sockets take, of 128 MB
            assert len(await reply.read()) == 128 << 20

    asyncio.run(run())


def test_a_gateway_that_is_gone_is_a_502_and_one_that_breaks_off_breaks_the_answer_off():
    async def run():
        gateway = Gateway()

        async def broken(request):
            reply = web.StreamResponse(headers={"content-length": "100"})
            await reply.prepare(request)
            await reply.write(b"some")
            await asyncio.sleep(0.05)
            request.transport.abort()
            return reply

        gateway.answer = broken
        async with running(gateway) as (client, url, brain):
            with pytest.raises(aiohttp.ClientError):
                async with client.post(url + GENERATE, json={"text": "x"}) as reply:
                    await reply.read()
            await until(lambda: not any(one.routed or one.open for one in brain.index.workers))
        async with aiohttp.ClientSession() as session:
            proxy = server.Proxy(brain, Settings("http://127.0.0.1:9", ("", "")))
            proxy._client = session
            sent = []
            scope = {
                "type": "http", "method": "GET", "path": "/x", "raw_path": b"/x",
                "query_string": b"", "headers": [],
            }  # fmt: skip
            messages = [{"type": "http.request", "body": b""}]

            async def receive():
                if messages:
                    return messages.pop()
                return await asyncio.Event().wait()

            async def send(message):
                sent.append(message)

            await proxy.hand_on(scope, receive, send)
            assert sent[0]["status"] == 502
            assert b"the gateway does not answer" in sent[1]["body"]

    asyncio.run(run())


def test_a_fault_of_the_router_fails_no_request():
    async def run():
        gateway = Gateway()
        async with running(gateway) as (client, url, brain):
            brain.index.choose = brain.index.by_load = None
            async with client.post(url + GENERATE, json={"input_ids": [1, 2]}) as reply:
                assert reply.status == 418
            async with client.post(url + GENERATE, data=b"no json") as reply:
                assert reply.status == 418
            assert all("x-smg-routing-key" not in r.headers for r, _ in gateway.seen)

    asyncio.run(run())


@pytest.mark.parametrize("what", ["route", "answers", "ended", "served"])
def test_what_the_router_cannot_note_fails_no_request(what):
    async def run():
        gateway = Gateway()

        async def served(request):
            return web.Response(body=b"x", headers=gateway.served(request.headers[server.KEY]))

        gateway.answer = served
        async with running(gateway) as (client, url, brain):
            setattr(brain.index, what, None)
            async with client.post(url + GENERATE, json={"input_ids": [1, 2]}) as reply:
                assert (reply.status, await reply.read()) == (200, b"x")
            # What an end does is noted after the answer is on its way.
            await until(lambda: b'decisions_total{by="fault"}' in brain.metrics.page())

    asyncio.run(run())


@pytest.mark.parametrize("spelling", ["", "/"])
def test_keys_are_learned_where_the_gateways_ring_is_another_one_and_not_from_a_failure(
    spelling, monkeypatch
):
    monkeypatch.setattr(server, "RETRY_S", 0.05)

    async def run():
        gateway = Gateway()
        gateway.spelling, gateway.down = spelling, {0}
        async with running(gateway) as (_, _, brain):
            before = dict(brain.keys._by_pair)
            await until(lambda: set(brain.doubted) == {0})
            if not spelling:
                await asyncio.sleep(0.2)
                assert brain.keys._by_pair == before
            gateway.down = set()
            await until(lambda: not brain.doubted)
            theirs = Ring([url + spelling for url in gateway.urls])
            for best in (0, 1):
                key, _ = brain.keys.key([best, 1 - best])
                assert theirs.pair(key)[0] == best
            assert spelling or brain.keys._by_pair == before

    asyncio.run(run())
