"""What is served stands in one table; refusals, declines and the README come from it."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvshare_sglang.errors import UnsupportedError
from kvshare_sglang.policy.admit import RequestView
from kvshare_sglang.runtime import support

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("setting", support.SETTINGS, ids=lambda setting: setting.name)
def test_each_setting_serves_some_values_and_refuses_others_by_flag(
    setting: support.Setting,
) -> None:
    good = None if setting.refused else setting.served[0]
    support.check_settings(SimpleNamespace(**{setting.name: good}))
    for bad in setting.refused or ("something else", 2, True):
        if setting.serves(bad):
            continue
        with pytest.raises(UnsupportedError) as caught:
            support.check_settings(SimpleNamespace(**{setting.name: bad}))
        assert f"drop --{setting.name.replace('_', '-')} (got {bad!r})" in str(caught.value)


def test_a_setting_that_this_sglang_does_not_have_is_served() -> None:
    support.check_settings(SimpleNamespace())


def test_settings_are_named_once() -> None:
    names = [setting.name for setting in support.SETTINGS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("wrapped", [False, True])
def test_two_attention_backends_are_refused_by_their_flags(wrapped: bool) -> None:
    from sglang.srt.layers.attention.hybrid_attn_backend import HybridAttnBackend

    from kvshare_sglang.runtime import attention

    backend = HybridAttnBackend.__new__(HybridAttnBackend)
    config = SimpleNamespace(hf_config=SimpleNamespace(architectures=["LlamaForCausalLM"]))
    runner = SimpleNamespace(model_config=config, attn_backend=backend)
    if wrapped:  # as it is by the time that the model is judged
        attention.wrap(backend, runner)
    with pytest.raises(UnsupportedError, match="drop --prefill-attention-backend and --decode"):
        support.check_model(runner)


def test_the_readme_has_the_table_of_what_is_served() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (held,) = re.findall(r"<!-- served -->\n(.*?)\n<!-- /served -->", text, re.DOTALL)
    assert held == support.as_markdown()
    for name in RequestView._fields:
        word = support.DECLINED.get(name, name.replace("_", " "))
        assert name == "mode" or word in held
