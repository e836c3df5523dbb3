"""What refresh while decoding does to answers that turn to copied rows only as they are written.

The question asks for a list and names no key, so nothing tells before decoding which rows will
matter. The keys are fed as if they had been written; each value is the model's own.
"""

import argparse
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from kvshare_sglang.bench import common, options, tasks
from kvshare_sglang.bench.quality import tables
from kvshare_sglang.bench.quality.cases import Encoder
from kvshare_sglang.bench.quality.outcomes import follow
from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.sim.engine import Lab, Model

SIZE = tasks.Size(60, 4, prose=0.06)


def right_values(logprobs: torch.Tensor, told: np.ndarray, values: list[range]) -> list[bool]:
    """Whether each value is what greedy decoding writes. ``logprobs`` [n, vocab] are along
    ``told`` [n]; ``values`` are ranges in it."""
    best = logprobs.argmax(-1).cpu().numpy()
    return [all(best[i] == told[i] for i in where) for where in values]


class List(NamedTuple):
    """What is cached and what is asked, in tokens; what is before each value, and the value."""

    cached: np.ndarray
    ids: np.ndarray
    parts: list[tuple[str, str]]


def lists(
    encode: Encoder, seed: str, task: str, *, facts: int = SIZE.facts, keys: int = 5
) -> Iterator[List]:
    """Without end: ten slots of the prompt were edited, and the question names no key."""
    rng, filler = random.Random(seed), tasks.sentences("test")
    size = SIZE._replace(facts=facts)
    while True:
        try:
            pair, parts = tasks.listing(rng, task, size, keys=keys, filler=filler)
        except ValueError:  # few scenes have so many keys of this task
            continue
        cached, ids = (
            encode(tasks.listing_prompt(sample), start=True)
            for sample in (pair.cached[0], pair.prompt)
        )
        yield List(cached, ids, parts)


def one(lab: Lab, encode: Encoder, asked: List, args: argparse.Namespace) -> dict[str, Any] | None:
    model, ids = lab.model, asked.ids
    told: list[int] = []
    values: list[range] = []
    for key, value in asked.parts:
        told += encode(key).tolist()
        tokens = encode(value).tolist()
        values.append(range(len(told), len(told) + len(tokens)))
        told += tokens
    lab.add(asked.cached)
    plan = lab.plan(ids)
    if not plan.copies:
        return None
    known = len(ids)
    along = np.concatenate([ids, np.asarray(told, ids.dtype)])
    out: dict[str, Any] = {}
    first, kv = model.full(ids)
    out["full"] = right_values(follow(model, kv, first, along, known), along[known:], values)
    done = lab.prefill(ids, plan, "trace", budget=args.budget, room=len(told))
    logits = follow(model, done.kv, done.logits, along, known)
    out["off"] = right_values(logits, along[known:], values)
    rest, out["refreshed"] = lab.decode(along[:-1], known, done, every=args.every)
    logits = torch.cat([done.logits[None], rest]).log_softmax(-1)
    out["on"] = right_values(logits, along[known:], values)
    return out


def row(task: str, found: list[dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    whole = {way: np.array([all(f[way]) for f in found], float) for way in ("full", "off", "on")}
    values = {way: np.array([v for f in found for v in f[way]], float) for way in whole}
    far = list(whole["on"] - whole["full"])
    return {
        "task": task, "n": len(found), "keys": args.keys,
        **{f"accuracy_{way}": float(v.mean()) for way, v in whole.items()},
        **{f"value_accuracy_{way}": float(v.mean()) for way, v in values.items()},
        "ci95": common.bootstrap_ci95(far, statistic=np.mean),
        "refreshing": float(np.mean([f["refreshed"] > 0 for f in found])),
        "refreshed_rows": float(np.mean([f["refreshed"] for f in found])),
    }  # fmt: skip


def show(rows: list[dict[str, Any]]) -> str:
    return common.columns(
        rows,
        task="{task}",
        n="{n}",
        lists_right="{accuracy_on:.3f}",
        in_full="{accuracy_full:.3f}",
        no_refresh="{accuracy_off:.3f}",
        values_right="{value_accuracy_on:.3f}",
        of_full="{value_accuracy_full:.3f}",
        unrefreshed="{value_accuracy_off:.3f}",
        refreshing="{refreshing:.1%}",
        rows="{refreshed_rows:.1f}",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    options.add_model(parser)
    add("--task", nargs="+", choices=("lookup", "hops", "state"), default=("hops", "state"))
    add("--n", type=int, default=500, help="lists of each task")
    add("--keys", type=int, default=5, help="values in a list")
    add("--facts", type=int, default=60, help="sentences in a prompt")
    add("--budget", type=float, default=0.12, help="--kvshare-budget")
    add("--seam", type=int, default=16, help="--kvshare-seam")
    add("--every", type=int, default=1, help="--kvshare-refresh-every")
    add("--rows", type=int, default=24, help="--kvshare-refresh-rows")
    add("--above", type=float, default=0.2, help="--kvshare-refresh-above")
    options.add_table(parser)


def run(args: argparse.Namespace) -> int:
    args.model = options.model_directory(args.model)
    model, encode = Model(args.model, dtype=torch.bfloat16, device=args.device), Encoder(args.model)
    config = KVShareConfig(
        select="trace", min_reuse=32, seam=args.seam, window=16, refresh_every=args.every,
        refresh_rows=args.rows, refresh_above=args.above, **options.measured(args.model),
    )  # fmt: skip
    rows = []
    with common.Progress(len(args.task) * args.n, unit=" lists") as bar:
        for task in args.task:
            found: list[dict[str, Any]] = []
            wanted = lists(encode, f"test decode {task}", task, facts=args.facts, keys=args.keys)
            while len(found) < args.n:
                got = one(Lab(model, config), encode, next(wanted), args)
                if got is not None:
                    found.append(got)
                    bar.update()
            rows.append(row(task, found, args))
    common.report(args, show(rows), {"decode": rows})
    if args.table:
        tables.write_tables(args.table, {"decode": rows})
    return 0
