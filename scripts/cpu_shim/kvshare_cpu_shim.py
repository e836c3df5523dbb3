"""Import hook for two packages that SGLang needs and that do not fit a CPU-only torch.

A .pth file imports this at interpreter start, so it costs nothing until one is imported:

- torchvision, built for CUDA, cannot load its operators, and its Python part then fails
  for want of their schemas. Two declared schemas are enough for that part to import.
- triton is not there at all, and SGLang imports it everywhere to define its kernels.
  Within SGLang a hollow package takes its place: kernels can be defined, not launched.
"""

import sys
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any


class _Hook:
    """The one finder; answers for a missing triton, and prepares torchvision in passing."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name == "torchvision":
            _declare_torchvision_ops()
        elif (
            name.partition(".")[0] == "triton"
            and "sglang" in sys.modules  # to all others a missing triton must look missing
            and PathFinder.find_spec("triton") is None
        ):
            return ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Hollow(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        if module.__name__ == "triton":
            module.__version__ = "3.0.0"
            module.cdiv = lambda x, y: -(x // -y)
            module.next_power_of_2 = lambda n: 1 << (n - 1).bit_length()


class _Hollow(ModuleType):
    """A module with every attribute: classes where capitalised, else decorators."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        full = f"{self.__name__}.{name}"
        if name[0].isupper() or name == "constexpr":
            value: Any = type(name, (_HollowClass,), {"__module__": self.__name__})
        else:
            value = sys.modules.setdefault(full, _Hollow(full))
            value.__path__ = []
        setattr(self, name, value)
        return value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """``@triton.jit`` and ``@triton.jit(...)``: hand back what is decorated."""
        if len(args) == 1 and callable(args[0]) and not kwargs:
            return args[0]
        return lambda decorated: decorated


class _HollowClass(Exception):
    """Takes any arguments, can be subclassed, subscripted, and named in ``except``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args)

    def __class_getitem__(cls, item: Any) -> type:
        return cls


@cache
def _declare_torchvision_ops() -> Any:
    """Return what holds the schemas: torch forgets them with it, so it stays cached."""
    spec = PathFinder.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return None
    import torch

    try:  # a build that fits this torch needs no help
        torch.ops.load_library(Path(spec.submodule_search_locations[0], "_C.so"))
    except OSError:
        ops = torch.library.Library("torchvision", "FRAGMENT")
        for op in ("nms", "qnms"):
            ops.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return ops


sys.meta_path.insert(0, _Hook())
