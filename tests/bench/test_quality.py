"""Commands about answers run from end to end on the reader, and say what they are asked to say."""

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kvshare_sglang.bench import __main__ as bench
from kvshare_sglang.bench import gate, stream, tasks, tpot
from kvshare_sglang.bench.quality import plot, result, tables
from kvshare_sglang.bench.quality.cases import Encoder

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


def test_a_stream_comes_back_to_earlier_text():
    encode = Encoder(ROOT / "tests" / "data" / "reader")
    found = list(stream.requests(encode, n=24, seed=0))
    seen: set[tuple[int, ...]] = set()
    known = []
    for one in found:
        spans = {tuple(one.ids[i : i + 16]) for i in range(len(one.ids) - 16)}
        known.append(len(spans & seen) / len(spans))
        seen |= spans
    assert np.mean([k > 0.3 for k in known]) > 0.75  # nearly all do
    assert max(known) < 1  # and none brings nothing new


def test_a_scene_that_comes_back_was_edited_and_the_question_turns_on_it():
    rng = random.Random("test of edited scenes")
    told = 0
    for _ in range(20):
        scene = tasks.scene(rng, {"hops": 6, "state": 4, "lookup": 4}, stream.SIZE)
        if (changed := stream.edited(rng, scene)) is None:
            continue
        told += 1
        new, ask = changed
        facts = [[f for doc in docs for f in doc.facts] for docs in (scene, new)]
        assert sum(a != b for a, b in zip(*facts, strict=True)) == 1
        assert tasks.read(new)[ask].answer != tasks.read(scene)[ask].answer
    assert told > 10


def test_a_stream_that_gets_worse_has_a_slope_that_chance_does_not_give(tmp_path):
    good = [{"right": True, "reused": 9, "tokens": 10, "depth": 1}] * 100
    worse = [{**one, "right": i < 50} for i, one in enumerate(good)]
    flat, falling = (
        stream.summary(found, good, depth=1, n=100) for found in (good, worse)
    )  # fmt: skip
    assert flat["slope_per_100"] == pytest.approx(0)
    assert falling["slope_per_100"] == pytest.approx(-1.5, abs=0.05)
    assert falling["slope_per_100"] < falling["chance95"][0]
    assert [part["accuracy"] for part in falling["by_50"]] == [1.0, 0.0]
    told = stream.show([flat, falling])
    plot.draw_streams([flat, falling], tmp_path / "s.png")
    assert (tmp_path / "s.png").stat().st_size > 10_000
    assert "90.0%" in told
    assert "0.500" in told


def test_time_per_token_is_told_of_the_prompts_that_refreshed():
    off = [{"tpot_s": 0.010, "refreshed": 0}] * 4
    on = [{"tpot_s": 0.010 + 0.001 * rows, "refreshed": rows} for rows in (0, 2, 0, 2)]
    row = tpot.row("every 1", on, off)
    assert (row["n"], row["of"], row["refreshed_rows"]) == (2, 4, 1.0)
    assert row["ratio_off"] == pytest.approx(1.2)
    assert tpot.row("idle", off, off)["n"] == 4
    assert "1.200" in tpot.show([row])


def test_tables_of_answers_are_those_of_an_earlier_result(tmp_path, capsys):
    """Of measured numbers: lines that the docs have told."""
    page = tmp_path / "page.md"
    page.write_text("<!-- answers -->\n<!-- /answers -->\n<!-- lists -->\n<!-- /lists -->\n")
    measured = ROOT / "benchmarks" / "reader" / "quality.json"
    assert bench.main(["quality", "--result", str(measured), "--table", str(page)]) == 0
    assert "tables of page.md: answers, lists" in capsys.readouterr().out
    told = page.read_text().splitlines()
    row = "| chains of facts: edited far from the question | 0.924 | **0.904** | 0.484 | 0.440 |"
    assert row in told
    assert any(line.startswith("(accuracy, 500 prompts a row; 12 to 33% of") for line in told)
    assert any(line.startswith("| hops | 500 | 0.780 | 0.664 | **0.770** |") for line in told)


def test_an_arm_is_told_at_the_budget_that_computes_as_much_as_ours():
    def made(selector, budget, computed):
        names = {"task": "hops", "case": "splice", "selector": selector, "budget": budget}
        return {**names, "computed_share": computed}

    rows = [
        made("trace", 0.3, 0.4), made("trace", 0.12, 0.2), made("epic", 0.1, 0.1),
        made("epic", 0.2, 0.21), made("epic", 0.3, 0.4),
    ]  # fmt: skip
    found = result.compared(rows)["hops", "splice"]
    assert (found["trace"]["budget"], found["epic"]["budget"]) == (0.12, 0.2)


def test_results_under_earlier_names_are_read(tmp_path):
    old = tmp_path / "old.json"
    row = {"task": "hops", "case": "splice", "selector": "edit-window"}
    old.write_text(json.dumps({"rows": [row], "env": {}}))
    assert result.load(old)["rows"][0]["selector"] == "window"


def test_every_table_can_be_made_of_what_was_measured():
    found = result.load(ROOT / "benchmarks" / "reader" / "quality.json")
    for kind, make in tables.TABLES.values():
        head, rule, *rows = (line for line in make(found[kind]) if line.startswith("|"))
        assert rows
        assert {line.count(" |") for line in (head, rule, *rows)} == {head.count(" |")}
