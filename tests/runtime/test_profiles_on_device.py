"""What copied rows rest on is the same on the device as by its definition on the host."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvshare_sglang.plan import Join, ReusePlan, Run
from kvshare_sglang.policy.select.dependence import EDGES, outside
from kvshare_sglang.runtime.profiles import outside_on_device


@st.composite
def plans(draw):
    """Runs of a few sources, each joined to what is before it in any way, after a prefix or not."""
    prefix = draw(st.sampled_from([0, 0, 33]))
    at, runs = prefix + draw(st.integers(1, 40)), []
    for _ in range(draw(st.integers(1, 12))):
        length = draw(st.integers(1, 90))
        join = draw(st.sampled_from(list(Join)))
        # one that is joined goes on from the run before it, of the same source
        last = runs[-1] if runs else None
        src = draw(st.integers(0, 400))
        source = draw(st.integers(0, 2))
        if last is not None and join != Join.SEAM:
            source, src = last.source, last.src_stop + draw(st.integers(0, 20))
        runs.append(Run(source, src, at, length, join=join))
        at += length + draw(st.integers(0, 30))
    runs = tuple(runs)
    return ReusePlan(at + draw(st.integers(1, 60)), prefix, runs, runs)


@given(plans(), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_it_is_what_the_definition_says(plan, unknown, seed):
    rng = np.random.default_rng(seed)
    profiles = np.sort(rng.random((plan.prompt_len, len(EDGES))).astype(np.float32))[:, ::-1].copy()
    profiles[rng.random(plan.prompt_len) < unknown] = np.nan
    want = outside(plan, profiles)
    found = outside_on_device(plan, torch.from_numpy(profiles))
    if want is None:
        want = np.ones(plan.prompt_len)
    np.testing.assert_allclose(found.numpy(), want, rtol=1e-9, atol=1e-12)
