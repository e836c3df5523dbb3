"""One prompt under full prefill, under copies alone, and under traces that look at each layer."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from kvshare_sglang.bench.calibrate.prompts import Prompt
from kvshare_sglang.bench.quality.outcomes import follow, shares
from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.policy.select.attention_trace import probe_layer
from kvshare_sglang.sim.engine import Lab, Model, Partial

CONTINUED = 8  # tokens of full prefill's answer along which arms are compared
LAYER = 1  # no selector here has a check layer


def layers_at(model: Model, depths: Sequence[float]) -> dict[int, float]:
    """The candidates: layers, each with the first depth that names it."""
    return {probe_layer(len(model.layers), depth): depth for depth in reversed(depths)}


def measure(model: Model, prompt: Prompt, depths: Sequence[float]) -> dict[str, Any] | None:
    """What each arm gives (``copies``, and a trace for each layer, by its number): KL to full
    prefill along its answer and of its first token, whether the first token is the same, and the
    FLOPs as a share of full prefill's. None where nothing is reused."""
    config = KVShareConfig(select="trace")
    lab = Lab(model, config)
    for ids in prompt.cached:
        lab.add(ids)
    known = len(prompt.ids)
    first, kv = model.full(prompt.ids)
    told = model.greedy(prompt.ids, first, kv, CONTINUED)
    true = follow(model, model.widened(kv, len(told), known=known), first, told, known)
    row: dict[str, Any] = {"case": prompt.case, "tokens": known}

    def judged(done: Partial, selector: str, plan: Any) -> dict[str, float]:
        along = follow(model, done.kv, done.logits, told, known)
        kl = (true.exp() * (true - along)).sum(-1)
        _, computed = shares(lab, plan, done, selector, layer=LAYER)
        return {
            "kl": float(kl.mean()), "kl_first": float(kl[0]),
            "agree": float(along[0].argmax() == true[0].argmax()), "computed": computed,
        }  # fmt: skip

    plan = lab.plan(prompt.ids)
    if not plan.copies:
        return None
    with torch.no_grad():
        copied = lab.prefill(prompt.ids, plan, "copy", budget=0.0, room=CONTINUED)
        row["copies"] = judged(copied, "copy", plan)
        for layer, depth in layers_at(model, depths).items():
            lab.config = dataclasses.replace(config, probe_at=depth)
            done = lab.prefill(prompt.ids, plan, "trace", budget=config.budget, room=CONTINUED)
            row[str(depth)] = judged(done, "trace", plan) | {"layer": layer}
    return row
