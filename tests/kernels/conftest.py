"""Without a GPU, Triton's kernels run in its interpreter; that must be said before Triton loads."""

import importlib.util

import torch

collect_ignore = []
if importlib.util.find_spec("triton") is None:
    collect_ignore += ["test_gpu_kernels.py", "test_gpu_compile.py"]
elif not torch.cuda.is_available():
    import interpreter  # noqa: F401
