"""The trained reader on a real server: what is right in full, with kvshare, and by copies alone."""

import argparse
from typing import Any

import _bench
import _models
from _server import Server, ServerSpec, serve
from eval_quality import SIZE, Encoder, Prompt, prompts

KINDS = (
    ("a fact far back was edited", "hops", "edit far"),
    ("a header far back was edited", "state", "edit far"),
    ("documents in another order", "hops", "splice"),
    ("cached behind a misleading text", "state", "adversarial"),
)
FLAGS = ("--kvshare", "--kvshare-min-reuse", "32", "--kvshare-window", "16")
WAYS: dict[str, Any] = {"full": "exact", "kvshare": None, "copies": {"budget": 0.0}}


def ask_reader(args: argparse.Namespace) -> list[dict[str, Any]]:
    """For each kind of prompt how many answers were right, by way."""
    spec = ServerSpec(
        "reader", _models.READER, args.device, threads=args.threads, args=(*FLAGS, *args.server_arg)
    )
    encode = Encoder(_models.READER)
    size = SIZE._replace(facts=48)
    rows = []
    with serve(spec) as (server,), _bench.Progress(len(KINDS) * args.answers) as bar:
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
    return _bench.table(
        head, [(r["kind"], *(f"{r[way]} of {r['n']}" for way in WAYS)) for r in rows]
    )
