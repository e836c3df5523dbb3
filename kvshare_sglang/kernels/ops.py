"""Which kernel runs an op on which device: Triton's on a GPU, torch's everywhere.

A caller asks for an op and never for a kernel; what no Triton kernel serves, torch's twin does.
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
    from kvshare_sglang.kernels.gpu import rows as kernel

    programs = 1
    if torch.device(device).type == "cpu":
        shape = kernel.Shape(64, 64, 4, 1)
    else:
        card = torch.cuda.get_device_properties(device)
        shape = kernel.shape_of(dim, dtype, (card.major, card.minor))
        programs = PROGRAMS_OF_MULTIPROCESSOR * card.multi_processor_count
    if heads // kv_heads > shape.block_m:  # a tile would not hold one row
        return None
    return Attention(heads, kv_heads, shape, programs)


def copier(
    device: Any, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], rotary_dim: int
) -> Callable[..., None] | None:
    """What copies slots of a cache, given by layer, to slots, K re-rotated, in one launch:
    ``gpu.copy.run`` without its first argument. None where torch must do it."""
    if not has_triton(device):
        return None
    if keys[0].dtype.itemsize == 1 and torch.device(device).type == "cuda":
        card = torch.cuda.get_device_properties(device)
        if (card.major, card.minor) < (8, 9):  # no 8-bit floats
            return None
    from kvshare_sglang.kernels.gpu import copy as kernel

    try:
        layers = kernel.layers_of(keys, values)
    except ValueError as error:
        logger.warning("KVShare copies KV layer by layer: %s", error)
        return None
    if kernel.serves(layers, rotary_dim):
        return functools.partial(kernel.run, layers)
    logger.warning("KVShare copies KV layer by layer: %d dimensions are rotated", rotary_dim)
    return None


def attention_mass(
    q: torch.Tensor,
    positions: torch.Tensor,
    keys: torch.Tensor,
    *,
    scaling: float,
    strongest_head: bool = False,
) -> torch.Tensor:
    """The weight that rows give to each key; see ``row_scores.attention_mass``."""
    how: dict[str, Any] = {"scaling": scaling, "strongest_head": strongest_head}
    group = q.shape[1] // keys.shape[1]
    kind = (str(q.device), q.dtype, keys.dtype, q.shape[1:], keys.shape[1:], strongest_head)
    fits = _fits_tiles(q.shape[2]) and group <= 64
    if not fits or not has_triton(q.device) or kind in _MASS_FAILED:
        return row_scores.attention_mass(q, positions, keys, **how)
    from kvshare_sglang.kernels.gpu import mass as kernel

    try:
        return kernel.run(q, positions, keys, **how)
    except Exception:
        logger.exception("KVShare's kernel of attention mass does not run here; torch does it")
        _MASS_FAILED.add(kind)
        return row_scores.attention_mass(q, positions, keys, **how)


deviation = row_scores.deviation
plan_shift = rope_shift.plan_shift
rotate_keys = rope_shift.rotate_keys
