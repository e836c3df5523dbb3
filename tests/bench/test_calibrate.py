"""Calibrating finds the layer that sees what an answer rests on, on a model where it is known."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tiny_models import DEAD, with_a_dead_layer

from kvshare_sglang.bench import calibrate
from kvshare_sglang.bench.__main__ import main
from kvshare_sglang.bench.calibrate.choice import (
    BUDGETS,
    OTHERS,
    choose,
    is_better,
    judge,
    means,
)
from kvshare_sglang.bench.calibrate.measure import Candidate, Measured, Row, candidates
from kvshare_sglang.bench.calibrate.prompts import prompts
from kvshare_sglang.bench.models import READER
from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.policy.select.attention_trace import probe_layer
from kvshare_sglang.policy.shadow import FLOOR, Z, upper_bound
from kvshare_sglang.runtime import calibration
from kvshare_sglang.sim.engine import Model

SHALLOW, DEEP = Candidate(0.25, 6), Candidate(0.5, 0)


def test_a_layer_that_says_nothing_is_passed_over_for_the_one_that_does(tmp_path: Path) -> None:
    model = Model(with_a_dead_layer(READER, tmp_path / "dead-layer"))
    among = [one for one in candidates(model, [0.25, 0.35, 0.5]) if not one.stretch]
    assert [one.layer(len(model.layers)) for one in among] == [3, 4, DEAD]
    assert probe_layer(len(model.layers), KVShareConfig().probe_at) == DEAD
    asked = prompts(READER, 12, longest=len(model.table))
    found = calibrate.collect(model, asked, among, deadline=float("inf"), latest=float("inf"))
    assert len(found) == 12
    assert choose(found) == Candidate(0.25, 0)
    best = judge([{arm: row[arm] for arm in (None, Candidate(0.25, 0))} for row in found])
    assert (best.chosen, best.holds) == (Candidate(0.25, 0), True)
    assert best.means[best.chosen].kl < 0.2 * means(found)[Candidate(0.5, 0)].kl


def rows(copies: float, *, shallow: list[float], deep: list[float]) -> list[Row]:
    """Rows with these KLs (in thousandths) by prompt."""

    def one(kl: float) -> Measured:
        return Measured(kl / 1000, kl / 1000, 1.0, 0.2)

    return [
        {None: one(copies), DEEP: one(mine), SHALLOW: one(other)}
        for mine, other in zip(deep, shallow, strict=True)
    ]


@pytest.mark.parametrize(
    ("found", "chosen"),
    [
        # as good as the deeper one within the noise: the cheaper
        (rows(9, shallow=[1.0, 3, 1, 3], deep=[2.1, 1.8, 2.0, 1.9]), SHALLOW),
        # worse on each prompt, however little
        (rows(9, shallow=[1.1, 2.2, 3.3, 4.4], deep=[1.0, 2, 3, 4]), DEEP),
        (rows(0.5, shallow=[1.0, 1, 1], deep=[2.0, 2, 2]), SHALLOW),
    ],
)
def test_the_cheapest_that_is_as_good_as_any_is_chosen(found: list[Row], chosen: Candidate) -> None:
    assert choose(found) == chosen


def of_one(kls: list[float], *, agree: int, copies: float = 9) -> list[Row]:
    """One candidate, and copies alone."""
    return [
        {None: Measured(copies, copies, 0, 0.1), DEEP: Measured(kl, kl, float(i < agree), 0.2)}
        for i, kl in enumerate(kls)
    ]


@pytest.mark.parametrize(
    ("mine", "theirs", "better"),
    [
        ([1.0, 2, 3, 4], [1.1, 2.2, 3.3, 4.4], True),  # on each prompt, however little
        ([1.0, 2, 3, 4], [1.0, 2, 3, 4], False),
        ([1.1, 2.2, 3.3, 4.4], [1.0, 2, 3, 4], False),
        ([1.0, 4, 1, 4], [4.0, 1.0, 4, 1.1], False),  # within the noise
        ([1.0, 2, 3], [1.1, 2.2, 3.3, 4.4], True),  # fewer prompts: those that both have
    ],
)
def test_better_is_what_is_closer_beyond_the_noise_of_the_pairs(
    mine: list[float], theirs: list[float], better: bool
) -> None:
    def of(kls: list[float]) -> list[Row]:
        return [{None: row[None], DEEP: row[DEEP]} for row in rows(9, shallow=kls, deep=kls)]

    assert is_better(of(mine), of(theirs)) is better


@given(st.lists(st.tuples(*[st.floats(0, 0.02)] * len(BUDGETS)), min_size=3, max_size=12))
def test_the_least_budget_with_which_few_tokens_are_others_is_chosen(kls: list[Any]) -> None:
    """By its definition, one budget after the other; without one that is enough, the largest."""
    found = [
        {None: Measured(9, 9, 0, 0)}
        | {
            DEEP._replace(budget=b): Measured(kl, kl, 1, b)
            for b, kl in zip(BUDGETS, row, strict=True)
        }
        for row in kls
    ]
    others = [sum(math.sqrt(row[i] / 2) for row in kls) / len(kls) for i in range(len(BUDGETS))]
    assume(all(abs(one - OTHERS) > 1e-9 for one in others))
    enough = [b for b, one in zip(BUDGETS, others, strict=True) if one <= OTHERS]
    assert judge(found).chosen == DEEP._replace(budget=min(enough, default=max(BUDGETS)))


@pytest.mark.parametrize(
    ("found", "holds"),
    [
        # a quarter or a sixth of the answers is another: however few prompts were asked
        (of_one([0.001] * 9 + [1.0] * 3, agree=9), False),
        (of_one([0.001] * 20 + [1.0] * 4, agree=20), False),
        (of_one([0.001] * 80 + [1.0] * 16, agree=80), False),
        # as many first tokens flip, between tokens that are as likely (SmolLM2's own calibration)
        (of_one([0.0132] * 24, agree=20), True),
        (of_one([0.0132] * 96, agree=80), False),  # too many of so many
        # good on average, and not known: one in twelve is far off
        (of_one([0.001] * 11 + [1.0], agree=12), False),
        (of_one([0.001] * 12, agree=12), True),
        # copies alone are closer to full prefill
        (of_one([0.002] * 12, agree=12, copies=0.0005), False),
        # first tokens differ too often; three flips of 30 are not enough to say so
        (of_one([0.001] * 30, agree=21), False),
        (of_one([0.001] * 30, agree=27), True),
    ],
)
def test_answers_hold_where_they_are_known_to(found: list[Row], holds: bool) -> None:
    assert judge(found).holds == holds


@given(st.lists(st.floats(0, 0.1), min_size=3, max_size=30), st.integers(2, 8))
def test_measuring_less_of_kl_never_makes_answers_hold(kls: list[float], more: int) -> None:
    """What more prompts of the same kind say against, fewer do not say for."""
    longer = judge(of_one(kls * more, agree=len(kls) * more)).holds
    assert longer or not judge(of_one(kls, agree=len(kls))).holds


@pytest.mark.parametrize("path", sorted(calibration.BUILT_IN.iterdir()), ids=lambda path: path.stem)
def test_what_comes_with_the_package_holds_by_the_same_rule(path: Path) -> None:
    """Whatever its prompts gave: of values with this mean square the end of the interval of the
    mean is highest where it is taken here (Cauchy and Schwarz)."""
    found = calibration.read(path)
    trace, copies, n = found.check["trace"], found.check["copies"], found.prompts
    most = math.sqrt(trace["kl"] / 2 * (1 + Z**2 / (n - 1)))
    surely = trace["kl"] < copies["kl"] and most <= 1 - FLOOR
    assert found.holds == (surely and upper_bound(round(trace["agree"] * n), n) >= FLOOR)


def test_the_command_writes_what_a_server_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(calibration.FOLDER, str(tmp_path))
    monkeypatch.setattr(calibration, "BUILT_IN", tmp_path / "nothing")
    monkeypatch.setattr(calibrate, "FEWEST", 3)
    monkeypatch.setattr(calibrate, "is_better", lambda mine, theirs: False)
    argv = ["calibrate", str(READER), "--n", "3", "--probe-at", "0.25", "--threads", "1"]
    assert calibration.find(str(READER)) is None
    assert main([*argv, "--minutes", "0"]) == 1
    assert "only 1 prompts were through within --minutes 0, at least 3" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert main(argv) == 0
    found = calibration.find(str(READER))
    assert found is not None
    assert (found.path.parent, found.probe_at, found.prompts) == (tmp_path, 0.25, 3)
    assert found.budget in BUDGETS
    assert str(found.path) in capsys.readouterr().out
    # The reader needs no more than the default; of a model that does, each budget is measured.
    told = json.loads(found.path.read_text())["candidates"]
    assert {one["budget"] for one in told} == {BUDGETS[0]}
    monkeypatch.setattr(calibrate, "enough", lambda rows: False)
    assert main(argv) == 0
    told = json.loads(found.path.read_text())["candidates"]
    kls = {one["budget"]: one["kl"] for one in told if one["stretch"] == found.stretch}
    assert list(kls) == list(BUDGETS)
    assert kls[BUDGETS[-1]] <= kls[BUDGETS[0]]
    assert json.loads(found.path.read_text())["depends"] is None
    # where it is better to know what the sources attended to, servers on CPUs are told
    monkeypatch.setattr(calibrate, "enough", lambda rows: True)
    monkeypatch.setattr(calibrate, "is_better", lambda mine, theirs: True)
    capsys.readouterr()
    assert main(argv) == 0
    told = json.loads(found.path.read_text())
    assert told["depends"]["at"] in calibrate.DEPENDS
    assert sum(one["depends_at"] > 0 for one in told["candidates"]) == 1
    config = calibration.settled(KVShareConfig(), given=(), model=str(READER), on_cpu=True)
    assert (config.depends_at, config.budget) == (told["depends"]["at"], BUDGETS[0])
    assert config.probe_at == 0.25
    assert "; on CPUs probe layer 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (["no-such-model"], "MODEL no-such-model is no model directory, and not in"),
        ([str(READER), "--probe-at", "1.5"], "--probe-at must be in [0, 1], got [1.5]"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    argv: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", *argv]) == 1
    assert why in capsys.readouterr().err


def test_prompts_are_always_the_same_ones_and_reuse_something() -> None:
    first, again = (prompts(READER, 6, longest=2048) for _ in range(2))
    for one, two in zip(first, again, strict=True):
        assert one.case == two.case
        assert one.ids.tolist() == two.ids.tolist()
    assert {one.case for one in first} == {"splice", "edit far", "template"}


def test_a_model_without_a_chat_is_asked_in_plain_words(tmp_path: Path) -> None:
    """The reader's tokens stand in for any model's."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(READER / name, tmp_path / name)
    made = prompts(tmp_path, 6, longest=1 << 20)
    assert [one.case for one in made] == ["moved", "edited", "among others"] * 2
    assert [len(one.cached) for one in made] == [2, 1, 1] * 2
    with pytest.raises(calibrate.ScriptError, match="the model holds 100 tokens, a prompt here"):
        prompts(tmp_path, 6, longest=100)


@pytest.mark.parametrize(("enough", "through"), [(True, 12), (False, 5)])
def test_a_step_goes_on_past_its_time_till_it_has_enough(monkeypatch, enough, through) -> None:
    """So that a slow machine takes longer over one step rather than end with nothing; in all it
    takes what it was given."""
    now = iter(range(100))
    monkeypatch.setattr(calibrate, "time", SimpleNamespace(monotonic=lambda: next(now)))
    monkeypatch.setattr(calibrate, "measure", lambda *args: {None: args[1]})
    asked = [SimpleNamespace(case="moved")] * 60
    latest = 50 if enough else 3
    found = calibrate.collect(None, asked, [], deadline=1, latest=latest)  # type: ignore[arg-type]
    assert len(found) == through
