"""What refresh while decoding costs: time per output token on real servers, paired.

Arms: never looked at; looked at in every step but never refreshed (the threshold is out of reach);
refreshed as often as ``--every`` allows. Each prompt goes to all arms in turn.
"""

import argparse
from pathlib import Path
from typing import Any

import _bench
import _models
from _server import ScriptError, Server, ServerSpec, default_device, run_main, serve
from _text import Corpus

ARMS = ("off", "idle")  # and one for each --every


def specs(args: argparse.Namespace, model: _models.Model) -> list[ServerSpec]:
    flags = {
        "off": (),
        "idle": ("--kvshare-refresh-every", "1", "--kvshare-refresh-above", "1.0"),
        **{
            f"every {n}": ("--kvshare-refresh-every", str(n), "--kvshare-refresh-above", "0",
                           "--kvshare-refresh-unchanged", "0")
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


def measure(server: Server, cached: list[int], prompt: list[int], new: int) -> dict[str, Any]:
    server.flush()
    server.ask(cached)
    got = server.ask(prompt, max_new_tokens=new)
    if not got.kvshare["fuzzy_tokens"]:
        raise ScriptError(f"'{server.spec.name}' reused nothing: {got.kvshare}")
    return {"tpot_s": (got.total_s - got.ttft_s) / (len(got.output_ids) - 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="bench-100m", help="shape under scripts/models, file, or directory")
    add("--tokens", type=int, default=1500, help="length of the text that is reused")
    add("--new", type=int, default=128, help="output tokens")
    add("--every", type=int, nargs="+", default=[16], help="--kvshare-refresh-every")
    add("--repeats", type=int, default=8, help="prompts, each to all arms")
    add("--threads", type=int, default=min(_bench.cores(), 8))
    add("--device", default=default_device())
    add("--server-arg", action="append", default=[], metavar="ARG")
    add("--json", type=Path, metavar="OUT", help="where the result goes")
    args = parser.parse_args()
    model = _models.open_model(args.model)
    corpus = Corpus(model.tokenizer(), seed=0)
    _bench.warn_if_busy()
    found: dict[str, list[dict[str, Any]]] = {}
    with serve(*specs(args, model)) as servers, _bench.Progress(args.repeats) as bar:
        for turn in range(args.repeats + 1):
            text = corpus.take(args.tokens)
            cached = corpus.encode(corpus.take(60) + text)
            prompt = corpus.encode(corpus.take(90) + text + corpus.take(30))
            order = servers[turn % len(servers) :] + servers[: turn % len(servers)]
            for server in order:
                one = measure(server, cached, prompt, args.new)
                if turn:  # the first is a warm-up
                    found.setdefault(server.spec.name, []).append(one)
            if turn:
                bar.update()
    rows = []
    for name, mine in found.items():
        ratios = [a["tpot_s"] / b["tpot_s"] for a, b in zip(mine, found["off"], strict=True)]
        rows.append(
            {
                "arm": name, "tpot_ms": 1e3 * _bench.median([one["tpot_s"] for one in mine]),
                "ratio_off": _bench.median(ratios), "ci95": _bench.bootstrap_ci95(ratios),
            }
        )  # fmt: skip
    rows.sort(key=lambda r: [s.name for s in specs(args, model)].index(r["arm"]))
    head = ("arm", "TPOT", "x off", "95%")
    print(
        _bench.table(
            head,
            [
                (
                    r["arm"], f"{r['tpot_ms']:.2f} ms", f"{r['ratio_off']:.3f}",
                    "{:.3f} to {:.3f}".format(*r["ci95"])
                )
                for r in rows
            ],
        )
    )  # fmt: skip
    if args.json:
        env = _bench.environment(model=model.path.name, repeats=args.repeats, new=args.new)
        _bench.write_json(args.json, {"rows": rows, "env": env})
        print(f"numbers: {args.json}")
    return 0


if __name__ == "__main__":
    run_main(main)
