"""How far copied K or V is from what the model computes, and who looks at it. Torch."""

import torch


def deviation(fresh: torch.Tensor, cached: torch.Tensor) -> torch.Tensor:
    """``|fresh - cached| / |fresh|`` of each row, fp32 [n]; both are [n, heads, dim].

    KVShare's measure of what reuse got wrong in a row (arXiv 2503.16525, section 4).
    """
    if fresh.shape != cached.shape:
        raise ValueError(f"shapes differ: {tuple(fresh.shape)} and {tuple(cached.shape)}")
    fresh, cached = fresh.float().flatten(1), cached.float().flatten(1)
    return (fresh - cached).norm(dim=1) / fresh.norm(dim=1).clamp_min(1e-12)


_AT_ONCE = 1 << 23  # attention weights in memory at a time, fp32
_ROWS = 128  # of a profile at a time: they look at keys up to the last of them


def attention_mass(
    q: torch.Tensor,
    positions: torch.Tensor,
    keys: torch.Tensor,
    *,
    scaling: float,
    strongest_head: bool = False,
) -> torch.Tensor:
    """Mean weight that rows ``q`` [m, q_heads, dim] at ``positions`` [m] give to each key.

    ``keys`` [kv, kv_heads, dim] are at positions 0 to kv - 1; a row sees keys up to its own.
    Mean over heads too, or the weight of the head that gives most. fp32 [kv]; bounded memory.
    """
    m = len(q)
    mass = torch.zeros(len(keys), device=q.device)
    by_head = keys.permute(1, 2, 0).to(q.dtype)  # [kv_heads, dim, kv]
    size = max(1, _AT_ONCE // (q.shape[1] * len(keys)))
    for first in range(0, m, size):
        part = slice(first, first + size)
        weights = _weights(q[part], positions[part], by_head, scaling=scaling)
        over = weights.amax((0, 1)) if strongest_head else weights.mean((0, 1))
        mass += over.sum(0)
    return mass / m


def _weights(
    q: torch.Tensor, positions: torch.Tensor, by_head: torch.Tensor, *, scaling: float
) -> torch.Tensor:
    """Attention of rows ``q`` [n, q_heads, dim] to the first keys, ``by_head`` [kv_heads, dim, kv]:
    fp32 [kv_heads, q_heads / kv_heads, n, kv]."""
    num, (kv_heads, _, kv) = len(q), by_head.shape
    # Scaled before the product, which may be in fp16; heads that share keys are stacked as rows, so
    # that no key is repeated in memory.
    rows = (q * scaling).reshape(num, kv_heads, -1, q.shape[-1]).permute(1, 2, 0, 3).flatten(1, 2)
    weights = torch.bmm(rows, by_head).float().view(kv_heads, -1, num, kv)
    hidden = torch.arange(kv, device=q.device)[None] > positions[:, None]
    return weights.masked_fill_(hidden, float("-inf")).softmax(dim=-1)


def attention_profile(
    q: torch.Tensor,
    positions: torch.Tensor,
    keys: torch.Tensor,
    edges: torch.Tensor,
    *,
    scaling: float,
) -> torch.Tensor:
    """What each of the rows ``q`` [m, q_heads, dim] at ``positions`` [m] gives to the keys at
    least ``edges`` [n] tokens behind it, the first one left out; mean over heads, fp32 [m, n].

    ``keys`` [kv, kv_heads, dim] are at positions 0 to kv - 1; a row, of which positions ascend,
    sees keys up to its own. O(m * kv * heads), in bounded memory.
    """
    by_head = keys.permute(1, 2, 0).to(q.dtype)
    out = torch.empty((len(q), len(edges)), device=q.device)
    size = max(1, min(_AT_ONCE // (q.shape[1] * len(keys)), _ROWS))
    for first in range(0, len(q), size):
        part = slice(first, first + size)
        here = positions[part]
        seen = by_head[..., : int(here[-1]) + 1]  # of keys behind the last row none is looked at
        mean = _weights(q[part], here, seen, scaling=scaling).mean((0, 1))
        mean[:, 0] = 0.0
        last = here[:, None] - edges[None]
        out[part] = mean.cumsum(-1).gather(1, last.clamp_min(0)) * (last >= 0)
    return out
