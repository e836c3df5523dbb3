"""The flags, how they reach every process of a server, and the cache that SGLang builds for them.

SGLang's ``ServerArgs`` keeps only its own fields; bookkeeping attributes with an underscore ride
along to child processes, and an environment variable tells a child's ``register()`` to hook.
"""

import argparse
import dataclasses
import functools
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.errors import KVShareError, SeamError, StartError
from kvshare_sglang.runtime import calibration, doors, hooks, versions
from kvshare_sglang.runtime.hooks import BACKEND

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

    from kvshare_sglang.runtime.cache.radix import FuzzyRadixCache

logger = logging.getLogger(__name__)

ENV = "KVSHARE_LAUNCHER"  # process id of a launcher with kvshare on, for those it spawns

_server = False  # this process starts a server: what it refuses is one line


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


def config_from(values: dict[str, Any], *, eviction_given: bool) -> KVShareConfig | None:
    """Take ``kvshare`` and ``kvshare_*`` out of ``values``; None when kvshare is off.

    ``--radix-cache-backend kvshare`` switches it on as well: the way where only SGLang's own names
    pass. ``eviction_given``: the user named a policy of SGLang's, which stays unless ours is named
    too. Raises ConfigError on a bad value, also when kvshare is off but an option was given, and
    StartError for a calibration that is not the model's.
    """
    names = [spec.name for spec in dataclasses.fields(KVShareConfig)]
    given = {name: values.pop("kvshare_" + name, None) for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    on = bool(values.pop("kvshare", False)) or values.get("radix_cache_backend") == BACKEND
    if values.get("schedule_policy") == BACKEND:
        if not on:
            raise KVShareError("--schedule-policy kvshare needs --kvshare")
        given["schedule"] = BACKEND
        values["schedule_policy"] = "fcfs"  # of which SGLang leaves the order to us
    if given and not on:
        KVShareConfig(**given)
        flags = ", ".join("--kvshare-" + name.replace("_", "-") for name in given)
        raise KVShareError(f"{flags} given without --kvshare")
    if not on:
        return None
    if eviction_given:
        given.setdefault("eviction", "sglang")
    if values.get("radix_cache_backend") is None:
        values["radix_cache_backend"] = BACKEND
    config = KVShareConfig(**given)
    theirs = values.get("schedule_policy")
    if config.schedule == BACKEND and theirs not in (None, "fcfs"):
        raise KVShareError(f"--kvshare-schedule kvshare and --schedule-policy {theirs}: drop one")
    return calibration.settled(
        config,
        given=given,
        model=str(values.get("model_path")),
        revision=values.get("revision"),
        on_cpu=_keeps_profiles(values),
    )


def _keeps_profiles(values: dict[str, Any]) -> bool:
    """Whether traces will choose rows on a CPU, as far as is known before the model is loaded."""
    lora = values.get("enable_lora") or values.get("lora_paths")
    eight_bits = str(values.get("kv_cache_dtype") or "auto").startswith("fp8")
    return versions.device_of(values.get("device")) == "cpu" and not lora and not eight_bits


def build(make: Callable[[], Any], config: KVShareConfig | None, values: dict[str, Any]) -> Any:
    """Build a ServerArgs with kvshare on (a config) or off (None). ``values``: its fields."""
    if config is None:
        return make()
    from kvshare_sglang.runtime import preflight, support

    versions.check_version()
    preflight.check(values, config)
    server_args = make()
    support.check_settings(server_args)
    if config.schedule == BACKEND:
        support.check_settings(server_args, support.WITH_OUR_ORDER)
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
    for action in parser._actions:
        if action.dest == "radix_eviction_policy":
            # Absent unless given: an "lru" that was asked for is told from SGLang's default.
            action.default = argparse.SUPPRESS
        elif action.dest == "schedule_policy":
            action.choices = [*(action.choices or ()), BACKEND]


def hook_from_cli_args(original: Callable[..., Any], cls: type, args: argparse.Namespace) -> Any:
    """AROUND ``ServerArgs.from_cli_args``: a bad setting ends the start with one line."""
    values = vars(args)
    try:
        check_config_file(values.get("config"))
        config = config_from(values, eviction_given="radix_eviction_policy" in values)
        return build(lambda: original(cls, args), config, values)
    except KVShareError as error:
        sys.exit(f"error: {error}")


def check_config_file(path: str | None) -> None:
    """Raise StartError where a file of options asks for kvshare and SGLang has not read it:
    it reads ``--config FILE`` of a server, no other spelling and in no benchmark."""
    if path is not None and Path(path).is_file() and _asks_for_us(Path(path).read_text()):
        raise StartError(
            f"SGLang does not read {path} here, and it asks for kvshare: give --config {path} to a "
            "server, with a space and no '=', or --kvshare on the command line"
        )


def _asks_for_us(text: str) -> bool:
    """Whether a file of options switches kvshare on, or might: one that is no YAML."""
    import yaml

    try:
        said = yaml.safe_load(text)
    except yaml.YAMLError:
        return "kvshare" in text
    return isinstance(said, dict) and any(
        (name == "kvshare" and value is not False)
        or name.startswith("kvshare_")
        or (name in ("radix_cache_backend", "schedule_policy") and value == "kvshare")
        for name, value in ((str(key).replace("-", "_"), value) for key, value in said.items())
    )


def config_of_a_benchmark(argv: Sequence[str]) -> str | None:
    """The ``--config`` of one of SGLang's benchmarks, which parses its options before plug-ins are
    loaded, takes this one and reads no file. Other programs' options are their own."""
    program = Path(argv[0] if argv else "")  # none where Python is embedded
    theirs = "benchmark" in program.parts or program.name.startswith("bench")
    if "sglang" not in program.parts or not theirs:
        return None
    for i, word in enumerate(argv):
        if word == "--config":
            return argv[i + 1] if i + 1 < len(argv) else None
        if word.startswith("--config="):
            return word.partition("=")[2]
    return None


def hook_prepare_server_args(server_args: Any, *args: Any, **kw: Any) -> None:
    """AFTER ``prepare_server_args``, which only servers call."""
    global _server
    _server = True
    from kvshare_sglang.runtime import preflight

    if getattr(server_args, "_kvshare", None) is not None:
        try:
            preflight.check_listeners(server_args)
        except KVShareError as error:
            sys.exit(f"error: {error}")


def hook_check_server_args(
    original: Callable[..., Any], server_args: Any, *args: Any, **kw: Any
) -> Any:
    """AROUND ``ServerArgs.check_server_args``, the last before the processes start. A ServerArgs
    that was built without us has kvshare on if it names our cache backend."""
    check_engine_keywords()
    if server_args.schedule_policy == BACKEND:
        raise StartError(
            "ServerArgs(schedule_policy='kvshare') is read by nobody: give it to "
            "kvshare_sglang.plugin.server_args(kvshare=True, ...) instead"
        )
    if (
        getattr(server_args, "_kvshare", None) is None
        and server_args.radix_cache_backend == BACKEND
    ):
        from kvshare_sglang.runtime import preflight

        values = {name: getattr(server_args, name) for name in preflight.FIELDS}
        # Here SGLang's default cannot be told from an "lru" that was asked for.
        config = config_from(values, eviction_given=server_args.radix_eviction_policy != "lru")
        build(lambda: server_args, config, values)
    if getattr(server_args, "_kvshare", None) is None:
        check_config_file(config_of_a_benchmark(sys.argv))
        os.environ.pop(ENV, None)
    else:
        from kvshare_sglang.runtime import support

        try:
            support.check_settings(versions.resolved(server_args))  # what other settings imply
        except KVShareError as error:
            if not _server:
                raise
            sys.exit(f"error: {error}")
        install()  # it may have been built in another process
        doors.install()
        os.environ[ENV] = str(os.getpid())  # tells the processes that this one spawns
    return original(server_args, *args, **kw)


def hook_start_scheduler(
    original: Callable[..., Any], scheduler: Any, server_args: Any, *args: Any, **kw: Any
) -> None:
    """AROUND ``Scheduler.__init__``: what only the process with the model can tell, such as a KV
    pool that is too small, ends the start with one line, too."""
    from kvshare_sglang.runtime import preflight

    try:
        original(scheduler, server_args, *args, **kw)
    except Exception as error:
        launcher = os.getppid()
        if os.environ.get(ENV) != str(launcher):
            raise
        is_ours = isinstance(error, KVShareError)
        refusal = error if is_ours else preflight.too_little_memory(error, server_args)
        if refusal is None:
            raise
        print(f"error: {refusal}", file=sys.stderr, flush=True)
        os.kill(launcher, signal.SIGQUIT)  # by which SGLang ends all its processes
        sys.exit(1)


def check_engine_keywords() -> None:
    """Raise StartError where ``Engine`` was given options of ours beside ``server_args``: SGLang
    drops them unread, before plug-ins are loaded, so that only its frame still knows of them."""
    engine = getattr(sys.modules.get("sglang.srt.entrypoints.engine"), "Engine", None)
    if engine is None:  # no one can be in it, and its import takes seconds
        return
    frame = sys._getframe()
    while (caller := frame.f_back) is not None:
        frame = caller
        if frame.f_code is engine.__init__.__code__:
            given = frame.f_locals["kwargs"]
            ours = [name for name in given if name.partition("_")[0] == "kvshare"]
            if ours and "server_args" in given:
                raise StartError(
                    f"Engine was given {', '.join(ours)} beside server_args, where SGLang reads no "
                    "other keyword: build server_args with kvshare_sglang.plugin.server_args(...)"
                )


def engine_server_args(**kwargs: Any) -> Any:
    """What ``sglang.Engine`` builds its ServerArgs with, so that ``Engine(kvshare=True)`` works."""
    from sglang.srt.server_args import ServerArgs

    config = config_from(kwargs, eviction_given="radix_eviction_policy" in kwargs)
    return build(lambda: ServerArgs(**kwargs), config, kwargs)


def serve_backend() -> Any:
    """``sglang serve --model-type kvshare``: its servers for language models, with ``--kvshare``.

    ``sglang serve --help`` loads no plug-ins, but names the types of models that these add and
    where their help is; this is our place in it (SGLang 0.5.21 and later).
    """
    from sglang.cli.serve_backends import SERVE_BACKEND_API_VERSION, ServeBackend

    return ServeBackend(api_version=SERVE_BACKEND_API_VERSION, run=_serve)


def _serve(request: Any) -> None:
    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args

    load_plugins()
    run_server(prepare_server_args(["--kvshare", *request.argv]))


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
    from kvshare_sglang.policy.select.attention_trace import AttentionTrace, probe_layer
    from kvshare_sglang.runtime import (
        attention,
        copying,
        preflight,
        profiles,
        support,
        trace_graphs,
    )
    from kvshare_sglang.runtime.cache.radix import FuzzyRadixCache, prometheus_labels
    from kvshare_sglang.runtime.report import Report
    from kvshare_sglang.runtime.scheduler import accepts_blended
    from kvshare_sglang.runtime.shadow import Shadow

    server_args: ServerArgs = ctx.server_args
    config = getattr(server_args, "_kvshare", None)
    if config is None:
        raise SeamError(["ServerArgs._kvshare (of ServerArgs.check_server_args)"])
    hooks.check()
    runner = ctx.tp_worker.model_runner
    support.check_model(runner, ctx)
    preflight.check_pool(ctx.params.token_to_kv_pool_allocator.size, config)
    choosing = support.choosing(config, runner)
    if choosing.unserved is not None:
        logger.warning(
            "KVShare: %s chooses rows instead of %s (%s)",
            choosing.structural.name,
            choosing.asked.name,
            choosing.unserved.value,
        )
    attention.choose_kernel(runner, config)
    copying.warm_up(runner)
    layers = len(runner.model.model.layers)
    if isinstance(choosing.asked, AttentionTrace) and choosing.unserved is None:
        state = runner.attn_backend.kvshare
        state.recorded = trace_graphs.record(runner, probe_layer(layers, config.probe_at))
        state.profiles = profiles.of_server(runner, config)
    elif config.depends_at:
        logger.warning("KVShare: --kvshare-depends-at is of trace, which chooses nothing here")
    logger.info("KVShare is on: %s", config)
    text, is_warning = calibration.told(config, layers=layers, model=server_args.model_path)
    logger.log(logging.WARNING if is_warning else logging.INFO, "%s", text)
    if not versions.knows_salts():
        logger.warning(
            "KVShare: this SGLang drops cache_salt in /generate and Vertex: name tenants there by"
            " extra_key, or by the header X-KVShare-Salt"
        )
    report = Report(prometheus_labels=prometheus_labels(server_args))
    shadow = Shadow(config, report)
    cache = FuzzyRadixCache(
        ctx.params,
        config=config,
        report=report,
        choosing=choosing,
        shadow=shadow,
        accepts=functools.partial(accepts_blended, config, shadow),
    )
    cache.serves_adapters = getattr(runner, "lora_manager", None) is not None
    return cache
