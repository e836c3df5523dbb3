"""What a worker tells a router of its cache, in bytes: messages, endpoints, keys. Beside the floor.

A subscriber's DEALER socket says ``SNAPSHOT`` to the worker's ROUTER socket. It is answered with a
``Snapshot``, and from then on with every ``Changes`` after it, numbered without gap, and a
``Beat`` several times a second. It says ``ALIVE`` now and then, or it is forgotten.
"""

import contextlib
import hashlib
import ipaddress
import os
import re
import socket
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import zmq
import zmq.utils.z85

from kvshare_sglang.errors import ConfigError

SNAPSHOT, ALIVE = b"snapshot", b"alive"
BEAT_S = 0.2  # between two beats
LAPSE_S = 10.0  # a subscriber that says nothing for so long is forgotten
TOKEN_ENV = "KVSHARE_STREAM_TOKEN"
SHORTEST_TOKEN = 16

# extra_key, cache_salt (as ``name_of`` says them), how often weights were replaced
Space = tuple[str | None, str | None, int]


def name_of(said: str) -> str:
    """What a tenant's key or salt is called on the wire and in the router: short whatever a client
    makes of it (megabytes, half a character that no encoding takes), and not the salt itself.

    >>> len(name_of("\\ud800" * 10**6))
    32
    """
    raw = said.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(raw, digest_size=16).hexdigest()


class Insert(msgspec.Struct, tag="insert", array_like=True, frozen=True):
    """A segment of the fuzzy tree; ``parent`` 0: none. ``tokens``: int32, little endian."""

    id: int
    space: Space
    start: int
    parent: int
    depth: int
    context: int
    near: int
    tokens: bytes


class Trim(msgspec.Struct, tag="trim", array_like=True, frozen=True):
    """The segment ends at path position ``stop`` now; at its start: it is gone."""

    id: int
    stop: int


class Clear(msgspec.Struct, tag="clear", array_like=True, frozen=True):
    """All of it is gone."""


class Changes(msgspec.Struct, tag="changes", array_like=True, frozen=True):
    """``number`` counts these messages; ``run`` names the life of the worker that they are of."""

    run: int
    number: int
    events: list[Insert | Trim | Clear]


class Snapshot(msgspec.Struct, tag="snapshot", array_like=True, frozen=True):
    """All segments after the changes up to ``number``, parents before their children. ``config``:
    the plug-in's options; ``secret`` seeds the tree's hashes."""

    run: int
    number: int
    secret: int
    page: int
    config: dict[str, Any]
    segments: list[Insert]


class Beat(msgspec.Struct, tag="beat", array_like=True, frozen=True):
    """Load. ``rows``: those that the waiting requests will run, as far as can be told;
    ``rows_per_s``: at what pace a queue was worked off lately, 0 where there was none. ``number``:
    of the last changes. ``default``: what requests get now that name no mode, empty: as configured.
    """

    run: int
    number: int
    weights: int
    running: int
    waiting: int
    rows: int
    rows_per_s: float
    default: str = ""


Message = Changes | Snapshot | Beat
encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(Message).decode


def check_endpoint(
    endpoint: str,
    token: str,
    *,
    flag: str = "--kvshare-stream",
    token_flag: str = "--kvshare-stream-token-file",
) -> None:
    """Raise ConfigError unless it is ``tcp://HOST:PORT`` or ``ipc://PATH``, and guarded by a token
    where more can reach it than its owner (a path) or this machine (TCP on loopback)."""
    tcp = re.fullmatch(r"tcp://(\[[0-9a-fA-F:]+\]|[^:/\s]+):(\d{1,5})", endpoint)
    if not (tcp and 0 < int(tcp[2]) < 65536) and not re.fullmatch(r"ipc://\S+", endpoint):
        raise ConfigError(flag, endpoint, "tcp://HOST:PORT or ipc://PATH")
    if token and len(token) < SHORTEST_TOKEN:
        # Not the token itself: it would be in the log.
        raise ConfigError(
            f"the token of {token_flag} or {TOKEN_ENV}",
            f"{len(token)} characters",
            f"{SHORTEST_TOKEN} or more",
        )
    # An abstract socket (``@``) has no permissions: any user of the machine can connect.
    alone = _is_local(tcp[1]) if tcp else not endpoint.startswith("ipc://@")
    if not token and not alone:
        raise ConfigError(
            flag, endpoint, f"ipc://PATH or of 127.0.0.1 without {token_flag} (or {TOKEN_ENV})"
        )


def _is_local(host: str) -> bool:
    """A name is resolved anew by each side, so only numbers count, and what is always this host."""
    if host == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    return False


def token_of(
    file: str,
    environment: Mapping[str, str] = os.environ,
    *,
    token_flag: str = "--kvshare-stream-token-file",
    variable: str = TOKEN_ENV,
) -> str:
    """The token in a file, without white space around it, or that of the environment; empty: none.

    Raises ConfigError where the file has none, which does not say what was given: a token that
    was meant for a flag must not get into a log.
    """
    if not file:
        return environment.get(variable, "")
    try:
        token = Path(file).read_text().strip()
    except (OSError, ValueError):
        token = ""
    if not token:
        raise ConfigError(token_flag, "another", "a file that can be read and holds a token")
    return token


def guard(sock: Any, token: str, *, server: bool) -> None:
    """Encrypt a socket before it is bound or connected (CurveZMQ). The keys of both sides come from
    the token, and a client cannot begin without knowing the server's: without the token no one gets
    past the handshake."""
    if not token:
        return
    if not zmq.has("curve"):
        raise ConfigError("the token of a stream", "set", "empty with a libzmq without CURVE")
    theirs = _secret_key(token, "server")
    mine = theirs if server else _secret_key(token, "client")
    sock.curve_secretkey, sock.curve_publickey = mine, zmq.curve_public(mine)
    if server:
        sock.curve_server = True
    else:
        sock.curve_serverkey = zmq.curve_public(theirs)


def _secret_key(token: str, side: str) -> bytes:
    raw = hashlib.scrypt(token.encode(), salt=f"kvshare {side}".encode(), n=2**12, r=8, p=1)
    key: bytes = zmq.utils.z85.encode(raw[:32])
    return key


def bind(sock: Any, endpoint: str) -> None:
    """Listen there; a unix socket is its owner's alone. Raises ConfigError where it is taken."""
    path = endpoint.removeprefix("ipc://")
    own = endpoint != path and not path.startswith("@")
    if own and _is_taken(path):  # ZeroMQ would take it over
        raise ConfigError("--kvshare-stream", endpoint, "a path that nothing else listens on")
    before = os.umask(0o177) if own else None
    try:
        sock.bind(endpoint)
    except zmq.ZMQError as error:
        raise ConfigError(
            "--kvshare-stream", endpoint, f"an address that can be listened on ({error})"
        ) from None
    finally:
        if before is not None:
            os.umask(before)


def _is_taken(path: str) -> bool:
    """Whether there is a file that is no socket, or a socket that someone listens on."""
    if not os.path.exists(path):
        return False
    if not stat.S_ISSOCK(os.stat(path).st_mode):
        return True
    with socket.socket(socket.AF_UNIX) as sock, contextlib.suppress(OSError):
        sock.connect(path)
        return True
    return False


def check_free(endpoint: str) -> None:
    """Raise ConfigError unless one can listen there now: said at the start of a server, not by one
    of its processes after minutes."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as sock:
        bind(sock, endpoint)
