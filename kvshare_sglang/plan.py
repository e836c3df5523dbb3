"""Which rows of a prompt are copied and which run: the values every layer passes on. Pure.

Positions count tokens from the start of a prompt; ranges are half-open. ``Run`` is equal text,
``Rows`` a set of positions, ``ReusePlan`` what one request copies and what it computes::

    prompt  0........prefix_len...............................prompt_len
            | exact  |  fresh  |== run 1 ==|fresh|==== run 2 ====|fresh|
    rows               compute   compute,copy   ..   compute,copy  compute
"""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np


class Join(Enum):
    """How a run follows what is before it in the prompt."""

    SEAM = "seam"  # other text was before it in the cache
    EDIT = "edit"  # the same cached text continues after an edit
    ON = "on"  # as in the cache, the same text goes on here; an edit is further up
    SAME = "same"  # all that was before it in the cache is before it in the prompt


class Run(NamedTuple):
    """Equal tokens: cached ``[src_start, src_start + length)`` of ``source``'s path is
    prompt ``[dst_start, dst_start + length)``. Positions count from the start of a sequence."""

    source: int
    src_start: int
    dst_start: int
    length: int
    depth: int = 0
    join: Join = Join.SEAM

    @property
    def src_stop(self) -> int:
        return self.src_start + self.length

    @property
    def dst_stop(self) -> int:
        return self.dst_start + self.length

    @property
    def shift(self) -> int:
        """New position minus old position, in tokens: what K is rotated by."""
        return self.dst_start - self.src_start

    @property
    def depth_after(self) -> int:
        """Depth of text that is computed after the run. Depth counts reuse of *other* text: it
        rises at a seam. Behind an edit of its own text a run is inexact, and stays as deep as it
        was; behind the very text that it was computed after it is no reuse at all."""
        if self.join is Join.SEAM:
            return self.depth + 1
        return self.depth if self.join is Join.SAME else max(self.depth, 1)

    def cut(self, start: int, stop: int) -> "Run":
        """The part of the run that covers prompt ``[start, stop)``."""
        if not self.dst_start <= start <= stop <= self.dst_stop:
            raise ValueError(
                f"cut [{start}, {stop}) is outside run [{self.dst_start}, {self.dst_stop})"
            )
        return self._replace(
            src_start=self.src_start + start - self.dst_start,
            dst_start=start,
            length=stop - start,
        )


class Range(NamedTuple):
    """Half-open ``[start, stop)`` of positions."""

    start: int
    stop: int

    @property
    def num(self) -> int:
        """How many positions; ``len`` is the tuple's."""
        return self.stop - self.start


class Rows:
    """A set of prompt positions, seen as ``ranges`` or as ``positions``. Never changes.

    Ranges that touch become one, so equal sets are equal values.

    >>> rows = Rows([(0, 2), (2, 4), (8, 9)])
    >>> rows.ranges
    (Range(start=0, stop=4), Range(start=8, stop=9))
    >>> rows.positions.tolist()
    [0, 1, 2, 3, 8]
    """

    __slots__ = ("__dict__", "_starts", "_stops")

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        """From ranges that ascend, are disjoint and not empty; ValueError otherwise."""
        pairs = np.array(list(ranges), np.int64).reshape(-1, 2)
        starts, stops = pairs[:, 0], pairs[:, 1]
        if (starts >= stops).any() or (starts[1:] < stops[:-1]).any():
            raise ValueError(f"ranges must ascend, be disjoint and not empty, got {pairs.tolist()}")
        self._set(starts, stops)

    def _set(self, starts: np.ndarray, stops: np.ndarray, apart: np.ndarray | None = None) -> None:
        """``apart`` [n - 1]: which gaps stay; by default those that are not empty."""
        if apart is None:
            apart = starts[1:] > stops[:-1]
        self._starts = np.concatenate([starts[:1], starts[1:][apart]])
        self._stops = np.concatenate([stops[:-1][apart], stops[-1:]])

    @classmethod
    def _of(cls, starts: np.ndarray, stops: np.ndarray, apart: np.ndarray | None = None) -> "Rows":
        rows = cls.__new__(cls)
        rows._set(starts, stops, apart)
        return rows

    @classmethod
    def at(cls, positions: np.ndarray) -> "Rows":
        """From positions [n] that ascend, int64; ValueError otherwise.

        >>> Rows.at(np.array([3, 4, 5, 9])).ranges
        (Range(start=3, stop=6), Range(start=9, stop=10))
        """
        positions = np.asarray(positions, np.int64)
        if (np.diff(positions) <= 0).any():
            raise ValueError(f"positions must ascend, got {positions[:20].tolist()}")
        return cls._of(positions, positions + 1)

    @classmethod
    def where(cls, mask: np.ndarray) -> "Rows":
        """The positions at which ``mask`` [n], bool, is true."""
        edges = np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8))
        return cls._of(np.flatnonzero(edges == 1), np.flatnonzero(edges == -1))

    @classmethod
    def of_runs(cls, runs: Iterable[Run]) -> "Rows":
        """Prompt positions of runs that ascend and are disjoint."""
        return cls((run.dst_start, run.dst_stop) for run in runs)

    @cached_property
    def ranges(self) -> tuple[Range, ...]:
        return tuple(map(Range, self._starts.tolist(), self._stops.tolist()))

    @cached_property
    def positions(self) -> np.ndarray:
        """Ascending, int64 [num]. Not to be written."""
        lengths = self._stops - self._starts
        first = np.cumsum(lengths) - lengths
        return np.repeat(self._starts - first, lengths) + np.arange(lengths.sum())

    @cached_property
    def num(self) -> int:
        """How many positions."""
        return int((self._stops - self._starts).sum())

    @property
    def num_ranges(self) -> int:
        return len(self._starts)

    @property
    def start(self) -> int:
        """The first position."""
        return int(self._starts[0])

    @property
    def stop(self) -> int:
        """One past the last position; 0 without any."""
        return int(self._stops[-1]) if len(self._stops) else 0

    def mask(self, length: int) -> np.ndarray:
        """bool [length]: which of the first ``length`` positions are in the set."""
        out = np.zeros(length, bool)
        out[self.clip(0, length).positions] = True
        return out

    def clip(self, start: int, stop: int) -> "Rows":
        """Those in ``[start, stop)``."""
        starts, stops = np.maximum(self._starts, start), np.minimum(self._stops, stop)
        inside = starts < stops
        return Rows._of(starts[inside], stops[inside])

    def complement(self, start: int, stop: int) -> "Rows":
        """The positions of ``[start, stop)`` that are not in the set.

        >>> Rows([(2, 4)]).complement(0, 6).ranges
        (Range(start=0, stop=2), Range(start=4, stop=6))
        """
        held = self.clip(start, stop)
        starts = np.concatenate([[start], held._stops])
        stops = np.concatenate([held._starts, [stop]])
        gap = starts < stops
        return Rows._of(starts[gap], stops[gap])

    def places_in(self, rows: "Rows") -> np.ndarray:
        """Where each position is among those of ``rows``; int64 [num]. Raises ValueError where
        one is missing."""
        places = np.searchsorted(rows.positions, self.positions)
        if self.num and (
            places[-1] >= rows.num or (rows.positions[places] != self.positions).any()
        ):
            raise ValueError(f"{(self - rows).ranges[0]} is not among the rows that are there")
        return places

    def __or__(self, other: "Rows") -> "Rows":
        length = max(self.stop, other.stop)
        return Rows.where(self.mask(length) | other.mask(length))

    def __sub__(self, other: "Rows") -> "Rows":
        return Rows.where(self.mask(self.stop) & ~other.mask(self.stop))

    def __bool__(self) -> bool:
        return bool(len(self._starts))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Rows)
            and np.array_equal(self._starts, other._starts)
            and np.array_equal(self._stops, other._stops)
        )

    def __hash__(self) -> int:
        return hash(self.ranges)

    def __repr__(self) -> str:
        return f"Rows({[tuple(r) for r in self.ranges]})"


def merge_ranges(rows: Sequence[Rows], *, limit: int) -> list[Rows]:
    """Merge ranges of the same request over the smallest gaps until at most ``limit`` are left.

    For attention backends whose buffers bound the number of ranges. Never merges across requests,
    so each keeps at least one. O(n log n).

    >>> merge_ranges([Rows([(0, 2), (9, 10), (12, 13)]), Rows([(5, 6)])], limit=3)
    [Rows([(0, 2), (9, 13)]), Rows([(5, 6)])]
    """
    excess = sum(one.num_ranges for one in rows) - limit
    if excess <= 0:
        return list(rows)
    gaps = sorted(
        (after.start - before.stop, i, before.stop)
        for i, one in enumerate(rows)
        for before, after in pairwise(one.ranges)
    )
    merged = {(i, stop) for _, i, stop in gaps[:excess]}
    return [
        Rows._of(
            one._starts,
            one._stops,
            np.array([(i, r.stop) not in merged for r in one.ranges[:-1]], bool),
        )
        for i, one in enumerate(rows)
    ]


class Blend(NamedTuple):
    """The part of a prefix hit that is not exact: it was blended for an earlier request.

    ``start``: where it begins, the end of the exact part. ``open``: its rows that were copied and
    never computed again. ``depth``: of text that is computed after it.
    """

    start: int
    open: Rows
    depth: int


class Rest(NamedTuple):
    """Text that was computed over copies which ran again only after it: no copy may be left in
    front of it, and it is not exact all the same, nor less deep. ``start``: where it begins.
    ``runs``: those that were copied then, as deep as they count."""

    start: int
    runs: tuple[Run, ...]


def check_runs(runs: Sequence[Run], *, start: int, stop: int) -> None:
    """Raise ValueError unless the runs ascend, are disjoint and lie in ``[start, stop)``."""
    end = start
    for run in runs:
        if run.length <= 0 or run.src_start < 0 or run.dst_start < end or run.dst_stop > stop:
            raise ValueError(f"{run} must be non-empty and lie in [{end}, {stop})")
        end = run.dst_stop


@dataclass(frozen=True)
class ReusePlan:
    """What one request copies; all else of ``[prefix_len, prompt_len)`` is computed.

    ``runs`` are the accepted runs, ``copies`` what of them is copied: at least something of each.
    ``blend``: what of the prefix hit is not exact, None where all of it is. ``rest``: from where
    on text rests on copies that are none any more. Raises ValueError where that does not hold.
    """

    prompt_len: int
    prefix_len: int
    runs: tuple[Run, ...]
    copies: tuple[Run, ...]
    blend: Blend | None = None
    rest: Rest | None = None

    def __post_init__(self) -> None:
        check_runs(self.runs, start=self.prefix_len, stop=self.prompt_len)
        check_runs(self.copies, start=self.prefix_len, stop=self.prompt_len)
        if self.blend and not self.blend.start < self.prefix_len:
            raise ValueError(f"{self.blend} is not in the prefix hit of {self.prefix_len}")
        if self.blend and (self.blend.open - Rows([(self.blend.start, self.prefix_len)])):
            raise ValueError(f"{self.blend.open} lies outside the blended part of the prefix hit")
        at, used = 0, -1
        for copy in self.copies:
            while at < len(self.runs) and self.runs[at].dst_stop <= copy.dst_start:
                at += 1
            if at == len(self.runs) or self.runs[at].dst_start > copy.dst_start:
                raise ValueError(f"{copy} is of no run of the plan")
            if self.runs[at].cut(copy.dst_start, copy.dst_stop) != copy:
                raise ValueError(f"{copy} is no part of {self.runs[at]}")
            if at > used + 1:
                raise ValueError(f"nothing is copied of {self.runs[used + 1]}")
            used = at
        if used + 1 < len(self.runs):
            raise ValueError(f"nothing is copied of {self.runs[used + 1]}")

    @classmethod
    def computing(
        cls,
        rows: Rows,
        *,
        prompt_len: int,
        prefix_len: int,
        runs: Sequence[Run],
        blend: Blend | None = None,
    ) -> "ReusePlan":
        """The plan that computes ``rows`` and copies all else, which must be in ``runs``; runs of
        which nothing is copied go. O(runs + ranges): a trace leaves thousands of gaps."""
        kept: list[Run] = []
        copies: list[Run] = []
        left = rows.complement(prefix_len, prompt_len)
        gaps = left.ranges
        at = 0  # the first gap that reaches past the start of the run
        for run in runs:
            before = len(copies)
            while at < len(gaps) and gaps[at].start < run.dst_stop:
                start, stop = max(gaps[at].start, run.dst_start), min(gaps[at].stop, run.dst_stop)
                if start < stop:
                    copies.append(run.cut(start, stop))
                if gaps[at].stop > run.dst_stop:
                    break  # the rest of the gap may lie in the next run
                at += 1
            if len(copies) > before:
                kept.append(run)
        if sum(copy.length for copy in copies) != left.num:
            lost = left - Rows.of_runs(copies)
            raise ValueError(f"{lost.ranges[0]} is neither computed nor part of a run")
        return cls(prompt_len, prefix_len, tuple(kept), tuple(copies), blend)

    @cached_property
    def compute(self) -> Rows:
        """The rows that run: new text and what of the runs is not copied."""
        return Rows.of_runs(self.copies).complement(self.prefix_len, self.prompt_len)

    @cached_property
    def reused_rows(self) -> Rows:
        """The rows of all runs, copied or computed again."""
        return Rows.of_runs(self.runs)

    @cached_property
    def fresh_rows(self) -> Rows:
        """The rows of new text."""
        return self.reused_rows.complement(self.prefix_len, self.prompt_len)

    @property
    def reused(self) -> int:
        return sum(run.length for run in self.runs)

    @property
    def copied(self) -> int:
        return sum(run.length for run in self.copies)

    @property
    def recomputed(self) -> int:
        """Tokens of the runs that are computed again."""
        return self.reused - self.copied

    @property
    def computed(self) -> int:
        """Rows to run, new text included."""
        return self.prompt_len - self.prefix_len - self.copied

    @property
    def exact_len(self) -> int:
        """Length of the exact part: nothing after the first row that was copied, here or for the
        prefix hit, is exact, nor what was computed over a copy before that ran again."""
        if self.blend:
            return self.blend.start
        copied = self.copies[0].dst_start if self.copies else self.prompt_len
        return min(copied, self.rest.start) if self.rest else copied

    @property
    def inexact(self) -> bool:
        """Whether any of the prompt's KV was copied, here or for the prefix hit, or rests on it."""
        return bool(self.copies) or self.blend is not None or self.rest is not None

    @cached_property
    def open(self) -> Rows:
        """The rows whose KV is a copy, those of the prefix hit included."""
        copied = Rows.of_runs(self.copies)
        return copied | self.blend.open if self.blend else copied

    @property
    def depth(self) -> int:
        """Largest depth among the copies and the prefix hit; 0 without."""
        hit = self.blend.depth if self.blend else 0
        return max([hit, *(run.depth for run in self.copies)])

    def recompute(
        self, rows: Rows, *, early: Rows | None = None, carried: Rows | None = None
    ) -> "ReusePlan":
        """The plan that runs ``rows``, all new text among them, and copies all else of its runs.
        Rows of the prefix hit that run are open no more. Of ``rows`` some ran while every copy was
        still one, and not again from the bottom since: ``early`` in all layers, ``carried`` in the
        lower ones."""
        blend = self.blend and self.blend._replace(open=self.blend.open - rows)
        plan = self._with(rows.clip(self.prefix_len, self.prompt_len), self.runs, blend)
        if not self.runs:
            return plan
        behind = [
            (part or Rows()).clip(self.runs[0].dst_start, self.prompt_len)
            for part in (early, carried)
        ]
        first = behind[0] | behind[1]
        if not first:
            return plan
        start = first.ranges[0].start
        if start >= plan.exact_len and plan.runs == self.runs:  # its copies tell as much
            return plan
        # What only began over copies counts as reused once, whatever these were.
        gone = self.runs if behind[0] else tuple(run._replace(depth=0) for run in self.runs)
        return dataclasses.replace(plan, rest=Rest(start, gone))

    def behind(self, blend: Blend | None) -> "ReusePlan":
        """The same plan, behind a prefix hit of which ``blend`` is not exact."""
        return dataclasses.replace(self, blend=blend)

    def nothing(self) -> "ReusePlan":
        """The plan that copies nothing."""
        return dataclasses.replace(self, runs=(), copies=())

    def _with(self, rows: Rows, runs: Sequence[Run], blend: Blend | None) -> "ReusePlan":
        plan = ReusePlan.computing(
            rows, prompt_len=self.prompt_len, prefix_len=self.prefix_len, runs=runs, blend=blend
        )
        return dataclasses.replace(plan, rest=self.rest) if self.rest else plan

    def stop_at(self, stop: int) -> "ReusePlan":
        """The plan that copies nothing from prompt position ``stop`` on: all there is new text."""
        runs = [
            run.cut(run.dst_start, min(run.dst_stop, stop))
            for run in self.runs
            if run.dst_start < stop
        ]
        rows = self.compute.clip(0, stop) | Rows(
            [(stop, self.prompt_len)][: stop < self.prompt_len]
        )
        return self._with(rows, runs, self.blend)

    def without(self, dropped: Iterable[Run]) -> "ReusePlan":
        """The plan without some of its runs: their text is computed like new text."""
        gone = set(dropped)
        return ReusePlan(
            self.prompt_len,
            self.prefix_len,
            tuple(run for run in self.runs if run not in gone),
            tuple(
                copy
                for copy in self.copies
                if not any(run.dst_start <= copy.dst_start < run.dst_stop for run in gone)
            ),
            self.blend,
            self.rest,
        )
