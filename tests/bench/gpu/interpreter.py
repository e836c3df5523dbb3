"""Triton's interpreter, mended: import this before any kernel. Without a GPU they run in it.

It makes the language anew for each launch and for each function that a kernel calls (``tl.max`` is
one), copies what each argument lies in onto itself, a whole page table at a time, and computes all
integers twice to see whether they overflow. Here the language is made once, what is on the CPU
stays where it is, and integers are taken to fit.

Three faults of it (seen in 3.6.0 and 3.7.1):

- ``for i in range(tensor)`` fails with NumPy 2.4 (3.6.0 only);
- ``tl.dot`` multiplies the *bit patterns* of bf16 operands;
- a cast to an 8-bit float loses the carry where rounding reaches the next power of two (1.96 gives
  1.0 in e4m3). Here torch does the casts.
"""

import functools
import os

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

TORCH = {
    tl.float64: torch.float64,
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_convert, _patch = interpreter._convert_float, interpreter._patch_lang_tensor


def _cast(data, source, target, rounding):
    if source not in TORCH or target not in TORCH:
        return _convert(data, source, target, rounding)
    source, target = TORCH[source], TORCH[target]
    raw = np.ascontiguousarray(data).view(f"int{8 * source.itemsize}")
    bits = torch.from_numpy(raw.copy())
    if source.itemsize == 1:
        bits = bits.view(torch.uint8)
    cast = bits.view(source).to(target).view(BITS[target.itemsize]).numpy()
    return cast.view(f"uint{8 * target.itemsize}").reshape(np.shape(data))


def _dot(self, a, b, c, input_precision, max_num_imprecise_acc):
    def wide(x):
        scalar = x.dtype.scalar
        if scalar in (tl.float32, tl.float64) or scalar not in TORCH:
            return x.data
        return _cast(x.data, scalar, tl.float32, None).view(np.float32)

    return interpreter.TensorHandle(
        np.matmul(wide(a), wide(b)).astype(c.data.dtype) + c.data, c.dtype.scalar
    )


def _with_index(tensor, scope):
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).flat[0]))


_of_scalar = functools.cache(interpreter._get_np_dtype)


def _np_dtype(kind):
    kind = kind.element_ty if isinstance(kind, tl.block_type) else kind
    return np.dtype(np.uint64) if isinstance(kind, tl.pointer_type) else _of_scalar(kind)


_made: set[object] = set()
_make = interpreter._patch_lang


def _make_once(fn):
    langs = {id(one) for one in fn.__globals__.values() if one is tl or one is tl.core}
    if not langs <= _made:
        _make(fn)
        _made.update(langs)
    return interpreter._LangPatchScope()  # of no changes: nothing is unmade


interpreter._patch_lang = _make_once
interpreter._get_np_dtype = _np_dtype
interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
interpreter.GridExecutor._init_args_hst = lambda self, args, kwargs: (args, kwargs)
interpreter.GridExecutor._restore_args_dev = lambda self, *args: None
interpreter._convert_float = _cast
interpreter._patch_lang_tensor = _with_index
interpreter.InterpreterBuilder.create_dot = _dot
