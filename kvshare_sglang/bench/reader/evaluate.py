"""Accuracy of the reader under full prefill, on test seeds: answers that it writes by itself.

One row a task, depth and length of the documents; below, the perplexity of prose from modules that
it was not trained on.
"""

import argparse
import math
import random
from pathlib import Path
from typing import Any

import torch

from kvshare_sglang.bench import common, options, tables, tasks

TEST_SEED = "test"  # no lesson is drawn from a seed that is a word
LENGTHS = {"short": 12, "middle": 34, "long": 60}  # facts
DOCUMENTS = {"short": 2, "middle": 4, "long": 6}


class Reader:
    """A model directory, asked with transformers."""

    def __init__(self, path: Path, device: str) -> None:
        from tokenizers import Tokenizer
        from transformers import LlamaForCausalLM

        self._device = device
        self._tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        model: Any = LlamaForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        self._model = model.to(device).eval()
        self.max_len = int(model.config.max_position_embeddings)

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text).ids)

    def answer(self, prompt: str, *, limit: int) -> str:
        """What it writes up to a full stop."""
        ids = torch.tensor([self.encode(prompt)], device=self._device)
        stop = self.encode(".")[-1]
        out: list[int] = []
        with torch.no_grad():
            past = None
            while len(out) < limit and (not out or out[-1] != stop):
                run = self._model(input_ids=ids, past_key_values=past, use_cache=True)
                past = run.past_key_values
                ids = run.logits[:, -1:].argmax(-1)
                out.append(int(ids))
        return str(self._tokenizer.decode(out)).strip().removesuffix(".")

    def loss(self, ids: list[int]) -> tuple[float, int]:
        """Summed negative log-likelihood of all tokens but the first, and their number."""
        tokens = torch.tensor([ids], device=self._device)
        with torch.no_grad():
            logits = self._model(input_ids=tokens[:, :-1]).logits[0].float()
        found = torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum")
        return float(found), len(ids) - 1


def cases(only: list[str]) -> list[tuple[str, str, dict[str, Any]]]:
    """Name of the row, task, and what ``make`` is asked for."""
    plain: list[tuple[str, str, dict[str, Any]]] = [
        ("lookup", "lookup", {}),
        *((f"hops, depth {d}", "hops", {"depth": d}) for d in range(4)),
        ("few", "few", {}),
        ("state", "state", {}),
    ]
    return [case for case in plain if not only or case[1] in only]


def measure(reader: Reader, args: argparse.Namespace) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    filler = tasks.sentences("test")
    for name, task, wanted in cases(args.task):
        for length in args.length:
            rng = random.Random(f"{TEST_SEED}:{name}:{length}")
            size = tasks.Size(LENGTHS[length], DOCUMENTS[length])
            right, tokens = 0, 0
            for _ in range(args.n):
                sample = tasks.make(task, rng, size, filler=filler, **wanted)
                limit = 4 + 6 * len(sample.ask.keys)
                right += reader.answer(sample.prompt, limit=limit) == sample.answer
                tokens += len(reader.encode(sample.prompt))
            rows.append(
                {
                    "task": name, "length": length, "n": args.n,
                    "tokens": round(tokens / args.n), "accuracy": right / args.n,
                }
            )  # fmt: skip
            print(
                f"{name:20} {length:7} {tokens / args.n:5.0f} tokens  {right / args.n:.3f}",
                flush=True,
            )
    return rows


def perplexity(reader: Reader, *, n: int) -> float:
    rng = random.Random(TEST_SEED)
    total, count = 0.0, 0
    for _ in range(n):
        sample = tasks.text(rng, split="test")
        ids = reader.encode(f"{sample.prompt} {sample.continuation}")[: reader.max_len]
        loss, tokens = reader.loss(ids)
        total, count = total + loss, count + tokens
    return math.exp(total / count)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Accuracy by task and length, for the reader's own page."""
    lengths = list(dict.fromkeys(r["length"] for r in rows))
    found = {(r["task"], r["length"]): r["accuracy"] for r in rows}
    heads = [
        f"{length} ({LENGTHS[length]} facts, {_tokens(rows, length)} tokens)" for length in lengths
    ]
    return tables.markdown(
        ("task", *heads),
        [
            (task, *(f"{found[task, length]:.3f}" for length in lengths))
            for task in dict.fromkeys(r["task"] for r in rows)
        ],
    )


def _tokens(rows: list[dict[str, Any]], length: str) -> int:
    """About how many tokens the documents of a length have."""
    return round(sum(t := [r["tokens"] for r in rows if r["length"] == length]) / len(t))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", type=Path, help="directory of the reader")
    add("--task", action="append", default=[], choices=tasks.TASKS)
    add("--length", action="append", choices=list(LENGTHS))
    add("--n", type=int, default=200, help="questions a row")
    options.add_table(parser)


def run(args: argparse.Namespace) -> int:
    args.model = options.model_directory(args.model)
    args.length = args.length or list(LENGTHS)
    reader = Reader(args.model, args.device)
    rows = measure(reader, args)
    prose = perplexity(reader, n=min(100, args.n))
    common.report(
        args,
        f"prose of held-out modules: perplexity {prose:.1f} a token",
        {"rows": rows, "prose_perplexity": prose},
    )
    if args.table:
        tables.write(args.table, "reader", table(rows))
    return 0
