"""Exact stays exact: whatever reuse did before, an exact request gets what a server without
kvshare gives, in tokens and in KV."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Texts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lab import Lab, lab, request

from kvshare_sglang.policy.select.base import SINK

SETTINGS = {
    "whole": {},
    "trace, chunked, page 16, overlap": {
        "kvshare_select": "trace",
        "chunked_prefill_size": 128,
        "page_size": 16,
        "disable_overlap_schedule": False,
    },
    "trace, refresh, overlap": {
        "kvshare_select": "trace",
        "kvshare_refresh_every": 1,
        "kvshare_refresh_above": 0.0,
        "disable_overlap_schedule": False,
    },
}


def plain(settings: dict[str, Any]) -> dict[str, Any]:
    """For a server without kvshare."""
    return {name: value for name, value in settings.items() if not name.startswith("kvshare")}


@pytest.fixture(scope="module", params=list(SETTINGS))
def both(request: pytest.FixtureRequest, llama: Path) -> Iterator[tuple[Lab, Lab]]:
    """A lab with kvshare and one without, in the same setting."""
    with (
        lab(llama, kvshare=True, **SETTINGS[request.param]) as ours,
        lab(llama, **plain(SETTINGS[request.param])) as theirs,
    ):
        yield ours, theirs


class Corpus:
    """Prompts that share passages: moved, edited, repeated, and each other's prefix."""

    def __init__(self, texts: Texts) -> None:
        a, b, c, d = (texts.passage(n) for n in (210, 190, 170, 140))
        edited = a[:90] + texts.passage(3) + a[95:]
        self.sources = [a + b, c + d]
        self.prompts = [
            texts.passage(5) + b + a + texts.passage(20),
            b + c + edited + texts.passage(11),
            edited + d + b + texts.passage(30),
            a + c + d + a + texts.passage(7),
            (b + c + edited)[:300],
            a + b + texts.passage(40),
        ]


def kv_gap(mine: dict, theirs: dict) -> float:
    """Largest difference between two answers' KV."""
    pairs = zip(mine["kv"], theirs["kv"], strict=True)
    return max((x - y).abs().max().item() for x, y in pairs)


def test_exact_then_fuzzy_then_exact_again(both: tuple[Lab, Lab], texts: Texts) -> None:
    ours, theirs = both
    corpus = Corpus(texts)
    for prompt in corpus.prompts[:4]:
        alone = theirs.play([("flush",), request("x", prompt, keep="kv")])["x"]
        ours.flush()
        first = ours.one(prompt, kvshare="exact", keep="kv")
        # Alone on an empty cache the batches are the same: bit for bit.
        assert first["output"] == alone["output"]
        assert kv_gap(first, alone) == 0.0
        ours.flush()
        for source in corpus.sources:
            ours.one(source)
        fuzzy = ours.one(prompt, keep="kv")
        assert fuzzy["kvshare"]["copied_tokens"] > 100
        exact_len = fuzzy["kvshare"]["exact_tokens"]
        again = ours.one(prompt, kvshare="exact", keep="kv")
        # The noise of a server without kvshare: the same prompt with another split of its prefill.
        split = max(again["kvshare"]["exact_tokens"], 1)
        noisy = theirs.play(
            [
                ("flush",),
                request("p", prompt[:split], new=1),
                ("idle",),
                request("x", prompt, keep="kv"),
            ]
        )["x"]
        noise = kv_gap(noisy, alone)
        assert again["output"] == alone["output"]
        assert kv_gap(again, alone) <= max(2 * noise, 1e-5)
        assert kv_gap(fuzzy, alone) > 100 * max(noise, 1e-6), (
            "the fuzzy twin differs, or proves nothing"
        )
        assert exact_len <= again["kvshare"]["exact_tokens"]
        # A second exact request takes the first one's KV, prefix and all.
        cached = ours.one(prompt, kvshare="exact")
        assert cached["output"] == alone["output"]
        assert ours.ask("probes:plain_keys_of_depth") <= {0}


def test_new_text_behind_copies_that_all_ran_again_is_not_exact(
    both: tuple[Lab, Lab], texts: Texts
) -> None:
    """It was computed, in its lower layers or in an earlier chunk, while they were copies."""
    ours, theirs = both
    first, new, last = (texts.passage(n) for n in (80, 300, 200))
    prompt = first + new + last + texts.passage(20)
    ours.flush()
    ours.one(texts.passage(48) + first + texts.passage(16))
    ours.one(texts.passage(32) + last + texts.passage(16))
    ours.ask("probes:attend_to", 0, len(first))
    fuzzy = ours.one(prompt)["kvshare"]
    ours.ask("probes:attend_to", 0, 0)
    if fuzzy["select"] == "trace":
        assert fuzzy["recomputed_tokens"] >= len(first) - SINK, fuzzy
    assert fuzzy["copied_tokens"] > 50, fuzzy
    again = ours.one(prompt, kvshare="exact", keep="kv")
    alone = theirs.play([("flush",), request("x", prompt, keep="kv")])["x"]
    split = max(again["kvshare"]["exact_tokens"], 1)
    before = [("flush",), request("p", prompt[:split], new=1), ("idle",)]
    noisy = theirs.play([*before, request("x", prompt, keep="kv")])["x"]
    assert again["output"] == alone["output"], again["kvshare"]
    assert kv_gap(again, alone) <= max(2 * kv_gap(noisy, alone), 1e-5), again["kvshare"]


def test_exact_beside_its_fuzzy_twin(both: tuple[Lab, Lab], texts: Texts) -> None:
    ours, theirs = both
    corpus = Corpus(texts)
    ours.flush()
    for source in corpus.sources:
        ours.one(source)
    for prompt in corpus.prompts[:4]:
        alone = theirs.play([("flush",), request("x", prompt, new=12)])["x"]
        together = ours.play(
            [
                [
                    request("fuzzy", prompt, new=12),
                    request("exact", prompt, kvshare="exact", new=12),
                ],
                ("polls", 2),
                request("late", prompt, kvshare="exact", new=12),
            ]
        )
        assert together["exact"]["output"] == alone["output"]
        assert together["late"]["output"] == alone["output"]
    state = ours.ask("probes:check")
    assert state["protected"] == state["pins"] == 0
    assert ours.ask("probes:plain_keys_of_depth") <= {0}


STEP = st.one_of(
    st.tuples(st.just("one"), st.integers(0, 5), st.sampled_from(["auto", "exact"]), st.booleans()),
    st.tuples(
        st.just("pair"), st.integers(0, 5), st.integers(0, 5), st.sampled_from(["auto", "exact"])
    ),
    st.tuples(st.just("source"), st.integers(0, 1)),
    st.tuples(st.just("flush")),
)


@settings(max_examples=12, suppress_health_check=list(HealthCheck), deadline=None)
@given(history=st.lists(STEP, min_size=4, max_size=14))
def test_exact_requests_in_any_history(both: tuple[Lab, Lab], history: list[tuple]) -> None:
    ours, theirs = both
    corpus = Corpus(Texts(7))
    if not hasattr(theirs, "known"):
        theirs.known = [
            theirs.play([("flush",), request("x", prompt)])["x"]["output"]
            for prompt in corpus.prompts
        ]
    script: list = [("flush",)]
    asked: dict[str, int] = {}

    def ask(i: int, mode: str, tenant: str | None = None) -> dict:
        rid = f"r{len(asked)}-{mode}"
        asked[rid] = i
        return request(rid, corpus.prompts[i], kvshare=mode, extra_key=tenant)

    for kind, *rest in history:
        if kind == "one":
            script += [ask(rest[0], rest[1], "other" if rest[2] else None), ("idle",)]
        elif kind == "pair":
            script += [[ask(rest[0], "exact"), ask(rest[1], rest[2])], ("idle",)]
        elif kind == "source":
            script += [request(f"s{len(script)}", corpus.sources[rest[0]]), ("idle",)]
        else:
            script += [("idle",), ("flush",)]
    answers = ours.play(script)
    for rid, i in asked.items():
        if rid.endswith("-exact"):
            assert answers[rid]["output"] == theirs.known[i], (rid, history)
    state = ours.ask("probes:check")
    assert state["protected"] == state["pins"] == 0
    assert state["resident"] == state["evictable"] == state["total"] - state["available"]


def test_tenants_never_reuse_each_others_text(both: tuple[Lab, Lab], texts: Texts) -> None:
    ours, _ = both
    corpus = Corpus(texts)
    ours.flush()
    for source in corpus.sources:
        ours.one(source, extra_key="a")
    assert ours.one(corpus.prompts[0], extra_key="b")["kvshare"]["declined"] == "no_match"
    assert ours.one(corpus.prompts[0])["kvshare"]["declined"] == "no_match"
    assert ours.one(corpus.prompts[0], extra_key="a")["kvshare"]["copied_tokens"] > 100


def test_depth_is_recorded_and_bounded(both: tuple[Lab, Lab], texts: Texts) -> None:
    ours, _ = both
    ours.flush()
    a, fresh, newer = texts.passage(300), texts.passage(250), texts.passage(250)
    ours.one(a)
    one = ours.one(texts.passage(9) + a + fresh)
    assert one["kvshare"]["source_depth"] == 0
    assert ours.ask("probes:tagged_sizes"), "fresh text behind reused text is stored, tagged"
    assert {depth for depth, _ in ours.ask("probes:tagged_sizes")} == {1}
    two = ours.one(texts.passage(12) + fresh + newer)
    assert two["kvshare"]["copied_tokens"] > 100
    assert two["kvshare"]["source_depth"] == 1
    # What stands behind text of depth 1 would have depth 2, and the default bound is 1.
    assert {depth for depth, _ in ours.ask("probes:tagged_sizes")} == {1}
    assert ours.one(texts.passage(15) + newer)["kvshare"]["declined"] == "no_match"
    # An exact request over the tagged text shares nothing with it.
    plain = ours.one(texts.passage(12) + fresh, kvshare="exact")
    assert plain["kvshare"]["exact_tokens"] == 0


POLICIES = {
    "lpm": {"schedule_policy": "lpm"},
    "lof": {"schedule_policy": "lof"},
    "priorities, with preemption": {
        "enable_priority_scheduling": True,
        "priority_scheduling_preemption_threshold": 0,
        "max_running_requests": 3,
    },
    "retraction at random": {},
}


@pytest.mark.parametrize("policy", POLICIES)
def test_exact_answers_under_every_order_of_service(
    policy: str, llama: Path, plain_lab: Lab, texts: Texts
) -> None:
    """Requests overtake each other, stop and start again, in a pool that is too small for all."""
    tight = {
        "page_size": 16,
        "chunked_prefill_size": 96,
        "max_total_tokens": 2208,
        "schedule_conservativeness": 0.3,
        "disable_overlap_schedule": False,
    }
    corpus, rng = Corpus(texts), texts.rng
    with lab(llama, kvshare=True, **tight, **POLICIES[policy]) as it:
        if policy == "retraction at random":
            it.ask("probes:retract_every", 17)
        reused = retracted = 0
        for round_ in range(2):
            for source in corpus.sources:
                it.one(source, new=1)
            script: list = []
            exact: dict[str, tuple[int, int]] = {}
            for i in range(14):
                rid, which, new = f"{round_}-{i}", rng.randrange(6), rng.choice([2, 10, 40])
                mode = rng.choice(["exact", None, {"budget": rng.random()}])
                if mode == "exact":
                    exact[rid] = which, new
                script.append(
                    request(
                        rid, corpus.prompts[which], new=new, kvshare=mode, priority=rng.randrange(5)
                    )
                )
                if rng.random() < 0.4:
                    script.append(("polls", rng.randrange(1, 6)))
            answers = it.play(script)
            assert len(answers) == 14
            for rid, (which, new) in exact.items():
                alone = plain_lab.one(corpus.prompts[which], new=new)
                assert answers[rid]["output"] == alone["output"], rid
            reused += sum(a["kvshare"]["copied_tokens"] > 0 for a in answers.values())
            retracted += sum(a["retractions"] for a in answers.values())
            state = it.ask("probes:check")
            assert state["protected"] == state["pins"] == 0
        assert reused > 0
        assert retracted > 0 or policy != "retraction at random"
        assert it.ask("probes:plain_keys_of_depth") <= {0}
