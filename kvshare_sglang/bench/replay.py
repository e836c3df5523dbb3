"""Replay real requests through a server, and compare what it reused with what was there.

The matcher alone, over a cache without limits that holds every earlier prompt exactly, says how
much of each prompt was in the cache beyond the exact prefix. The server says how much it really
reused. A small model serves: what is counted here does not depend on its weights.
"""

import argparse
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kvshare_sglang.bench import common, models
from kvshare_sglang.bench.server import Server, ServerSpec, add_server_arguments, serve
from kvshare_sglang.bench.texts import fitting
from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.policy.select.attention_trace import AttentionTrace
from kvshare_sglang.radix_fuzzy.fingerprints import Tokens
from kvshare_sglang.sim.mirror import Mirror

KEPT_SHARE = 0.25  # less than this of the claim really reused is a failure


class Outcome(NamedTuple):
    """One request. ``claimed`` is what the matcher alone finds beyond ``claimed_prefix``, and
    ``long_enough`` what of it is in runs that are long enough to copy."""

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


def load_prompts(args: argparse.Namespace, model: models.Model) -> tuple[list[Tokens], int]:
    """The prompts that fit the model, as ids, and how many do not."""
    tokenizer = model.tokenizer()
    return fitting(
        args.requests, lambda text: np.asarray(tokenizer.encode(text).ids, np.int32),
        limit=args.limit,
        most=min(model.max_len, args.max_total_tokens) - args.max_new_tokens - 8,
    )  # fmt: skip


def replay(server: Server, prompts: list[Tokens], config: KVShareConfig, new: int) -> list[Outcome]:
    mirror = Mirror()
    outcomes = []
    server.flush()
    with common.Progress(sum(map(len, prompts)), unit=" tokens") as bar:
        for i, tokens in enumerate(prompts):
            bar.say(f"request {i + 1} of {len(prompts)}")
            claimed = sum(run.length for run in mirror.match(tokens, config))
            claimed_prefix = mirror.prefix_len(tokens)
            selector = AttentionTrace(config.seam, config.stretch)
            long_enough = mirror.proposal(tokens, config, selector).reused
            mirror.add(tokens)
            answer = server.ask(tokens.tolist(), max_new_tokens=new)
            info = answer.kvshare
            outcomes.append(
                Outcome(
                    prompt_tokens=len(tokens),
                    claimed_prefix=claimed_prefix,
                    claimed=claimed,
                    long_enough=long_enough,
                    prefix=info["exact_tokens"],
                    copied=info["copied_tokens"],
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
        "ttft_p50_s": common.median([o.ttft_s for o in outcomes]),
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
        f"{result['skipped']} too long and left out\n{common.table(head, rows)}\n"
        f"really reused: {kept}, in {result['requests_that_reused']} requests\n"
        f"declined: {declines}"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_server_arguments(parser)
    add = parser.add_argument
    add("--requests", type=Path, required=True, metavar="FILE", help="JSON lines with 'prompt'")
    add("--limit", type=int, default=100, help="how many requests, from the first")
    add("--model", default="replay-5m", help="directory, shape file, a shape here, or smollm2")
    add("--max-new-tokens", type=int, default=4)
    add("--max-total-tokens", type=int, default=262144, help="KV tokens of the server")
    add("--budget", type=float, help="--kvshare-budget (default: the plug-in's)")
    add("--source-depth", type=int, help="--kvshare-source-depth (default: the plug-in's)")
    add("--chunk", type=int, default=8192, help="chunked prefill size")


def run(args: argparse.Namespace) -> int:
    model = models.open_model(args.model)
    prompts, skipped = load_prompts(args, model)
    given = {"budget": args.budget, "source_depth": args.source_depth}
    given = {name: value for name, value in given.items() if value is not None}
    flags = [
        text
        for name, value in given.items()
        for text in (f"--kvshare-{name.replace('_', '-')}", str(value))
    ]
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
        outcomes = replay(server, prompts, KVShareConfig(**given), args.max_new_tokens)
    result = {**summary(outcomes), "skipped": skipped}
    each = [one._asdict() for one in outcomes]
    common.report(args, show(result), {**result, "outcomes": each}, model=model.path.name)
    if result["kept"] is not None and result["kept"] < KEPT_SHARE:
        print(f"FAILED: less than {KEPT_SHARE:.0%} of what the matcher finds was reused")
        return 1
    return 0
