"""What a server remembers over many requests: conversations that began with reused text, and text
that paid, which stays when memory gets short."""

from pathlib import Path

import pytest
from conftest import Texts
from lab import Lab, lab, request


def test_a_conversation_that_began_with_reuse_stays_at_one_depth(kv_lab: Lab, texts: Texts) -> None:
    kv_lab.flush()
    document = texts.passage(300)
    kv_lab.one(document)
    history = texts.passage(20) + document + texts.passage(40)
    first = kv_lab.one(history, new=24)
    assert first["kvshare"]["source_depth"] == 0
    assert first["kvshare"]["copied_tokens"] > 200
    for _ in range(3):
        # Each turn sends all that was said before, and some more.
        history = history + first["output"] + texts.passage(30)
        turn = kv_lab.one(history, new=24)
        report = turn["kvshare"]
        # Its own earlier turns are a prefix: depth 1, however long the conversation gets, and
        # nothing to compute but what is new. The last token of an answer has no KV.
        assert report["source_depth"] <= 1
        assert report["exact_tokens"] + report["blended_tokens"] == len(history) - 30 - 1, report
        depths = {depth for depth, _ in kv_lab.ask("probes:tagged_sizes")}
        assert depths == {1}
        first = turn


@pytest.mark.parametrize(("eviction", "stays"), [("frequency", True), ("sglang", False)])
def test_text_that_paid_stays_when_memory_gets_short(
    eviction: str, stays: bool, llama: Path, texts: Texts
) -> None:
    with lab(llama, kvshare=True, kvshare_eviction=eviction, max_total_tokens=1500) as it:
        paid = texts.passage(300)
        it.one(paid)
        for _ in range(2):
            assert it.one(texts.passage(9) + paid, new=1)["kvshare"]["copied_tokens"] > 200
        for _ in range(5):  # none of it is ever asked for again
            it.one(texts.passage(300), new=1)
        last = it.one(texts.passage(9) + paid, new=1)["kvshare"]
        assert (last["copied_tokens"] > 200) == stays, last


def test_a_request_that_waits_for_memory_makes_its_sources_no_dearer(
    llama: Path, texts: Texts
) -> None:
    """It is looked at again and again; what it would copy is used once, when it is admitted."""
    with lab(llama, kvshare=True, max_total_tokens=1500, chunked_prefill_size=64) as it:
        source = texts.passage(400)
        it.one(source, new=1)
        script = [
            request("busy", texts.passage(700), new=480),
            ("polls", 12),
            request("waits", texts.passage(9) + source + texts.passage(200), new=4),
        ]
        answers = it.play(script)
        assert answers["waits"]["kvshare"]["copied_tokens"] > 200, answers["waits"]["kvshare"]
        assert 0 < max(it.ask("probes:uses")) <= 1.0


def test_a_request_that_lost_its_sources_before_the_first_copy_is_kept_whole(
    llama: Path, texts: Texts
) -> None:
    """Then it is exact to its end, and enters the plain branch like any other."""
    with lab(llama, kvshare=True, chunked_prefill_size=128) as it:
        source = texts.passage(300)
        it.one(source, new=1)
        it.ask("probes:yield_once_between", 1, 256)
        prompt = texts.passage(400) + source
        first = it.one(prompt, new=8)
        assert it.ask("probes:yields") == 1
        assert first["kvshare"]["declined"] == "no_room"
        again = it.one(prompt + first["output"] + texts.passage(30), new=1)
        assert again["kvshare"]["exact_tokens"] >= len(prompt) + 7


def test_long_fresh_text_is_stored_in_a_chain_of_pieces(llama: Path, texts: Texts) -> None:
    with lab(llama, kvshare=True, max_total_tokens=8000) as it:
        source, fresh = texts.passage(500), texts.passage(3000)
        it.one(source, new=1)
        it.one(texts.passage(9) + source + fresh, new=1)
        sizes = [size for depth, size in it.ask("probes:tagged_sizes") if depth == 1]
        assert sum(sizes) >= 2990
        assert 3000 / 256 <= len(sizes) <= 3000 / 64
        it.ask("probes:check")
        found = it.one(texts.passage(20) + fresh[1000:2000], new=1)["kvshare"]
        assert found["copied_tokens"] > 800
        assert found["source_depth"] == 1
