"""What cached text is worth keeping: how often it was used, aged by how much came since. Pure.

SGLang's LRU lets a flood of new text push out what many requests reuse. Here each stretch counts
its uses (a prefix hit is one, a copy the share of the stretch that was copied). The count halves
each time the cache has taken in as many tokens as it holds, and what was used about equally often
goes by recency. No clock but tokens: the same requests give the same evictions.
"""

import math
from typing import NamedTuple


class Worth(NamedTuple):
    """Uses of a stretch of text as of turnover ``at``. Turnover counts the tokens that the cache
    has taken in, in units of its capacity."""

    uses: float = 0.0
    at: float = 0.0


NEW = Worth()


def used(worth: Worth, amount: float, *, now: float) -> Worth:
    """The worth after one more use; ``amount`` is the share of the text that was used."""
    return Worth(aged(worth, now=now) + amount, now)


def aged(worth: Worth, *, now: float) -> float:
    """Uses that still count.

    >>> aged(Worth(4.0, at=1.0), now=3.0)
    1.0
    """
    return worth.uses * math.exp2(worth.at - now)


def rank(worth: Worth, *, now: float) -> int:
    """What is evicted first has the smallest rank; two ranks for each doubling of uses.

    >>> [rank(Worth(uses), now=0.0) for uses in (0, 0.3, 1, 3, 15)]
    [0, 0, 2, 4, 8]
    """
    return int(2 * math.log2(1 + aged(worth, now=now)))
