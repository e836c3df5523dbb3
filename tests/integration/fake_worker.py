"""A worker that computes nothing, for gateway and router: ``fake_worker.py PORT TEXT [STREAM]``.

It says that it holds ``TEXTS[TEXT]``, answers with its port, never where asked to ``hold`` that,
and streams chunks.
"""

import asyncio
import json
import os
import sys

import numpy as np
import zmq
import zmq.asyncio
from aiohttp import web

from kvshare_sglang import wire

TEXTS = [np.random.default_rng(i).integers(2, 900, 400).astype(np.int32) for i in range(2)]


def refuse_unnamed(request: web.Request) -> None:
    """As SGLang does."""
    if request.content_type != "application/json":
        raise web.HTTPBadRequest(text="Unsupported Media Type: Only 'application/json' is allowed")


async def generate(request: web.Request) -> web.StreamResponse:
    refuse_unnamed(request)
    body = await request.json()
    port = request.url.port
    if body.get("hold") == port:
        await asyncio.Event().wait()
    if not body.get("stream"):
        return web.json_response({"port": port, "seen": sorted(body), "pid": os.getpid()})
    reply = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await reply.prepare(request)
    for number in range(3):
        await reply.write(b"data: %s\n\n" % json.dumps({"port": port, "n": number}).encode())
    await reply.write(b"data: [DONE]\n\n")
    return reply


async def tokenize(request: web.Request) -> web.Response:
    refuse_unnamed(request)
    body = await request.json()
    return web.json_response({"tokens": list((body.get("prompt") or "").encode())})


async def info(request: web.Request) -> web.Response:
    return web.json_response({"model_path": "fake", "served_model_name": "fake", "version": "0"})


async def ok(request: web.Request) -> web.Response:
    return web.Response()


async def tell(endpoint: str, number: int) -> None:
    """The stream of a worker that holds one text and never changes."""
    sock = zmq.asyncio.Context.instance().socket(zmq.ROUTER)
    sock.bind(endpoint)
    text = wire.Insert(1, (None, None, 0), 0, 0, 0, 0, 0, TEXTS[number].tobytes())
    snapshot = wire.Snapshot(os.getpid(), 1, 0, 1, {}, [text])
    beat = wire.encode(wire.Beat(os.getpid(), 1, 0, 0, 0, 0, 0.0))
    known = set()
    while True:
        while await sock.poll(100):
            who, what = await sock.recv_multipart()
            if what == wire.SNAPSHOT:
                known.add(who)
                await sock.send_multipart([who, wire.encode(snapshot)])
        for who in known:
            await sock.send_multipart([who, beat])


async def serve(port: int, number: int, endpoint: str | None) -> None:
    app = web.Application()
    app.router.add_post("/generate", generate)
    app.router.add_post("/tokenize", tokenize)
    for path in (
        "/server_info",
        "/get_server_info",
        "/model_info",
        "/get_model_info",
        "/v1/models",
    ):
        app.router.add_get(path, info)
    app.router.add_get("/{path:.*}", ok)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, reuse_address=True).start()
    if endpoint:
        await tell(endpoint, number)
    await asyncio.Event().wait()


if __name__ == "__main__":
    port, number, *endpoint = sys.argv[1:]
    asyncio.run(serve(int(port), int(number), endpoint[0] if endpoint else None))
