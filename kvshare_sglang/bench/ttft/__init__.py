"""Measure the time to the first token in several arms, in alternation in one run.

``plain`` is SGLang with its default cache in its own best setting, ``allrows`` is our attention
with every row computed, ``kvshare`` reuses; ``window`` and ``trace`` reuse with that selection. In
each prompt most tokens stand elsewhere in the cache, in another order. Nothing is compared across
runs: every ratio is of one prompt. The result is rewritten after each length.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import _bench
import _models
import numpy as np
from _mirror import Mirror
from _server import ScriptError, Server, ServerSpec, default_device, run_main, serve
from _ttft_cases import Case, moved_case, random_tokens, request_cases
from _ttft_work import Work, work_of

from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.radix_fuzzy.fingerprints import Tokens
from kvshare_sglang.radix_fuzzy.tree import FuzzyTree

CHUNKS = (512, 2048, 8192)
MISS_LENGTHS = (256, 512)
ARMS = ("plain", "allrows", "kvshare", "window", "trace")
DECODED = 64  # tokens, where time per output token is asked for


class Setting(NamedTuple):
    """What may differ between servers of one model."""

    chunk: int
    threads: int


class Sample(NamedTuple):
    """One prompt in all arms, with the work of each that reuses."""

    prompt_tokens: int
    ttft_s: dict[str, float]
    work: dict[str, Work]

    def to_json(self) -> dict[str, Any]:
        return {**self._asdict(), "work": {arm: w._asdict() for arm, w in self.work.items()}}


class Bench(NamedTuple):
    """What stays the same over a run."""

    model: _models.Model
    config: KVShareConfig
    ours: Setting
    args: argparse.Namespace

    @property
    def vocab(self) -> int:
        return min(self.model.vocab_size, 4096)

    def config_of(self, arm: str) -> KVShareConfig | None:
        """Of an arm that reuses; None of the others."""
        if arm in ("plain", "twin", "allrows"):
            return None
        select = self.config.select if arm == "kvshare" else arm
        return dataclasses.replace(self.config, select=select)


# ---- the arms --------------------------------------------------------------------------------


def server_spec(bench: Bench, name: str, setting: Setting) -> ServerSpec:
    args = bench.args
    flags: tuple[str, ...] = ()
    env: dict[str, str] = {}
    if name not in ("plain", "twin"):
        select = (bench.config_of(name) or bench.config).select
        flags = ("--kvshare", "--kvshare-budget", str(args.budget), "--kvshare-select", select)
    if name == "allrows":
        env = {"KVSHARE_MEASURE_ALL_ROWS": "1"}
    if args.dummy_weights:
        flags = (*flags, "--load-format", "dummy")
    return ServerSpec(
        name=name,
        model=bench.model.path,
        device=args.device,
        threads=setting.threads,
        chunk=setting.chunk,
        max_total_tokens=args.max_total_tokens,
        args=(*flags, *args.server_arg),
        env=env,
    )


def prime(servers: Sequence[Server], sources: Sequence[Tokens]) -> None:
    """Give all servers the same texts to cache, at the same time; nothing is timed."""

    def one(server: Server) -> None:
        server.flush()
        exact = None if server.spec.name in ("plain", "twin") else "exact"
        for tokens in sources:
            server.ask(tokens.tolist(), kvshare=exact)

    with ThreadPoolExecutor(len(servers)) as pool:
        list(pool.map(one, servers))


def measure(bench: Bench, servers: Sequence[Server], case: Case, *, turn: int) -> Sample:
    """One case in all arms; ``turn`` rotates their order."""
    prime(servers, case.sources)
    first = turn % len(servers)
    answers = {
        server.spec.name: server.ask(case.prompt.tolist())
        for server in [*servers[first:], *servers[:first]]
    }
    mirror = Mirror()
    for tokens in case.sources:
        mirror.add(tokens)
    work = {}
    for server in servers:
        name = server.spec.name
        if config := bench.config_of(name):
            plan = mirror.plan(case.prompt, config)
            info = answers[name].kvshare
            work[name] = work_of(bench.model.config, plan, info, server.spec, config)
    ttft_s = {name: answer.ttft_s for name, answer in answers.items()}
    return Sample(len(case.prompt), ttft_s, work)


# ---- rows of the result ----------------------------------------------------------------------


def summary(arm: str, samples: Sequence[Sample]) -> dict[str, Any]:
    """One row of the JSON: an arm that reuses, against those that do not. Ratios are paired."""
    work = [sample.work[arm] for sample in samples]
    row: dict[str, Any] = {
        "arm": arm,
        "prompt_tokens": round(_bench.median([s.prompt_tokens for s in samples])),
        "ttft_p50_s": _bench.median([s.ttft_s[arm] for s in samples]),
    }
    for other in (name for name in samples[0].ttft_s if name in ("plain", "allrows")):
        ratios = _bench.spread([s.ttft_s[other] / s.ttft_s[arm] for s in samples])
        row[f"ttft_{other}_p50_s"] = _bench.median([s.ttft_s[other] for s in samples])
        row[f"ratio_{other}"] = ratios.p50
        row["iqr"] = ratios.iqr  # of the last, which is allrows where it runs
    computed = _bench.median([w.computed_share for w in work])
    return row | {
        "computed_share": computed,
        "recomputed_share": _bench.median([w.recomputed_share for w in work]),
        "merged_tokens": round(_bench.median([w.merged_tokens for w in work])),
        "ceiling": 1 / computed,
    }


def rows_of_result(samples: dict[str, list[Sample]]) -> list[dict[str, Any]]:
    return [
        {"prompts": name, **summary(arm, group)}
        for name, group in samples.items()
        if group
        for arm in group[0].work
    ]


class Group(NamedTuple):
    """Prompts of one kind, and plain's setting for them."""

    cases: Callable[[], Iterator[Case]]
    tokens: int
    plain: Setting


def groups_of(bench: Bench, plain: dict[int, Setting]) -> dict[str, Group]:
    """All sizes with all shares, then the request file; by the name they have in the result."""
    args = bench.args
    rng = np.random.default_rng(args.seed)
    groups = {}
    for size in args.sizes:
        for share in args.reused:
            name = str(size) if len(args.reused) == 1 else f"{size}, {share:.0%} cached"
            groups[name] = Group(
                lambda size=size, share=share: (
                    moved_case(rng, size, bench.vocab, reused=share) for _ in range(args.repeats)
                ),
                size,
                plain[size],
            )
    if args.requests:
        limit = {"repeats": args.repeats, "max_tokens": args.max_total_tokens}
        groups[args.requests.name] = Group(
            lambda: request_cases(args.requests, bench.model, history=args.history, **limit),
            4096,
            plain[max(args.sizes)],
        )
    return groups


class Found(NamedTuple):
    """What was measured so far; filled as the run goes on."""

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
    with _bench.Progress(total, unit=" tokens") as bar:
        bar.say("warming up")
        rng = np.random.default_rng(bench.args.seed + 1)
        size, share = min(bench.args.sizes), bench.args.reused[0]
        measure(bench, servers, moved_case(rng, size, bench.vocab, reused=share), turn=0)
        for name, group in groups.items():
            for turn, case in enumerate(group.cases()):
                bar.say(f"{name[:16]}, repeat {turn + 1} of {repeats}")
                found.samples[name].append(measure(bench, servers, case, turn=turn))
                bar.update(group.tokens)
            save()
        bar.say(f"timed {len(servers)} arms")


def measure_tpot(bench: Bench, servers: dict[str, Server]) -> list[dict[str, Any]]:
    """Time per output token by arm, behind prompts of the smallest size that reuse."""
    rng = np.random.default_rng(4)
    times: dict[str, list[float]] = {arm: [] for arm in servers}
    for turn in range(-1, bench.args.tpot):  # the first is a warm-up
        case = moved_case(rng, min(bench.args.sizes), bench.vocab, reused=bench.args.reused[0])
        prime(list(servers.values()), case.sources)
        for arm, server in servers.items():
            got = server.ask(case.prompt.tolist(), max_new_tokens=DECODED)
            if turn >= 0:
                times[arm].append(1e3 * (got.total_s - got.ttft_s) / (DECODED - 1))
    return [{"arm": arm, "tpot_p50_ms": _bench.median(ms)} for arm, ms in times.items()]


# ---- plain's own best setting ----------------------------------------------------------------


def probe_plain(bench: Bench) -> tuple[dict[int, Setting], list[dict[str, Any]]]:
    """The fastest setting of the plain server for each size, and all that was tried.

    Threads first, at the largest chunk and all sizes; then the chunk, for each size.
    """
    args = bench.args
    chunks = [args.plain_chunk] if args.plain_chunk else list(CHUNKS)
    counts = sorted({1, bench.ours.threads}) if args.device == "cpu" else [bench.ours.threads]
    if args.plain_threads:
        counts = [args.plain_threads]
    if len(chunks) == len(counts) == 1:
        return dict.fromkeys(args.sizes, Setting(chunks[0], counts[0])), []
    found = {(max(chunks), n): _probe(bench, Setting(max(chunks), n)) for n in counts}
    threads = min(counts, key=lambda n: sum(found[max(chunks), n].values()))
    for chunk in chunks:
        if (chunk, threads) not in found:
            found[chunk, threads] = _probe(bench, Setting(chunk, threads))
    best = {
        size: Setting(min(chunks, key=lambda chunk: found[chunk, threads][size]), threads)
        for size in args.sizes
    }
    tried = [
        {"chunk": chunk, "threads": n, "ttft_p50_s": times} for (chunk, n), times in found.items()
    ]
    return best, tried


def _probe(bench: Bench, setting: Setting) -> dict[int, float]:
    """Median TTFT of plain by size."""
    rng = np.random.default_rng(1)
    vocab = bench.vocab
    print(f"probe: plain with chunks of {setting.chunk}, {setting.threads} threads", flush=True)
    with serve(server_spec(bench, "plain", setting)) as (server,):
        server.ask(random_tokens(rng, 256, vocab).tolist())
        return {
            size: _bench.median(
                [server.ask(random_tokens(rng, size, vocab).tolist()).ttft_s for _ in range(2)]
            )
            for size in bench.args.sizes
        }


# ---- prompts with nothing to reuse -----------------------------------------------------------


def lookup_ms(*, cached: int = 100_000, prompt_len: int = 8192, repeats: int = 200) -> float:
    """Median time of a lookup that finds nothing, over a tree of ``cached`` tokens."""
    rng = np.random.default_rng(2)
    tree = FuzzyTree()
    for _ in range(cached // 2000):
        tree.insert((None, None), random_tokens(rng, 2000, 32000))
    times = []
    for _ in range(repeats):
        prompt = random_tokens(rng, prompt_len, 32000)
        started = time.perf_counter()
        runs = tree.match((None, None), prompt)
        times.append(time.perf_counter() - started)
        if runs:
            raise ScriptError(f"a random prompt was found in the cache: {runs}")
    return _bench.median(times) * 1e3


def measure_miss(bench: Bench, without: Server, ours: Server) -> dict[str, Any]:
    """TTFT of kvshare over that of a server with the same setting but without it, in pairs.

    Both caches hold text already, so that there is something to look through.
    """
    rng = np.random.default_rng(3)
    vocab = bench.vocab
    pairs = bench.args.miss_pairs
    prime([without, ours], [random_tokens(rng, 1024, vocab) for _ in range(4)])
    ratios: list[float] = []
    with _bench.Progress(pairs, unit=" pairs") as bar:
        for turn in range(-4, pairs):  # the first four are a warm-up
            bar.say("prompts with nothing to reuse")
            ids = random_tokens(rng, int(rng.integers(*MISS_LENGTHS, endpoint=True)), vocab)
            order = (without, ours) if turn % 2 else (ours, without)
            answers = {server is ours: server.ask(ids.tolist()) for server in order}
            if answers[True].kvshare["fuzzy_tokens"]:
                raise ScriptError(f"kvshare reused in a fresh prompt: {answers[True].kvshare}")
            if turn >= 0:
                ratios.append(answers[True].ttft_s / answers[False].ttft_s)
                bar.update()
    return {"ttft_ratio_p50": _bench.median(ratios), "ci95": _bench.bootstrap_ci95(ratios)}


# ---- the program -----------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--json", type=Path, required=True, metavar="FILE", help="where the result goes")
    add("--arms", default="plain,allrows,kvshare", help=f"servers, of {', '.join(ARMS)}")
    add("--requests", type=Path, metavar="FILE", help="also time prompts of a request file (jsonl)")
    add("--history", type=int, default=6, help="requests cached before each one that is timed")
    add("--sizes", default="1024,2048,4096,8192", help="prompt lengths in tokens")
    add("--reused", default="0.9", help="shares of a prompt that stand elsewhere in the cache")
    add("--repeats", type=int, default=9, help="fresh prompts for each size")
    add("--budget", type=float, default=0.12, help="--kvshare-budget of the servers")
    add("--select", choices=("trace", "window"), default="trace",
        help="--kvshare-select of the arm kvshare")  # fmt: skip
    add("--model", default="bench-100m", help="shape under scripts/models, file, or directory")
    add("--dummy-weights", action="store_true", help="write no weights: --load-format dummy")
    add("--chunk", type=int, default=8192,
        help="chunked prefill size of all arms but plain; longer prompts take window")  # fmt: skip
    add("--threads", type=int, default=min(_bench.cores(), 8),
        help="OpenMP threads of all arms but plain")  # fmt: skip
    add("--plain-chunk", type=int, help="chunk size of plain (default: the best of a probe)")
    add("--plain-threads", type=int, help="threads of plain (default: the best of a probe)")
    add("--miss-pairs", type=int, default=120,
        help="pairs of prompts with nothing to reuse; 0: none")  # fmt: skip
    add("--tpot", type=int, default=0, help=f"prompts to answer with {DECODED} tokens, in all arms")
    add("--max-total-tokens", type=int, default=32768, help="KV tokens of each server")
    add("--device", default=None, help="cpu or cuda (default: cuda if there is one)")
    add("--server-arg", action="append", default=[], metavar="ARG",
        help="one more argument for every server, as --server-arg=--flag")  # fmt: skip
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    args.arms = args.arms.split(",")
    if unknown := set(args.arms) - set(ARMS):
        parser.error(f"--arms knows {', '.join(ARMS)}; got {', '.join(sorted(unknown))}")
    if not set(args.arms) - {"plain", "allrows"}:
        parser.error(f"--arms must name one that reuses, got {', '.join(args.arms)}")
    try:
        args.sizes = [int(size) for size in args.sizes.split(",")]
        args.reused = [float(share) for share in args.reused.split(",")]
    except ValueError as error:
        parser.error(f"--sizes and --reused must be numbers separated by commas: {error}")
    if min(args.sizes) < 256 or 2.2 * max(args.sizes) > args.max_total_tokens:
        room = int(args.max_total_tokens / 2.2)
        parser.error(f"--sizes must be in [256, {room}] (see --max-total-tokens), got {args.sizes}")
    if not all(0 < share < 1 for share in args.reused):
        parser.error(f"--reused must be in (0, 1), got {args.reused}")
    if args.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {args.repeats}")
    args.device = args.device or default_device()
    return args


def show(result: dict[str, Any]) -> str:
    def times(row: dict[str, Any], form: str, text: str) -> str:
        value = row.get(form)
        return "-" if value is None else text.format(value)

    head = ("prompts", "arm", "ttft", "plain", "all rows", "vs plain", "vs all rows", "iqr",
            "ceiling", "computed", "recomputed")  # fmt: skip
    rows = [
        (
            row["prompts"],
            row["arm"],
            f"{row['ttft_p50_s']:.3f} s",
            times(row, "ttft_plain_p50_s", "{:.3f} s"),
            times(row, "ttft_allrows_p50_s", "{:.3f} s"),
            times(row, "ratio_plain", "{:.2f}x"),
            times(row, "ratio_allrows", "{:.2f}x"),
            times(row, "iqr", "{:.2f}"),
            f"{row['ceiling']:.2f}x",
            f"{row['computed_share']:.1%}",
            f"{row['recomputed_share']:.1%}",
        )
        for row in result["rows"]
    ]
    miss = result["miss"]
    text = f"\n{_bench.table(head, rows)}\n\n"
    text += f"nothing to reuse: lookup {miss['lookup_ms_p50_8k']:.3f} ms at 8k tokens"
    if miss["ttft_ratio_p50"] is not None:
        low, high = miss["ci95"]
        text += f", TTFT x{miss['ttft_ratio_p50']:.4f} (95%: {low:.4f} to {high:.4f})"
    if result["tpot"]:
        parts = (f"{row['arm']} {row['tpot_p50_ms']:.2f} ms" for row in result["tpot"])
        text += f"\ntime per output token: {', '.join(parts)}"
    return text


def main() -> int:
    args = parse()
    try:
        model = _models.open_model(args.model, dummy=args.dummy_weights)
    except FileNotFoundError as error:
        raise ScriptError(str(error)) from None
    config = KVShareConfig(budget=args.budget, select=args.select)
    bench = Bench(model, config, Setting(args.chunk, args.threads), args)
    env = _bench.environment(
        model={"name": model.path.name, **model.config},
        device=args.device,
        seed=args.seed,
        repeats=args.repeats,
        kvshare=dataclasses.asdict(config),
        iqr="q75 - q25 of ratio_allrows, of ratio_plain where allrows did not run",
    )
    _bench.warn_if_busy()
    miss = {"lookup_ms_p50_8k": lookup_ms(), "ttft_ratio_p50": None, "ci95": None}
    found = Found({}, miss, [])
    plain, env["probe"] = probe_plain(bench)
    env["settings"] = {
        "plain": {str(size): setting._asdict() for size, setting in plain.items()},
        **{arm: bench.ours._asdict() for arm in args.arms if arm != "plain"},
    }

    def save() -> dict[str, Any]:
        rows = {name: [s.to_json() for s in group] for name, group in found.samples.items()}
        result = {
            "rows": rows_of_result(found.samples),
            "miss": found.miss,
            "tpot": found.tpot,
            "env": env | {"samples": rows},
        }
        _bench.write_json(args.json, result)
        return result

    measure_all(bench, plain, found, save)
    print(show(save()))
    print(f"numbers: {args.json}")
    own = args.requests.name if args.requests else None  # such prompts may well be declined
    made = (s for name, group in found.samples.items() for s in group if name != own)
    declined = {w.declined for s in made for w in s.work.values()} - {None}
    if declined:
        print(f"kvshare declined prompts that it should reuse: {', '.join(sorted(declined))}")
    return 1 if declined else 0


if __name__ == "__main__":
    run_main(main)
