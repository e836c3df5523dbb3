"""Replay request files through the matchers, without a model, and compare what they find.

Each request is served by a model of SGLang's radix cache (``sim/life.py``) that tells a matcher
what it stores and evicts. Prompts are encoded as they are, without a chat template.
"""

import argparse
from pathlib import Path
from typing import Any

from kvshare_sglang.bench import common, tables
from kvshare_sglang.bench.common import ScriptError
from kvshare_sglang.bench.match import files, memory, requests, scale, spans, synthetic
from kvshare_sglang.bench.match.files import ARMS, SETTINGS, STANDARD, Setting
from kvshare_sglang.bench.match.show import found_table, show
from kvshare_sglang.sim.life import ANY_DEPTH

PARTS = ("files", "curve", "synthetic", "scale", "spans")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--requests", type=Path, nargs="+", default=[], metavar="FILE",
        help="JSON lines with 'prompt', and 'extra_key' where there are namespaces")  # fmt: skip
    add("--tokenizer", type=Path, metavar="DIR",
        help="with a tokenizer.json (default: a BPE of 32k, trained on the files)")  # fmt: skip
    add("--capacity", type=float, metavar="SHARE",
        help="one setting in place of the five: a cache of this share of the file")  # fmt: skip
    add("--depth", type=int, metavar="D", help="one setting in place of the five: sources to D")
    add("--settings", nargs="+", choices=SETTINGS, default=STANDARD, metavar="NAME")
    add("--matchers", nargs="+", choices=[*ARMS, "ceiling"], default=[*ARMS, "ceiling"],
        metavar="NAME")  # fmt: skip
    add("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: all)")
    add("--limit", type=int, metavar="N", help="requests of each file, from the first")
    add("--plot", type=Path, metavar="OUT.png", help="where a page of plots goes")
    add("--table", type=Path, metavar="PAGE.md", help="write the table there, at its marker match")
    add("--result", type=Path, metavar="IN.json", help="show an earlier result, measure nothing")


def run(args: argparse.Namespace) -> int:
    if args.result:
        result = common.read_result(args.result)
        print(show(result))
    else:
        result = measure(args)
        trained = f"bpe-{requests.VOCAB}, trained here"
        made_by = args.tokenizer.name if args.tokenizer else trained
        common.report(args, show(result), result, tokenizer=made_by)
    if args.table:
        tables.write(args.table, "match", found_table(result))
        print(f"table: match in {args.table}")
    if args.plot:
        from kvshare_sglang.bench.match import plot

        plot.draw(result, args.plot)
        print(f"plot: {args.plot}")
    wrong = sum(
        rows["kvshare"]["unequal_tokens"]
        for settings in result.get("files", {}).values()
        for rows in settings.values()
        if "kvshare" in rows
    )
    if wrong:
        print(f"FAILED: {wrong} mapped tokens are not equal in source and destination")
    return 1 if wrong else 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The parts that are asked for. Raises ScriptError where a file cannot be read."""
    if not args.requests:
        raise ScriptError("--requests must name at least one file, got none")
    memory.start()
    common.warn_if_busy()
    try:
        found = requests.load(args.requests, tokenizer=args.tokenizer, limit=args.limit)
    except (OSError, KeyError, ValueError) as error:
        raise ScriptError(f"cannot read the requests: {error!r}") from None
    result: dict[str, Any] = {}
    if "files" in args.parts:
        result["files"] = files.bench_files(found, settings_of(args), args.matchers)
    if "curve" in args.parts:
        result["curve"] = files.bench_curve(found)
    if "synthetic" in args.parts:
        result["synthetic"] = synthetic.measure(found)
    if "spans" in args.parts:
        result["spans"] = spans.measure(found)
    if "scale" in args.parts:
        result["scale"] = memory.in_clean_process(
            scale.measure, [prompt for file in found for prompt in file.prompts]
        )
    return result


def settings_of(args: argparse.Namespace) -> dict[str, Setting]:
    """The settings by name: those of the list, or the one that is asked for in numbers."""
    if args.capacity is None and args.depth is None:
        return {name: SETTINGS[name] for name in args.settings}
    name = "" if args.capacity is None else f"cap{100 * args.capacity:g}"
    name += "" if args.depth is None else f"depth{args.depth}"
    depth = ANY_DEPTH if args.depth is None else args.depth
    return {name: Setting(args.capacity, depth)}
