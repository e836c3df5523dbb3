"""How far a kernel may be from its fp64 reference, by the type it computes in."""

import torch

# One rounding of the result, plus what sums over a few hundred terms add.
TOL = {
    torch.float32: {"rtol": 2e-5, "atol": 2e-5},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 1.6e-2},
}


def assert_close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want.double(), **TOL[dtype])
