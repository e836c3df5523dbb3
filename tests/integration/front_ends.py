"""Other ways to a server than its own HTTP: its native gRPC, and the gateway smg in front."""

import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any

import grpc
import requests

from kvshare_sglang.bench.processes import free_port
from kvshare_sglang.router import gateway

SERVICE = "/sglang.runtime.v1.SglangService/"


def field(number: int, value: bytes) -> bytes:
    """A field of a protobuf message: its tag, a varint of its length, its bytes."""
    length, out = len(value), bytes([number << 3 | 2])
    while length > 127:
        out += bytes([length & 127 | 128])
        length >>= 7
    return out + bytes([length]) + value


def fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """The fields of a message that hold bytes; numbers are passed over."""

    def varint() -> int:
        nonlocal at
        value, shift = 0, 0
        while True:
            byte = message[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    at = 0
    while at < len(message):
        tag = varint()
        size = varint()
        if tag & 7 == 2:
            yield tag >> 3, message[at : at + size]
            at += size


def call(port: int, method: str, message: bytes) -> list[bytes]:
    """What a method of the native gRPC server streams, as messages."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stream = channel.unary_stream(
            SERVICE + method, request_serializer=bytes, response_deserializer=bytes
        )
        return list(stream(message, timeout=60))


def openai(port: int, method: str, body: dict[str, Any], **headers: str) -> list[dict[str, Any]]:
    """``ChatComplete`` or ``Complete``: field 1 is OpenAI's JSON, field 2 maps headers."""
    message = field(1, json.dumps(body).encode())
    for name, value in headers.items():
        message += field(2, field(1, name.encode()) + field(2, value.encode()))
    found = [value for one in call(port, method, message) for n, value in fields(one) if n == 1]
    return [json.loads(value) for value in found]


def text(port: int, prompt: str) -> dict[str, str]:
    """``TextGenerate``, which takes no options: what its last answer tells of itself (field 2)."""
    last = call(port, "TextGenerate", field(1, prompt.encode()))[-1]
    pairs = [dict(fields(value)) for n, value in fields(last) if n == 2]
    return {pair[1].decode(): pair[2].decode() for pair in pairs}


@contextlib.contextmanager
def smg(worker: str) -> Iterator[str]:
    """The gateway in front of one worker; its address."""
    port, metrics = free_port(), free_port()
    more = ("--prometheus-port", str(metrics), "--log-level", "warn")
    more += ("--health-check-timeout-secs", "30")
    process = gateway.start(gateway.command([worker], host="127.0.0.1", port=port, more=more))
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + 60
    try:
        while not _serves(url):
            assert process.poll() is None, "smg has ended"
            assert time.monotonic() < end, "smg did not start"
            time.sleep(0.2)
        yield url
    finally:
        gateway.stop(process)


def _serves(url: str) -> bool:
    with contextlib.suppress(requests.RequestException):
        return requests.get(url + "/readiness", timeout=30).status_code == 200
    return False
