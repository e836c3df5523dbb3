"""What a gate on deviation catches, and what it wastes.

The gate computes a run again whose values, at a check layer, deviate by more than tau on average.
A prompt is *led astray* if copies alone make the model say something else first than full prefill
does; it is caught if one of its runs is above tau. A prompt that is not led astray and is caught
is wasted. All prompts are those of ``quality``.
"""

import argparse
import sys
from typing import Any

import numpy as np
import torch

from kvshare_sglang.bench import common, options
from kvshare_sglang.bench.quality import tables
from kvshare_sglang.bench.quality.cases import (
    CASES,
    SIZE,
    Encoder,
    NoPrompt,
    Prompt,
    cells,
    prompts,
)
from kvshare_sglang.bench.quality.outcomes import lab_of
from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.kernels.ops import deviation
from kvshare_sglang.sim.engine import Lab, Model

WASTE, CATCH = 0.05, 0.99  # of the prompts that are not, and that are, led astray


def look(lab: Lab, prompt: Prompt, layers: list[int]) -> tuple[list[float], bool] | None:
    """The gate's value at each layer, which is that of the run that is furthest off, and whether
    the prompt is led astray; None where nothing is reused.

    At a check layer every row has run, so what is fresh there is what full prefill computes.
    """
    plan = lab.plan(prompt.ids)
    if not plan.copies:
        return None
    first, true = lab.model.full(prompt.ids)
    copied = lab.copied(prompt.ids, plan)
    values = []
    for layer in layers:
        off = deviation(true.v[layer], copied.v[layer])
        values.append(max(float(off[r.dst_start : r.dst_stop].mean()) for r in plan.runs))
    alone = lab.prefill(prompt.ids, plan, "copy", budget=0.0).logits
    return values, int(alone.argmax()) != int(first.argmax())


def row(layer: int, values: np.ndarray, astray: np.ndarray, cases: np.ndarray) -> dict[str, Any]:
    """One layer's gate: what it catches if it may waste WASTE, what it wastes if it must catch
    CATCH, and how often a prompt led astray has the larger value (0.5: it tells nothing)."""
    good, bad = values[~astray], values[astray]
    few = float(np.quantile(good, 1 - WASTE, method="higher"))
    most = float(np.quantile(bad, 1 - CATCH, method="lower"))  # tau just below it
    above = (bad[:, None] > good).mean() + 0.5 * (bad[:, None] == good).mean()
    return {
        "layer": layer, "n": len(values), "astray": int(astray.sum()), "auc": float(above),
        "tau_few_wasted": few, "caught": float((bad > few).mean()),
        "caught_by_case": {
            str(c): float((values[astray & (cases == c)] > few).mean())
            for c in np.unique(cases[astray])
        },
        "tau_most_caught": most, "wasted": float((good >= most).mean()),
    }  # fmt: skip


def show(rows: list[dict[str, Any]]) -> str:
    return common.columns(
        rows,
        layer="{layer}",
        n="{n}",
        astray="{astray}",
        AUC="{auc:.3f}",
        **{f"tau, {WASTE:.0%} wasted": "{tau_few_wasted:.3f}"},
        caught="{caught:.1%}",
        **{f"tau, {CATCH:.0%} caught": "{tau_most_caught:.3f}"},
        wasted="{wasted:.1%}",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    options.add_model(parser)
    add("--task", nargs="+", choices=("lookup", "hops", "few", "state"), default=("hops", "state"))
    add("--case", nargs="+", choices=CASES, default=CASES)
    add("--layer", type=int, nargs="+", default=[1, 3], help="check layers")
    add("--n", type=int, default=100, help="prompts of each task and case")
    add("--facts", type=int, default=60, help="sentences in a prompt")
    options.add_table(parser)


def run(args: argparse.Namespace) -> int:
    args.model = options.model_directory(args.model)
    model, encode = Model(args.model, dtype=torch.bfloat16, device=args.device), Encoder(args.model)
    options.check_layers(args.layer, of=len(model.layers))
    config = KVShareConfig(min_reuse=32, window=16)
    size = SIZE._replace(facts=args.facts)
    found: list[tuple[list[float], bool]] = []
    cases: list[str] = []
    todo = cells(args.task, args.case)
    with common.Progress(len(todo), unit=" cases") as bar:
        for task, case in todo:
            bar.say(f"{task}, {case}")
            wanted = prompts(encode, task, case, n=args.n, size=size, max_len=len(model.table))
            try:
                for prompt in wanted:
                    lab = lab_of(model, config, prompt)
                    if (got := look(lab, prompt, args.layer)) is not None:
                        found.append(got)
                        cases.append(case)
            except NoPrompt as none:
                print(f"note: left out: {none}", file=sys.stderr)
            bar.update()
    values, astray = np.array([v for v, _ in found]), np.array([a for _, a in found])
    if not len(astray) or astray.all() or not astray.any():
        raise common.ScriptError(
            f"{astray.sum()} of {len(astray)} prompts are led astray: take more"
        )
    rows = [row(layer, values[:, i], astray, np.array(cases)) for i, layer in enumerate(args.layer)]
    common.report(args, show(rows), {"gate": rows})
    if args.table:
        tables.write_tables(args.table, {"gate": rows})
    return 0
