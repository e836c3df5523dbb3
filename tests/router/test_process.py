"""The router as a process of its own: how it starts and how it ends."""

import asyncio
import contextlib
import resource
import signal
import subprocess
import sys
import time

import aiohttp
import pytest
from aiohttp import web

from kvshare_sglang.bench.processes import free_port
from kvshare_sglang.router.__main__ import _open_many
from kvshare_sglang.router.gateway import stop

WORKER = "http://127.0.0.1:9"  # nobody is there


@contextlib.asynccontextmanager
async def router(*words, start=("-m", "kvshare_sglang.router")):
    """A router; the process and its URL."""
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, *start, "--worker", WORKER, "--port", str(port), *words),
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield process, f"http://127.0.0.1:{port}"
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@contextlib.asynccontextmanager
async def gateway(answer):
    """Its address."""

    async def handle(request):
        return web.Response() if request.path == "/health" else await answer(request)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    port = free_port()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        await runner.cleanup()


async def up(process, url):
    end = time.monotonic() + 60
    async with aiohttp.ClientSession() as client:
        while time.monotonic() < end and process.returncode is None:
            with contextlib.suppress(aiohttp.ClientError):
                async with client.get(url + "/health"):
                    return
            await asyncio.sleep(0.05)
    raise AssertionError("the router did not start")


@pytest.mark.parametrize(("takes_s", "whole"), [(1.5, True), (60, False)])
def test_an_answer_under_way_may_take_as_long_as_was_said_when_the_router_ends(takes_s, whole):
    drain_s = 30 if whole else 4

    async def slow(request):
        reply = web.StreamResponse()
        await reply.prepare(request)
        await reply.write(b"first ")
        await asyncio.sleep(takes_s)
        await reply.write(b"last")
        return reply

    async def run():
        async with (
            gateway(slow) as there,
            router("--gateway", there, "--drain-seconds", str(drain_s)) as (process, url),
            aiohttp.ClientSession() as client,
        ):
            await up(process, url)
            async with client.post(url + "/generate", json={"input_ids": [1]}) as reply:
                assert await reply.content.readany() == b"first "
                began = time.monotonic()
                process.send_signal(signal.SIGTERM)
                if whole:
                    assert await reply.read() == b"last"
                else:
                    with pytest.raises(aiohttp.ClientError):
                        await reply.read()
            assert await asyncio.wait_for(process.wait(), 60) == 128 + signal.SIGTERM
            took = time.monotonic() - began
            assert took < drain_s if whole else drain_s <= took < takes_s

    asyncio.run(run())


FEW_FILES = """
import resource, sys
from kvshare_sglang.router.__main__ import main
_, most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (100, most))
sys.exit(main(sys.argv[1:]))
"""


def test_more_streams_pass_at_a_time_than_files_may_be_open_at_first():
    async def run():
        end = asyncio.Event()

        async def stream(request):
            reply = web.StreamResponse()
            await reply.prepare(request)
            await reply.write(b"first")
            await end.wait()
            return reply

        async with (
            gateway(stream) as there,
            router("--gateway", there, start=("-c", FEW_FILES)) as (process, url),
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as client,
        ):
            await up(process, url)
            asked = [client.post(url + "/generate", json={"input_ids": [1]}) for _ in range(150)]
            replies = await asyncio.gather(*asked)
            assert {reply.status for reply in replies} == {200}
            assert {await reply.content.readany() for reply in replies} == {b"first"}
            end.set()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("soft", "hard", "becomes", "told"),
    [
        (1024, 1 << 20, 65535, ""),
        (1024, resource.RLIM_INFINITY, 65535, ""),
        (65535, 1 << 20, None, ""),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, None, ""),
        (1024, 4096, 4096, "about 2048 requests"),
        (4096, 4096, None, "about 2048 requests"),
    ],
)
def test_it_takes_as_many_files_as_it_may_and_says_where_they_are_few(
    soft, hard, becomes, told, monkeypatch, caplog
):
    taken = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: taken.append(limits))
    _open_many()
    assert taken == ([] if becomes is None else [(becomes, hard)])
    assert told in caplog.text
    assert bool(told) == bool(caplog.text)


SMG = """
import signal, sys, time
def end(*_):
    time.sleep({end_s})
    sys.exit()
signal.signal(signal.SIGTERM, end)
print(flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(("drain_s", "end_s", "code"), [(60, 1, 0), (0, 60, -signal.SIGKILL)])
def test_the_gateway_gets_as_long(drain_s, end_s, code):
    words = [sys.executable, "-c", SMG.format(end_s=end_s)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, start_new_session=True) as process:
        process.stdout.readline()
        stop(process, drain_s=drain_s)
        assert process.returncode == code


STARTS = """
import sys
from kvshare_sglang.router import __main__, gateway
_, smg, *words = sys.argv
gateway.command = lambda *_, **__: [sys.executable, "-c", smg]
sys.exit(__main__.main(words))
"""


@pytest.mark.parametrize("lives_s", [0, 3])
def test_a_router_ends_with_the_gateway_that_it_started(lives_s):
    smg = f"import sys, time; time.sleep({lives_s}); sys.exit(7)"

    async def run():
        async with router("--launch-gateway", start=("-c", STARTS, smg)) as (process, _):
            _, told = await asyncio.wait_for(process.communicate(), 60)
            assert process.returncode == 1
            said = [line for line in told.decode().splitlines() if line.startswith("error: ")]
            assert said == [
                "error: smg has ended with code 7, see what it said; is --gateway-port 30100 free?"
            ]
            assert "Traceback" not in told.decode()

    asyncio.run(run())
