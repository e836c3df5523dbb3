"""How the weights change: Muon for matrices, AdamW for the rest, on fp32 masters."""

import math
from typing import Any

import torch

# of the full rate, by the size that these weights have
RATES = {"model.embed_tokens.weight": 3.0, "model.norm.weight": 0.1}


@torch.no_grad()
def orthogonal(g: torch.Tensor) -> torch.Tensor:
    """Each matrix of a stack with its singular values near 1, by Newton and Schulz."""
    x = g.bfloat16()
    x = x / (x.float().norm(dim=(1, 2), keepdim=True) + 1e-7).bfloat16()
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + torch.baddbmm(a, a, a, beta=-4.775, alpha=2.0315) @ x
    return x.float()


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
