"""A Llama in a GGUF file as a Hugging Face directory that SGLang and transformers read.

Written here and not left to transformers: its reader needs ``accelerate``, which nothing else of
the project does, and its tokenizer splits digits off only where the merges happen to.
Weights are kept in bfloat16. SGLang's ``--dtype auto`` turns float32 directories into float16,
which a CPU is slow at, and in float32 or bfloat16 a server then holds the same numbers.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

SPECIAL = 3  # token_type of a control token in GGUF
PRE_TOKENIZERS = ("smollm",)  # digits one by one, then GPT-2's byte-level pieces

# GGUF's name of a tensor, and ours; {} is the number of the layer
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


class ConvertError(ValueError):
    """A GGUF file that is not what is converted here."""


def convert(file: Path, out: Path, *, say: Callable[[str], None] = lambda text: None) -> None:
    """Write config, tokenizer and weights of ``file`` into the directory ``out``.

    Raises ConvertError on another architecture, another tokenizer, or a tensor without a name.
    """
    from gguf import GGUFReader

    reader = GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if (kind := fields["general.architecture"]) != "llama":
        raise ConvertError(f"general.architecture must be llama, got {kind!r}")
    if (pre := fields.get("tokenizer.ggml.pre")) not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise ConvertError(f"tokenizer.ggml.pre must be one of {known}, got {pre!r}")
    tied = all(t.name != "output.weight" for t in reader.tensors)
    config = config_of(fields, tied=tied)
    _save_weights(reader, config, out, say)
    _save_tokenizer(fields, out)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    ends = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (out / "generation_config.json").write_text(json.dumps(ends, indent=2) + "\n")


def config_of(fields: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    """The ``config.json`` of a Llama with these GGUF fields."""
    heads = int(fields["llama.attention.head_count"])
    hidden = int(fields["llama.embedding_length"])
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": int(fields["llama.feed_forward_length"]),
        "num_hidden_layers": int(fields["llama.block_count"]),
        "num_attention_heads": heads,
        "num_key_value_heads": int(fields.get("llama.attention.head_count_kv", heads)),
        "head_dim": hidden // heads,
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "max_position_embeddings": int(fields["llama.context_length"]),
        "rope_theta": float(fields.get("llama.rope.freq_base", 10000.0)),
        # a float32 in the file; its shortest spelling is what was meant
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "tie_word_embeddings": tied,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": int(fields["tokenizer.ggml.bos_token_id"]),
        "eos_token_id": int(fields["tokenizer.ggml.eos_token_id"]),
        "pad_token_id": int(fields["tokenizer.ggml.padding_token_id"]),
        "torch_dtype": "bfloat16",
    }


def name_of(tensor: str) -> str:
    """Hugging Face's name of a GGUF tensor.

    >>> name_of("blk.3.attn_q.weight")
    'model.layers.3.self_attn.q_proj.weight'
    """
    match tensor.split("."):
        case ["blk", layer, part, "weight"] if part in _LAYER:
            return f"model.layers.{layer}.{_LAYER[part]}.weight"
        case _ if tensor in _WHOLE:
            return _WHOLE[tensor]
    raise ConvertError(f"{tensor!r} is no tensor of a Llama")


def halves(weight: Any, heads: int) -> Any:
    """The rows of a Q or K projection as Hugging Face orders them: of each head, first all real
    parts of the rotated pairs and then all imaginary ones. GGUF holds pair by pair."""
    pairs = weight.reshape(heads, -1, 2, weight.shape[-1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _save_weights(
    reader: Any, config: dict[str, Any], out: Path, say: Callable[[str], None]
) -> None:
    import numpy as np
    import torch
    from gguf import dequantize
    from safetensors.torch import save_file

    turned = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
    weights = {}
    for i, tensor in enumerate(reader.tensors):
        values = dequantize(tensor.data, tensor.tensor_type)
        for part, heads in turned.items():
            if tensor.name.endswith(f".{part}.weight"):
                values = halves(values, config[heads])
        values = np.ascontiguousarray(values, np.float32)
        weights[name_of(tensor.name)] = torch.tensor(values).bfloat16()
        if i % 60 == 59 or i + 1 == len(reader.tensors):
            say(f"{i + 1} of {len(reader.tensors)} tensors")
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # safetensors lets nobody else read it


def _save_tokenizer(fields: dict[str, Any], out: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    bpe = Tokenizer(models.BPE({text: i for i, text in enumerate(tokens)}, merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    types = fields["tokenizer.ggml.token_type"]
    bpe.add_special_tokens(
        [
            AddedToken(text, normalized=False, special=True)
            for text, kind in zip(tokens, types, strict=True)
            if kind == SPECIAL
        ]
    )
    named = {
        f"{role}_token": tokens[fields[f"tokenizer.ggml.{key}_token_id"]]
        for role, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items()
    }
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        model_max_length=int(fields["llama.context_length"]),
        clean_up_tokenization_spaces=False,
        **named,
    )
    fast.chat_template = fields["tokenizer.chat_template"]
    fast.save_pretrained(out)
