"""Measure what refresh while decoding costs: time per output token on real servers, paired.

Arms: never looked at; looked at in every step but never refreshed (the threshold is out of reach);
and for each ``--every`` one that refreshes: with prose as often as that allows, whatever is read;
with ``--lists`` when a stale row is read, as it would in use. Each prompt goes to all arms in turn.
"""

import argparse
import re
from collections.abc import Iterator
from typing import Any

from kvshare_sglang.bench import common, models
from kvshare_sglang.bench.common import ScriptError
from kvshare_sglang.bench.server import Server, ServerSpec, add_server_arguments, serve
from kvshare_sglang.bench.texts import Corpus

ALWAYS = ("--kvshare-refresh-above", "0", "--kvshare-refresh-unchanged", "0")
_REFRESHED = re.compile(r"KVShare refresh, .*#row: (\d+)")
Texts = Iterator[tuple[list[int], list[int]]]  # what is cached, and the prompt that reuses it


def specs(args: argparse.Namespace, model: models.Model) -> list[ServerSpec]:
    flags = {
        "off": (),
        "idle": ("--kvshare-refresh-every", "1", "--kvshare-refresh-above", "1.0"),
        **{
            f"every {n}": (
                "--kvshare-refresh-every", str(n), *(() if args.lists else ALWAYS)
            )
            for n in args.every
        },
    }  # fmt: skip
    return [
        ServerSpec(
            name.replace(" ", "-"), model.path, args.device, threads=args.threads,
            args=("--kvshare", *more, *args.server_arg),
        )
        for name, more in flags.items()
    ]  # fmt: skip


def prose(corpus: Corpus, tokens: int) -> Texts:
    """A long text after another beginning."""
    while True:
        text = corpus.take(tokens)
        cached = corpus.encode(corpus.take(60) + text)
        yield cached, corpus.encode(corpus.take(90) + text + corpus.take(30))


def lists() -> Texts:
    """The prompts of the command decode."""
    from kvshare_sglang.bench.decode import lists as asked_lists
    from kvshare_sglang.bench.quality.cases import Encoder

    for asked in asked_lists(Encoder(models.READER), "test tpot", "hops"):
        yield asked.cached.tolist(), asked.ids.tolist()


def measure(server: Server, cached: list[int], prompt: list[int], new: int) -> dict[str, Any]:
    server.flush()
    server.ask(cached)
    before = refreshed_rows(server)
    got = server.ask(prompt, max_new_tokens=new)
    if not got.kvshare["copied_tokens"]:
        raise ScriptError(f"'{server.spec.name}' reused nothing: {got.kvshare}")
    tpot_s = (got.total_s - got.ttft_s) / (len(got.output_ids) - 1)
    return {"tpot_s": tpot_s, "refreshed": refreshed_rows(server) - before}


def refreshed_rows(server: Server) -> int:
    """Since it started, by its log: a streamed answer tells of a request before it decodes."""
    return sum(map(int, _REFRESHED.findall(server.log.read_text(errors="replace"))))


def row(arm: str, mine: list[dict[str, Any]], off: list[dict[str, Any]]) -> dict[str, Any]:
    """Over the prompts that refreshed, in an arm where any did."""
    took = [one["refreshed"] for one in mine]
    pairs = [(a, b) for a, b in zip(mine, off, strict=True) if a["refreshed"] or not any(took)]
    ratios = [a["tpot_s"] / b["tpot_s"] for a, b in pairs]
    return {
        "arm": arm, "n": len(pairs), "of": len(mine), "refreshed_rows": sum(took) / len(took),
        "tpot_ms": 1e3 * common.median([a["tpot_s"] for a, _ in pairs]),
        "ratio_off": common.median(ratios), "ci95": common.bootstrap_ci95(ratios),
    }  # fmt: skip


def show(rows: list[dict[str, Any]]) -> str:
    return common.columns(
        rows,
        arm="{arm}",
        n="{n}",
        of="{of}",
        rows_refreshed="{refreshed_rows:.1f}",
        TPOT="{tpot_ms:.2f} ms",
        x_off="{ratio_off:.3f}",
        **{"95%": "{ci95[0]:.3f} to {ci95[1]:.3f}"},
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_server_arguments(parser)
    add = parser.add_argument
    add("--model", default="bench-100m", help="directory, shape file, a shape here, or smollm2")
    add("--lists", action="store_true", help="the reader, and prompts whose decoding refreshes")
    add("--tokens", type=int, default=1500, help="length of the prose that is reused")
    add("--new", type=int, default=128, help="output tokens")
    add("--every", type=int, nargs="+", default=[16], help="--kvshare-refresh-every")
    add("--repeats", type=int, default=8, help="prompts, each to all arms")


def run(args: argparse.Namespace) -> int:
    model = models.load(models.READER) if args.lists else models.open_model(args.model)
    texts = lists() if args.lists else prose(Corpus(model.tokenizer(), seed=0), args.tokens)
    common.warn_if_busy()
    found: dict[str, list[dict[str, Any]]] = {}
    with serve(*specs(args, model)) as servers, common.Progress(args.repeats) as bar:
        for turn in range(args.repeats + 1):
            cached, prompt = next(texts)
            order = servers[turn % len(servers) :] + servers[: turn % len(servers)]
            for server in order:
                one = measure(server, cached, prompt, args.new)
                if turn:  # the first is a warm-up
                    found.setdefault(server.spec.name, []).append(one)
            if turn:
                bar.update()
    rows = [row(spec.name, found[spec.name], found["off"]) for spec in specs(args, model)]
    common.report(args, show(rows), {"rows": rows}, model=model.path.name)
    return 0
