"""Tokens written side by side, or with refresh, are those that come one after the other."""

import numpy as np
import pytest

from kvshare_sglang.bench.models import READER
from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.sim.engine import Lab, Model
from kvshare_sglang.sim.writing import refreshing, side_by_side


@pytest.fixture(scope="module")
def model():
    return Model(READER)


def test_answers_side_by_side_are_those_that_each_prompt_gets_alone(model):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(4, 200, size, dtype=np.int32) for size in (40, 7, 23)]
    firsts, kvs = zip(*(model.full(ids) for ids in prompts), strict=True)
    lens = [len(ids) for ids in prompts]
    alone = [
        model.greedy(ids, first, kv, 12)[len(ids) :].tolist()
        for ids, first, kv in zip(prompts, firsts, kvs, strict=True)
    ]
    assert side_by_side(model, firsts, kvs, lens, 12) == alone
    stop = alone[0][5]
    cut = [one[: one.index(stop) + 1] if stop in one else one for one in alone]
    assert side_by_side(model, firsts, kvs, lens, 12, stop=stop) == cut


def test_an_answer_written_with_refresh_is_what_decoding_along_it_says(model):
    rng = np.random.default_rng(1)
    text, other, ask = (rng.integers(4, 200, size, dtype=np.int32) for size in (120, 30, 20))
    lab = Lab(model, KVShareConfig(min_reuse=32, refresh_above=0.01))
    lab.add(np.concatenate([text, ask]))
    ids = np.concatenate([other, text, ask[::-1]])
    plan = lab.plan(ids)
    assert plan.copies

    def prefilled():
        return lab.prefill(ids, plan, "trace", budget=0.15)

    written, count = refreshing(lab, ids, prefilled(), 10, every=1, stop=-1)
    assert len(written) == 10
    told = np.concatenate([ids, np.asarray(written, ids.dtype)])
    done = prefilled()
    rest, again = lab.decode(told[:-1], len(ids), done, every=1)
    assert count == again > 0
    assert written == [int(done.logits.argmax()), *rest.argmax(-1).tolist()]
    stopped, _ = refreshing(lab, ids, prefilled(), 10, every=1, stop=written[3])
    assert stopped == written[: written.index(written[3]) + 1]
