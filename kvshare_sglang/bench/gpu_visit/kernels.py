"""The kernels that a visit checks and times: a kernel more is a row more in ``KERNELS``."""

from collections.abc import Iterator
from typing import Any

import torch

from kvshare_sglang.bench.gpu_visit.table import TOLERANCE, Box, Case, Kernel, far
from kvshare_sglang.kernels import partial_attn, reference
from kvshare_sglang.kernels.rope_shift import plan_shift, rotate_keys
from kvshare_sglang.kernels.row_scores import attention_mass, deviation

Checks = Iterator[tuple[str, torch.dtype, float]]  # name, type, largest error


def _rope_table(box: Box, limit: int, rotary: int) -> tuple[torch.Tensor, torch.Tensor]:
    freq = 1.0 / 500_000.0 ** (torch.arange(0, rotary, 2).double() / rotary)
    angle = torch.arange(limit).double()[:, None] * freq
    return (torch.cat((angle.cos(), angle.sin()), dim=-1) * 1.2).float().to(box.device), freq


def rope_checks(box: Box) -> Checks:
    limit, count = (4096, 12) if box.device == "cpu" else (131072, 48)
    old, new = torch.randint(0, limit, (2, count)).unbind()
    old[:3], new[:3] = torch.tensor([0, 5, limit - 1]), torch.tensor([limit - 1, 5, 0])
    for head, rotary in ((64, 64), (128, 128), (128, 64)):
        angles, freq = _rope_table(box, limit, rotary)
        shift = plan_shift(angles, old.to(box.device), new.to(box.device))
        for dtype in TOLERANCE:
            keys = torch.randn(count, 2, head).to(dtype)
            for is_neox in (True, False):
                got = rotate_keys(keys.to(box.device), shift, is_neox=is_neox)
                want = reference.rotate_keys(keys, new - old, freq, is_neox=is_neox)
                yield (
                    f"{dtype} {head}/{rotary} {'neox' if is_neox else 'gptj'}",
                    dtype,
                    far(got, want),
                )


def copy_case(box: Box, tokens: int) -> Case:
    """Gather, rotate and scatter K and V of one layer, as copying does today."""
    pool = box.rand(2, 2 * tokens, box.kv_heads, box.dim)
    src, dst = torch.randperm(2 * tokens, device=box.device).view(2, tokens).unbind()
    angles, _ = _rope_table(box, tokens, box.dim)
    at = torch.arange(tokens, device=box.device)
    shift = plan_shift(angles, at, at.flip(0))

    def run() -> None:
        pool[0][dst] = rotate_keys(pool[0].index_select(0, src), shift, is_neox=True)
        pool[1][dst] = pool[1].index_select(0, src)

    return Case(run, moved=float(pool.numel() * pool.itemsize))


def attn_checks(box: Box) -> Checks:
    for dtype in TOLERANCE:
        kv_len, at = 70, torch.tensor([0, 1, 2, 9, 10, 33, 40, 41, 42, 69])
        q = torch.randn(len(at), box.kv_heads * box.group, box.dim).to(dtype)
        k, v = torch.randn(2, kv_len, box.kv_heads, box.dim).to(dtype).unbind()
        args = [part.to(box.device) for part in (q, k, v)]
        got = partial_attn.run(_plan(box, at, kv_len, dtype), *args, scaling=0.1)
        want = reference.partial_attention(q, k, v, at, scaling=0.1)
        yield f"{dtype} scattered", dtype, far(got, want)


def _plan(box: Box, at: torch.Tensor, kv_len: int, dtype: torch.dtype) -> Any:
    """Blocks with their masks on the device; slots side by side."""
    plan = partial_attn.plan([(at, torch.arange(kv_len))], group=box.group, dtype=dtype)
    return [
        request._replace(blocks=[b._replace(mask=b.mask.to(box.device)) for b in request.blocks])
        for request in plan
    ]


def attn_case(box: Box, tokens: int) -> Case:
    """Of a prompt that is 98% cached: 5% of its rows, scattered, and the 2% at its end."""
    rows = torch.randperm(tokens)[: tokens // 20]
    at = torch.unique(torch.cat((rows, torch.arange(tokens - tokens // 50, tokens))))
    q = box.rand(len(at), box.kv_heads * box.group, box.dim)
    kv = box.rand(2, tokens, box.kv_heads, box.dim)
    plan = _plan(box, at, tokens, box.dtype)
    flops = 4.0 * box.kv_heads * box.group * box.dim * float((at + 1).sum())
    return Case(
        lambda: partial_attn.run(plan, q, *kv.unbind(), scaling=box.dim**-0.5),
        moved=float(kv.numel() * kv.itemsize),
        flops=flops,
    )


def mass_checks(box: Box) -> Checks:
    at = torch.tensor([5, 20, 39])
    for dtype in TOLERANCE:
        q = torch.randn(len(at), box.kv_heads * box.group, box.dim).to(dtype)
        keys = torch.randn(40, box.kv_heads, box.dim).to(dtype)
        for strongest in (True, False):
            how: Any = {"scaling": 0.1, "strongest_head": strongest}
            got = attention_mass(*(x.to(box.device) for x in (q, at, keys)), **how)
            want = reference.attention_mass(q, at, keys, **how)
            yield f"{dtype} {'strongest' if strongest else 'mean'}", dtype, far(got, want)


def mass_case(box: Box, tokens: int) -> Case:
    """A trace's first step: half of 5% of the rows ask."""
    at = torch.arange(tokens - tokens // 40, tokens, device=box.device)
    q, keys = (
        box.rand(len(at), box.kv_heads * box.group, box.dim),
        box.rand(tokens, box.kv_heads, box.dim),
    )
    return Case(
        lambda: attention_mass(q, at, keys, scaling=box.dim**-0.5, strongest_head=True),
        moved=float(keys.numel() * keys.itemsize),
        flops=2.0 * q.shape[1] * box.dim * float((at + 1).sum()),
    )


def deviation_checks(box: Box) -> Checks:
    for dtype in TOLERANCE:
        fresh, cached = torch.randn(2, 20, box.kv_heads, box.dim).to(dtype).unbind()
        got = deviation(fresh.to(box.device), cached.to(box.device))
        yield f"{dtype}", dtype, far(got, reference.deviation(fresh, cached))


def deviation_case(box: Box, tokens: int) -> Case:
    fresh, cached = box.rand(2, tokens, box.kv_heads, box.dim).unbind()
    return Case(lambda: deviation(fresh, cached), moved=2.0 * fresh.numel() * fresh.itemsize)


KERNELS = (
    Kernel("copy and rotate", rope_checks, copy_case),
    Kernel("partial attention", attn_checks, attn_case),
    Kernel("attention mass", mass_checks, mass_case),
    Kernel("deviation", deviation_checks, deviation_case),
)
