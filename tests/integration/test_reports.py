"""What users of other engines reported, tried on the real scheduler: docs/reports.md names each."""

import random
import tracemalloc
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Texts
from lab import Lab, computed, lab, request
from test_cutting import Tree
from test_life import KINDS, assert_clean
from tiny_models import make_adapter

from kvshare_sglang.policy.admit import Decline
from kvshare_sglang.runtime import scheduler


@pytest.fixture(scope="module")
def traced(llama: Path) -> Iterator[Lab]:
    """The default selector, and chunks so short that long prompts need several."""
    with lab(llama, kvshare=True, kvshare_select="trace", chunked_prefill_size=400) as it:
        yield it


@pytest.mark.parametrize("sizes", [(20, 110, 90, 70), (20, 210, 190, 160)], ids=["whole", "chunks"])
def test_a_prompt_of_nothing_but_cached_text_in_another_order_is_served(
    sizes: tuple[int, ...], traced: Lab, texts: Texts
) -> None:
    """LMCache 938 and 854: no new token at all, and the same prompt once more."""
    traced.flush()
    system, a, b, c = (texts.passage(size) for size in sizes)
    source = traced.one(system + a + b + c)
    for prompt in (system + b + a + c, system + c + b + a, c + b + a, b + c):
        answer = traced.one(prompt)
        assert answer["finish"]["type"] == "length"
        assert answer["kvshare"]["copied_tokens"] > len(prompt) // 3
        assert computed(answer["kvshare"]) < len(prompt) // 2
        again = traced.one(prompt)
        assert again["finish"]["type"] == "length"
        assert computed(again["kvshare"]) <= computed(answer["kvshare"])
    again = traced.one(system + a + b + c)
    assert again["output"] == source["output"]
    assert computed(again["kvshare"]) == 1
    assert_clean(traced)


def test_cached_text_is_found_behind_new_text(traced: Lab, texts: Texts) -> None:
    """LMCache 835 and 3238: a new chunk, or a new question, before text that is cached."""
    traced.flush()
    system, a, b, document = (texts.passage(size) for size in (20, 120, 150, 300))
    traced.one(a + b)
    new = texts.passage(80)
    answer = traced.one(a + new + b)["kvshare"]
    assert answer["exact_tokens"] == len(a)
    assert answer["fresh_tokens"] == len(new)
    assert answer["copied_tokens"] > len(b) // 3
    traced.one(system + texts.passage(30) + document)
    answer = traced.one(system + texts.passage(25) + document)["kvshare"]
    assert answer["exact_tokens"] + answer["copied_tokens"] > 0.7 * len(document)


@pytest.mark.parametrize("first", ["cached alone", "new behind reused text"])
def test_documents_of_any_length_are_reused_to_their_ends(
    first: str, traced: Lab, texts: Texts
) -> None:
    """LMCache 4667: of documents that fill no whole number of chunks, what is left at each border
    was lost."""
    traced.flush()
    old, documents = texts.passage(150), [texts.passage(size) for size in (61, 137, 83, 255, 97)]
    before = texts.passage(33)
    if first != "cached alone":
        traced.one(old)
        before += old
    told = traced.one(before + list(chain.from_iterable(documents)))["kvshare"]
    assert (told["copied_tokens"] > 0) == (first != "cached alone")
    for _ in range(3):
        head, question = texts.passage(texts.rng.randrange(5, 40)), texts.passage(25)
        chosen = chain.from_iterable(texts.rng.sample(documents, 4))
        told = traced.one([*head, *chosen, *question])["kvshare"]
        assert told["copied_tokens"] > 100
        # Not one token of a document is new.
        assert told["fresh_tokens"] <= len(head) + len(question)


@pytest.mark.parametrize("eviction", ["frequency", "sglang", "stock"])
def test_orders_that_were_never_asked_for_cost_no_more_in_the_end(
    eviction: str, llama: Path, texts: Texts
) -> None:
    """LMCache 4663: what new orders leave behind, twenty times what the pool holds, must not push
    the documents out. Stock SGLang says what there is to gain; under SGLang's own eviction they are
    pushed out, or this would prove nothing."""
    head, documents = texts.passage(40), [texts.passage(100) for _ in range(16)]
    settings = {} if eviction == "stock" else {"kvshare": True, "kvshare_eviction": eviction}
    with lab(llama, max_total_tokens=2600, **settings) as it:
        for i in range(0, 16, 4):
            it.one([*head, *chain.from_iterable(documents[i : i + 4])], new=1)
        shares = []
        for _ in range({"frequency": 10, "sglang": 6, "stock": 2}[eviction]):
            rows = tokens = 0
            for _ in range(8):
                chosen = chain.from_iterable(texts.rng.sample(documents, 6))
                prompt = [*head, *chosen, *texts.passage(30)]
                answer = it.one(prompt, new=4)
                told = answer["kvshare"]
                rows += len(prompt) - answer["cached"] if told is None else computed(told)
                tokens += len(prompt)
            shares.append(rows / tokens)
        if eviction == "stock":
            assert min(shares) > 0.8, shares
        elif eviction == "sglang":
            assert max(shares) > 0.3, shares
        else:
            assert max(shares) < 0.2, shares
            assert max(shares) <= 1.15 * shares[0], shares
            assert_clean(it)


def test_cache_salts_keep_tenants_apart(traced: Lab, texts: Texts) -> None:
    """SGLang 37160, LMCache 4825. The salt's owner still reuses, or this would prove nothing."""
    traced.flush()
    document = texts.passage(250)
    prompt = texts.passage(9) + document + texts.passage(20)
    owner = {"cache_salt": "owner"}
    traced.one(document, fields=owner)
    for fields, text in (
        ({"cache_salt": "other"}, prompt),
        ({"cache_salt": "another"}, document),
        ({}, prompt),
    ):
        answer = traced.one(text, fields=fields)
        assert answer["kvshare"]["declined"] == "no_match", fields
        assert answer["cached"] == 0
    assert traced.one(prompt, extra_key="owner")["kvshare"]["declined"] == "no_match"
    mine = traced.one(prompt, fields=owner)
    assert mine["kvshare"]["copied_tokens"] > 150
    # Nor are they led into what the owner's prompt left, of copies and of its own.
    for fields in ({"cache_salt": "other"}, {}):
        for text in (prompt, prompt + texts.passage(30)):
            told = traced.one(text, fields=fields)["kvshare"]
            assert told["blended_tokens"] == told["copied_tokens"] == 0, fields
        traced.flush()
        traced.one(document, fields=owner)
        traced.one(prompt, fields=owner)
    assert traced.one(prompt, fields=owner)["kvshare"]["blended_tokens"] > 150


def test_a_request_kept_out_of_the_cache_is_served_in_chunks_and_leaves_nothing(
    traced: Lab, texts: Texts
) -> None:
    """SGLang 36855: a client can set the host that marks such requests."""
    traced.flush()
    document = texts.passage(600)
    traced.one(document)
    before = traced.ask("probes:check")["resident"]
    fields = {"bootstrap_host": "2.2.2.2"}
    for prompt in (
        document + texts.passage(500),
        texts.passage(9) + document + texts.passage(500),
        texts.passage(900),
    ):
        answer = traced.one(prompt, fields=fields)
        assert answer["finish"]["type"] == "length"
        assert traced.ask("probes:check")["resident"] == before
        assert_clean(traced)


def test_what_aborted_requests_leave_behind_is_exact(
    traced: Lab, plain_lab: Lab, texts: Texts
) -> None:
    """SGLang 28374 and 38319: aborted in any chunk or while decoding, then asked for again."""
    traced.flush()
    source = texts.passage(300)
    traced.one(source)
    rng = random.Random(3)
    for polls in (1, 2, 3, 4, 6, 9):
        prompt = texts.passage(rng.randrange(5, 40)) + source + texts.passage(700)
        traced.play([request("gone", prompt, new=40), ("polls", polls), ("abort", "gone")])
        assert_clean(traced)
        want = plain_lab.play([("flush",), request("x", prompt, new=12)])["x"]["output"]
        assert traced.one(prompt, kvshare="exact", new=12)["output"] == want


def lora_ids(child: Any) -> list[str]:
    return list(child.runner.lora_manager.loras)


def test_a_base_request_never_copies_kv_of_an_adapter(
    llama: Path, models: Path, texts: Texts
) -> None:
    """SGLang 24638: it appends the adapter's id to extra_key; a client can send that id as its
    extra_key, and then shares exact prefixes with the adapter."""
    settings = {"enable_lora": True, "lora_paths": [str(make_adapter(models))]}
    settings |= {"lora_backend": "torch_native", "max_loras_per_batch": 2}
    settings |= {"kvshare_select": "trace", "mutation": "probes:no_pinning"}
    document = texts.passage(300)
    prompt = texts.passage(9) + document + texts.passage(20)
    with lab(llama, kvshare=True, **settings) as it:
        (adapter,) = it.ask("test_reports:lora_ids")
        it.one(document, lora=True)
        told = it.one(prompt, extra_key=adapter)["kvshare"]
        assert (told["copied_tokens"], told["declined"]) == (0, "lora")
        # Its own text a base request copies, by the selector that is served beside adapters.
        it.one(document)
        told = it.one(prompt)["kvshare"]
        assert told["copied_tokens"] > 200
        assert (told["select"], told["select_reason"]) == ("window", "lora")
        assert it.ask("probes:counts")["fallbacks"] == {("trace", "window", "lora"): 1}


def test_keys_of_adapters_requests_are_kept_as_short_names() -> None:
    """A client makes them as long as it likes, and they are known until all is flushed."""
    cache = Tree().cache
    cache.serves_adapters = True

    def asks(key: str, lora: str | None) -> Any:
        return scheduler._of_an_adapter(cache, SimpleNamespace(extra_key=key, lora_id=lora))

    tracemalloc.start()
    try:
        for i in range(20):
            assert asks(f"{i}" * 10**6, "adapter") is Decline.LORA
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 10**5
    assert asks("7" * 10**6, None) is Decline.LORA
    assert asks("7" * 10**6 + "8", None) is None
    cache.reset()
    assert asks("7" * 10**6, None) is None


def test_samples_of_one_prompt_reuse_as_a_single_one_does(llama: Path, texts: Texts) -> None:
    """vLLM 39647: SGLang sends a prompt of several samples once with no new tokens, then once a
    sample."""
    document, samples = texts.passage(600), 4
    with lab(llama, kvshare=True) as it:
        it.one(document)
        single = it.one(texts.passage(9) + document + texts.passage(20))
        prompt = texts.passage(9) + document + texts.passage(20)
        script: list[Any] = [request("warm", prompt, new=0), ("idle",)]
        script.append([request(f"{i}", prompt) for i in range(samples)])
        answers = it.play(script)
        rows = sum(computed(answer["kvshare"]) for answer in answers.values())
        assert rows <= computed(single["kvshare"]) + samples + 4, rows
        assert len({tuple(answers[f"{i}"]["output"]) for i in range(samples)}) == 1


def test_cached_tokens_are_counted_once_however_often_a_request_is_retracted(
    traced: Lab, texts: Texts
) -> None:
    """SGLang 11900: with each retraction the prefix of a request counted as cached once more, until
    more was cached than asked."""
    traced.flush()
    head, document = texts.passage(200), texts.passage(300)
    traced.one(head)
    traced.one(document)
    prompt = head + document + texts.passage(20)
    calm = traced.one(prompt, new=60)
    assert calm["cached"] >= 190
    assert calm["kvshare"]["copied_tokens"] > 200
    traced.flush()
    traced.one(head)
    traced.one(document)
    script: list[Any] = [request("often", prompt, new=60)]
    for _ in range(3):
        script += [("polls", 12), ("call", "probes:pause"), ("call", "probes:resume")]
    often = traced.play(script)["often"]
    assert often["retractions"] == 3
    assert often["cached"] == often["kvshare"]["exact_tokens"] == calm["cached"]
    told = [often["kvshare"][f"{of}_tokens"] for of in KINDS]
    assert told == [calm["kvshare"][f"{of}_tokens"] for of in KINDS]
    assert sum(told) == len(prompt)
    assert_clean(traced)


@pytest.mark.parametrize("reusing", [True, False], ids=["reusing", "new"])
def test_a_prompt_that_is_retracted_in_its_middle_is_told_and_counted_once(
    reusing: bool, traced: Lab, texts: Texts
) -> None:
    """A pause comes between two chunks: what had run until then was all that was told of it."""
    traced.flush()
    head, documents = texts.passage(120), [texts.passage(500) for _ in range(2)]
    if reusing:
        for document in documents:
            traced.one(texts.passage(9) + document)
    new = texts.passage(1000)
    prompt = head + documents[0] + new + documents[1] + texts.passage(20)
    before = traced.ask("probes:reported")
    pauses: list[Any] = [("polls", 2), ("call", "probes:pause"), ("call", "probes:resume")]
    answer = traced.play([request("often", prompt), *pauses * 2])["often"]
    assert answer["retractions"] >= 1
    told = [answer["kvshare"][f"{of}_tokens"] for of in KINDS]
    assert sum(told) == len(prompt)
    assert (answer["kvshare"]["copied_tokens"] > 0) == reusing
    # What had run is found in the tree when it goes on: no hit of anything.
    assert answer["cached"] == answer["kvshare"]["exact_tokens"] == 0
    assert answer["kvshare"]["blended_tokens"] == 0
    assert (answer["kvshare"]["fresh_tokens"] == len(prompt)) != reusing
    tokens, declines = traced.ask("probes:reported")
    assert [tokens[of] - before[0].get(of, 0) for of in KINDS] == told
    more = {why: n - before[1].get(why, 0) for why, n in declines.items()}
    assert {why: n for why, n in more.items() if n} == ({} if reusing else {"no_match": 1})
    assert_clean(traced)


def test_eight_at_once_and_ten_turns_add_up_however_often_they_are_paused(
    traced: Lab, texts: Texts
) -> None:
    traced.flush()
    documents = [texts.passage(300) for _ in range(4)]
    for document in documents:
        traced.one(texts.passage(9) + document)
    before, _ = traced.ask("probes:reported")
    total = dict.fromkeys(KINDS, 0)

    def add(answer: dict[str, Any], prompt: list[int]) -> None:
        told = {of: answer["kvshare"][f"{of}_tokens"] for of in KINDS}
        assert sum(told.values()) == len(prompt)
        assert min(told.values()) >= 0
        for of in KINDS:
            total[of] += told[of]

    def pauses(polls: int) -> list[Any]:
        return [("polls", polls), ("call", "probes:pause"), ("call", "probes:resume")]

    prompts = [
        texts.passage(40) + documents[i % 4] + texts.passage(200) + documents[(i + 1) % 4]
        for i in range(8)
    ]
    asked = [request(f"{i}", prompt) for i, prompt in enumerate(prompts)]
    answers = traced.play([asked, *pauses(2) * 4])
    assert any(answer["retractions"] for answer in answers.values())
    for i, prompt in enumerate(prompts):
        add(answers[f"{i}"], prompt)
    talk = texts.passage(30) + documents[0] + texts.passage(500)
    for turn in range(10):
        talk = talk + texts.passage(60)
        answer = traced.play([request("turn", talk), *pauses(1 + turn % 3)])["turn"]
        add(answer, talk)
        talk = talk + answer["output"]
    after, _ = traced.ask("probes:reported")
    assert {of: after[of] - before.get(of, 0) for of in KINDS} == total
    assert_clean(traced)


def test_text_of_other_embeddings_is_nobodys_source(traced: Lab, texts: Texts) -> None:
    """SGLang 27472: a request that brings embeddings for some of its tokens left its KV under the
    tokens, and others answered from it."""
    from sglang.srt.managers.embed_types import PositionalEmbeds

    traced.flush()
    document = texts.passage(300)
    others = PositionalEmbeds(embeds=torch.full((40, 128), 3.0), positions=list(range(20, 60)))
    fields = {"positional_embed_overrides": others}
    before = traced.ask("probes:check")["resident"]
    changed = traced.one(document, fields=fields)
    assert traced.ask("probes:check")["resident"] == before
    moved = traced.one(texts.passage(9) + document)
    assert (moved["kvshare"]["declined"], moved["cached"]) == ("no_match", 0)
    plain = traced.one(document)
    assert not torch.allclose(plain["logits"], changed["logits"], atol=0.1)
    # Nor does it take what is cached under its tokens.
    for prompt, positions in ((document, range(20, 60)), (texts.passage(9) + document, range(9))):
        others = PositionalEmbeds(
            embeds=torch.full((len(positions), 128), 3.0), positions=[*positions]
        )
        told = traced.one(prompt, fields={"positional_embed_overrides": others})
        assert (told["kvshare"]["declined"], told["cached"]) == ("multimodal", 0)
    again = traced.one(document, fields=fields)
    torch.testing.assert_close(again["logits"], changed["logits"], atol=1e-3, rtol=1e-3)
    assert_clean(traced)


def test_what_is_kept_stands_in_the_way_of_no_flush(llama: Path, texts: Texts) -> None:
    """AReaL 140, SGLang 12099: an update that was to flush ended the server, since something still
    held the cache. A turn that is kept for the next one holds it for no one who runs."""
    document = texts.passage(300)
    prompt = texts.passage(9) + document + texts.passage(20)
    with lab(llama, kvshare=True, kvshare_ttl=0.5, kvshare_select="trace") as it:
        it.one(document, kvshare={"ttl": 60})
        assert it.one(prompt, kvshare={"ttl": 60})["kvshare"]["copied_tokens"] > 200
        assert it.ask("probes:pins")["num"] == 2
        assert it.ask("probes:update_weights", str(llama))
        assert it.ask("probes:pins")["num"] == it.ask("probes:check")["resident"] == 0
        assert_clean(it)
        assert it.one(prompt)["kvshare"]["declined"] == "no_match"
