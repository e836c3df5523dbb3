"""The command simulate: what it takes, what it refuses, how it compares with a real run."""

import json
import re

import numpy as np
import pytest

from kvshare_sglang.bench import __main__ as bench
from kvshare_sglang.bench import simulate
from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.sim.serving import Job, StepCosts


@pytest.fixture
def costs(tmp_path):
    path = tmp_path / "costs.json"
    path.write_text(json.dumps({"costs": StepCosts()._asdict()}))
    return path


def test_synthetic_requests_are_served_under_each_policy(tmp_path, costs, capsys):
    out = tmp_path / "out.json"
    words = ["simulate", "--synthetic", "300", "--rate", "20", "--costs", str(costs)]
    words += [
        "--workers",
        "1",
        "4",
        "--route",
        "random",
        "cheapest",
        "--order",
        "fcfs",
        "hrrn",
        "shortest",
    ]
    words += ["--reuse", "off", "on", "free"]
    assert bench.main([*words, "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    # With one worker there is nothing to route.
    assert len(rows) == (1 + 2) * 3 * 3
    assert len(re.findall(r"^[14] ", capsys.readouterr().out, re.MULTILINE)) == len(rows)
    for row in rows:
        assert 0 < row["ttft_mean_s"] <= row["longest_wait_s"]
        assert row["exact"] + row["copied"] + row["run"] == pytest.approx(1)
        assert (row["copied"] > 0) == (row["reuse"] != "off")
        assert row["busy"] <= 1

    def mean(**which):
        (row,) = [row for row in rows if which.items() <= row.items()]
        return row["ttft_mean_s"]

    busy = {"workers": 1, "order": "fcfs"}
    assert mean(**busy, reuse="free") < mean(**busy, reuse="on") < mean(**busy, reuse="off")
    for reuse in ("off", "on", "free"):  # what no order beats by much
        bound = mean(workers=1, order="shortest", reuse=reuse)
        assert bound <= min(mean(workers=1, order=o, reuse=reuse) for o in ("fcfs", "hrrn"))
    assert mean(workers=4, order="fcfs", reuse="on", route="cheapest") < mean(**busy, reuse="on")


def test_shards_find_nearly_what_one_index_finds(tmp_path, costs):
    """130 workers, an index of all against three of 64 and fewer behind a front."""
    out = tmp_path / "out.json"
    words = ["simulate", "--synthetic", "4000", "--rate", "200", "--costs", str(costs)]
    words += ["--workers", "130", "--route", "least_load", "kvshare", "sharded", "--reuse", "on"]
    assert bench.main([*words, "--json", str(out)]) == 0
    found = {r["route"]: r["exact"] + r["copied"] for r in json.loads(out.read_text())["rows"]}
    assert found["kvshare"] > 1.2 * found["least_load"]
    assert found["sharded"] > found["least_load"]
    assert found["sharded"] - found["least_load"] > (found["kvshare"] - found["least_load"]) / 2


def test_what_is_counted_is_near_what_the_real_index_finds(tmp_path, costs):
    """The same requests, counted and written out: one worker, everything fits."""
    shares = []
    for more in ([], ["--text"]):
        out = tmp_path / "out.json"
        words = ["simulate", "--synthetic", "150", "--rate", "1", "--costs", str(costs), *more]
        words += ["--max-total-tokens", "1000000", "--reuse", "on", "--json", str(out)]
        assert bench.main(words) == 0
        (row,) = json.loads(out.read_text())["rows"]
        shares.append(row["exact"] + row["copied"])
    counted, found = shares
    assert found > 0.2
    assert counted == pytest.approx(found, rel=0.15)


def test_of_what_is_found_nothing_runs_again_where_reuse_is_free():
    """A moved document: its seams and its budget run, or none of it; so too under counting."""
    rng = np.random.default_rng(0)
    first, moved, new = (rng.integers(0, 4000, n) for n in (600, 600, 40))
    for counted in (False, True):
        rows = {}
        for reuse in ("on", "free"):
            cache = simulate.cache_of(reuse, 10_000, KVShareConfig(), counted=counted)
            held = Job(0, 0.0, 1200, 1, prompt=np.concatenate([first, moved]),
                       documents=((1, 600), (2, 600)))  # fmt: skip
            cache.take(held)
            cache.leave(held)
            asked = Job(1, 1.0, 640, 1, prompt=np.concatenate([moved, new]), documents=((2, 600),))
            rows[reuse] = cache.look(asked).rows
        assert rows["on"] > rows["free"] + 40
        assert 40 <= rows["free"] < 60  # hashes find all but a few tokens at a border


def test_a_simulation_is_held_to_the_records_of_a_real_run(tmp_path, costs, capsys, monkeypatch):
    """The records are those of the simulation itself, a quarter slower."""
    made, cache_of = [], simulate.cache_of
    monkeypatch.setattr(
        simulate, "cache_of", lambda *args, **kw: made.append(args) or cache_of(*args, **kw)
    )
    requests, times = tmp_path / "requests.jsonl", tmp_path / "arrivals.jsonl"
    lines = [{"prompt": f"word {i} " * 40} for i in range(12)]
    requests.write_text("".join(json.dumps(line) + "\n" for line in lines))
    times.write_text("".join(json.dumps({"t": i / 2}) + "\n" for i in range(12)))
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"max_position_embeddings": 4096}))
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"word": 0, "?": 1}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(model / "tokenizer.json"))
    words = ["simulate", "--requests", str(requests), "--arrivals", str(times), "--reuse", "off"]
    words += ["--costs", str(costs), "--model", str(model), "--json", str(tmp_path / "out.json")]
    assert bench.main(words) == 0
    ((_, _, config),) = made  # as a server of a model that was never measured: with care
    assert config.budget == 2 * KVShareConfig().budget
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    real = {"configuration": "plain", "error": None, "ttft_s": row["ttft_mean_s"] / 0.8}
    records = tmp_path / "records.jsonl"
    lost = {"configuration": "plain", "error": "gone", "ttft_s": 99}
    other = {"configuration": "kvshare", "error": None, "ttft_s": 99}
    records.write_text("".join(json.dumps(one) + "\n" for one in (real, lost, other)))
    capsys.readouterr()
    assert bench.main([*words, "--records", str(records), "--configuration", "plain"]) == 0
    assert "-20.0%" in capsys.readouterr().out
    assert bench.main([*words, "--records", str(records), "--configuration", "lpm"]) == 1
    assert "no answered request of a configuration lpm" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--synthetic", "9", "--rate", "1"], "--costs FILE is needed; --calibrate FILE measures"),
        (["--synthetic", "9"], "--synthetic needs --rate"),
        ([], "--requests and --arrivals are needed, or --synthetic N"),
        (["--synthetic", "9", "--rate", "1", "--real"], "leave --real, --records out"),
        (
            ["--synthetic", "9", "--rate", "1", "--workers", "1025"],
            "must be in [1, 1024], got 1025",
        ),
        (
            ["--synthetic", "9", "--rate", "1", "--text", "--workers", "65"],
            "must be in [1, 64], got 65; --synthetic without --text takes 1024",
        ),
        (
            ["--synthetic", "9", "--rate", "1", "--text", "--route", "sharded"],
            "--route sharded is of documents that are counted",
        ),
        (["--synthetic", "0", "--rate", "1"], "--synthetic must be above 0, got 0"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(words, told, capsys):
    assert bench.main(["simulate", *words]) == 1
    assert told in capsys.readouterr().err


def test_a_file_without_step_costs_is_refused(tmp_path, capsys):
    path = tmp_path / "costs.json"
    path.write_text('{"costs": {"hop": 1}}')
    words = ["simulate", "--synthetic", "9", "--rate", "1", "--costs", str(path)]
    assert bench.main(words) == 1
    assert "holds no step costs" in capsys.readouterr().err
