"""Which shape of a launch is fastest on this card: attention of scattered rows, and of as many side
by side. What ``kernels.gpu.rows.shape_of`` says was read off such a table."""

import functools
import time
from collections.abc import Callable
from typing import Any

import torch

from kvshare_sglang.bench.gpu_visit.kernels import Paged, scattered, side_by_side
from kvshare_sglang.bench.gpu_visit.table import Box, timed

# Matrix rows and keys of a step, warps, steps in flight.
SHAPES = (
    (128, 128, 8, 2), (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4), (128, 32, 8, 4),
    (256, 64, 8, 2), (256, 64, 8, 3), (256, 32, 8, 3), (64, 64, 4, 3), (64, 64, 4, 4),
    (64, 128, 4, 2), (128, 64, 4, 3),
)  # fmt: skip
SPLITS = (2, 4, 8)
MOST_S = 40.0
APART = 0.05  # roundings of bf16, of values of about 1


def run(box: Box, note: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """The table; the best shapes first go to all lengths. Stops in time."""
    from kvshare_sglang.kernels.gpu.rows import Shape

    begun = time.perf_counter()
    rows: list[dict[str, Any]] = []
    found: dict[str, Any] = {"ok": False, "figures": {"rows": rows}}
    best = [Shape(*shape) for shape in SHAPES]
    for tokens in (16384, 8192, 32768) if box.device != "cpu" else box.tokens:
        torch.manual_seed(tokens)
        for name, at in (
            ("scattered", scattered(tokens)),
            ("side by side", side_by_side(tokens)),
        ):
            paged = Paged(box, at, tokens, box.dtype)
            if paged.how is None:
                return {"ok": False, "error": "no kernel of ours for this device"}
            want = None
            for shape in best:
                paged.use(paged.how._replace(shape=shape))
                plan = paged.plan
                for splits in SPLITS:
                    if time.perf_counter() - begun > MOST_S:
                        return found | {"ok": _agree(rows)}
                    told = {"rows": name, "tokens": tokens, "shape": list(shape), "splits": splits}
                    paged.plan = plan._replace(
                        launches=[one._replace(splits=splits) for one in plan.launches]
                    )
                    try:
                        out = paged.run(box.dim**-0.5)
                        told |= timed(box, functools.partial(paged.run, box.dim**-0.5), repeats=9)
                        want = out if want is None else want
                        told["apart"] = float((out - want).abs().max())
                    except Exception as error:
                        told["error"] = f"{type(error).__name__}: {error}"[:200]
                    rows.append(told)
                note(found)
        best = _best(rows, tokens)
    return found | {"ok": _agree(rows)}


def _agree(rows: list[dict[str, Any]]) -> bool:
    """Whether any shape ran, and those that did gave the same."""
    apart = [row["apart"] for row in rows if "apart" in row]
    return bool(apart) and max(apart) <= APART


def _best(rows: list[dict[str, Any]], tokens: int) -> list[Any]:
    """The four shapes that were fastest at scattered rows."""
    from kvshare_sglang.kernels.gpu.rows import Shape

    here = [r for r in rows if r["rows"] == "scattered" and r["tokens"] == tokens and "ms" in r]
    order = dict.fromkeys(tuple(r["shape"]) for r in sorted(here, key=lambda r: r["ms"]))
    return [Shape(*shape) for shape in list(order)[:4]]
