"""The rows of the table: for a task and a case, means over prompts for each selector and budget."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from kvshare_sglang.bench import common
from kvshare_sglang.bench.quality.cases import SIZE, Encoder, prompts
from kvshare_sglang.bench.quality.outcomes import (
    CONTINUED,
    Outcome,
    Truth,
    lab_of,
    outcome,
    truth,
)
from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.sim.engine import Model


class Setting(NamedTuple):
    """What all cases are measured with; goes to worker processes."""

    model: Path
    dtype: str
    device: str
    config: KVShareConfig
    selectors: list[tuple[str, float]]  # with their budgets
    layer: int  # the check layer
    n: int
    facts: int
    rouge: int  # so many splices are continued for ROUGE-L
    draw: int  # of the prompts


@functools.cache
def load(path: Path, dtype: str, device: str) -> tuple[Model, Encoder]:
    """A model and its tokenizer, once in a process."""
    return Model(path, dtype=getattr(torch, dtype), device=device), Encoder(path)


def measure(setting: Setting, task: str, case: str) -> list[dict[str, Any]]:
    """The rows of one task and case. Raises NoPrompt where there are none."""
    model, encode = load(setting.model, setting.dtype, setting.device)
    size = SIZE._replace(facts=setting.facts)
    splice = case == "splice"
    full: list[Truth] = []
    found: dict[tuple[str, float], list[Outcome]] = {}
    wanted = prompts(
        encode, task, case, n=setting.n, size=size, max_len=len(model.table), draw=setting.draw
    )
    for i, prompt in enumerate(wanted):
        lab = lab_of(model, setting.config, prompt)
        true = truth(
            model,
            prompt,
            continued=CONTINUED if splice else 0,
            rouge=splice and i < setting.rouge,
        )
        full.append(true._replace(kv=None, logprobs=None))  # by far the most of it
        for selector, budget in dict.fromkeys((("copy", 0.0), *setting.selectors)):
            one = outcome(lab, prompt, true, selector, budget=budget, layer=setting.layer, seed=i)
            found.setdefault((selector, budget), []).append(one)
    return [
        row(
            mine, full, found["copy", 0.0],
            task=task, case=case, selector=selector, budget=budget,
        )
        for (selector, budget), mine in found.items()
    ]  # fmt: skip


def row(
    found: list[Outcome], full: list[Truth], copy: list[Outcome], **names: Any
) -> dict[str, Any]:
    """One row of the JSON; intervals are bootstrapped over prompts."""
    right = np.array([o.right for o in found], float)
    best, worst = np.array([t.right for t in full], float), np.array([o.right for o in copy], float)
    gap = best.mean() - worst.mean()
    margin = np.array([[t.margin, c.margin] for t, c in zip(full, copy, strict=True)])
    room = margin[:, 0].mean() - margin[:, 1].mean()
    mine = np.mean([o.margin for o in found])
    rouge = [o.rouge_l for o in found if o.rouge_l is not None]
    sure = [o.top1_sure for o in found if o.top1_sure is not None]
    return {
        **names,
        "n": len(found),
        "accuracy": float(right.mean()),
        "accuracy_full": float(best.mean()),
        "accuracy_copy": float(worst.mean()),
        "regained": float((right.mean() - worst.mean()) / gap) if gap > 0 else None,
        "margin_regained": float((mine - margin[:, 1].mean()) / room) if room > 0 else None,
        "perplexity": float(np.exp(np.mean([o.nll for o in found]))),
        "perplexity_full": float(np.exp(np.mean([t.nll for t in full]))),
        "top1": float(np.mean([o.top1 for o in found])),
        "top1_sure": float(np.mean(sure)) if sure else None,
        "kl": float(np.mean([o.kl for o in found])),
        "rouge_l": float(np.mean(rouge)) if rouge else None,
        "rouge_n": len(rouge),
        "recomputed_share": float(np.mean([o.recomputed for o in found])),
        "computed_share": float(np.mean([o.computed for o in found])),
        "declined": float(np.mean([o.declined for o in found])),
        # of the difference to full prefill, prompt by prompt
        "ci95": common.bootstrap_ci95(list(right - best), statistic=np.mean),
    }
