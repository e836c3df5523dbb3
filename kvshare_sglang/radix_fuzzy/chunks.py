"""Cut token sequences by content into chunks of adaptive length. Pure: NumPy.

A cut may stand only where a winnowed gram starts, so the same text is cut alike wherever it
stands. Among the grams that would keep a chunk between its bounds the smallest hash wins: a rare
value, met again in every copy of the text.
"""

from typing import NamedTuple

import numpy as np
import xxhash

from kvshare_sglang.radix_fuzzy.fingerprints import Tokens, winnow


class Chunk(NamedTuple):
    """``tokens[start:stop]`` and the 64-bit key of its content."""

    start: int
    stop: int
    key: int


def cut(tokens: Tokens, *, min_len: int = 32, max_len: int = 256, seed: int = 0) -> list[Chunk]:
    """Chunks that partition the sequence, each of ``min_len`` to ``max_len`` tokens.

    Only the last may be shorter; a stretch without any gram in bounds is cut at ``max_len``.
    Raises ValueError unless ``1 <= min_len <= max_len``. O(n).
    """
    if not 1 <= min_len <= max_len:
        raise ValueError(f"min_len must be in [1, max_len={max_len}], got {min_len}")
    marks = winnow(tokens, seed=seed)
    out: list[Chunk] = []
    start = 0
    while start < len(tokens):
        stop = len(tokens)
        if stop - start > max_len:
            lo, hi = np.searchsorted(marks.positions, (start + min_len, start + max_len + 1))
            stop = start + max_len
            if lo < hi:
                stop = int(marks.positions[lo + int(marks.hashes[lo:hi].argmin())])
        key = xxhash.xxh3_64_intdigest(np.ascontiguousarray(tokens[start:stop]).tobytes(), seed)
        out.append(Chunk(start, stop, key))
        start = stop
    return out
