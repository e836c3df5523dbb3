"""How a kernel comes into the table of a visit: checked, timed, held against what the card can do.

Needs torch, no SGLang. The kernels themselves are in ``kernels.py``.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

REPEATS, MOST_S = 30, 0.5  # of a timing: whichever is reached first
TOLERANCE = {torch.float32: 5e-5, torch.bfloat16: 1.6e-2}  # as tests/kernels/tolerances.py
FLUSH = 256 << 20  # bytes written between two timings, so that no cache holds the inputs


class Box(NamedTuple):
    """The machine, and the shape of one layer: an 8B model's on a GPU, a small one's on a CPU."""

    device: str
    dtype: torch.dtype
    tokens: tuple[int, ...]
    kv_heads: int
    group: int
    dim: int

    def rand(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self.device).to(self.dtype)


class Case(NamedTuple):
    """What is timed, and the least that it must do: bytes to move, FLOPs."""

    run: Callable[[], Any]
    moved: float
    flops: float = 0.0


class Kernel(NamedTuple):
    """``checks``: names and errors, by type; ``case(box, n)``: its work for a prompt of n. None
    where another line has it."""

    name: str
    checks: Callable[[Box], Iterator[tuple[str, torch.dtype, float]]] | None
    case: Callable[[Box, int], Case] | None


def box_of(device: str) -> Box:
    if device == "cpu":
        return Box("cpu", torch.float32, (256, 512), 2, 2, 32)
    return Box(device, torch.bfloat16, (8192, 16384, 32768), 8, 4, 128)


def measure(
    kernels: Sequence[Kernel], box: Box, note: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """The whole table; ``note`` is told after each row what there is so far."""
    torch.manual_seed(0)
    checks: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    limits = ceilings(box)
    found = {"ok": False, "checks": checks, "figures": {"ceilings": limits, "rows": rows}}
    for kernel in kernels:
        checks += checked(kernel, box)
        note(found)
        for tokens in box.tokens if kernel.case else ():
            rows.append(row(kernel, box, tokens, limits))
            note(found)
    failed = [row["kernel"] for row in rows if "error" in row]
    if failed:
        found["error"] = f"could not be timed: {', '.join(sorted(set(failed)))}"
    found["ok"] = not failed and all(check["ok"] for check in checks)
    return found


def ceilings(box: Box) -> dict[str, float]:
    """What the card does at best: bytes moved by a plain copy, FLOPs of a large product."""
    count, side = (1 << 29, 8192) if box.device != "cpu" else (1 << 22, 256)
    two = torch.empty(2, count, dtype=torch.bfloat16, device=box.device)
    copied = timed(box, lambda: two[0].copy_(two[1]))
    x = box.rand(side, side)
    product = timed(box, lambda: x @ x)
    return {
        "copy_gb_s": round(2 * 2 * count / copied["ms"] / 1e6, 1),
        "matmul_tflop_s": round(2 * side**3 / product["ms"] / 1e9, 3),
    }


def checked(kernel: Kernel, box: Box) -> list[dict[str, Any]]:
    out = []
    try:
        for name, dtype, error in kernel.checks(box) if kernel.checks else ():
            most = TOLERANCE[dtype]
            # "not <=" also fails a nan
            out.append({"name": f"{kernel.name} {name}", "value": error, "at_most": most,
                        "ok": error <= most})  # fmt: skip
    except Exception as error:
        out.append({"name": kernel.name, "value": str(error)[:500], "ok": False})
    return out


def row(kernel: Kernel, box: Box, tokens: int, limits: dict[str, float]) -> dict[str, Any]:
    """A line of the table: times, and the share of the ceiling that they reach."""
    told: dict[str, Any] = {"kernel": kernel.name, "tokens": tokens}
    try:
        assert kernel.case is not None
        case = kernel.case(box, tokens)
        told |= timed(box, case.run)
    except Exception as error:
        return told | {"error": f"{type(error).__name__}: {error}"[:500]}
    memory_ms = case.moved / limits["copy_gb_s"] / 1e6
    product_ms = case.flops / limits["matmul_tflop_s"] / 1e9
    told["of_ceiling"] = round(max(memory_ms, product_ms) / told["ms"], 4)
    told["bound"] = "memory" if memory_ms > product_ms else "product"
    return told


def timed(box: Box, run: Callable[[], Any], *, repeats: int = REPEATS) -> dict[str, Any]:
    """Median and quartiles in ms; by the device's own clock where it has one."""
    cuda = box.device != "cpu"
    flush = torch.empty(FLUSH if cuda else 1, dtype=torch.int8, device=box.device)
    times: list[float] = []
    begun = 0.0
    for turn in range(-3, repeats):  # the first three are a warm-up, in which kernels compile
        if turn == 0:
            begun = time.perf_counter()
        flush.zero_()
        if cuda:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            stop.record()
            torch.cuda.synchronize()
            took = start.elapsed_time(stop)
        else:
            first = time.perf_counter()
            run()
            took = 1e3 * (time.perf_counter() - first)
        if turn >= 0:
            times.append(took)
        if times and time.perf_counter() - begun > MOST_S:
            break
    q25, p50, q75 = torch.tensor(times).double().quantile(torch.tensor([0.25, 0.5, 0.75]).double())
    return {"ms": float(p50), "q25": float(q25), "q75": float(q75), "n": len(times)}


def far(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest error; relative to the element where that is above 1."""
    off = (got.cpu().double() - want).abs() / want.abs().clamp(min=1)
    return float(off.max())
