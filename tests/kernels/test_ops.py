"""Ops as torch sees them: schemas, shape functions, mutation; and which backend a caller gets."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from kvshare_sglang.kernels import ops, reference, rope_shift

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 64
SIZES = st.integers(0, 9)
TYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
FEW = settings(max_examples=20, deadline=None)
ROWS = torch.randn(3, 2, 4)


def angles(rotary_dim):
    freq = 1.0 / 100.0 ** (torch.arange(0, rotary_dim, 2).double() / rotary_dim)
    angle = torch.arange(LIMIT).double()[:, None] * freq
    return torch.cat((angle.cos(), angle.sin()), dim=-1).float(), freq


def rotation(rows, heads, dim, rotary_dim, dtype):
    table, _ = angles(rotary_dim)
    old, new = torch.randint(0, LIMIT, (2, rows)).unbind()
    return torch.randn(rows, heads, dim).to(dtype), *rope_shift.plan_shift(table, old, new)


def cache(layers, slots, heads, dim, dtype):
    return [[torch.randn(slots, heads, dim).to(dtype) for _ in range(layers)] for _ in range(2)]


@st.composite
def calls(draw):
    """Any of the ops with arguments of any shape that it takes."""
    torch.manual_seed(draw(st.integers(0, 99)))
    n, heads, half, dtype = (
        draw(SIZES),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 4)),
        draw(TYPES),
    )
    dim = 2 * half + draw(st.sampled_from([0, 3]))
    match draw(st.sampled_from(["rotate_keys", "deviation", "attention_mass", "copy_kv"])):
        case "rotate_keys":
            keys, cos, sin = rotation(n, heads, dim, 2 * half, dtype)
            return ops._rotate_keys, (keys, cos, sin, draw(st.booleans()), "torch")
        case "deviation":
            fresh, cached = torch.randn(2, n, heads, dim).to(dtype).unbind()
            return ops._deviation, (fresh, cached, "torch")
        case "attention_mass":
            kv, rows = draw(st.integers(1, 20)), draw(st.integers(1, 5))
            q = torch.randn(rows, 2 * heads, dim).to(dtype)
            at = torch.randint(0, kv, (rows,))
            keys = torch.randn(kv, heads, dim).to(dtype)
            return ops._attention_mass, (q, at, keys, 0.3, draw(st.booleans()), "torch")
        case _:
            keys, values = cache(draw(st.integers(1, 3)), 2 * n + 1, heads, dim, dtype)
            src, dst = torch.randperm(2 * n).view(2, n).unbind()
            old, new = torch.randint(0, LIMIT, (2, n)).unbind()
            first = draw(st.integers(0, len(keys)))
            return ops._copy_kv, (
                keys, values, src, dst, old, new, angles(2 * half)[0], True, first, "torch",
            )  # fmt: skip


@FEW
@given(calls())
def test_shapes_without_data_are_those_of_the_real_result(call):
    op, args = call
    real = op(*args)
    with FakeTensorMode() as mode:
        fakes = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, args)
        fake = op(*fakes)
    if real is None:
        assert fake is None
        return
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@settings(max_examples=8, deadline=None)
@given(calls())
def test_each_op_passes_torchs_own_checks(call):
    """Schema (what is mutated, what aliases what), shape function, tracing."""
    op, args = call
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    assert set(torch.library.opcheck(op, args, test_utils=checks).values()) == {"SUCCESS"}


def test_ops_are_traced_whole():
    """A compiled caller keeps them as they are: no break, the same numbers."""
    fresh, cached = torch.randn(2, 5, 2, 4).unbind()
    keys, cos, sin = rotation(5, 2, 4, 4, torch.float32)

    def run():
        turned = ops.rotate_keys(keys, rope_shift.Shift(cos, sin), is_neox=True)
        mass = ops.attention_mass(turned, torch.arange(5), keys, scaling=0.5)
        return ops.deviation(fresh, cached) + mass

    traced = torch.compile(run, backend="eager", fullgraph=True)()
    torch.testing.assert_close(traced, run(), rtol=0, atol=0)


NEEDS_TRITON = pytest.mark.skipif(not ops.has_triton("cpu"), reason="needs Triton")
BACKENDS = ["torch", pytest.param("triton", marks=NEEDS_TRITON)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_neox", [True, False])
def test_copies_are_the_sources_turned_to_their_new_positions(is_neox, backend):
    (keys, values), (table, freq) = cache(3, 12, 2, 6, torch.float32), angles(4)
    before = [[one.clone() for one in side] for side in (keys, values)]
    src, dst = torch.tensor([1, 7, 3]), torch.tensor([10, 0, 4])
    old, new = torch.tensor([5, 9, 63]), torch.tensor([50, 9, 0])
    how = {"is_neox": is_neox, "first_layer": 1}
    ops.copy_kv(keys, values, src, dst, old, new, table, **how, backend=backend)
    for layer, (was_k, was_v) in enumerate(zip(*before, strict=True)):
        if layer >= 1:
            was_k[dst] = reference.rotate_keys(was_k[src], new - old, freq, is_neox=is_neox).float()
            was_v[dst] = was_v[src]
        torch.testing.assert_close(keys[layer], was_k, rtol=2e-5, atol=2e-5)
        assert values[layer].equal(was_v)


@NEEDS_TRITON
@pytest.mark.parametrize("strongest_head", [True, False])
def test_attention_mass_is_the_same_by_name(strongest_head):
    q, keys, at = torch.randn(3, 4, 16), torch.randn(9, 2, 16), torch.tensor([4, 6, 8])
    how = {"scaling": 0.3, "strongest_head": strongest_head}
    want = reference.attention_mass(q, at, keys, **how)
    for backend in ops.BACKENDS:
        found = ops.attention_mass(q, at, keys, **how, backend=backend)
        torch.testing.assert_close(found.double(), want, rtol=2e-5, atol=2e-5)


@NEEDS_TRITON
def test_buffers_that_one_launch_cannot_serve_are_copied_layer_by_layer():
    keys, values = cache(2, 4, 1, 4, torch.float32)
    keys[1] = torch.randn(5, 1, 4)
    none, table = torch.tensor([0]), angles(4)[0]
    args = keys, values, none, none + 1, none, none, table
    with pytest.raises(ValueError, match=r"copy_kv can't run .*: the layers' KV buffers differ"):
        ops.copy_kv(*args, is_neox=True, backend="triton")
    ops.copy_kv(*args, is_neox=True)
    assert all(one[1].equal(one[0]) for one in (*keys, *values))


def test_layers_of_one_side_alone_are_refused():
    none = torch.empty(0, dtype=torch.int64)
    for keys, values in ([], []), ([ROWS], []):
        with pytest.raises(ValueError, match=f"of K as of V, got {len(keys)}, 0"):
            ops.copy_kv(keys, values, none, none, none, none, angles(4)[0], is_neox=True)


def test_copies_of_8_bits_are_bytes():
    keys, values = cache(1, 4, 1, 4, torch.float8_e4m3fn)
    at, zero = torch.tensor([1]), torch.tensor([0])
    ops.copy_kv(keys, values, zero, at, zero, zero, angles(4)[0], is_neox=True, backend="torch")
    for (one,) in (keys, values):
        assert one[1].view(torch.uint8).equal(one[0].view(torch.uint8))


# ---- backends ----------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["deviation", "rotate_keys", "attention_mass", "copy_kv"])
def test_a_backend_that_there_is_not_is_named(op):
    with pytest.raises(ValueError, match=rf"backend of {op} must be one of .*, got 'cutlass'"):
        call(op, ROWS, "cutlass")


@pytest.mark.parametrize("op", ["deviation", "rotate_keys"])
def test_what_has_no_kernel_says_so(op):
    with pytest.raises(ValueError, match=f"{op} can't run by backend 'triton': there is no such"):
        call(op, ROWS, "triton")
    call(op, ROWS, "auto")


def test_heads_that_no_kernel_serves_are_named(monkeypatch):
    monkeypatch.setattr(ops, "has_triton", lambda device: True)
    with pytest.raises(ValueError, match=r"attention_mass can't run .* heads of 4, 1 to a KV head"):
        call("attention_mass", ROWS, "triton")
    torch.testing.assert_close(
        call("attention_mass", ROWS, "auto"), call("attention_mass", ROWS, "torch")
    )


CODE = """
import torch
from kvshare_sglang.kernels import ops
q, keys, at = torch.randn(2, 2, 16), torch.randn(5, 1, 16), torch.tensor([3, 4])
try:
    ops.attention_mass(q, at, keys, scaling=0.3, backend="triton")
except ValueError as error:
    print(error)
ops.attention_mass(q, at, keys, scaling=0.3)
"""


def test_triton_is_refused_where_it_does_not_run():
    """In a process of its own: in this one Triton's interpreter may stand for a GPU."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert "can't run by backend 'triton': Triton does not run on cpu" in done.stdout, done.stderr


def call(op, rows, backend):
    match op:
        case "deviation":
            return ops.deviation(rows, rows, backend=backend)
        case "rotate_keys":
            _, cos, sin = rotation(3, 2, 4, 4, torch.float32)
            return ops.rotate_keys(rows, rope_shift.Shift(cos, sin), is_neox=True, backend=backend)
        case "attention_mass":
            return ops.attention_mass(rows, torch.arange(3), rows, scaling=0.3, backend=backend)
        case _:
            none = torch.empty(0, dtype=torch.int64)
            return ops.copy_kv(
                [rows], [rows], none, none, none, none, angles(4)[0], is_neox=True, backend=backend
            )
