"""Real requests at real arrival times to several server configurations, open loop.

Each request is sent when it is due, whatever became of those before it. A closed loop waits for
answers, so a slow server is asked less: ratios measured that way are inflated. The client is
aiperf, in an environment of its own (``scripts/load_test.sh``). Configurations take turns on the
same trace; each run begins with an empty cache. ``docs/load_tests.md`` explains the report.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from kvshare_sglang.bench import common, models
from kvshare_sglang.bench.common import ScriptError
from kvshare_sglang.bench.load import aiperf, report, serving, summary, targets, trace
from kvshare_sglang.bench.load.outcomes import Outcome
from kvshare_sglang.bench.load.targets import Configuration, Targets
from kvshare_sglang.bench.load.trace import Timed
from kvshare_sglang.bench.server import ServerSpec, add_server_arguments

EXTRA_S = 600  # that a run may take beyond its trace


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_server_arguments(parser)
    speed = add_trace_arguments(parser, needed=True)
    speed.add_argument("--load", type=float, metavar="SHARE",
        help="rate as a share of what the first configuration serves of these requests when all "
        "come at once")  # fmt: skip
    add = parser.add_argument
    add("--server", dest="configurations", action="append", type=targets.own, metavar="NAME=FLAGS",
        help="a configuration: a name, and more arguments of its server "
        '(default: plain= and "kvshare=--kvshare")')  # fmt: skip
    add("--url", dest="configurations", action="append", type=targets.running, metavar="NAME=URL",
        help="a configuration that runs already: a server, gateway or router")  # fmt: skip
    add("--repeats", type=int, default=2, help="runs of each configuration")
    add("--model", default=models.FETCHED, help="directory, shape file, a shape here, or smollm2")
    add_size_arguments(parser)
    add("--one-at-a-time", action="store_true",
        help="start a server anew for each run, as on a GPU")  # fmt: skip
    add("--bench-serving", action="store_true",
        help="through sglang.benchmark.serving instead, at the same mean rate")  # fmt: skip
    add("--aiperf", type=Path, default=aiperf.COMMAND, metavar="PATH", help="its command")
    add("--out", type=Path, default=common.ROOT / "out" / "load", metavar="DIR",
        help="for load.html, load.json and records.jsonl")  # fmt: skip


def add_trace_arguments(parser: argparse.ArgumentParser, *, needed: bool) -> Any:
    """What is sent and when; the group of those options that say how fast."""
    add = parser.add_argument
    add("--requests", type=Path, required=needed, metavar="FILE",
        help="JSON lines with 'prompt'; 'extra_key' names the tenant")  # fmt: skip
    add("--arrivals", type=Path, required=needed, metavar="FILE",
        help="JSON lines with 't' (seconds) and 'out' (tokens answered)")  # fmt: skip
    add("--limit", type=int, default=100, help="how many requests, from the first that fits")
    add("--longest", type=int, metavar="TOKENS", help="leave longer prompts out")
    add("--max-new-tokens", type=int, default=8, help="most that a request asks for")
    add("--timeout", type=float, metavar="S", help=f"of a run (default: its trace + {EXTRA_S} s)")
    speed = parser.add_mutually_exclusive_group()
    speed.add_argument("--speedup", type=float, default=1.0, help="how many times as fast")
    speed.add_argument("--rate", type=float, help="requests per second, on average")
    return speed


def add_size_arguments(parser: argparse.ArgumentParser) -> None:
    """How large a server is."""
    add = parser.add_argument
    add("--chunk", type=int, default=2048, help="chunked prefill size")
    add("--max-total-tokens", type=int, default=65536, help="KV tokens of each server")
    add("--max-running", type=int, help="requests in a batch (default: 8 on a CPU)")


def run(args: argparse.Namespace) -> int:
    if args.bench_serving:
        serving.check()
    else:
        aiperf.find(args.aiperf)
    check(args)
    model = models.open_model(args.model)
    prompts, skipped = fitting(args, model)
    requests = timed(args, prompts, rate=args.rate)  # before servers start: a file may be bad
    common.warn_if_busy()
    together = args.device == "cpu" and not args.one_at_a_time
    there = Targets(
        {one.name: spec(args, one, model.path) for one in args.configurations if one.url is None},
        together=together,
    )
    with there.running():
        if args.load is not None:
            most = at_once(args, there, model, requests)
            requests = timed(args, prompts, rate=args.load * most)
        told = {"requests": len(requests), "left_out": skipped, "lasts_s": requests[-1].at_s,
                "mean_rate": trace.mean_rate([one.at_s for one in requests])}  # fmt: skip
        print(
            f"{told['requests']} requests in {told['lasts_s']:.0f} s "
            f"({told['mean_rate']:.2f} a second), {skipped} too long and left out",
            file=sys.stderr,
        )
        if args.bench_serving:
            return familiar(args, there, model, requests, told)
        runs, loads, overtaken = measure(args, there, model, requests)
    return finish(args, runs, told | {"overtaken": overtaken}, loads, model.path.name)


def check(args: argparse.Namespace) -> None:
    """Raise ScriptError for options that are out of range or do not go together."""
    args.configurations = args.configurations or list(targets.DEFAULT)
    targets.check_names(args.configurations)
    numbers = ("limit", "repeats", "max_new_tokens", "speedup", "rate", "load", "timeout")
    check_numbers(args, *numbers)


def check_numbers(args: argparse.Namespace, *names: str) -> None:
    """Raise ScriptError for the first of these options that is not above 0."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ScriptError(f"--{name.replace('_', '-')} must be above 0, got {value:g}")


def fitting(args: argparse.Namespace, model: models.Model) -> tuple[list[trace.Prompt], int]:
    """The first ``--limit`` prompts that the model and the cache can take, and how many before
    the last of them could not."""
    tokenizer = model.tokenizer()
    room = min(model.max_len, args.max_total_tokens) - args.max_new_tokens - 8
    room = min(room, args.longest or room)
    found: list[trace.Prompt] = []
    skipped = 0
    for one in trace.read_prompts(args.requests):
        if len(found) == args.limit:
            break
        if 0 < len(tokenizer.encode(one.text).ids) <= room:
            found.append(one)
        else:
            skipped += 1
    if len(found) < 2:
        raise ScriptError(f"{args.requests} has {len(found)} prompts of 1 to {room} tokens, not 2")
    return found, skipped


def timed(
    args: argparse.Namespace, prompts: list[trace.Prompt], *, rate: float | None
) -> list[Timed]:
    """The trace of the command: these prompts at the arrivals of its file."""
    arrivals = trace.read_arrivals(args.arrivals, limit=len(prompts))
    return trace.make(
        prompts, arrivals, most_new=args.max_new_tokens, speedup=args.speedup, rate=rate
    )


def spec(args: argparse.Namespace, one: Configuration, model: Path) -> ServerSpec:
    most = () if args.max_running is None else ("--max-running-requests", str(args.max_running))
    return ServerSpec(
        one.name, model, args.device, threads=args.threads, chunk=args.chunk,
        max_total_tokens=args.max_total_tokens, overlap=True,
        args=("--enable-cache-report", "--enable-metrics", *most, *args.server_arg, *one.flags),
    )  # fmt: skip


def at_once(
    args: argparse.Namespace, there: Targets, model: models.Model, requests: list[Timed]
) -> float:
    """Requests per second that the first configuration serves when all are there at once."""
    everything = [one._replace(at_s=0.0) for one in requests]
    first = args.configurations[0]
    with there.ready(first) as url:
        found = aiperf.drive(
            url, everything, tokenizer=model.path, command=args.aiperf,
            timeout_s=args.timeout or EXTRA_S, title=f"{first.name}, all at once",
        )  # fmt: skip
    return float(summary.figures(found)["requests_per_s"])


def measure(
    args: argparse.Namespace, there: Targets, model: models.Model, timed: list[Timed]
) -> tuple[dict[str, list[list[Outcome]]], list[float], dict[str, int]]:
    """The runs of each configuration, the machine's load before each run, and the most rows that
    overtook a waiting request, where a server tells. The order of the configurations turns about
    from repeat to repeat."""
    runs: dict[str, list[list[Outcome]]] = {one.name: [] for one in args.configurations}
    overtaken: dict[str, int] = {}
    loads = []
    for repeat in range(args.repeats):
        for one in args.configurations[:: -1 if repeat % 2 else 1]:
            with there.ready(one) as url:
                loads.append(os.getloadavg()[0])
                found = aiperf.drive(
                    url, timed, tokenizer=model.path, command=args.aiperf,
                    timeout_s=args.timeout or timed[-1].at_s + EXTRA_S,
                    title=f"{one.name}, run {repeat + 1} of {args.repeats}",
                )  # fmt: skip
                if (most := targets.overtaken_rows(url)) is not None:
                    overtaken[one.name] = max(most, overtaken.get(one.name, 0))
            if not any(outcome.ok for outcome in found):
                raise ScriptError(f"'{one.name}' answered nothing: {found[0].error}")
            runs[one.name].append(found)
            keep(args.out / "records.jsonl", runs)
    return runs, loads, overtaken


def keep(path: Path, runs: dict[str, list[list[Outcome]]]) -> None:
    """All records so far, a line each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as out:
        out.writelines(
            aiperf.as_line(one, configuration=name, repeat=repeat)
            for name, its in runs.items()
            for repeat, found in enumerate(its)
            for one in found
        )


def finish(
    args: argparse.Namespace, runs: dict[str, list[list[Outcome]]], told: dict[str, Any],
    loads: list[float], model: str,
) -> int:  # fmt: skip
    """Print, write the page and the result. The exit status: 1 where a request failed."""
    every = [[summary.figures(found) for found in its] for its in runs.values()]
    rows = summary.over_repeats(every)
    table = summary.show(list(runs), rows)
    load = f"{min(loads):.1f} to {max(loads):.1f} on {common.cores()} cores"
    flags = {one.name: one.url or " ".join(one.flags) or "-" for one in args.configurations}
    passed = ", ".join(f"{name} {rows:,}" for name, rows in told["overtaken"].items())
    text = f"{table}\n\nmost rows that overtook a waiting request: {passed or 'not told'}"
    text += f"\nload of the machine before the runs (1 min): {load}"
    page = args.out / "load.html"
    env = common.environment()
    report.write(
        page, runs, table=text,
        facts={
            "requests": f"{args.requests.name}, {told['requests']}",
            "arrivals": f"{args.arrivals.name}, {told['mean_rate']:.3f} a second on average, "
            f"{told['lasts_s']:.0f} s",
            "configurations": ", ".join(f"{name}: {its}" for name, its in flags.items()),
            "model": model, "repeats": args.repeats, "machine": env["cpu"],
            "versions": ", ".join(f"{k} {v}" for k, v in env["versions"].items() if v),
            "commit": env["commit"],
        },
    )  # fmt: skip
    args.json = args.json or args.out / "load.json"
    tenants = {
        name: found
        for name, its in runs.items()
        if (found := summary.by_tenant([one for run in its for one in run]))
    }
    result = {
        "trace": told,
        "configurations": [{"name": n, **row} for n, row in zip(runs, rows, strict=True)],
        "runs": dict(zip(runs, every, strict=True)),
        "tenants": tenants,
        "machine_load": loads,
    }
    common.report(args, text, result, model=model)
    print(f"page: {page}\nrecords: {args.out / 'records.jsonl'}")
    bad = [one for its in runs.values() for run in its for one in run if not one.ok]
    if bad:
        print(f"FAILED: {len(bad)} requests, the first with: {bad[0].error}")
    return 1 if bad else 0


def familiar(
    args: argparse.Namespace, there: Targets, model: models.Model, timed: list[Timed],
    told: dict[str, Any],
) -> int:  # fmt: skip
    """One run of each configuration through SGLang's own tool."""
    found: dict[str, Any] = {}
    for one in args.configurations:
        with there.ready(one) as url:
            found[one.name] = serving.drive(
                url, timed, tokenizer=model.path,
                timeout_s=args.timeout or timed[-1].at_s + EXTRA_S,
            )  # fmt: skip
    parts = ("mean_ttft_ms", "median_ttft_ms", "p99_ttft_ms", "request_throughput", "completed")
    rows = [[name, *(f"{one[part]:.1f}" for part in parts)] for name, one in found.items()]
    head = ["sglang.benchmark.serving", *(part.replace("_", " ") for part in parts)]
    result = {
        "trace": told,
        "bench_serving": {n: {p: one[p] for p in parts} for n, one in found.items()},
    }
    common.report(args, common.table(head, rows), result, model=model.path.name)
    return 0
