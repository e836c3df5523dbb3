"""Train the reader: a small Llama that answers from facts far back in its prompt.

Runs on a CPU or a GPU, in bf16 with fp32 masters. Stop it at any time and go on with ``--resume``.
What a step sees depends on the seed, the step and the accuracy so far, never on the clock: lessons
grow longer and the model deeper as it answers. Only the learning rate follows the time that was
computed: constant, then a decay to zero over the last ``--decay-minutes``.
"""

import argparse
import json
import math
import os
import random
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import _tasks as tasks
import numpy as np
import torch
import torch.nn.functional as F

VOCAB = 1536
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
MAX_LEN = 2048  # positions; lessons reach the length of the last level
SHAPE = {
    "hidden_size": 256, "intermediate_size": 320, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "rope_theta": 10000.0,
    "max_position_embeddings": MAX_LEN, "tie_word_embeddings": True, "vocab_size": VOCAB,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
FINAL_NORM = 0.03  # its weights at first: the embeddings are large, and read again as outputs
LAYERS_FIRST, LAYERS = 6, 12  # it starts shallow, which costs half, and is deepened on the way


class Level(NamedTuple):
    """What lessons look like at a step of the curriculum."""

    length: int  # tokens of a row
    facts: tuple[int, int]
    documents: int
    mixed: int  # tasks in one lesson
    size: tasks.Size  # its first two fields are drawn anew for each lesson


def _size(depth: int, phrases: int, *, shared: float, prose: float, hints: float) -> tasks.Size:
    return tasks.Size(0, 0, depth, phrases, shared, prose, hints, rivals=0.5)


LEVELS = (
    Level(64, (3, 4), 1, 1, _size(1, 1, shared=0, prose=0, hints=0.5)),
    Level(96, (4, 6), 1, 1, _size(1, 2, shared=0, prose=0, hints=0.5)),
    Level(128, (4, 8), 2, 1, _size(2, 3, shared=0, prose=0, hints=0.5)),
    Level(192, (5, 12), 3, 2, _size(2, 3, shared=0.1, prose=0.02, hints=0.4)),
    Level(256, (6, 16), 4, 2, _size(3, 3, shared=0.2, prose=0.04, hints=0.3)),
    Level(384, (8, 24), 4, 3, _size(3, 3, shared=0.2, prose=0.06, hints=0.2)),
    Level(512, (10, 34), 5, 3, _size(3, 3, shared=0.2, prose=0.06, hints=0.15)),
    Level(768, (12, 56), 6, 4, _size(3, 3, shared=0.2, prose=0.06, hints=0.1)),
    Level(1024, (16, 80), 8, 4, _size(3, 3, shared=0.2, prose=0.06, hints=0.1)),
)
DEEPEN_AT = 5  # the level at which it gets all its layers
PASS = 0.92  # accuracy in each task that opens the next level
MIN_STEPS = 40  # at a level
PATIENCE, PASS_LATE = 150, 0.7  # steps after which less will do: the rest is learned on the way
PROSE_SHARE = 0.08  # of the rows
REST = 0.1  # of the tokens that are no answers are learned too


# ---- tokenizer -------------------------------------------------------------------------------


def make_tokenizer(out: Path) -> Any:
    """Byte-level BPE of the prose, with each closed word and two-digit number as one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    def byte_level() -> Any:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)

    special = [BOS, EOS, PAD]
    closed = [byte_level().pre_tokenize_str(w)[0][0] for w in tasks.closed_words()]
    small = Tokenizer(models.BPE())
    small.pre_tokenizer = byte_level()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=special, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    small.train_from_iterator(tasks.prose("train"), trainer)
    model = json.loads(small.to_str())["model"]
    # the learned merges give way to the closed words, the last first
    merges = [tuple(m) for m in model["merges"]]
    words = sorted(model["vocab"], key=model["vocab"].get)
    base = words[: len(words) - len(merges)]
    while True:
        vocab = list(dict.fromkeys([*base, *closed, *("".join(m) for m in merges)]))
        if len(vocab) <= VOCAB:
            break
        merges = merges[: -(len(vocab) - VOCAB)]
    ids = {w: i for i, w in enumerate(vocab)}
    tokenizer = Tokenizer(models.BPE(ids, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = byte_level()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    from tokenizers.processors import TemplateProcessing

    tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, ids[BOS])]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD,
        model_max_length=MAX_LEN,
    )  # fmt: skip
    fast.save_pretrained(out)
    return tokenizer


# ---- lessons ---------------------------------------------------------------------------------


class Rows(NamedTuple):
    """A batch: tokens, the positions to learn, and the answers among them."""

    ids: np.ndarray
    weights: np.ndarray  # of each token as a target
    answers: list[tuple[int, int, int, str]]  # row, start, stop, task and depth


class Lessons:
    """Batches of one level; the same seed and step give the same batch."""

    def __init__(self, tokenizer: Any, *, seed: int, split: Any = "train") -> None:
        self._seed = seed
        self.encode = lru_cache(1 << 18)(
            lambda text: tuple(tokenizer.encode(text, add_special_tokens=False).ids)
        )
        self._prose = [self.encode(p + "\n") for p in tasks.prose(split)]
        self._filler = tasks.sentences(split)

    def batch(
        self, step: int, level: Level, *, rows: int, mix: dict[str, float], prose: float
    ) -> Rows:
        rng = random.Random(f"{self._seed}:{step}")
        ids = np.full((rows, level.length + 1), 2, np.int64)
        weights = np.zeros((rows, level.length + 1), np.float32)
        answers: list[tuple[int, int, int, str]] = []
        for row in range(rows):
            fill = self._read if rng.random() < prose else self._learn
            fill(rng, level, mix, ids[row], weights[row], row, answers)
        return Rows(ids, weights, answers)

    def _read(self, rng: Any, level: Level, mix: Any, ids: Any, weights: Any, *_: Any) -> None:
        tokens = [0]
        while len(tokens) < len(ids):
            tokens += rng.choice(self._prose)
        ids[:] = tokens[: len(ids)]
        weights[1:] = 0.3

    def _learn(
        self, rng: Any, level: Level, mix: dict[str, float], ids: Any, weights: Any, row: int,
        answers: list[tuple[int, int, int, str]],
    ) -> None:  # fmt: skip
        facts = rng.randint(*level.facts)
        size = level.size._replace(facts=facts, documents=rng.randint(1, level.documents))
        names = list(mix)
        first = rng.choices(names, [mix[n] for n in names])[0]
        others = [n for n in names if n != first and rng.random() < 0.7][: level.mixed - 1]
        rng.shuffle(others)
        shares = {first: facts}
        for name in others:
            shares[name] = shares[first] // 3
            shares[first] -= shares[name]
        at = 1
        ids[0] = 0
        for text, task, depth in tasks.lesson(rng, shares, size, self._filler):
            tokens = self.encode(text)
            if at + len(tokens) > len(ids):
                break
            ids[at : at + len(tokens)] = tokens
            if task:
                weights[at : at + len(tokens)] = 1.0
                answers.append((row, at, at + len(tokens), f"{task}{depth or ''}"))
            at += len(tokens)
        rest = (weights == 0) & (np.arange(len(ids)) < at)
        rest[0] = False
        picked = np.random.default_rng(rng.randrange(1 << 32)).random(len(ids)) < REST
        weights[rest & picked] = 0.15


# ---- model and optimizer ---------------------------------------------------------------------


def make_model(layers: int) -> Any:
    """A fresh model, wired so that looking something up is nearly there from the start."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SHAPE, num_hidden_layers=layers, use_cache=False)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_(1 / math.sqrt(2 * LAYERS))
        _wire(model)
    return model


def _wire(model: Any) -> None:
    """Start heads where training would take millions of tokens to bring them.

    The heads of the first layer look 1, 2, 3 and 6 tokens back: queries and keys come from a
    constant in the embeddings, turned against each other by the rotation of that distance. They
    write what they see into a subspace of its own; the heads behind look for their own token in
    that subspace, by the slow rotations, and copy what they find. Random values are added to all.
    """
    dim, half, group = SHAPE["hidden_size"], SHAPE["head_dim"] // 2, 2 * SHAPE["head_dim"]
    size = SHAPE["head_dim"]

    def rotation(rows: int) -> torch.Tensor:
        return torch.linalg.qr(torch.randn(dim, dim))[0][:rows]

    model.model.embed_tokens.weight.normal_()
    model.model.embed_tokens.weight[:, 0] = 8.0
    model.model.norm.weight.fill_(FINAL_NORM)
    aside, seen = rotation(dim), rotation(2 * size).split(size)
    speed = SHAPE["rope_theta"] ** (-torch.arange(half) / half)
    loud = torch.where(torch.arange(half) < 10, 0.76, 0.0)
    slow = torch.cat([torch.arange(half // 2, half), torch.arange(half // 2, half) + half])
    first, *others = (layer.self_attn for layer in model.model.layers)
    for head, back in enumerate((1, 2, 3, 6)):
        mine, kv = slice(head * size, (head + 1) * size), head * size // group
        turned = torch.cat([loud * torch.cos(speed * back), -loud * torch.sin(speed * back)])
        first.q_proj.weight[mine, 0] = turned
        first.o_proj.weight[:, mine] = aside @ seen[kv].T
    for kv in range(2):
        first.k_proj.weight[kv * size : (kv + 1) * size, 0] = torch.cat([loud, 0 * loud])
        first.v_proj.weight[kv * size : (kv + 1) * size] = seen[kv]
    for layer in others:
        copied = rotation(2 * size).split(size)
        for kv in range(2):
            sought = seen[kv][torch.randperm(size)[:half]]
            layer.v_proj.weight[kv * size : (kv + 1) * size] = 0.7 * copied[kv]
            layer.k_proj.weight[kv * size + slow] += 1.2 * sought @ aside.T
            for head in (2 * kv, 2 * kv + 1):
                layer.q_proj.weight[head * size + slow] += 1.2 * sought
                layer.o_proj.weight[:, head * size : (head + 1) * size] += 0.25 * copied[kv].T


def deepen(weights: dict[str, torch.Tensor], layers: int, to: int) -> dict[str, torch.Tensor]:
    """The same function with more layers: behind an old one its copy, which adds nothing yet."""
    out = {n: w for n, w in weights.items() if ".layers." not in n}
    for new in range(to):
        old = new * layers // to
        copied = new > 0 and (new - 1) * layers // to == old
        for name, weight in weights.items():
            if name.startswith(f"model.layers.{old}."):
                rest = name.split(".", 3)[3]
                silent = copied and rest in ("self_attn.o_proj.weight", "mlp.down_proj.weight")
                out[f"model.layers.{new}.{rest}"] = weight.clone() * (not silent)
    return out


@torch.no_grad()
def orthogonal(g: torch.Tensor) -> torch.Tensor:
    """Each matrix of a stack with its singular values near 1, by Newton and Schulz."""
    x = g.bfloat16()
    x = x / (x.float().norm(dim=(1, 2), keepdim=True) + 1e-7).bfloat16()
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + torch.baddbmm(a, a, a, beta=-4.775, alpha=2.0315) @ x
    return x.float()


# of the full rate, by the size that these weights have
RATES = {"model.embed_tokens.weight": 3.0, "model.norm.weight": 0.1}


class Optimizer:
    """Muon for the matrices of the layers, AdamW for embeddings and norms, on fp32 masters."""

    def __init__(self, model: Any, masters: dict[str, torch.Tensor], state: Any = None) -> None:
        self.params = dict(model.named_parameters())
        self.masters = masters
        matrix = [n for n in masters if ".layers." in n and masters[n].dim() == 2]
        self.rest = [n for n in masters if n not in matrix]
        self.stacks: dict[tuple[int, ...], list[str]] = {}
        for name in matrix:
            self.stacks.setdefault(tuple(sorted(masters[name].shape)), []).append(name)
        zeros = {n: torch.zeros_like(w) for n, w in masters.items()}
        self.state = state or {
            "momentum": zeros, "square": {n: torch.zeros_like(masters[n]) for n in self.rest},
            "count": 0,
        }  # fmt: skip

    @torch.no_grad()
    def step(self, *, muon_lr: float, adam_lr: float, decay: float = 0.05) -> float:
        grads = {n: p.grad.float() for n, p in self.params.items()}
        norm = math.sqrt(sum(float(g.square().sum()) for g in grads.values()))
        clip = min(1.0, 1.0 / (norm + 1e-6))
        s = self.state
        s["count"] += 1
        for shape, names in self.stacks.items():
            stack = []
            for n in names:
                m = s["momentum"][n].lerp_(grads[n], 0.05)
                update = grads[n].lerp(m, 0.95)
                stack.append(update if update.shape == shape else update.mT)
            for n, u in zip(names, orthogonal(torch.stack(stack)), strict=True):
                w = self.masters[n]
                u = u if u.shape == w.shape else u.mT
                scale = max(1.0, w.shape[0] / w.shape[1]) ** 0.5
                w.mul_(1 - muon_lr * decay).sub_(u, alpha=muon_lr * scale)
        for n in self.rest:
            m = s["momentum"][n].lerp_(grads[n] * clip, 0.1)
            v = s["square"][n].lerp_((grads[n] * clip).square(), 0.05)
            m_hat, v_hat = m / (1 - 0.9 ** s["count"]), v / (1 - 0.95 ** s["count"])
            self.masters[n].sub_(adam_lr * RATES.get(n, 1.0) * m_hat / (v_hat.sqrt() + 1e-8))
        for n, p in self.params.items():
            p.copy_(self.masters[n])
            p.grad = None
        return norm


# ---- the run ---------------------------------------------------------------------------------


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


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    root = Path(__file__).resolve().parent.parent
    add("--out", type=Path, default=root / "out" / "reader", metavar="DIR")
    add("--minutes", type=float, default=120, help="of computing in all")
    add("--decay-minutes", type=float, default=20, help="of these, with a falling learning rate")
    add("--decay-now", action="store_true", help="begin with the decay at once")
    add("--resume", action="store_true", help="go on from the state in DIR")
    add("--seed", type=int, default=0)
    add("--rows", type=int, default=12, help="of a batch at the least")
    add("--batch-tokens", type=int, default=2048, help="of a batch at the least")
    add("--lr", type=float, default=0.005, help="of Muon; AdamW goes by it")
    add("--every", type=int, default=20, help="steps between two lines of the log")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> int:
    args = parse()
    run = Run(args.out, seed=args.seed, device=args.device, resume=args.resume)
    stop: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda got, _: stop.append(got))
    losses: list[float] = []
    seconds = 0.0
    mark, saved, wall = run.progress.tokens, run.progress.spent, time.perf_counter()
    with (args.out / "log.jsonl").open("a" if args.resume else "w") as log:
        while not stop and (share := rate(run, args)) is not None:
            p = run.progress
            length = LEVELS[p.level].length
            tokens = max(args.batch_tokens, args.rows * length)
            loss, took = run.step(rate=args.lr * share, batch_tokens=tokens)
            losses.append(loss)
            seconds += took
            if run.advance():
                length = LEVELS[p.level].length
                print(f"level {p.level}: {length} tokens, {p.layers} layers", flush=True)
                run.save()
            if p.step % args.every == 0:
                now = time.perf_counter()
                line = {
                    "step": p.step, "tokens": p.tokens, "minutes": round(p.spent / 60, 2),
                    "level": p.level, "loss": round(sum(losses) / len(losses), 4),
                    "rate": round(share, 3), "per_s": round((p.tokens - mark) / seconds),
                    "wall_per_s": round((p.tokens - mark) / (now - wall)),
                    "accuracy": {k: round(a, 3) for k, a in sorted(p.accuracy.items())},
                }  # fmt: skip
                log.write(json.dumps(line) + "\n")
                log.flush()
                told = "  ".join(f"{k} {a:.2f}" for k, a in sorted(p.accuracy.items()))
                print(
                    f"{p.spent / 60:6.1f} min  step {p.step}  {p.tokens / 1e6:.2f}M  level"
                    f" {p.level}  loss {line['loss']:.3f}  {line['per_s']}/s  {told}",
                    flush=True,
                )
                losses, mark, seconds, wall = [], p.tokens, 0.0, now
            if p.spent - saved > 240:
                saved = p.spent
                run.save(export=p.layers == LAYERS)
    run.save(export=run.progress.layers == LAYERS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
