"""What the fast code must equal: slow, plain, hard to get wrong."""

from collections.abc import Sequence


def window_minima(hashes: Sequence[int], window: int) -> list[int]:
    """Winnowing by its definition: where the minimum of any full window stands, ties included."""
    kept = set()
    for first in range(len(hashes) - window + 1):
        seen = hashes[first : first + window]
        kept |= {first + i for i, value in enumerate(seen) if value == min(seen)}
    return sorted(kept)


def edit_distance(a: Sequence[int], b: Sequence[int]) -> int:
    """Insertions, deletions and substitutions from ``a`` to ``b``, by the whole matrix."""
    cost = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i in range(len(a) + 1):
        for j in range(len(b) + 1):
            if i == 0 or j == 0:
                cost[i][j] = i + j
            else:
                swap = cost[i - 1][j - 1] + (a[i - 1] != b[j - 1])
                cost[i][j] = min(swap, cost[i - 1][j] + 1, cost[i][j - 1] + 1)
    return cost[-1][-1]


def script_cost(blocks: Sequence[tuple[int, int, int]], len_a: int, len_b: int) -> int:
    """Edits that an alignment leaves: each gap between two blocks costs its longer side."""
    cost = a = b = 0
    for src, dst, length in [*blocks, (len_a, len_b, 0)]:
        cost += max(src - a, dst - b)
        a, b = src + length, dst + length
    return cost


def covered(runs: Sequence[object]) -> set[int]:
    """Prompt positions that the runs cover; fails where two of them overlap."""
    positions = [p for run in runs for p in range(run.dst_start, run.dst_stop)]
    assert len(positions) == len(set(positions)), "runs overlap"
    return set(positions)
