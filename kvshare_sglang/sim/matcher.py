"""What a cache tells whoever finds text in it; the plug-in's own tree in that role. Pure.

A cache tells its matcher of each *segment*: tokens ``[start, stop)`` of a path, which follow a
parent segment. The cache later trims segments from their ends.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.plan import Run
from kvshare_sglang.radix_fuzzy.chunks import Bounds
from kvshare_sglang.radix_fuzzy.fingerprints import Tokens
from kvshare_sglang.radix_fuzzy.tree import FuzzyTree


class Piece(NamedTuple):
    """``[start, stop)`` of fresh text that is worth storing, and what it is remembered by."""

    start: int
    stop: int
    note: object = None


class Text(NamedTuple):
    """What was stored: ``path[start - root:]``, which follows segment ``parent``.

    ``path`` begins at ``root``; ``before`` is what was before it, where that is no path.
    """

    space: object
    path: Tokens
    root: int = 0
    start: int = 0
    parent: int | None = None
    depth: int = 0
    before: Tokens | None = None

    @property
    def fresh(self) -> Tokens:
        return self.path[self.start - self.root :]


class Matcher(Protocol):
    """What the model of a cache needs. Path positions count from the start of a sequence."""

    copies_tokens: bool  # whether it holds tokens of its own

    def insert(self, text: Text) -> int:
        """Learn of a text; the id of its segment."""

    def trim(self, segment: int, stop: int) -> None:
        """Forget a segment's positions from ``stop`` on."""

    def match(self, space: object, prompt: Tokens, *, start: int, max_depth: int) -> Sequence[Run]:
        """Ascending, disjoint runs in ``prompt[start:]``. Changes nothing."""

    def pieces(self, space: object, tokens: Tokens, *, depth: int) -> list[list[Piece]]:
        """What of fresh text to store, as stretches of neighbouring pieces."""

    def remember(self, note: object, segment: int) -> None:
        """A piece was stored as a segment."""


class KVShare:
    """The plug-in's own tree."""

    copies_tokens = True

    def __init__(self, config: KVShareConfig | None = None) -> None:
        self.tree = FuzzyTree()
        config = config or KVShareConfig()
        self._tolerance = config.edit_tolerance
        self._bounds = Bounds(config.chunk_min, config.chunk_target, config.chunk_max)

    def insert(self, text: Text) -> int:
        return self.tree.insert(
            text.space,
            text.fresh,
            start=text.start,
            parent=text.parent,
            depth=text.depth,
            before=text.before,
        ).id

    def trim(self, segment: int, stop: int) -> None:
        self.tree.trim(segment, stop)

    def match(self, space: object, prompt: Tokens, *, start: int, max_depth: int) -> Sequence[Run]:
        return self.tree.match(
            space, prompt, start=start, max_depth=max_depth, tolerance=self._tolerance
        )

    def pieces(self, space: object, tokens: Tokens, *, depth: int) -> list[list[Piece]]:
        stretches = self.tree.new_chunks(space, tokens, depth=depth, bounds=self._bounds)
        return [[Piece(c.start, c.stop, c) for c in chunks] for chunks in stretches]

    def remember(self, note: object, segment: int) -> None:
        self.tree.remember_chunk(note, self.tree.segment(segment))  # type: ignore[arg-type]
