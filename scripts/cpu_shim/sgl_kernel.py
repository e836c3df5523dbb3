"""Stand-in for SGLang's compiled CPU operators, of which no wheel is published.

SGLang imports a dozen of them by name when ``SGLANG_USE_CPU_ENGINE=1``; all serve
speculative decoding. Any ``*_cpu`` name can be imported here and raises when called.
Nothing is registered under ``torch.ops.sgl_kernel``: SGLang would take that for AMX kernels.
"""

from collections.abc import Callable
from typing import Any, NoReturn


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if not name.endswith("_cpu"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def absent(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name}: no compiled kernels on this CPU machine")

    return absent
