"""What a server remembers over many requests: conversations that began with reused text, and text
that paid, which stays when memory gets short."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Texts
from lab import Lab, computed, lab, request
from test_life import assert_clean


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
    """Whether it was copied, behind other words, or asked for again as it is, or with questions,
    which are evicted before it: then it is all that is left, and yet no conversation's own."""
    with lab(llama, kvshare=True, kvshare_eviction=eviction, max_total_tokens=1500) as it:
        for before, after in ((9, 0), (0, 0), (0, 20)):
            paid = texts.passage(300)

            def reused(paid: list[int] = paid, before: int = before, after: int = after) -> int:
                prompt = texts.passage(before) + paid + texts.passage(after)
                told = it.one(prompt, new=1)["kvshare"]
                return int(told["copied_tokens"] + told["exact_tokens"])

            it.one(paid)
            assert min(reused() for _ in range(3)) > 200
            for _ in range(3):
                for _ in range(5):  # none of it is ever asked for again
                    it.one(texts.passage(300), new=1)
                assert (reused() > 200) == stays, (before, after)
                if not stays:
                    break


@pytest.mark.parametrize(
    "settings",
    [{}, {"kvshare_eviction": "sglang"}, {"page_size": 16}],
    ids=["defaults", "SGLang's eviction", "pages of 16"],
)
def test_copies_go_before_the_text_that_hangs_on_them(
    settings: dict[str, Any], llama: Path, texts: Texts
) -> None:
    """A header that is new in every turn: each turn leaves a branch of copies with a little new
    text at its end. Three prompts fill the pool; the new text of all turns is found anyway."""
    with lab(llama, kvshare=True, kvshare_select="trace", max_total_tokens=4496, **settings) as it:
        document, history = texts.passage(500), []
        for turn in range(14):
            prompt = texts.passage(20) + document + history + texts.passage(60)
            answer = it.one(prompt, new=6)
            told = answer["kvshare"]
            if turn:
                assert told["declined"] is None, (turn, told)
                assert computed(told) < 0.15 * len(prompt) + 180 + 16 * turn, (turn, told)
            history = prompt[520:] + answer["output"] + texts.passage(54)
            assert_clean(it)
        assert it.ask("probes:cut_off") > 5
        # Nothing of a branch is left behind once all of it is gone.
        for _ in range(4):
            it.one(texts.passage(1400), new=1)
        it.ask("probes:check")


@pytest.mark.parametrize(("at_once", "pool"), [(True, 2.5), (False, 1.25)])
def test_conversations_side_by_side_keep_their_text(
    at_once: bool, pool: float, llama: Path, texts: Texts
) -> None:
    """Eight of them with a new clock in front of every turn, in a pool for as many of their last
    prompts; with all eight at once these, and what they copy, are two. The copies that earlier
    turns left fill the rest: they go before any text that one of the eight still needs, though it
    is what others are about to copy that hangs on them."""
    turns, num = 6, 8
    tokens = int(pool * num * (20 + 300 + turns * 46))
    with lab(llama, kvshare=True, kvshare_select="trace", max_total_tokens=tokens) as it:
        histories = [texts.passage(300) for _ in range(num)]
        for turn in range(turns):
            prompts = [texts.passage(20) + history + texts.passage(40) for history in histories]
            asks = [request(str(i), prompt, new=6) for i, prompt in enumerate(prompts)]
            answers: dict[str, dict[str, Any]] = {}
            for step in [asks] if at_once else asks:
                answers |= it.play([step])
            rows = [computed(answers[str(i)]["kvshare"]) for i in range(num)]
            assert turn == 0 or max(rows) < 180, (turn, rows)
            histories = [
                prompt[20:] + answers[str(i)]["output"] for i, prompt in enumerate(prompts)
            ]
            assert_clean(it)


def test_of_a_branch_the_last_copies_go_first(llama: Path, texts: Texts) -> None:
    """What is before them stays a prefix."""
    with lab(llama, kvshare=True, max_total_tokens=1900) as it:
        first, second = texts.passage(300), texts.passage(300)
        it.one(first, new=1)
        it.one(second, new=1)
        branch = [texts.passage(20), first, texts.passage(60), second, texts.passage(60)]
        it.one([token for part in branch for token in part], new=1)  # 740 tokens, 560 are left
        it.one(texts.passage(640), new=1)
        assert it.ask("probes:cut_off") == 1
        assert_clean(it)
        again = it.one(branch[0] + first + branch[2] + texts.passage(30), new=1)["kvshare"]
        assert again["exact_tokens"] + again["blended_tokens"] >= 370, again


def test_only_a_lack_of_memory_costs_others_their_copies(llama: Path, texts: Texts) -> None:
    """SGLang refuses for other reasons too."""
    with lab(llama, kvshare=True, prefill_max_requests=1) as it:
        document, said = texts.passage(300), texts.passage(200)
        it.one(document, new=1)
        it.one(texts.passage(20) + document + said, new=1)
        asks = [texts.passage(9) + said + texts.passage(50 + i) for i in range(3)]
        answers = it.play([[request(f"r{i}", ask, new=4) for i, ask in enumerate(asks)]])
        assert all(one["kvshare"]["copied_tokens"] > 100 for one in answers.values())
        assert it.ask("probes:cut_off") == 0


def test_text_whose_branch_was_cut_has_the_kv_that_it_had(llama: Path, texts: Texts) -> None:
    with lab(llama, kvshare=True, max_total_tokens=1500) as it:
        document, said = texts.passage(400), texts.passage(150)
        it.one(document, new=1)
        first = it.one(texts.passage(20) + document + said, new=1, keep="kv")
        it.one(texts.passage(700), new=1)
        assert it.ask("probes:cut_off") == 1
        assert_clean(it)
        again = it.one(
            texts.passage(420) + said + texts.passage(9), kvshare={"budget": 0}, keep="kv"
        )
        assert again["kvshare"]["copied_tokens"] > 100
        for was, now in zip(first["kv"], again["kv"], strict=True):
            torch.testing.assert_close(now[:, 440:560], was[:, 440:560], atol=1e-5, rtol=1e-5)


def test_sources_lock_no_copies_that_stand_before_them(llama: Path, texts: Texts) -> None:
    """The prompt fits beside the text that it reuses, but not beside the branch which that ends."""
    with lab(llama, kvshare=True, max_total_tokens=1500) as it:
        document, said = texts.passage(300), texts.passage(300)
        it.one(document, new=1)
        it.one(texts.passage(9) + document + said, new=1)
        told = it.one(texts.passage(9) + said + texts.passage(700), new=4)["kvshare"]
        assert told["copied_tokens"] > 100, told
        assert it.ask("probes:cut_off") == 1
        assert_clean(it)


def test_a_prefix_that_is_in_use_is_not_cut_for_text_that_never_was(
    llama: Path, texts: Texts
) -> None:
    """A conversation that reused once stays a prefix while others' text comes and goes."""
    with lab(llama, kvshare=True, kvshare_select="trace", max_total_tokens=3000) as it:
        document = texts.passage(400)
        it.one(document, new=1)
        prompt = texts.passage(30) + document + texts.passage(40)
        for turn in range(6):
            answer = it.one(prompt, new=4)
            if turn:
                rows = computed(answer["kvshare"])
                assert rows <= 40 + 2 + 1.5 * 0.15 * 120 + 1, (turn, answer["kvshare"])
            for _ in range(3):
                it.one(texts.passage(300), new=1)
            prompt += answer["output"] + texts.passage(40)
        assert_clean(it)


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
            request("waits", texts.passage(90) + source + texts.passage(120), new=4),
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


def programs(texts: Texts, *, clock: bool) -> list[list[int]]:
    """Prompts of six programs of six turns, four at a time in any order, and in between of users
    who ask once. With a clock each turn begins with new words."""
    shared = texts.passage(40)
    waiting = [[*shared, *texts.passage(90)] for _ in range(6)]
    live, turns, prompts = [waiting.pop() for _ in range(4)], [0] * 4, []
    while live:
        if texts.rng.random() < 0.2:
            prompts.append(texts.passage(130))
            continue
        i = texts.rng.randrange(len(live))
        prompts.append([*(texts.passage(4) if clock else []), *live[i]])
        live[i] = [*live[i], *texts.passage(40)]
        turns[i] += 1
        if turns[i] == 6:
            if waiting:
                live[i], turns[i] = waiting.pop(), 0
            else:
                del live[i], turns[i]
    return prompts


@pytest.mark.parametrize("page", [1, 16])
def test_programs_in_a_full_pool_run_no_more_than_under_sglangs_own_eviction(
    page: int, llama: Path, texts: Texts
) -> None:
    """Where frequency counted a conversation's own turns, what had ended outlived what went on:
    nearly twice the rows. Answers of one token leave nothing behind; of longer ones the history
    keeps nothing either, as clients do with thoughts, and they hang beside what goes on."""
    plain, clock = (programs(texts, clock=clock) for clock in (False, True))
    rows: dict[str, list[int]] = {}
    for name, settings in {
        "stock": {},
        "lru": {"kvshare": True, "kvshare_eviction": "sglang"},
        "ours": {"kvshare": True},
    }.items():
        rows[name] = []
        with lab(llama, max_total_tokens=1504, page_size=page, **settings) as it:
            for prompts, new in ((plain, 1), (plain, 6), (clock, 6)):
                if name == "lru" and prompts is plain:
                    rows[name].append(0)  # nobody looks at
                    continue
                it.flush()
                ran = 0
                for prompt in prompts:
                    answer = it.one(prompt, new=new)
                    told = answer.get("kvshare")
                    ran += computed(told) if told else len(prompt) - answer["cached"]
                rows[name].append(ran)
    assert rows["ours"][0] <= 1.02 * rows["stock"][0]
    assert rows["ours"][1] <= 1.05 * rows["stock"][1]
    assert rows["ours"][2] <= 1.05 * rows["lru"][2]
    assert rows["ours"][2] < 0.8 * rows["stock"][2]
