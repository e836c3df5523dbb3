"""What rows attended to is kept by slot: each row's own, whoever had the slot before."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Texts
from lab import lab, request
from tiny_models import make_model

from kvshare_sglang.policy.select.attention_trace import CARRIED_FROM, probe_layer
from kvshare_sglang.policy.select.dependence import outside
from kvshare_sglang.sim.engine import Lab as Driver
from kvshare_sglang.sim.engine import Model

DEPTH = 0.67


@pytest.mark.parametrize(
    "more",
    [{}, {"chunked_prefill_size": 64, "enable_mixed_chunk": True}, {"page_size": 16}],
    ids=["whole", "chunks of 64, mixed", "pages of 16"],
)
def test_each_row_of_a_prompt_has_its_own_and_answers_have_none(
    models: Path, texts: Texts, more: dict[str, Any]
) -> None:
    """In a pool that is used up again and again; a half of the prompts begin as others did."""
    path = make_model(models, "llama")
    model = Model(path)
    layer = probe_layer(len(model.layers), DEPTH)
    head = texts.passage(50)
    settings: dict[str, Any] = {"max_total_tokens": 1024, "kvshare_depends_at": DEPTH, **more}
    with lab(path, kvshare=True, kvshare_select="trace", **settings) as it:
        it.ask("probes:keep_profiles")
        for turn in range(8):
            prompts = {f"{turn}-{i}": head * (i % 2) + texts.passage(60 + 40 * i) for i in range(3)}
            answers = it.play(
                [
                    [
                        request(rid, prompt, new=9, kvshare="exact", keep="kv")
                        for rid, prompt in prompts.items()
                    ]
                ]
            )
            for rid, prompt in prompts.items():
                found = it.ask("probes:profiles", rid)
                ids = np.array(prompt + answers[rid]["output"][:-1], np.int32)
                own, written = model.profiled(ids, layer)[1], np.isnan(found)
                assert not written[: len(prompt)].any()
                # in mixed chunks a row of an answer is one of a prefill batch
                assert more.get("enable_mixed_chunk") or written[len(prompt) :].all()
                np.testing.assert_allclose(np.where(written, own, found), own, atol=2e-3)


def test_a_copy_has_its_sources_and_a_row_that_runs_its_own(models: Path, texts: Texts) -> None:
    """In chunks too, where the sources may be gone when the trace asks. A fault in it is no fault
    of the request's."""
    path = make_model(models, "llama")
    a, b = texts.passage(200), texts.passage(170)
    source = texts.passage(14) + a + b
    prompt = texts.passage(20) + b + a + texts.passage(30)
    ids = np.array(prompt, np.int32)
    for chunk in (4096, 128):
        with lab(
            path, kvshare=True, kvshare_select="trace", kvshare_depends_at=DEPTH,
            chunked_prefill_size=chunk,
        ) as it:  # fmt: skip
            it.ask("probes:keep_profiles")
            it.play([request("source", source, new=1, keep="kv")])
            of_source = it.ask("probes:profiles", "source")
            answer = it.play([request("copy", prompt, new=1, keep="kv")])["copy"]["kvshare"]
            found = it.ask("probes:profiles", "copy")
        assert answer["copied_tokens"] > 200
        same = sum(
            int((found[run.dst_start : run.dst_stop] == of_source[run.src_start : run.src_stop])
                .all(1).sum())
            for run in _plan(path, source, ids).runs
        )  # fmt: skip
        assert same == answer["copied_tokens"]
        assert not np.isnan(found).any()


def test_new_text_that_is_carried_on_has_its_own(models: Path, texts: Texts) -> None:
    """It runs the layer in the first pass of the trace alone, where it is below the probe layer."""
    path = make_model(models, "llama")
    a, b = texts.passage(200), texts.passage(170)
    source = texts.passage(14) + a + b
    prompt = b + texts.passage(CARRIED_FROM) + a + texts.passage(30)
    depths = {"kvshare_depends_at": 0.34, "kvshare_probe_at": DEPTH}
    with lab(path, kvshare=True, kvshare_select="trace", **depths) as it:
        it.ask("probes:keep_profiles")
        it.one(source, new=1)
        it.play([request("copy", prompt, new=1, keep="kv")])
        rows = it.ask("probes:layer_rows")[-1]
        found = it.ask("probes:profiles", "copy")
    assert rows[-1] - rows[-3] >= CARRIED_FROM  # they joined in the middle
    assert not np.isnan(found).any()


def test_rows_that_are_repaired_in_slots_of_their_own_have_what_is_known_of_them(
    models: Path, texts: Texts
) -> None:
    """With pages of 16 the rest of a page moves along. The slots are those of a text that was
    evicted, and what is known of that is no one else's."""
    path = make_model(models, "llama")
    a, b = texts.passage(200), texts.passage(170)
    source = texts.passage(14) + a + b
    first = texts.passage(20) + b + a + texts.passage(30)
    turn = first + texts.passage(120)
    with lab(
        path, kvshare=True, kvshare_select="trace", kvshare_depends_at=DEPTH, page_size=16,
        max_total_tokens=2048,
    ) as it:  # fmt: skip
        it.ask("probes:keep_profiles")
        for _ in range(4):  # so that all slots had another row
            it.one(texts.passage(500), new=1, kvshare="exact")
        it.one(source, new=1)
        it.play([request("first", first, new=1, keep="kv")])
        before = it.ask("probes:profiles", "first")
        answer = it.play([request("turn", turn, new=1, keep="kv")])["turn"]["kvshare"]
        found = it.ask("probes:profiles", "turn")
    assert answer["repaired_tokens"] > 0
    known = len(first) // 16 * 16
    same = (found[:known] == before[:known]).all(1)
    # but for the rows that ran again
    assert known - same.sum() <= answer["repaired_tokens"] + 16
    assert not np.isnan(found).any()


def _plan(path: Path, source: list[int], ids: np.ndarray) -> Any:
    from kvshare_sglang.config import KVShareConfig

    driver = Driver(Model(path), KVShareConfig(depends_at=DEPTH))
    driver.add(np.array(source, np.int32))
    plan = driver.plan(ids)
    prior = driver.prior(plan)
    assert prior is not None
    assert outside(plan, np.full((len(ids), 19), np.nan)) is None
    return plan


def test_where_it_cannot_be_noted_requests_go_on_without(models: Path, texts: Texts) -> None:
    path = make_model(models, "llama")
    a, b = texts.passage(200), texts.passage(170)
    source = texts.passage(11) + a + b
    prompt = texts.passage(20) + b + a + texts.passage(30)
    told = []
    for depth in (0.0, DEPTH):
        with lab(path, kvshare=True, kvshare_select="trace", kvshare_depends_at=depth) as it:
            if depth:
                it.ask("probes:break_profiles")
            it.one(source, new=1)
            told.append(it.one(prompt, new=6))
    assert told[0]["output"] == told[1]["output"]
    assert told[0]["kvshare"] == told[1]["kvshare"]
    assert told[1]["kvshare"]["declined"] is None
