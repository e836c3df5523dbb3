"""Deviation and attention mass, against their definitions in plain Python."""

import math

import pytest
import torch

from kvshare_sglang.kernels.row_scores import attention_mass, deviation


def test_deviation_is_the_relative_distance():
    torch.manual_seed(0)
    fresh, cached = torch.randn(7, 2, 4), torch.randn(7, 2, 4)
    cached[3] = fresh[3]
    for i, found in enumerate(deviation(fresh, cached).tolist()):
        a, b = fresh[i].flatten().tolist(), cached[i].flatten().tolist()
        apart = math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)))
        assert found == pytest.approx(apart / math.sqrt(sum(x * x for x in a)), abs=1e-6)
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
    q, keys, at = torch.randn(3, 4, 8), torch.randn(9, 2, 8), [4, 6, 8]
    expected = [0.0] * 9
    for row, position in enumerate(at):
        by_head = []
        for head in range(4):
            seen = [0.3 * float(q[row, head] @ keys[i, head // 2]) for i in range(position + 1)]
            total = sum(math.exp(s) for s in seen)
            by_head.append([math.exp(s) / total for s in seen])
        for i, weights in enumerate(zip(*by_head, strict=True)):
            expected[i] += (max(weights) if strongest_head else sum(weights) / 4) / 3
    found = attention_mass(q, torch.tensor(at), keys, scaling=0.3, strongest_head=strongest_head)
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    if not strongest_head:
        assert float(found.sum()) == pytest.approx(1)


def test_attention_mass_stays_finite_in_half_precision():
    q, keys = torch.full((2, 4, 128), 30.0), torch.full((5, 2, 128), 30.0)
    args = torch.tensor([3, 4]), keys.half()
    found = attention_mass(q.half(), *args, scaling=128**-0.5)
    exact = attention_mass(q, args[0], keys, scaling=128**-0.5)
    torch.testing.assert_close(found, exact, atol=1e-3, rtol=1e-3)
