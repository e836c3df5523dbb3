"""Finished turns on SGLang's own scheduler: what they left stays for the turn that follows."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Texts
from lab import Lab, lab, request
from test_life import assert_clean

POOL = 2000
SETTINGS = {"overlap": {"disable_overlap_schedule": False}, "page 16": {"page_size": 16}}


@pytest.fixture(scope="module", params=list(SETTINGS))
def it(request: pytest.FixtureRequest, llama: Path) -> Iterator[Lab]:
    settings = {"max_total_tokens": POOL, "schedule_conservativeness": 0.3}
    with lab(llama, kvshare=True, kvshare_ttl=0.5, **settings, **SETTINGS[request.param]) as one:
        yield one


@pytest.fixture(autouse=True)
def clean(it: Lab) -> Iterator[None]:
    it.flush()
    it.ask("probes:pass_time", 0.0)  # it stands still but for such calls
    assert it.ask("probes:pins")["num"] == it.ask("probes:pins")["tokens"] == 0
    yield
    it.flush()
    assert_clean(it)


def events(it: Lab, *names: str) -> list[int]:
    return [it.ask("probes:pins")["events"].get(name, 0) for name in names]


def turn(it: Lab, prompt: list[int], seconds: float | None, **more: Any) -> list[int]:
    """A turn that asks for so long; all of its text."""
    ttl = {"ttl": 0.0 if seconds is None else seconds}
    return prompt + it.one(prompt, kvshare=ttl, **more)["output"]


def flood(it: Lab, texts: Texts) -> None:
    """Other texts, more than the pool holds; none asks to be kept."""
    for _ in range(5):
        turn(it, texts.passage(450), None, new=2)


def test_a_turn_that_is_kept_survives_pressure_and_its_return_frees_it(
    it: Lab, texts: Texts
) -> None:
    taken, returned = events(it, "taken", "returned")
    text = turn(it, texts.passage(400), 60)
    state = it.ask("probes:pins")
    assert (state["num"], state["tokens"]) == (1, it.ask("probes:check")["protected"])
    flood(it, texts)
    answer = it.one([*text, *texts.passage(20)], kvshare={"ttl": 0})
    assert answer["cached"] >= 400
    assert events(it, "taken", "returned") == [taken + 1, returned + 1]
    assert it.ask("probes:pins")["num"] == it.ask("probes:check")["protected"] == 0


def test_a_turn_that_is_not_kept_is_evicted(it: Lab, texts: Texts) -> None:
    text = turn(it, texts.passage(400), None)
    flood(it, texts)
    assert it.one([*text, *texts.passage(20)], kvshare={"ttl": 0})["cached"] < 100


def test_its_time_goes_by(it: Lab, texts: Texts) -> None:
    (expired,) = events(it, "expired")
    turn(it, texts.passage(300), 60)
    it.ask("probes:pass_time", 59.0)
    assert it.ask("probes:pins")["num"] == 1
    it.ask("probes:pass_time", 2.0)
    assert it.ask("probes:pins")["num"] == it.ask("probes:check")["protected"] == 0
    assert events(it, "expired") == [expired + 1]


def test_a_request_that_waits_for_memory_comes_in_as_soon_as_a_pin_expires(
    it: Lab, texts: Texts
) -> None:
    """Though another one runs on, whose end SGLang would wait for."""
    turn(it, texts.passage(900), 60, new=2)
    assert it.ask("probes:pins")["num"] == 1
    long = request("long", texts.passage(200), new=300, kvshare={"ttl": 0})
    short = request("short", texts.passage(900), new=4, kvshare={"ttl": 0})
    script = [long, ("polls", 5), short, ("polls", 20), ("call", "probes:pass_time", 61.0)]
    answers = it.play([*script, ("polls", 30), ("call", "probes:note_ended")])
    assert it.ask("probes:noted_ended") == ["short"]
    assert len(answers["long"]["output"]) == 300


def test_what_runs_comes_first(it: Lab, texts: Texts) -> None:
    """A prompt that needs the memory, alone and while it decodes, is served; pins go one by one."""
    (given,) = events(it, "given_back")
    for _ in range(2):
        turn(it, texts.passage(400), 600)
    assert it.ask("probes:pins")["num"] == 2
    whole = it.one(texts.passage(1100), new=100, kvshare={"ttl": 0})
    assert whole["finish"]["type"] == "length"
    assert it.ask("probes:pins")["num"] == 1
    whole = it.one(texts.passage(1700), new=200, kvshare={"ttl": 0})
    assert whole["finish"]["type"] == "length"
    assert whole["retractions"] == 0
    assert it.ask("probes:pins")["num"] == 0
    assert events(it, "given_back") == [given + 2]


def test_many_small_turns_are_given_back_at_once(it: Lab, texts: Texts) -> None:
    given, taken = events(it, "given_back", "taken")
    for _ in range(8):
        turn(it, texts.passage(100), 250, new=2)
    assert events(it, "taken") == [taken + 8]
    it.ask("probes:count_give_backs")
    assert it.one(texts.passage(1950), new=8, kvshare={"ttl": 0})["finish"]["type"] == "length"
    assert events(it, "given_back") == [given + 8]
    assert it.ask("probes:yields") <= 2


def test_no_request_keeps_a_turn_for_longer_than_the_server_lets_it(it: Lab, texts: Texts) -> None:
    turn(it, texts.passage(200), 3600)
    it.ask("probes:pass_time", 299.0)
    assert it.ask("probes:pins")["num"] == 1
    it.ask("probes:pass_time", 2.0)
    assert it.ask("probes:pins")["num"] == 0


def test_a_fault_in_seeing_a_return_fails_no_request(it: Lab, texts: Texts) -> None:
    text = turn(it, texts.passage(200), 60)
    it.ask("probes:break_learned", True)
    assert it.one([*text, 5, 6], kvshare={"ttl": 0})["finish"]["type"] == "length"
    it.ask("probes:break_learned", False)
    assert it.ask("probes:pins")["num"] == it.ask("probes:check")["protected"] == 0


def test_pins_hold_no_more_than_their_share(it: Lab, texts: Texts) -> None:
    (refused,) = events(it, "no_room")
    system = texts.passage(320)
    for _ in range(4):
        turn(it, [*system, *texts.passage(200)], 600, new=4)
    state = it.ask("probes:pins")
    # Text that several keep counts once: 320 + 3 * 200 fit a half of the pool, another does not.
    assert state["num"] == 3
    assert 320 + 3 * 190 <= state["tokens"] <= POOL / 2
    assert events(it, "no_room") == [refused + 1]


def test_the_same_prompt_again_and_splits_keep_the_books(it: Lab, texts: Texts) -> None:
    prompt = texts.passage(300)
    for _ in range(3):
        turn(it, prompt, 600)
    assert it.ask("probes:pins")["num"] == 1
    turn(it, [*prompt[:150], *texts.passage(100)], 600)  # splits what is pinned
    state = it.ask("probes:pins")
    assert state["num"] == 2
    assert state["tokens"] == it.ask("probes:check")["protected"]


def test_an_abort_is_no_turn_and_other_weights_unpin(it: Lab, llama: Path, texts: Texts) -> None:
    it.play([request("gone", texts.passage(200), new=50, kvshare={"ttl": 60}), ("polls", 3),
             ("abort", "gone")])  # fmt: skip
    assert it.ask("probes:pins")["num"] == 0
    turn(it, texts.passage(200), 60)
    it.ask("probes:update_weights", str(llama), False)
    assert it.ask("probes:pins")["num"] == it.ask("probes:check")["protected"] == 0


def test_what_reused_is_kept_as_well(it: Lab, texts: Texts) -> None:
    document = texts.passage(300)
    turn(it, document, None)
    text = turn(it, [*texts.passage(9), *document, *texts.passage(9)], 60)
    assert it.ask("probes:pins")["tokens"] >= 300
    flood(it, texts)
    answer = it.one([*text, *texts.passage(20)], kvshare={"ttl": 0})
    assert answer["kvshare"]["exact_tokens"] + answer["kvshare"]["blended_tokens"] >= 300


def test_a_life_of_conversations_under_pressure_leaks_nothing(it: Lab, texts: Texts) -> None:
    """Turns that come back, are aborted and retracted, while pins come, go and are given back."""
    rng = random.Random(7)
    before = it.ask("probes:pins")["events"]
    history = [texts.passage(rng.randrange(60, 250)) for _ in range(6)]
    for round_ in range(4):
        script: list[Any] = []
        for i, text in enumerate(history):
            options = {"ttl": rng.choice([0, 5, 600]), "mode": rng.choice(["auto", "exact"])}
            script.append(request(f"{round_}-{i}", text, new=rng.randrange(2, 80), kvshare=options))
            script.append(("polls", rng.randrange(3)))
            if rng.random() < 0.15:
                script.append(("abort", f"{round_}-{rng.randrange(i + 1)}"))
        answers = it.play(script)
        assert all(answer["finish"] for answer in answers.values())
        history = [
            [*text, *answers[f"{round_}-{i}"]["output"], *texts.passage(rng.randrange(5, 60))]
            for i, text in enumerate(history)
        ]
        state = it.ask("probes:pins")
        assert state["tokens"] == it.ask("probes:check")["protected"] <= POOL / 2
    after = it.ask("probes:pins")["events"]
    assert {name for name in after if after[name] > before.get(name, 0)} >= {"taken", "returned"}
