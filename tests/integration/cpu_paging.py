"""Page sizes above 1 on a machine without Triton: SGLang's two page kernels, in plain Python.

Stock SGLang launches these kernels on any device; what they compute is stated in its docstrings
and in ``alloc_extend_naive``. Nothing else of SGLang's paging is touched.
"""

from typing import Any

import torch


class _Launch:
    """``kernel[grid](*args)`` calls a function."""

    def __init__(self, function: Any) -> None:
        self._function = function

    def __getitem__(self, grid: Any) -> Any:
        return self._function


def _extend(
    prefix_lens: Any, seq_lens: Any, last_loc: Any, free: Any, out: Any, _: int, page: int
) -> None:
    """Each request fills its last page, then takes whole free pages in order."""
    at = used = 0
    for start, stop, last in zip(
        prefix_lens.tolist(), seq_lens.tolist(), last_loc.tolist(), strict=True
    ):
        for position in range(start, stop):
            if position % page == 0:
                last = int(free[used]) * page
                used += 1
            else:
                last += 1
            out[at] = last
            at += 1


def _decode(seq_lens: Any, last_loc: Any, free: Any, out: Any, _: int, page: int) -> None:
    """Each request takes the slot behind its last, or a free page."""
    used = 0
    for i, (length, last) in enumerate(zip(seq_lens.tolist(), last_loc.tolist(), strict=True)):
        if (length - 1) % page == 0:
            out[i] = int(free[used]) * page
            used += 1
        else:
            out[i] = last + 1


def install() -> None:
    """Put them in place where Triton has no device to run on."""
    if torch.cuda.is_available():
        return
    from sglang.srt.mem_cache.allocator import paged

    paged.alloc_extend_kernel = _Launch(_extend)
    paged.alloc_decode_kernel = _Launch(_decode)
