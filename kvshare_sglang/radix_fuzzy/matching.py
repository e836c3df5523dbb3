"""From places of a prompt's grams in the cache to runs: choose sources, align edits. Pure.

From left to right, each place of a gram is extended both ways, and the run that saves most rows is
taken. Gaps between two runs of one cached text are then aligned by edit distance. A run saves its
tokens; a change of source costs a seam, and so does each level of depth. Ties go to the source with
the longest shared left context, whose KV is closest.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvshare_sglang.plan import Join, Run
from kvshare_sglang.radix_fuzzy.align import MAX_GAP, align
from kvshare_sglang.radix_fuzzy.fingerprints import GRAM, SPAN, Tokens
from kvshare_sglang.radix_fuzzy.segments import Segment, extend, path_tokens, same_path

SEAM_COST = 16  # rows: what a change of source costs
LOOK_BACK = 64  # tokens before a run that are compared with what stood before its source
DRIFT = 64  # tokens that an edit may insert or delete, for its text to be looked for at once
FEW = 24  # tokens: runs that gain fewer count as next to nothing
MAX_STRIDE = 256  # tokens that are skipped at most, and the length of a run that ends skipping
MIN_BLOCK = 4  # tokens: shorter equal stretches between edits are chance


class Hits(NamedTuple):
    """Places of grams: prompt positions, ascending; segment ids; path positions. [n] each."""

    at: npt.NDArray[np.int64]
    homes: npt.NDArray[np.int64]
    src: npt.NDArray[np.int64]


def find_runs(
    prompt: Tokens,
    hits: Hits,
    segments: Mapping[int, Segment],
    *,
    start: int,
    tolerance: float,
) -> tuple[Run, ...]:
    """Ascending, disjoint runs in ``prompt[start:]``."""
    runs = link(anchors(prompt, hits, segments, start=start), prompt, segments, tolerance)
    if runs and continues_from_prefix(runs[0], prompt, segments, start):
        runs = (runs[0]._replace(join=Join.EDIT), *runs[1:])
    return runs


def anchors(
    prompt: Tokens, hits: Hits, segments: Mapping[int, Segment], *, start: int
) -> list[Run]:
    """The best run through each hit that no run before it covers.

    Hits that lead to next to nothing are few in ordinary text, and text made of them must not hold
    up the scheduler: after ``64 + n / 32`` of them the next hits are looked at in strides that
    double up to ``MAX_STRIDE`` tokens, until one leads to a long run. What was skipped in front of
    it is found by extending it to the left.
    """
    runs: list[Run] = []
    patience, stride = 64 + len(prompt) // 32, 0
    end, i = start, 0
    while i < len(hits.at):
        at = int(hits.at[i])
        if at + GRAM <= end:
            i = int(np.searchsorted(hits.at, end - GRAM, side="right"))
            continue
        places = []
        while i < len(hits.at) and hits.at[i] == at:
            places.append((segments[int(hits.homes[i])], int(hits.src[i])))
            i += 1
        last = runs[-1] if runs else None
        if last is not None:
            places += _ahead(segments[last.source], last, prompt, at)
        floor = min(at, max(end - LOOK_BACK, 0))
        found = [extend(seg, src, prompt, at, floor) for seg, src in places]
        found = [run for run in found if run.length >= SPAN and run.dst_stop - end >= GRAM]
        best = max(found, key=lambda run: _saved(run, end, last, segments), default=None)
        gain = 0 if best is None else best.dst_stop - max(end, best.dst_start)
        if gain < FEW and not (best and last and _continues_after_edit(last, best, segments)):
            patience -= 1
            if patience < 0:
                stride = min(max(2 * stride, SPAN), MAX_STRIDE)
                i = int(np.searchsorted(hits.at, max(at, end) + stride))
        elif gain >= MAX_STRIDE:
            patience, stride = patience + gain // 32, 0
        if best is None:
            continue
        while runs and best.dst_start <= runs[-1].dst_start:
            runs.pop()  # all of it is in the new one, too
        floor = runs[-1].dst_stop if runs else start
        runs.append(best.cut(max(best.dst_start, floor), best.dst_stop))
        end = best.dst_stop
    return runs


def _continues_after_edit(last: Run, run: Run, segments: Mapping[int, Segment]) -> bool:
    """Whether ``run`` continues the source of ``last`` after an edit."""
    return 0 <= run.src_start - last.src_stop <= MAX_GAP and continues(last, run, segments)


def _ahead(seg: Segment, last: Run, prompt: Tokens, at: int) -> list[tuple[Segment, int]]:
    """The next place of the gram at ``at`` in the cached text of the last run."""
    gap = at - last.dst_stop
    if not 0 <= gap <= MAX_GAP:
        return []
    lo = last.src_stop
    cached = path_tokens(seg, lo, min(lo + gap + DRIFT + GRAM, seg.stop))
    offset = find(cached, prompt[at : at + GRAM])
    return [(seg, lo + offset)] if offset >= 0 else []


def _saved(
    run: Run, end: int, last: Run | None, segments: Mapping[int, Segment]
) -> tuple[float, bool]:
    """Rows saved by a run of which ``end`` and later counts; ties go to an unmoved source."""
    before = max(end - run.dst_start, 0)
    worth = run.length - before - SEAM_COST * run.depth + before / LOOK_BACK
    if last is None or last.shift != run.shift or last.dst_stop < run.dst_start:
        return worth, run.shift == 0
    if continues(last, run, segments):
        worth += SEAM_COST  # no seam: it continues
    return worth, run.shift == 0


def continues(before: Run, after: Run, segments: Mapping[int, Segment]) -> bool:
    """Whether ``after`` is in the cached text of ``before``."""
    a, b = segments[before.source], segments[after.source]
    return same_path(a, b, before.src_stop - 1)


def continues_from_prefix(
    run: Run, prompt: Tokens, segments: Mapping[int, Segment], start: int
) -> bool:
    """Whether the run continues, after an edit, the text that the prompt has before ``start``.

    The exact prefix may reach a few tokens into the edit, where that begins as the text does. Where
    there is no prefix to speak of, a short front was replaced by another one.
    """
    if run.src_start == run.dst_start == start:
        return False  # the same text continues: the prefix ended at the border of a page
    same = min(start, run.src_start)
    looked_at = min(same, LOOK_BACK)
    if looked_at < SPAN:
        return max(run.src_start, run.dst_start) <= DRIFT
    if start - same > DRIFT or run.src_start - same > MAX_GAP:
        return False
    cached = path_tokens(segments[run.source], same - looked_at, same)
    return np.array_equal(cached, prompt[same - looked_at : same])


def link(
    runs: Sequence[Run], prompt: Tokens, segments: Mapping[int, Segment], tolerance: float
) -> tuple[Run, ...]:
    """Join runs that go on in one cached text, and align the short gaps between them."""
    out: list[Run] = []
    for run in runs:
        before = out[-1] if out else None
        if (
            before is None
            or before.src_stop > run.src_start
            or not continues(before, run, segments)
        ):
            out.append(run)
            continue
        src_gap = run.src_start - before.src_stop
        dst_gap = run.dst_start - before.dst_stop
        if src_gap == dst_gap == 0:
            out[-1] = run._replace(
                src_start=before.src_start,
                dst_start=before.dst_start,
                length=before.length + run.length,
                join=before.join,
            )
            continue
        if src_gap > MAX_GAP:
            out.append(run)  # far on in the same text: what stood before it is gone
            continue
        if min(src_gap, dst_gap) >= MIN_BLOCK:
            cached = path_tokens(segments[run.source], before.src_stop, run.src_start).tolist()
            fresh = prompt[before.dst_stop : run.dst_start].tolist()
            for block in align(cached, fresh, tolerance=tolerance, min_block=MIN_BLOCK) or ():
                out.append(
                    run._replace(
                        src_start=before.src_stop + block.src,
                        dst_start=before.dst_stop + block.dst,
                        length=block.length,
                        join=Join.EDIT,
                    )
                )
        out.append(run._replace(join=Join.EDIT))
    return tuple(out)


def find(text: Tokens, part: Tokens) -> int:
    """The first place of ``part`` in ``text``, or -1.

    >>> find(np.array([1, 2, 3, 2, 3, 4], np.int32), np.array([2, 3, 4], np.int32))
    3
    """
    text_bytes, part_bytes = text.tobytes(), part.tobytes()
    width = text.itemsize
    at = text_bytes.find(part_bytes)
    while at % width and at >= 0:  # bytes of two tokens
        at = text_bytes.find(part_bytes, at + 1)
    return at // width if at >= 0 else -1
