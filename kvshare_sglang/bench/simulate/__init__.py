"""Simulate servers on a trace: orders, routes and 1 to 64 workers (1,024 where documents are only
counted), with the policies' own code.

Step costs come from ``--calibrate``, which measures a real server. ``--real`` runs a real server
and the simulation on one trace and says how far they are apart; ``--records`` does so for an
earlier load test, of any number of workers.
"""

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kvshare_sglang.bench import common, load, models
from kvshare_sglang.bench.common import ScriptError
from kvshare_sglang.bench.load import aiperf, summary, trace
from kvshare_sglang.bench.load.targets import Configuration, make_ready
from kvshare_sglang.bench.load.trace import Timed
from kvshare_sglang.bench.server import add_server_arguments, serve
from kvshare_sglang.bench.simulate import calibrate, policies, synthetic
from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.runtime import calibration
from kvshare_sglang.sim.caches import DocumentCache, TextCache
from kvshare_sglang.sim.serving import Cache, Job, Limits, Result, StepCosts, simulate

MOST_COUNTED = 1024  # workers
FREE = KVShareConfig(budget=0, seam=0, min_reuse=1, min_share=0, source_depth=16)
COLUMNS = {
    "workers": "{workers}",
    "route": "{route}",
    "order": "{order}",
    "reuse": "{reuse}",
    "mean_s": "{ttft_mean_s:.3f}",
    "p50": "{ttft_p50_s:.3f}",
    "p99": "{ttft_p99_s:.3f}",
    "longest": "{longest_wait_s:.3f}",
    "queue": "{queue_mean:.1f}",
    "busy": "{busy:.0%}",
    "exact": "{exact:.1%}",
    "copied": "{copied:.1%}",
    "run": "{run:.1%}",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_server_arguments(parser)
    load.add_trace_arguments(parser, needed=False)
    add = parser.add_argument
    add(
        "--synthetic",
        type=int,
        metavar="N",
        help="N drawn requests instead of files; counted, not written",
    )
    add("--text", action="store_true",
        help="of --synthetic: write them out, for the real index")  # fmt: skip
    add("--workers", type=int, nargs="+", default=[1], metavar="N")
    add("--route", nargs="+", default=["least_load"], metavar="NAME",
        help=f"{', '.join(policies.ROUTES)}, or MODULE:FUNCTION")  # fmt: skip
    add("--order", nargs="+", default=["fcfs"], metavar="NAME",
        help=f"{', '.join(policies.ORDERS)}, or MODULE:FUNCTION")  # fmt: skip
    add("--reuse", nargs="+", choices=("on", "off", "free"), default=["off", "on"],
        help="with the plug-in, without; free: as if nothing that is found ran again")  # fmt: skip
    add("--bound", type=int, default=KVShareConfig().schedule_bound,
        help="rows by which order kvshare may overtake")  # fmt: skip
    add("--model", default=models.FETCHED, help="directory, shape file, a shape here, or smollm2")
    load.add_size_arguments(parser)
    add("--costs", type=Path, metavar="FILE", help="step costs that --calibrate wrote")
    add("--calibrate", type=Path, metavar="FILE", help="measure step costs, write them there, end")
    add("--samples", type=int, default=3, help="--calibrate: how often each is measured")
    add("--real", action="store_true",
        help="calibrate, run and simulate plain SGLang and kvshare, and compare")  # fmt: skip
    add("--records", type=Path, metavar="FILE",
        help="records.jsonl of a load test of the same trace: compare with it")  # fmt: skip
    add("--configuration", metavar="NAME", help="which of its configurations")
    add("--aiperf", type=Path, default=aiperf.COMMAND, metavar="PATH", help="its command")


def run(args: argparse.Namespace) -> int:
    check(args)
    if args.calibrate:
        model = models.open_model(args.model)
        one = Configuration("kvshare", ("--kvshare",))
        value = calibrated(args, one, model)
        common.write_json(
            args.calibrate, {**value, "env": common.environment(model=model.path.name)}
        )
        print(f"{costs_text(value)}\nwritten: {args.calibrate}")
        return 0
    if args.real:
        return compare_real(args)
    costs = read_costs(args.costs)
    rows = []
    fresh = jobs_of(args)
    most = itertools.product(args.workers, args.route, args.order, args.reuse)
    for workers, route, order, reuse in most:
        if workers == 1 and route != args.route[0]:
            continue  # there is no choice
        result = simulated(args, costs, fresh(), workers, route, order, reuse)
        rows.append({"workers": workers, "route": route if workers > 1 else "-", "order": order,
                     "reuse": reuse, **figures(result)})  # fmt: skip
    text = common.columns(rows, **COLUMNS)
    if args.records:
        text += "\n\n" + against(args, rows)
    common.report(args, text, {"rows": rows, "costs": costs._asdict()})
    return 0


def check(args: argparse.Namespace) -> None:
    """Raise ScriptError for options that are out of range or do not go together."""
    load.check_numbers(args, "limit", "max_new_tokens", "speedup", "rate", "synthetic", "bound")
    counted = args.synthetic is not None and not args.text
    most = MOST_COUNTED if counted else policies.SHARD
    if bad := [n for n in args.workers if not 1 <= n <= most]:
        more = "" if counted else f"; --synthetic without --text takes {MOST_COUNTED}"
        raise ScriptError(f"--workers must be in [1, {most}], got {bad[0]}{more}")
    if "sharded" in args.route and not counted:
        raise ScriptError("--route sharded is of documents that are counted: --synthetic N")
    if args.calibrate:
        return
    if args.synthetic is not None and (args.real or args.records):
        raise ScriptError("--synthetic requests are in no real run: leave --real, --records out")
    if args.synthetic is None and not (args.requests and args.arrivals):
        raise ScriptError("--requests and --arrivals are needed, or --synthetic N")
    if args.synthetic is not None and args.rate is None:
        raise ScriptError("--synthetic needs --rate")
    if args.records and not args.configuration:
        raise ScriptError("--records needs --configuration, one of those it holds")


# ---- one simulation ----------------------------------------------------------------------------


def jobs_of(args: argparse.Namespace) -> Callable[[], list[Job]]:
    """Gives the requests of the command, each time anew: a simulation writes into them."""
    if args.synthetic is not None:

        def drawn() -> list[Job]:
            jobs = synthetic.requests(
                args.synthetic, rate=args.rate, new_tokens=args.max_new_tokens
            )
            return list(synthetic.written(jobs) if args.text else jobs)

        return drawn
    model = models.open_model(args.model)
    prompts, _ = load.fitting(args, model)
    return jobs_from(load.timed(args, prompts, rate=args.rate), model)


def jobs_from(timed: list[Timed], model: models.Model) -> Callable[[], list[Job]]:
    """The same of a trace; it is tokenised once."""
    tokenizer = model.tokenizer()
    prompts = [np.asarray(tokenizer.encode(one.prompt).ids, np.int32) for one in timed]
    return lambda: [
        Job(i, one.at_s, len(ids), one.new_tokens, prompt=ids, space=one.tenant)
        for i, (one, ids) in enumerate(zip(timed, prompts, strict=True))
    ]


def simulated(
    args: argparse.Namespace, costs: StepCosts, jobs: list[Job], workers: int, route: str,
    order: str, reuse: str,
) -> Result:  # fmt: skip
    size = args.max_total_tokens
    counted = args.synthetic and not args.text
    config = KVShareConfig() if args.synthetic else served(args)
    caches = [cache_of(reuse, size, config, counted=counted) for _ in range(workers)]
    limits = Limits(args.chunk, args.max_running or 8, size)
    with common.Progress(len(jobs), unit=" requests") as bar:
        bar.say(f"{workers} x {order}, {route}, reuse {reuse}"[:34])
        return simulate(
            jobs, caches, costs=costs, limits=limits, tick=bar.update,
            order=policies.order_of(order, bound=args.bound), choose=policies.route_of(route),
        )  # fmt: skip


def served(args: argparse.Namespace) -> KVShareConfig:
    """The options that a server of ``--model`` takes where requests ask for reuse."""
    model = str(models.open_model(args.model).path)
    on_cpu = args.device == "cpu"
    return calibration.settled(KVShareConfig(), given=(), model=model, on_cpu=on_cpu)


def cache_of(reuse: str, size: int, config: KVShareConfig, *, counted: bool) -> Cache:
    """What a worker holds, of so many tokens. With reuse for *free* no row of what is found runs
    again, however deep: beside stretches too short to be copied no choice of rows saves more."""
    if counted:
        budget = {"budget": 0.0} if reuse == "free" else {}
        return DocumentCache(capacity=size, reuse=reuse != "off", **budget)
    config = FREE if reuse == "free" else config
    return TextCache(capacity=size, reuse=reuse != "off", config=config)


def figures(result: Result) -> dict[str, float]:
    """The same figures as of a load test; ``busy``: share of the time that workers ran steps."""
    waits = result.waits
    works = [job.work for job in result.jobs if job.work is not None]
    tokens = sum(job.tokens for job in result.jobs)
    lasted = max(job.end_s for job in result.jobs) - result.jobs[0].due_s
    return {
        "ttft_mean_s": float(waits.mean()),
        "ttft_p50_s": float(np.quantile(waits, 0.5)),
        "ttft_p99_s": float(np.quantile(waits, 0.99)),
        "longest_wait_s": float(waits.max()),
        "queue_mean": float(np.mean(result.queue)),
        "queue_most": float(np.max(result.queue)),
        "requests_per_s": len(waits) / lasted,
        "busy": sum(result.busy_s) / (lasted * len(result.busy_s)),
        "exact": sum(work.exact for work in works) / tokens,
        "copied": sum(work.copied for work in works) / tokens,
        "run": sum(work.rows for work in works) / tokens,
        "most_overtaken": max(job.overtaken for job in result.jobs),
    }


# ---- step costs --------------------------------------------------------------------------------


def calibrated(args: argparse.Namespace, one: Configuration, model: models.Model) -> dict[str, Any]:
    """Step costs of a real server of a configuration, the samples and the error that is left."""
    common.warn_if_busy()
    with serve(load.spec(args, one, model.path)) as (server,):
        return measured(args, server, model, reuse="--kvshare" in one.flags)


def measured(
    args: argparse.Namespace, server: Any, model: models.Model, *, reuse: bool
) -> dict[str, Any]:
    most = args.max_running or 8
    samples = calibrate.measure(
        server, vocab=model.vocab_size, chunk=args.chunk, most=most, reuse=reuse,
        repeats=args.samples,
    )  # fmt: skip
    late = pads = args.device == "cpu"
    decode = calibrate.measure_decode(server, vocab=model.vocab_size, batch=most, late=late)
    costs, left = calibrate.fit(samples, decode)
    return {
        "costs": costs._replace(late=late, pads=pads)._asdict(), "error": left, "decode_s": decode,
        "samples": [one._asdict() for one in samples],
    }  # fmt: skip


def costs_text(value: dict[str, Any]) -> str:
    costs = {name: cost for name, cost in value["costs"].items() if not isinstance(cost, bool)}
    told = ", ".join(f"{name} {1e3 * seconds:.3g}" for name, seconds in costs.items())
    read = ", read a step late" if value["costs"]["late"] else ""
    return f"milliseconds: {told}{read}; median error {value['error']:.1%}"


def read_costs(file: Path | None) -> StepCosts:
    if file is None:
        raise ScriptError("--costs FILE is needed; --calibrate FILE measures them")
    try:
        return StepCosts(**json.loads(file.read_text(encoding="utf-8"))["costs"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ScriptError(f"--costs {file} holds no step costs: {error!r}") from None


# ---- against real runs ---------------------------------------------------------------------------


def against(args: argparse.Namespace, rows: list[dict[str, Any]]) -> str:
    """How far each simulated mean is from that of an earlier load test."""
    name, waits = args.configuration, []
    with args.records.open(encoding="utf-8") as lines:
        for line in map(json.loads, lines):
            if line["configuration"] == name and line["error"] is None:
                waits.append(line["ttft_s"])
    if not waits:
        raise ScriptError(f"{args.records} holds no answered request of a configuration {name}")
    real = float(np.mean(waits))
    found = [{**row, "real": real, "error": row["ttft_mean_s"] / real - 1} for row in rows]
    return common.columns(
        found, workers="{workers}", route="{route}", order="{order}", reuse="{reuse}",
        mean_simulated="{ttft_mean_s:.3f}", mean_real="{real:.3f}", error="{error:+.1%}",
    )  # fmt: skip


def compare_real(args: argparse.Namespace) -> int:
    """One real server after another: its step costs, its real run, the simulation of it."""
    aiperf.find(args.aiperf)
    model = models.open_model(args.model)
    prompts, _ = load.fitting(args, model)
    timed = load.timed(args, prompts, rate=args.rate)
    rows, all_costs = [], {}
    ours = ("--kvshare", "--kvshare-default", "auto")  # also of a model that was never measured
    for name, flags in (("plain", ()), ("kvshare", ours)):
        one = Configuration(name, flags)
        with serve(load.spec(args, one, model.path)) as (server,):
            found = measured(args, server, model, reuse=bool(flags))
            all_costs[name] = found
            print(f"{name}, {costs_text(found)}")
            url = f"http://127.0.0.1:{server.port}"
            make_ready(url, name)
            answered = aiperf.drive(
                url, timed, tokenizer=model.path, command=args.aiperf,
                timeout_s=args.timeout or timed[-1].at_s + load.EXTRA_S, title=f"{name}, real",
            )  # fmt: skip
        costs = StepCosts(**found["costs"])
        jobs = jobs_from(timed, model)()
        made = figures(
            simulated(args, costs, jobs, 1, "least_load", "fcfs", "on" if flags else "off")
        )
        real = summary.figures(answered)
        rows.append(
            {
                "name": name, "real": real["ttft_mean_s"], "simulated": made["ttft_mean_s"],
                "error": made["ttft_mean_s"] / real["ttft_mean_s"] - 1,
                "real_p99": real["ttft_p99_s"], "simulated_p99": made["ttft_p99_s"],
                "real_copied": real["shares"]["copied"], "simulated_copied": made["copied"],
                "failed": real["failed"],
            }
        )  # fmt: skip
    text = common.columns(
        rows, name="{name}", mean_real="{real:.3f}", mean_simulated="{simulated:.3f}",
        error="{error:+.1%}", p99_real="{real_p99:.3f}", p99_simulated="{simulated_p99:.3f}",
        copied_real="{real_copied:.1%}", copied_simulated="{simulated_copied:.1%}",
    )  # fmt: skip
    common.report(args, text, {"rows": rows, "costs": all_costs, "rate": trace.mean_rate(
        [one.at_s for one in timed])}, model=model.path.name)  # fmt: skip
    return 0
