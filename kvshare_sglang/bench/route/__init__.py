"""Two real workers behind the gateway: what the router reuses, adds and loses; and its index.

Arms on the same two servers, flushed in between: the gateway alone with ``cache_aware``, and the
router before it. Requests go out as text, so what tokenising costs is in both.
"""

import argparse
import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvshare_sglang.bench import common, models
from kvshare_sglang.bench.common import ScriptError
from kvshare_sglang.bench.route import faults, indexing, replay
from kvshare_sglang.bench.route.stack import ARMS, Stack
from kvshare_sglang.bench.server import Server, ServerSpec, add_server_arguments, serve
from kvshare_sglang.bench.texts import read_prompts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_server_arguments(parser)
    add = parser.add_argument
    add("--requests", type=Path, metavar="FILE", help="JSON lines with 'prompt'")
    add("--limit", type=int, default=200, help="how many requests, from the first")
    add("--model", default="replay-5m", help="directory, shape file, a shape here, or smollm2")
    add("--max-new-tokens", type=int, default=4)
    add("--max-total-tokens", type=int, default=262144, help="KV tokens of each server")
    add("--at-once", type=int, default=2, help="requests under way (closed loop)")
    add("--faults", action="store_true", help="also freeze and kill parts in mid-run")
    add("--two-routers", action="store_true", help="also how far two side by side agree")
    add("--index", action="store_true", help="only the index: 1 to 64 workers, no servers")


def run(args: argparse.Namespace) -> int:
    if args.index:
        sizes = indexing.measure()
        common.report(args, indexing.show(sizes), sizes)
        return 0
    if args.requests is None:
        raise ScriptError("--requests FILE is needed, or --index")
    model = models.open_model(args.model)
    prompts = _prompts(args, model)
    with _servers(args, model) as (servers, streams):
        result: dict[str, Any] = {"arms": {}}
        for arm in ARMS:
            for server in servers:
                server.flush()
            with Stack(arm, servers, streams, model.path) as stack:
                outcome = replay.replay(stack, prompts, args)
                if arm == "router":
                    result["added"] = replay.added(stack, prompts)
            result["arms"][arm] = outcome
        result["ratio"] = replay.ratio(result["arms"])
        if args.faults:
            result["faults"] = {
                arm: faults.measure(arm, servers, streams, model.path, prompts) for arm in ARMS
            }
        if args.two_routers:
            result["two_routers"] = faults.agreement(servers, streams, model.path, prompts)
    common.report(args, show(result), result, model=model.path.name)
    return 0


def _prompts(args: argparse.Namespace, model: models.Model) -> list[str]:
    """The texts that fit the model."""
    tokenizer = model.tokenizer()
    room = min(model.max_len, args.max_total_tokens) - args.max_new_tokens - 8
    texts = read_prompts(args.requests, limit=args.limit)
    fitting = [text for text in texts if 0 < len(tokenizer.encode(text).ids) <= room]
    if not fitting:
        raise ScriptError(f"no prompt of {args.requests} has 1 to {room} tokens")
    return fitting


@contextlib.contextmanager
def _servers(
    args: argparse.Namespace, model: models.Model
) -> Iterator[tuple[list[Server], list[str]]]:
    with tempfile.TemporaryDirectory() as folder:
        streams = [f"ipc://{folder}/{name}" for name in "ab"]
        specs = [
            ServerSpec(
                name=f"worker-{number}",
                model=model.path,
                device=args.device,
                threads=args.threads,
                max_total_tokens=args.max_total_tokens,
                args=("--kvshare", "--kvshare-stream", stream, *args.server_arg),
            )
            for number, stream in enumerate(streams)
        ]
        with serve(*specs) as servers:
            yield servers, streams


def show(result: dict[str, Any]) -> str:
    parts = [
        common.columns(
            [{"arm": arm, **outcome} for arm, outcome in result["arms"].items()],
            arm="{arm}",
            requests="{requests}",
            reused="{reused_share:.1%}",
            exact="{exact_share:.1%}",
            spread="{spread:.2f}",
            p50="{p50_s:.3f} s",
            failed="{failed}",
        ),
        f"reused by the router, times cache_aware: {result['ratio']:.2f}",
        "added at p50: {total_ms:.1f} ms a request of {tokens} tokens (CPU of the router:"
        " {router_cpu_ms:.1f} ms; tokenise {tokenise_ms:.1f} ms, choose {choose_ms:.1f} ms)".format(
            **result["added"]
        ),
    ]
    if "faults" in result:
        rows = [
            {"arm": arm, "fault": fault, "recovered": _seconds(one.get("recovered_s")), **one}
            for arm, each in result["faults"].items()
            for fault, one in each.items()
        ]
        parts.append(
            common.columns(
                rows,
                fault="{fault}",
                arm="{arm}",
                requests="{requests}",
                lost="{lost}",
                asked_again="{again}",
                inside="{inside}",
                before_p50="{before_p50_s:.1f} s",
                longest="{longest_s:.1f} s",
                index_again="{recovered}",
            )
        )
    if "two_routers" in result:
        parts.append(
            "two routers, {requests} bursts of {burst}, text found for {found:.1%}; the same"
            " worker: {at once:.1%} at once, {after a beat:.1%} after a beat; the same rows:"
            " {at once, rows:.1%}, {after a beat, rows:.1%}".format(**result["two_routers"])
        )
    return "\n\n".join(parts)


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} s"
