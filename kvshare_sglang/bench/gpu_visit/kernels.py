"""The kernels that a visit checks and times: a kernel more is a row more in ``KERNELS``."""

from collections.abc import Iterator
from typing import Any

import torch

from kvshare_sglang.bench.gpu_visit.table import TOLERANCE, Box, Case, Kernel, far
from kvshare_sglang.kernels import ops, partial_attn, reference, row_scores
from kvshare_sglang.kernels.ops import deviation, rotate_keys
from kvshare_sglang.kernels.rope_shift import plan_shift
from kvshare_sglang.policy.select.dependence import EDGES

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


LAYERS = 8  # of a copy: the bytes of a quarter of an 8B model's cache


def copy_case(box: Box, tokens: int) -> Case:
    """Gather, rotate and scatter K and V: all layers in one launch where a kernel can."""
    keys, values = (
        [box.rand(2 * tokens, box.kv_heads, box.dim) for _ in range(LAYERS)] for _ in range(2)
    )
    src, dst = torch.arange(2 * tokens, device=box.device).view(2, tokens).unbind()
    angles, _ = _rope_table(box, tokens, box.dim)
    at = torch.arange(tokens, device=box.device)
    new = at.flip(0)

    def run() -> None:
        ops.copy_kv(keys, values, src, dst, at, new, angles, is_neox=True, backend=_backend(box))

    return Case(run, moved=float(2 * 2 * LAYERS * tokens * keys[0][0].numel() * keys[0].itemsize))


def _backend(box: Box) -> str:
    """By name: what is measured here must not give way to torch."""
    return "triton" if ops.has_triton(box.device) else "torch"


def copy_checks(box: Box) -> Checks:
    """All layers, in one launch where a kernel can, against the definition."""
    limit, count, num_layers = 4096, 48, 3
    old, new = torch.randint(0, limit, (2, count)).unbind()
    src, dst = torch.randperm(4 * count)[: 2 * count].view(2, count).unbind()
    angles, freq = _rope_table(box, limit, 128)
    for dtype in TOLERANCE:
        for is_neox in (True, False):
            k, v = ([torch.randn(4 * count, 2, 128).to(dtype) for _ in range(num_layers)]
                    for _ in range(2))  # fmt: skip
            on_k, on_v = ([one.to(box.device) for one in side] for side in (k, v))
            slots = (src.to(box.device), dst.to(box.device))
            places = (old.to(box.device), new.to(box.device))
            how: dict[str, Any] = {"is_neox": is_neox, "backend": _backend(box)}
            ops.copy_kv(on_k, on_v, *slots, *places, angles, **how)
            want = reference.rotate_keys(k[-1][src], new - old, freq, is_neox=is_neox)
            name = f"{dtype} {'neox' if is_neox else 'gptj'}"
            yield f"{name} K", dtype, far(on_k[-1][dst], want)
            yield f"{name} V", dtype, far(on_v[-1][dst], v[-1][src].double())


class Paged:
    """Some rows of one request over a cache whose slots are in no order."""

    def __init__(self, box: Box, at: torch.Tensor, length: int, dtype: torch.dtype) -> None:
        self.at, self.device = at, box.device
        heads = box.kv_heads * box.group
        self.q = torch.randn(len(at), heads, box.dim, device=box.device).to(dtype)
        shape = (2, 2 * length, box.kv_heads, box.dim)
        self.k, self.v = torch.randn(*shape, device=box.device).to(dtype).unbind()
        self.slots = torch.randperm(2 * length)[:length]
        self.how = ops.attention(
            box.device, dtype, heads=heads, kv_heads=box.kv_heads, dim=box.dim, v_dim=box.dim
        )
        if self.how is None:
            rows = [(at, self.slots)]
            self.blocks = partial_attn.plan(rows, group=box.group, dtype=dtype)
            return
        self.table = self.slots.int()[None].to(box.device)
        self.use(self.how)

    def use(self, how: ops.Attention) -> None:
        """Attend by this launch from now on."""
        owner = torch.zeros(1, dtype=torch.int64, device=self.device)
        rows = [(len(self.at), int(self.at[-1]) + 1)]
        self.how, self.plan = how, how.plan(rows, self.at.to(self.device), owner)

    def run(self, scaling: float) -> torch.Tensor:
        if self.how is None:
            return partial_attn.run(self.blocks, self.q, self.k, self.v, scaling=scaling)
        out: torch.Tensor = self.how.run(
            self.plan, self.q, self.k, self.v, self.table, scaling=scaling
        )
        return out

    def profile(self, edges: torch.Tensor, scaling: float) -> torch.Tensor:
        if self.how is None:
            keys = self.k[self.slots.to(self.device)]
            at = self.at.to(self.device)
            return row_scores.attention_profile(self.q, at, keys, edges, scaling=scaling)
        owner = torch.zeros(1, dtype=torch.int64, device=self.device)
        rows, at = [(len(self.at), int(self.at[-1]) + 1)], self.at.to(self.device)
        there = (self.q, self.k, self.table, edges.int().to(self.device))
        out: torch.Tensor = self.how.profile(rows, at, owner, *there, scaling=scaling)
        return out


def attn_checks(box: Box) -> Checks:
    for dtype in TOLERANCE:
        for name, kv_len, at in (
            ("scattered", 70, torch.tensor([0, 1, 2, 9, 10, 33, 40, 41, 42, 69])),
            ("side by side", 300, torch.arange(100, 300)),
            ("split", 5000, torch.arange(3, 5000, 401)),
        ):
            if kv_len > 1000 and box.device == "cpu":
                continue
            paged = Paged(box, at, kv_len, dtype)
            q, k, v = (x.cpu() for x in (paged.q, paged.k, paged.v))
            want = reference.partial_attention(q, k[paged.slots], v[paged.slots], at, scaling=0.1)
            yield f"{dtype} {name}", dtype, far(paged.run(0.1), want)


def _rows_case(box: Box, at: torch.Tensor, tokens: int) -> Case:
    paged = Paged(box, at, tokens, box.dtype)
    return Case(
        lambda: paged.run(box.dim**-0.5),
        moved=2.0 * tokens * box.kv_heads * box.dim * box.dtype.itemsize,
        flops=4.0 * box.kv_heads * box.group * box.dim * float((at + 1).sum()),
    )


def scattered(tokens: int) -> torch.Tensor:
    """Of a prompt that is 98% cached: 5% of its rows, scattered, and the 2% at its end."""
    rows = torch.randperm(tokens)[: tokens // 20]
    return torch.unique(torch.cat((rows, torch.arange(tokens - tokens // 50, tokens))))


def side_by_side(tokens: int) -> torch.Tensor:
    """As many rows, side by side at the end."""
    return torch.arange(tokens - tokens // 20 - tokens // 50, tokens)


def attn_case(box: Box, tokens: int) -> Case:
    return _rows_case(box, scattered(tokens), tokens)


def causal_case(box: Box, tokens: int) -> Case:
    return _rows_case(box, side_by_side(tokens), tokens)


def mass_checks(box: Box) -> Checks:
    at = torch.tensor([5, 20, 39])
    for dtype in TOLERANCE:
        q = torch.randn(len(at), box.kv_heads * box.group, box.dim).to(dtype)
        keys = torch.randn(40, box.kv_heads, box.dim).to(dtype)
        for strongest in (True, False):
            how: Any = {"scaling": 0.1, "strongest_head": strongest}
            there = (x.to(box.device) for x in (q, at, keys))
            got = ops.attention_mass(*there, **how, backend=_backend(box))
            want = reference.attention_mass(q, at, keys, **how)
            yield f"{dtype} {'strongest' if strongest else 'mean'}", dtype, far(got, want)


def mass_case(box: Box, tokens: int) -> Case:
    """A trace's first step: half of 5% of the rows ask."""
    at = torch.arange(tokens - tokens // 40, tokens, device=box.device)
    q, keys = (
        box.rand(len(at), box.kv_heads * box.group, box.dim),
        box.rand(tokens, box.kv_heads, box.dim),
    )
    how: Any = {"scaling": box.dim**-0.5, "strongest_head": True, "backend": _backend(box)}
    return Case(
        lambda: ops.attention_mass(q, at, keys, **how),
        moved=float(keys.numel() * keys.itemsize),
        flops=2.0 * q.shape[1] * box.dim * float((at + 1).sum()),
    )


def profile_checks(box: Box) -> Checks:
    """What rows give to keys so far behind them, of distances that end anywhere in a step."""
    edges = torch.tensor(EDGES)
    for dtype in TOLERANCE:
        for name, kv_len, at in (
            ("scattered", 70, torch.tensor([0, 1, 2, 9, 10, 33, 40, 41, 42, 69])),
            ("side by side", 300, torch.arange(250, 300)),
        ):
            paged = Paged(box, at, kv_len, dtype)
            keys = paged.k.cpu()[paged.slots]
            want = reference.attention_profile(paged.q.cpu(), at, keys, edges, scaling=0.1)
            yield f"{dtype} {name}", dtype, far(paged.profile(edges, 0.1), want)


def profile_case(box: Box, tokens: int) -> Case:
    """A chunk of 2,048 rows at the end of a prompt, of which one layer is noted."""
    at = torch.arange(max(0, tokens - 2048), tokens)
    paged, edges = Paged(box, at, tokens, box.dtype), torch.tensor(EDGES, device=box.device)
    return Case(
        lambda: paged.profile(edges, box.dim**-0.5),
        moved=float(tokens * box.kv_heads * box.dim * box.dtype.itemsize),
        flops=2.0 * box.kv_heads * box.group * box.dim * float((at + 1).sum()),
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
    Kernel("rotate", rope_checks, None),
    Kernel("copy and rotate", copy_checks, copy_case),
    Kernel("scattered rows", attn_checks, attn_case),
    Kernel("as many side by side", None, causal_case),
    Kernel("attention mass", mass_checks, mass_case),
    Kernel("what rows attend to", profile_checks, profile_case),
    Kernel("deviation", deviation_checks, deviation_case),
)
