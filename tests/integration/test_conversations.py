"""What was blended once is a prefix from then on: conversations cost what they cost without us, and
nobody reads a row that another request changes."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import Texts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lab import Lab, computed, lab, request
from test_life import assert_clean
from tiny_models import make_model

TOL = {"atol": 2e-3, "rtol": 1e-3}
SETTINGS: dict[str, dict[str, Any]] = {
    "whole prompts, overlap": {"disable_overlap_schedule": False},
    "chunks of 112, page 16": {"chunked_prefill_size": 112, "page_size": 16},
}


def allowed(rows: int) -> float:
    """What a turn may cost that costs SGLang so many rows: with repair, by default."""
    return rows if rows < 4 else rows + 0.25 * max(rows, 60)


@pytest.fixture(scope="module", params=list(SETTINGS))
def talk(request: pytest.FixtureRequest, llama: Path) -> Iterator[Lab]:
    it = Lab(llama, kvshare=True, kvshare_select="trace", **SETTINGS[request.param])
    it.page = SETTINGS[request.param].get("page_size", 1)  # type: ignore[attr-defined]
    it.chunk = SETTINGS[request.param].get("chunked_prefill_size", 4096)  # type: ignore[attr-defined]
    it.ask("probes:force_plans")
    yield it
    it.close()


class Stock:
    """What SGLang would have cached: every prompt and its answer but for the last token."""

    def __init__(self, page: int) -> None:
        self.page, self.texts = page, []

    def rows(self, prompt: list[int]) -> int:
        """How many rows SGLang runs for a prompt. In ten lines: the longest common prefix."""
        best = 0
        for text in self.texts:
            same = 0
            for a, b in zip(text, prompt[:-1], strict=False):
                if a != b:
                    break
                same += 1
            best = max(best, same // self.page * self.page)
        return len(prompt) - best

    def served(self, prompt: list[int], output: list[int]) -> None:
        self.texts.append([*prompt, *output[:-1]])

    @property
    def slots(self) -> int:
        """Distinct prefixes in whole pages."""
        pages = set()
        for text in self.texts:
            for stop in range(self.page, len(text) + 1, self.page):
                pages.add(hash(tuple(text[:stop])))
        return len(pages) * self.page


def adds_up(answer: dict[str, Any], prompt: list[int]) -> None:
    told = answer["kvshare"]
    kinds = ("exact", "blended", "copied", "recomputed", "fresh")
    assert sum(told[f"{kind}_tokens"] for kind in kinds) == len(prompt), told
    assert min(told[f"{kind}_tokens"] for kind in kinds) >= 0, told
    # An exact prefix is what SGLang calls cached, and nothing else is.
    assert answer["cached"] == told["exact_tokens"]


def edge(it: Lab) -> int:
    """Rows that a turn may cost beside its text and repair: a page, the end of each chunk, and
    the question where it began in a chunk before the last."""
    return it.page + 1 + (0 if it.chunk > 2000 else 64)


def test_the_same_prompt_again_costs_one_row(talk: Lab, texts: Texts) -> None:
    talk.flush()
    document = texts.passage(400)
    talk.one(document)
    prompt = texts.passage(30) + document + texts.passage(50)
    first = talk.one(prompt)
    adds_up(first, prompt)
    assert first["kvshare"]["copied_tokens"] > 200
    again = talk.one(prompt)
    adds_up(again, prompt)
    assert computed(again["kvshare"]) <= talk.page
    assert again["output"] == first["output"]
    # Not for whom only exact KV is good enough, nor for another tenant.
    assert talk.one(prompt, kvshare="exact")["kvshare"]["blended_tokens"] == 0
    assert talk.one(prompt, kvshare={"budget": 1})["kvshare"]["blended_tokens"] == 0
    assert talk.one(prompt, extra_key="other")["kvshare"]["declined"] == "no_match"
    assert_clean(talk)


def test_rows_over_text_that_reused_are_padded_by_no_one(llama: Path, texts: Texts) -> None:
    """Samples of a prompt run a row each, which torch's attention on a CPU pads to the prompt."""
    with lab(llama, kvshare=True, kvshare_select="trace") as it:
        it.ask("probes:watch_padding")
        document = texts.passage(400)
        prompt = texts.passage(30) + document + texts.passage(50)
        it.one(document)
        first = it.one(prompt)
        assert first["kvshare"]["copied_tokens"] > 200
        four = it.play([[request(f"{i}", prompt) for i in range(4)]])
        for one in four.values():
            assert one["output"] == first["output"]
            torch.testing.assert_close(one["logits"], first["logits"], **TOL)
        assert it.ask("probes:padded") == []
        # Exact KV is SGLang's own to the last bit, so its sums stay SGLang's.
        turn = document + texts.passage(8)
        assert it.one(turn, kvshare="exact")["kvshare"]["exact_tokens"] == 400
        assert it.ask("probes:padded") == [400]


def test_turns_after_an_edit_cost_what_they_cost_without_us(talk: Lab, texts: Texts) -> None:
    talk.flush()
    stock = Stock(talk.page)
    header, document, history = texts.passage(60), texts.passage(500), []
    ours, theirs = 0, 0
    for turn in range(9):
        edited = turn in (2, 3, 6)
        if edited:
            header = texts.passage(60)
        prompt = header + document + history + texts.passage(60)
        answer = talk.one(prompt, new=6)
        adds_up(answer, prompt)
        rows, would = computed(answer["kvshare"]), stock.rows(prompt)
        if not edited:
            assert rows <= allowed(would) + 1, (turn, answer["kvshare"])
        ours, theirs = ours + rows, theirs + would
        stock.served(prompt, answer["output"])
        history = prompt[560:] + answer["output"] + texts.passage(54)
    assert ours < 0.75 * theirs
    assert talk.ask("probes:check")["resident"] <= stock.slots
    assert_clean(talk)


def test_a_header_that_is_new_in_every_turn_costs_about_the_turn(talk: Lab, texts: Texts) -> None:
    """However long the conversation gets: what was said behind reused text can be reused. The
    budget is a share of what is reused, up to the reach of a change."""
    talk.flush()
    document, history, costs = texts.passage(500), [], []
    for _ in range(9):
        prompt = texts.passage(20) + document + history + texts.passage(60)
        answer = talk.one(prompt, new=6)
        adds_up(answer, prompt)
        costs.append(computed(answer["kvshare"]) - 0.15 * len(prompt))
        history = prompt[520:] + answer["output"] + texts.passage(54)
    assert max(costs[2:]) < 180, costs
    assert_clean(talk)


@pytest.mark.parametrize("page", [1, 16])
def test_a_new_header_costs_the_same_late_in_a_conversation(
    llama: Path, texts: Texts, page: int
) -> None:
    """Also in a pool that holds six prompts of the 14; with pages also where its length changes."""
    with lab(llama, kvshare=True, kvshare_select="trace", page_size=page) as it:
        document, history, costs = texts.passage(2000), [], []
        for _ in range(14):
            header = texts.passage(texts.rng.randrange(12, 30) if page > 1 else 20)
            prompt = header + document + history + texts.passage(60)
            answer = it.one(prompt, new=6)
            adds_up(answer, prompt)
            costs.append(computed(answer["kvshare"]))
            history = prompt[len(header) + 2000 :] + answer["output"] + texts.passage(54)
        assert sum(costs[-3:]) <= 1.1 * sum(costs[1:4]) + 3 * (page - 1), costs
        assert_clean(it)


def exact_branch(it: Lab, texts: Texts, length: int, key: str) -> list[int]:
    """A prompt whose KV is a blended branch, all of its copies exact: from the same positions of
    the same text."""
    prompt = texts.passage(length)
    it.one(prompt + texts.passage(40), extra_key="donor", new=1)
    told = it.one(prompt, forced=[(0, 20), (length - 20, length)], extra_key=key, new=1)["kvshare"]
    assert told["copied_tokens"] > length / 2, told
    return prompt


def test_turns_over_a_branch_of_exact_copies_are_full_prefill(
    talk: Lab, plain_lab: Lab, texts: Texts
) -> None:
    """An oracle for all that moves slots: repair, take-over, chunks, pages, batches."""
    talk.flush()
    branches = [exact_branch(talk, texts, length, f"k{length}") for length in (130, 300, 470)]
    keys = ["k130", "k300", "k470"]
    for _ in range(3):
        for prompt in branches:
            prompt += texts.passage(texts.rng.randrange(30, 150))
        batch = [
            request(key, prompt, extra_key=key, new=5, keep="kv")
            for key, prompt in zip(keys, branches, strict=True)
        ]
        answers = talk.play([batch])
        for key, prompt in zip(keys, branches, strict=True):
            mine = answers[key]
            adds_up(mine, prompt)
            assert mine["kvshare"]["blended_tokens"] > 0
            assert mine["kvshare"]["repaired_tokens"] > 0
            theirs = plain_lab.one(prompt, new=5, keep="kv")
            assert mine["output"] == theirs["output"]
            for ours, full in zip(mine["kv"], theirs["kv"], strict=True):
                torch.testing.assert_close(ours, full, **TOL)
            prompt += mine["output"]
    assert_clean(talk)


def test_a_retracted_turn_comes_back_to_its_own(talk: Lab, plain_lab: Lab, texts: Texts) -> None:
    """A turn that repaired, decodes and is retracted shares slots with itself when it comes back:
    it runs what its answer so far costs, and answers as full prefill."""
    talk.flush()
    prompt = exact_branch(talk, texts, 300, "k") + texts.passage(150)
    polls = 10 + 150 // talk.chunk * 4
    script = [
        request("turn", prompt, extra_key="k", new=40),
        ("polls", polls),
        ("call", "probes:pause"),
        ("call", "probes:resume"),
    ]
    answer = talk.play(script)["turn"]
    rows = sum(each[0] for each in talk.ask("probes:layer_rows"))
    assert answer["retractions"] == 1
    assert answer["kvshare"]["repaired_tokens"] > 0
    told = computed(answer["kvshare"])
    # Its prompt once, a row for each token but the last, and of what it had answered a page.
    assert rows <= told + 40 + 2 * edge(talk), (rows, told)
    assert answer["output"] == plain_lab.one(prompt, new=40)["output"]
    assert_clean(talk)


def test_exact_text_goes_before_what_was_blended(talk: Lab, texts: Texts) -> None:
    """Once somebody has computed the same text exactly, all go on from that."""
    talk.flush()
    document = texts.passage(400)
    prompt = texts.passage(30) + document + texts.passage(50)
    talk.one(document)
    assert talk.one(prompt)["kvshare"]["copied_tokens"] > 200
    talk.one(prompt, kvshare="exact")
    told = talk.one(prompt)["kvshare"]
    assert told["blended_tokens"] == 0
    assert told["exact_tokens"] >= len(prompt) - talk.page


def test_a_repair_changes_no_row_that_another_request_reads(talk: Lab, texts: Texts) -> None:
    talk.flush()
    document = texts.passage(400)
    talk.one(document)
    prompt = texts.passage(30) + document + texts.passage(20)
    talk.one(prompt)
    asks = [prompt + texts.passage(150) for _ in range(2)]
    before = talk.one(prompt, new=40, keep="kv")
    during = talk.play(
        [
            request("reads", prompt, new=60, keep="kv"),
            ("polls", 6),
            *(request(f"repairs{i}", ask, new=2) for i, ask in enumerate(asks)),
        ]
    )
    for i in range(2):
        assert during[f"repairs{i}"]["kvshare"]["repaired_tokens"] > 10
    for mine, theirs in zip(during["reads"]["kv"], before["kv"], strict=True):
        assert torch.equal(mine, theirs)
    assert during["reads"]["output"][:40] == before["output"]
    assert_clean(talk)
    # Where nobody else reads them the branch takes the repaired rows over: the oracle can fail.
    assert talk.one(asks[0] + texts.passage(150), new=2)["kvshare"]["repaired_tokens"] > 10
    after = talk.one(prompt, new=2, keep="kv")
    assert not all(torch.equal(a, b) for a, b in zip(after["kv"], before["kv"], strict=True))
    assert_clean(talk)


@pytest.mark.parametrize("fault", ["lookup", "choice"])
def test_a_fault_on_a_branch_costs_the_repair_only(
    fault: str, llama: Path, plain_lab: Lab, texts: Texts
) -> None:
    """Exact copies: whatever runs, the answer is full prefill's; slots for repair that were given
    and not written would show."""
    with lab(llama, kvshare=True, kvshare_select="trace") as it:
        it.ask("probes:force_plans")
        prompt = exact_branch(it, texts, 300, "k") + texts.passage(50)
        it.ask(f"probes:break_{fault}")
        mine = it.one(prompt, extra_key="k", new=5, keep="kv")
        adds_up(mine, prompt)
        assert mine["kvshare"]["declined"] == "fault"
        assert mine["kvshare"]["blended_tokens"] > 200
        theirs = plain_lab.one(prompt, new=5, keep="kv")
        assert mine["output"] == theirs["output"]
        for ours, full in zip(mine["kv"], theirs["kv"], strict=True):
            torch.testing.assert_close(ours, full, **TOL)
        # What it left is no exact KV.
        assert it.one(prompt, extra_key="k", kvshare="exact")["kvshare"]["blended_tokens"] == 0
        assert it.ask("probes:plain_keys_of_depth") <= {0}
        assert_clean(it)


def test_questions_at_once_about_the_same_moved_text_keep_the_rows_that_each_repaired(
    llama: Path, texts: Texts
) -> None:
    """The text that they share is stored by the first of them. The others read its rows where they
    have copies, and go on with those that they computed for their own question."""
    document, front = texts.passage(400), texts.passage(30)
    asked = [front + document + texts.passage(40) for _ in range(3)]
    with lab(llama, kvshare=True, kvshare_select="trace") as it:

        def alone(prompt: list[int], **options: Any) -> torch.Tensor:
            it.flush()
            it.one(document)
            keys: torch.Tensor = it.one(prompt, new=20, keep="kv", **options)["kv"][0]
            return keys[:, :430]

        copies = [alone(prompt, kvshare={"budget": 0}) for prompt in asked]
        repaired = [alone(prompt) for prompt in asked]
        it.flush()
        it.one(document)
        many = it.play([[request(f"{i}", p, new=20, keep="kv") for i, p in enumerate(asked)]])
        ran = [
            (mine - copied).abs().amax(dim=(0, 2, 3)) > 1e-3
            for copied, mine in zip(copies, repaired, strict=True)
        ]
        for i, mine in enumerate(repaired):
            own = ran[i] & ~ran[0] if i else ran[0]  # what the first one ran too is in the tree
            assert 10 < own.sum() < 200
            ours = many[f"{i}"]["kv"][0][:, :430]
            torch.testing.assert_close(ours[:, own], mine[:, own], **TOL)
        assert_clean(it)


def test_memory_too_short_for_a_repair_repairs_nothing(llama: Path, texts: Texts) -> None:
    settings = {"kvshare_select": "trace", "max_total_tokens": 1024}
    with lab(llama, kvshare=True, **settings) as it:
        document = texts.passage(300)
        it.one(document, new=1)
        prompt = texts.passage(30) + document + texts.passage(20)
        it.one(prompt, new=1)
        turn = prompt + texts.passage(20)
        # The branch is locked by one that decodes, and the rest of the pool is promised to it.
        answers = it.play(
            [request("busy", prompt, new=250), ("polls", 6), request("turn", turn, new=2)]
        )
        adds_up(answers["turn"], turn)
        assert len(answers["turn"]["output"]) == 2
        assert len(answers["busy"]["output"]) == 250
        assert_clean(it)


def test_new_weights_without_a_flush_reuse_nothing(llama: Path, texts: Texts) -> None:
    """SGLang may keep exact prefixes, if told so; copies and blended text of other weights go."""
    document = texts.passage(300)
    prompt = texts.passage(30) + document + texts.passage(40)
    with lab(llama, kvshare=True) as it:
        it.one(document)
        assert it.one(prompt)["kvshare"]["copied_tokens"] > 200
        assert it.one(prompt)["kvshare"]["blended_tokens"] > 200
        script = [
            request("outlives", prompt + texts.passage(20), new=60),
            ("polls", 8),
            ("call", "probes:update_weights", str(llama), False),
            ("polls", 2),
        ]
        it.play(script)
        told = it.one(prompt + texts.passage(20))["kvshare"]
        assert told["blended_tokens"] == told["copied_tokens"] == 0
        assert told["exact_tokens"] < 200  # the rows before the first copy
        # From here on as ever.
        it.one(texts.passage(7) + prompt)
        assert it.one(texts.passage(9) + prompt)["kvshare"]["copied_tokens"] > 200
        assert it.ask("probes:write_weights")
        assert it.one(texts.passage(11) + prompt)["kvshare"]["declined"] == "no_match"
        assert_clean(it)


def test_what_other_weights_made_is_in_no_answer(llama: Path, tmp_path: Path, texts: Texts) -> None:
    """Truly other weights, taken in while a request decodes: what comes then is answered as by a
    server that never knew the old ones."""
    other = make_model(tmp_path, "llama", seed=1)
    document = texts.passage(300)
    prompt = texts.passage(30) + document + texts.passage(40)
    asked = texts.passage(8) + prompt
    with lab(other) as it:
        want = it.one(asked)
    with lab(llama, kvshare=True, kvshare_select="trace") as it:
        it.one(document)
        assert it.one(prompt)["kvshare"]["copied_tokens"] > 200
        before = it.one(asked, extra_key="before")
        script = [
            request("outlives", prompt + texts.passage(20), new=60),
            ("polls", 8),
            ("call", "probes:update_weights", str(other), False),
        ]
        it.play(script)
        after = it.one(asked)
        assert after["kvshare"]["copied_tokens"] == after["kvshare"]["blended_tokens"] == 0
        torch.testing.assert_close(after["logits"], want["logits"], **TOL)
        assert (after["logits"] - before["logits"]).abs().max() > 1  # they are other weights
        assert after["output"] == want["output"]
        assert_clean(it)


def test_a_request_that_outlives_its_weights_gives_back_what_it_owns(
    llama: Path, texts: Texts
) -> None:
    document = texts.passage(300)
    with lab(llama, kvshare=True, kvshare_select="trace") as it:
        it.one(document)
        script = [
            request("copies", texts.passage(30) + document + texts.passage(20), new=60),
            ("polls", 8),
            ("call", "probes:update_weights", str(llama), False),
        ]
        answers = it.play(script)
        assert answers["copies"]["kvshare"]["copied_tokens"] > 200
        assert len(answers["copies"]["output"]) == 60
        assert_clean(it)
        it.one(texts.passage(900), new=1)
        it.flush()
        assert_clean(it)


MODES = st.sampled_from([None, None, "exact", {"budget": 1}, {"doubt": 1000}])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("turn"), st.integers(0, 2), st.integers(1, 90)),
        st.tuples(st.just("edit"), st.integers(0, 2), st.integers(0, 300)),
        st.tuples(st.just("again"), st.integers(0, 2), MODES),
        st.tuples(st.just("many"), st.integers(0, 2), st.integers(2, 4)),
        st.tuples(st.just("abort"), st.integers(0, 2), st.integers(1, 6)),
        # Turns of all three at the same time, the second of them aborted after so many rounds.
        st.tuples(st.just("crowd"), st.tuples(MODES, MODES, MODES), st.integers(0, 8)),
        st.tuples(st.just("flush")),
        st.tuples(st.just("weights")),
    ),
    min_size=4,
    max_size=14,
)
# How many are tried; a night of them finds more.
histories = settings(
    max_examples=int(os.environ.get("KVSHARE_HISTORIES", 8)),
    suppress_health_check=list(HealthCheck),
    deadline=None,
)


class Weights(NamedTuple):
    """A model, and a server without us that answers as it does."""

    path: Path
    plain: Lab


@pytest.fixture(scope="module")
def weights(llama: Path, plain_lab: Lab, models: Path) -> Iterator[tuple[Weights, Weights]]:
    """Those that servers start with, and others of the same shape."""
    other = make_model(models, "llama", seed=1)
    with lab(other) as plain:
        yield Weights(llama, plain_lab), Weights(other, plain)


@histories
@given(history=STEPS)
def test_any_history_costs_at_most_stock_and_repair(
    talk: Lab, weights: tuple[Weights, Weights], history: list[tuple[Any, ...]]
) -> None:
    """Turns, edits, repeats, batches, crowds, aborts, flushes and other weights in three
    conversations: rows, slots, and exact answers."""
    live(talk, weights, history, fits=True)


@pytest.fixture(scope="module")
def crowded(llama: Path) -> Iterator[Lab]:
    """A pool that holds about two of the three conversations."""
    with lab(llama, kvshare=True, kvshare_select="trace", max_total_tokens=1100) as it:
        it.page, it.chunk = 1, 4096  # type: ignore[attr-defined]
        yield it


@histories
@given(history=STEPS)
def test_any_history_in_a_pool_that_evicts_stays_exact_and_clean(
    crowded: Lab, weights: tuple[Weights, Weights], history: list[tuple[Any, ...]]
) -> None:
    live(crowded, weights, history, fits=False)


def live(
    talk: Lab, weights: tuple[Weights, Weights], history: list[tuple[Any, ...]], *, fits: bool
) -> None:
    """``fits``: nothing is evicted, so that rows and slots are what they are in ``Stock``."""
    texts = Texts(11)
    now, later = weights
    talk.play([("call", "probes:update_weights", str(now.path))])  # another history left others
    stock = Stock(talk.page)
    talks = [texts.passage(160 + 90 * i) for i in range(3)]
    said = [list(text) for text in talks]
    aborted, twice = False, 0

    def check(answer: dict[str, Any], prompt: list[int], would: int, mode: Any) -> None:
        adds_up(answer, prompt)
        if mode is not None:
            assert answer["output"] == now.plain.one(prompt, new=4)["output"]
        elif fits:  # with what is left of an aborted request it costs less, if anything
            rows = computed(answer["kvshare"])
            assert rows <= allowed(would) + edge(talk), (answer["kvshare"], would)

    for kind, *rest in history:
        i = rest[0] if rest and kind != "crowd" else 0
        if kind in ("flush", "weights"):
            if kind == "flush":
                talk.flush()
            else:
                now, later = later, now
                talk.play([("call", "probes:update_weights", str(now.path))])
            stock, aborted, twice = Stock(talk.page), False, 0
            continue
        if kind == "turn":
            said[i] = said[i] + texts.passage(rest[1])
        elif kind == "edit":
            at = min(rest[1], len(said[i]) - 2)
            said[i] = said[i][:at] + texts.passage(3) + said[i][at + 2 :]
        prompt = said[i]
        would = stock.rows(prompt)
        if kind == "many":
            batch = [request(f"m{j}", prompt, new=4) for j in range(rest[1])]
            for answer in talk.play([batch]).values():
                check(answer, prompt, would, None)
                stock.served(prompt, answer["output"])
        elif kind == "crowd":
            modes, rounds = rest
            said = [text + texts.passage(20) for text in said]
            would_each = [stock.rows(text) for text in said]
            batch = [
                request(f"c{j}", text, new=50 if j == 1 else 4, kvshare=mode)
                for j, (text, mode) in enumerate(zip(said, modes, strict=True))
            ]
            answers = talk.play([batch, ("polls", rounds), ("abort", "c1")])
            aborted = True
            for j in (0, 2):
                check(answers[f"c{j}"], said[j], would_each[j], modes[j])
                stock.served(said[j], answers[f"c{j}"]["output"])
        elif kind == "abort":
            talk.play([request("gone", prompt, new=50), ("polls", rest[1]), ("abort", "gone")])
            aborted = True  # what SGLang keeps of it depends on when it came
        else:
            mode = rest[1] if kind == "again" else None
            answer = talk.one(prompt, new=4, kvshare=mode)
            check(answer, prompt, would, mode)
            stock.served(prompt, answer["output"])
            if kind == "turn":
                said[i] = said[i] + answer["output"]
            if mode is not None:  # and what reused beside it
                twice += len(prompt) + len(answer["output"])
        if fits and not aborted:
            assert talk.ask("probes:check")["resident"] <= stock.slots + twice
        assert_clean(talk)
