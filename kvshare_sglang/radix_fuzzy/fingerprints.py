"""Choose few n-grams of a token sequence such that shared text shares some. Pure: NumPy.

Winnowing (Schleimer, Wilkerson and Aiken, SIGMOD 2003): hash every ``GRAM``-gram and keep the
minimum of every window of ``WINDOW`` hashes. Any two sequences that share
``GRAM + WINDOW - 1 = SPAN`` tokens keep a common gram inside the shared span, wherever it is.
Ties are all kept, so the choice depends on content alone, never on position.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

GRAM = 8  # tokens hashed together
WINDOW = 9  # neighbouring grams of which the minimum is kept
SPAN = GRAM + WINDOW - 1  # the shortest shared text that is always found

Tokens = npt.NDArray[np.int32]
Hashes = npt.NDArray[np.uint64]

_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd: multiplication permutes the 64-bit integers
_MIX = np.uint64(0xBF58476D1CE4E5B9)
_SHIFT = np.uint64(29)


class Fingerprints(NamedTuple):
    """Kept grams, ascending: where they start, and their hashes (never 0)."""

    positions: npt.NDArray[np.int64]
    hashes: Hashes


def namespace_seed(namespace: object) -> int:
    """A 64-bit seed under which grams of different namespaces have different hashes.

    >>> namespace_seed(None) == namespace_seed(None) != namespace_seed("a")
    True
    """
    return xxhash.xxh3_64_intdigest(repr(namespace).encode())


def gram_hashes(tokens: Tokens, *, seed: int = 0) -> Hashes:
    """Hash of ``tokens[i : i + GRAM]`` for every i, uint64. O(n)."""
    num = len(tokens) - GRAM + 1
    if num <= 0:
        return np.empty(0, np.uint64)
    wide = tokens.astype(np.uint64)
    out = np.full(num, np.uint64(seed & (2**64 - 1)))
    for j in range(GRAM):
        out *= _BASE
        out += wide[j : j + num]
        # without this, the hash would be linear: a[i]*B + a[i+1] collides for far too many grams
        out ^= out >> _SHIFT
    out *= _MIX
    out ^= out >> np.uint64(32)
    np.maximum(out, np.uint64(1), out=out)  # 0 marks an empty slot of the index
    return out


def _slide(values: Hashes, width: int, pick: np.ufunc) -> Hashes:
    """``pick`` (minimum or maximum) over every window of ``width``, by doubling. O(n log width)."""
    out, have = values, 1
    while have < width:
        step = min(have, width - have)
        out = pick(out[:-step], out[step:])
        have += step
    return out


def winnow(tokens: Tokens, *, seed: int = 0) -> Fingerprints:
    """Fingerprints of a sequence; empty below ``SPAN`` tokens. O(n).

    A gram is kept iff it is the minimum of some full window that holds it, which is so iff its
    hash equals the *largest* minimum among the windows that hold it.
    """
    if len(tokens) < SPAN:
        return Fingerprints(np.empty(0, np.int64), np.empty(0, np.uint64))
    hashes = gram_hashes(tokens, seed=seed)
    minima = _slide(hashes, WINDOW, np.minimum)
    # Gram i lies in windows i-WINDOW+1 .. i; outside the sequence there is no window: pad with 0.
    padded = np.zeros(len(minima) + 2 * (WINDOW - 1), np.uint64)
    padded[WINDOW - 1 : WINDOW - 1 + len(minima)] = minima
    positions = np.flatnonzero(_slide(padded, WINDOW, np.maximum) == hashes)
    return Fingerprints(positions, hashes[positions])
