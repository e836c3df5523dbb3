"""FLOPs of a dense Llama's prefill, by the rows that run in each layer. Pure."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def prefill_flops(config: dict[str, Any], positions: Sequence[int] | np.ndarray) -> float:
    """FLOPs of a dense Llama's prefill of the rows at ``positions``; logits for the last alone."""
    layer = [layer_flops(config, positions)] * config["num_hidden_layers"]
    return sum(layer) + logit_flops(config)


def logit_flops(config: dict[str, Any]) -> float:
    """FLOPs of the logits of one row."""
    return 2.0 * int(config["hidden_size"]) * int(config["vocab_size"])


def layer_flops(config: dict[str, Any], positions: Sequence[int] | np.ndarray) -> float:
    """FLOPs of one layer for the rows at ``positions``."""
    hidden, heads, kv_heads, head_dim = _shape(config)
    at = np.asarray(positions, float)
    attention_weights = hidden * head_dim * (2 * heads + 2 * kv_heads)
    mlp_weights = 3 * hidden * int(config["intermediate_size"])
    linear = 2.0 * (attention_weights + mlp_weights) * len(at)
    attention = 4.0 * heads * head_dim * float((at + 1).sum())
    return linear + attention


def checked_flops(
    config: dict[str, Any], by_layer: Sequence[np.ndarray], *, checked: int, at_layer: int
) -> float:
    """FLOPs of a prefill whose rows differ by layer; ``checked`` rows were projected to Q, K and V
    in layer ``at_layer``."""
    hidden, heads, kv_heads, head_dim = _shape(config)
    extra = max(0, checked - len(by_layer[at_layer]))
    qkv = 2.0 * extra * hidden * head_dim * (heads + 2 * kv_heads)
    layers = sum(layer_flops(config, rows) for rows in by_layer)
    return layers + qkv + logit_flops(config)


def peeked_flops(config: dict[str, Any], rows: np.ndarray, *, at_layer: int) -> float:
    """FLOPs of a pass of ``rows`` up to their Q, K and V in layer ``at_layer``."""
    hidden, heads, kv_heads, head_dim = _shape(config)
    qkv = 2.0 * len(rows) * hidden * head_dim * (heads + 2 * kv_heads)
    return at_layer * layer_flops(config, rows) + qkv


def _shape(config: dict[str, Any]) -> tuple[int, int, int, int]:
    """Hidden size, query heads, KV heads and the size of a head."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    return hidden, heads, kv_heads, config.get("head_dim") or hidden // heads
