"""Measure the time to the first token in several arms, in alternation in one run.

In each prompt most tokens are elsewhere in the cache, in another order. Nothing is compared across
runs: every ratio is of one prompt. The result is rewritten after each length.
"""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvshare_sglang.bench import common, models, tables
from kvshare_sglang.bench.common import ScriptError
from kvshare_sglang.bench.server import add_server_arguments
from kvshare_sglang.bench.ttft.arms import ARMS, Bench, Setting
from kvshare_sglang.bench.ttft.measure import DECODED, Found, measure_all
from kvshare_sglang.bench.ttft.miss import lookup_ms
from kvshare_sglang.bench.ttft.plain import probe_plain
from kvshare_sglang.bench.ttft.rows import (
    full_table,
    of_one_arm,
    rows_of_result,
    show,
    speed_table,
)
from kvshare_sglang.config import KVShareConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_server_arguments(parser)
    add = parser.add_argument
    add("--arms", type=listed(str), default="plain,allrows,kvshare",
        help=f"servers, of {', '.join(ARMS)}")  # fmt: skip
    add("--requests", type=Path, metavar="FILE", help="also time prompts of a request file (jsonl)")
    add("--history", type=int, default=6, help="requests cached before each one that is timed")
    add("--sizes", type=listed(int), default="1024,2048,4096,8192",
        help="prompt lengths in tokens")  # fmt: skip
    add("--reused", type=listed(float), default="0.9",
        help="shares of a prompt that are elsewhere in the cache")  # fmt: skip
    add("--repeats", type=int, default=9, help="fresh prompts for each size")
    add("--budget", type=listed(float), default="0.12",
        help="shares of the reused rows that run again; each in prompts of its own")  # fmt: skip
    add("--select", choices=("trace", "window"), default="trace",
        help="--kvshare-select of the arm kvshare")  # fmt: skip
    add("--model", default="bench-100m", help="directory, shape file, a shape here, or smollm2")
    add("--dummy-weights", action="store_true", help="write no weights: --load-format dummy")
    add("--chunk", type=int, default=2048,
        help="chunked prefill size of all arms but plain (default: SGLang's on CPU)")  # fmt: skip
    add("--plain-chunk", type=int, help="chunk size of plain (default: the best of a probe)")
    add("--plain-threads", type=int, help="threads of plain (default: the best of a probe)")
    add("--miss-pairs", type=int, default=120,
        help="pairs of prompts with nothing to reuse; 0: none")  # fmt: skip
    add("--tpot", type=int, default=0, help=f"prompts to answer with {DECODED} tokens, in all arms")
    add("--max-total-tokens", type=int, default=32768, help="KV tokens of each server")
    add("--seed", type=int, default=0)
    add("--table", type=Path, metavar="PAGE.md",
        help="write the tables that it has markers for: speed, the result's name")  # fmt: skip
    add("--result", type=Path, metavar="IN.json", help="show an earlier result, measure nothing")


def listed(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Read values separated by commas."""

    def read(text: str) -> list[Any]:
        return [kind(part) for part in text.split(",")]

    read.__name__ = f"list of {kind.__name__}"  # argparse names it where a value is bad
    return read


def check(args: argparse.Namespace) -> None:
    """Raise ScriptError for values that do not go together."""
    if unknown := set(args.arms) - set(ARMS):
        raise ScriptError(f"--arms knows {', '.join(ARMS)}; got {', '.join(sorted(unknown))}")
    if not set(args.arms) - {"plain", "allrows"}:
        raise ScriptError(f"--arms must name one that reuses, got {', '.join(args.arms)}")
    if min(args.sizes) < 256 or 2.2 * max(args.sizes) > args.max_total_tokens:
        room = int(args.max_total_tokens / 2.2)
        raise ScriptError(
            f"--sizes must be in [256, {room}] (see --max-total-tokens), got {args.sizes}"
        )
    if not all(0 < share < 1 for share in args.reused):
        raise ScriptError(f"--reused must be in (0, 1), got {args.reused}")
    if not all(0 <= budget <= 1 for budget in args.budget):
        raise ScriptError(f"--budget must be in [0, 1], got {args.budget}")
    if args.repeats < 1:
        raise ScriptError(f"--repeats must be at least 1, got {args.repeats}")


def run(args: argparse.Namespace) -> int:
    if args.result:
        result = common.read_result(args.result, "rows", "miss", "env")
        result["rows"] = [of_one_arm(row) for row in result["rows"]]
        print(show(result))
        return finish(args, result)
    check(args)
    model = models.open_model(args.model, dummy=args.dummy_weights)
    config = KVShareConfig(budget=args.budget[0], select=args.select)
    bench = Bench(model, config, Setting(args.chunk, args.threads), args)
    common.warn_if_busy()
    miss = {"lookup_ms_p50_8k": lookup_ms(), "ttft_ratio_p50": None, "ci95": None}
    found = Found({}, miss, [])
    plain, probe = probe_plain(bench)
    env = common.environment(
        **common.settings(args)
        | {
            "model": {"name": model.path.name, **model.config},
            "random_weights": not Path(args.model).is_dir(),
            "kvshare": dataclasses.asdict(config),
            "iqr": "q75 - q25 of ratio_allrows, of ratio_plain where allrows did not run",
            "probe": probe,
            "settings": {
                "plain": {str(size): setting._asdict() for size, setting in plain.items()},
                **{arm: bench.ours._asdict() for arm in args.arms if arm != "plain"},
            },
        }
    )

    def save() -> dict[str, Any]:
        result = {
            "rows": rows_of_result(found.samples),
            "miss": found.miss,
            "tpot": found.tpot,
            "samples": {
                name: [s.to_json() for s in group] for name, group in found.samples.items()
            },
            "env": env,
        }
        if args.json:
            common.write_json(args.json, result)
        return result

    measure_all(bench, plain, found, save)
    result = save()
    print(show(result))
    if args.json:
        print(f"numbers: {args.json}")
    own = args.requests.name if args.requests else None  # such prompts may well be declined
    made = (s for name, group in found.samples.items() for s in group if name != own)
    declined = {w.declined for s in made for w in s.work.values() if w.declined}
    if declined:
        print(f"kvshare declined prompts that it should reuse: {', '.join(sorted(declined))}")
    return finish(args, result) or bool(declined)


def finish(args: argparse.Namespace, result: dict[str, Any]) -> int:
    """Write the tables, if asked for: the page of a result's folder names them by its file."""
    if args.table:
        source = args.result or args.json
        marks = {"speed": speed_table(result)}
        if source:
            marks[source.stem] = full_table(result)
        print(f"tables: {', '.join(tables.write_marked(args.table, marks))} in {args.table}")
    return 0
