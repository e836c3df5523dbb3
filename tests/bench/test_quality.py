"""Commands about answers run from end to end on the reader, and say what they are asked to say."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kvshare_sglang.bench import __main__ as bench
from kvshare_sglang.bench import gate

ROOT = Path(__file__).resolve().parents[2]
ROW = {
    "task", "case", "selector", "budget", "n", "accuracy", "accuracy_full", "accuracy_copy",
    "regained", "top1", "top1_sure", "kl", "rouge_l", "recomputed_share", "computed_share",
    "declined", "ci95",
}  # fmt: skip


def run(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvshare_sglang.bench", *args]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def test_quality_tells_selectors_apart(tmp_path):
    out, plot = tmp_path / "q.json", tmp_path / "q.png"
    selectors = ["full", "copy", "trace=0.12", "oracle=1.0"]
    done = run(
        "quality", "--task", "state", "--case", "edit far", "--n", "4", "--facts", "40",
        "--selector", *selectors, "--json", str(out), "--plot", str(plot),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(out.read_text())
    assert {"rows", "decode", "stream", "env"} == set(told)
    rows = {row["selector"]: row for row in told["rows"]}
    assert set(rows) == {"full", "copy", "trace", "oracle"}
    for row in rows.values():
        assert set(row) >= ROW
        assert row["n"] == 4
    # the ends of the scale, and what lies between them
    assert rows["full"]["kl"] == 0 == rows["full"]["declined"]
    assert rows["full"]["recomputed_share"] == 1 == rows["oracle"]["recomputed_share"]
    assert rows["oracle"]["accuracy"] == rows["full"]["accuracy"]
    assert rows["oracle"]["kl"] < 1e-3
    assert 0.1 < rows["trace"]["recomputed_share"] < 0.3
    assert rows["trace"]["kl"] <= rows["copy"]["kl"]
    assert plot.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--selector", "best"], "--selector must be one of full, copy"),
        (["--selector", "trace=1.5"], "budgets must be in [0, 1], got 1.5"),
        (["--selector", "trace=much"], "the budget of --selector trace must be a number"),
        (["--model", "nowhere"], "--model nowhere holds no config.json"),
    ],
)
def test_bad_input_is_refused_by_name(args, said, capsys):
    assert bench.main(["quality", *args]) == 1
    assert said in capsys.readouterr().err


def test_decode_compares_refresh_with_full_prefill(tmp_path):
    out = tmp_path / "d.json"
    done = run(
        "decode", "--task", "state", "--n", "3", "--keys", "4", "--facts", "40",
        "--json", str(out),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(out.read_text())["decode"]
    assert row["n"] == 3
    assert all(0 <= row[f"accuracy_{way}"] <= 1 for way in ("full", "off", "on"))


def test_rouge_l_has_its_noise_floor_beside_it(tmp_path):
    out = tmp_path / "r.json"
    done = run(
        "quality", "--task", "hops", "--case", "splice", "--n", "2", "--rouge", "1",
        "--facts", "30", "--selector", "full", "rerun", "copy", "--json", str(out),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = {row["selector"]: row for row in json.loads(out.read_text())["rows"]}
    assert all(row["rouge_n"] == 1 for row in rows.values())
    assert rows["full"]["rouge_l"] == 1
    assert 0 < rows["copy"]["rouge_l"] <= 1
    assert 0 < rows["rerun"]["rouge_l"] <= 1


def test_gate_tells_what_a_gate_on_deviation_catches(tmp_path):
    out = tmp_path / "g.json"
    done = run(
        "gate", "--task", "hops", "--case", "edit far", "--n", "8", "--facts", "30",
        "--layer", "1", "11", "--json", str(out),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    early, late = json.loads(out.read_text())["gate"]
    assert (early["layer"], late["layer"]) == (1, 11)
    assert 0 < early["astray"] == late["astray"] < early["n"] <= 8


def test_a_gate_is_judged_by_what_it_catches_at_its_price():
    astray = np.array([False] * 20 + [True] * 4)
    cases = np.array(["a"] * 22 + ["b"] * 2)
    apart = gate.row(3, np.concatenate([np.arange(20.0), [30, 31, 32, 33]]), astray, cases)
    assert (apart["auc"], apart["caught"], apart["wasted"]) == (1, 1, 0)
    alike = gate.row(3, np.ones(24), astray, cases)
    assert (alike["auc"], alike["caught"], alike["wasted"]) == (0.5, 0, 1)
    mixed = gate.row(3, np.concatenate([np.arange(20.0), [3, 30, 4.5, 31]]), astray, cases)
    assert mixed["caught"] == 0.5  # above 19, the largest: of 20 prompts none may be wasted
    assert mixed["caught_by_case"] == {"a": 0.5, "b": 0.5}
    assert mixed["wasted"] == 17 / 20  # to catch the 3, all from 3 on
    assert mixed["auc"] == (3.5 + 20 + 5 + 20) / 80


def test_a_case_that_a_task_does_not_have_is_left_out_and_said(tmp_path):
    """One of so many demonstrations decides no answer, so these prompts have no such edit."""
    out = tmp_path / "out.json"
    done = run(
        "quality", "--task", "few", "--case", "edit near", "splice", "--n", "1",
        "--selector", "copy", "--facts", "60", "--json", str(out),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "left out: few, edit near: none of 100 samples of 60 facts" in done.stderr
    assert [r["case"] for r in json.loads(out.read_text())["rows"]] == ["splice"]
