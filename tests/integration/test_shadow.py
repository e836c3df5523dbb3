"""Exact twins on the real scheduler: what they say is true, and nobody else notices them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Texts
from lab import Lab, lab, request
from test_life import assert_clean
from tiny_models import with_a_dead_layer

from kvshare_sglang.bench.models import READER
from kvshare_sglang.bench.quality.cases import SIZE, Encoder, prompts
from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.runtime import calibration
from kvshare_sglang.runtime.shadow import MOST_WAITING, SWITCH


def kl_of(full: dict[str, Any], reuse: dict[str, Any]) -> float:
    """KL of two answers' first tokens, from the logits that were read off the server."""
    exact, other = (answer["logits"].log_softmax(-1) for answer in (full, reuse))
    return float((exact.exp() * (exact - other)).sum())


WAIT = [("idle",), ("polls", 3)]  # long enough for a twin
PAGE = 16


@pytest.fixture(scope="module")
def shadowed(llama: Path) -> Iterator[Lab]:
    """Every reusing request gets a twin; none switches anything off here. Pages, and batches that
    overlap."""
    flags: dict[str, Any] = {"kvshare_shadow": 1.0, "kvshare_shadow_floor": 0.0}
    flags |= {"kvshare_budget": 0.0, "page_size": PAGE, "disable_overlap_schedule": False}
    with lab(llama, kvshare=True, chunked_prefill_size=38 * PAGE, **flags) as it:
        yield it


def moved(texts: Texts, size: int = 150) -> tuple[list[int], list[int]]:
    """A source and a prompt that copies most of it."""
    a, b = texts.passage(size), texts.passage(size)
    return a + b, texts.passage(20) + b + a + texts.passage(30)


@pytest.mark.parametrize("size", [150, 500], ids=["whole", "chunks"])
def test_a_twin_says_how_far_reuse_is_from_full_prefill(
    size: int, shadowed: Lab, texts: Texts
) -> None:
    """Against logits read off the same server."""
    shadowed.flush()
    before = shadowed.ask("probes:twins")
    source, prompt = moved(texts, size)
    told = shadowed.play([request("s", source), ("idle",), request("r", prompt), *WAIT])["r"]
    assert told["kvshare"]["copied_tokens"] > size
    after = shadowed.ask("probes:twins")
    assert len(after["kls"]) == len(before["kls"]) + 1
    full = shadowed.one(prompt, kvshare="exact", extra_key="other")
    assert kl_of(full, told) > 1e-3  # these copies do harm
    assert after["kls"][-1] == pytest.approx(kl_of(full, told), rel=2e-2)
    agrees = bool(full["logits"].argmax() == told["logits"].argmax())
    assert [after[name] - before[name] for name in ("agree", "differ")] == [agrees, not agrees]
    assert_clean(shadowed)


def test_no_counter_no_answer_and_no_text_in_the_cache_is_a_twins(
    shadowed: Lab, texts: Texts
) -> None:
    shadowed.flush()
    source, prompt = moved(texts)
    before = shadowed.ask("probes:counts")["tokens"]
    twins = len(shadowed.ask("probes:twins")["kls"])
    answers = shadowed.play([request("s", source), ("idle",), request("r", prompt), *WAIT])
    assert len(shadowed.ask("probes:twins")["kls"]) == twins + 1
    assert set(answers) == {"s", "r"}
    after = shadowed.ask("probes:counts")["tokens"]
    assert sum(after.values()) - sum(before.values()) == len(source) + len(prompt)
    record = answers["r"]["kvshare"]
    for kind in ("copied", "recomputed", "fresh"):
        grew = after[kind] - before.get(kind, 0) - (len(source) if kind == "fresh" else 0)
        assert grew == record[f"{kind}_tokens"], kind
    # the twin's exact KV is not there: of the prompt only what is before its first copy
    assert shadowed.one(prompt, kvshare="exact")["cached"] == PAGE
    # who reuses nothing gets no twin
    assert len(shadowed.ask("probes:twins")["kls"]) == twins + 1
    assert_clean(shadowed)


@pytest.mark.parametrize(
    ("asks", "twins"),
    [(None, 1), ("auto", 1), ({"budget": 0.0}, 1), ({"budget": 0.3}, 0), ({"budget": 0.5}, 0)],
    ids=str,
)
def test_who_names_a_budget_that_is_not_the_servers_says_nothing_of_it(
    asks: Any, twins: int, shadowed: Lab, texts: Texts
) -> None:
    shadowed.flush()
    source, prompt = moved(texts)
    before = len(shadowed.ask("probes:twins")["kls"])
    script = [request("s", source), ("idle",), request("r", prompt, kvshare=asks), *WAIT]
    assert shadowed.play(script)["r"]["kvshare"]["copied_tokens"] > 0
    assert len(shadowed.ask("probes:twins")["kls"]) == before + twins


def test_samples_and_repeats_of_a_prompt_count_once(shadowed: Lab, texts: Texts) -> None:
    """In one batch, while the twin waits, and after it ran; in another tenant's text it is another
    prompt."""
    shadowed.flush()
    source, prompt = moved(texts)
    before = len(shadowed.ask("probes:twins")["kls"])

    def samples(name: str, **more: Any) -> list[dict[str, Any]]:
        return [request(f"{name}{i}", prompt, new=3, **more) for i in range(4)]

    script: list[Any] = [request("s", source), ("idle",), request("long", source[:40], new=40)]
    script += [samples("a"), ("polls", 5), samples("b"), ("polls", 5)]
    script += [("call", "probes:note_twins"), *WAIT, samples("c"), *WAIT]
    answers = shadowed.play(script)
    assert shadowed.ask("probes:noted_twins") == [1]
    reused = [one["kvshare"] for name, one in answers.items() if name[0] in "abc"]
    assert all(one["copied_tokens"] + one["blended_tokens"] > 100 for one in reused)
    assert len(shadowed.ask("probes:twins")["kls"]) == before + 1
    other = {"extra_key": "other"}
    shadowed.play([request("s", source, **other), ("idle",), samples("d", **other), *WAIT])
    assert len(shadowed.ask("probes:twins")["kls"]) == before + 2
    assert_clean(shadowed)


def test_a_twin_waits_until_nobody_else_does(shadowed: Lab, texts: Texts) -> None:
    shadowed.flush()
    source, prompt = moved(texts)
    before = len(shadowed.ask("probes:twins")["kls"])
    shadowed.play([
        request("s", source), ("idle",), request("r", prompt, new=4),
        request("long", texts.passage(40), new=40),
        ("polls", 20), ("call", "probes:note_twins"),
        *WAIT, ("call", "probes:note_twins"),
    ])  # fmt: skip
    assert shadowed.ask("probes:noted_twins") == [1, 0]
    assert len(shadowed.ask("probes:twins")["kls"]) == before + 1


def test_twins_outlive_aborts_and_flushes_but_not_their_weights(
    shadowed: Lab, llama: Path, texts: Texts
) -> None:
    shadowed.flush()
    (one, first), (other, second) = moved(texts), moved(texts)
    before = shadowed.ask("probes:twins")
    script = [request("s", one), ("idle",), request("gone", first, new=40), ("polls", 4)]
    shadowed.play([*script, ("abort", "gone"), ("call", "probes:note_twins"), *WAIT])
    assert shadowed.ask("probes:noted_twins") == [1]
    assert len(shadowed.ask("probes:twins")["kls"]) == len(before["kls"]) + 1
    script = [request("s", other), ("idle",), request("r", second, new=2)]
    script += [request("long", texts.passage(40), new=30), ("polls", 10)]
    weights = ("call", "probes:update_weights", str(llama), False)
    shadowed.play([*script, ("call", "probes:note_twins"), weights, *WAIT])
    assert shadowed.ask("probes:noted_twins") == [1]
    after = shadowed.ask("probes:twins")
    # neither run nor remembered: another model said so
    assert (after["kls"], after["waiting"], after["new_weights"]) == ([], 0, 1)
    assert_clean(shadowed)


def test_no_twin_runs_while_weights_are_written(shadowed: Lab, texts: Texts) -> None:
    """Between the beginning and the end of a session; those that wait are of the old weights."""
    shadowed.flush()
    source, prompt = moved(texts)
    dropped = shadowed.ask("probes:twins").get("new_weights", 0)
    note = ("call", "probes:note_twins")
    shadowed.play([
        request("s", source), ("idle",), request("r", prompt, new=2),
        request("long", texts.passage(40), new=30), ("polls", 10), note,
        ("call", "probes:begin_weights"), *WAIT, note, ("call", "probes:end_weights"), note,
    ])  # fmt: skip
    assert shadowed.ask("probes:noted_twins") == [1, 1, 0]
    assert shadowed.ask("probes:twins")["new_weights"] == dropped + 1
    source, prompt = moved(texts)
    shadowed.play([request("s", source), ("idle",), request("r", prompt), *WAIT])
    assert len(shadowed.ask("probes:twins")["kls"]) == 1
    assert_clean(shadowed)


def test_few_twins_wait_and_the_others_are_counted(shadowed: Lab, texts: Texts) -> None:
    """They came in one batch: each is compared with its own request."""
    shadowed.flush()
    source, _ = moved(texts)
    many = [texts.passage(20) + source[:250] + texts.passage(9) for _ in range(MOST_WAITING + 3)]
    before = shadowed.ask("probes:twins")
    together = [request(f"r{i}", prompt, new=2) for i, prompt in enumerate(many)]
    told = shadowed.play([request("s", source), ("idle",), together, ("idle",), ("polls", 12)])
    after = shadowed.ask("probes:twins")
    assert after["queue_full"] - before.get("queue_full", 0) == 3
    assert len(after["kls"]) - len(before["kls"]) == MOST_WAITING
    exact = [
        request(f"r{i}", prompt, new=1, kvshare="exact", extra_key="other")
        for i, prompt in enumerate(many)
    ]
    full = shadowed.play([exact])
    kls = [kl_of(full[f"r{i}"], told[f"r{i}"]) for i in range(len(many))]
    ran = after["kls"][-MOST_WAITING:]
    assert all(min(abs(kl / one - 1) for kl in kls) < 0.02 for one in ran), (kls, ran)
    assert len({round(one, 4) for one in ran}) > 1
    assert_clean(shadowed)


@pytest.mark.parametrize(
    "function",
    [
        "mem_cache.allocation.alloc_req_slots",
        "mem_cache.allocation.alloc_paged_token_slots_extend",
        "managers.schedule_batch.SamplingBatchInfo.from_schedule_batch",
        "model_executor.forward_batch_info.ForwardBatch.init_new",
        "models.llama.LlamaForCausalLM.forward",
    ],
)
def test_a_twin_that_fails_harms_nobody_and_gives_all_back(
    function: str, shadowed: Lab, texts: Texts
) -> None:
    """Wherever it fails: before it has a row, with a row, with slots, with a batch, in the
    model."""
    shadowed.flush()
    rows = shadowed.ask("probes:check")["rows"]
    before = shadowed.ask("probes:twins")
    shadowed.ask("probes:break_twins", f"sglang.srt.{function}")
    source, prompt = moved(texts)
    answers = shadowed.play([request("s", source), ("idle",), request("r", prompt), *WAIT])
    shadowed.ask("probes:break_twins", "")
    assert answers["r"]["finish"]["type"] == "length"
    after = shadowed.ask("probes:twins")
    assert (after["fault"] - before.get("fault", 0), after["waiting"]) == (1, 0)
    assert_clean(shadowed)
    assert shadowed.ask("probes:check")["rows"] == rows


def test_reuse_that_misleads_switches_itself_off_and_is_switched_on_again(tmp_path: Path) -> None:
    """A model whose default probe layer sees nothing. With the layer that calibrating finds all
    agree; with the default one reuse goes off for who says nothing, for no one else."""
    model = with_a_dead_layer(READER, tmp_path / "model")
    arm = {"kl": 0.1, "agree": 0.9}
    file = tmp_path / "calibration.json"
    measured = calibration.as_json(
        "model", calibration.fingerprint(model), probe_at=0.25, stretch=0, budget=0.15, holds=True,
        prompts=8,
        check={"trace": arm, "copies": arm},
    )  # fmt: skip
    file.write_text(json.dumps(measured))
    size = SIZE._replace(facts=24)
    asked = prompts(Encoder(READER), "hops", "adversarial", n=40, size=size, max_len=1024)
    flags: dict[str, Any] = {"kvshare_select": "trace", "kvshare_min_reuse": 32}
    flags |= {"kvshare_calibration": str(file), "kvshare_shadow": 1.0}
    with lab(model, kvshare=True, dtype="float32", **flags) as it:
        it.ask("probes:decide_early", 8)

        def ask(kvshare: Any = None) -> dict[str, Any]:
            prompt = next(asked)
            sources = [request(f"s{i}", one.tolist(), new=1) for i, one in enumerate(prompt.cached)]
            mine = request("r", prompt.ids.tolist(), new=1, kvshare=kvshare)
            answer: dict[str, Any] = it.play([("flush",), *sources, ("idle",), mine, *WAIT])["r"]
            return dict(answer["kvshare"])

        for _ in range(9):
            assert ask()["copied_tokens"] > 0
        good = it.ask("probes:twins")
        assert good["agree"] == 9
        assert not good["closed"]
        it.ask("probes:look_at", KVShareConfig().probe_at)
        asks = 0
        while not it.ask("probes:twins")["closed"]:
            assert ask()["declined"] is None
            asks += 1
            assert asks < 20
        said = ask()
        assert (said["declined"], said["copied_tokens"]) == ("shadow", 0)
        assert it.ask("probes:counts")["declines"]["shadow"] == 2  # its source said nothing too
        assert ask("auto")["copied_tokens"] > 0
        assert ask({"budget": 0.2})["copied_tokens"] > 0
        assert ask("exact")["declined"] == "exact_requested"
        assert not it.ask("probes:switch", {SWITCH: 0.5})
        assert it.ask("probes:twins")["closed"]
        assert it.ask("probes:switch", {SWITCH: 1})
        assert ask()["declined"] is None
        assert it.ask("probes:switch", {SWITCH: 0})
        assert ask()["declined"] == "shadow"
        assert it.ask("probes:update_weights", str(model))
        assert ask()["declined"] == "shadow"
        assert_clean(it)


@pytest.mark.parametrize("default", [{}, {"kvshare_default": "auto"}], ids=["unsaid", "auto"])
def test_of_a_model_that_was_never_measured_who_says_nothing_reuses_only_where_that_was_said(
    llama: Path, texts: Texts, default: dict[str, Any]
) -> None:
    flags = {"kvshare_calibration": "auto", "kvshare_select": "trace", **default}
    with lab(llama, kvshare=True, **flags) as it:

        def told(kvshare: Any) -> dict[str, Any]:
            source, prompt = moved(texts)
            script = [request("s", source), ("idle",), request("r", prompt, kvshare=kvshare)]
            return dict(it.play(script)["r"]["kvshare"])

        said = told(None)
        if default:
            assert said["declined"] is None
            assert said["copied_tokens"] > 0
        else:
            assert (said["declined"], said["copied_tokens"]) == ("default_exact", 0)
            assert it.ask("probes:counts")["declines"] == {"default_exact": 2}
        for asked in ("auto", {"budget": 0.2}):
            assert told(asked)["copied_tokens"] > 0
        assert told("exact")["declined"] == "exact_requested"
        assert_clean(it)
