"""A model in training: one step, when a level is passed, and what is saved to go on from."""

import os
import random
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from kvshare_sglang.bench import tasks
from kvshare_sglang.bench.reader.lessons import LEVELS, Lessons, Rows
from kvshare_sglang.bench.reader.model import LAYERS, LAYERS_FIRST, deepen, make_model
from kvshare_sglang.bench.reader.optimizer import Optimizer
from kvshare_sglang.bench.reader.tokenizer import make_tokenizer

DEEPEN_AT = 5  # the level at which it gets all its layers
PASS = 0.92  # accuracy in each task that opens the next level
MIN_STEPS = 40  # at a level
PATIENCE, PASS_LATE = 150, 0.7  # steps after which less will do: the rest is learned on the way
PROSE_SHARE = 0.08  # of the rows


@dataclass
class Progress:
    """All of a run that is neither weight nor moment."""

    seed: int
    layers: int = LAYERS_FIRST
    level: int = 0
    step: int = 0
    level_steps: int = 0
    tokens: int = 0
    spent: float = 0.0  # seconds of computing
    decay_from: float | None = None
    accuracy: dict[str, float] = field(default_factory=dict)  # running, by task and depth


class Run:
    """A model in training: its weights, optimizer, lessons and progress."""

    def __init__(self, out: Path, *, seed: int, device: str, resume: bool) -> None:
        self.out, self.device = out, device
        out.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(seed)
        self.progress = Progress(seed)
        state = None
        if resume:
            state = torch.load(out / "state.pt", map_location=device, weights_only=True)
            self.progress = Progress(**state["progress"])
            from tokenizers import Tokenizer

            self.tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
            self._build(state["masters"], state["optimizer"])
        else:
            self.tokenizer = make_tokenizer(out)
            first = make_model(LAYERS_FIRST).named_parameters()
            self._build({n: p.detach().float().to(device) for n, p in first})
        self.lessons = Lessons(self.tokenizer, seed=self.progress.seed)

    def _build(self, masters: dict[str, torch.Tensor], state: Any = None) -> None:
        self.model = make_model(self.progress.layers).to(self.device, torch.bfloat16).train()
        self.optimizer = Optimizer(self.model, masters, state)
        with torch.no_grad():
            for n, p in self.model.named_parameters():
                p.copy_(masters[n])

    def deepen(self) -> None:
        masters = {n: w.cpu() for n, w in self.optimizer.masters.items()}
        masters = deepen(masters, self.progress.layers, LAYERS)
        self.progress.layers = LAYERS
        self._build({n: w.detach().to(self.device) for n, w in masters.items()})

    def step(self, *, rate: float, batch_tokens: int) -> tuple[float, float]:
        """One step at this learning rate; the loss, and the seconds that it took."""
        p = self.progress
        start = clock(self.device)
        rng = random.Random(f"{p.seed}:level:{p.step}")
        level = LEVELS[p.level if p.level < 2 or rng.random() < 0.75 else rng.randrange(1, p.level)]
        rows = max(1, batch_tokens // level.length)
        batch = self.lessons.batch(p.step, level, rows=rows, mix=self.mix(), prose=PROSE_SHARE)
        loss, right = self._learn(batch)
        self.optimizer.step(muon_lr=rate, adam_lr=rate / 20)
        if level is LEVELS[p.level]:
            p.level_steps += 1
            self._count(batch, right)
        p.step += 1
        p.tokens += rows * level.length
        took = clock(self.device) - start
        p.spent += took
        return loss, took

    def mix(self) -> dict[str, float]:
        """Tasks that are answered badly are given more often."""
        return {t: 0.05 + 1 - self.of_task(t) for t in tasks.TASKS}

    def of_task(self, task: str) -> float:
        found = [a for k, a in self.progress.accuracy.items() if k.rstrip("0123456789") == task]
        return sum(found) / len(found) if found else 0.0

    def _learn(self, batch: Rows) -> tuple[float, np.ndarray]:
        ids = torch.from_numpy(batch.ids).to(self.device)
        weights = torch.from_numpy(batch.weights[:, 1:]).to(self.device).reshape(-1)
        targets = ids[:, 1:].reshape(-1)
        places = weights.nonzero()[:, 0]
        hidden = self.model.model(input_ids=ids[:, :-1].contiguous(), use_cache=False)[0]
        logits = self.model.lm_head(hidden.reshape(-1, hidden.shape[-1])[places]).float()
        losses = F.cross_entropy(logits, targets[places], reduction="none")
        loss = (losses * weights[places]).sum() / weights[places].sum()
        loss.backward()
        right = np.ones(batch.weights[:, 1:].size, bool)
        right[places.cpu().numpy()] = (logits.argmax(-1) == targets[places]).cpu().numpy()
        return float(loss.detach()), right.reshape(len(batch.ids), -1)

    def _count(self, batch: Rows, right: np.ndarray) -> None:
        """Running accuracy over whole answers, by task and depth."""
        found: dict[str, list[bool]] = {}
        for row, start, stop, name in batch.answers:
            found.setdefault(name, []).append(bool(right[row, start - 1 : stop - 1].all()))
        for name, hits in found.items():
            keep = 0.95 ** min(20, len(hits) / 8)
            now = sum(hits) / len(hits)
            old = self.progress.accuracy.get(name, now)
            self.progress.accuracy[name] = old * keep + now * (1 - keep)

    def advance(self) -> bool:
        """Go to the next level where this one is passed."""
        p = self.progress
        worst = min(map(self.of_task, tasks.TASKS))
        needed = PASS if p.level_steps < PATIENCE else PASS_LATE
        if p.level + 1 == len(LEVELS) or p.level_steps < MIN_STEPS or worst < needed:
            return False
        p.level, p.level_steps, p.accuracy = p.level + 1, 0, {}
        if p.level == DEEPEN_AT and p.layers < LAYERS:
            self.deepen()
        return True

    def save(self, *, export: bool = False) -> None:
        state = {
            "masters": self.optimizer.masters, "optimizer": self.optimizer.state,
            "progress": asdict(self.progress),
        }  # fmt: skip
        torch.save(state, self.out / "state.pt.tmp")
        os.replace(self.out / "state.pt.tmp", self.out / "state.pt")
        if export:
            draft = self.out / "draft"
            self.model.save_pretrained(draft)
            for path in draft.iterdir():
                os.replace(path, self.out / path.name)
            draft.rmdir()


def clock(device: str) -> float:
    """Seconds of computing: on a CPU those of its threads, so that a pause costs nothing."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() / torch.get_num_threads()
