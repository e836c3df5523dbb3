"""The words every layer speaks: runs, matches and plans. Pure: integers in, integers out."""

from enum import Enum
from typing import NamedTuple


class Join(Enum):
    """How a run hangs on what stands before it in the prompt."""

    SEAM = "seam"  # other text stood before it in the cache
    EDIT = "edit"  # the same cached text goes on behind an edit
    SAME = "same"  # all that stood before it in the cache stands before it in the prompt


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
    def depth_behind(self) -> int:
        """Depth of text that is computed behind the run. Behind the very text that it was
        computed behind, the run is no new reuse."""
        return self.depth if self.join is Join.SAME else self.depth + 1

    def cut(self, start: int, stop: int) -> "Run":
        """The part of the run that stands at prompt ``[start, stop)``."""
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
    """Half-open ``[start, stop)`` of prompt positions."""

    start: int
    stop: int

    @property
    def num(self) -> int:
        """How many positions; ``len`` is the tuple's."""
        return self.stop - self.start


class ReusePlan(NamedTuple):
    """What one request copies and what it computes, in prompt positions.

    ``runs`` are the accepted runs, ``copies`` what of them is copied; ``copies`` and ``compute``
    partition ``[prefix_len, prompt_len)``.
    """

    prompt_len: int
    prefix_len: int
    runs: tuple[Run, ...]
    copies: tuple[Run, ...]
    compute: tuple[Range, ...]

    @property
    def reused(self) -> int:
        """Tokens of the accepted runs, copied or computed again."""
        return sum(run.length for run in self.runs)

    @property
    def recomputed(self) -> int:
        """Tokens of the accepted runs that are computed again."""
        return self.reused - self.copied

    @property
    def computed(self) -> int:
        """Rows to run, fresh text included."""
        return sum(r.num for r in self.compute)

    @property
    def copied(self) -> int:
        return sum(run.length for run in self.copies)

    @property
    def exact_len(self) -> int:
        """Length of the exact part: nothing behind the first copied row is exact."""
        return self.copies[0].dst_start if self.copies else self.prompt_len

    @property
    def depth(self) -> int:
        """Largest depth among the copies; 0 without copies."""
        return max((run.depth for run in self.copies), default=0)


def check_runs(runs: tuple[Run, ...], *, start: int, stop: int) -> None:
    """Raise ValueError unless the runs ascend, are disjoint and lie in ``[start, stop)``."""
    end = start
    for run in runs:
        if run.length <= 0 or run.src_start < 0 or run.dst_start < end or run.dst_stop > stop:
            raise ValueError(f"{run} must be non-empty and lie in [{end}, {stop})")
        end = run.dst_stop


def complement(ranges: list[Range], *, start: int, stop: int) -> list[Range]:
    """What of ``[start, stop)`` the ascending, disjoint ``ranges`` leave out.

    >>> complement([Range(2, 4)], start=0, stop=6)
    [Range(start=0, stop=2), Range(start=4, stop=6)]
    """
    out: list[Range] = []
    for a, b in ranges:
        if a > start:
            out.append(Range(start, a))
        start = max(start, b)
    if start < stop:
        out.append(Range(start, stop))
    return out


def clip(ranges: tuple[Range, ...], *, start: int, stop: int) -> list[Range]:
    """The parts of ``ranges`` that lie in ``[start, stop)``."""
    cut = (Range(max(a, start), min(b, stop)) for a, b in ranges)
    return [r for r in cut if r.start < r.stop]
