"""Tables of answers are made of a result, whichever arms and names it has."""

import json
from pathlib import Path

from kvshare_sglang.bench import __main__ as bench
from kvshare_sglang.bench.quality import result, tables

ROOT = Path(__file__).resolve().parents[2]


def test_tables_of_answers_are_those_of_an_earlier_result(tmp_path, capsys):
    """Of measured numbers: lines that the docs have told."""
    page = tmp_path / "page.md"
    page.write_text("<!-- answers -->\n<!-- /answers -->\n<!-- lists -->\n<!-- /lists -->\n")
    measured = ROOT / "benchmarks" / "reader" / "quality.json"
    assert bench.main(["quality", "--result", str(measured), "--table", str(page)]) == 0
    assert "tables of page.md: answers, lists" in capsys.readouterr().out
    told = page.read_text().splitlines()
    row = "| chains of facts: edited far from the question | 0.924 | **0.904** | -3.4 to -0.8 |"
    assert f"{row} 0.642 | 0.484 | 0.440 |" in told
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
