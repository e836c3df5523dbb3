"""Whether reuse may go on, by what exact twins of reusing requests said. Pure.

A twin agrees where its first token is the one that the request with reuse would have written. Some
disagree by chance: two tokens that are about as likely change places for no reason. So reuse is
switched off only where agreement is *surely* too low.
"""

import math
from collections import deque
from typing import NamedTuple

from kvshare_sglang.config import KVShareConfig

FLOOR = KVShareConfig().shadow_floor
WINDOW, LEAST = 200, 20  # twins that are looked at; before so many nothing is decided
Z = 1.96  # 95% on both sides


class Twin(NamedTuple):
    """``kl``: of the first token's distribution, from full prefill to reuse, in nats. ``prompt``:
    a hash, equal for equal prompts."""

    agrees: bool
    kl: float
    prompt: int


def upper_bound(agree: int, twins: int) -> float:
    """The highest rate that ``agree`` of ``twins`` still speak for: Wilson's score interval, upper
    end (Wilson 1927). 1.0 where all agree, or none was run.

    >>> [round(upper_bound(*pair), 3) for pair in ((0, 0), (17, 20), (14, 20), (140, 200))]
    [1.0, 0.948, 0.855, 0.759]
    """
    if agree == twins:
        return 1.0
    rate, more = agree / twins, Z * Z / twins
    spread = Z * math.sqrt(rate * (1 - rate) / twins + more / (4 * twins))
    return min(1.0, (rate + more / 2 + spread) / (1 + more))


class Gate:
    """Open until twins speak against it or someone closes it (``by_hand``); closed until someone
    opens it. ``floor`` 0: twins never close it. The bound is of twins that do not hang together, so
    a prompt is to be there once.

    Also says which reusing requests get a twin: ``share`` of them, evenly, the first one early.
    """

    def __init__(self, *, share: float, floor: float) -> None:
        self.share, self.floor = share, floor
        self.closed = self.by_hand = False
        self._due = 1.0  # of the next twin
        self._twins: deque[Twin] = deque(maxlen=WINDOW)

    @property
    def twins(self) -> int:
        """In the window."""
        return len(self._twins)

    @property
    def agreeing(self) -> int:
        return sum(twin.agrees for twin in self._twins)

    @property
    def kl(self) -> float:
        """Mean over the window; 0 without twins."""
        return sum(twin.kl for twin in self._twins) / len(self._twins) if self._twins else 0.0

    def takes(self) -> bool:
        """Asked once for each reusing request: whether it gets a twin."""
        self._due += self.share
        if self._due < 1 or not self.share:
            return False
        self._due -= 1
        return True

    def knows(self, prompt: int) -> bool:
        """Whether a twin of the prompt is in the window. O(window)."""
        return any(twin.prompt == prompt for twin in self._twins)

    def add(self, twin: Twin) -> bool:
        """One more twin is known. Whether the gate closes for it, a moment ago open. O(window)."""
        self._twins.append(twin)
        too_low = self.twins >= LEAST and upper_bound(self.agreeing, self.twins) < self.floor
        closes = too_low and not self.closed
        self.closed |= closes
        return closes

    def switch(self, *, on: bool) -> None:
        """By hand. What twins said is forgotten."""
        self._twins.clear()
        self.closed = self.by_hand = not on

    def forget(self) -> None:
        """What twins said no longer counts: closed stays only what was closed by hand."""
        self._twins.clear()
        self.closed = self.by_hand
