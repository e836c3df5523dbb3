"""Replay real requests through a server, and compare what it reused with what was there.

The matcher alone, over a cache without limits that holds every earlier prompt exactly, says how
much of each prompt stood in the cache beyond the exact prefix. The server says how much it really
reused. A small model serves: what is counted here does not depend on its weights.
"""

import argparse
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import _bench
import _models
import numpy as np
from _mirror import Mirror
from _server import ScriptError, Server, ServerSpec, default_device, run_main, serve
from _text import read_prompts

from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.radix_fuzzy.fingerprints import Tokens

KEPT_SHARE = 0.25  # less than this of the claim really reused is a failure


class Outcome(NamedTuple):
    """One request. ``claimed`` is what the matcher alone finds beyond ``claimed_prefix``, and
    ``long_enough`` what of it stands in runs that are long enough to copy."""

    prompt_tokens: int
    claimed_prefix: int
    claimed: int
    long_enough: int
    prefix: int
    copied: int
    recomputed: int
    depth: int
    ttft_s: float
    declined: str | None


def load_prompts(args: argparse.Namespace, model: _models.Model) -> tuple[list[Tokens], int]:
    """The prompts that fit the model, as ids, and how many do not."""
    try:
        texts = read_prompts(args.requests, limit=args.limit)
    except (OSError, KeyError, ValueError) as error:
        raise ScriptError(
            f"{args.requests} is no file of JSON lines with 'prompt': {error!r}"
        ) from None
    tokenizer = model.tokenizer()
    prompts = [np.asarray(tokenizer.encode(text).ids, np.int32) for text in texts]
    room = min(model.max_len, args.max_total_tokens) - args.max_new_tokens - 8
    fitting = [tokens for tokens in prompts if 0 < len(tokens) <= room]
    if not fitting:
        raise ScriptError(f"no prompt of {args.requests} has 1 to {room} tokens")
    return fitting, len(prompts) - len(fitting)


def replay(server: Server, prompts: list[Tokens], args: argparse.Namespace) -> list[Outcome]:
    config = KVShareConfig(**args.config)
    mirror = Mirror()
    outcomes = []
    server.flush()
    with _bench.Progress(sum(map(len, prompts)), unit=" tokens") as bar:
        for i, tokens in enumerate(prompts):
            bar.say(f"request {i + 1} of {len(prompts)}")
            claimed = sum(run.length for run in mirror.match(tokens, config))
            claimed_prefix = mirror.prefix_len(tokens)
            long_enough = mirror.wish(tokens, config).reused
            mirror.add(tokens)
            answer = server.ask(tokens.tolist(), max_new_tokens=args.max_new_tokens)
            info = answer.kvshare
            outcomes.append(
                Outcome(
                    prompt_tokens=len(tokens),
                    claimed_prefix=claimed_prefix,
                    claimed=claimed,
                    long_enough=long_enough,
                    prefix=info["exact_tokens"],
                    copied=info["fuzzy_tokens"],
                    recomputed=info["recomputed_tokens"],
                    depth=info["source_depth"],
                    ttft_s=answer.ttft_s,
                    declined=info["declined"],
                )
            )
            bar.update(len(tokens))
        bar.say("replayed")
    return outcomes


def summary(outcomes: list[Outcome]) -> dict[str, Any]:
    """Shares of all prompt tokens. ``kept`` is reused tokens over claimed ones."""
    total = sum(o.prompt_tokens for o in outcomes)

    def share(*names: str) -> float:
        return sum(getattr(o, name) for o in outcomes for name in names) / total

    found = share("claimed")
    return {
        "requests": len(outcomes),
        "prompt_tokens": total,
        "matcher": {
            "prefix": share("claimed_prefix"),
            "beyond_prefix": found,
            "long_enough": share("long_enough"),
        },
        "server": {
            "prefix": share("prefix"),
            "reused": share("copied", "recomputed"),
            "copied": share("copied"),
            "recomputed": share("recomputed"),
        },
        "kept": share("copied", "recomputed") / found if found else None,
        "requests_that_reused": sum(o.copied > 0 for o in outcomes),
        "declines": dict(Counter(o.declined for o in outcomes if o.declined).most_common()),
        "ttft_p50_s": _bench.median([o.ttft_s for o in outcomes]),
    }


def show(result: dict[str, Any]) -> str:
    matcher, server = result["matcher"], result["server"]
    head = ("share of all prompt tokens", "matcher alone", "server")
    rows = [
        ("exact prefix", f"{matcher['prefix']:.1%}", f"{server['prefix']:.1%}"),
        ("beyond the prefix, all", f"{matcher['beyond_prefix']:.1%}", ""),
        ("in runs long enough to copy", f"{matcher['long_enough']:.1%}", f"{server['reused']:.1%}"),
        ("  copied", "", f"{server['copied']:.1%}"),
        ("  computed again", "", f"{server['recomputed']:.1%}"),
    ]
    kept = "nothing to reuse" if result["kept"] is None else f"{result['kept']:.0%} of the claim"
    declines = ", ".join(f"{reason} {n}" for reason, n in result["declines"].items()) or "none"
    return (
        f"\n{result['requests']} requests, {result['prompt_tokens']} tokens, "
        f"{result['skipped']} too long and left out\n{_bench.table(head, rows)}\n"
        f"really reused: {kept}, in {result['requests_that_reused']} requests\n"
        f"declined: {declines}"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--requests", type=Path, required=True, metavar="FILE", help="JSON lines with 'prompt'")
    add("--limit", type=int, default=100, help="how many requests, from the first")
    add("--json", type=Path, metavar="OUT", help="where the result goes")
    add("--model", default="replay-5m", help="shape under scripts/models, file, or directory")
    add("--max-new-tokens", type=int, default=4)
    add("--max-total-tokens", type=int, default=262144, help="KV tokens of the server")
    add("--budget", type=float, help="--kvshare-budget (default: the plug-in's)")
    add("--source-depth", type=int, help="--kvshare-source-depth (default: the plug-in's)")
    add("--chunk", type=int, default=8192, help="chunked prefill size")
    add("--threads", type=int, default=min(_bench.cores(), 8), help="OpenMP threads of the server")
    add("--device", default=None, help="cpu or cuda (default: cuda if there is one)")
    add("--server-arg", action="append", default=[], metavar="ARG",
        help="one more argument for the server, as --server-arg=--flag")  # fmt: skip
    args = parser.parse_args()
    given = {"budget": args.budget, "source_depth": args.source_depth}
    args.config = {name: value for name, value in given.items() if value is not None}
    args.device = args.device or default_device()
    return args


def main() -> int:
    args = parse()
    try:
        model = _models.open_model(args.model)
    except FileNotFoundError as error:
        raise ScriptError(str(error)) from None
    prompts, skipped = load_prompts(args, model)
    flags = [
        text
        for name, value in args.config.items()
        for text in (f"--kvshare-{name.replace('_', '-')}", str(value))
    ]
    env = _bench.environment(model=model.path.name, device=args.device, requests=args.requests.name)
    spec = ServerSpec(
        name="kvshare",
        model=model.path,
        device=args.device,
        threads=args.threads,
        chunk=args.chunk,
        max_total_tokens=args.max_total_tokens,
        args=("--kvshare", *flags, *args.server_arg),
    )
    with serve(spec) as (server,):
        outcomes = replay(server, prompts, args)
    result = {**summary(outcomes), "skipped": skipped, "env": env}
    print(show(result))
    if args.json:
        _bench.write_json(args.json, {**result, "outcomes": [o._asdict() for o in outcomes]})
        print(f"numbers: {args.json}")
    if result["kept"] is not None and result["kept"] < KEPT_SHARE:
        print(f"FAILED: less than {KEPT_SHARE:.0%} of what the matcher finds was reused")
        return 1
    return 0


if __name__ == "__main__":
    run_main(main)
