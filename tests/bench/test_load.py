"""A load test sends what its files say when they say it, and counts what came of it.

Without aiperf: its records are written here by hand, in the form that aiperf 0.13 writes them.
"""

import argparse
import contextlib
import json
import math
import re

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare_sglang.bench import __main__ as bench
from kvshare_sglang.bench.common import KINDS, ScriptError
from kvshare_sglang.bench.load import aiperf, report, serving, summary, targets, trace
from kvshare_sglang.bench.load.outcomes import Outcome, outcomes
from kvshare_sglang.bench.load.trace import Arrival, Prompt, Timed

TIMES = st.lists(st.floats(0, 1000, allow_nan=False), min_size=2, max_size=20).map(sorted)


def files(tmp_path, prompts, arrivals):
    requests, times = tmp_path / "requests.jsonl", tmp_path / "arrivals.jsonl"
    requests.write_text("".join(json.dumps(one) + "\n" for one in prompts))
    times.write_text("".join(json.dumps(one) + "\n" for one in arrivals))
    return requests, times


# ---- the trace -------------------------------------------------------------------------------


def test_each_prompt_goes_out_at_its_arrival(tmp_path):
    requests, times = files(
        tmp_path,
        [{"prompt": "a", "extra_key": "x"}, {"prompt": "b", "id": 7}, {"prompt": "c"}],
        [{"t": 5.0, "in": 9, "out": 3}, {"t": 6.5, "out": 99}, {"t": 6.5}, {"t": 100}],
    )
    made = trace.make(
        trace.read_prompts(requests), trace.read_arrivals(times, limit=3), most_new=8, speedup=2
    )
    assert made == [
        Timed(0, "a", "x", 3),  # as many tokens as were answered then
        Timed(0.75, "b", None, 8),  # but no more than asked for
        Timed(0.75, "c", None, 8),
    ]
    lines = [json.loads(line) for line in trace.schedule_lines(made)]
    assert [line["timestamp"] for line in lines] == [0, 750, 750]  # milliseconds
    bodies = [line["payload"] for line in lines]
    assert [one["prompt"] for one in bodies] == ["a", "b", "c"]
    assert [one["rid"] for one in bodies] == ["load-0", "load-1", "load-2"]
    assert [one.get("extra_key") for one in bodies] == ["x", None, None]
    chats = serving.chats(made)
    assert [one["messages"][0]["content"] for one in chats] == ["a", "b", "c"]


@given(TIMES, st.floats(0.01, 100))
def test_a_rate_keeps_the_pattern_and_sets_the_mean(times, rate):
    prompts = [Prompt("x", None)] * len(times)
    arrivals = [Arrival(at, None) for at in times]
    span = times[-1] - times[0]
    if span < 1e-3:
        return
    made = trace.make(prompts, arrivals, most_new=4, rate=rate)
    assert made[0].at_s == 0
    assert made[-1].at_s == pytest.approx((len(times) - 1) / rate)
    for one, at in zip(made, times, strict=True):
        assert one.at_s / made[-1].at_s == pytest.approx((at - times[0]) / span, abs=1e-6)


@pytest.mark.parametrize(
    ("prompts", "arrivals", "told"),
    [
        ([{"text": "a"}], [{"t": 0}], "line 1: no text under 'prompt'"),
        ([], [{"t": 0}], "holds no request"),
        ([{"prompt": "a"}], [{"t": 2}, {"t": 1}], "line 2: t 1 is before t 2.0"),
        ([{"prompt": "a"}], [{"in": 2}], "line 1: 't' must be seconds, got None"),
        ([{"prompt": "a"}] * 3, [{"t": 0}], "3 requests need as many arrivals, the file has 1"),
        ([{"prompt": "a"}] * 2, [{"t": 4}] * 2, "all arrivals have the same time"),
        (["a"], [{"t": 4}], "line 1: no JSON object"),
    ],
)
def test_a_bad_file_is_refused_by_its_line(tmp_path, prompts, arrivals, told):
    requests, times = files(tmp_path, prompts, arrivals)
    with pytest.raises(ScriptError, match=re.escape(told)):
        trace.make(
            trace.read_prompts(requests), trace.read_arrivals(times, limit=9), most_new=1, rate=1
        )


# ---- what came of it -------------------------------------------------------------------------


def record(number, sent_s, events):
    """As aiperf writes it: ``events`` are seconds after it was sent, and what came."""
    packets = [
        {"perf_ns": int((7 + at) * 1e9), "packets": [{"name": "data", "value": value}]}
        for at, value in events
    ]
    return {
        "metadata": {"request_start_ns": int((1000 + sent_s) * 1e9)},
        "start_perf_ns": 7 * 10**9,
        "status": 200,
        "responses": packets,
        "payload": {"rid": f"load-{number}"},
    }


def event(text=None, **usage):
    choices = [] if text is None else [{"text": text}]
    return json.dumps({"choices": choices, "usage": usage or None})


KVSHARE = {f"{kind}_tokens": i for i, kind in enumerate(KINDS)}
KVSHARE |= {"declined": None, "settled_tokens": 8}


def test_times_count_from_when_a_request_was_due():
    sent = [Timed(0, "a", None, 2), Timed(1, "b", "t", 2), Timed(2, "c", None, 2),
            Timed(3, "d", None, 2)]  # fmt: skip
    details = {"prompt_tokens": 9, "completion_tokens": 2}
    plain = {**details, "prompt_tokens_details": {"cached_tokens": 4}}
    ours = {**details, "kvshare": [KVSHARE]}
    records = [
        record(
            1,
            1.25,
            [(0.5, event("x")), (0.75, event("y")), (0.8, event(**ours)), (1, "[DONE]")],
        ),
        record(0, 0.0, [(0.1, event("")), (0.5, event("y")), (0.5, event(**plain))]),
        record(2, 2.0, [(0.1, json.dumps({"error": "full"}))]),
    ]
    first, second, third, fourth = outcomes(records, sent)
    assert (first.ttft_s, first.total_s, first.late_s) == pytest.approx((0.1, 0.5, 0))
    assert first.tokens == {**dict.fromkeys(KINDS, 0), "exact": 4, "fresh": 5}
    # It was sent a quarter of a second late: its user waited for that too.
    assert (second.ttft_s, second.total_s, second.late_s) == pytest.approx((0.75, 1.0, 0.25))
    assert second.tokens == {kind: i for i, kind in enumerate(KINDS)}
    assert (second.tenant, second.settled, first.settled) == ("t", 8, 0)
    assert (third.error, fourth.error) == ("full", "no record")


def test_a_record_of_another_trace_is_refused():
    with pytest.raises(ScriptError, match="was not sent: 'load-1'"):
        outcomes([record(1, 0, [])], [Timed(0, "a", None, 1)])
    with pytest.raises(ScriptError, match="recorded no request"):
        outcomes([], [Timed(0, "a", None, 1)])


# ---- figures ---------------------------------------------------------------------------------

COUNTS = st.fixed_dictionaries({kind: st.integers(0, 50) for kind in KINDS}).map(
    lambda counts: {**counts, "fresh": counts["fresh"] + 1}
)
OUTCOMES = st.lists(
    st.builds(
        Outcome,
        number=st.just(0),
        due_s=st.floats(0, 100),
        late_s=st.floats(0, 1),
        ttft_s=st.floats(0.01, 50),
        total_s=st.floats(50, 60),
        tokens=COUNTS,
        new_tokens=st.integers(1, 9),
        tenant=st.sampled_from([None, "a", "b"]),
        declined=st.none(),
        error=st.none(),
        settled=st.sampled_from([0, 0, 40]),
    ),
    min_size=1,
    max_size=30,
)


def quantile_by_hand(values, q):
    """Between the two neighbours of rank q, by distance."""
    ranked = sorted(values)
    at = q * (len(ranked) - 1)
    low, high = ranked[math.floor(at)], ranked[math.ceil(at)]
    return low + (high - low) * (at - math.floor(at))


@given(OUTCOMES)
def test_figures_are_those_of_the_definition(run):
    failed = Outcome(0, 0.0, 0.0, 0.0, 0.0, {}, 0, error="lost")
    told = summary.figures([*run, failed])
    waits = [one.ttft_s for one in run]
    end = max(one.due_s + one.total_s for one in run)
    prompt = sum(sum(one.tokens.values()) for one in run)
    assert told["failed"] == 1
    assert told["ttft_mean_s"] == pytest.approx(sum(waits) / len(waits))
    assert told["ttft_p50_s"] == pytest.approx(quantile_by_hand(waits, 0.5))
    assert told["ttft_p99_s"] == pytest.approx(quantile_by_hand(waits, 0.99))
    assert told["longest_wait_s"] == max(waits)
    assert told["requests_per_s"] == pytest.approx(len(run) / end)
    answered = sum(one.new_tokens for one in run)
    assert told["tokens_per_s"] == pytest.approx((prompt + answered) / end)
    many = sum(one.settled > 0 for one in run)
    assert told["settled"] == pytest.approx(many / len(run))
    assert told["settled_share"] == pytest.approx(40 * many / prompt)
    for kind in KINDS:
        count = sum(one.tokens[kind] for one in run)
        assert told["shares"][kind] == pytest.approx(count / prompt)


def test_ratios_are_to_the_first_in_the_same_repeat():
    def run(wait):
        tokens = {**dict.fromkeys(KINDS, 0), "fresh": 10}
        return summary.figures([Outcome(0, 0.0, 0.0, wait, 10.0, tokens, 1)])

    # The machine was twice as slow in the second repeat: the ratio does not move.
    first, second = summary.over_repeats([[run(4), run(8)], [run(1), run(2)]])
    assert first["ratios"]["ttft_mean_s"] == {"mean": 1, "least": 1, "most": 1}
    assert second["ratios"]["ttft_mean_s"] == {"mean": 0.25, "least": 0.25, "most": 0.25}
    assert second["ttft_mean_s"] == 1.5
    assert "0.25 (0.25 to 0.25)" in summary.show(["plain", "ours"], [first, second])


def test_what_failed_stands_beside_the_ratios_that_leave_it_out():
    tokens = {**dict.fromkeys(KINDS, 0), "fresh": 10}
    good = [Outcome(i, i * 1.0, 0.0, 1.0, 10.0, tokens, 1) for i in range(4)]
    lost = [*good[:2], *(one._replace(error="lost") for one in good[2:])]
    runs = [[summary.figures(its)] for its in (good, lost)]
    _, ratios = summary.show(["plain", "ours"], summary.over_repeats(runs)).split("\n\n")
    plain, ours = ratios.splitlines()[-2:]
    assert "0 of 4" in plain
    assert "2 of 4" in ours


@given(OUTCOMES)
def test_the_queue_holds_who_is_due_and_has_no_token(run):
    times, counts = summary.waiting_over_time(run)
    for at, count in zip(times, counts, strict=True):
        if times.count(at) == 1:
            assert count == sum(one.due_s <= at < one.due_s + one.ttft_s for one in run)
    assert counts[-1] == 0


@given(OUTCOMES)
def test_shares_over_time_are_shares_of_all_that_was_due(run):
    times, shares = summary.shares_over_time(run, bins=5)
    assert times == sorted(times)
    np.testing.assert_allclose(sum(np.array(shares[kind]) for kind in KINDS), 1)
    tenants = summary.by_tenant(run)
    assert set(tenants) == {one.tenant for one in run if one.tenant}
    assert all(one["longest_wait_s"] >= one["ttft_p99_s"] for one in tenants.values())


def test_the_page_holds_its_plots_and_fetches_nothing(tmp_path):
    tokens = {**dict.fromkeys(KINDS, 1), "fresh": 10}
    its = [[Outcome(i, i * 1.0, 0.0, 0.5 + i, 9.0, tokens, 1, "t<1>") for i in range(5)]]
    page = tmp_path / "load.html"
    report.write(page, {"plain": its, "ours": its}, table="a < b", facts={"model": "m & n"})
    text = page.read_text()
    assert text.count("<svg") == 4
    assert "a &lt; b" in text
    assert "m &amp; n" in text
    assert not re.search(r"<(script|link|img|iframe)\b", text)
    untold = [[one._replace(tenant=None) for one in its[0]]]
    report.write(page, {"plain": untold}, table="", facts={})
    assert page.read_text().count("<svg") == 3


# ---- the command -----------------------------------------------------------------------------


def test_a_configuration_is_a_name_and_flags_or_an_address():
    made = targets.own("lpm=--kvshare --schedule-policy lpm --x 'a b'")
    assert made.name == "lpm"
    assert made.flags == ("--kvshare", "--schedule-policy", "lpm", "--x", "a b")
    assert targets.own("plain=").flags == ()
    assert targets.running("gw=http://127.0.0.1:9/").url == "http://127.0.0.1:9"
    for wrong, read in (
        ("lpm", targets.own),
        ("a b=", targets.own),
        ("x=ftp://y", targets.running),
    ):
        with pytest.raises(argparse.ArgumentTypeError):
            read(wrong)
    with pytest.raises(ScriptError, match="two configurations are called a"):
        targets.check_names([targets.own("a="), targets.own("a=--kvshare"), targets.own("b=")])


def parsed(tmp_path, *more):
    requests, times = files(tmp_path, [{"prompt": "a"}] * 2, [{"t": 0}, {"t": 1}])
    words = ["load", "--requests", str(requests), "--arrivals", str(times), *more]
    return bench.parse([*words, "--device", "cpu"])


def test_without_aiperf_it_says_so_in_one_line(tmp_path, capsys):
    requests, times = files(tmp_path, [{"prompt": "a"}], [{"t": 0}])
    words = ["load", "--requests", str(requests), "--arrivals", str(times)]
    assert bench.main([*words, "--aiperf", str(tmp_path / "none")]) == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "run scripts/load_test.sh" in told


def test_without_datasets_the_familiar_tool_says_so_in_one_line(monkeypatch):
    monkeypatch.setattr(serving, "find_spec", lambda name: None)
    with pytest.raises(ScriptError, match=r"load_test.sh --bench-serving, or pip install"):
        serving.check()


@pytest.mark.parametrize(
    "wrong", [("--rate", "0"), ("--load", "-1"), ("--repeats", "0"), ("--speedup", "nan")]
)
def test_an_option_out_of_range_is_named(tmp_path, wrong):
    args, module = parsed(tmp_path, *wrong)
    with pytest.raises(ScriptError, match=f"{wrong[0]} must be above 0"):
        module.check(args)


def test_configurations_take_turns_about_and_records_are_kept(tmp_path, monkeypatch):
    """Whole but for servers and client: who is asked when, and what is written."""
    args, module = parsed(tmp_path, "--repeats", "2", "--out", str(tmp_path / "out"))
    module.check(args)
    asked = []

    class There:
        @contextlib.contextmanager
        def ready(self, one):
            asked.append(one.name)
            yield f"http://{one.name}"

    def drive(url, timed, **rest):
        wait = 1.0 if url.endswith("kvshare") else 3.0
        tokens = {**dict.fromkeys(KINDS, 0), "fresh": 10}
        return [Outcome(i, t.at_s, 0.0, wait, 4.0, tokens, 2) for i, t in enumerate(timed)]

    told_rows = iter([None, 7, 9, None])  # as asked: plain, kvshare, kvshare, plain
    monkeypatch.setattr(targets, "overtaken_rows", lambda url: next(told_rows))
    monkeypatch.setattr(aiperf, "drive", drive)
    timed = [Timed(0, "a", None, 2), Timed(1, "b", None, 2)]
    model = argparse.Namespace(path=tmp_path)
    runs, loads, overtaken = module.measure(args, There(), model, timed)
    assert overtaken == {"kvshare": 9}
    assert asked == ["plain", "kvshare", "kvshare", "plain"]
    told = {"requests": 2, "left_out": 0, "lasts_s": 1.0, "mean_rate": 1.0, "overtaken": overtaken}
    assert module.finish(args, runs, told, loads, "m") == 0
    result = json.loads((tmp_path / "out" / "load.json").read_text())
    assert [one["name"] for one in result["configurations"]] == ["plain", "kvshare"]
    assert result["configurations"][1]["ratios"]["ttft_mean_s"]["mean"] == pytest.approx(1 / 3)
    lines = [json.loads(x) for x in (tmp_path / "out" / "records.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * 2 * 2
    assert {(x["configuration"], x["repeat"], x["number"]) for x in lines} == {
        (name, repeat, i) for name in ("plain", "kvshare") for repeat in (0, 1) for i in (0, 1)
    }
    lost = [[one._replace(error="gone") if one.number else one for one in runs["plain"][0]]]
    assert module.finish(args, {"plain": lost}, told, loads, "m") == 1


@pytest.mark.parametrize(
    ("page", "rows"),
    [
        ('sglang:kvshare_overtaken_rows_max{tp_rank="0"} 21345.0\n', 21345),
        ("sglang:kvshare_overtaken_rows_max 0.0\n", 0),
        (
            "# HELP sglang:kvshare_overtaken_rows_max The most rows\nsglang:num_queue_reqs 3.0\n",
            None,
        ),
        ("<html><body>no such page</body></html>\n", None),
    ],
)
def test_the_most_rows_that_overtook_are_read_where_a_server_tells(monkeypatch, page, rows):
    answer = httpx.Response(200, text=page)
    monkeypatch.setattr(targets.httpx, "get", lambda url, **rest: answer)
    assert targets.overtaken_rows("http://127.0.0.1:1") == rows
