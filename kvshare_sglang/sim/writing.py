"""Answers written token by token over KV: several side by side, or one with refresh on the way."""

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from kvshare_sglang.policy.refresh import Watch
from kvshare_sglang.radix_fuzzy.fingerprints import Tokens
from kvshare_sglang.sim.engine import KV, Lab, Model, Partial


@torch.no_grad()
def side_by_side(
    model: Model, firsts: Sequence[torch.Tensor], kvs: Sequence[KV], lens: Sequence[int],
    count: int, *, stop: int | None = None,
) -> list[list[int]]:  # fmt: skip
    """Up to ``count`` greedy tokens after each of some prompts, given the logits of its last token,
    its KV and its length. At one token a step the weights are read once for all of them. Each ends
    with its first ``stop``."""
    wide = [model.widened(kv, max(lens) + count, known=n) for kv, n in zip(kvs, lens, strict=True)]
    keys, values = (torch.stack(part, dim=1) for part in zip(*wide, strict=True))
    each = torch.arange(len(lens), device=model.device)
    places = torch.arange(keys.shape[2], device=model.device)
    at = torch.as_tensor(lens, device=model.device)
    token = torch.stack(list(firsts)).argmax(-1)
    out = [[int(t)] for t in token]
    for _ in range(count - 1):
        if stop is not None and all(stop in one for one in out):
            break
        x = model.embed(token)
        visible = (places <= at[:, None])[:, None, None]
        for i, layer in enumerate(model.layers):
            q, k, v = model.qkv(layer, x, at)
            keys[i, each, at], values[i, each, at] = k, v
            seen = scaled_dot_product_attention(
                q[:, :, None], keys[i].transpose(1, 2), values[i].transpose(1, 2),
                attn_mask=visible, scale=model.scaling, enable_gqa=True,
            )  # fmt: skip
            x = model.after_attention(layer, x, seen[:, :, 0])
        token = model.logits(model.norm(x)).argmax(-1)
        at = at + 1
        for one, t in zip(out, token, strict=True):
            one.append(int(t))
    return [one[: one.index(stop) + 1] if stop in one else one for one in out]


def refreshing(
    lab: Lab, ids: Tokens, done: Partial, count: int, *, every: int, stop: int
) -> tuple[list[int], int]:
    """Up to ``count`` greedy tokens after a prompt that was prefilled with reuse, the first
    ``stop`` included, and how many rows were refreshed. As ``Lab.decode``, which is told the
    tokens."""
    known = len(ids)
    ids = np.concatenate([ids, np.zeros(count, ids.dtype)])
    kv = lab.model.widened(done.kv, len(ids), known=known)
    watch, logits, refreshed = Watch.of_plan(done.plan), done.logits, 0
    for n in range(known, len(ids)):
        ids[n] = int(logits.argmax())
        if ids[n] == stop or n + 1 == len(ids):
            break
        logits, more = lab.step(ids, kv, watch, n, every=every)
        refreshed += more
    return ids[known : n + 1].tolist(), refreshed
