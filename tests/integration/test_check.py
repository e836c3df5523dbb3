"""Choosing rows inside the server: batches that mix, prompts in chunks, runs given up, faults."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import Texts
from lab import Lab, computed, lab, request

TOL = {"atol": 2e-3, "rtol": 1e-3}


SETTINGS = [
    {"kvshare_select": "dhd"},
    {"kvshare_select": "trace", "kvshare_probe_at": 0.34},
    {"kvshare_select": "trace", "disable_overlap_schedule": False, "page_size": 16},
]


@pytest.fixture(scope="module", params=SETTINGS)
def any_lab(request: pytest.FixtureRequest, llama: Path) -> Iterator[Lab]:
    with lab(llama, kvshare=True, **request.param) as it:
        yield it


def test_a_request_cut_before_and_one_chosen_later_share_a_batch_of_few_ranges(
    llama: Path, texts: Texts
) -> None:
    """Exact KV in all that is copied: whatever runs, both get full prefill's logits and KV. The
    long one comes in parts, so structure chooses for it (180 rows, 24 copies, one row), and its
    batch is cut before the other's few rows are known, whose gaps are larger. The backend takes
    few ranges, as on a GPU: merging the smallest gaps would reach into what was cut."""
    settings = {
        "chunked_prefill_size": 505,
        "kvshare_select": "dhd",
        "kvshare_budget": 0.2,
        "max_running_requests": 4,
        "mutation": "probes:few_stretches_and_all_tokens_charged",
    }
    long, short = texts.passage(900), texts.passage(300)
    with lab(llama, kvshare=True, **settings) as it:
        it.ask("probes:force_plans")
        for prompt in (long, short):
            it.one(prompt + texts.passage(32), extra_key="donor", new=1)
        full = {
            name: it.one(prompt, extra_key="full", kvshare="exact", keep="kv")
            for name, prompt in (("long", long), ("short", short))
        }
        few = {"budget": 0.04}
        part = it.play(
            [
                [
                    request("short", short, forced=[(0, 5), (295, 300)], kvshare=few, keep="kv"),
                    request("long", long, forced=[(0, 10), (890, 900)], keep="kv"),
                ]
            ]
        )
        assert part["short"]["kvshare"]["select"] == "dhd"
        assert part["long"]["kvshare"]["select_reason"] == "chunked"
        # Of its three parts 181 rows ran, one and 16: nothing was added by merging.
        assert computed(part["long"]["kvshare"]) == 181 + 1 + 16
        for name in ("short", "long"):
            told = part[name]["kvshare"]
            assert told["declined"] is None
            assert told["copied_tokens"] > 0
            torch.testing.assert_close(part[name]["logits"], full[name]["logits"], **TOL)
            for mine, theirs in zip(part[name]["kv"], full[name]["kv"], strict=True):
                torch.testing.assert_close(mine, theirs, **TOL)
        assert it.ask("probes:check")["pins"] == 0


def moved(texts: Texts, length: int) -> tuple[list[int], list[int]]:
    """A source, and a prompt that holds its two halves in another order."""
    a, b = texts.passage(length), texts.passage(length)
    return [*texts.passage(7), *a, *b], [*texts.passage(20), *b, *a, *texts.passage(25)]


@pytest.mark.parametrize("select", ["dhd", "trace"])
def test_exact_kv_in_the_runs_gives_full_prefill_whatever_is_chosen(
    llama: Path, texts: Texts, select: str
) -> None:
    with lab(llama, kvshare=True, kvshare_select=select, kvshare_budget=0.2) as it:
        it.ask("probes:force_plans")
        for length in (150, 420):
            prompt = texts.passage(length)
            it.one(prompt + texts.passage(32), extra_key="donor", new=1)
            full = it.one(prompt, extra_key="full", kvshare="exact", keep="kv")
            part = it.one(prompt, forced=[(0, 20), (length - 5, length)], keep="kv")
            assert part["kvshare"]["declined"] is None
            # a fifth of the run and its end, which may be among the fifth
            copied = length - int(0.2 * length)
            assert copied - 16 <= part["kvshare"]["copied_tokens"] <= copied
            torch.testing.assert_close(part["logits"], full["logits"], **TOL)
            assert part["output"] == full["output"]
            for mine, theirs in zip(part["kv"], full["kv"], strict=True):
                torch.testing.assert_close(mine, theirs, **TOL)


def test_a_batch_of_checked_and_plain_requests_gives_each_what_it_gets_alone(
    any_lab: Lab, texts: Texts
) -> None:
    pairs = [moved(texts, n) for n in (90, 160, 120)]
    plain = [texts.passage(n) for n in (40, 130)]
    sources = [request(f"s{i}", source, new=1) for i, (source, _) in enumerate(pairs)]
    wanted = [
        request("d0", pairs[0][1], keep="kv"),
        request("p0", plain[0], keep="kv"),
        request("d1", pairs[1][1], keep="kv"),
        request("x", pairs[2][1], kvshare="exact", keep="kv"),
        request("d2", pairs[2][1], kvshare={"budget": 1.0}, keep="kv"),
        request("d3", pairs[2][1], kvshare={"budget": 0.4}, extra_key=None, keep="kv"),
        request("p1", plain[1], keep="kv"),
    ]
    alone = {}
    for spec in wanted:
        any_lab.flush()
        alone.update(any_lab.play([*sources, ("idle",), spec]))
    any_lab.flush()
    together = any_lab.play([*sources, ("idle",), wanted])
    for rid in (spec["rid"] for spec in wanted):
        assert together[rid]["output"] == alone[rid]["output"]
        torch.testing.assert_close(together[rid]["logits"], alone[rid]["logits"], **TOL)
        assert together[rid]["kvshare"] == alone[rid]["kvshare"]
        for mine, theirs in zip(together[rid]["kv"], alone[rid]["kv"], strict=True):
            torch.testing.assert_close(mine, theirs, **TOL)
    for rid in ("d0", "d1", "d3"):
        assert together[rid]["kvshare"]["copied_tokens"] > 0
    assert any_lab.ask("probes:check")["pins"] == 0


def test_who_chooses_in_a_prompt_in_chunks(llama: Path, texts: Texts) -> None:
    """Its rows are more than a chunk: 135 are new. A trace looks with the last chunk; dhd must see
    every row at once."""
    source, prompt = moved(texts, 150)
    prompt = texts.passage(90) + prompt
    found = {}
    for select in ("dhd", "trace", "window"):
        settings = {"chunked_prefill_size": 128, "kvshare_select": select}
        with lab(llama, kvshare=True, **settings) as it:
            it.one(source, new=1)
            found[select] = it.one(prompt, new=4)
            count = it.ask("probes:counts")["fallbacks"]
        told = found[select]["kvshare"]
        assert told["select"] == ("window" if select == "dhd" else select)
        reason = told.pop("select_reason")
        assert reason == ("chunked" if select == "dhd" else None)
        assert count == ({(select, "window", "chunked"): 1} if reason else {})
        assert told["copied_tokens"] > 0
    assert found["dhd"]["kvshare"] == found["window"]["kvshare"]
    assert found["dhd"]["output"] == found["window"]["output"]
    assert found["trace"]["kvshare"]["repaired_tokens"] > 0


@pytest.mark.parametrize(
    ("settings", "select", "reason"),
    [
        ({"kvshare_select": "trace"}, "trace", None),
        # An option of dhd; at the last layer or above it once switched the trace off.
        ({"kvshare_select": "trace", "kvshare_check_layer": 200}, "trace", None),
        ({"kvshare_select": "dhd"}, "dhd", None),
        ({"kvshare_select": "dhd", "kvshare_check_layer": 3}, "window", "check_layer"),
        ({"kvshare_select": "trace", "kvshare_window": 0}, "trace", None),
    ],
)
def test_who_chose_the_rows_is_told(
    llama: Path, texts: Texts, settings: dict, select: str, reason: str | None
) -> None:
    source, prompt = moved(texts, 150)
    with lab(llama, kvshare=True, **settings) as it:
        it.one(source, new=1)
        told = it.one(prompt, new=4)["kvshare"]
        assert (told["select"], told["select_reason"]) == (select, reason)
        assert told["copied_tokens"] > 100
        assert bool(it.ask("probes:counts")["fallbacks"]) == (reason is not None)
        exact = it.one(prompt, new=4, kvshare="exact", extra_key="x")["kvshare"]
        assert (exact["select"], exact["select_reason"]) == (None, None)


@pytest.mark.parametrize(
    ("select", "dtype", "bits"), [("trace", "fp8_e4m3", 3), ("dhd", "fp8_e5m2", 2)]
)
def test_a_cache_of_8_bits_is_chosen_from_by_structure(
    llama: Path, texts: Texts, select: str, dtype: str, bits: int
) -> None:
    source, prompt = moved(texts, 150)
    settings = {"kv_cache_dtype": dtype, "mutation": "probes:eight_bits_on_a_cpu"}
    with lab(llama, kvshare=True, kvshare_select=select, **settings) as it:
        it.one(source, new=1)
        reused = it.one(prompt, new=4, keep="kv")
        told = reused["kvshare"]
        assert (told["select"], told["select_reason"]) == ("window", "fp8_cache")
        assert told["copied_tokens"] > 100
        assert it.ask("probes:counts")["fallbacks"] == {(select, "window", "fp8_cache"): 1}
        full = it.one(prompt, new=4, kvshare="exact", extra_key="x", keep="kv")
        # K of the first layer hangs on a token and its position alone: turned, and rounded twice.
        ours, exact = (answer["kv"][0][0].float() for answer in (reused, full))
        assert reused["kv"][0].dtype.itemsize == 1
        assert (ours - exact).abs().max() <= 2.0**-bits * exact.abs().max()


def test_a_window_hides_no_run_from_a_trace(llama: Path, texts: Texts) -> None:
    """A run of 60 tokens after an edit: at window 32, the default, it was dropped once."""
    a, b = texts.passage(200), texts.passage(60)
    prompt = a + texts.passage(2) + b + texts.passage(25)
    found = {}
    for window in (4, 32):
        with lab(llama, kvshare=True, kvshare_select="trace", kvshare_window=window) as it:
            it.one(texts.passage(9) + a + [5, 6] + b, new=1)
            found[window] = it.one(texts.passage(3) + prompt, new=4)
    told = {window: answer["kvshare"]["copied_tokens"] for window, answer in found.items()}
    assert len(set(told.values())) == 1, told
    assert next(iter(told.values())) > 200


def assert_exact(it: Lab, prompt: list[int], reason: str) -> None:
    """The prompt was declined inside the check layer: full prefill's answer, and exact KV."""
    full = it.one(prompt, kvshare="exact", extra_key="other", keep="kv")
    part = it.one(prompt, keep="kv")
    told = part["kvshare"]
    assert told["declined"] == reason
    assert told["copied_tokens"] == 0
    assert computed(told) == len(prompt)
    assert part["output"] == full["output"]
    for mine, theirs in zip(part["kv"], full["kv"], strict=True):
        torch.testing.assert_close(mine, theirs, **TOL)
    again = it.one(prompt, kvshare="exact")
    assert again["cached"] >= len(prompt) - 16  # whole pages of it
    assert again["output"] == full["output"]
    assert it.ask("probes:counts")["declines"][reason] == 1
    assert it.ask("probes:check")["pins"] == 0


def test_runs_that_deviate_too_far_are_computed_and_exact(llama: Path, texts: Texts) -> None:
    source, prompt = moved(texts, 150)
    with lab(llama, kvshare=True, kvshare_select="dhd", kvshare_tau=0.0) as it:
        it.one(source, new=1)
        assert_exact(it, prompt, "deviation")


@pytest.mark.parametrize("select", ["dhd", "trace"])
def test_a_fault_in_the_choice_costs_reuse_only(llama: Path, texts: Texts, select: str) -> None:
    source, prompt = moved(texts, 150)
    with lab(llama, kvshare=True, kvshare_select=select) as it:
        it.one(source, new=1)
        it.ask("probes:break_choice")
        assert_exact(it, prompt, "fault")
