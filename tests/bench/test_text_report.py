"""The table of answers about passages: flips are counted both ways, intervals are of pairs."""

import json

import pytest

from kvshare_sglang.bench.text import plot, report


@pytest.fixture
def folder(tmp_path):
    def one(right, **more):
        return {"right": right, "text": "", **more}

    lines = [
        {"tokens": 100, "arms": {"full": one(a), "copies": one(b, kl=k, kl_most=2 * k)}}
        for a, b, k in ((1, 0, 0.1), (1, 1, 0.2), (0, 1, 0.3), (1, 0, 0.4))
    ]
    (tmp_path / "codes3-splice.jsonl").write_text("".join(json.dumps(n) + "\n" for n in lines))
    return tmp_path


@pytest.fixture
def rows(folder):
    return report.summary(folder)


def test_flips_are_counted_both_ways(rows):
    full, copies = rows
    assert (copies["task"], copies["case"], copies["n"]) == ("codes3", "splice", 4)
    assert (full["right"], copies["right"], copies["right_minus_full"]) == (0.75, 0.5, -0.25)
    assert (copies["lost"], copies["won"]) == (2, 1)
    assert (full["lost"], full["won"], full["right_minus_full_ci95"]) == (0, 0, [0.0, 0.0])
    low, high = copies["right_minus_full_ci95"]
    assert -1 <= low < -0.25 < high <= 1


def test_what_an_arm_adds_to_the_margin_and_what_it_lost_though_it_was_clear(tmp_path):
    def line(full, mine):
        arms = {"full": full, "trace": mine}
        return {"tokens": 9, "arms": {k: {"right": m > 0, "margin": m} for k, m in arms.items()}}

    lines = [line(2.0, 1.0), line(0.6, -0.4), line(0.4, -0.6), line(-1.0, 0.0)]
    (tmp_path / "codes3-splice.jsonl").write_text("".join(json.dumps(n) + "\n" for n in lines))
    full, trace = report.summary(tmp_path)
    assert (full["noise"], full["lost_clear"]) == (0.0, 0)
    assert (trace["lost"], trace["lost_clear"]) == (2, 1)
    assert trace["noise"] == pytest.approx(1.0)  # of -1, -1, -1 and +1
    assert "1.00" in report.show([full, trace])


def test_what_was_not_measured_is_none_and_still_shown(rows):
    full, copies = rows
    assert full["kl"] is None
    assert copies["kl"] == pytest.approx(0.25)
    assert "nan" in report.show(rows)


def test_f1_is_told_of_answers_in_words_and_of_no_codes(tmp_path):
    line = {"tokens": 9, "arms": {"full": {"right": 1, "f1": 1.0}, "ours": {"right": 0, "f1": 0.5}}}
    for task in ("qa1", "codes3"):
        (tmp_path / f"{task}-splice.jsonl").write_text(json.dumps(line) + "\n")
    told = {
        (row["task"], row["arm"]): (row["f1"], row["f1_minus_full"])
        for row in report.summary(tmp_path)
    }
    assert told == {
        ("qa1", "full"): (1.0, 0.0), ("qa1", "ours"): (0.5, -0.5),
        ("codes3", "full"): (None, None), ("codes3", "ours"): (None, None),
    }  # fmt: skip


def test_flips_are_told_by_kl(folder):
    low, high = report.flips(folder, bins=2)
    assert (low["n"], low["kl"], low["flips"]) == (2, pytest.approx(0.15), 0.5)
    assert (high["n"], high["kl"], high["flips"]) == (2, pytest.approx(0.35), 1.0)
    assert report.flips(folder, bins=5) == []  # fewer answers than bins


def _line(**arms):
    """KL and FLOPs of each arm."""
    full = {"full": {"right": 1, "text": ""}}
    shown = {k: {"right": 1, "text": "", "kl": kl, "computed": c} for k, (kl, c) in arms.items()}
    return {"tokens": 100, "arms": full | shown}


def test_kl_is_compared_at_the_same_flops(tmp_path):
    """A rival halves its KL with each 10% of the FLOPs: at 25% it has copies' over 2 ** 2.5."""
    points = {f"epic {b}": (0.8 * 2 ** (-10 * b), b) for b in (0.1, 0.2, 0.3)}
    mine = {"trace 0.2": (0.8 * 2**-3.5, 0.25), "trace 0.3": (0.01, 0.4)}
    lines = [_line(copies=(0.8, 0.0), **mine, **points)] * 3
    (tmp_path / "codes3-edit.jsonl").write_text("".join(json.dumps(n) + "\n" for n in lines))
    (level,) = report.same_flops(tmp_path)  # 40% lies beyond what the rival was given
    assert (level["arm"], level["rival"], level["computed"]) == ("trace 0.2", "epic", 0.25)
    assert level["ratio"] == pytest.approx(0.5)
    assert level["ratio_ci95"] == pytest.approx([0.5, 0.5])
    assert "0.50" in report.show_level([level])


def test_without_budgets_there_is_nothing_to_compare(folder):
    (folder / "codes3-edit.jsonl").write_text("")  # a run that was stopped at once
    assert report.same_flops(folder) == []


def test_answers_are_drawn(tmp_path):
    lines = [_line(copies=(0.8, 0.1), **{"trace 0.2": (0.1, 0.3), "epic 0.2": (0.2, 0.2)})]
    for case in ("edit", "splice"):
        (tmp_path / f"codes3-{case}.jsonl").write_text(json.dumps(lines[0]) + "\n")
    plot.draw(report.summary(tmp_path), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_what_a_doubt_would_settle_is_told_of_answers_without_one(tmp_path):
    """Before an answer parts from full prefill's a doubt makes it that; later it comes too late."""

    def line(full, ours, margins, apart):
        mine = {"right": ours, "margins": margins, "apart_at": apart, "same": apart is None,
                "doubted": False}  # fmt: skip
        return {"tokens": 9, "arms": {"full": {"right": full}, "ours": mine}}

    lines = [
        line(True, True, [3.0, 0.15, 2.0], None),
        line(True, False, [3.0, 0.5, 2.0], 1),  # parts where its margin is .5
        line(True, False, [0.25, 2.0, 0.05], 1),  # a doubt of .1 comes too late
        line(False, True, [3.0, 1.1, 2.0], 1),
    ]
    path = tmp_path / "codes3-splice.jsonl"
    path.write_text("".join(json.dumps(n) + "\n" for n in lines))
    told = {row["doubt"]: row for row in report.doubts(tmp_path)}
    outcome = {d: (r["settled"], r["lost"], r["won"], r["same"]) for d, r in told.items()}
    assert outcome[0.0] == (0.0, 2, 1, 0.25)
    assert outcome[0.1] == (0.25, 2, 1, 0.25)
    assert outcome[0.2] == (0.5, 2, 1, 0.25)
    assert outcome[0.3] == (0.5, 1, 1, 0.5)
    assert outcome[0.6] == (0.75, 0, 1, 0.75)
    assert outcome[1.2] == (1.0, 0, 0, 1.0)
    assert [told[d]["at_first"] for d in (0.2, 0.3)] == [0.0, 0.25]
    lines[0]["arms"]["ours"]["doubted"] = True  # measured with one: nothing to tell
    path.write_text("".join(json.dumps(n) + "\n" for n in lines))
    assert report.doubts(tmp_path) == []
