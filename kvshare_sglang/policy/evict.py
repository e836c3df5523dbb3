"""What is evicted first: what was used least, with age (LFU with aging). Pure.

SGLang's LRU lets a flood of new text push out what many requests reuse. Here each stretch counts
its uses (a prefix hit is one, a copy the share of the stretch that was copied). The count halves
each time the cache has taken in as many tokens as it holds, and what was used about equally often
goes by recency. No clock but tokens: the same requests give the same evictions.

The next turn of a conversation is no such use. Counted, a conversation that ended would outlive one
that goes on, of which the newest text has no use yet: agents in a full pool ran 1.6 times LRU's
rows. So what is one conversation's own goes by recency, as under LRU.
"""

import math
from typing import NamedTuple


class Frequency(NamedTuple):
    """Uses of a stretch of text as of ``at``, in fills: tokens that the cache has taken in, in
    units of its capacity."""

    uses: float = 0.0
    at: float = 0.0


NEW = Frequency()
COPY = 2  # ranks less, a halving: what can be copied again costs less to lose


def touched(frequency: Frequency, amount: float, *, now: float) -> Frequency:
    """After one more use; ``amount`` is the share of the text that was used."""
    return Frequency(aged(frequency, now=now) + amount, now)


def gone_on(frequency: Frequency, *, now: float, copied: bool) -> Frequency:
    """After one more turn of the conversation whose own it is. A copy counts as used once, which
    makes up for what it ranks less.

    >>> gone_on(Frequency(3.0, at=1.0), now=2.0, copied=False)
    Frequency(uses=1.5, at=2.0)
    >>> gone_on(NEW, now=2.0, copied=True)
    Frequency(uses=1.0, at=2.0)
    """
    return Frequency(max(aged(frequency, now=now), 1.0 if copied else 0.0), now)


def aged(frequency: Frequency, *, now: float) -> float:
    """Uses that still count.

    >>> aged(Frequency(4.0, at=1.0), now=3.0)
    1.0
    """
    return frequency.uses * math.exp2(frequency.at - now)


def rank(frequency: Frequency, *, now: float, less: float = 0) -> int:
    """What is evicted first has the smallest rank; two ranks for each doubling of uses. ``less``:
    ranks that are taken off before rounding, which is towards 0: a copy that was used not long ago
    is worth as much as text that never was.

    >>> [rank(Frequency(uses), now=0.0) for uses in (0, 0.3, 1, 3, 15)]
    [0, 0, 2, 4, 8]
    >>> [rank(Frequency(uses), now=0.0, less=COPY) for uses in (0, 0.3, 0.5, 1, 3, 15)]
    [-2, -1, 0, 0, 2, 6]
    """
    return int(2 * math.log2(1 + aged(frequency, now=now)) - less)
