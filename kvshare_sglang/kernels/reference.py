"""The plain definition of every op here, in fp64, one position at a time. Runs on CPU; slow.

Every implementation is compared with these, never with another implementation.
"""

import torch


def rotate(x: torch.Tensor, angle: torch.Tensor, *, is_neox: bool) -> torch.Tensor:
    """Rotate the pairs of one head vector ``x`` [rotary_dim] by ``angle`` [rotary_dim / 2], rad.

    The pairs are (i, i + rotary_dim/2) in the neox layout and (2i, 2i + 1) in gpt-j's.
    """
    out = x.double().clone()
    half = len(x) // 2
    for i in range(half):
        a, b = (i, i + half) if is_neox else (2 * i, 2 * i + 1)
        cos, sin = angle[i].double().cos(), angle[i].double().sin()
        out[a] = x[a].double() * cos - x[b].double() * sin
        out[b] = x[b].double() * cos + x[a].double() * sin
    return out


def rotate_keys(
    keys: torch.Tensor,
    shifts: torch.Tensor,
    inv_freq: torch.Tensor,
    *,
    is_neox: bool,
) -> torch.Tensor:
    """K of position p, moved to position p + shift. ``keys`` [n, heads, dim], ``shifts`` [n].

    RoPE at position p multiplies each pair by e^(i p f); so moving by s multiplies by e^(i s f)
    (Su et al., arXiv 2104.09864). Dimensions past ``2 * len(inv_freq)`` carry no position.
    """
    out = keys.double().clone()
    rotary_dim = 2 * len(inv_freq)
    for n in range(keys.shape[0]):
        for h in range(keys.shape[1]):
            angle = shifts[n].double() * inv_freq.double()
            out[n, h, :rotary_dim] = rotate(keys[n, h, :rotary_dim], angle, is_neox=is_neox)
    return out


def partial_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    *,
    scaling: float,
) -> torch.Tensor:
    """Causal attention of some rows of one request over its whole KV.

    ``q`` [rows, q_heads, dim] is at ``positions`` [rows]; ``k``, ``v`` [kv_len, kv_heads,
    dim] at 0, 1, ...; row r sees every key at or before its own position. Returns [rows,
    q_heads, dim] in fp64.
    """
    out = torch.zeros(q.shape[0], q.shape[1], v.shape[2], dtype=torch.float64)
    group = q.shape[1] // k.shape[1]
    for r in range(q.shape[0]):
        seen = int(positions[r]) + 1
        for h in range(q.shape[1]):
            scores = k[:seen, h // group].double() @ q[r, h].double() * scaling
            out[r, h] = torch.softmax(scores, dim=0) @ v[:seen, h // group].double()
    return out


def deviation(fresh: torch.Tensor, cached: torch.Tensor) -> torch.Tensor:
    """``|fresh - cached| / |fresh|`` of each row [n, heads, dim]; fp64 [n], 0 for rows of zeros."""
    out = torch.zeros(len(fresh), dtype=torch.float64)
    for n in range(len(fresh)):
        size = float(fresh[n].double().square().sum()) ** 0.5
        apart = float((fresh[n].double() - cached[n].double()).square().sum()) ** 0.5
        out[n] = apart / size if size else 0.0
    return out


def attention_mass(
    q: torch.Tensor,
    positions: torch.Tensor,
    keys: torch.Tensor,
    *,
    scaling: float,
    strongest_head: bool = False,
) -> torch.Tensor:
    """What rows ``q`` [rows, q_heads, dim] at ``positions`` [rows] give to each of ``keys`` [kv,
    kv_heads, dim] at 0, 1, ...: mean over rows; over heads the mean, or the largest. fp64 [kv].
    """
    out = torch.zeros(len(keys), dtype=torch.float64)
    group = q.shape[1] // keys.shape[1]
    for r in range(len(q)):
        seen = int(positions[r]) + 1
        weights = torch.stack(
            [
                torch.softmax(keys[:seen, h // group].double() @ q[r, h].double() * scaling, dim=0)
                for h in range(q.shape[1])
            ]
        )
        out[:seen] += weights.amax(0) if strongest_head else weights.mean(0)
    return out / len(q)


def attention_profile(
    q: torch.Tensor,
    positions: torch.Tensor,
    keys: torch.Tensor,
    edges: torch.Tensor,
    *,
    scaling: float,
) -> torch.Tensor:
    """What each row gives to keys at least ``edges`` [n] behind it, but for the first key: mean
    over heads. fp64 [rows, n]."""
    out = torch.zeros(len(q), len(edges), dtype=torch.float64)
    for r in range(len(q)):
        one = slice(r, r + 1)
        mass = attention_mass(q[one], positions[one], keys, scaling=scaling)
        for i, edge in enumerate(edges.tolist()):
            out[r, i] = mass[1 : max(int(positions[r]) - edge + 1, 1)].sum()
    return out
