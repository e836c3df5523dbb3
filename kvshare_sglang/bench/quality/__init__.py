"""What reuse does to answers: selectors side by side on the same prompts and the same cache.

Every prompt is served by full prefill and by each selector at each budget, over KV that full
prefill left of the prompts before it. Answers are those of greedy decoding; agreement and KL are
taken along full prefill's own continuation. A prompt that reuse declines is served in full.
"""

import argparse
import concurrent.futures
import functools
import math
import multiprocessing
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import _bench
import _models
import _tasks as tasks
import numpy as np
import torch
from _driver import KV, Lab, Model
from _mirror import checked_flops, peeked_flops, prefill_flops
from rapidfuzz.distance import LCSseq

from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.policy.rows import CHECKED, SELECTORS, reused_positions
from kvshare_sglang.policy.trace import probe_layer

# rerun: full prefill in two chunks, the noise of another order of sums. trace+refresh: tokens are
# fed one by one behind the prompt, and what they turn to is refreshed.
ALL = (*SELECTORS, "trace", "trace+refresh", "oracle", "rerun")
CASES = ("splice", "edit near", "edit far", "edit same", "template", "adversarial")
WRITTEN = 64  # tokens of a greedy continuation that ROUGE-L compares
MOST_OF_ANSWER = 96  # tokens of a true continuation that perplexity is taken over
CONTINUED = 32  # tokens of full prefill's continuation along which agreement is measured
TRIES = 100  # samples in a row without such a pair, and there is none
SIZE = tasks.Size(34, 4, prose=0.06)


class Prompt(NamedTuple):
    """A prompt, what was cached before it, and its answer."""

    cached: list[np.ndarray]
    ids: np.ndarray
    answer: np.ndarray  # tokens, the full stop included


class Truth(NamedTuple):
    """Full prefill of a prompt."""

    kv: KV
    right: bool
    margin: float
    nll: float  # of the answer, a token
    told: np.ndarray  # the prompt and full prefill's own continuation
    written: np.ndarray | None  # a longer one, for ROUGE-L
    logprobs: torch.Tensor  # [continued, vocab], along it


class Outcome(NamedTuple):
    """One prompt under one selector."""

    right: bool
    margin: float
    nll: float
    top1: float
    kl: float
    recomputed: float  # share of the reused rows, mean over all layers, check and probes included
    computed: float  # share of full prefill's FLOPs, the check included
    declined: bool
    rouge_l: float | None = None  # of a greedy continuation with full prefill's, where asked
    top1_sure: float | None = None  # top1 of tokens that full prefill gives at least one half


# ---- prompts ---------------------------------------------------------------------------------


class NoPrompt(ValueError):
    """A task has no prompts of a case."""


class Encoder:
    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))

    def __call__(self, text: str, *, start: bool = False) -> np.ndarray:
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=start).ids, np.int32)


def prompts(
    encode: Encoder, task: str, case: str, *, n: int, size: tasks.Size, max_len: int
) -> Iterator[Prompt]:
    """Test prompts of a task: always the same ones. Those that the model cannot hold are left
    out and replaced. Raises NoPrompt if none is found in ``TRIES`` samples."""
    rng = random.Random(f"test quality {task} {case}")
    filler = tasks.sentences("test")
    made = missed = 0
    while made < n:
        missed += 1
        if missed > TRIES:
            raise NoPrompt(
                f"{task}, {case}: none of {TRIES} samples of {size.facts} facts gives a prompt that"
                f" fits into {max_len} tokens"
            )
        pair = _pair(rng, task, case, size, filler)
        if pair is None:
            continue
        ids = encode(pair.prompt.prompt, start=True)
        cached = [encode(p.prompt, start=True) for p in pair.cached]
        if max(map(len, (ids, *cached))) + MOST_OF_ANSWER > max_len:
            continue
        answer = pair.prompt.answer
        assert answer is not None
        tail = answer if task == "text" else f"{answer}."
        made, missed = made + 1, 0
        yield Prompt(cached, ids, encode(f" {tail}")[:MOST_OF_ANSWER])


def _pair(
    rng: random.Random, task: str, case: str, size: tasks.Size, filler: Any
) -> tasks.Pair | None:
    if task == "text":
        sample = tasks.text(rng, split="test", paragraphs=5)
        others = tasks.text(rng, split="test", paragraphs=4)
        return tasks.splice(rng, sample, foreign=others.documents)
    depth = rng.randint(1, 3) if task == "hops" and case == "adversarial" else None
    sample = tasks.make(task, rng, size, filler=filler, depth=depth)
    if case == "splice":
        foreign = tasks.scene(rng, {task: size.facts // 2}, size)
        return tasks.splice(rng, sample, foreign=foreign)
    if case == "template":
        return tasks.template(rng, sample)
    if case == "adversarial":
        return tasks.adversarial(rng, sample)
    kind = rng.choice(("substitution", "insertion", "deletion"))
    where = {"edit near": "near", "edit far": "far", "edit same": "any"}[case]
    return tasks.edit(rng, sample, kind, changes=case != "edit same", where=where)


# ---- one prompt ------------------------------------------------------------------------------


def judge(logprobs: torch.Tensor, answer: np.ndarray) -> tuple[bool, float, float]:
    """Whether greedy decoding writes the answer; the smallest margin by which each of its tokens
    leads (or trails) the best other one, in nats; and the answer's mean negative log-likelihood a
    token. ``logprobs`` stand along the answer."""
    target = torch.as_tensor(answer, device=logprobs.device).long()[:, None]
    mine = logprobs[: len(answer)].gather(1, target)[:, 0]
    best = logprobs[: len(answer)].scatter(1, target, float("-inf")).amax(1)
    return bool((mine > best).all()), float((mine - best).min()), float(-mine.mean())


def follow(model: Model, kv: KV, first: torch.Tensor, told: np.ndarray, known: int) -> torch.Tensor:
    """Log-probabilities along ``told[known:]``, the first of them from ``first``."""
    rest = model.go_on(kv, told[:-1], known=known) if len(told) > known + 1 else first[:0]
    return torch.cat([first[None], rest]).log_softmax(-1)


def truth(model: Model, prompt: Prompt, *, continued: int, rouge: bool = False) -> Truth:
    """``continued``: tokens of its own continuation along which others are compared with it."""
    first, kv = model.full(prompt.ids)
    written = model.greedy(prompt.ids, first, kv, WRITTEN) if rouge else None
    told = model.greedy(prompt.ids, first, kv, max(1, continued))
    known = len(prompt.ids)
    along = follow(model, kv, first, told, known)
    judged = _answered(model, kv, first, along, told, prompt)
    return Truth(kv, *judged, told, written, along)


def _answered(
    model: Model, kv: KV, first: torch.Tensor, along: torch.Tensor, told: np.ndarray, prompt: Prompt
) -> tuple[bool, float, float]:
    """As ``judge``; where full prefill's continuation starts with the answer, nothing is run."""
    known, answer = len(prompt.ids), prompt.answer
    if not np.array_equal(told[known : known + len(answer)], answer):
        along = follow(model, kv, first, np.concatenate([prompt.ids, answer]), known)
    return judge(along, answer)


class Apart(NamedTuple):
    """Top-1 agreement with full prefill along its continuation, KL from it, and the agreement where
    full prefill gives its token at least one half."""

    top1: float
    kl: float
    sure: float | None


def _apart(true: Truth, along: torch.Tensor) -> Apart:
    best, token = true.logprobs.max(-1)
    agree = (along.argmax(-1) == token).float()
    kl = (true.logprobs.exp() * (true.logprobs - along)).sum(-1).mean()
    sure = agree[best > math.log(0.5)]
    return Apart(float(agree.mean()), float(kl), float(sure.mean()) if len(sure) else None)


def rouge_l(
    model: Model, ids: np.ndarray, kv: KV, first: torch.Tensor, true: Truth
) -> float | None:
    """F1 of the longest common token subsequence (Lin 2004) of two continuations, equally long."""
    if true.written is None:
        return None
    mine = model.greedy(ids, first, kv, WRITTEN)[len(ids) :]
    return LCSseq.similarity(mine.tolist(), true.written[len(ids) :].tolist()) / WRITTEN


def outcome(
    lab: Lab, prompt: Prompt, true: Truth, selector: str, *, budget: float, layer: int, seed: int
) -> Outcome:
    model, ids = lab.model, prompt.ids
    plan = lab.plan(ids)
    if not plan.copies or selector == "full":
        share = 1.0
        return Outcome(
            true.right, true.margin, true.nll, 1.0, 0.0, share, 1.0, not plan.copies,
            rouge_l=None if true.written is None else 1.0,
            top1_sure=_apart(true, true.logprobs).sure,
        )  # fmt: skip
    if selector == "rerun":
        return _rerun(model, prompt, true)
    done = lab.prefill(
        ids, plan, selector.removesuffix("+refresh"), budget=budget, check_layer=layer, seed=seed,
        truth=true.kv,
        room=CONTINUED,
    )  # fmt: skip
    rouge = None
    if selector != "trace+refresh":
        rouge = rouge_l(model, ids, done.kv, done.logits, true)
    if selector == "trace+refresh":
        rest, _ = lab.decode(true.told[:-1], len(ids), done, every=lab.config.refresh_every)
        along = torch.cat([done.logits[None], rest]).log_softmax(-1)
    else:
        along = follow(model, done.kv, done.logits, true.told, len(ids))
    judged = _answered(model, done.kv, done.logits, along, true.told, prompt)
    reused = reused_positions(plan)
    probe = probe_layer(len(model.layers), lab.config.probe_at)
    counts = [np.isin(reused, rows).sum() for rows in done.rows]
    counts += [np.isin(reused, rows).sum() * probe for rows in done.probed]
    recomputed = sum(counts) / len(reused) / len(done.rows)
    every = np.arange(plan.prefix_len, plan.prompt_len)
    checked = len(every) if selector in CHECKED else 0
    flops = checked_flops(model.config, done.rows, checked=checked, at_layer=layer)
    flops += sum(peeked_flops(model.config, rows, at_layer=probe) for rows in done.probed)
    apart = _apart(true, along)
    return Outcome(
        *judged,
        apart.top1,
        apart.kl,
        float(recomputed),
        flops / prefill_flops(model.config, every),
        declined=False,
        rouge_l=rouge,
        top1_sure=apart.sure,
    )


def _rerun(model: Model, prompt: Prompt, true: Truth) -> Outcome:
    ids, kv = prompt.ids, model.room(len(prompt.ids) + CONTINUED)
    half = len(ids) // 2
    model.run(ids, kv, np.arange(half))
    hidden, _ = model.run(ids, kv, np.arange(half, len(ids)))
    first = model.logits(hidden[-1])
    rouge = rouge_l(model, ids, kv, first, true)
    along = follow(model, kv, first, true.told, len(ids))
    judged = _answered(model, kv, first, along, true.told, prompt)
    top1, kl, sure = _apart(true, along)
    return Outcome(*judged, top1, kl, 1.0, 1.0, declined=False, rouge_l=rouge, top1_sure=sure)


def lab_of(model: Model, config: KVShareConfig, prompt: Prompt) -> Lab:
    """A cache that holds what was cached before the prompt."""
    lab = Lab(model, config)
    for ids in prompt.cached:
        lab.add(ids)
    return lab


# ---- the table -------------------------------------------------------------------------------


def row(
    found: list[Outcome], full: list[Truth], copy: list[Outcome], **names: Any
) -> dict[str, Any]:
    """One row of the JSON; intervals are bootstrapped over prompts."""
    right = np.array([o.right for o in found], float)
    best, worst = np.array([t.right for t in full], float), np.array([o.right for o in copy], float)
    gap = best.mean() - worst.mean()
    margin = np.array([[t.margin, c.margin] for t, c in zip(full, copy, strict=True)])
    room = margin[:, 0].mean() - margin[:, 1].mean()
    mine = np.mean([o.margin for o in found])
    rouge = [o.rouge_l for o in found if o.rouge_l is not None]
    sure = [o.top1_sure for o in found if o.top1_sure is not None]
    return {
        **names,
        "n": len(found),
        "accuracy": float(right.mean()),
        "accuracy_full": float(best.mean()),
        "accuracy_copy": float(worst.mean()),
        "regained": float((right.mean() - worst.mean()) / gap) if gap > 0 else None,
        "margin_regained": float((mine - margin[:, 1].mean()) / room) if room > 0 else None,
        "perplexity": float(np.exp(np.mean([o.nll for o in found]))),
        "perplexity_full": float(np.exp(np.mean([t.nll for t in full]))),
        "top1": float(np.mean([o.top1 for o in found])),
        "top1_sure": float(np.mean(sure)) if sure else None,
        "kl": float(np.mean([o.kl for o in found])),
        "rouge_l": float(np.mean(rouge)) if rouge else None,
        "rouge_n": len(rouge),
        "recomputed_share": float(np.mean([o.recomputed for o in found])),
        "computed_share": float(np.mean([o.computed for o in found])),
        "declined": float(np.mean([o.declined for o in found])),
        # of the difference to full prefill, prompt by prompt
        "ci95": _bench.bootstrap_ci95(list(right - best), statistic=np.mean),
    }


def cells(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Task and case of each part of the table. Only what hangs on other text can be steered."""
    return [
        (task, case)
        for task in args.task
        for case in (args.case if task != "text" else ["splice"])
        if case != "adversarial" or task in ("hops", "state")
    ]


@functools.cache
def _loaded(path: Path, dtype: str, device: str) -> tuple[Model, Encoder]:
    return Model(path, dtype=getattr(torch, dtype), device=device), Encoder(path)


def config_of(args: argparse.Namespace) -> KVShareConfig:
    return KVShareConfig(
        select="trace", min_reuse=args.min_reuse, seam=args.seam, window=args.window,
        probe_at=args.probe_at, refresh_every=1, refresh_above=args.refresh_above,
        refresh_rows=args.refresh_rows,
    )  # fmt: skip


def measure(args: argparse.Namespace, task: str, case: str) -> list[dict[str, Any]]:
    """The rows of one task and case."""
    model, encode = _loaded(args.model, args.dtype, args.device)
    config = config_of(args)
    full: list[Truth] = []
    found: dict[tuple[str, float], list[Outcome]] = {}
    size = SIZE._replace(facts=args.facts)
    wanted = prompts(encode, task, case, n=args.n, size=size, max_len=len(model.table))
    for i, prompt in enumerate(wanted):
        lab = lab_of(model, config, prompt)
        splice = case == "splice"
        true = truth(
            model, prompt, continued=CONTINUED if splice else 0, rouge=splice and i < args.rouge
        )
        full.append(true._replace(kv=None, logprobs=None))
        for selector, budget in dict.fromkeys((("copy", 0.0), *args.selector)):
            one = outcome(lab, prompt, true, selector, budget=budget, layer=args.layer, seed=i)
            found.setdefault((selector, budget), []).append(one)
    return [
        row(
            mine, full, found["copy", 0.0],
            task=task, case=case, selector=selector, budget=budget,
        )
        for (selector, budget), mine in found.items()
    ]  # fmt: skip


def _start_worker(threads: int) -> None:
    torch.set_num_threads(threads)


def show(rows: list[dict[str, Any]]) -> str:
    return _bench.columns(
        [{**r, "ratio": r["perplexity"] / r["perplexity_full"]} for r in rows],
        task="{task}",
        case="{case}",
        selector="{selector}",
        budget="{budget:.2f}",
        n="{n}",
        accuracy="{accuracy:.3f}",
        full="{accuracy_full:.3f}",
        copy="{accuracy_copy:.3f}",
        top1="{top1:.3f}",
        KL="{kl:.4f}",
        recomputed="{recomputed_share:.1%}",
        computed="{computed_share:.1%}",
        declined="{declined:.1%}",
        perplexity="{ratio:.4f}",
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", type=Path, default=_models.READER, metavar="DIR", help="default: the reader")
    add("--task", nargs="+", choices=(*tasks.TASKS, "text"), default=(*tasks.TASKS, "text"))
    add("--case", nargs="+", choices=CASES, default=CASES)
    add("--selector", nargs="+", default=ALL, metavar="NAME[=BUDGET]", help="of " + ", ".join(ALL))
    add("--budget", nargs="+", type=float, default=[0.12], help="for those that name none")
    add("--layer", type=int, default=1, help="the check layer")
    add("--n", type=int, default=500, help="prompts of each case")
    add("--rouge", type=int, default=0, help="of the splices: how many to continue for ROUGE-L")
    add("--facts", type=int, default=60, help="sentences in a prompt")
    add("--min-reuse", type=int, default=32, help="--kvshare-min-reuse")
    add("--seam", type=int, default=16, help="--kvshare-seam")
    add("--window", type=int, default=16, help="--kvshare-window")
    add("--probe-at", type=float, default=0.25, help="--kvshare-probe-at")
    add("--refresh-rows", type=int, default=24, help="--kvshare-refresh-rows")
    add("--refresh-above", type=float, default=0.2, help="--kvshare-refresh-above")
    add("--workers", type=int, default=1, help="cases measured side by side")
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--json", type=Path, metavar="OUT", help="where the result goes")
    add("--plot", type=Path, metavar="OUT.png", help="where a page of plots goes")
    args = parser.parse_args()
    _models.check_directory(parser, args.model)
    chosen = []
    for text in args.selector:
        name, _, budget = text.partition("=")
        if name not in ALL:
            parser.error(f"--selector must be one of {', '.join(ALL)}, got {name!r}")
        one = [0.0] if name in ("copy", "full") else args.budget
        try:
            chosen += [(name, b) for b in ([float(budget)] if budget else one)]
        except ValueError:
            parser.error(f"the budget of --selector {name} must be a number, got {budget!r}")
    args.selector = chosen
    if not all(0 <= b <= 1 for _, b in chosen):
        parser.error(f"budgets must be in [0, 1], got {', '.join(str(b) for _, b in chosen)}")
    return args


def main() -> int:
    args = parse()
    layers = len(_loaded(args.model, args.dtype, args.device)[0].layers)
    if not 0 <= args.layer < layers:
        raise SystemExit(f"error: --layer must be in [0, {layers}), got {args.layer}")
    env = _bench.environment(**_bench.settings(args))
    rows: list[dict[str, Any]] = []
    todo = cells(args)
    threads = max(1, _bench.cores() // args.workers)
    context = multiprocessing.get_context("spawn")
    with (
        _bench.Progress(len(todo), unit=" cases") as bar,
        concurrent.futures.ProcessPoolExecutor(
            args.workers, context, initializer=_start_worker, initargs=(threads,)
        ) as pool,
    ):
        jobs = {pool.submit(measure, args, *cell): cell for cell in todo}
        for job in concurrent.futures.as_completed(jobs):
            try:
                rows += job.result()
            except NoPrompt as none:
                print(f"note: left out: {none}", file=sys.stderr)
            rows.sort(key=lambda r: todo.index((r["task"], r["case"])))
            bar.say(", ".join(jobs[job]))
            bar.update()
            if args.json:  # as far as it got, so that nothing is lost on the way
                _bench.write_json(args.json, {"rows": rows, "decode": [], "stream": [], "env": env})
    if not rows:
        raise SystemExit("error: no prompt of any task and case that was asked for")
    print(show(rows))
    if args.json:
        print(f"numbers: {args.json}")
    if args.plot:
        import _quality_plot

        _quality_plot.draw(rows, args.plot)
        print(f"plot: {args.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
