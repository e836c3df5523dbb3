"""Random lives of a worker's fuzzy tree, told as the worker tells them."""

from typing import Any

from hypothesis import strategies as st
from strategies import random_tokens, texts

from kvshare_sglang import wire
from kvshare_sglang.radix_fuzzy.tree import FuzzyTree
from kvshare_sglang.runtime.stream import Feed, Table

SPACES = ((None, None, 0), ("a", None, 0), (None, "salt", 0))


class Told:
    """A tree with a feed; what was told of it goes through bytes, as on the wire."""

    def __init__(self, *, most: int = 1 << 16, secret: int = 7) -> None:
        self.tree = FuzzyTree(secret=secret)
        self.feed = Feed(self.tree, most=most)
        self.table = Table()
        self.table.apply(self.feed.whole())
        self.number = 0

    def insert(self, space: Any, tokens: Any, **more: Any) -> Any:
        extra_key, salt, weights = space
        return self.tree.insert(((extra_key, salt), weights), tokens, **more)

    def changes(self) -> list[wire.Changes]:
        """What was told since the last call, one message a change."""
        out = []
        if self.feed.lost:
            self._tell(self.feed.whole(), out)
        while not self.feed.changes.empty():
            self._tell(self.feed.changes.get(), out)
        return out

    def _tell(self, change: Any, out: list[wire.Changes]) -> None:
        self.number += 1
        events = self.table.apply(change)
        out.append(wire.decode(wire.encode(wire.Changes(1, self.number, events))))

    def snapshot(self, **config: Any) -> wire.Snapshot:
        segments = list(self.table.segments.values())
        told = wire.Snapshot(1, self.number, self.tree.secret, 1, config, segments)
        return wire.decode(wire.encode(told))


def live(told: Told, data: st.DataObject, steps: int) -> None:
    """Some inserts, trims and clears, as a cache makes them: leaves, from their ends."""
    tree = told.tree
    for _ in range(steps):
        alive = tree.segments()
        what = data.draw(st.sampled_from("iiiiiittc" if alive else "i"))
        if what == "c":
            tree.clear()
        elif what == "t":
            leaf = data.draw(st.sampled_from([s for s in alive if not s.children]))
            tree.trim(leaf.id, data.draw(st.integers(leaf.start, leaf.stop)))
        else:
            text = data.draw(texts())
            parent = data.draw(st.sampled_from([None, *alive]))
            if parent is None:
                space = data.draw(st.sampled_from(SPACES))
                start = data.draw(st.sampled_from((0, 0, 0, 40)))
                before = random_tokens(start, 80)[:start] if start else None
                depth = 1 if start else 0
                told.insert(space, text, start=start, depth=depth, before=before)
            else:
                told.tree.insert(
                    parent.namespace,
                    text,
                    start=data.draw(st.integers(parent.start + 1, parent.stop)),
                    parent=parent.id,
                    depth=parent.depth,
                )
