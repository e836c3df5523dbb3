"""What reuse does to answers: selectors side by side on the same prompts and the same cache.

Every prompt is served by full prefill and by each selector at each budget, over KV that full
prefill left of the prompts before it.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import torch

from kvshare_sglang.bench import common, options, tasks
from kvshare_sglang.bench.common import ScriptError
from kvshare_sglang.bench.quality import result, tables
from kvshare_sglang.bench.quality.cases import CASES, NoPrompt, cells
from kvshare_sglang.bench.quality.measure import Setting, measure
from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.policy.select.baselines import SCORES

# rerun: full prefill in two chunks, the noise of another order of sums. trace+refresh: tokens are
# fed one by one after the prompt, and what they turn to is refreshed.
SELECTORS = (
    "full", "copy", "epic", "random", "window", *SCORES, "dhd", "trace", "trace+refresh", "oracle",
    "rerun",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    names = ", ".join(SELECTORS)
    options.add_model(parser)
    add("--task", nargs="+", choices=(*tasks.TASKS, "text"), default=(*tasks.TASKS, "text"))
    add("--case", nargs="+", choices=CASES, default=CASES)
    add("--selector", nargs="+", default=SELECTORS, metavar="NAME[=BUDGET]", help=f"of {names}")
    add("--budget", nargs="+", type=float, default=[0.12], help="for those that name none")
    add("--layer", type=int, default=1, help="the check layer")
    add("--n", type=int, default=500, help="prompts of each case")
    add("--draw", type=int, default=0, metavar="K",
        help="other prompts: those of 0 are what choices in the code were made on")  # fmt: skip
    add("--rouge", type=int, default=0, help="of the splices: how many to continue for ROUGE-L")
    add("--facts", type=int, default=60, help="sentences in a prompt")
    add("--min-reuse", type=int, default=32, help="--kvshare-min-reuse")
    add("--seam", type=int, default=16, help="--kvshare-seam")
    add("--window", type=int, default=16, help="--kvshare-window")
    add("--probe-at", type=float, help="--kvshare-probe-at (default: the model's calibration)")
    add("--stretch", type=int, help="--kvshare-stretch (default: the model's calibration)")
    add("--refresh-rows", type=int, default=24, help="--kvshare-refresh-rows")
    add("--refresh-above", type=float, default=0.2, help="--kvshare-refresh-above")
    add("--workers", type=int, default=1, help="cases measured side by side")
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    add("--result", type=Path, metavar="IN.json", help="show an earlier result, measure nothing")
    options.add_table(parser)
    add("--plot", type=Path, metavar="OUT.png", help="where a page of plots goes")


def run(args: argparse.Namespace) -> int:
    found = result.load(args.result) if args.result else _measured(args)
    if found["rows"]:
        print(result.show(found["rows"]))
    if args.json and not args.result:
        print(f"numbers: {args.json}")
    if args.plot:
        from kvshare_sglang.bench.quality import plot

        plot.draw(found["rows"], args.plot)
        print(f"plot: {args.plot}")
    if args.table:
        tables.write_tables(args.table, found)
    return 0


def _measured(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and, where ``--json`` says so, write the result after each case."""
    args.model = options.model_directory(args.model)
    args.selector = _selectors(args.selector, args.budget)
    layers = json.loads((args.model / "config.json").read_text())["num_hidden_layers"]
    options.check_layers([args.layer], of=layers)
    todo = cells(args.task, args.case)
    found: dict[str, Any] = {"rows": [], "decode": [], "stream": []}
    setting = Setting(
        args.model, args.dtype, args.device, _config(args), args.selector,
        layer=args.layer, n=args.n, facts=args.facts, rouge=args.rouge, draw=args.draw,
    )  # fmt: skip
    rows: list[dict[str, Any]] = []
    threads = max(1, common.threads() // args.workers)
    context = multiprocessing.get_context("spawn")
    with (
        common.Progress(len(todo), unit=" cases") as bar,
        concurrent.futures.ProcessPoolExecutor(
            args.workers, context, initializer=_start_worker, initargs=(threads,)
        ) as pool,
    ):
        jobs = {pool.submit(measure, setting, *cell): cell for cell in todo}
        for job in concurrent.futures.as_completed(jobs):
            try:
                rows += job.result()
            except NoPrompt as none:
                print(f"note: left out: {none}", file=sys.stderr)
            rows.sort(key=lambda r: todo.index((r["task"], r["case"])))
            bar.say(", ".join(jobs[job]))
            bar.update()
            found["rows"] = rows
            common.write_result(args, found)  # as far as it got: nothing is lost on the way
    if not rows:
        raise ScriptError("no prompt of any task and case that was asked for")
    return found


def _config(args: argparse.Namespace) -> KVShareConfig:
    chosen = options.measured(args.model)
    given = {"probe_at": args.probe_at, "stretch": args.stretch}
    chosen |= {name: value for name, value in given.items() if value is not None}
    return KVShareConfig(
        select="trace", min_reuse=args.min_reuse, seam=args.seam, window=args.window,
        refresh_every=1, refresh_above=args.refresh_above, refresh_rows=args.refresh_rows,
        **chosen,
    )  # fmt: skip


def _selectors(texts: list[str], budgets: list[float]) -> list[tuple[str, float]]:
    """Each selector with each of its budgets; what cannot be taken is refused."""
    chosen: list[tuple[str, float]] = []
    for text in texts:
        name, _, budget = text.partition("=")
        if name not in SELECTORS:
            raise ScriptError(f"--selector must be one of {', '.join(SELECTORS)}, got {name!r}")
        several = [0.0] if name in ("copy", "full") else budgets
        try:
            chosen += [(name, b) for b in ([float(budget)] if budget else several)]
        except ValueError:
            raise ScriptError(
                f"the budget of --selector {name} must be a number, got {budget!r}"
            ) from None
    if not all(0 <= b <= 1 for _, b in chosen):
        raise ScriptError(f"budgets must be in [0, 1], got {', '.join(str(b) for _, b in chosen)}")
    return chosen


def _start_worker(threads: int) -> None:
    torch.set_num_threads(threads)
