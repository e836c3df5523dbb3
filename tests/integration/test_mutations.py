"""The oracles can fail: each planted fault makes the test named with it fail."""

from pathlib import Path

import pytest
import test_exact_stays_exact
import test_life
import test_partial_prefill
from conftest import Texts
from lab import LabError, lab, request


def layer0_oracle(it, texts: Texts) -> None:
    """test_every_served_architecture's law: moved K in layer 0 is freshly computed K."""
    import torch

    prompt = texts.passage(350)
    it.one(prompt, extra_key="donor")
    moved = texts.passage(20) + prompt[60:330] + texts.passage(40)
    reused = it.one(moved, extra_key="donor", keep="kv")
    assert reused["kvshare"]["copied_tokens"] > 200
    fresh = it.one(moved, extra_key="other", kvshare="exact", keep="kv")
    for mine, theirs in zip(reused["kv"], fresh["kv"], strict=True):
        torch.testing.assert_close(mine[0], theirs[0], atol=2e-4, rtol=1e-4)


def exact_oracle(it, texts: Texts) -> None:
    """test_exact_then_fuzzy_then_exact_again's law, without a second server."""
    corpus = test_exact_stays_exact.Corpus(texts)
    prompt = corpus.prompts[0]
    alone = it.one(prompt, kvshare="exact")
    it.flush()
    for source in corpus.sources:
        it.one(source)
    assert it.one(prompt)["kvshare"]["copied_tokens"] > 100
    assert it.one(prompt, kvshare="exact")["output"] == alone["output"]
    assert it.ask("probes:plain_keys_of_depth") <= {0}
    it.ask("probes:check")


def rows_oracle(it, texts: Texts) -> None:
    """test_random_rows_alone's law."""
    it.ask("probes:force_plans")
    prompt = texts.passage(250)
    full = test_partial_prefill.donate(it, texts, [prompt])["full0"]
    for i in range(3):  # each in a namespace of its own: the same prompt again is a prefix hit
        part = it.one(prompt, forced=texts.rows(250), extra_key=f"r{i}")
        test_partial_prefill.assert_like_full(full, part)


def pressure_oracle(it, texts: Texts) -> None:
    """test_sources_survive_the_pressure_of_their_own_reuse's law: where only the sources could
    make room, the request runs plain; it must never copy from slots that it was given itself."""
    big = texts.passage(600)
    it.one(big, new=2)
    prompt = texts.passage(5) + big
    answer = it.one(prompt, new=2, keep="kv")
    it.flush()
    fresh = it.one(prompt, new=2, kvshare="exact", keep="kv")
    gap = (answer["kv"][0][0] - fresh["kv"][0][0]).abs().max().item()
    assert gap < 1e-3, "a slot was overwritten before it was copied"
    assert answer["kvshare"]["declined"] == "no_room"
    test_life.assert_clean(it)


FULL_POOL = {"max_total_tokens": 700, "chunked_prefill_size": 128}
CASES = {
    "no rotation": ("mutate_no_rotation", layer0_oracle, {}),
    "positions off by one": ("mutate_off_by_one", layer0_oracle, {}),
    "exact_len ignored": ("mutate_exact_len_ignored", exact_oracle, {}),
    "copy before the batch is built": ("mutate_copy_early", rows_oracle, {}),
    "sources not locked": ("mutate_sources_not_locked", pressure_oracle, FULL_POOL),
}


@pytest.mark.parametrize("name", list(CASES))
def test_the_oracle_sees_the_fault(name: str, llama: Path) -> None:
    mutation, oracle, settings = CASES[name]
    faulty = lab(llama, kvshare=True, mutation=f"probes:{mutation}", **settings)
    with faulty as it, pytest.raises((AssertionError, LabError)):
        oracle(it, Texts(3))


@pytest.mark.parametrize("oracle", [layer0_oracle, exact_oracle, rows_oracle, pressure_oracle])
def test_the_oracle_holds_without_a_fault(oracle, llama: Path) -> None:
    settings = FULL_POOL if oracle is pressure_oracle else {}
    with lab(llama, kvshare=True, **settings) as it:
        oracle(it, Texts(3))


def test_rid_is_kept(llama: Path) -> None:
    """A script's answers are keyed by the ids that it gave."""
    with lab(llama) as it:
        assert set(it.play([[request("a", [5, 6]), request("b", [7])]])) == {"a", "b"}
        assert it.ask("probes:cache_class") != "FuzzyRadixCache"
        assert not any(it.ask("probes:hook_points").values()), (
            "without --kvshare nothing is touched"
        )
