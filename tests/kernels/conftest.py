"""Without a GPU, Triton's kernels run in its interpreter; that must be said before Triton loads."""

import torch

if not torch.cuda.is_available():
    import interpreter  # noqa: F401
