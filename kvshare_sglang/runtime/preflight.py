"""What ends a start before anything of it is touched: checkpoint, architecture, pool and ports.

SGLang finds these out later, some in a child process after the weights are loaded, and says them
with a traceback. What cannot be told cheaply here is left to it and to ``support.check_model``;
``too_little_memory`` is how it is told of memory, once the weights are there.
"""

import json
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvshare_sglang import wire
from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.errors import StartError
from kvshare_sglang.runtime import support, versions

# Fields of SGLang's ServerArgs that are looked at.
FIELDS = (
    *("model_path", "load_format", "trust_remote_code", "revision", "json_model_override_args"),
    *("model_config_parser", "decrypted_config_file", "max_total_tokens", "radix_cache_backend"),
    *("nccl_port", "dist_init_addr", "nnodes"),
)
CONFIGS = ("config.json", "params.json")  # of transformers, of Mistral
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")


def check(values: Mapping[str, Any], config: KVShareConfig) -> None:
    """Raise StartError, ConfigError or UnsupportedError for what a server cannot start from.

    ``values`` holds those of ``FIELDS`` that were given.
    """
    check_checkpoint(values)
    if config.stream:
        wire.check_endpoint(config.stream, wire.token_of(config.stream_token_file))
        wire.check_free(config.stream)
    if values.get("max_total_tokens") is not None:
        check_pool(values["max_total_tokens"], config)
    check_rendezvous(values)


def check_checkpoint(values: Mapping[str, Any]) -> None:
    """Raise StartError unless ``model_path`` is a model, UnsupportedError for an architecture
    that is not served."""
    path = str(values.get("model_path"))
    if path.lower() in ("none", "dummy") or "://" in path or Path(path).is_file():
        return  # no checkpoint, a remote store, GGUF
    if values.get("decrypted_config_file"):
        return  # its config is somewhere else
    if Path(path).is_dir():
        _check_folder(Path(path), values.get("load_format") or "auto")
    elif path.startswith(("/", ".", "~")) or path.count("/") > 1:
        raise StartError(f"--model-path {path}: there is no such directory")
    elif os.environ.get("SGLANG_USE_MODELSCOPE", "").lower() in ("1", "true"):
        return  # SGLang downloads it later
    support.check_architecture(_config_of(path, values))


def _check_folder(folder: Path, load_format: str) -> None:
    if not any((folder / name).is_file() for name in CONFIGS):
        only = " (only a tokenizer)" if any(folder.glob("tokenizer*")) else ""
        raise StartError(f"--model-path {folder} is not a model{only}: it has no config.json")
    if load_format == "auto" and not any(any(folder.glob(name)) for name in WEIGHTS):
        raise StartError(f"--model-path {folder} has no weights ({', '.join(WEIGHTS)})")


def _config_of(path: str, values: Mapping[str, Any]) -> Any:
    """The checkpoint's config, read as SGLang reads it."""
    from sglang.srt.utils.hf_transformers_utils import get_config

    try:
        return get_config(
            path,
            trust_remote_code=bool(values.get("trust_remote_code")),
            revision=values.get("revision"),
            model_override_args=json.loads(values.get("json_model_override_args") or "{}"),
            model_config_parser=values.get("model_config_parser") or "auto",
        )
    except Exception as error:  # whatever it is, SGLang would end for it as well
        what = (
            "cannot be read" if Path(path).is_dir() else "is no directory and no model of the hub"
        )
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise StartError(f"--model-path {path} {what}: {reason}") from error


def least_pool(config: KVShareConfig) -> int:
    """The fewest tokens of KV with which a request can ever reuse: a source that is worth it, the
    copy of it, and the end of the prompt, which always runs."""
    return 2 * config.min_reuse + config.seam


def check_pool(size: int, config: KVShareConfig) -> None:
    """Raise StartError for a KV pool of so few tokens that no request could reuse."""
    if size < least_pool(config):
        raise StartError(
            f"a KV pool of {size} tokens is too small for one prompt that reuses, at least "
            f"{least_pool(config)} are needed: raise --max-total-tokens or --mem-fraction-static, "
            "or lower --kvshare-min-reuse"
        )


def too_little_memory(error: Exception, server_args: Any) -> StartError | None:
    """What a start ends with where SGLang found no memory for a KV pool, which it says by the flag
    to raise; None for any other error."""
    if not re.search(r"(raise|increase) --mem-fraction-static", str(error), re.IGNORECASE):
        return None
    fraction = versions.resolved(server_args).mem_fraction_static
    return StartError(
        f"--mem-fraction-static {fraction} leaves no room for a KV pool, at least "
        f"{least_pool(server_args._kvshare)} tokens are needed: {str(error).splitlines()[0]}"
    )


def check_listeners(server_args: Any) -> None:
    """Raise StartError unless a server could listen where it will."""
    check_port(server_args.host, server_args.port)
    flag, port = "--grpc-port", getattr(server_args, "grpc_port", None)
    if port is None:
        flag, port = "SGLANG_GRPC_PORT", os.environ.get("SGLANG_GRPC_PORT")
    if str(port).isdecimal():  # what is no number, SGLang says
        check_port(server_args.host, int(str(port)), said=f"{flag} {port}")


def check_rendezvous(values: Mapping[str, Any]) -> None:
    """Raise StartError unless torch could listen where the processes of a model find each other;
    it does so on every address, also where there is one process."""
    address, port = values.get("dist_init_addr"), values.get("nccl_port")
    said = f"--nccl-port {port}"
    if address:
        port, said = address.rpartition(":")[2], f"--dist-init-addr {address}"
    elsewhere = os.environ.get("SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE")
    if str(port).isdecimal() and not elsewhere and (values.get("nnodes") or 1) == 1:
        check_port("0.0.0.0", int(str(port)), said=said)


def check_port(host: str, port: int, *, said: str | None = None) -> None:
    """Raise StartError unless a server could listen there; binds as SGLang's server does.
    ``said``: how the user named the port."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise StartError(
                f"{said or f'--host {host} --port {port}'} cannot be listened on ({reason}): "
                "choose another port"
            ) from None
