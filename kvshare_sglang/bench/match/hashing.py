"""Hashes of every window of a text, for baselines that probe at each offset. Pure."""

import numpy as np

from kvshare_sglang.radix_fuzzy.fingerprints import Tokens
from kvshare_sglang.radix_fuzzy.index import Words

_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2**64
_powers: tuple[Words, Words] = (np.ones(1, np.uint64), np.ones(1, np.uint64))


def _powers_of_base(num: int) -> tuple[Words, Words]:
    """Powers of the base and of its inverse modulo 2**64."""
    global _powers
    if len(_powers[0]) < num:
        bases = (_BASE, pow(_BASE, -1, 2**64))
        up, down = (
            np.cumprod(np.array([1] + [base] * (2 * num), np.uint64), dtype=np.uint64)
            for base in bases
        )
        _powers = up, down
    return _powers


def window_hashes(tokens: Tokens, length: int, seed: int) -> Words:
    """Hash of ``tokens[i : i + length]`` for every i, never 0. O(n), whatever the length."""
    num = len(tokens) - length + 1
    if num <= 0:
        return np.empty(0, np.uint64)
    up, down = _powers_of_base(len(tokens))
    sums = np.zeros(len(tokens) + 1, np.uint64)
    np.cumsum(_mixed(tokens.astype(np.uint64)) * up[: len(tokens)], out=sums[1:])
    out = (sums[length:] - sums[:-length]) * down[:num]
    return np.maximum(_mixed(out ^ np.uint64(seed)), np.uint64(1))


def _mixed(words: Words) -> Words:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
