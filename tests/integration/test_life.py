"""Under a server's real life nothing leaks, nothing crashes and no request fails: memory pressure,
retraction, aborts, flushes, new weights, faults of our own."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import Texts
from lab import Lab, computed, lab, request
from tiny_models import EOS

TIGHT = {
    "max_total_tokens": 1400,
    "chunked_prefill_size": 160,
    "schedule_conservativeness": 0.3,
}
SETTINGS = {
    "overlap": {"disable_overlap_schedule": False},
    "no overlap, page 16": {"page_size": 16},
    "trace, refresh, overlap": {
        "kvshare_select": "trace",
        "kvshare_refresh_every": 2,
        "kvshare_refresh_above": 0.05,
        "kvshare_doubt": 0.1,
        "kvshare_doubt_shift": 0.2,
        "chunked_prefill_size": 1024,
        "disable_overlap_schedule": False,
    },
    "overlap, mixed chunks, page 16, our schedule": {
        "disable_overlap_schedule": False,
        "enable_mixed_chunk": True,
        "page_size": 16,
        "schedule_policy": "kvshare",
        "kvshare_schedule_bound": 2000,
    },
}


@pytest.fixture(scope="module", params=list(SETTINGS))
def tight(request: pytest.FixtureRequest, llama: Path) -> Iterator[Lab]:
    """A pool so small that requests evict, wait and are retracted."""
    with lab(llama, kvshare=True, **{**TIGHT, **SETTINGS[request.param]}) as it:
        yield it


def assert_clean(it: Lab) -> None:
    """Idle: SGLang's own leak checks have passed by now; ours must too."""
    state = it.ask("probes:check")
    assert state["protected"] == state["pins"] == 0
    assert state["resident"] == state["evictable"]
    assert state["available"] + state["evictable"] == state["total"]


KINDS = ("exact", "blended", "copied", "recomputed", "fresh")


def make_prompt(rng: random.Random, passages: list[list[int]], texts: Texts) -> list[int]:
    parts = rng.sample(passages, rng.randrange(1, 4))
    if rng.random() < 0.4:  # an edit
        i = rng.randrange(len(parts))
        at = rng.randrange(5, len(parts[i]) - 5)
        parts[i] = parts[i][:at] + texts.passage(rng.randrange(1, 4)) + parts[i][at + 1 :]
    middle = [token for part in parts for token in part]
    return texts.passage(rng.randrange(0, 9)) + middle + texts.passage(rng.randrange(1, 30))


def test_random_life_under_memory_pressure(tight: Lab, texts: Texts) -> None:
    rng = random.Random(5)
    passages = [texts.passage(rng.randrange(60, 200)) for _ in range(8)]
    reused, whole = 0, 0
    lengths: dict[str, int] = {}
    before = tight.ask("probes:counts")["tokens"]
    for round_ in range(6):
        script: list = []
        sent: list[str] = []
        aborted: set[str] = set()
        for i in range(16):
            rid = f"{round_}-{i}"
            sent.append(rid)
            prompt = make_prompt(rng, passages, texts)
            lengths[rid] = len(prompt)
            script.append(
                request(
                    rid,
                    prompt,
                    new=rng.randrange(1, 60),
                    kvshare=rng.choice([None, None, {"doubt": 0.1}, "exact", {"budget": 0.5}]),
                    extra_key=rng.choice([None, None, "tenant"]),
                )
            )
            roll = rng.random()
            if roll < 0.2:
                aborted.add(rng.choice(sent))
                script += [("polls", rng.randrange(1, 4)), ("abort", max(aborted))]
            elif roll < 0.3:
                script.append(("idle",))
            elif roll < 0.36:
                script += [("idle",), ("flush",)]
        answers = tight.play(script)
        for rid, answer in answers.items():
            # What ends a request is its length or our abort, never reuse. An abort in the queue
            # leaves no reason on the request.
            kind = (answer["finish"] or {"type": "abort"})["type"]
            assert kind == "length" or rid in aborted, (rid, answer["finish"])
            if kind == "length":
                whole += lengths[rid]
                # Planned anew, its answer so far is prompt too.
                told = sum(answer["kvshare"][f"{of}_tokens"] for of in KINDS)
                again = told - lengths[rid]
                assert 0 <= again <= len(answer["output"]) * bool(answer["retractions"])
        reused += sum((a["kvshare"] or {}).get("copied_tokens", 0) > 0 for a in answers.values())
        assert_clean(tight)
    assert reused > 10, "the mix must really reuse"
    after = tight.ask("probes:counts")["tokens"]
    assert after["copied"] > before.get("copied", 0)
    # Each request is counted once, whatever became of it.
    counted = sum(after.get(of, 0) - before.get(of, 0) for of in KINDS)
    assert whole <= counted <= sum(lengths.values())


def test_retracted_requests_give_the_answers_of_calm_ones(llama: Path, texts: Texts) -> None:
    a, b = texts.passage(150), texts.passage(130)
    prompts = [texts.passage(7) + b + a, a[20:] + b[10:], b + texts.passage(20) + a[:100]]
    with lab(llama, kvshare=True) as it:
        it.ask("probes:retract_every", 20)
        it.one(a + b)
        exact = [it.one(p, new=120, kvshare="exact", extra_key="e")["output"] for p in prompts]
        it.flush()
        it.one(a + b)
        script = [request(f"f{i}", p, new=200) for i, p in enumerate(prompts)]
        script += [
            request(f"e{i}", p, new=120, kvshare="exact", extra_key="e")
            for i, p in enumerate(prompts)
        ]
        before = it.ask("probes:counts")["tokens"]
        answers = it.play([script])
        assert sum(answer["retractions"] for answer in answers.values()) > 0
        after = it.ask("probes:counts")["tokens"]
        counted = sum(after.get(of, 0) - before.get(of, 0) for of in KINDS)
        assert counted == 2 * sum(map(len, prompts))
        for i, expected in enumerate(exact):
            assert answers[f"e{i}"]["output"] == expected
            assert len(answers[f"f{i}"]["output"]) == 200
        assert_clean(it)


def test_retracted_requests_with_logprobs_are_served(llama: Path, texts: Texts) -> None:
    """Planned anew, the answer so far is prompt too, and SGLang wants the logprobs of all of it."""
    a, b = texts.passage(150), texts.passage(130)
    prompts = [texts.passage(7) + b + a, a[20:] + b[10:], b + texts.passage(20) + a[:100]]
    with lab(llama, kvshare=True, kvshare_select="trace") as it:
        it.one(a + b)
        it.ask("probes:retract_every", 20)
        script = [request(f"{i}", p, new=120, logprob_start=-1) for i, p in enumerate(prompts)]
        script += [request("plain", texts.passage(40), new=120)]
        answers = it.play([script])
        assert sum(answers[f"{i}"]["retractions"] for i in range(3)) > 0
        for i in range(3):
            assert answers[f"{i}"]["kvshare"]["copied_tokens"] > 100
        assert all(len(answer["output"]) == 120 for answer in answers.values())
        assert_clean(it)


@pytest.mark.parametrize("turn", ["of a branch", "of a long prompt"])
def test_prompt_logprobs_beside_a_repair_that_does_not_fit_the_chunk(
    llama: Path, texts: Texts, turn: str
) -> None:
    """SGLang fills the chunk with a prompt whose logprobs are wanted, and rows before the chunk run
    besides: more passes than one, of which one must have all of these."""
    settings = {"chunked_prefill_size": 128, "kvshare_select": "trace", "kvshare_budget": 0.5}
    a, wanted = texts.passage(500), texts.passage(300)
    with lab(llama, kvshare=True, **settings) as it:
        alone = it.one(wanted, logprob_start=0, extra_key="x")
        it.one(a)
        prompt = texts.passage(9) + a[:200] + texts.passage(30)
        if turn == "of a branch":
            assert it.one(prompt)["kvshare"]["copied_tokens"] > 60
            prompt = prompt + texts.passage(70)
        else:
            prompt = texts.passage(5) + a[250:] + texts.passage(40) + a[:240] + texts.passage(20)
        both = it.play([[
            request("turn", prompt),
            request("wanted", wanted, logprob_start=0, extra_key="y"),
        ]])  # fmt: skip
        assert both["turn"]["kvshare"]["repaired_tokens"] > 0
        ours, theirs = (one["input_logprobs"][1:] for one in (both["wanted"], alone))
        assert len(ours) == len(theirs) == len(wanted) - 1
        assert ours == pytest.approx(theirs, abs=2e-3)
        assert both["wanted"]["output"] == alone["output"]
        assert_clean(it)


def test_sources_survive_the_pressure_of_their_own_reuse(llama: Path, texts: Texts) -> None:
    """The pool is full of sources; the request that copies them must evict others, not these."""
    passages = [texts.passage(180) for _ in range(5)]
    with lab(llama, kvshare=True, max_total_tokens=1100) as it:
        it.ask("probes:force_plans")
        for passage in passages:
            it.one(passage, new=2)
        prompt = texts.passage(5) + passages[0] + passages[1] + texts.passage(20)
        reused = it.one(prompt, new=2)
        assert reused["kvshare"]["copied_tokens"] > 200
        assert_clean(it)
        # The same with nothing that may be evicted but the sources: plain, and counted as such.
        it.flush()
        big = texts.passage(600)
        it.one(big, new=2)
        answer = it.one(texts.passage(5) + big, new=2)
        assert answer["finish"]["type"] == "length"
        assert answer["kvshare"]["declined"] == "no_room"
        assert_clean(it)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("page_size", [1, 16])
def test_sources_are_given_back_when_memory_runs_out(
    overlap: bool, page_size: int, llama: Path, texts: Texts
) -> None:
    """A long prefill holds its sources while another request decodes into the last free slots;
    mixed batches allocate without asking first."""
    a, running = texts.passage(1000), texts.passage(50)
    settings = {
        "max_total_tokens": 2096,
        "chunked_prefill_size": 2 * max(page_size, 8),
        "enable_mixed_chunk": True,
        "schedule_conservativeness": 0.01,
        "disable_overlap_schedule": not overlap,
        "page_size": page_size,
    }
    with lab(llama, kvshare=True, **settings) as it:
        it.one(a, new=1)
        it.ask("probes:count_yields")
        answers = it.play(
            [
                # From 0.5.22 on SGLang reserves all tokens of a request that ignores EOS; one that
                # may end, and is kept from it, still meets a pool that was promised twice.
                request("decode", running, new=400, ignore_eos=False, logit_bias={str(EOS): -1e9}),
                ("polls", 8),
                request("prefill", texts.passage(5) + a, new=1),
            ]
        )
        for answer in answers.values():
            assert answer["finish"]["type"] == "length"
        assert len(answers["decode"]["output"]) == 400
        assert it.ask("probes:yields") > 0, "memory never ran out"
        assert_clean(it)


@pytest.mark.parametrize(("low", "high"), [(8, 40), (51, 70), (200, 300)])
def test_sources_may_be_given_back_at_any_chunk(
    low: int, high: int, llama: Path, texts: Texts
) -> None:
    """In the fresh text before a run, in its head, and behind copies that were made."""
    a, b = texts.passage(300), texts.passage(300)
    prompt = texts.passage(50) + a + texts.passage(40) + b + texts.passage(90)
    with lab(llama, kvshare=True, chunked_prefill_size=32) as it:
        it.one(b + a, new=1)
        it.ask("probes:yield_once_between", low, high)
        answer = it.one(prompt, new=60, keep="kv")
        assert it.ask("probes:yields") == 1
        info = answer["kvshare"]
        assert info["copied_tokens"] + computed(info) == len(prompt)
        assert (info["declined"] == "no_room") == (info["copied_tokens"] == 0) == (low < 200)
        assert_clean(it)
        if not info["copied_tokens"]:
            fresh = it.one(prompt, new=60, kvshare="exact", extra_key="fresh")
            assert fresh["output"] == answer["output"]


def test_abort_in_the_middle_of_chunks_leaves_nothing(tight: Lab, texts: Texts) -> None:
    tight.flush()
    a = texts.passage(400)
    tight.one(a, new=1)
    for polls in range(1, 5):
        tight.play(
            [
                request("gone", texts.passage(3) + a[:380] + texts.passage(100), new=30),
                ("polls", polls),
                ("abort", "gone"),
            ]
        )
        assert_clean(tight)


def test_new_weights_flush_the_index_too(llama: Path, texts: Texts) -> None:
    a = texts.passage(300)
    prompt = texts.passage(9) + a
    with lab(llama, kvshare=True) as it:
        it.one(a)
        assert it.one(prompt)["kvshare"]["copied_tokens"] > 200
        assert it.ask("probes:update_weights", str(llama))
        assert it.ask("probes:check")["resident"] == 0
        assert it.one(prompt)["kvshare"]["declined"] == "no_match"


def test_a_fault_of_ours_declines_and_is_counted(llama: Path, texts: Texts) -> None:
    a = texts.passage(300)
    with lab(llama, kvshare=True) as it:
        it.one(a)
        it.ask("probes:break_lookup")
        answer = it.one(texts.passage(9) + a)
        assert answer["kvshare"]["declined"] == "fault"
        assert len(answer["output"]) == 8
        assert it.ask("probes:counts")["declines"]["fault"] == 1


def test_bad_options_that_reach_the_scheduler_are_declined_and_counted(
    llama: Path, texts: Texts
) -> None:
    """A process that tokenises without our hooks lets them pass; they once ended the server."""
    a = texts.passage(300)
    with lab(llama, kvshare=True) as it:
        it.one(a)
        for bad in ("exakt", {"budget": 9}, {"budgte": 1}, 5, ["exact"], {"mode": None}):
            answer = it.one(texts.passage(9) + a, kvshare=bad)
            assert answer["kvshare"]["declined"] == "bad_options", bad
            assert len(answer["output"]) == 8
        assert it.ask("probes:counts")["declines"]["bad_options"] == 6
        assert it.one(texts.passage(9) + a)["kvshare"]["copied_tokens"] > 200
        assert_clean(it)


NAN, INF = float("nan"), float("inf")
ODD = (
    *(True, False, None, "x", "", NAN, INF, -1, 0, 1.5, 1e-40, 1e39, 2**31, 10**400),
    *([], [1], {}, {"5": 1}, {"5": "x"}, {"5": NAN}, {"5": None}, {"5": 10**400}),
)


def test_what_is_let_through_of_the_sampling_parameters_ends_no_scheduler(
    llama: Path, texts: Texts
) -> None:
    """Each of them, those of a later SGLang too, with each value: a stream of tokens that are drawn
    from a few likely ones, which fails where one of them is no number."""
    settings = {"context_length": 160, "log_level": "critical", "max_running_requests": 64}
    with lab(llama, kvshare=True, **settings) as it:
        drawn = {"temperature": 1.0, "top_k": 5, "max_new_tokens": 2, "ignore_eos": False}
        names = set(it.ask("probes:sampling_parameters")) - {"custom_params"}
        given = [{**drawn, name: odd} for name in sorted(names) for odd in ODD]
        names -= {"beam_width"}  # of 5, in SGLang 0.5.23, end a scheduler that has no 5 rows free
        given += [
            {**drawn, "is_normalized": True, name: odd} for name in sorted(names) for odd in (0, 5)
        ]
        fine = [one for one, passes in zip(given, it.ask("probes:verified", given), strict=True)
                if passes]  # fmt: skip
        assert len(fine) > len(names)
        asked = [
            request(f"{i}: {one}", texts.passage(5), fields={"stream": True}, **one)
            for i, one in enumerate(fine)
        ]
        answers = it.play([asked[i : i + 64] for i in range(0, len(asked), 64)])
        assert len(answers) > len(asked) // 2  # some are refused before they wait
        for name, answer in answers.items():
            assert answer["finish"] is not None, name
        assert len(it.one(texts.passage(9))["output"]) == 8
        assert_clean(it)


def test_what_no_front_end_looked_at_is_refused_in_the_scheduler(llama: Path, texts: Texts) -> None:
    """Of the kind that SGLang declares, for others cannot say anything else; a refused request
    still runs a token, among others."""
    with lab(llama, kvshare=True) as it:
        for odd, words in (
            ({"top_k": 2**31}, "top_k must be a whole number up to 2147483647, got 2147483648"),
            ({"logit_bias": {"5": INF}}, "logit_bias of token 5 must be a number in"),
            ({"repetition_penalty": 1e-40}, "repetition_penalty must be a number of at least"),
            ({"temperature": 1e39}, "temperature must be 0 or a number in"),
        ):
            asked = {"temperature": 1.0, "top_k": 5, **odd}
            good = [request(f"{i}", texts.passage(20), temperature=1.0, top_k=5) for i in range(2)]
            answers = it.play([[good[0], request("odd", texts.passage(20), **asked), good[1]]])
            assert answers["odd"]["finish"]["type"] == "abort", odd
            assert words in answers["odd"]["finish"]["message"]
            assert all(len(answers[name]["output"]) == 8 for name in "01")
        assert_clean(it)


def test_a_fault_while_a_prompt_is_planned_in_chunks_costs_reuse_only(
    llama: Path, texts: Texts
) -> None:
    a = texts.passage(300)
    settings = {"chunked_prefill_size": 128, "kvshare_select": "dhd"}
    with lab(llama, kvshare=True, **settings) as it:
        it.one(a)
        it.ask("probes:break_structural_plans")
        answer = it.one(texts.passage(140) + a)
        assert answer["kvshare"]["declined"] == "fault"
        assert len(answer["output"]) == 8
        assert_clean(it)


def test_a_copy_that_fails_runs_every_row(llama: Path, texts: Texts) -> None:
    a = texts.passage(300)
    prompt = texts.passage(9) + a
    with lab(llama, kvshare=True, chunked_prefill_size=128) as it:
        it.one(a)
        expected = it.one(prompt, extra_key="other", kvshare="exact")["output"]
        it.ask("probes:break_copy")
        answer = it.one(prompt)
        assert answer["output"] == expected
        assert answer["kvshare"]["declined"] == "fault"
        assert computed(answer["kvshare"]) == len(prompt)
        assert_clean(it)


def test_odd_prompts(kv_lab: Lab, texts: Texts) -> None:
    for prompt in ([5], [5] * 15, [5] * 16, [5] * 900, texts.passage(16), texts.passage(17)):
        for rest in ([], [7], texts.passage(40)):
            first = kv_lab.one(prompt + rest)
            again = kv_lab.one(rest + prompt + prompt)
            assert len(first["output"]) == len(again["output"]) == 8
    assert_clean(kv_lab)


def test_hidden_states_in_a_batch_with_reuse(llama: Path, texts: Texts) -> None:
    """SGLang hands out a batch's hidden states by the length of each prompt."""
    a, mine, other = texts.passage(300), texts.passage(40), texts.passage(500)
    moved = texts.passage(4) + a
    with lab(llama, kvshare=True, enable_return_hidden_states=True) as it:
        alone = it.one(mine, hidden_states=True, new=3)["hidden_states"]
        it.flush()
        it.one(a)
        batch = it.play(
            [
                [
                    # First: a batch that is charged by rows would have it wait.
                    request("mine", mine, hidden_states=True, new=3, extra_key="x"),
                    request("reuse", moved),
                    request("other", other),
                ]
            ]
        )
        assert batch["mine"]["kvshare"]["declined"] == "hidden_states"
        assert computed(batch["reuse"]["kvshare"]) == 304
        assert batch["reuse"]["kvshare"]["declined"] == "every_row"
        again = it.one(moved, kvshare="exact")
        assert again["kvshare"]["exact_tokens"] == 303  # nothing of it was copied
        got = batch["mine"]["hidden_states"]
        assert [len(part) for part in got] == [len(part) for part in alone]
        for ours, theirs in zip(got, alone, strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=1e-3)
        assert_clean(it)


def test_prompt_logprobs_and_plain_requests_share_a_batch_with_reuse(
    kv_lab: Lab, texts: Texts
) -> None:
    a, b = texts.passage(300), texts.passage(90)
    kv_lab.flush()
    alone = kv_lab.one(b, logprob_start=0, extra_key="x")
    kv_lab.flush()
    kv_lab.one(a)
    answers = kv_lab.play(
        [
            [
                # First: a batch that is charged by rows would have them wait.
                request("logprobs", b, logprob_start=0, extra_key="y"),
                request("both", texts.passage(4) + a, logprob_start=10),
                request("reuse", texts.passage(4) + a, logprob_start=-1),
            ]
        ]
    )
    assert answers["reuse"]["kvshare"]["copied_tokens"] > 200
    assert answers["both"]["kvshare"]["declined"] == "prompt_logprobs"
    ours = [x for x in answers["logprobs"]["input_logprobs"] if x is not None]
    theirs = [x for x in alone["input_logprobs"] if x is not None]
    assert len(ours) == len(theirs) == len(b) - 1
    assert ours == pytest.approx(theirs, abs=1e-3)
