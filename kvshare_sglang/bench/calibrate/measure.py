"""One prompt under full prefill, under copies alone, and under traces that look at each layer."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch

from kvshare_sglang.bench.calibrate.prompts import Prompt
from kvshare_sglang.bench.quality.outcomes import follow, shares
from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.policy.select.attention_trace import probe_layer
from kvshare_sglang.runtime import felt
from kvshare_sglang.sim.engine import Lab, Model, Partial

CONTINUED = 8  # tokens of full prefill's answer along which arms are compared
LAYER = 1  # no selector here has a check layer
STRETCHES = (0, KVShareConfig().stretch)


class Candidate(NamedTuple):
    """What is chosen: ``--kvshare-probe-at``, ``--kvshare-stretch``, ``--kvshare-budget`` and
    ``--kvshare-depends-at``. Those of one budget order by cost."""

    probe_at: float
    stretch: int
    budget: float = KVShareConfig().budget
    depends_at: float = 0.0

    def layer(self, layers: int) -> int:
        return probe_layer(layers, self.probe_at)


def candidates(model: Model, depths: Sequence[float]) -> list[Candidate]:
    """Each layer once, by the first depth that names it, with each stretch."""
    layers = {probe_layer(len(model.layers), depth): depth for depth in reversed(depths)}
    return [Candidate(layers[layer], s) for layer in sorted(layers) for s in STRETCHES]


class Measured(NamedTuple):
    """One prompt under one arm: KL to full prefill along its answer and of its first token, whether
    the first token is the same (0 or 1), the FLOPs as a share of full prefill's, by how many
    nats the margin between full prefill's two likeliest tokens moves (root mean square), and by
    what share the end of the prompt moved from where copies leave it (``runtime/felt.py``)."""

    kl: float
    kl_first: float
    agree: float
    computed: float
    noise: float = 0.0
    shift: float = 0.0


Row = dict[Candidate | None, Measured]  # by arm; None: copies alone


def measure(model: Model, prompt: Prompt, among: Sequence[Candidate]) -> Row | None:
    """What each arm gives; None where nothing is reused. All look at the sources alike."""
    (depends_at,) = {one.depends_at for one in among}
    config = KVShareConfig(select="trace", depends_at=depends_at)
    lab = Lab(model, config)
    for ids in prompt.cached:
        lab.add(ids)
    known = len(prompt.ids)
    first, kv = model.full(prompt.ids)
    told = model.greedy(prompt.ids, first, kv, CONTINUED)
    true = follow(model, model.widened(kv, len(told), known=known), first, told, known)

    likeliest = true.topk(2).indices

    def margins(logprobs: torch.Tensor) -> torch.Tensor:
        two = logprobs.gather(-1, likeliest)
        return two[:, 0] - two[:, 1]

    def moved(done: Partial, probe: int) -> float:
        layer = felt.layer_of(len(model.layers), probe)
        ends = (slice(known - felt.LAST, known), slice(None), slice(None))
        return felt.shift_of(done.kv.v[layer][ends], copied.kv.v[layer][ends])

    def judged(done: Partial, selector: str, shift: float = 0.0) -> Measured:
        along = follow(model, done.kv, done.logits, told, known)
        kl = (true.exp() * (true - along)).sum(-1)
        _, computed = shares(lab, plan, done, selector, layer=LAYER)
        agrees = float(along[0].argmax() == true[0].argmax())
        noise = float((margins(along) - margins(true)).square().mean().sqrt())
        return Measured(float(kl.mean()), float(kl[0]), agrees, computed, noise, shift)

    plan = lab.plan(prompt.ids)
    if not plan.copies:
        return None
    with torch.no_grad():
        copied = lab.prefill(prompt.ids, plan, "copy", budget=0.0, room=CONTINUED)
        row: Row = {None: judged(copied, "copy")}
        for one in among:
            lab.config = dataclasses.replace(config, **one._asdict())
            done = lab.prefill(prompt.ids, plan, "trace", budget=one.budget, room=CONTINUED)
            row[one] = judged(done, "trace", moved(done, one.layer(len(model.layers))))
    return row
