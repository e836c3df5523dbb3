"""What one prompt gives under one selector, held against full prefill of the same prompt.

Answers are those of greedy decoding; agreement and KL are taken along full prefill's own
continuation. A prompt that reuse declines is served in full.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from rapidfuzz.distance import LCSseq

from kvshare_sglang.bench.quality.cases import Prompt
from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.plan import ReusePlan
from kvshare_sglang.policy.select.attention_trace import probe_layer
from kvshare_sglang.policy.select.base import Sees
from kvshare_sglang.radix_fuzzy.fingerprints import Tokens
from kvshare_sglang.sim.engine import KV, Lab, Model, Partial
from kvshare_sglang.sim.flops import checked_flops, peeked_flops, prefill_flops

WRITTEN = 64  # tokens of a greedy continuation that ROUGE-L compares
CONTINUED = 32  # tokens of full prefill's continuation along which agreement is measured


class Truth(NamedTuple):
    """Full prefill of a prompt; once its outcomes are known, without KV and log-probabilities."""

    kv: KV | None
    right: bool
    margin: float
    nll: float  # of the answer, a token
    told: np.ndarray  # the prompt and full prefill's own continuation
    written: np.ndarray | None  # a longer one, for ROUGE-L
    logprobs: torch.Tensor | None  # [continued, vocab], along it


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


class Apart(NamedTuple):
    """Top-1 agreement with full prefill along its continuation, KL from it (mean and most of a
    token), and the agreement where full prefill gives its token at least one half."""

    top1: float
    kl: float
    kl_most: float
    sure: float | None


def lab_of(model: Model, config: KVShareConfig, prompt: Prompt) -> Lab:
    """A cache that holds what was cached before the prompt."""
    lab = Lab(model, config)
    for ids in prompt.cached:
        lab.add(ids)
    return lab


def truth(model: Model, prompt: Prompt, *, continued: int, rouge: bool = False) -> Truth:
    """``continued``: tokens of its own continuation along which others are compared with it."""
    first, kv = model.full(prompt.ids)
    written = model.greedy(prompt.ids, first, kv, WRITTEN) if rouge else None
    told = model.greedy(prompt.ids, first, kv, max(1, continued))
    along = follow(model, kv, first, told, len(prompt.ids))
    return Truth(kv, *_answered(model, kv, first, along, told, prompt), told, written, along)


def outcome(
    lab: Lab, prompt: Prompt, true: Truth, selector: str, *, budget: float, layer: int, seed: int
) -> Outcome:
    """``layer``: the check layer of those selectors that see scores."""
    # The default server's plan says for all selectors which runs there are to choose from, and
    # which prompts are declined: so all shares are of the same rows.
    plan = lab.plan(prompt.ids)
    if not plan.copies or selector == "full":
        return Outcome(
            true.right, true.margin, true.nll, 1.0, 0.0, 1.0, 1.0, not plan.copies,
            rouge_l=None if true.written is None else 1.0,
            top1_sure=_apart(true, true.logprobs).sure,
        )  # fmt: skip
    if selector == "rerun":
        first, kv = in_two_chunks(lab.model, prompt.ids, room=CONTINUED)
        along = follow(lab.model, kv, first, true.told, len(prompt.ids))
        return _outcome(lab.model, prompt, true, first, kv, along, 1.0, 1.0)
    refreshing = selector == "trace+refresh"
    name = selector.removesuffix("+refresh")
    done = lab.prefill(
        prompt.ids, plan, name, budget=budget, check_layer=layer, seed=seed, truth=true.kv,
        room=CONTINUED,
    )  # fmt: skip
    if refreshing:
        rest, _ = lab.decode(true.told[:-1], len(prompt.ids), done, every=lab.config.refresh_every)
        along = torch.cat([done.logits[None], rest]).log_softmax(-1)
    else:
        along = follow(lab.model, done.kv, done.logits, true.told, len(prompt.ids))
    spent = shares(lab, plan, done, name, layer=layer)
    return _outcome(
        lab.model, prompt, true, done.logits, done.kv, along, *spent, rouge=not refreshing
    )


def in_two_chunks(model: Model, ids: Tokens, *, room: int) -> tuple[torch.Tensor, KV]:
    """Full prefill whose sums are made in another order: the noise floor. KV has ``room`` after
    the prompt."""
    kv = model.room(len(ids) + room)
    half = len(ids) // 2
    model.run(ids, kv, np.arange(half))
    hidden, _ = model.run(ids, kv, np.arange(half, len(ids)))
    return model.logits(hidden[-1]), kv


def _outcome(
    model: Model, prompt: Prompt, true: Truth, first: torch.Tensor, kv: KV, along: torch.Tensor,
    recomputed: float, computed: float, *, rouge: bool = True,
) -> Outcome:  # fmt: skip
    written = _rouge_l(model, prompt.ids, kv, first, true) if rouge else None
    judged = _answered(model, kv, first, along, true.told, prompt)
    far = _apart(true, along)
    return Outcome(
        *judged, far.top1, far.kl, recomputed, computed, declined=False, rouge_l=written,
        top1_sure=far.sure,
    )  # fmt: skip


def shares(
    lab: Lab, plan: ReusePlan, done: Partial, selector: str, *, layer: int
) -> tuple[float, float]:
    """Of the reused rows those that ran, mean over layers, probes included; and the FLOPs as a
    share of full prefill's."""
    config = lab.model.config
    sees = lab.selector(selector).sees if selector != "oracle" else Sees.NOTHING  # it was told
    reused = plan.reused_rows.positions
    probe = probe_layer(len(lab.model.layers), lab.config.probe_at)
    if selector == "prophetkv":
        sees, probe = Sees.NOTHING, len(lab.model.layers) - 1  # it looks at all of them
    counts = [np.isin(reused, rows).sum() for rows in done.rows]
    counts += [np.isin(reused, rows).sum() * probe for rows in done.probed]
    every = np.arange(plan.prefix_len, plan.prompt_len)
    checked = len(every) if sees is Sees.SCORES else 0
    flops = checked_flops(config, done.rows, checked=checked, at_layer=layer)
    flops += sum(peeked_flops(config, rows, at_layer=probe) for rows in done.probed)
    recomputed = sum(counts) / len(reused) / len(done.rows)
    return float(recomputed), flops / prefill_flops(config, every)


# ---- what is compared ------------------------------------------------------------------------


def judge(logprobs: torch.Tensor, answer: np.ndarray) -> tuple[bool, float, float]:
    """Whether greedy decoding writes the answer; the smallest margin by which each of its tokens
    leads (or trails) the best other one, in nats; and the answer's mean negative log-likelihood a
    token. ``logprobs`` are those along the answer."""
    target = torch.as_tensor(answer, device=logprobs.device).long()[:, None]
    mine = logprobs[: len(answer)].gather(1, target)[:, 0]
    best = logprobs[: len(answer)].scatter(1, target, float("-inf")).amax(1)
    return bool((mine > best).all()), float((mine - best).min()), float(-mine.mean())


def apart(true: torch.Tensor, along: torch.Tensor) -> Apart:
    """How far ``along`` is from full prefill's log-probabilities ``true``, both [n, vocab]."""
    best, token = true.max(-1)
    agree = (along.argmax(-1) == token).float()
    kl = (true.exp() * (true - along)).sum(-1)
    sure = agree[best > math.log(0.5)]
    return Apart(
        float(agree.mean()), float(kl.mean()), float(kl.max()),
        float(sure.mean()) if len(sure) else None,
    )  # fmt: skip


def follow(model: Model, kv: KV, first: torch.Tensor, told: np.ndarray, known: int) -> torch.Tensor:
    """Log-probabilities along ``told[known:]``, the first of them from ``first``."""
    rest = model.go_on(kv, told[:-1], known=known) if len(told) > known + 1 else first[:0]
    return torch.cat([first[None], rest]).log_softmax(-1)


def _answered(
    model: Model, kv: KV, first: torch.Tensor, along: torch.Tensor, told: np.ndarray, prompt: Prompt
) -> tuple[bool, float, float]:
    """As ``judge``; where full prefill's continuation starts with the answer, nothing is run."""
    known, answer = len(prompt.ids), prompt.answer
    if not np.array_equal(told[known : known + len(answer)], answer):
        along = follow(model, kv, first, np.concatenate([prompt.ids, answer]), known)
    return judge(along, answer)


def _apart(true: Truth, along: torch.Tensor) -> Apart:
    assert true.logprobs is not None
    return apart(true.logprobs, along)


def _rouge_l(
    model: Model, ids: np.ndarray, kv: KV, first: torch.Tensor, true: Truth
) -> float | None:
    """F1 of the longest common token subsequence (Lin 2004) of two continuations, equally long."""
    if true.written is None:
        return None
    mine = model.greedy(ids, first, kv, WRITTEN)[len(ids) :]
    return LCSseq.similarity(mine.tolist(), true.written[len(ids) :].tolist()) / WRITTEN
