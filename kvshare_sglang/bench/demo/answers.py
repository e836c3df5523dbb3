"""The trained reader on a real server: what is right in full, with kvshare, and by copies alone."""

import argparse
from typing import Any

from kvshare_sglang.bench import common, models
from kvshare_sglang.bench.quality.cases import SIZE, Encoder, Prompt, prompts
from kvshare_sglang.bench.server import Server, ServerSpec, serve

KINDS = (
    ("a fact far back was edited", "hops", "edit far"),
    ("a header far back was edited", "state", "edit far"),
    ("documents in another order", "hops", "splice"),
    ("cached after a misleading text", "state", "adversarial"),
)
FLAGS = (
    *("--kvshare", "--kvshare-calibration", "auto"),
    *("--kvshare-min-reuse", "32", "--kvshare-window", "16"),
)
WAYS: dict[str, Any] = {"full": "exact", "kvshare": None, "copies": {"budget": 0.0}}


def ask_reader(args: argparse.Namespace) -> list[dict[str, Any]]:
    """For each kind of prompt how many answers were right, by way."""
    spec = ServerSpec(
        "reader", models.READER, args.device, threads=args.threads, args=(*FLAGS, *args.server_arg)
    )
    encode = Encoder(models.READER)
    size = SIZE._replace(facts=48)
    rows = []
    with serve(spec) as (server,), common.Progress(len(KINDS) * args.answers) as bar:
        for title, task, case in KINDS:
            bar.say(title)
            right = dict.fromkeys(WAYS, 0)
            for prompt in prompts(encode, task, case, n=args.answers, size=size, max_len=1024):
                for way in WAYS:
                    right[way] += _answer(server, prompt, way) == prompt.answer.tolist()
                bar.update()
            rows.append({"kind": title, "n": args.answers, **right})
        bar.say("answered")
    return rows


def _answer(server: Server, prompt: Prompt, way: str) -> list[int]:
    server.flush()
    for cached in prompt.cached:
        server.ask(cached.tolist())
    got = server.ask(prompt.ids.tolist(), max_new_tokens=len(prompt.answer), kvshare=WAYS[way])
    return got.output_ids


def show_answers(rows: list[dict[str, Any]]) -> str:
    head = ("answers of the trained reader", "full prefill", "kvshare", "copies alone")
    return common.table(
        head, [(r["kind"], *(f"{r[way]} of {r['n']}" for way in WAYS)) for r in rows]
    )
