"""The plain twin runs the rows that the server runs, and gets its logits and KV."""

import dataclasses
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import Texts
from lab import computed, lab, request
from tiny_models import make_model

from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.policy.select import attention_trace
from kvshare_sglang.policy.select.attention_trace import CARRIED_FROM, probe_layer
from kvshare_sglang.policy.select.base import SINK
from kvshare_sglang.runtime import felt
from kvshare_sglang.sim.engine import Lab as Driver
from kvshare_sglang.sim.engine import Model

TOL = {"atol": 2e-3, "rtol": 1e-3}


@pytest.mark.parametrize("name", ["llama", "llama-yarn", "qwen2", "qwen3"])
def test_the_driver_does_what_the_server_does(name: str, models: Path, texts: Texts) -> None:
    path = make_model(models, name)
    a, b = texts.passage(200), texts.passage(170)
    edited = a[:80] + texts.passage(3) + a[85:]
    source = texts.passage(11) + a + b
    prompts = [texts.passage(20) + b + a + texts.passage(30), source[:60] + b + edited]
    config = KVShareConfig()
    driver = Driver(Model(path), config)
    driver.add(np.array(source, np.int32))
    with lab(path, kvshare=True) as it:
        for prompt in prompts:
            it.flush()
            it.one(source, new=1)
            served = it.one(prompt, new=6, keep="kv")
            ids = np.array(prompt, np.int32)
            plan = driver.plan(ids, "window")
            told = served["kvshare"]
            assert told["copied_tokens"] == plan.copied > 100
            assert computed(told) == plan.computed
            mine = driver.prefill(ids, plan, "window", budget=config.budget)
            assert all(np.array_equal(rows, plan.compute.positions) for rows in mine.rows)
            torch.testing.assert_close(mine.logits, served["logits"], **TOL)
            for ours, theirs in zip(mine.kv, served["kv"], strict=True):
                torch.testing.assert_close(ours, theirs[:, : len(prompt)], **TOL)
            full, _ = driver.model.full(ids)
            plain = it.one(prompt, new=1, kvshare="exact")
            torch.testing.assert_close(full, plain["logits"], **TOL)


CHOICES = {
    "dhd": KVShareConfig(select="dhd", budget=0.25, seam=4, window=8),
    "trace": KVShareConfig(select="trace", budget=0.2, probe_at=0.34),
    "depends": KVShareConfig(select="trace", budget=0.2, probe_at=0.34, depends_at=0.67),
}


def moved_edited_and_carried(texts: Texts) -> tuple[list[int], list[list[int]]]:
    """What is cached, and three prompts that share text with it."""
    a, b = texts.passage(200), texts.passage(170)
    source = texts.passage(11) + a + b
    prompts = [
        texts.passage(20) + b + a + texts.passage(30),
        source[:60] + b + a[:80] + texts.passage(3) + a[85:],
        # so much new text before the question that it is carried on
        b + texts.passage(CARRIED_FROM) + a + texts.passage(30),
    ]
    return source, prompts


@pytest.mark.parametrize("choice", ["trace", "depends"])
def test_a_doubt_is_by_how_far_the_choice_moves_the_end_of_the_prompt(
    choice: str, models: Path, texts: Texts
) -> None:
    """As the driver has it, which runs copies alone and the choice, each on its own."""
    path, config = make_model(models, "llama"), CHOICES[choice]
    source, prompts = moved_edited_and_carried(texts)
    prompts.append(source[:-3] + texts.passage(3))  # nothing is copied that rests on other text
    driver = Driver(Model(path), config)
    driver.add(np.array(source, np.int32))
    layers = len(driver.model.layers)
    probe = probe_layer(layers, config.probe_at)
    until = felt.layer_of(layers, probe)
    assert until > probe
    shifts, passes = [], []
    for prompt in prompts:
        ids = np.array(prompt, np.int32)
        plan = driver.plan(ids, "trace")
        copied = driver.prefill(ids, plan, "copy", budget=0.0)
        done = driver.prefill(ids, plan, "trace", budget=config.budget)
        then, now = (one.kv.v[until][-felt.LAST :] for one in (copied, done))
        shifts.append(felt.shift_of(now, then) if plan.copies else None)
        passes.append(done)
    assert shifts[-1] is None
    found = [one for one in shifts if one is not None]
    assert len(found) == 3
    whole = 0.99 * max(found)
    settings = {f"kvshare_{key}": value for key, value in dataclasses.asdict(config).items()}
    settings |= {"kvshare_doubt": 0.9, "kvshare_doubt_shift": whole}
    with lab(path, kvshare=True, **settings) as it:
        for prompt, moved, mine in zip(prompts, shifts, passes, strict=True):
            for options in ({}, {"kvshare": {"doubt": 0.5}}, {"temperature": 0.7}):
                it.flush()
                it.one(source, new=1)
                told = it.one(prompt, new=2, **options)["kvshare"]
                if moved is None or options:  # it has none, or one of its own
                    assert "doubt" not in told
                    continue
                share = min(1.0, max(0.25, moved / whole))
                assert told["doubt"] == pytest.approx(0.9 * share, rel=0.1)
                first = len(mine.probed[0])
                joined = len(mine.rows[-1]) - len(mine.rows[0])
                half = sum(map(len, mine.probed)) - joined
                ran = half * probe + first * (until - probe)
                assert told["traced_tokens"] == round(ran / layers)


# What differs between families is in their attention (biases, norms of heads), which all choices
# read; to SGLang a Mistral is a Llama.
@pytest.mark.parametrize(
    ("name", "choice"),
    [("llama", "dhd"), ("llama", "trace"), ("llama", "depends"), ("qwen2", "depends"),
     ("qwen3", "dhd"), ("qwen3", "depends"), ("mistral", "depends")],
)  # fmt: skip
def test_the_server_chooses_and_computes_what_the_driver_does(
    name: str, choice: str, models: Path, texts: Texts
) -> None:
    path, config = make_model(models, name), CHOICES[choice]
    source, prompts = moved_edited_and_carried(texts)
    driver = Driver(Model(path), config)
    driver.add(np.array(source, np.int32))
    settings = {f"kvshare_{key}": value for key, value in dataclasses.asdict(config).items()}
    with lab(path, kvshare=True, **settings) as it:
        for prompt in prompts:
            it.flush()
            it.one(source, new=1)
            served = it.one(prompt, new=6, keep="kv")
            ids = np.array(prompt, np.int32)
            plan = driver.plan(ids, config.select)
            mine = driver.prefill(ids, plan, config.select, budget=config.budget)
            told = served["kvshare"]
            assert told["declined"] is None
            assert computed(told) == len(mine.rows[-1])
            if config.select == "dhd":
                every = len(prompt) - plan.prefix_len
                passes, layers = [every] * 2, 2
                # beside what structure says, rows are alone or in small groups
                assert (np.diff(mine.rows[-1]) > 1).sum() > len(plan.runs) + 3
            else:
                # three passes up to layer 1, then the batch's own, which new text may join in there
                passes, layers = [n for rows in mine.probed for n in [len(rows)] * 2], 2
                passes += [len(mine.rows[0])] * 2
                joined = len(mine.rows[-1]) - len(mine.rows[0])
                new = SINK + CARRIED_FROM  # it begins with moved text
                assert joined == (new if prompt is prompts[-1] else 0)
                beside = sum(map(len, mine.probed)) - joined  # rows that ran half way
                layer = probe_layer(len(driver.model.layers), config.probe_at)
                assert told["traced_tokens"] == round(beside * layer / len(driver.model.layers))
            assert it.ask("probes:layer_rows")[-1] == passes + [len(mine.rows[-1])] * layers
            torch.testing.assert_close(mine.logits, served["logits"], **TOL)
            for ours, theirs in zip(mine.kv, served["kv"], strict=True):
                torch.testing.assert_close(ours, theirs[:, : len(prompt)], **TOL)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"page_size": 16, "disable_overlap_schedule": False},
        {"chunked_prefill_size": 512, "enable_mixed_chunk": True},
    ],
    ids=["plain", "page 16, overlap", "chunks of 512, mixed"],
)
def test_new_text_is_carried_on_beside_others(
    models: Path, texts: Texts, more: dict[str, Any]
) -> None:
    """Three in one batch, in mixed chunks beside one that decodes: one whose new text joins, one
    with too little of it, one that reuses nothing; each as the twin has it alone."""
    path = make_model(models, "llama")
    config = KVShareConfig(budget=0.2, probe_at=0.34, depends_at=0.67)
    a, b = texts.passage(200), texts.passage(170)
    source = texts.passage(14) + a + b  # whole pages: no more of it is kept
    prompts = {
        "much": b + texts.passage(CARRIED_FROM + 20) + a + texts.passage(30),
        "little": texts.passage(20) + b + a[:100] + texts.passage(30),
        "none": texts.passage(90),
    }
    driver = Driver(Model(path), config)
    driver.add(np.array(source, np.int32))
    settings = {f"kvshare_{key}": value for key, value in dataclasses.asdict(config).items()}
    decodes = more.get("enable_mixed_chunk", False)
    with lab(path, kvshare=True, **settings, **more) as it:
        it.one(source, new=1)
        others = [request(name, prompt, new=2) for name, prompt in prompts.items()]
        first = [request("decodes", texts.passage(40), new=40), ("polls", 6)] if decodes else []
        served = it.play([*first, others])
        sizes = max(it.ask("probes:layer_rows"), key=sum)
    runs = {}
    for name, prompt in prompts.items():
        ids = np.array(prompt, np.int32)
        if name == "none":
            logits, _ = driver.model.full(ids)
            runs[name] = [np.arange(len(ids))] * 4
        else:
            mine = driver.prefill(ids, driver.plan(ids), "trace", budget=config.budget)
            logits, runs[name] = mine.logits, mine.rows
        torch.testing.assert_close(logits, served[name]["logits"], **TOL)
    of_batch = [sum(len(rows[layer]) for rows in runs.values()) for layer in (0, 0, 2, 3)]
    of_batch = [num + decodes for num in of_batch]
    assert sizes[-4:] == of_batch
    assert of_batch[3] - of_batch[0] == SINK + CARRIED_FROM + 20


def test_where_carrying_on_fails_the_batch_runs_from_the_bottom(models: Path, texts: Texts) -> None:
    """The answer is that of a server that carries nothing on."""
    path, config = make_model(models, "llama"), KVShareConfig(budget=0.2, probe_at=0.34)
    a, b = texts.passage(200), texts.passage(170)
    prompt = b + texts.passage(CARRIED_FROM) + a + texts.passage(30)
    source = texts.passage(11) + a + b
    driver = Driver(Model(path), config)
    driver.add(np.array(source, np.int32))
    settings = {f"kvshare_{key}": value for key, value in dataclasses.asdict(config).items()}
    with lab(path, kvshare=True, **settings) as it:
        it.ask("probes:break_joining")
        it.one(source, new=1)
        served = it.one(prompt, new=2)
    assert served["kvshare"]["declined"] is None
    assert served["kvshare"]["copied_tokens"] > 100
    ids = np.array(prompt, np.int32)
    with mock.patch.object(attention_trace, "CARRIED_FROM", len(prompt)):
        mine = driver.prefill(ids, driver.plan(ids), "trace", budget=config.budget)
    torch.testing.assert_close(mine.logits, served["logits"], **TOL)
