"""Partial prefill with exact KV in the skipped slots gives the logits of full prefill."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import Texts
from lab import Lab, LabError, computed, lab, request
from tiny_models import make_adapter, make_model

TOL = {"atol": 2e-3, "rtol": 1e-3}  # fp32, logits of about +-30; another order of sums

SETTINGS = {
    "plain": {},
    "page 16": {"page_size": 16},
    "chunked": {"chunked_prefill_size": 128},
    "overlap, chunked, page 16": {
        "disable_overlap_schedule": False,
        "chunked_prefill_size": 128,
        "page_size": 16,
    },
    "mixed chunks": {"chunked_prefill_size": 96, "enable_mixed_chunk": True},
    "mixed chunks, overlap": {
        "chunked_prefill_size": 96,
        "enable_mixed_chunk": True,
        "disable_overlap_schedule": False,
    },
}


@pytest.fixture(scope="module", params=list(SETTINGS))
def any_lab(request: pytest.FixtureRequest, llama: Path) -> Iterator[Lab]:
    with lab(llama, kvshare=True, **SETTINGS[request.param]) as it:
        it.ask("probes:force_plans")
        it.chunk = SETTINGS[request.param].get("chunked_prefill_size", 0)
        yield it


def donate(it: Lab, texts: Texts, prompts: list[list[int]]) -> dict[str, dict]:
    """Full prefill's answers, and the same text cached in the donor namespace."""
    it.flush()
    script: list = []
    for i, prompt in enumerate(prompts):
        # The tree keeps whole pages in one piece, so the donors go on past the prompt's end.
        donor = request(f"donor{i}", prompt + texts.passage(32), extra_key="donor", new=1)
        full = request(f"full{i}", prompt, extra_key="full", kvshare="exact", keep="kv")
        script += [donor, ("idle",), full, ("idle",)]
    return it.play(script)


def assert_like_full(full: dict, part: dict) -> None:
    assert part["kvshare"]["declined"] is None
    torch.testing.assert_close(part["logits"], full["logits"], **TOL)
    assert part["output"] == full["output"]


def assert_rows(part: dict, rows: list[tuple[int, int]], *, start: int = 0, chunk: int = 0) -> None:
    """The rows that ran are those forced; each chunk but the last may add its last token."""
    forced = sum(b - max(a, start) for a, b in rows if b > start)
    more = computed(part["kvshare"]) - forced
    assert 0 <= more <= (rows[-1][1] // chunk if chunk else 0)
    assert part["kvshare"]["copied_tokens"] == rows[-1][1] - start - forced - more > 0


def test_random_rows_alone(any_lab: Lab, texts: Texts) -> None:
    for length in (40, 250, 316, 700):
        prompt = texts.passage(length)
        full = donate(any_lab, texts, [prompt])["full0"]
        for i in range(3):
            rows = texts.rows(length)
            part = any_lab.one(prompt, forced=rows, extra_key=f"t{i}", keep="kv")
            assert_like_full(full, part)
            assert_rows(part, rows, chunk=any_lab.chunk)
            for mine, theirs in zip(part["kv"], full["kv"], strict=True):
                torch.testing.assert_close(mine, theirs, **TOL)


def test_batches_that_mix_partial_and_plain_requests(any_lab: Lab, texts: Texts) -> None:
    prompts = [texts.passage(n) for n in (33, 150, 316, 420, 90)]
    full = donate(any_lab, texts, prompts)
    script = [
        request(f"r{i}", prompt, forced=texts.rows(len(prompt)) if i % 2 == 0 else None, new=6)
        for i, prompt in enumerate(prompts)
    ]
    # Two more that arrive while the first ones decode: mixed chunks run them together.
    late = [request("late0", prompts[2], forced=texts.rows(316), extra_key="t2", new=6)]
    late.append(request("late1", prompts[1], extra_key="t3", kvshare="exact", new=6))
    answers = any_lab.play([script, ("polls", 3), late])
    for i in range(len(prompts)):
        assert answers[f"r{i}"]["output"] == full[f"full{i}"]["output"][:6]
    for name in ("r0", "r2", "r4", "late0"):
        assert answers[name]["kvshare"]["declined"] is None
        assert answers[name]["kvshare"]["copied_tokens"] > 0
    assert answers["late0"]["output"] == full["full2"]["output"][:6]
    assert answers["late1"]["output"] == full["full1"]["output"][:6]
    state = any_lab.ask("probes:check")
    assert state["protected"] == state["pins"] == 0


def test_prefix_hit_before_the_rows(any_lab: Lab, texts: Texts) -> None:
    prompt = texts.passage(420)
    full = donate(any_lab, texts, [prompt])["full0"]
    any_lab.one(prompt[:130], new=1, kvshare="exact")
    rows = texts.rows(420, start=160)
    part = any_lab.one(prompt, forced=rows)
    assert part["kvshare"]["exact_tokens"] >= 112
    assert part["cached"] == part["kvshare"]["exact_tokens"]
    assert_like_full(full, part)
    assert_rows(part, rows, start=part["cached"], chunk=any_lab.chunk)


@pytest.mark.parametrize("name", ["llama3-scaled", "llama-yarn", "qwen2", "qwen3", "mistral"])
def test_every_served_architecture(name: str, models: Path, texts: Texts) -> None:
    with lab(make_model(models, name), kvshare=True) as it:
        it.ask("probes:force_plans")
        prompt = texts.passage(350)
        full = donate(it, texts, [prompt])["full0"]
        assert_like_full(full, it.one(prompt, forced=texts.rows(350)))
        # Layer 0: K depends on token and position only, V on the token. Moved copies must agree
        # with what was computed fresh.
        moved = texts.passage(20) + prompt[60:330] + texts.passage(40)
        reused = it.one(moved, extra_key="donor", keep="kv")
        assert reused["kvshare"]["copied_tokens"] > 200
        fresh = it.one(moved, extra_key="other", kvshare="exact", keep="kv")
        for mine, theirs in zip(reused["kv"], fresh["kv"], strict=True):
            torch.testing.assert_close(mine[0], theirs[0], atol=2e-4, rtol=1e-4)


def test_budget_one_gives_the_logits_of_full_prefill(kv_lab: Lab, texts: Texts) -> None:
    a, b = texts.passage(300), texts.passage(200)
    kv_lab.flush()
    kv_lab.one(a + b)
    prompt = b + a + texts.passage(30)
    part = kv_lab.one(prompt, kvshare={"budget": 1.0})
    full = kv_lab.one(prompt, extra_key="other", kvshare="exact")
    torch.testing.assert_close(part["logits"], full["logits"], **TOL)
    assert part["output"] == full["output"]
    assert part["kvshare"]["copied_tokens"] == 0


def test_reported_rows_are_the_rows_of_every_layer(kv_lab: Lab, texts: Texts) -> None:
    a, b = texts.passage(300), texts.passage(200)
    kv_lab.flush()
    kv_lab.one(a + b)
    part = kv_lab.one(b + texts.passage(9) + a, new=1)
    assert part["kvshare"]["copied_tokens"] > 300
    rows = computed(part["kvshare"])
    assert rows == 509 - part["kvshare"]["copied_tokens"]
    assert kv_lab.ask("probes:layer_rows")[-1] == [rows] * 4


def test_partial_requests_beside_lora_requests(llama: Path, models: Path, texts: Texts) -> None:
    """Adapters are laid out by token when a batch is built; the cut must lay them out anew."""
    adapter = str(make_adapter(models))
    settings = {"enable_lora": True, "lora_paths": [adapter], "lora_backend": "torch_native"}
    settings |= {"max_loras_per_batch": 2, "mutation": "probes:no_pinning"}
    with lab(llama, kvshare=True, **settings) as it:
        it.ask("probes:force_plans")
        mine, theirs = texts.passage(300), texts.passage(200)
        full = donate(it, texts, [mine])["full0"]
        alone = it.one(theirs, lora=True)
        assert alone["kvshare"]["declined"] == "lora"
        # vLLM 44250: what an adapter computed is no source for the base model.
        assert it.one([*range(2, 11), *theirs])["kvshare"]["declined"] == "no_match"
        base = it.one(theirs, extra_key="base", kvshare="exact")
        assert alone["output"] != base["output"], "the adapter changes nothing"
        it.flush()
        donate(it, texts, [mine])
        part = request("part", mine, forced=texts.rows(300))
        batch = it.play([[part, request("lora", theirs, lora=True)]])
        assert_like_full(full, batch["part"])
        torch.testing.assert_close(batch["lora"]["logits"], alone["logits"], **TOL)
        assert batch["lora"]["output"] == alone["output"]


def test_a_pool_with_heads_before_tokens_is_refused(llama: Path) -> None:
    with (
        pytest.raises(LabError, match=r"heads before tokens.*SGLANG_USE_HND_KVCACHE"),
        lab(llama, kvshare=True, late_env={"SGLANG_USE_HND_KVCACHE": "1"}),
    ):
        pass
