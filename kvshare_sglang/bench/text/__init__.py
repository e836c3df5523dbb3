"""What reuse does to answers about real passages, by a model with real weights.

First ``--case alone`` says which tasks full prefill solves. Then each prompt of a case is served by
full prefill and by each arm over the same cache. A run that was stopped goes on where it was:
prompts of a task and case are always the same ones, and those in the folder are left out.
``--requests`` plays a file of requests instead, and says how far from full prefill each comes out.
"""

import argparse
import functools
import zlib
from pathlib import Path
from typing import Any

import torch

from kvshare_sglang.bench import common, models, options
from kvshare_sglang.bench.common import ScriptError
from kvshare_sglang.bench.passages import Asked, Passage
from kvshare_sglang.bench.server import ServerSpec, serve
from kvshare_sglang.bench.text import arms, report, requests, served
from kvshare_sglang.bench.text.chat import Texts
from kvshare_sglang.bench.text.lines import begin, fill
from kvshare_sglang.bench.text.prompts import ALONE, CASES, CHAT, SAMPLE, TASKS, asked, pool
from kvshare_sglang.bench.texts import fitting
from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.runtime import calibration
from kvshare_sglang.sim.engine import Lab, Model

# what makes a line of a folder besides its task and case
MAKE_A_LINE = (
    "model", "passages", "longest", "requests", "filler", "draw", "arm", "budget", "served",
    "server_arg", "part",
)  # fmt: skip
BATCH = 8  # prompts answered side by side where only full prefill is asked


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shared(parser)
    add = parser.add_argument
    names = [name for name in arms.ARMS if name not in arms.NOT_ASKED]
    add("--requests", type=Path, metavar="FILE",
        help="instead of passages: its first --n prompts, each after those before it")  # fmt: skip
    add("--task", nargs="+", choices=TASKS, default=list(TASKS))
    add("--case", nargs="+", choices=CASES, default=["splice", "edit"])
    add(
        "--filler", type=int, default=0, help="passages without an answer that a prompt has besides"
    )
    add("--draw", type=int, default=0, metavar="K", help="other prompts of the same kind")
    add("--arm", nargs="+", choices=arms.ARMS, default=names, help="besides full prefill")
    add("--budget", nargs="+", type=float, default=[], metavar="SHARE",
        help="each arm at each of these, as 'trace 0.3' (default: the model's)")  # fmt: skip
    add("--plot", type=Path, metavar="OUT.png", help="right answers and KL against FLOPs")
    add("--served", nargs="*", choices=served.ARMS, metavar="ARM",
        help=f"by the real server: of {', '.join(served.ARMS)} (default: ours)")  # fmt: skip
    add("--server-arg", action="append", default=[], metavar="ARG",
        help="served: one more argument for the server, as --server-arg=--flag")  # fmt: skip


def add_shared(parser: argparse.ArgumentParser) -> None:
    """The options that ``why`` has too."""
    add = parser.add_argument
    add("--passages", type=Path, default=SAMPLE, metavar="FILE",
        help="with questions (default: 24 paragraphs, benchmarks/passages)")  # fmt: skip
    options.add_model(parser, default=Path(models.FETCHED))
    add("--longest", type=int, default=700, metavar="CHARACTERS", help="of a passage")
    add("--n", type=int, default=40, help="prompts of each task and case")
    add("--threads", type=int, default=1)
    add("--out", type=Path, required=True, metavar="DIR", help="a file for each task and case")
    add("--json", type=Path, metavar="OUT", help="default: DIR/summary.json")


def run(args: argparse.Namespace) -> int:
    if args.requests:
        return run_requests(args)
    passages = pool(args.passages, longest=args.longest)
    cells = [(task, case) for case in args.case for task in args.task]
    if args.served is not None:
        return run_served(args, passages, cells)
    if CHAT in args.case:
        raise ScriptError(f"--case {CHAT} needs --served: the driver knows no earlier turns")
    if args.plot and ALONE in args.case:
        raise ScriptError(f"--plot draws arms, and --case {ALONE} has none")
    texts, model = start(args)
    chosen, config = asked_for(args)

    def rows(case: str, many: list[Asked]) -> list[dict[str, Any]]:
        if case == ALONE:
            return arms.alone(model, texts, many)
        return [
            arms.reused(
                model, texts, one, chosen, seed=zlib.crc32(one.prompt.encode()), config=config
            )
            for one in many
        ]

    with common.Progress(len(cells) * args.n, unit=" prompts") as bar:
        for task, case in cells:
            bar.say(f"{task}, {case}")
            fill(
                args.out / f"{task}-{case}.jsonl",
                asked(passages, task, case, filler=args.filler, draw=args.draw), args.n,
                functools.partial(rows, case), bar,
                together=BATCH if case == ALONE else 1,
            )  # fmt: skip
    return finish(args, plotted=args.plot)


def asked_for(args: argparse.Namespace) -> tuple[dict[str, arms.Arm], KVShareConfig]:
    """The arms, and the options of those that name none: a server's for this model."""
    if not all(0 < budget <= 1 for budget in args.budget):
        raise ScriptError(f"--budget must be in (0, 1], got {', '.join(map(str, args.budget))}")
    return arms.chosen(args.arm, args.budget), KVShareConfig(**options.measured(args.model))


def run_requests(args: argparse.Namespace) -> int:
    """As ``run``, of prompts whose right answer nobody knows."""
    if args.served is not None:
        raise ScriptError("--requests is measured by the driver: leave out --served")
    texts, model = start(args)
    chosen, config = asked_for(args)
    many, _ = fitting(
        args.requests, texts.told, limit=args.n, most=len(model.table) - requests.WRITTEN
    )
    requests.check_memory(model, many)
    played = requests.Played(model, texts, Lab(model, config), chosen)
    with common.Progress(len(many), unit=" prompts") as bar:
        bar.say(args.requests.stem)
        fill(
            args.out / f"requests-{args.requests.stem}.jsonl", played.arriving(many), len(many),
            lambda some: [played.row(ids) for ids in some], bar,
        )  # fmt: skip
    return finish(args, plotted=args.plot)


def run_served(
    args: argparse.Namespace, passages: list[Passage], cells: list[tuple[str, str]]
) -> int:
    if ALONE in args.case:
        raise ScriptError("--served needs a cache: --case alone is for the driver")
    if args.budget:
        raise ScriptError("--budget is for the driver's arms: --served names its own")
    texts, chosen = folder(args), args.served or ["ours"]
    spec = ServerSpec(
        "ours", args.model, args.device, threads=args.threads,
        args=("--kvshare", *args.server_arg),
    )  # fmt: skip
    with serve(spec) as (server,), common.Progress(len(cells) * args.n, unit=" prompts") as bar:
        for task, case in cells:
            bar.say(f"{task}, {case}, served")
            fill(
                args.out / f"{task}-{case}.jsonl",
                asked(passages, task, case, filler=args.filler, draw=args.draw), args.n,
                lambda many: [served.answers(server, texts, one, chosen) for one in many], bar,
            )  # fmt: skip
    return finish(args, plotted=args.plot)


def start(args: argparse.Namespace) -> tuple[Texts, Model]:
    """The model that was asked for, and the folder of its answers."""
    texts = folder(args)
    torch.set_num_threads(args.threads)
    return texts, Model(args.model, device=args.device)


def folder(args: argparse.Namespace) -> Texts:
    """The folder of the answers, and the model's tokens."""
    args.model = options.model_directory(args.model)
    args.json = args.json or args.out / "summary.json"
    made = {name: getattr(args, name) for name in MAKE_A_LINE if hasattr(args, name)}
    made = {k: v.name if isinstance(v, Path) else v for k, v in made.items()}
    how = {"recipe": calibration.RECIPE, "measured": options.measured(args.model)}
    begin(args.out, made | how)
    return Texts(args.model)


def finish(args: argparse.Namespace, *, plotted: Path | None = None) -> int:
    """Sum up all that the folder holds, ``plotted`` too where there is a place for it."""
    rows = report.summary(args.out)
    level = report.same_flops(args.out)
    doubts = report.doubts(args.out)
    text = report.show(rows) + ("\n\n" + report.show_level(level) if level else "")
    text += "\n\n" + report.show_doubts(doubts) if doubts else ""
    found = {
        "rows": rows, "flips": report.flips(args.out), "same_flops": level, "doubts": doubts,
    }  # fmt: skip
    common.report(args, text, found)
    if plotted:
        from kvshare_sglang.bench.text import plot

        plot.draw(rows, plotted)
        print(f"plot: {plotted}")
    return 0
