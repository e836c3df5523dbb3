"""Do answers get worse as reuse builds on reuse? Requests one after another on a real server.

Each request brings new documents and comes back to some of those before, in another company, one
of them edited, and mostly asks what the edit changed. So nearly all requests reuse text that was
computed after other text, and what they leave behind is reused again. The same stream goes to a
server without kvshare, and to one for each bound on how often reuse may build on reuse.
"""

import argparse
import random
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kvshare_sglang.bench import common, options, tasks
from kvshare_sglang.bench.quality import tables
from kvshare_sglang.bench.quality.cases import Encoder
from kvshare_sglang.bench.server import ServerSpec, serve

RECENT = 10  # requests whose documents may come back
SIZE = tasks.Size(14, 2, prose=0.06)

Scene = tuple[tasks.Document, ...]


class Request(NamedTuple):
    """A prompt and its answer, in tokens."""

    ids: np.ndarray
    answer: np.ndarray


def requests(encode: Encoder, *, n: int, seed: int) -> Iterator[Request]:
    """A stream: always the same one for a seed."""
    rng = random.Random(f"test stream {seed}")
    filler = tasks.sentences("test")
    recent: list[Scene] = []
    while n:
        shares = dict(zip(rng.sample(tasks.TASKS, 3), (6, 4, 4), strict=True))
        own = tasks.scene(rng, shares, SIZE, [rng.choice(filler)])
        back = rng.sample(range(len(recent)), min(2, len(recent)))
        others = [recent[i] for i in back]
        asks = _asks(own, rng)
        if others and (changed := edited(rng, others[0])):
            others[0], ask = changed
            asks = [ask] if rng.random() < 0.7 else asks
        documents = _shuffled(rng, [own, *others])
        known = tasks.read(documents)
        asks = [ask for ask in asks if ask in known]
        if not tasks.consistent(documents) or not asks:
            continue
        topic, key = rng.choice(asks)
        sample = tasks.Sample(tasks.TOPICS[topic].task, documents, tasks.Ask(topic, (key,)))
        if others:
            recent[back[0]] = others[0]
        recent = [*recent, own][-RECENT:]
        n -= 1
        yield Request(encode(sample.prompt, start=True), encode(f" {sample.answer}."))


def _asks(scene: Scene, rng: random.Random) -> list[tuple[str, str]]:
    """What can be asked of it; what it says in so many words only now and then."""
    return [ask for ask, known in tasks.read(scene).items() if known.depth or rng.random() < 0.3]


def edited(rng: random.Random, scene: Scene) -> tuple[Scene, tuple[str, str]] | None:
    """The scene with one fact changed, and a question whose answer changes with it."""
    asks = _asks(scene, rng)
    rng.shuffle(asks)
    for topic, key in asks:
        sample = tasks.Sample(tasks.TOPICS[topic].task, scene, tasks.Ask(topic, (key,)))
        pair = tasks.edit(rng, sample, "substitution", changes=True)
        if pair and pair.cached[0].answer is not None:
            return pair.cached[0].documents, (topic, key)
    return None


def _shuffled(rng: random.Random, scenes: list[Scene]) -> Scene:
    """All documents, scenes mixed, each in its own order."""
    turns = [i for i, scene in enumerate(scenes) for _ in scene]
    rng.shuffle(turns)
    left = [iter(scene) for scene in scenes]
    return tuple(next(left[i]) for i in turns)


def spec(args: argparse.Namespace, depth: int | None) -> ServerSpec:
    flags: tuple[str, ...] = ()
    if depth is not None:
        flags = ("--kvshare", "--kvshare-source-depth", str(depth), *args.server_args)
    name = "plain" if depth is None else f"depth-{depth}"
    return ServerSpec(name, args.model, args.device, threads=common.cores(), args=flags)


def play(
    args: argparse.Namespace, stream: list[Request], depth: int | None, bar: common.Progress
) -> list[dict[str, Any]]:
    """What each request got: whether it was right, and what it reused."""
    out = []
    with serve(spec(args, depth)) as (server,):
        for one in stream:
            got = server.ask(one.ids.tolist(), max_new_tokens=len(one.answer))
            told = {} if depth is None else got.kvshare
            out.append(
                {
                    "right": list(got.output_ids) == one.answer.tolist(),
                    "tokens": len(one.ids),
                    "reused": told.get("copied_tokens", 0),
                    "depth": told.get("source_depth", 0),
                    "declined": told.get("declined"),
                }
            )
            bar.update()
    return out


def slope(values: np.ndarray, n: int) -> float:
    """Least squares over the number of a request in its stream of ``n``, for each 100 requests."""
    at = np.arange(len(values)) % n / 100
    return float(np.polyfit(at, values, 1)[0])


def summary(
    found: list[dict[str, Any]], plain: list[dict[str, Any]], *, depth: int, n: int
) -> dict[str, Any]:
    right = np.array([f["right"] for f in found], float)
    best = np.array([f["right"] for f in plain], float)
    rng = np.random.default_rng(0)
    # Permuting the requests says what slope chance alone gives.
    chance = [slope(rng.permutation(right - best), n) for _ in range(2000)]
    deep = sorted({f["depth"] for f in found if f["reused"]})
    return {
        "source_depth": depth,
        "n": len(found),
        "accuracy": float(right.mean()),
        "accuracy_full": float(best.mean()),
        "reusing": float(np.mean([f["reused"] > 0 for f in found])),
        "reused_share": sum(f["reused"] for f in found) / sum(f["tokens"] for f in found),
        "slope_per_100": slope(right - best, n),
        "chance95": [float(x) for x in np.quantile(chance, (0.025, 0.975))],
        "by_depth": [
            {
                "depth": d, "n": int(sum(at)), "accuracy": float(right[at].mean()),
                "accuracy_full": float(best[at].mean()),
            }
            for d in deep
            for at in [np.array([f["reused"] > 0 and f["depth"] == d for f in found])]
        ],
        "by_50": [
            {
                "from": i,
                "accuracy": float(right[at].mean()),
                "accuracy_full": float(best[at].mean()),
            }
            for i in range(0, n, 50)
            for at in [np.arange(len(found)) % n // 50 == i // 50]
        ],
    }  # fmt: skip


def show(rows: list[dict[str, Any]]) -> str:
    return common.columns(
        rows,
        source_depth="{source_depth}",
        n="{n}",
        accuracy="{accuracy:.3f}",
        full="{accuracy_full:.3f}",
        reusing="{reusing:.1%}",
        tokens_reused="{reused_share:.1%}",
        slope="{slope_per_100:+.4f}",
        chance="{chance95[0]:+.4f} to {chance95[1]:+.4f}",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    options.add_model(parser)
    add("--n", type=int, default=300, help="requests of a stream")
    add("--streams", type=int, default=1, help="of other seeds, one after another")
    add("--depth", type=int, nargs="+", default=[0, 1, 16], help="--kvshare-source-depth")
    add("--server-args", type=shlex.split, default=[], metavar="ARGS", help="with kvshare")
    options.add_table(parser)
    add("--plot", type=Path, metavar="OUT.png", help="where a picture goes")


def run(args: argparse.Namespace) -> int:
    args.model = options.model_directory(args.model)
    encode = Encoder(args.model)
    found: dict[int | None, list[dict[str, Any]]] = {}
    streams = [list(requests(encode, n=args.n, seed=seed)) for seed in range(args.streams)]
    ways = [None, *args.depth]
    with common.Progress(args.n * args.streams * len(ways), unit=" requests") as bar:
        for stream in streams:
            for depth in ways:
                bar.say("plain" if depth is None else f"source depth {depth}")
                found.setdefault(depth, []).extend(play(args, stream, depth, bar))
    rows = [summary(found[depth], found[None], depth=depth, n=args.n) for depth in args.depth]
    common.report(args, show(rows), {"stream": rows})
    if args.plot:
        from kvshare_sglang.bench.quality import plot

        plot.draw_streams(rows, args.plot)
        print(f"plot: {args.plot}")
    if args.table:
        tables.write_tables(args.table, {"stream": rows})
    return 0
