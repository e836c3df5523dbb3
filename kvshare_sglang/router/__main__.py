"""``python -m kvshare_sglang.router``: start the router, and the gateway with it if asked to."""

import argparse
import contextlib
import logging
import resource
import secrets
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple
from urllib.parse import urlsplit

import uvicorn

from kvshare_sglang import wire
from kvshare_sglang.errors import ConfigError, KVShareError, StartError
from kvshare_sglang.router import gateway
from kvshare_sglang.router.brain import Brain
from kvshare_sglang.router.metrics import Metrics
from kvshare_sglang.router.prompts import Prompts
from kvshare_sglang.router.server import Settings, make_app

logger = logging.getLogger(__name__)

MOST_FILES = 65535  # open at a time; a request that passes has two, its client's and its own
TOKEN_FLAG = "--stream-token-file"
KEY_FLAG, KEY_ENV = "--worker-api-key-file", "KVSHARE_WORKER_API_KEY"


class Worker(NamedTuple):
    url: str
    stream: str


def parse_worker(text: str) -> Worker:
    """``http://HOST:PORT`` and, after ``=``, where its stream is. Raises ConfigError.

    >>> parse_worker("http://127.0.0.1:30000=ipc:///run/a.ipc")
    Worker(url='http://127.0.0.1:30000', stream='ipc:///run/a.ipc')
    """
    url, _, stream = text.partition("=")
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and not parts.query
        port = parts.port
    except ValueError:
        good, port = False, None
    if not good or port is None or parts.path.strip("/"):
        raise ConfigError("--worker", text, "http://HOST:PORT or http://HOST:PORT=STREAM")
    return Worker(url.rstrip("/"), stream)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kvshare_sglang.router",
        description="Send each request to the SGLang worker that has most of it cached.",
    )
    add = parser.add_argument
    add("--worker", action="append", required=True, metavar="URL[=STREAM]",
        help="a worker, as the gateway knows it, and what its --kvshare-stream is")  # fmt: skip
    add("--gateway", metavar="URL",
        help="where smg listens: smg launch --policy consistent_hashing ...")  # fmt: skip
    add("--launch-gateway", action="store_true", help="start smg, on --gateway-port")
    add("--gateway-port", type=int, default=30100)
    add("--gateway-arg", action="append", default=[], metavar="ARG",
        help="one more argument for smg, as --gateway-arg=--flag")  # fmt: skip
    add("--model-path", metavar="DIR",
        help="the workers' model, for its tokenizer; without it only input_ids count")  # fmt: skip
    add("--trust-remote-code", action="store_true")
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=30080)
    add(TOKEN_FLAG, default="", metavar="FILE",
        help=f"as the workers' --kvshare-stream-token-file; else {wire.TOKEN_ENV}")  # fmt: skip
    add(KEY_FLAG, default="", metavar="FILE",
        help=f"the workers' --api-key, for the router's own requests; else {KEY_ENV}")  # fmt: skip
    add("--drain-seconds", type=int, default=180, metavar="S",
        help="how long answers under way may take once the router is asked to end, its gateway's"
        " too; default: 180, as smg's own")  # fmt: skip
    add("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    logging.basicConfig(level=args.log_level.upper(), format="%(asctime)s %(message)s")
    # uvicorn passes a signal on once it is through: it must not end us before the gateway is ended.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        if args.drain_seconds < 0:
            raise ConfigError("--drain-seconds", args.drain_seconds, "0 or more")
        _open_many()
        with _gateway(args) as (url, process):
            _serve(args, url, process)
    except KVShareError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _open_many() -> None:
    """Let this process, and a gateway that it starts, have more files open than the usual 1,024: as
    many as SGLang's server takes, or as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft == resource.RLIM_INFINITY or soft >= MOST_FILES:
        return
    if soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if most < MOST_FILES:
        told = "%d files may be open at a time, so about %d requests: see ulimit -Hn"
        logger.warning(told, most, most // 2)


@contextlib.contextmanager
def _gateway(args: argparse.Namespace) -> Iterator[tuple[str, gateway.Process | None]]:
    """Where the gateway is, and its process where the router started it: it lives as long as the
    router."""
    if args.launch_gateway == (args.gateway is not None):
        raise ConfigError("--gateway", args.gateway, "given, or --launch-gateway, and not both")
    if args.gateway is not None:
        yield parse_worker(args.gateway).url, None
        return
    urls = [parse_worker(text).url for text in args.worker]
    more = ["--shutdown-grace-period-secs", str(args.drain_seconds), *args.gateway_arg]
    command = gateway.command(urls, host="127.0.0.1", port=args.gateway_port, more=more)
    process = gateway.start(command)
    try:
        yield f"http://127.0.0.1:{args.gateway_port}", process
    finally:
        gateway.stop(process, drain_s=args.drain_seconds)


def _serve(args: argparse.Namespace, url: str, process: gateway.Process | None) -> None:
    workers = [parse_worker(text) for text in args.worker]
    token = wire.token_of(args.stream_token_file, token_flag=TOKEN_FLAG)
    for one in workers:
        if one.stream:
            wire.check_endpoint(one.stream, token, flag="--worker", token_flag=TOKEN_FLAG)
    key = wire.token_of(args.worker_api_key_file, token_flag=KEY_FLAG, variable=KEY_ENV)
    prompts = Prompts()
    if args.model_path:
        prompts = Prompts.load(args.model_path, trust_remote_code=args.trust_remote_code)
    urls = [one.url for one in workers]
    brain = Brain(urls, prompts, Metrics(), secret=secrets.randbits(63))
    settings = Settings(url, tuple(one.stream for one in workers), token, key)
    config = uvicorn.Config(
        make_app(brain, settings),
        host=args.host,
        port=args.port,
        log_level=args.log_level,
        access_log=False,
        server_header=False,  # the worker's own
        date_header=False,
        timeout_graceful_shutdown=args.drain_seconds,
    )
    server = uvicorn.Server(config)
    if process is not None:
        threading.Thread(target=_end_with, args=(process, server), daemon=True).start()
    server.run()
    if process is not None:  # a signal would not have come to here
        raise StartError(
            f"smg has ended with code {process.wait()}, see what it said; is --gateway-port"
            f" {args.gateway_port} free?"
        )


def _end_with(process: gateway.Process, server: uvicorn.Server) -> None:
    """A router whose gateway is gone can only refuse: who watches over it shall start both anew."""
    process.wait()
    server.should_exit = True


if __name__ == "__main__":
    sys.exit(main())
