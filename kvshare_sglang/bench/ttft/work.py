"""How much of a prompt a server must have computed, held against what it says that it did."""

from typing import Any, NamedTuple

import numpy as np

from kvshare_sglang.bench.common import ScriptError
from kvshare_sglang.bench.server import ServerSpec
from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.plan import ReusePlan
from kvshare_sglang.policy.admit import goes_whole
from kvshare_sglang.policy.select.attention_trace import SHARES, AttentionTrace, probe_layer
from kvshare_sglang.policy.select.base import budget_rows, required_rows
from kvshare_sglang.policy.select.window import Window
from kvshare_sglang.radix_fuzzy.fingerprints import Tokens
from kvshare_sglang.sim.flops import layer_flops, peeked_flops, prefill_flops
from kvshare_sglang.sim.mirror import Mirror, row_positions

FEWER = 0.97  # of the rows that a trace may run, where a prompt comes in chunks


class Work(NamedTuple):
    """What a reusing server did for one prompt; ``merged_tokens`` are rows that ran because its
    attention takes no more ranges."""

    computed_share: float
    recomputed_share: float
    computed_tokens: int
    copied_tokens: int
    merged_tokens: int
    declined: str | None


class Choice(NamedTuple):
    """What a server must do with a prompt: its plan, the selector that chooses, and why it is not
    the one asked for. A plan without copies where it declines."""

    plan: ReusePlan
    selector: AttentionTrace | Window
    reason: str | None = None


def choice_of(mirror: Mirror, prompt: Tokens, config: KVShareConfig) -> Choice:
    """The plan of the selector asked for, whatever the length."""
    window = Window(config.seam, config.window)
    if config.select == "window":
        return Choice(mirror.plan(prompt, config, window), window)
    trace = AttentionTrace(config.seam, config.stretch)
    plan = mirror.plan(prompt, config, trace)
    return Choice(plan, trace)


def _is_whole(
    plan: ReusePlan, selector: AttentionTrace | Window, config: KVShareConfig, *, chunk: int
) -> bool:
    """Whether a prompt that is alone is one batch."""
    tokens = plan.prompt_len - plan.prefix_len
    rows = selector.most_rows(plan, budget=config.budget)
    return tokens <= chunk or goes_whole(tokens, rows, room=chunk, chunk=chunk)


def work_of(
    model: dict[str, Any],
    choice: Choice,
    info: dict[str, Any],
    spec: ServerSpec,
    config: KVShareConfig,
) -> Work:
    """From what the server says of the request. Raises ScriptError if it ran other rows."""
    plan, selector = choice.plan, choice.selector
    rows, merged = expected_rows(choice, info, spec, config)
    full = np.arange(plan.prefix_len, plan.prompt_len)
    flops = prefill_flops(model, rows)
    if isinstance(selector, AttentionTrace) and plan.copies:
        flops += traced_flops(model, plan, selector, config, carries=spec.device == "cpu")
    again, copied = info["recomputed_tokens"], info["copied_tokens"]
    return Work(
        computed_share=flops / prefill_flops(model, full),
        recomputed_share=again / (again + copied) if again + copied else 0.0,
        computed_tokens=again + info["fresh_tokens"],
        copied_tokens=copied,
        merged_tokens=merged,
        declined=info["declined"],
    )


def expected_rows(
    choice: Choice, info: dict[str, Any], spec: ServerSpec, config: KVShareConfig
) -> tuple[np.ndarray, int]:
    """Positions of the rows that the server ran, and how many of them it merged in. Raises
    ScriptError if it ran other numbers, or another selector chose.

    A trace goes by attention: the rows that it adds are taken to be spread evenly. Nobody can tell
    beforehand how many ranges they make, so on a GPU more of them may run than were chosen. In a
    prompt that comes in chunks the last row of each runs too, and the question twice; and a row
    that ran with its chunk need not be chosen again, so a few less than the most may run."""
    plan, selector, reason = choice
    merged = 0
    whole = _is_whole(plan, selector, config, chunk=spec.chunk)
    ran = info["recomputed_tokens"] + info["fresh_tokens"]
    if isinstance(selector, AttentionTrace) and plan.copies:
        count = selector.most_rows(plan, budget=config.budget)
        required = required_rows(plan, suffix=config.seam)
        left = (plan.reused_rows - required).positions
        if spec.device != "cpu" or not whole:
            merged = max(0, ran - count)
        if not whole and required.num <= ran < count:
            count = max(ran, int(FEWER * count))
        added = min(len(left), count + merged - required.num)
        evenly = left[np.linspace(0, len(left) - 1, added).astype(int)]
        rows = np.union1d(required.positions, evenly)
    else:
        max_rows = None if spec.device == "cpu" else spec.max_running
        chunk = plan.prompt_len - plan.prefix_len if whole else spec.chunk
        rows = row_positions(plan, chunk=chunk, max_rows=max_rows)
    keys = ("exact_tokens", "copied_tokens", "select", "select_reason")
    told = {"rows": ran, **{key: info[key] for key in keys}}
    want = {
        "rows": len(rows),
        "exact_tokens": plan.prefix_len,
        "copied_tokens": plan.prompt_len - plan.prefix_len - len(rows),
        "select": selector.name if plan.copies else None,
        "select_reason": reason if plan.copies else None,
    }
    if told != want:
        raise ScriptError(f"the server says {told}, the planner alone {want}: {info}")
    return rows, merged


def traced_flops(
    model: dict[str, Any],
    plan: ReusePlan,
    selector: AttentionTrace,
    config: KVShareConfig,
    *,
    carries: bool,
) -> float:
    """FLOPs of the passes of a trace: the rows that must run and those after edits, then all
    steps' but the last's; less what the batch itself need not run again where it ``carries``."""
    layer = probe_layer(model["num_hidden_layers"], config.probe_at)
    trace = selector.trace(plan, budget=config.budget)
    count = budget_rows(plan.runs, prefix_len=plan.prefix_len, budget=config.budget)
    followed = int((count - trace.chosen.num) * sum(SHARES[:-1]) / sum(SHARES))
    rows = np.linspace(plan.prefix_len, plan.prompt_len - 1, followed)
    passes = (trace.rows.positions, rows)
    flops = sum(peeked_flops(model, part, at_layer=layer) for part in passes)
    return flops - carries * layer * layer_flops(model, trace.carried().positions)
