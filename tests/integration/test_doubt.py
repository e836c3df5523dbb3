"""Tokens in doubt: from the first of them on an answer is full prefill's, whatever was before."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Texts
from lab import Lab, lab, request
from test_check import moved
from test_life import assert_clean
from tiny_models import make_adapter

TOL = {"atol": 2e-3, "rtol": 1e-3}
EVERY = {"doubt": 1000}
COPIES = {"kvshare_select": "trace", "kvshare_budget": 1e-6}  # so that answers would be others
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "overlap, page 16": {"disable_overlap_schedule": False, "page_size": 16},
    "chunks, overlap": {"disable_overlap_schedule": False, "chunked_prefill_size": 96},
    "mixed chunks, page 16": {
        "disable_overlap_schedule": False, "enable_mixed_chunk": True, "page_size": 16,
        "chunked_prefill_size": 96,
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=list(SETTINGS))
def it(request: pytest.FixtureRequest, llama: Path) -> Iterator[Lab]:
    with lab(llama, kvshare=True, **COPIES, **SETTINGS[request.param]) as it:
        yield it


def exact(it: Lab, prompt: list[int], *, new: int) -> dict[str, Any]:
    """What full prefill says, to someone who shares with nobody."""
    return it.one(prompt, kvshare="exact", extra_key="alone", new=new, keep="kv")


def assert_same(part: dict[str, Any], full: dict[str, Any]) -> None:
    assert part["output"] == full["output"]
    for mine, theirs in zip(part["kv"], full["kv"], strict=True):
        torch.testing.assert_close(mine, theirs, **TOL)


def test_a_first_token_in_doubt_makes_the_request_exact(it: Lab, texts: Texts) -> None:
    """And what it leaves: who asks for full prefill finds it there."""
    source, prompt = moved(texts, 150)
    it.flush()
    it.one(source, new=1)
    full = exact(it, prompt, new=12)
    part = it.one(prompt, kvshare=EVERY, new=12, keep="kv")
    told = part["kvshare"]
    assert told["copied_tokens"] > 200
    assert told["copied_tokens"] < told["settled_tokens"] <= len(prompt)
    assert_same(part, full)
    torch.testing.assert_close(part["logits"], full["logits"], **TOL)
    again = it.one(prompt, kvshare="exact", new=12, keep="kv")
    assert again["kvshare"]["exact_tokens"] >= len(prompt) - 16
    assert_same(again, full)
    assert it.ask("probes:plain_keys_of_depth") <= {0}
    assert_clean(it)


def test_the_oracle_above_can_fail(it: Lab, texts: Texts) -> None:
    source, prompt = moved(texts, 150)
    it.flush()
    it.one(source, new=1)
    part, full = it.one(prompt, new=12, keep="kv"), exact(it, prompt, new=12)
    assert "settled_tokens" not in part["kvshare"]
    assert (part["logits"] - full["logits"]).abs().max() > 0.1


def test_a_later_token_in_doubt_leaves_those_before_as_they_are(it: Lab, texts: Texts) -> None:
    """Whatever the margin asked for: up to some token the answer is that of copies, from there on
    what full prefill says to all before."""
    source, prompt = moved(texts, 150)
    settled_at = set()
    it.flush()
    it.one(source, new=1)
    copies = it.one(prompt, new=24)["output"]
    for doubt in (0.02, 0.05, 0.1, 0.2, 0.4, 0.8):
        it.flush()
        it.one(source, new=1)
        part = it.one(prompt, kvshare={"doubt": doubt}, new=24)
        told, output = part["kvshare"], part["output"]
        settled = told.get("settled_tokens")
        if settled is None:
            assert output == copies
            continue
        begins = told["exact_tokens"] + 20  # where what is copied begins: behind new text
        at = settled + begins - len(prompt)
        settled_at.add(at)
        assert output[:at] == copies[:at]
        assert output[at:] == exact(it, prompt + output[:at], new=24 - at)["output"]
        assert_clean(it)
    assert any(at > 0 for at in settled_at), settled_at


def test_each_in_a_batch_doubts_for_itself(it: Lab, texts: Texts) -> None:
    """Requests that decode side by side, each with a margin of its own, beside an exact one and
    another that comes meanwhile: as above for each, and the KV of who settled is full prefill's."""
    pairs = [moved(texts, length) for length in (90, 110, 130)]
    doubts = {"a": (0, 0.05), "b": (1, 0.15), "c": (2, 0.4)}
    it.flush()
    sources = [request(f"s{i}", source, new=1) for i, (source, _) in enumerate(pairs)]
    it.play(sources)
    copies = [it.one(prompt, new=24)["output"] for _, prompt in pairs]
    it.flush()
    script = [*sources, ("idle",), [
        request("x", pairs[0][1], kvshare="exact", extra_key="x", new=24),
        *(request(name, pairs[i][1], kvshare={"doubt": doubt}, new=24, keep="kv")
          for name, (i, doubt) in doubts.items()),
    ], ("polls", 6), request("late", pairs[0][1], kvshare="exact", extra_key="y", new=4),
    ]  # fmt: skip
    answers, settled = it.play(script), 0
    for name, (i, _) in doubts.items():
        prompt, told, output = pairs[i][1], answers[name]["kvshare"], answers[name]["output"]
        at = told.get("settled_tokens", 10**6) + told["exact_tokens"] + 20 - len(prompt)
        assert output[:at] == copies[i][:at]
        if at < 24:
            settled += 1
            full = exact(it, prompt + output[:at], new=24 - at)
            assert output[at:] == full["output"]
            for mine, theirs in zip(answers[name]["kv"], full["kv"], strict=True):
                torch.testing.assert_close(mine, theirs[:, : len(prompt)], **TOL)
    assert settled >= 2
    full = exact(it, pairs[0][1], new=24)
    assert answers["x"]["output"] == full["output"]
    assert answers["late"]["output"] == full["output"][:4]
    assert_clean(it)


def test_what_others_read_stays_as_it_is(it: Lab, texts: Texts) -> None:
    """The same prompt for one that lives with reuse and, meanwhile, for one that doubts it: these
    share slots until then."""
    source, prompt = moved(texts, 150)
    it.flush()
    it.one(source, new=1)
    alone, full = it.one(prompt, new=40), exact(it, prompt, new=12)
    both = it.play([
        request("lives", prompt, new=40),
        ("polls", 6),
        request("doubts", prompt, kvshare=EVERY, new=12, keep="kv"),
        request("turn", prompt + texts.passage(40), new=4),
    ])  # fmt: skip
    assert both["lives"]["output"] == alone["output"]
    assert both["doubts"]["kvshare"]["blended_tokens"] > 200
    assert both["doubts"]["kvshare"]["settled_tokens"] > 200
    assert_same(both["doubts"], full)
    assert_clean(it)


def test_many_at_once_and_the_next_turn(it: Lab, texts: Texts) -> None:
    pairs = [moved(texts, length) for length in (90, 140, 110)]
    it.flush()
    it.play([request(f"s{i}", source, new=1) for i, (source, _) in enumerate(pairs)])
    modes = (EVERY, EVERY, None, "exact")
    sent = [(i, mode) for i in range(3) for mode in modes]
    answers = it.play([[
        request(f"{i}{n}", pairs[i][1], kvshare=mode, new=20, keep="kv")
        for n, (i, mode) in enumerate(sent)
    ]])  # fmt: skip
    full = {i: exact(it, pairs[i][1], new=20) for i in range(3)}
    for n, (i, mode) in enumerate(sent):
        if mode is not None:
            assert_same(answers[f"{i}{n}"], full[i])
    turn = pairs[0][1] + full[0]["output"] + texts.passage(30)
    asked = it.one(turn, new=4, keep="kv")
    assert asked["kvshare"]["exact_tokens"] >= len(pairs[0][1])
    assert_same(asked, exact(it, turn, new=4))
    assert_clean(it)


def test_a_drawn_token_is_never_in_doubt(it: Lab, texts: Texts) -> None:
    source, prompt = moved(texts, 150)
    it.flush()
    it.one(source, new=1)
    part = it.one(prompt, kvshare=EVERY, new=4, temperature=0.7)
    assert part["kvshare"]["copied_tokens"] > 200
    assert "settled_tokens" not in part["kvshare"]


def test_what_a_request_asks_of_its_tokens_is_part_of_the_margin(it: Lab, texts: Texts) -> None:
    """Logits of the tiny model lie within 50 nats; a bias of 1000 leaves nothing to doubt, and the
    same for two tokens all that was between these."""
    source, prompt = moved(texts, 150)
    it.flush()
    it.one(source, new=1)
    asked = {"kvshare": {"doubt": 50}, "new": 4}
    sure = it.one(prompt, **asked, logit_bias={"7": 1000.0})
    assert sure["kvshare"]["copied_tokens"] > 200
    assert "settled_tokens" not in sure["kvshare"]
    assert sure["output"] == [7] * 4
    two = {"logit_bias": {"7": 1000.0, "8": 1000.0}}
    part = it.one(prompt, **asked, **two)
    assert part["kvshare"]["settled_tokens"] > 200
    full = it.one(prompt, kvshare="exact", extra_key="alone", new=4, **two)
    assert set(part["output"]) <= {7, 8}
    assert part["output"] == full["output"]
    assert_clean(it)


@pytest.mark.parametrize("end", ["length", "token"])
def test_behind_its_end_an_answer_is_not_doubted(it: Lab, texts: Texts, end: str) -> None:
    """With the overlap scheduler a request that is through is in one batch more."""

    def play(**options: Any) -> dict[str, Any]:
        it.flush()
        it.one(source, new=1)
        return it.one(prompt, **options)

    ended, doubts = 0, (0.02, 0.05, 0.1, 0.2, 0.4)
    for n, (length, doubt) in enumerate(itertools.product((150, 130, 110, 90), doubts)):
        if n % len(doubts) == 0:
            source, prompt = moved(texts, length)
            copies = play(new=24)["output"]
        told = play(kvshare={"doubt": doubt}, new=24)["kvshare"]
        at = told.get("settled_tokens", 10**6) + told["exact_tokens"] + 20 - len(prompt)
        if not 0 < at < 24 or (end == "token" and copies[at - 1] in copies[: at - 1]):
            continue
        ended += 1
        before = it.ask("probes:counts")["doubts"]
        stopped = {"stop_token_ids": [copies[at - 1]], "ignore_eos": False}
        ends = {"new": at} if end == "length" else {"new": 24, **stopped}
        assert play(kvshare={"doubt": doubt}, **ends)["output"] == copies[:at]
        assert it.ask("probes:counts")["doubts"] == before
        assert_clean(it)
        if ended == 2:
            return
    assert ended


@pytest.mark.parametrize("overlap", [False, True])
def test_where_a_grammar_leaves_one_token_none_is_in_doubt(
    model: Path, texts: Texts, overlap: bool
) -> None:
    """And where it leaves some, the one that is taken is full prefill's under the same grammar."""
    source, prompt = moved(texts, 150)
    settings = {"skip_tokenizer_init": False, "grammar_backend": "xgrammar"}
    with lab(model, kvshare=True, disable_overlap_schedule=not overlap, **settings, **COPIES) as it:
        it.one(source, new=1)
        sure = it.one(prompt, kvshare=EVERY, new=4, regex="~~~~")
        assert sure["kvshare"]["copied_tokens"] > 200
        assert "settled_tokens" not in sure["kvshare"]
        some = {"regex": "[a-e]+", "new": 12}
        part = it.one(prompt, kvshare=EVERY, keep="kv", **some)
        full = it.one(prompt, kvshare="exact", extra_key="alone", keep="kv", **some)
        assert part["kvshare"]["settled_tokens"] > 200
        assert_same(part, full)
        assert_clean(it)


def test_where_memory_is_short_the_answer_goes_on(llama: Path, texts: Texts) -> None:
    """What a request hit of a branch is others' too, and there is no room for its own."""
    source, prompt = moved(texts, 150)
    with lab(llama, kvshare=True, max_total_tokens=1100, **COPIES) as it:
        it.one(source, new=1)
        script = [
            request("lives", prompt, new=60),
            ("polls", 4),
            request("full", texts.passage(560), new=60, extra_key="other"),
            ("polls", 4),
            request("doubts", prompt, kvshare=EVERY, new=20),
        ]
        answers = it.play(script)
        assert answers["doubts"]["kvshare"]["blended_tokens"] > 200
        assert answers["doubts"]["output"] == answers["lives"]["output"][:20]
        assert it.ask("probes:counts")["doubts"] == {"no_room": 1}
        assert_clean(it)


def test_room_is_made_of_what_nobody_holds(llama: Path, texts: Texts) -> None:
    """Here of the source, while the batch runs."""
    source, prompt = moved(texts, 150)
    with lab(llama, kvshare=True, max_total_tokens=1000, **COPIES) as it:
        full = exact(it, prompt, new=20)
        it.flush()
        it.one(source, new=1)
        script = [
            request("lives", prompt, new=40),
            ("polls", 4),
            request("doubts", prompt, kvshare=EVERY, new=20, keep="kv"),
        ]
        answers = it.play(script)
        assert answers["doubts"]["kvshare"]["settled_tokens"] > 200
        assert_same(answers["doubts"], full)
        assert it.one(source, new=1)["kvshare"]["exact_tokens"] < len(source) - 1  # it went
        assert_clean(it)


@pytest.mark.parametrize("page_size", [1, 16])
def test_who_settled_is_exact_also_when_retracted(
    llama: Path, texts: Texts, page_size: int
) -> None:
    pairs = [moved(texts, length) for length in (90, 140, 110)]
    with lab(llama, kvshare=True, page_size=page_size, **COPIES) as it:
        full = [exact(it, prompt, new=40)["output"] for _, prompt in pairs]
        it.ask("probes:retract_every", 5)
        it.play([request(f"s{i}", source, new=1) for i, (source, _) in enumerate(pairs)])
        answers = it.play([[
            request(f"d{i}", prompt, kvshare=EVERY, new=40) for i, (_, prompt) in enumerate(pairs)
        ], ("polls", 9), ("abort", "d2")])  # fmt: skip
        assert sum(answer["retractions"] for answer in answers.values()) > 0
        for i in (0, 1):
            assert answers[f"d{i}"]["output"] == full[i]
            assert answers[f"d{i}"]["kvshare"]["settled_tokens"] > 100
        assert it.ask("probes:counts")["doubts"] == {"settled": 3}
        assert_clean(it)


def test_with_adapters_no_token_is_settled(llama: Path, models: Path, texts: Texts) -> None:
    """SGLang lays their segments out for the batch: one in between would mislay them."""
    source, prompt = moved(texts, 150)
    settings = {"enable_lora": True, "lora_paths": [str(make_adapter(models))]}
    settings |= {"lora_backend": "torch_native", "kvshare_select": "window"}
    settings |= {"mutation": "probes:no_pinning"}
    with lab(llama, kvshare=True, **settings) as it:
        it.one(source, new=1)
        copies = it.one(prompt, new=12)
        it.flush()
        it.one(source, new=1)
        part = it.one(prompt, kvshare=EVERY, new=12)
        assert part["kvshare"]["copied_tokens"] > 200
        assert part["output"] == copies["output"]
        assert it.ask("probes:counts")["doubts"] == {"lora": 1}
        assert_clean(it)


@pytest.mark.parametrize("what", ["the pass", "the margin"])
def test_a_fault_leaves_the_answer_that_there_was(llama: Path, texts: Texts, what: str) -> None:
    source, prompt = moved(texts, 150)
    with lab(llama, kvshare=True, kvshare_doubt=1000, **COPIES) as it:
        it.one(source, new=1)
        copies = it.one(prompt, kvshare={"doubt": 0}, new=12)
        assert "settled_tokens" not in copies["kvshare"]
        it.flush()
        it.one(source, new=1)
        it.ask("probes:break_doubts", what)
        part = it.one(prompt, new=12)
        assert part["output"] == copies["output"]
        assert it.ask("probes:counts")["doubts"] == {"fault": 1}  # and not at each token
        assert_clean(it)
