"""The flags, how they reach every process of a server, and the cache that SGLang builds for them.

SGLang's ``ServerArgs`` keeps only its own fields; bookkeeping attributes with an underscore ride
along to child processes, and an environment variable tells a child's ``register()`` to hook.
"""

import argparse
import dataclasses
import logging
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.errors import KVShareError, SeamError
from kvshare_sglang.runtime import doors, hooks, versions
from kvshare_sglang.runtime.hooks import BACKEND

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

    from kvshare_sglang.runtime.cache.radix import FuzzyRadixCache

logger = logging.getLogger(__name__)

ENV = "KVSHARE_LAUNCHER"  # process id of a launcher with kvshare on, for those it spawns


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add ``--kvshare`` and one ``--kvshare-*`` option for each field of the config."""
    group = parser.add_argument_group("kvshare")
    group.add_argument(
        "--kvshare",
        action="store_true",
        default=False,
        help="Reuse cached KV of moved and edited text too, not only of an exact prefix.",
    )
    for spec in dataclasses.fields(KVShareConfig):
        group.add_argument(
            "--kvshare-" + spec.name.replace("_", "-"),
            type=type(spec.default),
            default=None,
            help=f"KVShare: {spec.metadata['help']}. Default: {spec.default}.",
        )


def config_from(values: dict[str, Any]) -> KVShareConfig | None:
    """Take ``kvshare`` and ``kvshare_*`` out of ``values``; None when kvshare is off.

    Raises ConfigError on a bad value, also when kvshare is off but an option was given.
    """
    names = [spec.name for spec in dataclasses.fields(KVShareConfig)]
    given = {name: values.pop("kvshare_" + name, None) for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    on = bool(values.pop("kvshare", False))
    config = KVShareConfig(**given)
    if given and not on:
        flags = ", ".join("--kvshare-" + name.replace("_", "-") for name in given)
        raise KVShareError(f"{flags} given without --kvshare")
    return config if on else None


def build(make: Callable[[], Any], config: KVShareConfig | None) -> Any:
    """Build a ServerArgs with kvshare on (a config) or off (None); publish which it is."""
    if config is None:
        os.environ.pop(ENV, None)
        return make()
    from kvshare_sglang.runtime import support

    versions.check_version()
    server_args = make()
    support.check_settings(server_args)
    os.environ[ENV] = str(os.getpid())  # tells the processes that this one spawns
    server_args._kvshare = config
    # In its dictionary: ServerArgs lets no one set a name that does not begin with an underscore.
    server_args.__dict__["get_tokenizer_worker_class"] = tokenizer_worker_class
    install()
    doors.install()
    return server_args


# ---- hooks -----------------------------------------------------------------------------------


def hook_add_cli_args(original: Callable[..., Any], parser: argparse.ArgumentParser) -> None:
    """AROUND ``ServerArgs.add_cli_args``."""
    original(parser)
    add_flags(parser)


def hook_from_cli_args(original: Callable[..., Any], cls: type, args: argparse.Namespace) -> Any:
    """AROUND ``ServerArgs.from_cli_args``: a bad setting ends the start with one line."""
    try:
        config = config_from(vars(args))
        if config is not None and args.radix_cache_backend is None:
            args.radix_cache_backend = BACKEND
        return build(lambda: original(cls, args), config)
    except KVShareError as error:
        sys.exit(f"error: {error}")


def engine_server_args(**kwargs: Any) -> Any:
    """What ``sglang.Engine`` builds its ServerArgs with, so that ``Engine(kvshare=True)`` works."""
    from sglang.srt.server_args import ServerArgs

    config = config_from(kwargs)
    if config is not None and kwargs.get("radix_cache_backend") is None:
        kwargs["radix_cache_backend"] = BACKEND
    return build(lambda: ServerArgs(**kwargs), config)


# ---- in place --------------------------------------------------------------------------------


def install_flags() -> None:
    """Register the flags and the keyword of ``sglang.Engine``."""
    from sglang.srt.entrypoints.engine import Engine

    hooks.register(hooks.FLAGS)
    if hasattr(Engine, "server_args_class"):  # else the check at start names it
        Engine.server_args_class = staticmethod(engine_server_args)


def install() -> None:
    """Put every hook and the cache backend in place; safe to call again.

    Raises SeamError naming what is missing.
    """
    from sglang.srt.mem_cache.registry import (
        register_radix_cache_backend,
        registered_radix_cache_backends,
    )

    hooks.register(hooks.WRAPPED)
    if BACKEND not in registered_radix_cache_backends():
        register_radix_cache_backend(BACKEND, build_cache)
    hooks.check()


def tokenizer_worker_class() -> type:
    """What SGLang asks the ServerArgs for in each worker of ``--tokenizer-worker-num``.

    It loads no plug-ins there, so we come with the ServerArgs.
    """
    from sglang.srt.managers.multi_tokenizer_mixin import TokenizerWorker

    install_flags()
    install()
    doors.install()
    return TokenizerWorker


def build_cache(ctx: Any) -> "FuzzyRadixCache":
    """What SGLang calls for ``--radix-cache-backend kvshare``.

    Raises SeamError or UnsupportedError rather than build a cache without the rest of us.
    """
    from kvshare_sglang.runtime import support
    from kvshare_sglang.runtime.cache.radix import FuzzyRadixCache, prometheus_labels
    from kvshare_sglang.runtime.report import Report

    server_args: ServerArgs = ctx.server_args
    config = getattr(server_args, "_kvshare", None)
    if config is None:
        raise SeamError(["ServerArgs._kvshare (give --kvshare, not --radix-cache-backend)"])
    hooks.check()
    runner = ctx.tp_worker.model_runner
    support.check_model(runner, ctx)
    choosing = support.choosing(config, runner)
    if choosing.unserved is not None:
        logger.warning(
            "KVShare: %s chooses rows instead of %s (%s)",
            choosing.structural.name,
            choosing.asked.name,
            choosing.unserved.value,
        )
    logger.info("KVShare is on: %s", config)
    return FuzzyRadixCache(
        ctx.params,
        config=config,
        report=Report(prometheus_labels=prometheus_labels(server_args)),
        choosing=choosing,
    )
