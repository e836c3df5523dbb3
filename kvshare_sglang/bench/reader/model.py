"""What the reader is: its shape, how it starts, and how it gets more layers on the way."""

import math
from typing import Any

import torch

VOCAB = 1536
MAX_LEN = 2048  # positions; lessons reach the length of the last level
SHAPE: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 320, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "rope_theta": 10000.0,
    "max_position_embeddings": MAX_LEN, "tie_word_embeddings": True, "vocab_size": VOCAB,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
FINAL_NORM = 0.03  # its weights at first: the embeddings are large, and read again as outputs
LAYERS_FIRST, LAYERS = 6, 12  # it starts shallow, which costs half, and is deepened on the way


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
    write what they see into a subspace of its own; the heads after them look for their own token in
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
    """The same function with more layers: after an old one its copy, which adds nothing yet."""
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
