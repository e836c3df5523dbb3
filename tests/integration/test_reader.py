"""Answers of a trained model on the real server: what reuse would spoil, traces put right."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import Lab, lab, request

from kvshare_sglang.bench.quality.cases import SIZE, Encoder, Prompt, prompts

ROOT = Path(__file__).resolve().parents[2]
READER = ROOT / "tests" / "data" / "reader"
NUM = 8  # prompts of each kind
FLAGS = {
    "kvshare_select": "trace",
    "kvshare_min_reuse": 32,
    "kvshare_window": 16,
    "kvshare_calibration": "auto",  # the package has one of it
}


@pytest.fixture(scope="module")
def reader() -> Iterator[Lab]:
    with lab(READER, kvshare=True, dtype="float32", **FLAGS) as it:
        yield it


def answers(it: Lab, prompt: Prompt) -> dict[str, list[int]]:
    """By way: full prefill, traced, and copied without computing anything again."""
    ids, new = prompt.ids.tolist(), len(prompt.answer)
    sources = [request(f"s{i}", one.tolist(), new=1) for i, one in enumerate(prompt.cached)]
    cached = [("flush",), *sources, ("idle",)]
    full = request("full", ids, new=new, kvshare="exact", extra_key="other")
    got = it.play([*cached, full, ("idle",), request("trace", ids, new=new)])
    got |= it.play([*cached, request("copy", ids, new=new, kvshare={"budget": 0.0})])
    ways = ("full", "trace", "copy")
    assert [got[way]["kvshare"]["copied_tokens"] > 0 for way in ways] == [False, True, True]
    return {way: got[way]["output"] for way in ways}


@pytest.mark.parametrize("case", ["edit far", "template", "adversarial"])
def test_traces_answer_as_full_prefill_does(reader: Lab, case: str) -> None:
    encode = Encoder(READER)
    right = dict.fromkeys(("full", "trace", "copy"), 0)
    same = total = 0
    for task in ("hops", "state"):
        size = SIZE._replace(facts=48)
        for prompt in prompts(encode, task, case, n=NUM, size=size, max_len=1024):
            got = answers(reader, prompt)
            total += 1
            same += got["trace"] == got["full"]
            for way, output in got.items():
                right[way] += output == prompt.answer.tolist()
    assert right["full"] >= 0.75 * total, right  # the model can read
    assert same >= total - 2, right
    assert right["trace"] >= right["full"] - 1, right
    assert right["copy"] <= 0.8 * right["full"], right  # and copies alone mislead it
