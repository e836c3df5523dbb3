"""The flags, how they reach every process, and what is refused at start. Root layer.

SGLang's ``ServerArgs`` keeps only its own fields; bookkeeping attributes with an underscore ride
along to child processes, and an environment variable tells a child's ``register()`` to hook.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable
from typing import Any

from kvshare_sglang.compat import check_version
from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.errors import KVShareError, UnsupportedError

ENV = "KVSHARE_LAUNCHER"  # process id of a launcher with kvshare on, for those it spawns
BACKEND = "kvshare"  # our name among --radix-cache-backend

# (attribute of ServerArgs, value that is served, what to call the rest, what to drop)
_SERVED: tuple[tuple[str, tuple[Any, ...], str, str], ...] = (
    ("tp_size", (1,), "tensor parallelism", "--tp-size"),
    ("dp_size", (1,), "data parallelism", "--dp-size"),
    ("pp_size", (1,), "pipeline parallelism", "--pp-size"),
    ("ep_size", (1,), "expert parallelism", "--ep-size"),
    ("attn_cp_size", (1,), "context parallelism", "--attn-cp-size"),
    ("dcp_size", (1,), "decode context parallelism", "--dcp-size"),
    ("attn_dp_size", (1,), "attention data parallelism", "--attn-dp-size"),
    ("nnodes", (1,), "several nodes", "--nnodes"),
    ("enable_kv_cache_sharding", (False,), "KV cache sharding", "--enable-kv-cache-sharding"),
    ("disaggregation_mode", ("null", None), "disaggregation", "--disaggregation-mode"),
    ("enable_hierarchical_cache", (False,), "HiCache", "--enable-hierarchical-cache"),
    ("hicache_storage_backend", (None,), "HiCache storage", "--hicache-storage-backend"),
    ("enable_lmcache", (False,), "LMCache", "--enable-lmcache"),
    ("enable_flexkv", (False,), "FlexKV", "--enable-flexkv"),
    (
        "enable_unified_cache_external_linker",
        (False,),
        "external cache storage",
        "--enable-unified-cache-external-linker",
    ),
    ("enable_hisparse", (False,), "HiSparse", "--enable-hisparse"),
    ("enable_unified_memory", (False,), "unified memory", "--enable-unified-memory"),
    ("kv_events_config", (None,), "KV events", "--kv-events-config"),
    ("speculative_algorithm", (None,), "speculative decoding", "--speculative-algorithm"),
    ("dllm_algorithm", (None,), "diffusion models", "--dllm-algorithm"),
    ("enable_streaming_session", (False,), "streaming sessions", "--enable-streaming-session"),
    (
        "enable_session_radix_cache",
        (False,),
        "session radix caches",
        "--enable-session-radix-cache",
    ),
    (
        "enable_deterministic_inference",
        (False,),
        "deterministic mode",
        "--enable-deterministic-inference",
    ),
    ("enable_pdmux", (False,), "PD multiplexing", "--enable-pdmux"),
    ("enable_two_batch_overlap", (False,), "two-batch overlap", "--enable-two-batch-overlap"),
    ("strip_thinking_cache", (False,), "stripped thinking caches", "--strip-thinking-cache"),
    ("enable_beam_search", (False,), "beam search", "--enable-beam-search"),
    (
        "enable_return_aux_hidden_states",
        (False,),
        "auxiliary hidden states",
        "--enable-return-aux-hidden-states",
    ),
    ("enable_nvidia_megakernel", (False,), "megakernels", "--enable-nvidia-megakernel"),
    ("enable_amd_monokernel", (False,), "megakernels", "--enable-amd-monokernel"),
    ("disable_radix_cache", (False,), "a disabled radix cache", "--disable-radix-cache"),
    ("is_embedding", (False,), "embedding models", "--is-embedding"),
    (
        "kv_cache_dtype",
        ("auto", "bfloat16", "bf16", "float16", "float32", "fp8_e4m3", "fp8_e5m2"),
        "this KV cache dtype",
        "--kv-cache-dtype",
    ),
    ("radix_cache_backend", (None, BACKEND), "another cache backend", "--radix-cache-backend"),
)

# (attribute of ServerArgs, value that is not served, what to call it, what to drop)
_REFUSED: tuple[tuple[str, Any, str, str], ...] = (
    (
        "radix_eviction_policy",
        "tlru",
        "an eviction policy of SGLang's unified cache",
        "--radix-eviction-policy tlru",
    ),
)


def check_served(server_args: Any) -> None:
    """Raise UnsupportedError for the first setting that is not served."""
    for name, served, what, flag in _SERVED:
        value = getattr(server_args, name, served[0])
        if value not in served and not (value is None and None not in served):
            raise UnsupportedError(what, f"{flag} (got {value!r})")
    for name, refused, what, flag in _REFUSED:
        if getattr(server_args, name, None) == refused:
            raise UnsupportedError(what, flag)


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
    check_version()
    server_args = make()
    check_served(server_args)
    os.environ[ENV] = str(os.getpid())  # tells the processes that this one spawns
    server_args._kvshare = config
    return server_args


# ---- hooks -----------------------------------------------------------------------------------


def hook_add_cli_args(original: Callable[..., Any], parser: argparse.ArgumentParser) -> None:
    """AROUND ``ServerArgs.add_cli_args``."""
    original(parser)
    add_flags(parser)


def hook_from_cli_args(original: Callable[..., Any], cls: type, args: argparse.Namespace) -> Any:
    """AROUND ``ServerArgs.from_cli_args``: a bad setting ends the start with one line."""
    from kvshare_sglang import hooks

    try:
        config = config_from(vars(args))
        if config is not None and args.radix_cache_backend is None:
            args.radix_cache_backend = BACKEND
        server_args = build(lambda: original(cls, args), config)
        if config is not None:
            hooks.install()
    except KVShareError as error:
        sys.exit(f"error: {error}")
    return server_args


def engine_server_args(**kwargs: Any) -> Any:
    """What ``sglang.Engine`` builds its ServerArgs with, so that ``Engine(kvshare=True)`` works."""
    from sglang.srt.server_args import ServerArgs

    from kvshare_sglang import hooks

    config = config_from(kwargs)
    if config is not None and kwargs.get("radix_cache_backend") is None:
        kwargs["radix_cache_backend"] = BACKEND
    server_args = build(lambda: ServerArgs(**kwargs), config)
    if config is not None:
        hooks.install()
    return server_args
