"""Which arms answer a prompt, and what each gives: full prefill, and reuse over one cache."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import torch

from kvshare_sglang.bench.passages import Asked
from kvshare_sglang.bench.quality.outcomes import follow, in_two_chunks, shares
from kvshare_sglang.bench.text.chat import (
    WRITTEN,
    Texts,
    Truth,
    alike,
    cached,
    of_full,
    reuse,
    truth,
)
from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.plan import ReusePlan
from kvshare_sglang.sim.engine import Lab, Model, Partial
from kvshare_sglang.sim.writing import refreshing, side_by_side

NOT_ASKED = ("rerun", "all")  # by default
FIXED = ("copy", "full", "rerun")  # selectors without a budget
LAYER = 1  # at which a check compares, as --kvshare-check-layer


class Arm(NamedTuple):
    """A selector with what differs from the server's options; ``budget`` None: the model's."""

    selector: str
    options: dict[str, Any] = {}  # noqa: RUF012  (never changed)
    budget: float | None = None
    every: int = 0  # refresh while decoding, as --kvshare-refresh-every


ARMS = {
    "copies": Arm("copy", budget=0.0),
    "window": Arm("window"),
    "dhd": Arm("dhd"),
    "epic": Arm("epic"),
    "cacheblend": Arm("cacheblend"),
    "prophetkv": Arm("prophetkv"),
    "trace": Arm("trace"),
    "trace unknowing": Arm("trace", {"depends_at": 0.0}),  # of what sources attended to
    "trace refresh": Arm("trace", every=1),
    "deviation": Arm("oracle"),  # true deviation over all layers
    "rerun": Arm("rerun"),  # full prefill in two chunks: the noise of another order of sums
    "all": Arm("full", budget=1.0),  # a check of this module: as full prefill
}


def chosen(names: list[str], budgets: list[float]) -> dict[str, Arm]:
    """Arms by what the result calls them: each at each budget where there are any, as ``trace
    0.3``, but those that have none."""
    found = {}
    for name in names:
        arm = ARMS[name]
        if not budgets or arm.selector in FIXED:
            found[name] = arm
        else:
            found |= {f"{name} {b:g}": arm._replace(budget=b) for b in budgets}
    return found


def alone(model: Model, texts: Texts, many: list[Asked]) -> list[dict[str, Any]]:
    """Full prefill's answers, written side by side."""
    ids = [texts.ids(one.prompt) for one in many]
    firsts, kvs = zip(*(model.full(i) for i in ids), strict=True)
    told = side_by_side(model, firsts, kvs, [len(i) for i in ids], WRITTEN, stop=texts.stop)
    return [
        {"tokens": len(i), "arms": {"full": texts.said(t, one)}}
        for i, t, one in zip(ids, told, many, strict=True)
    ]


def reused(
    model: Model, texts: Texts, one: Asked, arms: dict[str, Arm], *, seed: int,
    config: KVShareConfig | None = None,
) -> dict[str, Any]:  # fmt: skip
    """One prompt under full prefill and all arms, after what was cached before it. ``config``: the
    options of an arm that has no others, by default the server's."""
    ids = texts.ids(one.prompt)
    lab = Lab(model, config or KVShareConfig())
    cached(lab, texts, one)
    true = truth(model, texts, ids, one)
    plan = reuse(lab, ids)
    return {"answers": one.answers, **compared(lab, texts, true, plan, arms, one=one, seed=seed)}


def compared(
    lab: Lab, texts: Texts, true: Truth, plan: ReusePlan, arms: dict[str, Arm], *,
    one: Asked | None = None, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """Full prefill and each arm over the runs of ``plan``; where it has none, an arm is full
    prefill, at its cost."""
    ids, model, config = true.ids, lab.model, lab.config
    room = max(map(len, true.paths)) - len(ids)
    found = {"full": of_full(model, texts, true, one)}
    apart: dict[str, Partial] = {}
    for name, arm in arms.items():
        if not plan.copies:
            found[name] = found["full"] | {"recomputed": 1.0, "computed": 1.0}
            continue
        if arm.selector == "rerun":
            first, kv = in_two_chunks(model, ids, room=room)
            done, spent = Partial(first, kv, [], plan), (1.0, 1.0)
        else:
            lab.config = dataclasses.replace(config, **arm.options)
            budget = config.budget if arm.budget is None else arm.budget
            done = lab.prefill(
                ids, plan, arm.selector, budget=budget, check_layer=LAYER, seed=seed,
                truth=true.kv, room=room,
            )  # fmt: skip
            spent = shares(lab, plan, done, arm.selector, layer=LAYER)
        measured = true.measured(*(_along(lab, arm, done, path, len(ids)) for path in true.paths))
        found[name] = found["full"] | measured
        found[name] |= dict(zip(("recomputed", "computed"), spent, strict=True))
        if measured["top1"] == 1:
            continue  # it writes what full prefill writes
        if arm.every:
            written, count = refreshing(
                lab, ids, done, true.written, every=arm.every, stop=texts.stop
            )
            found[name] |= texts.said(written, one) | alike(written, true.answer)
            found[name]["refreshed"] = count
        else:
            apart[name] = done
    lab.config = config
    if apart:
        firsts, kvs = zip(*((d.logits, d.kv) for d in apart.values()), strict=True)
        many = side_by_side(
            model, firsts, kvs, [len(ids)] * len(kvs), true.written, stop=texts.stop
        )  # fmt: skip
        for name, written in zip(apart, many, strict=True):
            found[name] |= texts.said(written, one) | alike(written, true.answer)
    return {"tokens": len(ids), "copied": plan.reused / len(ids), "arms": found}


def _along(lab: Lab, arm: Arm, done: Partial, told: np.ndarray, known: int) -> torch.Tensor:
    """Log-probabilities along ``told[known:]``, refreshed on the way where the arm does so."""
    if not arm.every:
        return follow(lab.model, done.kv, done.logits, told, known)
    rest, _ = lab.decode(told[:-1], known, done, every=arm.every)
    return torch.cat([done.logits[None], rest]).log_softmax(-1)
