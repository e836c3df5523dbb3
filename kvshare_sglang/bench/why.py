"""Which stale rows spoil an answer: full prefill's KV is put in place of copies, part by part.

Codes in moved passages, as in the command ``text``. Nothing is recomputed over copies here unless a
part says so, so what is put right is right to the last bit; the question's rows always run.
"""

import argparse
from typing import Any

import numpy as np
import torch

from kvshare_sglang.bench import common
from kvshare_sglang.bench.passages import Asked
from kvshare_sglang.bench.quality.outcomes import follow
from kvshare_sglang.bench.text import add_shared, finish, start
from kvshare_sglang.bench.text.chat import WRITTEN, Texts, cached, of_full, reuse, truth
from kvshare_sglang.bench.text.lines import fill
from kvshare_sglang.bench.text.places import PARTS, SIDES, Places, part_and_side
from kvshare_sglang.bench.text.prompts import asked, pool
from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.plan import Rows
from kvshare_sglang.policy.select.base import required_rows
from kvshare_sglang.sim.engine import KV, Lab, Model
from kvshare_sglang.sim.writing import side_by_side

HELD = ("its sentence", "all sentences", "other sentences", "its digits")  # by the trace?


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shared(parser)
    add = parser.add_argument
    add("--task", choices=("codes3", "codes5"), default="codes3")
    add("--part", nargs="+", default=list(PARTS), help="with ' | K', ' | V' or ' | run'")


def run(args: argparse.Namespace) -> int:
    passages = pool(args.passages, longest=args.longest)
    parts = {name: part_and_side(name) for name in args.part}
    texts, model = start(args)
    with common.Progress(args.n, unit=" prompts") as bar:
        fill(
            args.out / f"{args.task}-patched.jsonl", asked(passages, args.task, "splice"), args.n,
            lambda many: [why(model, texts, one, parts) for one in many], bar,
        )  # fmt: skip
    return finish(args)


def patched(copied: KV, truth: KV, rows: Rows, side: str) -> KV:
    """Copies with full prefill's K, V or both at ``rows``."""
    kv = KV(copied.k.clone(), copied.v.clone())
    at = torch.as_tensor(rows.positions, device=kv.k.device)
    for mine, true, wanted in zip(kv, truth, SIDES[side], strict=True):
        if wanted:
            mine[:, at] = true[:, at]
    return kv


def why(
    model: Model, texts: Texts, one: Asked, parts: dict[str, tuple[str, str]]
) -> dict[str, Any]:
    """One prompt under full prefill, and under copies with each of the parts put right."""
    places = Places(texts, one)
    ids, config = places.ids, KVShareConfig()
    lab = Lab(model, config)
    cached(lab, texts, one)
    plan = reuse(lab, ids)
    true = truth(model, texts, ids, one)
    found = {"full": of_full(model, texts, true, one)}
    copied = lab.copied(ids, plan, room=WRITTEN)
    required = required_rows(plan, suffix=config.seam)
    firsts: list[torch.Tensor] = []
    kvs: list[KV] = []
    for name, (part, side) in parts.items():
        rows = Rows.where(PARTS[part](places) & plan.reused_rows.mask(len(ids)))
        kv = patched(copied, true.kv, rows, side)
        again = required | rows if side == "run" else required
        hidden, _ = model.run(ids, kv, again.positions)
        first = model.logits(hidden[-1])
        along = (follow(model, kv, first, path, len(ids)) for path in true.paths)
        found[name] = true.measured(*along) | {"share": rows.num / plan.reused}
        firsts.append(first)
        kvs.append(kv)
    many = side_by_side(model, firsts, kvs, [len(ids)] * len(kvs), WRITTEN, stop=texts.stop)
    for name, written in zip(parts, many, strict=True):
        found[name] |= texts.said(written, one) | {"same": written == true.answer}
    chosen = lab.prefill(ids, plan, "trace", budget=config.budget).rows[-1]
    holds = {
        name: float(np.isin(np.flatnonzero(PARTS[name](places)), chosen).mean()) for name in HELD
    }
    return {"tokens": len(ids), "answers": one.answers, "trace_holds": holds, "arms": found}
