"""Small random models of every served architecture, made on the spot from a seed."""

from pathlib import Path
from typing import Any

VOCAB = 997
EOS = 1

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
    # Wide enough that attention, not the residual alone, decides the next token.
    "initializer_range": 0.15,
}

_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 2048,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}


def make_model(folder: Path, name: str, *, seed: int = 0) -> Path:
    """Write the model ``name`` under ``folder`` (once) and return its directory."""
    import torch
    import transformers as tf

    kinds: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "llama": (tf.LlamaConfig, tf.LlamaForCausalLM, {}),
        "llama3-scaled": (tf.LlamaConfig, tf.LlamaForCausalLM, {"rope_scaling": _LLAMA3}),
        "llama-yarn": (tf.LlamaConfig, tf.LlamaForCausalLM, {"rope_scaling": _YARN}),
        "qwen2": (tf.Qwen2Config, tf.Qwen2ForCausalLM, {}),
        "qwen3": (tf.Qwen3Config, tf.Qwen3ForCausalLM, {"head_dim": 64}),
        "mistral": (tf.MistralConfig, tf.MistralForCausalLM, {"sliding_window": None}),
    }
    path = folder / name
    if (path / "config.json").exists():
        return path
    config_class, model_class, extra = kinds[name]
    torch.manual_seed(seed)
    model = model_class(config_class(**_COMMON, **extra)).float()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.bias is not None:
            torch.nn.init.normal_(module.bias, std=0.2)
    model.save_pretrained(path)
    return path


DEAD = 6  # where traces look by default in a model of 13 layers


def with_a_dead_layer(reader: Path, out: Path) -> Path:
    """The reader with one layer more, where traces look by default: it adds nothing, so answers
    are the reader's, and each of its heads attends alike to everything."""
    import json
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(reader, out)
    config = json.loads((out / "config.json").read_text())
    config["num_hidden_layers"] += 1
    (out / "config.json").write_text(json.dumps(config))
    made: dict[str, Any] = {}
    for name, value in load_file(reader / "model.safetensors").items():
        parts = name.split(".")
        if parts[1] != "layers":
            made[name] = value
            continue
        number = int(parts[2])
        parts[2] = str(number + (number >= DEAD))
        made[".".join(parts)] = value
        if number == DEAD:
            parts[2] = str(DEAD)
            silent = parts[-2] in ("q_proj", "o_proj", "down_proj")
            made[".".join(parts)] = torch.zeros_like(value) if silent else value.clone()
    save_file(made, out / "model.safetensors", metadata={"format": "pt"})
    return out


def make_adapter(folder: Path) -> Path:
    """A random LoRA adapter for the attention of ``llama``, in PEFT's format."""
    import json

    import torch
    from safetensors.torch import save_file

    path = folder / "adapter"
    path.mkdir(exist_ok=True)
    rank, hidden, kv = 4, _COMMON["hidden_size"], _COMMON["hidden_size"] // 2
    torch.manual_seed(1)
    weights = {}
    for layer in range(_COMMON["num_hidden_layers"]):
        for name, width in (("q_proj", hidden), ("k_proj", kv), ("v_proj", kv)):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{prefix}.lora_A.weight"] = torch.randn(rank, hidden) * 0.1
            weights[f"{prefix}.lora_B.weight"] = torch.randn(width, rank) * 0.5
    save_file(weights, path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "bias": "none",
        "target_modules": ["q_proj", "k_proj", "v_proj"],
    }
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def add_tokenizer(path: Path) -> None:
    """A byte-level BPE of ``VOCAB`` tokens, trained on Python's library, and a chat template."""
    import os

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([Path(os.__file__).read_text()], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    fast.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    )
    fast.save_pretrained(path)
