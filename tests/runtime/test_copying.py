"""The table of angles that copies are turned by reaches as far as the model's own."""

from typing import Any

import pytest
import torch
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
from sglang.srt.layers.rotary_embedding.rope_variant import Llama3RotaryEmbedding
from sglang.srt.layers.rotary_embedding.yarn import YaRNScalingRotaryEmbedding

from kvshare_sglang.runtime.copying import _rope_table

ROWS, LONGER = 64, 300


def make(kind: str, dtype: torch.dtype) -> Any:
    common = (32, 32, ROWS, 10_000, True)
    if kind == "plain":
        return RotaryEmbedding(*common, dtype)
    if kind == "llama3":
        return Llama3RotaryEmbedding(*common, dtype, 4.0, 1.0, 4.0, 32)
    return YaRNScalingRotaryEmbedding(*common, 2.0, dtype)


@pytest.mark.parametrize("kind", ["plain", "llama3", "yarn"])
def test_the_table_is_the_one_that_sglang_would_hold_in_fp32(kind: str) -> None:
    rotary, exact = make(kind, torch.bfloat16), make(kind, torch.float32)
    if rotary.cos_sin_cache.dtype == torch.float32:
        pytest.skip("this machine keeps the table in fp32")
    short = _rope_table(rotary)
    assert torch.equal(short, exact.cos_sin_cache)
    for one in (rotary, exact):  # as SGLang does where a longer context is asked for
        one._ensure_cos_sin_cache_length(LONGER - 1)
    own = rotary.cos_sin_cache
    table = _rope_table(rotary)
    assert table.dtype == torch.float32
    assert len(table) == len(own) >= LONGER
    assert torch.equal(table, exact.cos_sin_cache)
    assert _rope_table(rotary) is table, "it is made once"
    assert rotary.cos_sin_cache is own, "the model's own stays"
    assert own.dtype == torch.bfloat16


def test_a_table_in_fp32_is_the_models_own() -> None:
    rotary = make("plain", torch.float32)
    assert _rope_table(rotary) is rotary.cos_sin_cache
