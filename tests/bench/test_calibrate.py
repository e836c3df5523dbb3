"""Calibrating finds the layer that sees what an answer rests on, on a model where it is known."""

import shutil
from pathlib import Path

import pytest
from tiny_models import DEAD, with_a_dead_layer

from kvshare_sglang.bench import calibrate
from kvshare_sglang.bench.__main__ import main
from kvshare_sglang.bench.calibrate.choice import choose
from kvshare_sglang.bench.calibrate.measure import Candidate, Measured, Row, candidates
from kvshare_sglang.bench.calibrate.prompts import prompts
from kvshare_sglang.bench.models import READER
from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.policy.select.attention_trace import probe_layer
from kvshare_sglang.runtime import calibration
from kvshare_sglang.sim.engine import Model

SHALLOW, DEEP = Candidate(0.25, 6), Candidate(0.5, 0)


def test_a_layer_that_says_nothing_is_passed_over_for_the_one_that_does(tmp_path: Path) -> None:
    model = Model(with_a_dead_layer(READER, tmp_path / "dead-layer"))
    among = [one for one in candidates(model, [0.25, 0.35, 0.5]) if not one.stretch]
    assert [one.layer(len(model.layers)) for one in among] == [3, 4, DEAD]
    assert probe_layer(len(model.layers), KVShareConfig().probe_at) == DEAD
    asked = prompts(READER, 12, longest=len(model.table))
    found = calibrate.collect(model, asked, among, deadline=float("inf"))
    assert len(found) == 12
    best = choose(found)
    assert best.chosen == Candidate(0.25, 0)
    assert best.holds
    assert best.means[best.chosen].kl < 0.2 * best.means[Candidate(0.5, 0)].kl


def rows(copies: float, *, shallow: list[float], deep: list[float], agree: float = 1) -> list[Row]:
    """Rows with these KLs by prompt; of so many the first token is full prefill's."""

    def one(kl: float, i: int) -> Measured:
        return Measured(kl, kl, float(i < agree * len(deep)), 0.2)

    return [
        {None: one(copies, i), DEEP: one(deep[i], i), SHALLOW: one(shallow[i], i)}
        for i in range(len(deep))
    ]


@pytest.mark.parametrize(
    ("found", "chosen", "holds"),
    [
        # as good as the deeper one within the noise: the cheaper
        (rows(9, shallow=[1.0, 3, 1, 3], deep=[2.1, 1.8, 2.0, 1.9]), SHALLOW, True),
        # worse on each prompt, however little
        (rows(9, shallow=[1.1, 2.2, 3.3, 4.4], deep=[1.0, 2, 3, 4]), DEEP, True),
        # copies alone are closer to full prefill
        (rows(0.5, shallow=[1.0, 1, 1], deep=[2.0, 2, 2]), SHALLOW, False),
        # first tokens differ too often; three flips of 30 are not enough to say so
        (rows(9, shallow=[1.0] * 30, deep=[2.0] * 30, agree=0.7), SHALLOW, False),
        (rows(9, shallow=[1.0] * 30, deep=[2.0] * 30, agree=0.9), SHALLOW, True),
    ],
)
def test_the_cheapest_that_is_as_good_as_any_is_chosen(
    found: list[Row], chosen: Candidate, holds: bool
) -> None:
    best = choose(found)
    assert (best.chosen, best.holds) == (chosen, holds)


def test_the_command_writes_what_a_server_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(calibration.FOLDER, str(tmp_path))
    monkeypatch.setattr(calibration, "BUILT_IN", tmp_path / "nothing")
    monkeypatch.setattr(calibrate, "FEWEST", 3)
    argv = ["calibrate", str(READER), "--n", "3", "--probe-at", "0.25", "--threads", "1"]
    assert calibration.find(str(READER)) is None
    assert main([*argv, "--minutes", "0"]) == 1
    assert "1 prompts were through after --minutes 0, at least 3" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert main(argv) == 0
    found = calibration.find(str(READER))
    assert found is not None
    assert (found.path.parent, found.probe_at, found.prompts) == (tmp_path, 0.25, 3)
    assert str(found.path) in capsys.readouterr().out


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
