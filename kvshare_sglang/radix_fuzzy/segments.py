"""Segments: the edges of the fuzzy tree, and reading along their paths. Pure.

A *segment* is tokens that were inserted at once, standing at absolute positions ``[start, start +
len)`` of a sequence and hanging on a parent segment (or on nothing). The *path* of a segment is
the sequence from its root to its end. A segment only ever shrinks from its end.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from kvshare_sglang.plan import Run
from kvshare_sglang.radix_fuzzy.fingerprints import Tokens


@dataclass(slots=True, eq=False)
class Segment:
    """One edge. ``tokens`` holds what is alive; ``stop`` is its end in path positions."""

    id: int
    namespace: object
    tokens: Tokens
    start: int
    parent: "Segment | None"
    depth: int
    payload: Any
    root_start: int  # where the path begins
    context: int = 0  # hash of the tokens that stood before the path; 0: not told
    near: int = 0  # the same of the last few of them
    pins: Counter[int] = field(default_factory=Counter)  # stop of a pinned stretch -> how often
    # By where they hang and their first token; the newest of several.
    children: "dict[tuple[int, int], Segment]" = field(default_factory=dict)

    @property
    def stop(self) -> int:
        return self.start + len(self.tokens)


class Piece(NamedTuple):
    """Path positions ``[start, stop)``, which one segment holds."""

    segment: Segment
    start: int
    stop: int


def owner(seg: Segment, position: int) -> Segment:
    """The segment that holds a path position of ``seg``; ValueError before the path's start."""
    while position < seg.start:
        if seg.parent is None:
            raise ValueError(f"position {position} is before the path's start {seg.start}")
        seg = seg.parent
    return seg


def upwards(seg: Segment, stop: int) -> Iterator[Piece]:
    """Pieces of the path that end at ``stop``, from the last to the first."""
    node: Segment | None = seg
    while node is not None:
        if node.start < stop:
            yield Piece(node, node.start, stop)
            stop = node.start
        node = node.parent


def pieces(seg: Segment, start: int, stop: int) -> list[Piece]:
    """The segments that hold path positions ``[start, stop)``, in path order."""
    out: list[Piece] = []
    for node, a, b in upwards(seg, stop):
        out.append(Piece(node, max(a, start), b))
        if a <= start:
            break
    out.reverse()
    return out


def path_tokens(seg: Segment, start: int, stop: int) -> Tokens:
    """Tokens at path positions ``[start, stop)`` of ``seg``."""
    if seg.start <= start:
        return seg.tokens[start - seg.start : stop - seg.start]
    parts = [
        node.tokens[a - node.start : b - node.start] for node, a, b in pieces(seg, start, stop)
    ]
    return np.concatenate(parts) if parts else np.empty(0, np.int32)


def extend(seg: Segment, src: int, prompt: Tokens, at: int, floor: int) -> Run:
    """The longest run through path position ``src`` and prompt position ``at``.

    To the left it ends at ``floor`` (``<= at``) at the latest; to the right it continues into
    the segments that follow the path. Expected O(length).
    """
    dst = at
    node = seg
    for node, a, b in pieces(seg, src, seg.stop):
        length = common_prefix(node.tokens[a - node.start : b - node.start], prompt[dst:])
        dst += length
        if length < b - a:
            break
    while dst < len(prompt):
        child = node.children.get((src + dst - at, int(prompt[dst])))
        if child is None:
            break
        seg = node = child
        dst += common_prefix(child.tokens, prompt[dst:])
    first = at
    for node, a, b in upwards(seg, src):
        lo = max(b - (first - floor), a)
        cached, fresh = node.tokens[lo - node.start : b - node.start], prompt[floor:first]
        length = common_prefix(cached[::-1], fresh[::-1])
        first -= length
        if length < b - a:
            break
    return Run(seg.id, src - (at - first), first, dst - first, seg.depth)


def same_path(a: Segment, b: Segment, position: int) -> bool:
    """Whether the path of ``b`` runs through what ``a``'s path holds at ``position``."""
    if a is b:
        return True
    return position >= b.root_start and owner(a, position) is owner(b, position)


def common_prefix(a: Tokens, b: Tokens) -> int:
    """Length of the longest common prefix. O(that), whatever else there is to compare.

    >>> common_prefix(np.array([1, 2, 3]), np.array([1, 2, 4, 5]))
    2
    """
    size = min(len(a), len(b))
    done, step = 0, 64
    while done < size:
        differ = a[done : min(done + step, size)] != b[done : min(done + step, size)]
        first = int(differ.argmax())
        if differ[first]:
            return done + first
        done, step = done + len(differ), 4 * step
    return size
