"""Turn a match into what to copy and which rows to compute again. Pure.

The structural choice, contiguous rows only: edited and inserted text, a window behind each edit,
the seam of each run, the suffix; then longer heads up to the budget. Published measurements say
that contiguous rows behind an edit regain what lone rows chosen by deviation do not.
"""

from itertools import pairwise

from kvshare_sglang.radix_fuzzy.types import Join, Range, ReusePlan, Run, check_runs, complement

MIN_COPY = 32  # copying fewer tokens in a row than this costs more than it saves
MERGE_GAP = 16  # so few tokens are cheaper to compute than to skip


def plan_reuse(
    runs: tuple[Run, ...],
    *,
    prompt_len: int,
    prefix_len: int,
    budget: float,
    seam: int,
    window: int,
) -> ReusePlan:
    """Choose rows for ``runs``, which ascend and are disjoint in ``[prefix_len, prompt_len)``.

    ``budget`` is the share of reused tokens that is computed again. Where the heads (windows and
    seams) need more, they are trimmed in proportion, seams before windows; where they need less,
    every head grows in proportion to its run. A run behind the text that it was computed behind
    has no head. The last ``max(seam, 1)`` tokens of the prompt are always computed: they choose
    the next token. Raises ValueError on runs out of order.
    """
    check_runs(runs, start=prefix_len, stop=prompt_len)
    limit = prompt_len - max(seam, 1)
    useful = [run for run in runs if min(run.dst_stop, limit) - run.dst_start >= MIN_COPY]
    useful = [run for run in useful if run.length - _head(run, seam, window) >= MIN_COPY]
    while True:
        kept, copies = [], []
        for run, head in zip(useful, head_lengths(useful, budget, seam, window), strict=True):
            start, stop = run.dst_start + head, min(run.dst_stop, limit)
            if stop - start > MERGE_GAP:
                kept.append(run)
                copies.append(run.cut(start, stop))
        if len(kept) == len(useful):
            break
        useful = kept  # what is dropped takes its share of the budget with it
    compute = complement(
        [Range(c.dst_start, c.dst_stop) for c in copies], start=prefix_len, stop=prompt_len
    )
    return ReusePlan(prompt_len, prefix_len, tuple(kept), tuple(copies), tuple(compute))


def keep_before(plan: ReusePlan, stop: int) -> ReusePlan:
    """The plan without what it would copy from prompt position ``stop`` on: that is computed.

    >>> run = Run(1, 0, 10, 60)
    >>> plan = ReusePlan(100, 0, (run,), (run.cut(20, 70),), (Range(0, 20), Range(70, 100)))
    >>> keep_before(plan, 40).compute
    (Range(start=0, stop=20), Range(start=40, stop=100))
    """
    copies = [r.cut(r.dst_start, min(r.dst_stop, stop)) for r in plan.copies if r.dst_start < stop]
    # A run of which nothing is copied is no run: its text is computed like any other.
    runs = [
        r.cut(r.dst_start, min(r.dst_stop, stop))
        for r in plan.runs
        if any(r.dst_start <= c.dst_start < r.dst_stop for c in copies)
    ]
    compute = complement(
        [Range(c.dst_start, c.dst_stop) for c in copies],
        start=plan.prefix_len,
        stop=plan.prompt_len,
    )
    return plan._replace(runs=tuple(runs), copies=tuple(copies), compute=tuple(compute))


def thin_out(rows: list[list[Range]], *, limit: int) -> list[list[Range]]:
    """Merge ranges of the same request over the smallest gaps until at most ``limit`` are left.

    For attention backends whose buffers bound the number of rows. Never merges across requests,
    so the result has at least one range for each of them. O(n log n).

    >>> thin_out([[Range(0, 2), Range(9, 10), Range(12, 13)], [Range(5, 6)]], limit=3)
    [[Range(start=0, stop=2), Range(start=9, stop=13)], [Range(start=5, stop=6)]]
    """
    excess = sum(map(len, rows)) - limit
    gaps = sorted(
        (after.start - before.stop, i, before.stop)
        for i, ranges in enumerate(rows)
        for before, after in pairwise(ranges)
    )
    merged = {(i, stop) for _, i, stop in gaps[: max(excess, 0)]}
    out: list[list[Range]] = []
    for i, ranges in enumerate(rows):
        out.append([])
        for r in ranges:
            if out[i] and (i, out[i][-1].stop) in merged:
                out[i][-1] = Range(out[i][-1].start, r.stop)
            else:
                out[i].append(r)
    return out


def _head(run: Run, seam: int, window: int) -> int:
    """Rows that the start of a run needs; none where nothing before it has changed."""
    heads = {Join.SEAM: seam, Join.EDIT: max(window, seam), Join.SAME: 0}
    return min(run.length, heads[run.join])


def head_lengths(
    runs: list[Run], budget: float, seam: int, window: int, *, grow: bool = True
) -> list[int]:
    """How many tokens at the start of each run to compute again; see ``plan_reuse``.

    Without ``grow`` a head is never longer than its window or seam.
    """
    if budget >= 1:
        return [run.length for run in runs]
    total = sum(run.length for run in runs)
    allowed = int(budget * total)
    seams = [_head(run, seam, window) if run.join is Join.SEAM else 0 for run in runs]
    windows = [_head(run, seam, window) if run.join is Join.EDIT else 0 for run in runs]
    if sum(windows) > allowed:
        return _scale(windows, allowed)
    if sum(windows) + sum(seams) > allowed:
        return [w + s for w, s in zip(windows, _scale(seams, allowed - sum(windows)), strict=True)]
    spare = allowed - sum(windows) - sum(seams) if grow else 0
    grown = [0 if run.join is Join.SAME else run.length for run in runs]
    return [
        min(run.length, w + s + spare * grow // max(sum(grown), 1))
        for run, w, s, grow in zip(runs, windows, seams, grown, strict=True)
    ]


def _scale(lengths: list[int], allowed: int) -> list[int]:
    total = sum(lengths)
    return [length * allowed // total for length in lengths]
