"""Measure what reuse does to a model's answers, and where its traces should look: a server's file.

Prompts are made of prose in Python's own documentation, in the model's own chat. Each is served by
full prefill, by copies alone, and by a trace with each candidate layer and stretch; then by the
best of these with each budget, and by one that knows what the sources attended to, in plain torch
over the plug-in's own selectors. Ends when all are through, or when ``--minutes`` are over.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from transformers.utils import logging

from kvshare_sglang.bench import common, models, options
from kvshare_sglang.bench.calibrate.choice import (
    BUDGETS,
    Best,
    choose,
    enough,
    is_better,
    judge,
    means,
    others,
    show,
)
from kvshare_sglang.bench.calibrate.measure import Candidate, Row, candidates, measure
from kvshare_sglang.bench.calibrate.prompts import Prompt, prompts
from kvshare_sglang.bench.common import ScriptError
from kvshare_sglang.runtime import calibration
from kvshare_sglang.sim.engine import Model

DEPTHS = (0.15, 0.25, 0.35, 0.5, 0.65)
FEWEST = 12  # prompts, or nothing is chosen
MORE = 0.3  # of the time for budgets, where the default is not enough
DEPENDS = (0.5, 0.69)  # depths at which it is looked at what the sources attended to
THEIRS = 0.3  # of the time for that


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help=f"a directory, a name in Hugging Face's cache, or "
        f"{models.FETCHED}")  # fmt: skip
    add("--minutes", type=float, default=10, help="stop after so many (default: 10)")
    add("--n", type=int, default=60, help="prompts, if there is time (default: 60)")
    add("--probe-at", type=float, nargs="+", default=list(DEPTHS), metavar="DEPTH",
        help=f"candidates (default: {' '.join(map(str, DEPTHS))})")  # fmt: skip
    add("--dtype", choices=("float32", "bfloat16"), help="default: float32 on a CPU, else bfloat16")
    add("--threads", type=int, help="on a CPU (default: OMP_NUM_THREADS, else all cores)")
    add("--out", type=Path, metavar="FILE",
        help=f"default: a file in {calibration.home()}, where servers look for it")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    folder = _folder(args.model)
    if not all(0 <= depth <= 1 for depth in args.probe_at):
        raise ScriptError(f"--probe-at must be in [0, 1], got {args.probe_at}")
    mark = calibration.fingerprint(folder)
    on_cpu = args.device == "cpu"
    args.dtype = args.dtype or ("float32" if on_cpu else "bfloat16")
    args.threads = args.threads or common.threads()
    torch.set_num_threads(args.threads)
    started = time.monotonic()
    logging.disable_progress_bar()
    model = Model(folder, dtype=getattr(torch, args.dtype), device=args.device)
    asked = prompts(folder, args.n, longest=len(model.table))
    among = candidates(model, args.probe_at)
    until = started + 60 * args.minutes
    later = until - 60 * args.minutes * THEIRS
    first = later - 60 * args.minutes * MORE
    rows = collect(model, asked, among, deadline=first, latest=until)
    check_many(rows, args)
    chosen = choose(rows)
    mine: list[Row] = [{arm: row[arm] for arm in (None, chosen)} for row in rows]
    mine = with_budgets(model, asked, mine, chosen, deadline=later, latest=until)
    check_many(mine, args)
    best = judge(mine)
    depends = of_sources(model, asked, chosen, rows, deadline=until)
    best = best._replace(
        means=means(rows) | best.means | ({} if depends is None else depends.means)
    )
    name = args.model if args.model == models.FETCHED else folder.name
    if (folder.parent.name, folder.parent.parent.name[:8]) == ("snapshots", "models--"):
        name = folder.parent.parent.name.removeprefix("models--")  # of Hugging Face's cache
    args.out = args.out or calibration.home() / calibration.file_name(name, mark)
    written = calibration.as_json(
        name, mark, probe_at=best.chosen.probe_at, stretch=best.chosen.stretch,
        budget=best.chosen.budget, holds=best.holds, prompts=len(mine),
        depends=None if depends is None else {
            "at": depends.chosen.depends_at, "budget": depends.chosen.budget,
            **depends.means[depends.chosen]._asdict(),
        },
        check={"trace": best.means[best.chosen]._asdict(), "copies": best.means[None]._asdict()},
        candidates=[
            {**arm._asdict(), **mean._asdict()} for arm, mean in best.means.items() if arm
        ],
        env=common.environment(device=args.device, dtype=args.dtype),
    )  # fmt: skip
    common.write_json(args.out, written)
    print(show(best, len(mine), layers=len(model.layers), depends=depends))
    print(f"calibration: {args.out}")
    common.write_result(args, {"calibration": written})
    return 0


def of_sources(
    model: Model, asked: list[Prompt], chosen: Candidate, rows: list[Row], *, deadline: float
) -> Best | None:
    """The chosen trace, knowing what the sources attended to: the better depth, and the least
    budget with which answers hold. None where it is no better, or they do not."""
    plain = [{arm: row[arm] for arm in (None, chosen)} for row in rows]
    depths = [depth for depth in DEPENDS if depth >= chosen.probe_at]
    spans = np.linspace(time.monotonic(), deadline, len(depths) + 2)[1:]
    found = {}
    for depth, until in zip(depths, spans, strict=False):
        arm = chosen._replace(depends_at=depth)
        found[depth] = collect(model, asked, [arm], deadline=until, latest=deadline)
    num = min(map(len, found.values()), default=0)  # all are judged by the same prompts
    if num < FEWEST:
        return None
    depth = min(depths, key=lambda depth: others(found[depth][:num]))
    mine, knowing = found[depth], chosen._replace(depends_at=depth)
    if not is_better(mine, plain):
        return None
    mine = with_budgets(model, asked, mine, knowing, deadline=deadline, latest=deadline)
    if len(mine) < FEWEST:
        return None
    best = judge(mine)
    best = best._replace(means={arm: mean for arm, mean in best.means.items() if arm})
    return best if best.holds else None


def with_budgets(
    model: Model, asked: list[Prompt], mine: list[Row], chosen: Candidate, *, deadline: float,
    latest: float,
) -> list[Row]:  # fmt: skip
    """The same prompts, as many as there is time for, with more rows, if these are not enough."""
    if enough(mine):
        return mine
    among = [chosen._replace(budget=budget) for budget in BUDGETS if budget > chosen.budget]
    more = collect(model, asked, among, deadline=deadline, latest=latest)
    return [row | wide for row, wide in zip(mine, more, strict=False)]


def collect(
    model: Model, asked: list[Prompt], among: list[Candidate], *, deadline: float, latest: float
) -> list[Row]:
    """Measure prompts till they are used up or, after one at least, the time is over: at
    ``deadline`` where there are enough of them, at ``latest`` in any case."""
    rows = []
    with common.Progress(len(asked), unit=" prompts") as bar:
        for one in asked:
            bar.say(one.case)
            if row := measure(model, one, among):
                rows.append(row)
            bar.update()
            if time.monotonic() > (deadline if len(rows) >= FEWEST else latest):
                break
    return rows


def check_many(rows: list[Row], args: argparse.Namespace) -> None:
    """Raise ScriptError where too few prompts are through to say anything."""
    if len(rows) < FEWEST:
        raise ScriptError(
            f"only {len(rows)} prompts were through within --minutes {args.minutes:g}, at least"
            f" {FEWEST} are needed for each step: give it more"
        )


def _folder(name: str) -> Path:
    if name == models.FETCHED:
        return options.model_directory(Path(name))
    folder = calibration.folder_of(name)
    if folder is None or not (folder / "config.json").is_file():
        raise ScriptError(f"MODEL {name} is no model directory, and not in Hugging Face's cache")
    return folder
