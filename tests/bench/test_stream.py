"""Streams of requests come back to earlier text, and are judged by what chance would give."""

import random
from pathlib import Path

import numpy as np
import pytest

from kvshare_sglang.bench import stream, tasks
from kvshare_sglang.bench.quality import plot
from kvshare_sglang.bench.quality.cases import Encoder

ROOT = Path(__file__).resolve().parents[2]


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
