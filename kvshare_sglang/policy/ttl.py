"""How long the KV of a finished turn is kept for the turn that will follow it. Pure.

After Continuum (arXiv 2511.02230, 4.2). A program that calls a tool comes back when the tool is
done. Keeping its KV for ``t`` seconds costs the memory that long, and spares it, with the chance
that it is back by then, the wait of one that was evicted and the time to compute its context::

    argmax over t of  F(t) * (eta * wait + rebuild) - t

F is what was seen: the gaps between the end of a turn and its return, infinite where nobody came.
``eta`` says how much of a turn's wait its program feels; a server that is not told where programs
end knows no better than all of it.
"""

import math
from collections import deque
from collections.abc import Sequence

ETA = 1.0
KEEP = 200  # gaps that are remembered
PRIOR_UNTIL = 20  # gaps; with fewer, the gap is taken for exponential with mean 1 s
HORIZON = 300.0  # seconds after which a turn is thought to be the last of its program
LONGEST = 3600.0  # seconds that a request may ask for
WEIGHT = 0.05  # of the newest value in a running mean


def best_ttl(gaps: Sequence[float], gain: float) -> float:
    """The t that makes ``F(t) * gain - t`` largest, in seconds; 0 where no t pays. ``gaps``: at
    least one, infinite for no return. O(n log n): between two gaps F stays and t only costs.

    >>> best_ttl([0.1, 0.2, 9.0, math.inf], gain=2.0)
    0.2
    """
    best, most = 0.0, 0.0
    for i, gap in enumerate(sorted(gaps), start=1):
        value = i / len(gaps) * gain - gap
        if value > most:
            best, most = gap, value
    return best


def prior_ttl(gain: float) -> float:
    """The same for gaps that are exponential with mean 1 s, where ``(1 - exp(-t)) * gain - t`` is
    largest at ``ln gain``."""
    return max(math.log(gain), 0.0) if gain > 0 else 0.0


class Learned:
    """What a server has seen of turns, and the time to live that follows from it."""

    def __init__(self) -> None:
        self._gaps: deque[float] = deque(maxlen=KEEP)
        self.wait = 0.0  # mean seconds in the queue
        self._rows = self._prefill = 0.0  # mean rows of a prompt, and seconds that it took

    def gap(self, seconds: float) -> None:
        """A turn came back after so long; infinite: it did not."""
        self._gaps.append(seconds)

    def served(self, *, wait: float, prefill: float, rows: int) -> None:
        """A request waited, and its prompt took so long for so many rows."""
        weight = WEIGHT if self._rows else 1.0
        self.wait += weight * (max(wait, 0.0) - self.wait)
        self._rows += weight * (max(rows, 1) - self._rows)
        self._prefill += weight * (max(prefill, 0.0) - self._prefill)

    @property
    def row(self) -> float:
        """Seconds for each row of a prompt, as it was felt. Of means, not the mean of ratios: one
        row takes a step, and so do hundreds."""
        return self._prefill / self._rows if self._rows else 0.0

    def ttl(self, context: int) -> float:
        """Seconds to keep a context of so many tokens."""
        gain = ETA * self.wait + self.row * context
        if len(self._gaps) < PRIOR_UNTIL:
            return prior_ttl(gain)
        return best_ttl(self._gaps, gain)
