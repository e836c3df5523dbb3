"""Which kernel runs an op on which device: Triton's on a GPU, torch's everywhere.

A caller asks for an op and never for a kernel; what no Triton kernel serves, torch's twin does. Ops
on tensors are torch's custom ops too, so that they can be traced. Attention of scattered rows is
not: it is called in every layer, and half of its plan are sizes of launches.
"""

import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from kvshare_sglang.kernels import rope_shift, row_scores

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "triton", "torch")
# Attention programs that keep a GPU busy: a few for each multiprocessor, for tiles end at
# different times.
PROGRAMS_OF_MULTIPROCESSOR = 4
# Devices, types and shapes for which the kernel of attention mass could not be launched.
_MASS_FAILED: set[Any] = set()


def has_triton(device: Any) -> bool:
    """Whether Triton's kernels run there: on a GPU, or on a CPU in Triton's interpreter."""
    kind = torch.device(device).type
    interpreted = kind == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    return (kind == "cuda" or interpreted) and importlib.util.find_spec("triton") is not None


def _fits_tiles(dim: int) -> bool:
    """Whether products over heads of this size are served: powers of two, from 16 on."""
    return dim >= 16 and dim & (dim - 1) == 0


class Attention(NamedTuple):
    """Of rows anywhere in their requests, over paged KV: the launch for one model on one device."""

    heads: int
    kv_heads: int
    shape: Any
    programs: int
    profile_shape: Any = None  # None where no kernel of profiles serves such heads

    def plan(
        self, rows: Sequence[tuple[int, int]], positions: torch.Tensor, owners: torch.Tensor
    ) -> Any:
        """For a batch; see ``gpu.rows.plan``."""
        from kvshare_sglang.kernels.gpu import rows as kernel

        return kernel.plan(rows, positions, owners, **self._launch)

    def fixed_plan(
        self, size: int, room: int, positions: torch.Tensor, owners: torch.Tensor
    ) -> Any:
        """For batches of that size, to be recorded; see ``gpu.rows.fixed_plan``."""
        from kvshare_sglang.kernels.gpu import rows as kernel

        return kernel.fixed_plan(size, room, positions, owners, **self._launch)

    def fixed_tiles(self, rows: Sequence[tuple[int, int]], *, size: int, room: int) -> np.ndarray:
        """What such a plan's tiles must hold; see ``gpu.rows.fixed_tiles``."""
        from kvshare_sglang.kernels.gpu import rows as kernel

        block_m = self.shape.block_m
        return kernel.fixed_tiles(rows, size=size, room=room, group=self._group, block_m=block_m)

    @property
    def tile_rows(self) -> int:
        return int(self.shape.block_m // self._group)

    @property
    def _group(self) -> int:
        """Query heads of a KV head."""
        return self.heads // self.kv_heads

    @property
    def _launch(self) -> dict[str, Any]:
        """What all plans of the model share."""
        own = {"group": self._group, "kv_heads": self.kv_heads}
        return {**own, "shape": self.shape, "programs": self.programs}

    def run(self, plan: Any, q: torch.Tensor, *buffers: torch.Tensor, **scales: float) -> Any:
        """For a layer; see ``gpu.rows.run``."""
        from kvshare_sglang.kernels.gpu import rows as kernel

        return kernel.run(plan, q, *buffers, shape=self.shape, **scales)

    def profile(
        self,
        rows: Sequence[tuple[int, int]],
        positions: torch.Tensor,
        owners: torch.Tensor,
        q: torch.Tensor,
        *buffers: torch.Tensor,
        scaling: float,
    ) -> Any:
        """What a batch's rows give to keys so far behind them, fp32 [rows, edges]; ``rows``,
        ``positions`` and ``owners`` as for ``plan``, ``buffers`` as for ``gpu.profile.run``."""
        from kvshare_sglang.kernels.gpu import profile as kernel
        from kvshare_sglang.kernels.gpu import rows as tiles

        shape = self.profile_shape
        plan = tiles.plan(rows, positions, owners, **{**self._launch, "shape": shape})
        return kernel.run(plan, q, *buffers, scaling=scaling, shape=shape)

    def warm_up(self, dtype: torch.dtype, *buffers: torch.Tensor, **scales: float) -> None:
        """Compile what batches will need, so that no request waits for it. Writes nowhere."""
        device = buffers[0].device
        at, owner = torch.arange(2, device=device), torch.zeros(1, dtype=torch.int64, device=device)
        plan = self.plan([(2, 2)], at, owner)
        q = torch.zeros(2, self.heads, buffers[0].shape[2], dtype=dtype, device=device)
        self.run(plan, q, *buffers, scaling=1.0, **scales)
        for strongest_head in (True, False):
            attention_mass(q, at, buffers[0][:2], scaling=1.0, strongest_head=strongest_head)


def attention(
    device: Any, dtype: torch.dtype, *, heads: int, kv_heads: int, dim: int, v_dim: int
) -> Attention | None:
    """None where no kernel of ours serves such heads: the host's backend does."""
    if not has_triton(device) or dim != v_dim or not _fits_tiles(dim):
        return None
    from kvshare_sglang.kernels.gpu import profile
    from kvshare_sglang.kernels.gpu import rows as kernel

    programs = 1
    profile_shape: Any = profile.shape_of(dim, dtype)
    if torch.device(device).type == "cpu":
        shape = kernel.Shape(64, 64, 4, 1)
    else:
        card = torch.cuda.get_device_properties(device)
        shape = kernel.shape_of(dim, dtype, (card.major, card.minor))
        programs = PROGRAMS_OF_MULTIPROCESSOR * card.multi_processor_count
    if heads // kv_heads > shape.block_m:  # a tile would not hold one row
        return None
    if heads // kv_heads > profile_shape.block_m:
        profile_shape = None
    return Attention(heads, kv_heads, shape, programs, profile_shape)


# ---- ops on tensors, registered under ``torch.ops.kvshare`` ------------------------------------
# ``backend``: "auto" takes Triton's kernel where one serves, else torch's; by name ("triton",
# "torch") an op runs so or raises ValueError. Registered by ``Library``, as SGLang registers its
# own: ``torch.library.custom_op`` costs 20 us a call. For all devices at once, since what runs is
# chosen inside, and with a shape function for tracing.

_LIBRARY = torch.library.Library("kvshare", "DEF")


def _register(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    _LIBRARY._register_fake(name, fake)
    return getattr(torch.ops.kvshare, name).default


def _by_triton(op: str, backend: str, why_not: str | None) -> bool:
    """Whether Triton's kernel runs. ``why_not``: what keeps it from that, if anything. Raises
    ValueError for a backend that there is not, or not here."""
    if backend not in BACKENDS:
        raise ValueError(f"backend of {op} must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "triton" and why_not is not None:
        raise ValueError(f"{op} can't run by backend 'triton': {why_not}")
    return backend != "torch" and why_not is None


_NO_KERNEL = "there is no such kernel, torch's runs everywhere"


def _no_triton(device: torch.device) -> str | None:
    return None if has_triton(device) else f"Triton does not run on {device}"


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def rotate_keys(
    keys: torch.Tensor, shift: rope_shift.Shift, *, is_neox: bool, backend: str = "auto"
) -> torch.Tensor:
    """Keys at their new positions; see ``rope_shift.rotate_keys``."""
    return _rotate_keys(keys, shift.cos, shift.sin, is_neox, backend)


def _run_rotate_keys(
    keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, is_neox: bool, backend: str
) -> torch.Tensor:
    _by_triton("rotate_keys", backend, _NO_KERNEL)
    return rope_shift.rotate_keys(keys, rope_shift.Shift(cos, sin), is_neox=is_neox)


_rotate_keys = _register(
    "rotate_keys(Tensor keys, Tensor cos, Tensor sin, bool is_neox, str backend) -> Tensor",
    _run_rotate_keys,
    lambda keys, cos, sin, is_neox, backend: keys.new_empty(keys.shape),
)


def deviation(fresh: torch.Tensor, cached: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """How far each row of ``cached`` is from ``fresh``; see ``row_scores.deviation``."""
    return _deviation(fresh, cached, backend)


def _run_deviation(fresh: torch.Tensor, cached: torch.Tensor, backend: str) -> torch.Tensor:
    _by_triton("deviation", backend, _NO_KERNEL)
    return row_scores.deviation(fresh, cached)


_deviation = _register(
    "deviation(Tensor fresh, Tensor cached, str backend) -> Tensor",
    _run_deviation,
    lambda fresh, cached, backend: fresh.new_empty(len(fresh), dtype=torch.float32),
)


def attention_mass(
    q: torch.Tensor,
    positions: torch.Tensor,
    keys: torch.Tensor,
    *,
    scaling: float,
    strongest_head: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """The weight that rows give to each key; see ``row_scores.attention_mass``."""
    return _attention_mass(q, positions, keys, scaling, strongest_head, backend)


def _run_attention_mass(
    q: torch.Tensor,
    positions: torch.Tensor,
    keys: torch.Tensor,
    scaling: float,
    strongest_head: bool,
    backend: str,
) -> torch.Tensor:
    how: dict[str, Any] = {"scaling": scaling, "strongest_head": strongest_head}
    why_not = _no_triton(q.device) or _no_mass(q, keys)
    if not _by_triton("attention_mass", backend, why_not):
        return row_scores.attention_mass(q, positions, keys, **how)
    kind = (q.device, q.dtype, keys.dtype, q.shape[1:], keys.shape[1:], strongest_head)
    if backend == "auto" and kind in _MASS_FAILED:
        return row_scores.attention_mass(q, positions, keys, **how)
    from kvshare_sglang.kernels.gpu import mass as kernel

    try:
        return kernel.run(q, positions, keys, **how)
    except Exception:
        if backend == "triton":
            raise
        logger.exception("KVShare's kernel of attention mass does not run here; torch does it")
        _MASS_FAILED.add(kind)
        return row_scores.attention_mass(q, positions, keys, **how)


def _no_mass(q: torch.Tensor, keys: torch.Tensor) -> str | None:
    """Why the kernel does not serve such heads."""
    dim, group = q.shape[2], q.shape[1] // keys.shape[1]
    served = _fits_tiles(dim) and group <= 64
    return None if served else f"heads of {dim}, {group} to a KV head"


_attention_mass = _register(
    "attention_mass(Tensor q, Tensor positions, Tensor keys, float scaling, bool strongest_head,"
    " str backend) -> Tensor",
    _run_attention_mass,
    lambda q, positions, keys, *how: q.new_empty(len(keys), dtype=torch.float32),
)


def copy_kv(
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    src: torch.Tensor,
    dst: torch.Tensor,
    old: torch.Tensor,
    new: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    *,
    is_neox: bool,
    first_layer: int = 0,
    backend: str = "auto",
) -> None:
    """Copy slots of a cache, K re-rotated; see ``rope_shift.copy_kv``. In one launch where Triton
    runs and the layers' buffers are alike."""
    _copy_kv(keys, values, src, dst, old, new, cos_sin_cache, is_neox, first_layer, backend)


def _run_copy_kv(
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    src: torch.Tensor,
    dst: torch.Tensor,
    old: torch.Tensor,
    new: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    is_neox: bool,
    first_layer: int,
    backend: str,
) -> None:
    if not keys or len(keys) != len(values):
        raise ValueError(
            f"copy_kv takes as many layers of K as of V, got {len(keys)}, {len(values)}"
        )
    how: dict[str, Any] = {"is_neox": is_neox, "first_layer": first_layer}
    layers, why_not = None, _no_triton(keys[0].device)
    if why_not is None and backend != "torch":
        layers, why_not = _layers_of(keys, values, cos_sin_cache.shape[1])
        if layers is None:
            _warn_once(f"KVShare copies KV layer by layer: {why_not}")
    if not _by_triton("copy_kv", backend, why_not) or layers is None:
        rope_shift.copy_kv(keys, values, src, dst, old, new, cos_sin_cache, **how)
        return
    from kvshare_sglang.kernels.gpu import copy as kernel

    kernel.run(layers, src, dst, old, new, cos_sin_cache, **how)


def _layers_of(
    keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], rotary_dim: int
) -> tuple[Any, str | None]:
    """The layers as the kernel takes them, or why it can't."""
    if keys[0].dtype.itemsize == 1 and keys[0].is_cuda:
        card = torch.cuda.get_device_properties(keys[0].device)
        if (card.major, card.minor) < (8, 9):
            return None, "this GPU has no 8-bit floats"
    from kvshare_sglang.kernels.gpu import copy as kernel

    try:
        layers = kernel.layers_of(keys, values)
    except ValueError as error:
        return None, str(error)
    if kernel.serves(layers, rotary_dim):
        return layers, None
    return None, f"{rotary_dim} dimensions are rotated"


_copy_kv = _register(
    "copy_kv(Tensor(a!)[] keys, Tensor(b!)[] values, Tensor src, Tensor dst, Tensor old,"
    " Tensor new, Tensor cos_sin_cache, bool is_neox, int first_layer, str backend) -> ()",
    _run_copy_kv,
    lambda *args: None,
)
