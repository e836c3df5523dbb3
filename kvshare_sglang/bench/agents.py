"""Programs that call tools: how long each takes beyond its tools, by what is kept while they run.

A program asks, runs a tool, and asks again with all that was said before. Meanwhile others need
the memory. Each arm is a server of its own; the same programs come at the same moments in each.
"""

import argparse
import itertools
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvshare_sglang.bench import common, models
from kvshare_sglang.bench.common import Progress, ScriptError, metric
from kvshare_sglang.bench.conversation.rows import rows_of
from kvshare_sglang.bench.server import Server, ServerSpec, add_server_arguments, serve

ARMS: dict[str, tuple[str, ...]] = {
    "stock": (),
    "lru": ("--kvshare", "--kvshare-eviction", "sglang"),
    "kvshare": ("--kvshare",),
    "ttl": ("--kvshare", "--kvshare-ttl"),
}
SHARED = 300  # tokens that all programs begin with: instructions and tools
SPREAD = 0.8  # of the logarithm of a tool's time
SAMPLE_S = 0.5


@dataclass(frozen=True)
class Program:
    """``due_s``: when it comes; ``first``: what it asks; then a tool takes ``gaps[i]`` seconds and
    says ``told[i]``. One without gaps is a user who asks once."""

    due_s: float
    first: list[int]
    gaps: list[float]
    told: list[list[int]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_server_arguments(parser)
    add = parser.add_argument
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    add("--programs", type=int, default=24)
    add("--turns", type=int, default=6, help="of each program")
    add("--others", type=int, default=48, help="requests that come once, in the same time")
    add("--rate", type=float, default=0.5, help="programs a second, at random")
    add("--tool-s", type=float, default=2.0, help="median seconds of a tool")
    add("--context", type=int, default=900, help="tokens that a program begins with")
    add("--tool-tokens", type=int, default=150, help="tokens that a tool says")
    add("--new-tokens", type=int, default=16, help="tokens of an answer")
    add("--ttl", type=float, default=0.5, help="--kvshare-ttl of the arm ttl: share of the pool")
    add("--repeats", type=int, default=2)
    add("--model", default="replay-5m", help="directory, shape file, a shape here, or smollm2")
    add("--chunk", type=int, default=2048)
    add("--max-total-tokens", type=int, default=12288, help="KV tokens of each server")
    add("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    check(args)
    model = models.open_model(args.model)
    rows: list[dict[str, Any]] = []
    # Side by side, asked in turn: those that are not asked rest.
    specs = [spec(args, arm, model) for arm in args.arms]
    common.warn_if_busy()
    with serve(*specs) as servers:
        for repeat in range(args.repeats):
            programs = drawn(args, vocab=model.vocab_size, seed=args.seed + repeat)
            turned = [(i + repeat) % len(servers) for i in range(len(servers))]
            for i in turned:
                servers[i].flush()
                rows.append({"repeat": repeat, **played(servers[i], programs, args)})
    result = {"rows": rows, "summary": summary(rows, args.arms)}
    common.report(args, show(result["summary"]), result, model=model.path.name)
    return 0


def check(args: argparse.Namespace) -> None:
    for name in ("programs", "rate", "tool_s", "tool_tokens", "new_tokens", "repeats"):
        if not getattr(args, name) > 0:
            flag = "--" + name.replace("_", "-")
            raise ScriptError(f"{flag} must be above 0, got {getattr(args, name)}")
    if args.turns < 2:
        raise ScriptError(f"--turns must be 2 or more, got {args.turns}")
    if args.others < 0:
        raise ScriptError(f"--others must be 0 or more, got {args.others}")
    if args.context <= SHARED:
        raise ScriptError(f"--context must be above {SHARED}, got {args.context}")
    longest = args.context + args.turns * (args.tool_tokens + args.new_tokens)
    if longest > args.max_total_tokens:
        room = args.max_total_tokens
        raise ScriptError(f"--max-total-tokens must hold {longest} of a program, got {room}")


def spec(args: argparse.Namespace, arm: str, model: models.Model) -> ServerSpec:
    share = (str(args.ttl),) if arm == "ttl" else ()
    return ServerSpec(
        name=arm,
        model=model.path,
        device=args.device,
        threads=args.threads,
        chunk=args.chunk,
        max_total_tokens=args.max_total_tokens,
        args=("--enable-metrics", *ARMS[arm], *share, *args.server_arg),
    )


def drawn(args: argparse.Namespace, *, vocab: int, seed: int) -> list[Program]:
    """The programs, and in the same time the requests that come once; ascending ``due_s``."""
    rng = np.random.default_rng(seed)

    def tokens(num: int) -> list[int]:
        return rng.integers(10, vocab, num).tolist()

    shared = tokens(SHARED)
    due = np.cumsum(rng.exponential(1 / args.rate, args.programs))
    programs = [
        Program(
            due_s=float(at),
            first=[*shared, *tokens(args.context - SHARED)],
            gaps=rng.lognormal(np.log(args.tool_s), SPREAD, args.turns - 1).tolist(),
            told=[tokens(args.tool_tokens) for _ in range(args.turns - 1)],
        )
        for at in due
    ]
    # As long as programs come and the last ones take.
    until = due[-1] + args.turns * args.tool_s
    others = [
        Program(float(at), tokens(args.context), [], [])
        for at in rng.uniform(0, until, args.others)
    ]
    return sorted([*programs, *others], key=lambda one: one.due_s)


def played(server: Server, programs: Sequence[Program], args: argparse.Namespace) -> dict[str, Any]:
    """A line: what programs took beyond their tools, what ran, what was pinned."""
    begun, lock = time.perf_counter(), threading.Lock()
    taken: dict[bool, list[float]] = {True: [], False: []}
    ttft: list[float] = []
    counts = {"tokens": 0, "ran": 0}
    pinned: list[float] = []
    before = pins(server)
    done = threading.Event()

    def one(program: Program) -> None:
        prompt = program.first
        time.sleep(max(begun + program.due_s - time.perf_counter(), 0))
        for gap, told in itertools.zip_longest(program.gaps, [*program.told, []]):
            answer = server.ask(prompt, max_new_tokens=args.new_tokens)
            prompt = [*prompt, *answer.output_ids, *told]
            with lock:
                ttft.append(answer.ttft_s)
                counts["tokens"] += answer.meta["prompt_tokens"]
                counts["ran"] += rows_of(answer, stock=not answer.meta.get("kvshare"))
            time.sleep(gap or 0)
        took = time.perf_counter() - begun - program.due_s - sum(program.gaps)
        with lock:
            taken[bool(program.gaps)].append(took)
            bar.update()

    def watch() -> None:
        ended = False
        while not ended:
            ended = done.wait(SAMPLE_S)
            found = metric(server.client.get("/metrics").text, "sglang:kvshare_pinned_tokens")
            pinned.append(sum(tokens for _, tokens in found))

    with Progress(len(programs), unit=" programs") as bar:
        bar.say(server.spec.name)
        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            with ThreadPoolExecutor(len(programs)) as pool:
                for job in [pool.submit(one, program) for program in programs]:
                    job.result()
        finally:
            done.set()
            watcher.join()
    after = pins(server)
    return {
        "arm": server.spec.name,
        "program_s": taken[True],
        "once_s": taken[False],
        "ttft_mean_s": float(np.mean(ttft)),
        **counts,
        "pinned_mean": float(np.mean(pinned or [0])) / args.max_total_tokens,
        "pinned_most": max(pinned, default=0.0) / args.max_total_tokens,
        "pins": {event: after[event] - before.get(event, 0) for event in after},
    }


def pins(server: Server) -> dict[str, int]:
    """How many pins came to what, since the server started."""
    page = server.client.get("/metrics").raise_for_status().text
    found = metric(page, "sglang:kvshare_pins_total")
    return {labels["event"]: int(count) for labels, count in found}


def summary(rows: Sequence[dict[str, Any]], arms: Sequence[str]) -> list[dict[str, Any]]:
    """A row an arm, over repeats; ratios to the first arm in the same repeat, and their range."""
    base = {row["repeat"]: np.mean(row["program_s"]) for row in rows if row["arm"] == arms[0]}
    out = []
    for arm in arms:
        mine = [row for row in rows if row["arm"] == arm]
        took = np.concatenate([row["program_s"] for row in mine])
        once = np.concatenate([row["once_s"] for row in mine])
        ratios = [float(base[row["repeat"]] / np.mean(row["program_s"])) for row in mine]
        events: dict[str, int] = {}
        for event, count in itertools.chain.from_iterable(row["pins"].items() for row in mine):
            events[event] = events.get(event, 0) + count
        out.append(
            {
                "arm": arm,
                "programs": len(took),
                "mean_s": float(took.mean()),
                "p95_s": float(np.quantile(took, 0.95)),
                "ratio": float(np.mean(ratios)),
                "ratio_range": [min(ratios), max(ratios)],
                "once_mean_s": float(once.mean()) if len(once) else None,
                "ttft_mean_s": float(np.mean([row["ttft_mean_s"] for row in mine])),
                "ran_share": sum(row["ran"] for row in mine) / sum(row["tokens"] for row in mine),
                "pinned_mean": float(np.mean([row["pinned_mean"] for row in mine])),
                "pinned_most": max(row["pinned_most"] for row in mine),
                "pins": events,
            }
        )
    return out


def show(rows: Sequence[dict[str, Any]]) -> str:
    told = [
        {
            **row,
            "spread": "{:.2f} to {:.2f}".format(*row["ratio_range"]),
            "once": "-" if row["once_mean_s"] is None else f"{row['once_mean_s']:.2f} s",
            "events": ", ".join(f"{name} {n}" for name, n in sorted(row["pins"].items())) or "-",
        }
        for row in rows
    ]
    return common.columns(
        told, arm="{arm}", programs="{programs}", beyond_tools="{mean_s:.2f} s",
        p95="{p95_s:.2f} s", times_better="{ratio:.2f}x", range="{spread}", once="{once}",
        TTFT="{ttft_mean_s:.3f} s", ran="{ran_share:.1%}", pinned="{pinned_mean:.1%}",
        most="{pinned_most:.1%}", pins="{events}",
    )  # fmt: skip
