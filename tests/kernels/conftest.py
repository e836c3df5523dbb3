"""Without a GPU, Triton's kernels run in its interpreter; that must be said before Triton loads."""

import importlib.util

import torch

if importlib.util.find_spec("triton") is not None and not torch.cuda.is_available():
    import interpreter  # noqa: F401
