"""Count what of the found text is worth reusing. Pure; one definition for every matcher.

A run costs its head: the window behind an edit, or the seam where other text stood before it. Of
what is left, stretches of ``MERGE_GAP`` tokens or fewer are computed with their neighbours, and
those under ``MIN_RUN`` tokens are dropped.
"""

from collections.abc import Sequence

from kvshare_sglang.radix_fuzzy.types import Join, Run

SEAM = 16
WINDOW = 32
MERGE_GAP = 16
MIN_RUN = 32


def useful(runs: Sequence[Run], *, stop: int) -> list[Run]:
    """The useful part of each run that has one, up to prompt position ``stop``.

    ``runs`` ascend and are disjoint. O(len(runs)).

    >>> useful([Run(1, 0, 10, 60), Run(1, 80, 71, 70, join=Join.EDIT)], stop=1000)[1].dst_start
    103
    """
    out: list[Run] = []
    for run in runs:
        start = run.dst_start + (WINDOW if run.join is Join.EDIT else SEAM)
        end = min(run.dst_stop, stop)
        if end - start >= max(MIN_RUN, MERGE_GAP + 1):
            out.append(run.cut(start, end))
    return out


def useful_by_definition(runs: Sequence[Run], *, stop: int) -> set[int]:
    """The same, position by position: slow, plain, hard to get wrong."""
    computed = set(range(stop))
    for run in runs:
        head = WINDOW if run.join is Join.EDIT else SEAM
        computed -= set(range(run.dst_start + head, run.dst_stop))
    for least in (MERGE_GAP + 1, MIN_RUN):  # merge the gaps between computed rows; drop the short
        stretch: list[int] = []
        for position in range(stop + 1):
            if position < stop and position not in computed:
                stretch.append(position)
                continue
            if len(stretch) < least:
                computed.update(stretch)
            stretch = []
    return set(range(stop)) - computed
