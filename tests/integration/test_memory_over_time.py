"""What a server remembers over many requests: conversations that began with reused text, and text
that paid, which stays when memory gets short."""

from pathlib import Path

import pytest
from conftest import Texts
from lab import Lab, lab


def test_a_conversation_that_began_with_reuse_stays_at_one_depth(kv_lab: Lab, texts: Texts) -> None:
    kv_lab.flush()
    document = texts.passage(300)
    kv_lab.one(document)
    history = texts.passage(20) + document + texts.passage(40)
    first = kv_lab.one(history, new=24)
    assert first["kvshare"]["source_depth"] == 0
    fresh = len(history) - first["kvshare"]["fuzzy_tokens"]
    for _ in range(3):
        # Each turn sends all that was said before, and some more.
        history = history + first["output"] + texts.passage(30)
        turn = kv_lab.one(history, new=24)
        report = turn["kvshare"]
        # Its own earlier turns, at their own positions, are what they would be without a turn
        # between: depth 1, however long the conversation gets, and nearly nothing to compute.
        assert report["source_depth"] <= 1
        reused = report["exact_tokens"] + report["fuzzy_tokens"]
        assert reused >= len(history) - 30 - 24 - fresh // 2, report
        depths = {depth for depth, _ in kv_lab.ask("probes:tagged_sizes")}
        assert depths == {1}
        first = turn


@pytest.mark.parametrize(("eviction", "stays"), [("worth", True), ("sglang", False)])
def test_text_that_paid_stays_when_memory_gets_short(
    eviction: str, stays: bool, llama: Path, texts: Texts
) -> None:
    with lab(llama, kvshare=True, kvshare_eviction=eviction, max_total_tokens=1500) as it:
        paid = texts.passage(300)
        it.one(paid)
        for _ in range(2):
            assert it.one(texts.passage(9) + paid, new=1)["kvshare"]["fuzzy_tokens"] > 200
        for _ in range(5):  # none of it is ever asked for again
            it.one(texts.passage(300), new=1)
        last = it.one(texts.passage(9) + paid, new=1)["kvshare"]
        assert (last["fuzzy_tokens"] > 200) == stays, last
