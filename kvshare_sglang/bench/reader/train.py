"""Train the reader: a small Llama that answers from facts far back in its prompt.

Runs on a CPU or a GPU, in bf16 with fp32 masters. Stop it at any time and go on with ``--resume``.
What a step sees depends on the seed, the step and the accuracy so far, never on the clock: lessons
grow longer and the model deeper as it answers. Only the learning rate follows the time that was
computed: constant, then a decay to zero over the last ``--decay-minutes``.
"""

import argparse
import json
import signal
import time
from pathlib import Path
from typing import Any, TextIO

from kvshare_sglang.bench.common import ROOT
from kvshare_sglang.bench.reader.lessons import LEVELS
from kvshare_sglang.bench.reader.model import LAYERS
from kvshare_sglang.bench.reader.training import Run

SAVE_EVERY_S = 240  # of computing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", type=Path, default=ROOT / "out" / "reader", metavar="DIR")
    add("--minutes", type=float, default=120, help="of computing in all")
    add("--decay-minutes", type=float, default=20, help="of these, with a falling learning rate")
    add("--decay-now", action="store_true", help="begin with the decay at once")
    add("--resume", action="store_true", help="go on from the state in DIR")
    add("--seed", type=int, default=0)
    add("--rows", type=int, default=12, help="of a batch at the least")
    add("--batch-tokens", type=int, default=2048, help="of a batch at the least")
    add("--lr", type=float, default=0.005, help="of Muon; AdamW goes by it")
    add("--every", type=int, default=20, help="steps between two lines of the log")


def run(args: argparse.Namespace) -> int:
    trained = Run(args.out, seed=args.seed, device=args.device, resume=args.resume)
    stop: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda got, _: stop.append(got))
    progress = trained.progress
    saved = progress.spent
    with (args.out / "log.jsonl").open("a" if args.resume else "w") as file:
        log = Log(file, trained)
        while not stop and (share := rate(trained, args)) is not None:
            tokens = max(args.batch_tokens, args.rows * LEVELS[progress.level].length)
            log.count(*trained.step(rate=args.lr * share, batch_tokens=tokens))
            if trained.advance():
                length = LEVELS[progress.level].length
                print(
                    f"level {progress.level}: {length} tokens, {progress.layers} layers",
                    flush=True,
                )
                trained.save()
            if progress.step % args.every == 0:
                log.write(share)
            if progress.spent - saved > SAVE_EVERY_S:
                saved = progress.spent
                trained.save(export=progress.layers == LAYERS)
    trained.save(export=progress.layers == LAYERS)
    return 0


class Log:
    """A line now and then, on the screen and in a file: means since the last one."""

    def __init__(self, file: TextIO, trained: Run) -> None:
        self._file, self._progress = file, trained.progress
        self._start()

    def _start(self) -> None:
        self._losses: list[float] = []
        self._seconds = 0.0
        self._mark, self._wall = self._progress.tokens, time.perf_counter()

    def count(self, loss: float, seconds: float) -> None:
        self._losses.append(loss)
        self._seconds += seconds

    def write(self, share: float) -> None:
        p, tokens = self._progress, self._progress.tokens - self._mark
        line: dict[str, Any] = {
            "step": p.step, "tokens": p.tokens, "minutes": round(p.spent / 60, 2),
            "level": p.level, "loss": round(sum(self._losses) / len(self._losses), 4),
            "rate": round(share, 3), "per_s": round(tokens / self._seconds),
            "wall_per_s": round(tokens / (time.perf_counter() - self._wall)),
            "accuracy": {k: round(a, 3) for k, a in sorted(p.accuracy.items())},
        }  # fmt: skip
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        told = "  ".join(f"{k} {a:.2f}" for k, a in sorted(p.accuracy.items()))
        print(
            f"{p.spent / 60:6.1f} min  step {p.step}  {p.tokens / 1e6:.2f}M  level"
            f" {p.level}  loss {line['loss']:.3f}  {line['per_s']}/s  {told}",
            flush=True,
        )
        self._start()


def rate(run: Run, args: argparse.Namespace) -> float | None:
    """The share of the full learning rate for the next step; None when the run is over."""
    p = run.progress
    due = args.decay_now or p.spent >= 60 * (args.minutes - args.decay_minutes)
    if p.decay_from is None and due:
        if p.layers < LAYERS:
            run.deepen()
        p.decay_from = p.spent
    if p.decay_from is None:
        return min(1.0, (p.step + 1) / 60)
    left = 1 - (p.spent - p.decay_from) / (60 * args.decay_minutes)
    return left if left > 0 else None
