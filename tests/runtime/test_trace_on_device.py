"""A trace on the device chooses the rows that the host's trace chooses, ties included."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvshare_sglang.plan import Join, Rows, Run
from kvshare_sglang.policy.select.attention_trace import AttentionTrace
from kvshare_sglang.policy.select.base import copy_all
from kvshare_sglang.runtime.batch import DeviceRows
from kvshare_sglang.runtime.trace_on_device import DeviceTrace, OnTheirWay


@st.composite
def plans(draw):
    """A prompt of new text, and runs of copies between it."""
    at, runs = draw(st.integers(1, 40)), []
    for i in range(draw(st.integers(1, 5))):
        length = draw(st.integers(20, 300))
        join = draw(st.sampled_from([Join.SEAM, Join.EDIT]))
        runs.append(Run(i, draw(st.integers(0, 500)), at, length, join=join))
        at += length + draw(st.integers(0, 30))
    return copy_all(tuple(runs), prompt_len=at + draw(st.integers(1, 60)), prefix_len=0, suffix=16)


def noise(rng: np.random.Generator, length: int) -> np.ndarray:
    """Attention with many ties: half of it is nothing at all, the rest a few values."""
    return (rng.integers(0, 6, length) * (rng.random(length) < 0.5)).astype(np.float32)


@given(
    plans(),
    st.sampled_from([0.01, 0.05, 0.15, 0.5, 1.0]),
    st.sampled_from([0, 1, 6, 64]),
    st.booleans(),
    st.integers(0, 1000),
)
def test_each_step_takes_the_rows_that_the_host_takes(plan, budget, stretch, knows, seed):
    rng = np.random.default_rng(seed)
    selector = AttentionTrace(16, stretch)
    prior = noise(rng, plan.prompt_len).astype(np.float64) / 3 if knows else None
    host = selector.trace(plan, budget=budget, prior=prior)
    must = selector.required(plan, 0)
    there = selector.trace(
        plan, budget=budget, prior=None if prior is None else torch.tensor(prior)
    )
    device = DeviceTrace(there, must, "cpu")
    most = host.most_chosen
    while not host.done:
        assert not device.done
        assert np.array_equal(device.rows.at.numpy(), host.rows.positions)
        assert device.rows.num == host.rows.num
        assert np.array_equal(device.asking.positions.numpy(), host.query.positions)
        query_at = device.rows.at[device.asking.places]
        assert query_at.equal(device.asking.positions)
        mass = noise(rng, host.length)
        host.feed(mass)
        device.feed(torch.from_numpy(mass))
    assert device.done
    want = selector.rows(plan, host, 0)
    chosen = device.chosen()
    assert chosen.num == want.num == len(chosen.at)
    assert want.num <= must.num + most
    assert OnTheirWay([chosen]).wait() == [want]


def test_rows_of_several_requests_come_back_apart():
    rows = [Rows([(0, 3), (5, 6)]), Rows(), Rows([(2, 4)])]
    there = [torch.from_numpy(one.positions.copy()) for one in rows]
    device = [DeviceRows(one.num, 10, at) for one, at in zip(rows, there, strict=True)]
    assert OnTheirWay(device).wait() == rows
