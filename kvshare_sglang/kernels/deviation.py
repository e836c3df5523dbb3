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


def attention_paid(
    q: torch.Tensor, positions: torch.Tensor, keys: torch.Tensor, *, scaling: float
) -> torch.Tensor:
    """Mean weight that rows ``q`` [m, q_heads, dim] at ``positions`` [m] give to each key.

    ``keys`` [kv, kv_heads, dim] stand at positions 0 to kv - 1; a row sees keys up to its own.
    fp32 [kv]; O(m x kv x group) memory.
    """
    m, kv_heads = len(q), keys.shape[1]
    group = q.shape[1] // kv_heads
    rows = q.view(m, kv_heads, group, -1)
    hidden = torch.arange(len(keys), device=q.device)[None] > positions[:, None]
    paid = torch.zeros(len(keys), device=q.device)
    for head in range(kv_heads):
        weights = torch.matmul(rows[:, head].float(), keys[:, head].float().T).mul_(scaling)
        weights.masked_fill_(hidden[:, None], float("-inf"))  # [m, group, kv]
        paid += weights.softmax(dim=-1).sum(dim=(0, 1))
    return paid / (m * q.shape[1])
