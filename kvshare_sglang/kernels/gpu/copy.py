"""Copy cached KV to other slots, K re-rotated: one launch for K and V of all layers. Triton.

The rotation is that of ``kernels.rope_shift``, in fp32, on the model's own table. Each byte is read
once and written once.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

ROWS, LAYERS = 2, 8  # tokens and layers of a program: within 2% of the best on an H100


class Layers(NamedTuple):
    """Addresses of each layer's K and V, uint64 [layers]; ``key`` and ``value``: the first
    layer's buffers [slots, heads, dim], whose shape, strides and dtype all layers have."""

    keys: torch.Tensor
    values: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


# Tables of addresses by what they were made for: to make one, the host waits for the device.
_TABLES: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}
_MOST_TABLES = 8


def layers_of(keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> Layers:
    """Raises ValueError if the buffers of the layers are not alike."""
    key, value = keys[0], values[0]
    known_by = (
        *(key.device, key.dtype, key.shape, key.stride(), value.shape, value.stride()),
        *(buffer.data_ptr() for buffer in (*keys, *values)),
    )
    if known_by not in _TABLES:
        for buffers in (keys, values):
            _check_alike(buffers)
        if len(_TABLES) >= _MOST_TABLES:  # pools that are gone
            _TABLES.clear()

        def addresses(buffers: Sequence[torch.Tensor]) -> torch.Tensor:
            at = [buffer.data_ptr() for buffer in buffers]
            return torch.tensor(at, dtype=torch.uint64, device=key.device)

        _TABLES[known_by] = addresses(keys), addresses(values)
    return Layers(*_TABLES[known_by], key, value)


def _check_alike(buffers: Sequence[torch.Tensor]) -> None:
    first = buffers[0]
    for one in buffers:
        if (one.shape, one.stride(), one.dtype) != (first.shape, first.stride(), first.dtype):
            raise ValueError("the layers' KV buffers differ in shape, strides or dtype")
        if one.data_ptr() % 16:
            raise ValueError("a layer's KV buffer does not begin at a multiple of 16 bytes")
    if first.stride(-1) != 1 or first.stride(1) != first.shape[2]:
        raise ValueError(f"KV buffers of strides {first.stride()} cannot be copied in one pass")


@triton.jit
def _buffer(table, layer, like):
    """Where a layer's buffer is. Without the hint each access is 2 bytes wide: nothing tells the
    compiler that an address from a table is aligned."""
    return tl.multiple_of(tl.load(table + layer).to(like.dtype), 16)


@triton.jit(do_not_specialize=["n", "first_layer", "num_layers"])
def _copy(
    k_table,  # uint64 [layers]
    v_table,
    k_like,  # any buffer of K: its type
    v_like,
    src,  # [n] slots
    dst,
    old,  # [n] positions
    new,
    angles,  # fp32 [positions, 2 * HALF]: m cos | m sin
    n,
    first_layer,
    num_layers,
    k_stride,  # elements from slot to slot
    v_stride,
    angle_stride,
    HEADS: tl.constexpr,
    HEADS_P2: tl.constexpr,
    K_DIM: tl.constexpr,
    V_ROW: tl.constexpr,  # elements of V of a token
    V_ROW_P2: tl.constexpr,
    HALF: tl.constexpr,  # rotary_dim / 2, a power of two
    REST: tl.constexpr,  # dimensions that carry no position, up to a power of two; 0: none
    NEOX: tl.constexpr,
    LARGEST: tl.constexpr,  # of an 8-bit type, which would overflow to nan; 0: any
    ROWS: tl.constexpr,
    LAYERS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = rows < n
    s = tl.load(src + rows, mask=live, other=0).to(tl.int64)
    t = tl.load(dst + rows, mask=live, other=0).to(tl.int64)
    a = tl.load(old + rows, mask=live, other=0).to(tl.int64)
    b = tl.load(new + rows, mask=live, other=0).to(tl.int64)

    i = tl.arange(0, HALF)
    at_a = angles + a[:, None] * angle_stride + i[None, :]
    at_b = angles + b[:, None] * angle_stride + i[None, :]
    m = live[:, None]
    cos_a = tl.load(at_a, mask=m, other=1.0)
    sin_a = tl.load(at_a + HALF, mask=m, other=0.0)
    cos_b = tl.load(at_b, mask=m, other=1.0)
    sin_b = tl.load(at_b + HALF, mask=m, other=0.0)
    scale = 1.0 / (cos_a * cos_a + sin_a * sin_a)
    cos = ((cos_b * cos_a + sin_b * sin_a) * scale)[:, None, :]
    sin = ((sin_b * cos_a - cos_b * sin_a) * scale)[:, None, :]

    h = tl.arange(0, HEADS_P2)
    mk = live[:, None, None] & (h < HEADS)[None, :, None]
    if NEOX:
        one, two = i, i + HALF
    else:
        one, two = 2 * i, 2 * i + 1
    head = h[None, :, None] * K_DIM
    k_from = s[:, None, None] * k_stride + head
    k_to = t[:, None, None] * k_stride + head
    e = tl.arange(0, V_ROW_P2)
    mv = live[:, None] & (e < V_ROW)[None, :]
    v_from = s[:, None] * v_stride + e[None, :]
    v_to = t[:, None] * v_stride + e[None, :]

    begin = first_layer + tl.program_id(1) * LAYERS
    for layer in range(begin, tl.minimum(begin + LAYERS, first_layer + num_layers)):
        k = _buffer(k_table, layer, k_like)
        x = tl.load(k + k_from + one[None, None, :], mask=mk, other=0.0).to(tl.float32)
        y = tl.load(k + k_from + two[None, None, :], mask=mk, other=0.0).to(tl.float32)
        u = x * cos - y * sin
        w = y * cos + x * sin
        if LARGEST > 0:
            u = tl.minimum(tl.maximum(u, -LARGEST), LARGEST)
            w = tl.minimum(tl.maximum(w, -LARGEST), LARGEST)
        tl.store(k + k_to + one[None, None, :], u.to(k_like.dtype.element_ty), mask=mk)
        tl.store(k + k_to + two[None, None, :], w.to(k_like.dtype.element_ty), mask=mk)
        if REST > 0:
            r = tl.arange(0, REST)
            mr = mk & (r < K_DIM - 2 * HALF)[None, None, :]
            rest = 2 * HALF + r[None, None, :]
            tl.store(k + k_to + rest, tl.load(k + k_from + rest, mask=mr), mask=mr)
        v = _buffer(v_table, layer, v_like)
        tl.store(v + v_to, tl.load(v + v_from, mask=mv), mask=mv)


def serves(layers: Layers, rotary_dim: int) -> bool:
    """Whether the kernel can rotate such keys; the torch twin takes any."""
    half = rotary_dim // 2
    return half & (half - 1) == 0 and rotary_dim <= layers.key.shape[2]


def run(
    layers: Layers,
    src: torch.Tensor,
    dst: torch.Tensor,
    old: torch.Tensor,
    new: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    *,
    is_neox: bool,
    first_layer: int = 0,
) -> None:
    """As ``kernels.rope_shift.copy_kv``."""
    n, num_layers = len(src), len(layers.keys) - first_layer
    if n == 0 or num_layers <= 0:
        return
    key, value = layers.key, layers.value
    heads, k_dim = key.shape[1:]
    rest = k_dim - cos_sin_cache.shape[1]
    v_row = heads * value.shape[2]
    _copy[(triton.cdiv(n, ROWS), triton.cdiv(num_layers, LAYERS))](
        layers.keys,
        layers.values,
        key,
        value,
        src,
        dst,
        old,
        new,
        cos_sin_cache,
        n,
        first_layer,
        num_layers,
        key.stride(0),
        value.stride(0),
        cos_sin_cache.stride(0),
        HEADS=heads,
        HEADS_P2=triton.next_power_of_2(heads),
        K_DIM=k_dim,
        V_ROW=v_row,
        V_ROW_P2=triton.next_power_of_2(v_row),
        HALF=cos_sin_cache.shape[1] // 2,
        REST=triton.next_power_of_2(rest) if rest else 0,
        NEOX=is_neox,
        LARGEST=float(torch.finfo(key.dtype).max) if key.dtype.itemsize == 1 else 0.0,
        ROWS=ROWS,
        LAYERS=LAYERS,
    )
