"""``bench agents``: programs go on from what was answered, and time beyond tools is told by arm."""

from types import SimpleNamespace

import numpy as np
import pytest

from kvshare_sglang.bench import agents
from kvshare_sglang.bench.__main__ import main, parse
from kvshare_sglang.bench.server import Answer


def arguments(*words):
    return parse(["agents", *words])[0]


QUICK = ("--programs", "3", "--others", "2", "--turns", "3", "--rate", "1000", "--tool-s", "0.001")
PAGE = """sglang:kvshare_pinned_tokens{tp_rank="0"} 1228.8
sglang:kvshare_pins_total{event="taken",tp_rank="0"} %d.0
"""


class Fake:
    """A server that answers 7, 8, ... and has what it saw before as a prefix."""

    spec = SimpleNamespace(name="ttl")

    def __init__(self):
        self.asked = []
        self.client = self

    def ask(self, ids, *, max_new_tokens):
        held = [one for one in self.asked if list(ids[: len(one)]) == one]
        self.asked.append(list(ids))
        meta = {"prompt_tokens": len(ids), "cached_tokens": max(map(len, held), default=0)}
        return Answer(0.1, 0.2, list(range(7, 7 + max_new_tokens)), meta)

    def get(self, path):
        assert path == "/metrics"
        return SimpleNamespace(text=PAGE % len(self.asked), raise_for_status=lambda: self.get(path))


def test_the_same_programs_come_for_a_seed_and_begin_alike():
    one, same, other = (agents.drawn(arguments(*QUICK), vocab=99, seed=s) for s in (1, 1, 2))
    assert one == same != other
    assert [p.due_s for p in one] == sorted(p.due_s for p in one)
    starts = {tuple(p.first[: agents.SHARED]) for p in one if p.gaps}
    assert len(starts) == 1
    assert sorted(len(p.gaps) for p in one) == [0, 0, 2, 2, 2]


def test_a_program_asks_with_all_that_was_said_and_tools_are_not_its_time(monkeypatch):
    monkeypatch.setattr(agents, "SAMPLE_S", 0.001)
    args = arguments(*QUICK, "--new-tokens", "2")
    server = Fake()
    programs = agents.drawn(args, vocab=99, seed=0)
    row = agents.played(server, programs, args)
    assert len(server.asked) == 3 * 3 + 2
    for program in (one for one in programs if one.gaps):
        second = [*program.first, 7, 8, *program.told[0]]
        assert second in server.asked
        assert [*second, 7, 8, *program.told[1]] in server.asked
    grown = args.tool_tokens + 2
    assert row["tokens"] == 5 * args.context + 3 * (args.context + grown) + 3 * (
        args.context + 2 * grown
    )
    assert row["ran"] == 5 * args.context + 6 * grown  # each token but once
    assert (len(row["program_s"]), len(row["once_s"])) == (3, 2)
    assert row["pinned_most"] == pytest.approx(1228.8 / args.max_total_tokens)
    assert row["pins"] == {"taken": 11}


def test_what_reused_did_not_run():
    record = {"exact_tokens": 5, "blended_tokens": 4, "copied_tokens": 3, "recomputed_tokens": 9}
    meta = {"prompt_tokens": 21, "cached_tokens": 5}
    ours = Answer(0.1, 0.2, [], {**meta, "kvshare": [record]})
    assert 21 - agents.rows_of(ours, stock=False) == 12
    assert 21 - agents.rows_of(Answer(0.1, 0.2, [], meta), stock=True) == 5


def test_arms_are_held_against_the_first_in_the_same_repeat():
    def row(arm, repeat, seconds):
        fixed = {"once_s": [], "ttft_mean_s": 0.1, "tokens": 100, "ran": 25, "pinned_mean": 0.1}
        pins = {"pinned_most": 0.2, "pins": {"taken": 1}}
        return {"arm": arm, "repeat": repeat, "program_s": [seconds] * 2, **fixed, **pins}

    rows = [row("stock", 0, 4.0), row("ttl", 0, 2.0), row("ttl", 1, 8.0), row("stock", 1, 8.0)]
    stock, ttl = agents.summary(rows, ["stock", "ttl"])
    assert (stock["ratio"], ttl["ratio"], ttl["ratio_range"]) == (1.0, 1.5, [1.0, 2.0])
    assert (ttl["mean_s"], ttl["ran_share"], ttl["pins"]) == (5.0, 0.25, {"taken": 2})
    assert "1.50x  1.00 to 2.00" in agents.show([ttl])
    assert np.isclose(ttl["p95_s"], 8.0)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--programs", "0"], "--programs must be above 0, got 0"),
        (["--turns", "1"], "--turns must be 2 or more, got 1"),
        (["--tool-s", "-1"], "--tool-s must be above 0, got -1.0"),
        (["--others", "-1"], "--others must be 0 or more, got -1"),
        (["--context", "300"], "--context must be above 300, got 300"),
        (["--turns", "90"], "--max-total-tokens must hold 15840 of a program, got 12288"),
    ],
)
def test_bad_values_are_refused_with_their_limits(words, told, capsys):
    assert main(["agents", *words]) == 1
    assert told in capsys.readouterr().err
