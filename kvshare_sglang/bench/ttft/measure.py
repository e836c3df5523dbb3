"""The run: groups of prompts, the servers that they go to, and what was found so far."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from kvshare_sglang.bench import common
from kvshare_sglang.bench.common import ScriptError
from kvshare_sglang.bench.server import Server, serve
from kvshare_sglang.bench.ttft.arms import Bench, Sample, Setting, measure, prime, server_spec
from kvshare_sglang.bench.ttft.cases import Case, moved_case, request_cases
from kvshare_sglang.bench.ttft.miss import measure_miss

DECODED = 64  # tokens, where time per output token is asked for


class Group(NamedTuple):
    """Prompts of one kind, and plain's setting for them."""

    cases: Callable[[], Iterator[Case]]
    tokens: int
    budget: float
    plain: Setting


def groups_of(bench: Bench, plain: dict[int, Setting]) -> dict[str, Group]:
    """All sizes, shares and budgets, then the request file; by their names in the result."""
    args = bench.args
    rng = np.random.default_rng(args.seed)
    groups = {}
    for size, share, budget in itertools.product(args.sizes, args.reused, args.budget):
        name = str(size)
        if len(args.reused) > 1:
            name += f", {100 * share:g}% cached"
        if len(args.budget) > 1:
            name += f", {100 * budget:g}% again"
        cases = partial(moved_cases, bench, rng, size, share)
        groups[name] = Group(cases, size, budget, plain[size])
    if args.requests:
        limit = {"repeats": args.repeats, "max_tokens": args.max_total_tokens}
        groups[args.requests.name] = Group(
            lambda: request_cases(args.requests, bench.model, history=args.history, **limit),
            4096,
            bench.config.budget,
            plain[max(args.sizes)],
        )
    return groups


def moved_cases(bench: Bench, rng: np.random.Generator, size: int, share: float) -> Iterator[Case]:
    for _ in range(bench.args.repeats):
        yield moved_case(rng, size, bench.vocab, reused=share)


class Found(NamedTuple):
    """What was measured so far; filled during the run."""

    samples: dict[str, list[Sample]]
    miss: dict[str, Any]
    tpot: list[dict[str, Any]]


def measure_all(
    bench: Bench, plain: dict[int, Setting], found: Found, save: Callable[[], Any]
) -> None:
    """Start servers once for each setting that plain has, and ask all that goes to them."""
    args = bench.args
    groups = groups_of(bench, plain)
    found.samples.update({name: [] for name in groups})
    for setting in dict.fromkeys(group.plain for group in groups.values()):
        mine = {name: group for name, group in groups.items() if group.plain == setting}
        specs = [
            server_spec(bench, arm, setting if arm == "plain" else bench.ours) for arm in args.arms
        ]
        with serve(*specs) as servers:
            measure_groups(bench, servers, mine, found, save)
            by_arm = {server.spec.name: server for server in servers}
            if args.tpot:
                found.tpot[:] = measure_tpot(bench, by_arm)
                save()
            if args.miss_pairs and setting == bench.ours and "plain" in by_arm:
                ours = next(server for arm, server in by_arm.items() if bench.config_of(arm))
                found.miss.update(measure_miss(bench, by_arm["plain"], ours))
                save()
    if args.miss_pairs and found.miss["ttft_ratio_p50"] is None:  # plain likes another setting
        with serve(*(server_spec(bench, n, bench.ours) for n in ("twin", "kvshare"))) as servers:
            found.miss.update(measure_miss(bench, *servers))
    if args.requests and not found.samples[args.requests.name]:
        raise ScriptError(f"{args.requests} holds fewer than {args.history + 1} prompts that fit")


def measure_groups(
    bench: Bench,
    servers: list[Server],
    groups: dict[str, Group],
    found: Found,
    save: Callable[[], Any],
) -> None:
    repeats = bench.args.repeats
    total = sum(group.tokens for group in groups.values()) * repeats
    with common.Progress(total, unit=" tokens") as bar:
        bar.say("warming up")
        rng = np.random.default_rng(bench.args.seed + 1)
        size, share = min(bench.args.sizes), bench.args.reused[0]
        case = moved_case(rng, size, bench.vocab, reused=share)
        measure(bench, servers, case, turn=0, budget=bench.config.budget)
        for name, group in groups.items():
            for turn, case in enumerate(group.cases()):
                bar.say(f"{name[:16]}, repeat {turn + 1} of {repeats}")
                found.samples[name].append(
                    measure(bench, servers, case, turn=turn, budget=group.budget)
                )
                bar.update(group.tokens)
            save()
        bar.say(f"timed {len(servers)} arms")


def measure_tpot(bench: Bench, servers: dict[str, Server]) -> list[dict[str, Any]]:
    """Time per output token by arm, after prompts of the smallest size that reuse."""
    rng = np.random.default_rng(4)
    times: dict[str, list[float]] = {arm: [] for arm in servers}
    for turn in range(-1, bench.args.tpot):  # the first is a warm-up
        case = moved_case(rng, min(bench.args.sizes), bench.vocab, reused=bench.args.reused[0])
        prime(list(servers.values()), case.sources)
        for arm, server in servers.items():
            got = server.ask(case.prompt.tolist(), max_new_tokens=DECODED)
            if turn >= 0:
                times[arm].append(1e3 * (got.total_s - got.ttft_s) / (DECODED - 1))
    return [{"arm": arm, "tpot_p50_ms": common.median(ms)} for arm, ms in times.items()]
