"""Cut token sequences by content into chunks of adaptive length. Pure: NumPy.

A cut may only be where a winnowed gram starts, so the same text is cut alike wherever it is. Among
the grams that keep a chunk as far from its target as its lower bound, to either side, the smallest
hash wins: a rare value, met again in every copy of the text. A stretch without a gram there extends
to the next one, at most to the upper bound.
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


class Bounds(NamedTuple):
    """Lengths of chunks, in tokens: ``1 <= least <= target <= most``."""

    least: int = 32
    target: int = 128
    most: int = 512


BOUNDS = Bounds()


def cut(tokens: Tokens, *, bounds: Bounds = BOUNDS, seed: int = 0) -> list[Chunk]:
    """Chunks that partition the sequence, each within ``bounds``, near the target on average.

    Only the last may be shorter; a stretch without any gram in bounds is cut at the upper one.
    Raises ValueError if the bounds are not in order. O(n).
    """
    least, target, most = bounds
    if not 1 <= least <= target <= most:
        raise ValueError(f"bounds must be 1 <= least <= target <= most, got {tuple(bounds)}")
    marks = winnow(tokens, seed=seed)
    usual = min(2 * target - least, most)
    out: list[Chunk] = []
    start = 0
    while start < len(tokens):
        stop = len(tokens)
        if stop - start > usual:
            lo, hi = np.searchsorted(marks.positions, (start + least, start + usual + 1))
            stop = min(stop, start + most)
            if lo < hi:
                # Of equal ones the last, so that text of one token is not cut at every minimum.
                stop = int(marks.positions[hi - 1 - int(marks.hashes[lo:hi][::-1].argmin())])
            elif lo < len(marks.positions):
                stop = min(stop, int(marks.positions[lo]))
        key = xxhash.xxh3_64_intdigest(np.ascontiguousarray(tokens[start:stop]).tobytes(), seed)
        out.append(Chunk(start, stop, key))
        start = stop
    return out
