"""Conversations change what they say they change; rows are those that ran; questions stay open."""

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvshare_sglang.bench import __main__ as bench
from kvshare_sglang.bench import conversation, tasks
from kvshare_sglang.bench.common import KINDS, Progress, ScriptError
from kvshare_sglang.bench.conversation import histories, load, memory, questions, rows
from kvshare_sglang.bench.conversation.histories import FRONT, USER, Text, prompt
from kvshare_sglang.bench.quality.cases import Encoder, NoPrompt, Prompt
from kvshare_sglang.bench.server import Answer

ROOT = Path(__file__).resolve().parents[2]
READER = ROOT / "tests" / "data" / "reader"
SIZE = 400


class Numbers(Text):
    """Text whose tokens never come twice."""

    def __init__(self) -> None:
        self._next = 0

    def __call__(self, num: int) -> list[int]:
        self._next += num
        return list(range(self._next - num, self._next))


def prompts(history: histories.History) -> list[list[int]]:
    return [prompt(turn, history.answers) for turn in history.turns]


def shared_start(a: list[int], b: list[int]) -> int:
    same = min(len(a), len(b))
    return next((i for i in range(same) if a[i] != b[i]), same)


class Fake:
    """A server that caches every prompt for ever, and its answers to all but their last token."""

    def __init__(self, *, reuses: int | None = None) -> None:
        self.reuses, self.known = reuses, list[list[int]]()

    def flush(self) -> None:
        self.known = []

    def ask(self, ids: list[int], *, max_new_tokens: int = 1, kvshare: Any = None) -> Answer:
        cached = max((shared_start(ids, one) for one in self.known), default=0)
        cached = min(cached, len(ids) - 1)
        output = [-len(self.known) * 1000 - i for i in range(max_new_tokens)]
        self.known.append([*ids, *output[:-1]])
        meta: dict[str, Any] = {"prompt_tokens": len(ids), "cached_tokens": cached}
        if self.reuses is not None:
            copied = (len(ids) - cached) // 2
            meta["kvshare"] = [
                {
                    "exact_tokens": cached,
                    "blended_tokens": copied - self.reuses,
                    "copied_tokens": self.reuses,
                    "recomputed_tokens": 1,
                    "fresh_tokens": len(ids) - cached - copied - 1,
                    "declined": None,
                    "select": "trace",
                }
            ]
        return Answer(0.1, 0.2, output, meta)


# ---- what is sent ----------------------------------------------------------------------------


@pytest.mark.parametrize("times", [1, 2, 3, 8])
def test_only_an_edit_changes_what_was_said(times):
    history = histories.edits(Numbers(), times, size=SIZE)
    sent = prompts(history)
    edits = 0
    for (i, before), (j, now) in pairwise(enumerate(sent)):
        assert len(now) == len(before) + 2 * USER
        assert now[FRONT : len(before)] == before[FRONT:]
        answer = history.answers[i]
        assert now[len(before) : len(before) + USER] == answer
        edited = now[:FRONT] != before[:FRONT]
        assert not (edited and history.turns[j].counted)
        edits += edited
    assert edits == times
    first = next(i for i, (a, b) in enumerate(pairwise(sent)) if a[:FRONT] != b[:FRONT])
    assert not any(turn.counted for turn in history.turns[: first + 1])


def test_what_stock_computes_for_edits_follows_from_their_places():
    """Everything at first and after an edit, else what was written since."""
    history = histories.edits(Numbers(), 3, size=SIZE)
    with Progress(99) as bar:
        found = rows.measure(Fake(), Fake(reuses=5), [history], own=False, bar=bar)  # type: ignore[arg-type]
        own = rows.measure(Fake(), Fake(reuses=5), [history], own=True, bar=bar)  # type: ignore[arg-type]
    whole = [0, 6, 12, 18]
    for i, row in enumerate(found):
        assert row["stock"] == (row["tokens"] if i in whole else 2 * USER)
        assert row["ours"] == row["recomputed"] + row["fresh"]
    # A server caches what it answered, but for the last token.
    assert [r["stock"] for i, r in enumerate(own) if i not in whole] == [USER + 1] * 20


def test_a_clock_leaves_all_behind_it_as_it_was():
    for before, now in pairwise(prompts(histories.headers(Numbers(), num_turns=6, size=SIZE))):
        assert not set(before[:20]) & set(now[:20])
        assert now[20 : len(before)] == before[20:]


def test_turns_side_by_side_are_added_up():
    many = histories.side_by_side(Numbers(), num=3, num_turns=5, size=SIZE)
    sent = [prompts(one) for one in many]
    firsts = [set(one[0]) for one in sent]
    assert not firsts[0] & firsts[1] | firsts[1] & firsts[2]
    with Progress(99) as bar:
        found = rows.measure(Fake(), Fake(reuses=5), many, own=False, bar=bar)  # type: ignore[arg-type]
    steps = zip(*sent, strict=True)
    assert [row["tokens"] for row in found] == [sum(map(len, step)) for step in steps]
    assert all(row["stock"] == row["tokens"] and row["copied"] == 15 for row in found)
    assert rows.summary(many[0], found)["name"] == "3 at once, a clock each"


def test_the_same_prompt_comes_again_after_text_that_it_shares():
    found = list(histories.repeats(Numbers(), size=SIZE))
    assert [h.name for h in found] == ["again, moved", "again, edited", "again, reordered"]
    for history in found:
        sent = prompts(history)
        first, *again = (i for i, turn in enumerate(sent) if turn == sent[-1])
        assert [history.turns[i].counted for i in (first, *again)] == [False] + [True] * 4
        cached = {token for one in sent[:first] for token in one}
        assert len(cached & set(sent[-1])) >= 0.9 * SIZE
        if history.name != "again, edited":
            assert not any(shared_start(one, sent[-1]) for one in sent[:first])


@pytest.mark.parametrize("kind", histories.COMPACTIONS)
def test_an_agent_is_compacted_as_named_and_else_only_goes_on(kind):
    history = histories.agent(Numbers(), random.Random(0), kind, num_turns=24, every=8)
    sent = prompts(history)
    for i, (before, now) in enumerate(pairwise(sent), start=1):
        if i % 8:
            assert now[: len(before)] == before
            continue
        assert not history.turns[i].counted
        assert (now[:30] != before[:30]) == (kind in ("system changed", "all three"))
        tools = slice(300, 300 + 14 * 90)
        assert sorted(now[tools]) == sorted(before[tools])
        assert (now[tools] != before[tools]) == (kind in ("tools reordered", "all three"))
        assert (len(now) < len(before)) == (kind in ("summarised", "all three"))


def test_requests_of_a_file_are_compacted_and_go_on_from_there():
    text = Numbers()
    first, other = text(900), text(500)
    sent = [first[: 300 + 100 * i] for i in range(6)] + [other] * 2
    asis, made = histories.traces("it", sent, text, every=3)
    assert prompts(asis) == sent
    now = prompts(made)
    assert now[:3] == sent[:3]
    for i in (3, 4, 5):  # 600 tokens at the fourth: 570 behind the front, 380 of them in 60
        assert len(now[i]) == len(sent[i]) - 380 + 60
        assert now[i][90:] == sent[i][410:]
        assert now[i][:90] == now[3][:90]
        assert not set(now[i][:90]) & set(first)
    assert len(now[6]) == 500 - 313 + 60  # another text, and time for its own summary
    assert now[7] == now[6]


def test_memory_mixes_turns_and_aborts_late():
    made = [list(memory.steps(Numbers(), random.Random(1), 300)) for _ in range(2)]
    assert made[0] == made[1]
    kinds = {step.kind for step in made[0]}
    assert kinds == {"turn", "edit", "header", "again", "samples", "moved", "new", "abort"}
    assert not any(step.aborted for step in made[0][:150])
    assert max(len(step.ids) for step in made[0]) < 2500


# ---- what is read from answers ---------------------------------------------------------------


def test_rows_that_do_not_add_up_are_an_error():
    whole = Fake(reuses=3).ask(list(range(40)), max_new_tokens=1)
    assert sum(rows.counted(whole).values()) == 40
    assert rows.counted(whole)["blended"] == 17
    assert rows.rows_of(whole, stock=False) == 1 + 19
    for name in ("fresh_tokens", "exact_tokens", "blended_tokens"):
        wrong = json.loads(json.dumps(whole.meta))
        wrong["kvshare"][0][name] += 1
        with pytest.raises(ScriptError, match="do not add up to 40 tokens"):
            rows.counted(whole._replace(meta=wrong))


def told(ours: list[int], *, case: str, stock: int = 100) -> dict[str, Any]:
    turns = [histories.Turn([[1]], i > 0) for i in range(len(ours))]
    history = histories.History("it", case, turns, [[]] * len(ours))
    found = [
        {"ours": n, "stock": stock, "counted": t.counted} for n, t in zip(ours, turns, strict=True)
    ]
    return rows.summary(history, found)


@pytest.mark.parametrize(
    ("case", "good", "bad"),
    [
        ("repeat", [900, 102, 90], [100, 103, 90]),
        ("edits", [20, 125, 125], [20, 126, 20]),
        ("edits", [100, 100, 100], [180, 100, 100]),
        ("header", [65, 20, 20, 0, 20], [65, 21, 20, 0, 20]),
        ("header", [5, 20, 20, 20, 20, 22], [5, 20, 20, 20, 20, 23]),
        ("together", [170, 20, 20, 20, 20, 22], [60, 20, 20, 20, 20, 23]),
        ("compaction", [10, 190, 100], [101, 100, 100]),
    ],
)
def test_a_target_is_met_up_to_its_bound(case, good, bad):
    assert told(good, case=case)["met"]
    assert not told(bad, case=case)["met"]


class Pool(Fake):
    """Its idle pool holds so much after each look at it."""

    def __init__(self, *cached: int, in_use: int = 0) -> None:
        super().__init__()
        self.left = [memory.Held(n, in_use, 1000 - n - in_use) for n in cached]

    def events(self, ids: list[int], *, max_new_tokens: int, n: int = 1) -> Iterator[Any]:
        yield 0.1, {"output_ids": [1]}


@pytest.mark.parametrize(
    ("stock", "ours", "met", "over"),
    [
        ([7, 400, 600, 900, 7], [7, 400, 500, 900, 7], True, 0),
        ([7, 400, 600, 900, 7], [7, 300, 601, 900, 7], False, 1),
        ([7, 400, 990, 990, 7], [7, 300, 999, 999, 7], True, -100),  # stock had to evict
        ([7, 400, 600, 700, 7], [7, 300, 600, 800, 7], True, 0),  # after an abort
        ([7, 400, 600, 900, 7], [7, 400, 500, 900, 9], False, 0),  # two did not come back
    ],
)
def test_a_pool_is_held_against_stock_until_chance_decides(monkeypatch, stock, ours, met, over):
    monkeypatch.setattr(memory, "held", lambda server: server.left.pop(0))
    made = [memory.Step("turn", [1], aborted=i == 5) for i in range(6)]
    with Progress(12) as bar:
        found = memory.measure(Pool(*stock), Pool(*ours), made, every=2, bar=bar)  # type: ignore[arg-type]
    assert (found["met"], found["most_over_stock"]) == (met, over)
    assert found["leaked"] == ours[-1] - ours[0]


def test_a_gauge_is_read_for_what_it_is():
    page = (
        "# HELP sglang:kv_available_tokens x\n"
        'sglang:kv_available_tokens_more{model="a"} 7\n'
        'sglang:kv_available_tokens{model="a"} 131072.0\n'
    )
    assert memory._gauge(page, "kv_available_tokens") == 131072
    with pytest.raises(ScriptError, match="no sglang:num_used_tokens"):
        memory._gauge(page, "num_used_tokens")


# ---- questions -------------------------------------------------------------------------------


def samples(case: str, turns: int) -> Iterator[tuple[tasks.Pair, list]]:
    rng = random.Random("test of questions")
    size = questions_size()
    for _ in range(40):
        pair = questions.pair_of(rng, "hops", case, size, [])
        if pair and (asked := questions.questions(rng, pair, turns)):
            yield pair, asked


def questions_size() -> tasks.Size:
    return tasks.Size(36, 4, prose=0.0)


@pytest.mark.parametrize("case", questions.CASES)
@pytest.mark.parametrize("turns", questions.TURNS)
def test_the_last_question_rests_on_what_changed_and_the_first_can_do_without(case, turns):
    found = list(islice(samples(case, turns), 8))
    assert len(found) >= 4
    settled = 0
    for pair, asked in found:
        known, before = (tasks.read(s.documents) for s in (pair.prompt, pair.cached[0]))
        assert len({ask for ask, _ in asked}) == turns
        assert all(known[ask].answer == answer and known[ask].depth for ask, answer in asked)
        first, last = asked[0][0], asked[-1][0]
        if case != "splice":
            assert last not in before or before[last].answer != known[last].answer
            settled += first in before and before[first].answer == known[first].answer
    assert case == "splice" or settled >= len(found) // 2


def test_a_dialogue_goes_on_with_the_true_answers():
    encode = Encoder(READER)
    size = questions_size()
    made = questions.dialogues(encode, "state", "template", 3, size=size, max_len=2048)
    one, again = (
        next(d)
        for d in (
            made,
            questions.dialogues(encode, "state", "template", 3, size=size, max_len=2048),
        )
    )
    assert all(np.array_equal(a, b) for a, b in zip(one.prompts, again.prompts, strict=True))
    for i, (before, now) in enumerate(pairwise(one.prompts)):
        known = len(before) + len(one.answers[i])
        assert np.array_equal(now[:known], np.concatenate([before, one.answers[i]]))
        assert known + 4 < len(now) < known + 20  # a question
    with pytest.raises(NoPrompt, match="fit into 50 tokens"):
        next(questions.dialogues(encode, "state", "template", 3, size=size, max_len=50))


def test_later_turns_may_bring_new_text():
    encode = Encoder(READER)
    size = questions_size()
    one = next(
        questions.dialogues(encode, "state", "template", 3, size=size, max_len=2048, new_text=100)
    )
    for i, (before, now) in enumerate(pairwise(one.prompts)):
        assert 100 + 4 < len(now) - len(before) - len(one.answers[i]) < 100 + 60


def test_answers_are_told_by_turn_and_arm_with_flips_both_ways():
    def line(full: int, ours: int, copies: int) -> dict[str, Any]:
        kinds = {"exact": 4, "copied": 60, "recomputed": 20, "fresh": 16}
        arms = {
            "full": [{"right": full > i, "exact": 4} for i in range(2)],
            "ours": [{"right": ours > i, **kinds} for i in range(2)],
            "copies": [{"right": copies > i, **kinds} for i in range(2)],
        }
        return {"tokens": [100, 100], "arms": arms}

    lines = [line(2, 2, 0), line(1, 2, 1), line(2, 1, 1), line(2, 2, 2)]
    found = questions.summary(lines, task="hops", case="splice")
    by = {(row["arm"], row["turn"]): row for row in found}
    assert by["full", 2]["right"] == 0.75
    assert (by["ours", 2]["lost"], by["ours", 2]["won"]) == (1, 1)
    assert by["copies", 1]["minus_full"] == -0.25
    assert by["full", 1]["rows"] == 96
    assert by["ours", 1]["rows"] == 36
    assert by["ours", 1]["recomputed"] == 0.25
    shown = conversation.show({"tasks": found})
    assert shown.count("hops splice") == 6 + 1  # a line for all of it
    assert "25.0%" in shown
    (short,) = questions.by_cell(found)
    assert short["full"] == "1.000 / 0.750"
    assert short["flips"] == "0/0 1/1"


# ---- load ------------------------------------------------------------------------------------


def test_stock_comes_first_and_a_server_asks_all_its_ways_in_a_row():
    found = load.loads([128, -1], [False, True], [1, 8])
    assert found[0] == load.Load("stock", -1, False, 1)
    assert len(set(found)) == len(found) == 9
    servers = [one._replace(together=0) for one in found]
    assert sum(a != b for a, b in pairwise(servers)) == len(set(servers)) - 1
    assert str(found[-1]) == "ours-whole-mixed-8"


@pytest.mark.parametrize("together", [1, 8])
def test_a_batch_shares_a_cache_however_it_is_asked(together):
    answer = np.array([0])
    made = [
        Prompt([np.arange(i * 100, i * 100 + 50)], np.arange(i * 100, i * 100 + 60), answer)
        for i in range(5)
    ]
    way = load.Load("ours", 256, False, together)
    found = load.lines(Fake(reuses=2), way, made)  # type: ignore[arg-type]
    assert [line["exact"] for line in found] == [50] * 5
    row = load.summary(found, found[:3], way, task="hops", case="splice")
    assert (row["n"], row["lost"], row["won"], row["select"]) == (5, 0, 0, "trace")
    assert row["rows"] == 5  # half of the 10 that are not cached
    assert conversation.table("load", [row])[2].split(" | ")[1:5] == [
        "ours",
        "256",
        "off",
        f"{together}",
    ]


def test_ways_that_gave_the_same_answers_share_a_line():
    def row(chunk, mixed, together, *, lost=0, rows=65.2):
        return {
            "task": "hops", "case": "splice", "server": "ours", "chunk": chunk, "mixed": mixed,
            "together": together, "n": 200, "right": 0.9, "minus_full": -0.005 * lost, "lost": lost,
            "won": 0, "rows": rows, "recomputed": 0.164, "select": "trace",
        }  # fmt: skip

    found = [row(128, False, 1), row(128, True, 8), row(-1, True, 8, rows=67), row(256, True, 1)]
    shown = conversation.table("load", [*found, row(512, False, 1, lost=1)])[2:]
    same, other = ([cell.strip() for cell in line.split("|")[3:-1]] for line in shown)
    assert same[:4] == ["128, whole, 256", "off, on", "1, 8", "4"]
    assert same[-3:] == ["65 to 67", "16.4%", "trace"]
    assert other[:4] == ["512", "off", "1", "1"]
    assert sum(line.count("hops splice") for line in shown) == 2


# ---- the whole of it -------------------------------------------------------------------------


@pytest.mark.sglang
def test_the_bench_runs_on_real_servers(tmp_path):
    out = tmp_path / "it.json"
    command = [sys.executable, "-m", "kvshare_sglang.bench", "conversation", "--short"]
    command += ["--case", "repeat", "together", "memory", "--turns", "12", "--threads", "1"]
    done = subprocess.run([*command, "--json", str(out)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["rows"][0]["name"] == "again, moved"
    several = found["turns"].pop("3 at once, a clock each")
    assert len(several) == 8
    assert all(turn["ours"] < 0.6 * turn["stock"] for turn in several[1:])
    for turns in found["turns"].values():
        assert all(sum(turn[kind] for kind in KINDS) == turn["tokens"] for turn in turns)
        assert turns[2]["copied"] > 150
        assert turns[-1]["stock"] == 1
    assert found["memory"]["leaked"] == 0
    assert found["memory"]["samples"][0]["stock"]["cached"] > 1000
    page = tmp_path / "page.md"
    page.write_text("<!-- it-rows --><!-- /it-rows --><!-- it-memory --><!-- /it-memory -->")
    shown = ["conversation", "--result", str(out), "--table", str(page)]
    assert bench.main(shown) == 0
    assert "| again, moved | 7 |" in page.read_text()
    # What holds is the request that asked.
    assert "| a flush | 7 | 7 | 0 | 0 | 0 |" in page.read_text()
