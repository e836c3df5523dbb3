"""Decode refresh: refreshed rows are what full prefill computes, and nothing else changes."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import Texts
from lab import Lab, computed, lab, request
from test_check import moved
from tiny_models import make_model

TOL = {"atol": 2e-3, "rtol": 1e-3}
EAGER = {"kvshare_refresh_every": 1, "kvshare_refresh_above": 0.0}
ALL = {**EAGER, "kvshare_refresh_rows": 1 << 20}
NO_ROWS = {"kvshare_budget": 1e-6, "kvshare_seam": 0, "kvshare_window": 0}


@pytest.fixture(scope="module", params=[{}, {"disable_overlap_schedule": False, "page_size": 16}])
def eager_lab(request: pytest.FixtureRequest, llama: Path) -> Iterator[Lab]:
    """Refreshes a few rows of every request in every step."""
    settings = {**EAGER, "kvshare_refresh_rows": 8, **request.param}
    with lab(llama, kvshare=True, kvshare_select="trace", **settings) as it:
        yield it


@pytest.mark.parametrize(
    ("name", "select"),
    [("llama", "dhd"), ("llama", "trace"), ("qwen2", "trace"), ("qwen3", "trace")],
)
def test_refreshing_every_row_gives_the_kv_of_full_prefill(
    name: str, select: str, models: Path, texts: Texts
) -> None:
    """All that stands before the copies is exact, and nothing in them was computed on them."""
    source, prompt = moved(texts, 150)
    settings = {"kvshare_select": select, **ALL, **NO_ROWS}
    with lab(make_model(models, name), kvshare=True, **settings) as it:
        it.one(source, new=1)
        full = it.one(prompt, kvshare="exact", extra_key="other", new=1, keep="kv")
        part = it.one(prompt, new=8, keep="kv")
        told = part["kvshare"]
        assert told["refreshed_tokens"] == told["copied_tokens"] == 300
        assert it.ask("probes:counts")["tokens"]["refreshed"] == told["copied_tokens"]
        for mine, theirs in zip(part["kv"], full["kv"], strict=True):
            torch.testing.assert_close(mine[:, :320], theirs[:, :320], **TOL)


def test_what_was_stale_before_is_why(llama: Path, texts: Texts) -> None:
    """The oracle above can fail: without refresh the copied KV differs."""
    source, prompt = moved(texts, 150)
    with lab(llama, kvshare=True, kvshare_select="trace", **NO_ROWS) as it:
        it.one(source, new=1)
        full = it.one(prompt, kvshare="exact", extra_key="other", new=1, keep="kv")
        part = it.one(prompt, new=8, keep="kv")
        assert "refreshed_tokens" not in part["kvshare"]
        assert any(
            (mine - theirs)[:, :320].abs().max() > 0.1
            for mine, theirs in zip(part["kv"], full["kv"], strict=True)
        )


def test_refresh_in_batches_touches_nobody_else(eager_lab: Lab, texts: Texts) -> None:
    it = eager_lab
    pairs = [moved(texts, n) for n in (90, 140, 110)]
    plain = [texts.passage(n) for n in (40, 130)]
    it.flush()
    exact = [request(f"e{i}", p, kvshare="exact", extra_key="e", new=20, keep="kv")
             for i, p in enumerate([*plain, pairs[2][1]])]  # fmt: skip
    expected = it.play(exact)
    it.play([request(f"s{i}", source, new=1) for i, (source, _) in enumerate(pairs)])
    alone = it.one(pairs[0][1], new=20, keep="kv")
    it.flush()
    sources = [request(f"s{i}", source, new=1) for i, (source, _) in enumerate(pairs)]
    reusing = [request(f"d{i}", prompt, new=20 + i, keep="kv")
               for i, (_, prompt) in enumerate(pairs)]  # fmt: skip
    late = [request("gone", pairs[1][1], new=200)]
    again = [{**spec, "extra_key": "f"} for spec in exact]
    answers = it.play(
        [*sources, ("idle",), [*reusing, *again], ("polls", 4), late, ("polls", 6),
         ("abort", "gone")]
    )  # fmt: skip
    for rid in ("e0", "e1", "e2"):
        assert answers[rid]["output"] == expected[rid]["output"]
        for mine, theirs in zip(answers[rid]["kv"], expected[rid]["kv"], strict=True):
            torch.testing.assert_close(mine, theirs, **TOL)
    for rid in ("d0", "d1", "d2"):
        assert answers[rid]["kvshare"]["refreshed_tokens"] > 8
    assert answers["d0"]["output"] == alone["output"]
    for mine, theirs in zip(answers["d0"]["kv"], alone["kv"], strict=True):
        torch.testing.assert_close(mine, theirs, **TOL)
    state = it.ask("probes:check")
    assert state["pins"] == state["protected"] == 0
    assert state["available"] + state["resident"] == state["total"]
    assert it.ask("probes:plain_keys_of_depth") <= {0}


def test_refreshed_requests_survive_retraction(llama: Path, texts: Texts) -> None:
    settings = {**EAGER, "kvshare_refresh_rows": 8}
    pairs = [moved(texts, n) for n in (90, 140, 110)]
    with lab(llama, kvshare=True, kvshare_select="trace", **settings) as it:
        it.ask("probes:retract_every", 3)
        it.play([request(f"s{i}", source, new=1) for i, (source, _) in enumerate(pairs)])
        answers = it.play(
            [[request(f"d{i}", prompt, new=40) for i, (_, prompt) in enumerate(pairs)]]
        )
        assert sum(a["retractions"] for a in answers.values()) > 0
        assert all(len(a["output"]) == 40 for a in answers.values())
        state = it.ask("probes:check")
        assert state["pins"] == state["protected"] == 0
        assert state["available"] + state["resident"] == state["total"]


def test_the_watch_ends_where_refreshed_rows_do_not_change(llama: Path, texts: Texts) -> None:
    settings = {**EAGER, "kvshare_refresh_rows": 8}
    with lab(llama, kvshare=True, kvshare_select="trace", **settings) as it:
        it.ask("probes:force_plans")
        prompt = texts.passage(300)
        it.one(prompt + texts.passage(32), extra_key="donor", new=1)
        part = it.one(prompt, forced=[(0, 20), (290, 300)], new=30)
        assert part["kvshare"]["copied_tokens"] > 200
        assert part["kvshare"]["refreshed_tokens"] == 3 * 8


@pytest.mark.parametrize(("select", "limit"), [("dhd", 3), ("trace", 3), ("trace", 24)])
def test_rows_merged_into_few_stretches_are_neither_copied_nor_watched(
    llama: Path, texts: Texts, select: str, limit: int
) -> None:
    """Merging may run rows before the first copy: these are exact, and the tree shares them."""
    settings = {**EAGER, "kvshare_refresh_rows": 8, "mutation": "probes:stretches_as_on_a_gpu"}
    with lab(
        llama, kvshare=True, kvshare_select=select, max_running_requests=limit, **settings
    ) as it:
        it.ask("probes:force_plans")
        for i, length in enumerate((160, 300)):
            prompt = texts.passage(length)
            it.one(prompt + texts.passage(32), extra_key="donor", new=1)
            part = it.one(prompt, forced=[(0, 20), (length - 5, length)], extra_key=f"{i}", new=12)
            told = part["kvshare"]
            assert told["declined"] is None
            assert told["copied_tokens"] + computed(told) == length
            if told["copied_tokens"] >= 24:
                assert told["refreshed_tokens"] >= 8
            again = it.one(prompt, extra_key=f"{i}", kvshare="exact", new=1, keep="kv")
            fresh = it.one(prompt, extra_key=f"other{i}", kvshare="exact", new=1, keep="kv")
            for mine, theirs in zip(again["kv"], fresh["kv"], strict=True):
                torch.testing.assert_close(mine, theirs, **TOL)
        assert it.ask("probes:check")["pins"] == 0


@pytest.mark.parametrize("what", ["refresh", "watch", "watched"])
def test_a_fault_in_a_refresh_costs_the_refresh_only(llama: Path, texts: Texts, what: str) -> None:
    source, prompt = moved(texts, 150)
    with lab(llama, kvshare=True, kvshare_select="trace", **EAGER) as it:
        it.one(source, new=1)
        plain = it.one(prompt, new=1, keep="kv")
        it.flush()
        it.one(source, new=1)
        it.ask(f"probes:break_{what}")
        part = it.one(prompt, new=12, keep="kv")
        assert "refreshed_tokens" not in part["kvshare"]
        assert len(part["output"]) == 12
        for mine, theirs in zip(part["kv"], plain["kv"], strict=True):
            torch.testing.assert_close(mine, theirs, **TOL)
        assert it.ask("probes:check")["pins"] == 0
