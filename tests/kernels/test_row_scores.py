"""Deviation and attention mass, against their definitions in fp64."""

import pytest
import torch
from tolerances import TOL

from kvshare_sglang.kernels import reference
from kvshare_sglang.kernels.row_scores import attention_mass, attention_profile, deviation


def test_deviation_is_the_relative_distance():
    torch.manual_seed(0)
    fresh, cached = torch.randn(7, 2, 4), torch.randn(7, 2, 4)
    cached[3] = fresh[3]
    want = reference.deviation(fresh, cached)
    torch.testing.assert_close(deviation(fresh, cached).double(), want, **TOL[torch.float32])
    assert deviation(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2)).tolist() == [0]
    with pytest.raises(ValueError, match=r"shapes differ: \(7, 2, 4\) and \(6, 2, 4\)"):
        deviation(fresh, cached[:6])


@pytest.mark.parametrize("at_once", [1 << 23, 1, 80])  # all rows together, or one or two
@pytest.mark.parametrize("strongest_head", [False, True])
def test_attention_mass_is_the_mean_softmax_over_rows_and_heads(
    at_once, strongest_head, monkeypatch
):
    monkeypatch.setattr("kvshare_sglang.kernels.row_scores._AT_ONCE", at_once)
    torch.manual_seed(1)
    q, keys, at = torch.randn(3, 4, 8), torch.randn(9, 2, 8), torch.tensor([4, 6, 8])
    how = {"scaling": 0.3, "strongest_head": strongest_head}
    found, want = attention_mass(q, at, keys, **how), reference.attention_mass(q, at, keys, **how)
    torch.testing.assert_close(found.double(), want, **TOL[torch.float32])
    if not strongest_head:
        assert float(found.sum()) == pytest.approx(1)


@pytest.mark.parametrize("at_once", [1 << 23, 1, 80])
def test_a_profile_is_what_a_row_gives_to_keys_so_far_behind_it(at_once, monkeypatch):
    monkeypatch.setattr("kvshare_sglang.kernels.row_scores._AT_ONCE", at_once)
    torch.manual_seed(2)
    q, keys, at = torch.randn(4, 4, 8), torch.randn(9, 2, 8), torch.tensor([0, 4, 6, 8])
    edges = torch.tensor([0, 1, 2, 4, 8, 16])
    found = attention_profile(q, at, keys, edges, scaling=0.3)
    want = reference.attention_profile(q, at, keys, edges, scaling=0.3)
    torch.testing.assert_close(found.double(), want, **TOL[torch.float32])
    assert found[0].tolist() == [0] * 6  # of the first row all goes to the first key
    assert found[:, -1].tolist() == [0] * 4


def test_the_references_are_right_where_the_answer_is_known():
    """Keys alike share the attention evenly; a key that a head alone is near gets all of it."""
    q, keys = torch.ones(1, 2, 4), torch.ones(5, 1, 4)
    even = reference.attention_mass(q, torch.tensor([3]), keys, scaling=1.0)
    torch.testing.assert_close(even, torch.tensor([0.25] * 4 + [0.0]).double())
    q[0, 1] = -1
    keys[2] = -50
    best = reference.attention_mass(q, torch.tensor([3]), keys, scaling=1.0, strongest_head=True)
    torch.testing.assert_close(best, torch.tensor([1 / 3, 1 / 3, 1, 1 / 3, 0]).double())
    fresh = torch.tensor([[[3.0, 4.0]]])
    assert reference.deviation(fresh, fresh * 0).tolist() == [1.0]


def test_attention_mass_stays_finite_in_half_precision():
    q, keys = torch.full((2, 4, 128), 30.0), torch.full((5, 2, 128), 30.0)
    args = torch.tensor([3, 4]), keys.half()
    found = attention_mass(q.half(), *args, scaling=128**-0.5)
    exact = attention_mass(q, args[0], keys, scaling=128**-0.5)
    torch.testing.assert_close(found, exact, atol=1e-3, rtol=1e-3)
