"""Measure the time to the first token in three arms, in alternation in one run.

``plain`` is SGLang with its default cache in its own best setting, ``allrows`` is our attention
with every row computed, ``kvshare`` reuses. In each prompt 90% of the tokens stand elsewhere in
the cache, in another order. Nothing is compared across runs: every ratio is of one prompt.
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
from _mirror import Mirror, peeked_flops, prefill_flops, row_positions
from _server import ScriptError, Server, ServerSpec, default_device, run_main, serve
from _text import read_prompts

from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.policy.rows import must_run, reused_positions
from kvshare_sglang.policy.trace import SHARES, Trace, probe_layer, rows_of
from kvshare_sglang.radix_fuzzy.fingerprints import Tokens
from kvshare_sglang.radix_fuzzy.tree import FuzzyTree
from kvshare_sglang.radix_fuzzy.types import ReusePlan

PASSAGE = 500  # tokens
REUSED_SHARE = 0.9
CHUNKS = (512, 2048, 8192)
MISS_LENGTHS = (256, 512)
ARMS = ("plain", "allrows", "kvshare")


class Setting(NamedTuple):
    """What may differ between servers of one model."""

    chunk: int
    threads: int


class Case(NamedTuple):
    """Prompts to cache first, and the prompt that is timed."""

    sources: list[Tokens]
    prompt: Tokens


class Sample(NamedTuple):
    """One prompt in all arms, with the work that kvshare did."""

    prompt_tokens: int
    ttft_s: dict[str, float]
    computed_share: float
    recomputed_share: float
    computed_tokens: int
    copied_tokens: int
    declined: str | None


class Bench(NamedTuple):
    """What stays the same over a run."""

    model: _models.Model
    config: KVShareConfig
    ours: Setting
    args: argparse.Namespace


# ---- prompts ---------------------------------------------------------------------------------


def random_tokens(rng: np.random.Generator, count: int, vocab: int) -> Tokens:
    """Ids without the special ones. No eight in a row are met twice, as far as chance goes."""
    return rng.integers(8, vocab, count).astype(np.int32)


def moved_case(rng: np.random.Generator, size: int, vocab: int) -> Case:
    """A prompt of passages that stand in other prompts, in an order without old neighbours.

    Half of the fresh text stands between the passages, the other half behind them.
    """
    reused = round(REUSED_SHARE * size)
    count = max(2, round(reused / PASSAGE))
    passages = np.array_split(random_tokens(rng, reused, vocab), count)
    order = np.arange(count)
    while any(order[1:] == order[:-1] + 1):
        order = rng.permutation(count)
    between = (size - reused) // 2 // count
    prompt = [part for i in order for part in (random_tokens(rng, between, vocab), passages[i])]
    prompt.append(random_tokens(rng, size - reused - between * count, vocab))
    sources = [
        np.concatenate([random_tokens(rng, 64, vocab), *passages[i : i + 4]])
        for i in range(0, count, 4)
    ]
    return Case(sources, np.concatenate(prompt))


def request_cases(bench: Bench, path: Path) -> Iterator[Case]:
    """Real requests: the last of every ``history + 1`` is timed, those before it are cached."""
    step = bench.args.history + 1
    tokenizer = bench.model.tokenizer()
    prompts = read_prompts(path, limit=step * bench.args.repeats)
    ids = [np.asarray(tokenizer.encode(text).ids, np.int32) for text in prompts]
    longest = bench.model.max_len - 8
    for first in range(0, len(ids) - bench.args.history, step):
        group = [tokens[:longest] for tokens in ids[first : first + step]]
        if sum(map(len, group)) < bench.args.max_total_tokens:
            yield Case(group[:-1], group[-1])


# ---- the three arms --------------------------------------------------------------------------


def server_spec(bench: Bench, name: str, setting: Setting) -> ServerSpec:
    args = bench.args
    flags: tuple[str, ...] = ()
    env: dict[str, str] = {}
    if name in ("allrows", "kvshare"):
        chosen = ("--kvshare-select", bench.config.select)
        flags = ("--kvshare", "--kvshare-budget", str(bench.config.budget), *chosen)
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
    plan = mirror.plan(case.prompt, bench.config)
    info = answers["kvshare"].kvshare
    rows = expected_rows(plan, info, servers[-1].spec, bench.config)
    full = np.arange(plan.prefix_len, plan.prompt_len)
    config = bench.model.config
    flops = prefill_flops(config, rows) + traced_flops(config, plan, bench.config)
    return Sample(
        prompt_tokens=len(case.prompt),
        ttft_s={name: answer.ttft_s for name, answer in answers.items()},
        computed_share=flops / prefill_flops(config, full),
        recomputed_share=_share(info["recomputed_tokens"], info["fuzzy_tokens"]),
        computed_tokens=info["computed_tokens"],
        copied_tokens=info["fuzzy_tokens"],
        declined=info["declined"],
    )


def expected_rows(
    plan: ReusePlan, info: dict[str, Any], spec: ServerSpec, config: KVShareConfig
) -> np.ndarray:
    """Positions of the rows that the server ran. Raises ScriptError if it ran other numbers.

    A trace goes by attention: the rows that it adds are taken to stand evenly."""
    if config.select == "trace" and plan.runs:
        must = must_run(plan, suffix=config.seam)
        left = np.setdiff1d(reused_positions(plan), must)
        count = min(len(left), rows_of(plan, config.budget))
        rows = np.union1d(must, left[np.linspace(0, len(left) - 1, count).astype(int)])
    else:
        max_rows = None if spec.device == "cpu" else spec.max_running
        rows = row_positions(plan, chunk=spec.chunk, max_rows=max_rows)
    told = {name: info[name] for name in ("exact_tokens", "fuzzy_tokens", "computed_tokens")}
    want = {
        "exact_tokens": plan.prefix_len,
        "fuzzy_tokens": plan.prompt_len - plan.prefix_len - len(rows),
        "computed_tokens": len(rows),
    }
    if told != want:
        raise ScriptError(f"the server says {told}, the planner alone {want}: {info}")
    return rows


def traced_flops(config: dict[str, Any], plan: ReusePlan, kvshare: KVShareConfig) -> float:
    """FLOPs of the passes of a trace: the rows that must run and those behind edits, then all
    steps' but the last's."""
    if kvshare.select != "trace" or not plan.runs:
        return 0.0
    layer = probe_layer(config["num_hidden_layers"], kvshare.probe_at)
    trace = Trace.of_plan(plan, budget=kvshare.budget, seam=kvshare.seam)
    left = rows_of(plan, kvshare.budget) - len(trace.chosen)
    followed = int(left * sum(SHARES[:-1]) / sum(SHARES))
    rows = np.linspace(plan.prefix_len, plan.prompt_len - 1, followed)
    return sum(peeked_flops(config, part, at_layer=layer) for part in (trace.rows, rows))


def _share(part: int, rest: int) -> float:
    return part / (part + rest) if part + rest else 0.0


# ---- rows of the result ----------------------------------------------------------------------


def summary(samples: Sequence[Sample]) -> dict[str, Any]:
    """One row of the JSON. Ratios are paired; ``iqr`` is that of ``ratio_allrows``."""
    ratios = {
        arm: _bench.spread([s.ttft_s[arm] / s.ttft_s["kvshare"] for s in samples])
        for arm in ("plain", "allrows")
    }
    computed = _bench.median([s.computed_share for s in samples])
    return {
        "prompt_tokens": round(_bench.median([s.prompt_tokens for s in samples])),
        **{f"ttft_{arm}_p50_s": _bench.median([s.ttft_s[arm] for s in samples]) for arm in ARMS},
        "ratio_plain": ratios["plain"].p50,
        "ratio_allrows": ratios["allrows"].p50,
        "iqr": ratios["allrows"].iqr,
        "computed_share": computed,
        "recomputed_share": _bench.median([s.recomputed_share for s in samples]),
        "ceiling": 1 / computed,
    }


def measure_cases(bench: Bench, plain: dict[int, Setting]) -> dict[str, list[Sample]]:
    """All sizes, then the request file; the samples under what was asked.

    Servers are started once for each setting that plain has, by size, in ``plain``.
    """
    args, vocab = bench.args, min(bench.model.vocab_size, 4096)
    rng = np.random.default_rng(args.seed)
    groups: dict[str, Callable[[], Iterator[Case]]] = {
        str(size): lambda size=size: (moved_case(rng, size, vocab) for _ in range(args.repeats))
        for size in args.sizes
    }
    weights = {str(size): size for size in args.sizes}
    settings = {str(size): plain[size] for size in args.sizes}
    if args.requests:
        groups[args.requests.name] = lambda: request_cases(bench, args.requests)
        weights[args.requests.name] = 4096
        settings[args.requests.name] = plain[max(args.sizes)]
    samples: dict[str, list[Sample]] = {name: [] for name in groups}
    for setting in dict.fromkeys(settings.values()):
        mine = [name for name in groups if settings[name] == setting]
        specs = [server_spec(bench, arm, setting if arm == "plain" else bench.ours) for arm in ARMS]
        with (
            serve(*specs) as servers,
            _bench.Progress(sum(weights[n] for n in mine) * args.repeats, unit=" tokens") as bar,
        ):
            bar.say("warming up")
            measure(bench, servers, moved_case(rng, min(args.sizes), vocab), turn=0)
            for name in mine:
                for turn, case in enumerate(groups[name]()):
                    bar.say(f"{name[:16]}, repeat {turn + 1} of {args.repeats}")
                    samples[name].append(measure(bench, servers, case, turn=turn))
                    bar.update(weights[name])
            bar.say("timed three arms")
    if args.requests and not samples[args.requests.name]:
        raise ScriptError(f"{args.requests} holds fewer than {args.history + 1} prompts that fit")
    return samples


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
    vocab = min(bench.model.vocab_size, 4096)
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
    vocab = min(bench.model.vocab_size, 4096)
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
    add("--requests", type=Path, metavar="FILE", help="also time prompts of a request file (jsonl)")
    add("--history", type=int, default=6, help="requests cached before each one that is timed")
    add("--sizes", default="1024,2048,4096,8192", help="prompt lengths in tokens")
    add("--repeats", type=int, default=9, help="fresh prompts for each size")
    add("--budget", type=float, default=0.12, help="--kvshare-budget of the servers")
    add("--select", choices=("trace", "window"), default="trace", help="--kvshare-select")
    add("--model", default="bench-100m", help="shape under scripts/models, file, or directory")
    add("--dummy-weights", action="store_true", help="write no weights: --load-format dummy")
    add("--chunk", type=int, default=8192, help="chunked prefill size of allrows and kvshare")
    add(
        "--threads",
        type=int,
        default=min(_bench.cores(), 8),
        help="OpenMP threads of allrows and kvshare",
    )
    add("--plain-chunk", type=int, help="chunk size of plain (default: the best of a probe)")
    add("--plain-threads", type=int, help="threads of plain (default: the best of a probe)")
    add(
        "--miss-pairs",
        type=int,
        default=120,
        help="pairs of prompts with nothing to reuse; 0: none",
    )
    add("--max-total-tokens", type=int, default=32768, help="KV tokens of each server")
    add("--device", default=None, help="cpu or cuda (default: cuda if there is one)")
    add("--server-arg", action="append", default=[], metavar="ARG",
        help="one more argument for every server, as --server-arg=--flag")  # fmt: skip
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        args.sizes = [int(size) for size in args.sizes.split(",")]
    except ValueError:
        parser.error(f"--sizes must be numbers separated by commas, got {args.sizes!r}")
    if min(args.sizes) < 256 or 2.2 * max(args.sizes) > args.max_total_tokens:
        room = int(args.max_total_tokens / 2.2)
        parser.error(f"--sizes must be in [256, {room}] (see --max-total-tokens), got {args.sizes}")
    if args.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {args.repeats}")
    args.device = args.device or default_device()
    return args


def show(result: dict[str, Any]) -> str:
    head = ("tokens", "plain", "all rows", "kvshare", "vs plain", "vs all rows", "iqr",
            "ceiling", "of ceiling", "computed", "recomputed")  # fmt: skip
    rows = [
        (
            str(row["prompt_tokens"]),
            *(f"{row[f'ttft_{arm}_p50_s']:.3f} s" for arm in ARMS),
            f"{row['ratio_plain']:.2f}x",
            f"{row['ratio_allrows']:.2f}x",
            f"{row['iqr']:.2f}",
            f"{row['ceiling']:.2f}x",
            f"{row['ratio_allrows'] / row['ceiling']:.0%}",
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
    return text


def main() -> int:
    args = parse()
    try:
        model = _models.open_model(args.model, dummy=args.dummy_weights)
    except FileNotFoundError as error:
        raise ScriptError(str(error)) from None
    bench = Bench(
        model,
        KVShareConfig(budget=args.budget, select=args.select),
        Setting(args.chunk, args.threads),
        args,
    )
    env = _bench.environment(
        model={"name": model.path.name, **model.config},
        device=args.device,
        seed=args.seed,
        repeats=args.repeats,
        kvshare=dataclasses.asdict(bench.config),
        iqr="q75 - q25 of ratio_allrows",
    )
    _bench.warn_if_busy()
    miss: dict[str, Any] = {"lookup_ms_p50_8k": lookup_ms(), "ttft_ratio_p50": None, "ci95": None}
    plain, tried = probe_plain(bench)
    samples = measure_cases(bench, plain)
    if args.miss_pairs:
        with serve(*(server_spec(bench, n, bench.ours) for n in ("twin", "kvshare"))) as servers:
            miss |= measure_miss(bench, *servers)
    env["settings"] = {
        "plain": {str(size): setting._asdict() for size, setting in plain.items()},
        **{arm: bench.ours._asdict() for arm in ("allrows", "kvshare")},
    }
    env["probe"] = tried
    env["samples"] = {name: [s._asdict() for s in group] for name, group in samples.items()}
    result = {"rows": [summary(group) for group in samples.values()], "miss": miss, "env": env}
    _bench.write_json(args.json, result)
    print(show(result))
    print(f"numbers: {args.json}")
    declined = {s.declined for size in args.sizes for s in samples[str(size)]} - {None}
    if declined:
        print(f"kvshare declined prompts that it should reuse: {', '.join(sorted(declined))}")
    return 1 if declined else 0


if __name__ == "__main__":
    run_main(main)
