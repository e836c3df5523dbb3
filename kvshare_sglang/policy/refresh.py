"""Which rows of copied KV to refresh while a request decodes. Pure."""

import numpy as np

from kvshare_sglang.policy.rows import dilated


def stale_mass(far: np.ndarray, paid: np.ndarray) -> float:
    """How much of what a new token reads is off: the sum of attention times deviation."""
    return float(paid @ far)


def rows_to_refresh(
    positions: np.ndarray, far: np.ndarray, paid: np.ndarray, *, above: float, count: int
) -> np.ndarray:
    """At most ``count`` of the stale rows, ascending; none while the stale mass is at most
    ``above``.

    ``far`` [n]: relative deviation of the rows at ``positions`` [n]; ``paid`` [n]: the attention
    that the newest token pays to them. O(n log n).
    """
    if stale_mass(far, paid) <= above:
        return np.empty(0, np.int64)
    return dilated(positions, far * paid, taken=np.empty(0, np.int64), count=count)
