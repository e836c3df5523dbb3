"""Neither the chunk nor who else is there changes what a request reuses: rows are charged."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Texts
from lab import Lab, computed, lab, request

TOL = {"atol": 2e-3, "rtol": 1e-3}
CHUNK = 128
SETTINGS = {
    "plain": {},
    "mixed chunks, page 16, overlap": {
        "enable_mixed_chunk": True,
        "page_size": 16,
        "disable_overlap_schedule": False,
    },
}


@pytest.fixture(scope="module", params=list(SETTINGS))
def small(request: pytest.FixtureRequest, llama: Path) -> Iterator[Lab]:
    """A server with a chunk that no prompt of this file fits."""
    settings = {"chunked_prefill_size": CHUNK, "kvshare_select": "trace", "kvshare_budget": 0.04}
    with lab(llama, kvshare=True, **settings, **SETTINGS[request.param]) as it:
        yield it


@pytest.fixture(scope="module")
def large(llama: Path) -> Iterator[Lab]:
    """The same with a chunk that all fit."""
    with lab(llama, kvshare=True, kvshare_select="trace", kvshare_budget=0.04) as it:
        yield it


class Corpus:
    """A source, and prompts that hold 500 tokens of it moved, among some new text."""

    def __init__(self, texts: Texts, *, new: tuple[int, ...]) -> None:
        a, b = texts.passage(300), texts.passage(200)
        # The tree keeps whole pages, so the source goes on past what is copied.
        self.source = texts.passage(7) + a + b + texts.passage(32)
        self.prompts = [texts.passage(5) + b + texts.passage(n - 5) + a for n in new]
        self.prompts = [prompt + texts.passage(20) for prompt in self.prompts]


def batches(it: Lab) -> list[list[int]]:
    """By prefill batch so far, the rows of each layer that ran, its passes one after the other."""
    return [rows for rows in it.ask("probes:layer_rows") if rows]


def served(it: Lab, corpus: Corpus, **options: Any) -> list[dict]:
    """Each prompt alone, the source cached before it."""
    out = []
    for prompt in corpus.prompts:
        it.flush()
        it.one(corpus.source, new=1)
        out.append(it.one(prompt, **options))
    return out


def test_a_prompt_whose_rows_fit_a_chunk_is_one_batch_of_the_selector_asked_for(
    small: Lab, large: Lab, texts: Texts
) -> None:
    corpus = Corpus(texts, new=(80,))
    (mine,) = served(small, corpus, keep="kv")
    (batch,) = batches(small)
    assert 0 < max(batch) <= CHUNK
    told = mine["kvshare"]
    assert (told["select"], told["select_reason"]) == ("trace", None)
    assert told["copied_tokens"] > 450
    (theirs,) = served(large, corpus, keep="kv")
    assert told == theirs["kvshare"]
    assert mine["output"] == theirs["output"]
    torch.testing.assert_close(mine["logits"], theirs["logits"], **TOL)
    for ours, other in zip(mine["kv"], theirs["kv"], strict=True):
        torch.testing.assert_close(ours, other, **TOL)


def test_a_prompt_of_more_rows_than_a_chunk_is_traced_with_its_last_chunk(
    small: Lab, large: Lab, texts: Texts
) -> None:
    corpus = Corpus(texts, new=(200,))
    (mine,), (whole,) = served(small, corpus), served(large, corpus)
    for answer in (mine, whole):
        assert (answer["kvshare"]["select"], answer["kvshare"]["select_reason"]) == ("trace", None)
    assert mine["kvshare"]["repaired_tokens"] > 0
    # Beside the rows of a prompt that comes whole the last row of each chunk runs; new text that
    # was computed over copies takes some of the budget.
    chunks = -(-720 // CHUNK)
    assert -16 <= computed(mine["kvshare"]) - computed(whole["kvshare"]) <= chunks


@pytest.mark.parametrize("budget", [0.25, 0.5])
def test_rows_of_several_chunks_over_exact_copies_are_full_prefill(
    llama: Path, texts: Texts, budget: float
) -> None:
    """An oracle for which rows run when, and in which order: where all copies are exact, whatever
    runs again beside them and in whatever chunk, logits and KV are those of full prefill. With half
    of the rows the repair itself is several chunks."""
    settings = {"chunked_prefill_size": CHUNK, "kvshare_select": "trace"}
    with lab(llama, kvshare=True, kvshare_budget=budget, **settings) as it:
        it.ask("probes:force_plans")
        prompt = texts.passage(700)
        it.one(prompt + texts.passage(32), extra_key="donor", new=1, kvshare="exact")
        full = it.one(prompt, extra_key="full", kvshare="exact", keep="kv")
        rows = [(150, 280), (500, 560), (680, 700)]
        part = it.one(prompt, forced=rows, extra_key="part", keep="kv")
        told = part["kvshare"]
        assert (told["select"], told["declined"]) == ("trace", None)
        assert told["repaired_tokens"] > 0
        assert computed(told) > CHUNK * budget * 5
        assert part["output"] == full["output"]
        torch.testing.assert_close(part["logits"], full["logits"], **TOL)
        for mine, theirs in zip(part["kv"], full["kv"], strict=True):
            torch.testing.assert_close(mine, theirs, **TOL)


def test_prompts_at_once_share_batches_and_each_reuses_what_it_does_alone(
    small: Lab, texts: Texts
) -> None:
    corpus = Corpus(texts, new=(8, 9, 10, 20, 30, 6, 9, 12))
    alone = served(small, corpus, keep="kv")
    small.flush()
    together = small.play(
        [
            request("source", corpus.source, new=1),
            ("idle",),
            [request(str(i), prompt, keep="kv") for i, prompt in enumerate(corpus.prompts)],
        ]
    )
    for i, mine in enumerate(alone):
        assert together[str(i)]["kvshare"] == mine["kvshare"]
        assert together[str(i)]["kvshare"]["select"] == "trace"
        assert together[str(i)]["output"] == mine["output"]
        for ours, theirs in zip(together[str(i)]["kv"], mine["kv"], strict=True):
            torch.testing.assert_close(ours, theirs, **TOL)
    made = batches(small)[-(-len(corpus.source) // CHUNK) :]
    assert all(max(batch) <= CHUNK for batch in made)
    # Two or three share one, by rows in whole pages; all their tokens would be 34 chunks.
    assert len(made) <= 6


@pytest.mark.parametrize("fault", ["copy", "choice"])
def test_a_batch_that_must_run_every_row_runs_them_a_chunk_at_a_time(
    llama: Path, texts: Texts, fault: str
) -> None:
    corpus = Corpus(texts, new=(10, 20))
    plain = texts.passage(12)
    settings = {"chunked_prefill_size": CHUNK, "kvshare_select": "trace", "kvshare_budget": 0.04}
    with lab(llama, kvshare=True, **settings) as it:
        it.one(corpus.source, new=1)
        prompts = [*corpus.prompts, plain]
        exact = {
            str(i): it.one(prompt, kvshare="exact", extra_key="exact", keep="kv")
            for i, prompt in enumerate(prompts)
        }
        it.ask(f"probes:break_{fault}")
        wanted = [request(str(i), prompt, keep="kv") for i, prompt in enumerate(prompts)]
        got = it.play([wanted])
        (batch,) = batches(it)
        assert max(batch) <= CHUNK
        for rid, answer in got.items():
            told = answer["kvshare"]
            assert told["copied_tokens"] == 0
            assert told["declined"] == ("fault" if rid != "2" else "no_match")
            assert answer["output"] == exact[rid]["output"]
            torch.testing.assert_close(answer["logits"], exact[rid]["logits"], **TOL)
            for mine, theirs in zip(answer["kv"], exact[rid]["kv"], strict=True):
                torch.testing.assert_close(mine, theirs, **TOL)
        assert it.ask("probes:check")["pins"] == 0
