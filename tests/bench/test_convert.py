"""A Llama that went through GGUF is the Llama that it was."""

import numpy as np
import pytest

from kvshare_sglang.bench import convert

gguf = pytest.importorskip("gguf")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LAYERS, HIDDEN, HEADS, KV_HEADS, MLP = 2, 64, 4, 2, 96
BYTES = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256))]
BYTES += [chr(256 + i) for i in range(256 - len(BYTES))]  # GPT-2's letters for the other bytes
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["a b", "Ġ Ġ", "1 2"]
TOKENS = [*CONTROL, *BYTES, "ab", "ĠĠ", "12"]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def _llama(*, tied):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=MLP, num_hidden_layers=LAYERS, vocab_size=len(TOKENS),
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=128,
        rope_theta=5e4, rms_norm_eps=1e-5, tie_word_embeddings=tied,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    for weight in model.parameters():  # what is compared is the way through the file alone
        weight.data = weight.data.bfloat16().float()
    return model


def _pairs(weight, heads):
    """As llama.cpp's converter orders the rows of Q and K: one rotated pair after the other."""
    return weight.reshape(heads, 2, -1, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def _write(path, model, *, architecture="llama", pre="smollm", more=()):
    out = gguf.GGUFWriter(path, architecture)
    out.add_block_count(LAYERS)
    out.add_context_length(128)
    out.add_embedding_length(HIDDEN)
    out.add_feed_forward_length(MLP)
    out.add_head_count(HEADS)
    out.add_head_count_kv(KV_HEADS)
    out.add_rope_freq_base(5e4)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre(pre)
    out.add_token_list(TOKENS)
    out.add_token_merges(MERGES)
    out.add_token_types([3] * len(CONTROL) + [1] * (len(TOKENS) - len(CONTROL)))
    out.add_unk_token_id(0)
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    out.add_pad_token_id(2)
    out.add_chat_template(TEMPLATE)
    weights = {name: w.detach().numpy() for name, w in model.state_dict().items()}
    tied = model.config.tie_word_embeddings
    names = ["token_embd.weight", "output_norm.weight", *([] if tied else ["output.weight"])]
    parts = ("attn_norm attn_q attn_k attn_v attn_output ffn_norm ffn_gate ffn_up ffn_down").split()
    names += [f"blk.{i}.{part}.weight" for i in range(LAYERS) for part in parts]
    for name in names:
        weight = weights[convert.name_of(name)]
        if ".attn_q." in name or ".attn_k." in name:
            weight = _pairs(weight, HEADS if ".attn_q." in name else KV_HEADS)
        out.add_tensor(name, np.ascontiguousarray(weight))
    for name in more:
        out.add_tensor(name, np.zeros(4, np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_that_went_through_gguf_gives_the_same_logits(tmp_path, tied):
    model = _llama(tied=tied)
    _write(tmp_path / "model.gguf", model)
    (tmp_path / "out").mkdir()
    convert.convert(tmp_path / "model.gguf", tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert again.config.rope_parameters == model.config.rope_parameters
    assert again.config.rms_norm_eps == model.config.rms_norm_eps
    ids = torch.randint(len(TOKENS), (1, 40))
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=0)


def test_the_tokenizer_splits_digits_and_keeps_control_tokens_whole(tmp_path):
    _write(tmp_path / "model.gguf", _llama(tied=True))
    (tmp_path / "out").mkdir()
    convert.convert(tmp_path / "model.gguf", tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "<|im_start|>ab  12 é<|im_end|>"
    assert tokenizer.tokenize(text)[:5] == ["<|im_start|>", "ab", "ĠĠ", "1", "2"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    said = [{"role": "user", "content": "ab"}]
    assert tokenizer.apply_chat_template(said, tokenize=False) == "ab"


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ({"pre": "qwen2"}, "tokenizer.ggml.pre must be one of smollm, got 'qwen2'"),
        ({"more": ["blk.0.attn_q.bias"]}, "'blk.0.attn_q.bias' is no tensor of a Llama"),
        ({"architecture": "gemma"}, "general.architecture must be llama, got 'gemma'"),
    ],
)
def test_a_file_that_is_no_such_llama_is_refused(tmp_path, file, message):
    _write(tmp_path / "model.gguf", _llama(tied=True), **file)
    with pytest.raises(convert.ConvertError, match=message):
        convert.convert(tmp_path / "model.gguf", tmp_path)
