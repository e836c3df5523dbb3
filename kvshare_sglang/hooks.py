"""SEAMS: the one table of every touch on SGLang, and the check of each. Root layer."""

import importlib
from typing import Any, NamedTuple

from kvshare_sglang.args import BACKEND
from kvshare_sglang.errors import SeamError


class Seam(NamedTuple):
    """A function of SGLang that ``ours`` (``module:function``) wraps."""

    target: str
    kind: str  # a name of sglang's HookType
    ours: str
    why: str


# In every process, kvshare on or off: they add flags and change nothing else.
FLAG_SEAMS = (
    Seam(
        "sglang.srt.server_args.ServerArgs.add_cli_args",
        "AROUND",
        "kvshare_sglang.args:hook_add_cli_args",
        "the flags",
    ),
    Seam(
        "sglang.srt.server_args.ServerArgs.from_cli_args",
        "AROUND",
        "kvshare_sglang.args:hook_from_cli_args",
        "their values",
    ),
)

# Only with --kvshare.
SEAMS = (
    Seam(
        "sglang.srt.managers.schedule_policy.PrefillAdder.add_one_req",
        "AROUND",
        "kvshare_sglang.admission:hook_add_one_req",
        "match a request, lock its sources, admit it",
    ),
    Seam(
        "sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new",
        "AROUND",
        "kvshare_sglang.forward:hook_init_new",
        "copy KV and keep only the rows to compute",
    ),
    Seam(
        "sglang.srt.model_executor.model_runner.ModelRunner.init_attention_backends",
        "AFTER",
        "kvshare_sglang.forward:hook_init_attention_backends",
        "let attention see runs as rows",
    ),
    Seam(
        "sglang.srt.model_executor.model_runner.ModelRunner.forward",
        "AROUND",
        "kvshare_sglang.forward:hook_forward",
        "hand the rows to attention",
    ),
    Seam(
        "sglang.srt.model_executor.runner.prefill_cuda_graph_runner"
        ".PrefillCudaGraphRunner.can_run_graph",
        "AROUND",
        "kvshare_sglang.forward:hook_can_run_graph",
        "no graph replay for a partial batch",
    ),
    Seam(
        "sglang.srt.model_executor.runner.decode_cuda_graph_runner"
        ".DecodeCudaGraphRunner.can_run_graph",
        "AROUND",
        "kvshare_sglang.forward:hook_can_run_graph",
        "no graph replay where attention is looked at",
    ),
    Seam(
        "sglang.srt.sampling.sampling_params.SamplingParams.verify",
        "AFTER",
        "kvshare_sglang.admission:hook_verify",
        "refuse bad request options",
    ),
    Seam(
        "sglang.srt.managers.scheduler.validate_input_length",
        "AFTER",
        "kvshare_sglang.admission:hook_validate_input_length",
        "refuse a prompt of no tokens",
    ),
)


def install_flags() -> None:
    """Register the flags and the keyword of ``sglang.Engine``."""
    from sglang.srt.entrypoints.engine import Engine
    from sglang.srt.plugins.hook_registry import HookRegistry

    from kvshare_sglang import args

    _register(FLAG_SEAMS)
    HookRegistry.apply_hooks()
    Engine.server_args_class = staticmethod(args.engine_server_args)


def install() -> None:
    """Put every seam and the cache backend in place; safe to call again.

    Raises SeamError naming what is missing.
    """
    from sglang.srt.mem_cache.registry import (
        register_radix_cache_backend,
        registered_radix_cache_backends,
    )
    from sglang.srt.plugins.hook_registry import HookRegistry

    _register(SEAMS)
    HookRegistry.apply_hooks()
    if BACKEND not in registered_radix_cache_backends():
        from kvshare_sglang.cache import build_cache

        register_radix_cache_backend(BACKEND, build_cache)
    if gone := missing():
        raise SeamError(gone)


def missing() -> list[str]:
    """Targets in SEAMS that our hooks do not wrap at this moment."""
    return [seam.target for seam in SEAMS if not _applied(seam)]


def _register(seams: tuple[Seam, ...]) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for seam in seams:
        known = [hook for _, hook, _ in HookRegistry._hooks.get(seam.target, ())]
        ours = _resolve(seam.ours)
        if ours not in known:
            HookRegistry.register(seam.target, ours, HookType[seam.kind])


def _applied(seam: Seam) -> bool:
    """Whether the live function has ours in its chain of wrappers.

    SGLang's registry logs and goes on when a target is gone, so we look at the function itself.
    """
    import pkgutil

    try:
        found: Any = pkgutil.resolve_name(seam.target)
    except (ImportError, AttributeError):
        return False
    ours = _resolve(seam.ours)
    found = getattr(found, "__func__", found)
    while found is not None:
        cells = getattr(found, "__closure__", None) or ()
        if any(cell.cell_contents is ours for cell in cells):
            return True
        found = getattr(found, "__wrapped__", None)
    return False


def _resolve(path: str) -> Any:
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)
