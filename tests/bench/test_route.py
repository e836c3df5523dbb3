"""``bench route``: the index alone, and how results are put together."""

from kvshare_sglang.bench.route import indexing, show
from kvshare_sglang.bench.route.replay import ratio


def test_the_index_is_measured_and_the_best_worker_is_named(monkeypatch):
    monkeypatch.setattr(indexing, "HELD", 8000)
    monkeypatch.setattr(indexing, "TURNS", 8)
    monkeypatch.setattr(indexing, "LOOKED_AT", 8)
    one, few = indexing._measure(1), indexing._measure(3)
    assert (one["tokens"], few["tokens"]) == (7200, 3 * 7200)
    assert one["about_the_best"] == few["about_the_best"] == 1
    assert few["mib"] > one["mib"] > 0
    assert "100%" in indexing.show({"sizes": [one, few]})


def test_a_result_says_what_was_reused_added_and_lost():
    arm = {"requests": 4, "exact_share": 0.1, "spread": 0.5, "p50_s": 0.2, "failed": 0}
    arms = {"cache_aware": {**arm, "reused_share": 0.2}, "router": {**arm, "reused_share": 0.3}}
    assert round(ratio(arms), 6) == 1.5
    added = {"total_ms": 2.0, "tokens": 100, "tokenise_ms": 1.0, "choose_ms": 0.5}
    added["router_cpu_ms"] = 3.0
    fault = {"requests": 9, "lost": 1, "again": 2, "longest_s": 3.0}
    faults = {"router": {"kill -9 router": fault}}
    text = show({"arms": arms, "ratio": 1.5, "added": added, "faults": faults})
    assert "30.0%" in text
    assert "times cache_aware: 1.50" in text
    assert text.splitlines()[-1].split() == "kill -9 router router 9 1 2 3.0 s".split()
