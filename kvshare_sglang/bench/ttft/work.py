"""How much of a prompt a server must have computed, held against what it says that it did."""

from typing import Any, NamedTuple

import numpy as np
from _mirror import peeked_flops, prefill_flops, row_positions
from _server import ScriptError, ServerSpec

from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.policy.rows import must_run, reused_positions
from kvshare_sglang.policy.trace import SHARES, Trace, probe_layer, rows_of
from kvshare_sglang.radix_fuzzy.types import ReusePlan


class Work(NamedTuple):
    """What a reusing server did for one prompt; ``merged_tokens`` are rows that ran because its
    attention takes no more stretches."""

    computed_share: float
    recomputed_share: float
    computed_tokens: int
    copied_tokens: int
    merged_tokens: int
    declined: str | None


def work_of(
    model: dict[str, Any],
    plan: ReusePlan,
    info: dict[str, Any],
    spec: ServerSpec,
    config: KVShareConfig,
) -> Work:
    """From what the server says of the request. Raises ScriptError if it ran other rows."""
    traced = is_traced(plan, spec, config)
    rows, merged = expected_rows(plan, info, spec, config)
    full = np.arange(plan.prefix_len, plan.prompt_len)
    flops = prefill_flops(model, rows) + (traced_flops(model, plan, config) if traced else 0.0)
    again, copied = info["recomputed_tokens"], info["fuzzy_tokens"]
    return Work(
        computed_share=flops / prefill_flops(model, full),
        recomputed_share=again / (again + copied) if again + copied else 0.0,
        computed_tokens=info["computed_tokens"],
        copied_tokens=copied,
        merged_tokens=merged,
        declined=info["declined"],
    )


def is_traced(plan: ReusePlan, spec: ServerSpec, config: KVShareConfig) -> bool:
    """Whether the server follows attention: only where one chunk holds all behind the prefix."""
    rest = plan.prompt_len - plan.prefix_len
    return config.select == "trace" and bool(plan.runs) and rest <= spec.chunk


def expected_rows(
    plan: ReusePlan, info: dict[str, Any], spec: ServerSpec, config: KVShareConfig
) -> tuple[np.ndarray, int]:
    """Positions of the rows that the server ran, and how many of them it merged in. Raises
    ScriptError if it ran other numbers.

    A trace goes by attention: the rows that it adds are taken to stand evenly. Nobody can tell
    beforehand how many stretches they make, so on a GPU more of them may run than were chosen."""
    merged = 0
    if is_traced(plan, spec, config):
        must = must_run(plan, suffix=config.seam)
        left = np.setdiff1d(reused_positions(plan), must)
        count = min(len(left), rows_of(plan, config.budget))
        if spec.device != "cpu":
            merged = max(0, info["computed_tokens"] - len(must) - count)
        added = min(len(left), count + merged)
        rows = np.union1d(must, left[np.linspace(0, len(left) - 1, added).astype(int)])
    else:
        max_rows = None if spec.device == "cpu" else spec.max_running
        rows = row_positions(plan, chunk=spec.chunk, max_rows=max_rows)
    told = {name: info[name] for name in ("exact_tokens", "fuzzy_tokens", "computed_tokens")}
    want = {
        "exact_tokens": plan.prefix_len,
        "fuzzy_tokens": plan.prompt_len - plan.prefix_len - len(rows),
        "computed_tokens": len(rows),
    }
    if told != want:
        raise ScriptError(f"the server says {told}, the planner alone {want}: {info}")
    return rows, merged


def traced_flops(model: dict[str, Any], plan: ReusePlan, config: KVShareConfig) -> float:
    """FLOPs of the passes of a trace: the rows that must run and those behind edits, then all
    steps' but the last's."""
    layer = probe_layer(model["num_hidden_layers"], config.probe_at)
    trace = Trace.of_plan(plan, budget=config.budget, seam=config.seam)
    left = rows_of(plan, config.budget) - len(trace.chosen)
    followed = int(left * sum(SHARES[:-1]) / sum(SHARES))
    rows = np.linspace(plan.prefix_len, plan.prompt_len - 1, followed)
    return sum(peeked_flops(model, part, at_layer=layer) for part in (trace.rows, rows))
