"""A cache's life without a server: what requests find, what they evict, what they leave. Pure.

Requests are served one at a time and answer nothing: what they would generate is not cached. As in
the plug-in, a request that reuses leaves its exact part in the tree and its fresh text in branches
of their own, one level deeper than what it reused; copies are left to their sources.
"""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.plan import Join, Range, ReusePlan, Run
from kvshare_sglang.policy.admit import pays
from kvshare_sglang.policy.retain import Stretch, fresh_stretches, page_borders
from kvshare_sglang.radix_fuzzy.fingerprints import SPAN, Tokens
from kvshare_sglang.sim.matcher import Matcher, Text
from kvshare_sglang.sim.radix import Node, Policy, RadixTree, lru
from kvshare_sglang.sim.useful import useful

ANY_DEPTH = 32_000
EDIT_GAP = 512  # cached text that continues so soon continues after an edit


class Served(NamedTuple):
    """One request: its exact prefix, the runs found after it and what of them is useful."""

    prompt_len: int
    prefix_len: int
    runs: list[Run]
    useful: list[Run]
    lookup_s: float
    insert_s: float
    inserted: int  # tokens
    unequal: int  # mapped tokens that differ in source and destination, or whose source is gone
    going: tuple[Range, ...] = ()  # of the prompt, where cached text goes on, and new text after it

    @property
    def found(self) -> int:
        return sum(run.length for run in self.runs)

    @property
    def num_useful(self) -> int:
        return sum(run.length for run in self.useful)

    @property
    def edits(self) -> int:
        return sum(run.join is Join.EDIT for run in self.runs)

    @property
    def plan(self) -> ReusePlan:
        """The plan that copies what is useful."""
        used: list[Run] = []
        for run in self.runs:
            at = len(used)  # each run has at most one useful part
            if at < len(self.useful) and self.useful[at].dst_start < run.dst_stop:
                used.append(run)
        return ReusePlan(self.prompt_len, self.prefix_len, tuple(used), tuple(self.useful))


def going_on(runs: Sequence[Run], prompt_len: int) -> tuple[Range, ...]:
    """Where in a prompt cached text goes on as it did, and new text follows."""
    return tuple(
        Range(run.dst_start, run.dst_stop)
        for run in runs
        if run.join is not Join.SEAM and run.dst_stop + 1 < prompt_len
    )


class Life:
    """A cache of ``capacity`` tokens (None: without limit) and the matcher that follows it.

    ``keep_all``: every request leaves its whole prompt in the plain branch, as if a copy were as
    good as exact. Otherwise the rule above, with sources of at most ``max_depth``.
    """

    def __init__(
        self,
        matcher: Matcher,
        *,
        capacity: int | None = None,
        max_depth: int = ANY_DEPTH,
        keep_all: bool = False,
        policy: Policy = lru,
        config: KVShareConfig | None = None,
    ) -> None:
        self.tree = RadixTree(matcher, capacity=capacity, policy=policy)
        self.max_depth, self.keep_all = max_depth, keep_all
        self.config = config or KVShareConfig()
        self.not_stored = 0  # requests that did not fit

    @property
    def matcher(self) -> Matcher:
        return self.tree.matcher

    @property
    def resident(self) -> int:
        """Tokens in the cache."""
        return self.tree.resident

    @property
    def log(self) -> list[tuple[str, tuple[Any, ...]]]:
        """What the matcher was told."""
        return self.tree.log

    def serve(self, space: object, prompt: Tokens) -> Served:
        """Match a prompt, make room for it, and keep what it leaves."""
        tree = self.tree
        tree.now += 1
        tree.told_s, tree.taken_in = 0.0, 0
        node, seen = self._look(space, prompt)
        rows = seen.prompt_len - seen.prefix_len
        plan, nothing = seen.plan, ReusePlan(seen.prompt_len, seen.prefix_len, (), ())
        if pays(plan, self.config, rows=plan.computed):
            plan = nothing
        sources = {self.touch(copy, going=seen.going) for copy in plan.copies}
        if not tree.make_room(rows, {node, *sources}):
            plan = nothing  # as the plug-in does where its sources leave no room
            if not tree.make_room(rows, {node}):
                self.not_stored += 1
                return seen
        if self.keep_all or not plan.copies:
            tree.store(space, prompt)
        else:
            tree.store(space, prompt[: plan.exact_len])
            for stretch in fresh_stretches(plan, len(prompt), max_depth=self.max_depth):
                self.store_stretch(space, prompt, stretch)
        return seen._replace(insert_s=tree.told_s, inserted=tree.taken_in)

    def look(self, space: object, prompt: Tokens) -> Served:
        """What a prompt would find. Marks its prefix as used, and may split a node."""
        return self._look(space, prompt)[1]

    def _look(self, space: object, prompt: Tokens) -> tuple[Node, Served]:
        node, prefix_len = self.tree.walk(space, prompt[:-1])  # the last token is always computed
        started = time.perf_counter()
        found = self.matcher.match(space, prompt, start=prefix_len, max_depth=self.max_depth)
        lookup_s = time.perf_counter() - started
        unequal = sum(self.tree.num_unequal(run, prompt) for run in found)
        runs = self._joined(found)
        kept = useful(runs, stop=len(prompt) - 1)
        going = going_on(found, len(prompt))
        seen = Served(len(prompt), prefix_len, runs, kept, lookup_s, 0.0, 0, unequal, going)
        return node, seen

    def store_stretch(self, space: object, prompt: Tokens, stretch: Stretch) -> None:
        """Keep one stretch of fresh text, cut into pieces, in a branch of its own."""
        started = time.perf_counter()
        fresh = prompt[stretch.start : stretch.stop]
        found = self.matcher.pieces(space, fresh, depth=stretch.depth)
        self.tree.told_s += time.perf_counter() - started
        for pieces in found:
            ranges = [Range(piece.start, piece.stop) for piece in pieces]
            first, borders = page_borders(stretch.start, ranges, page=1)
            if borders[-1] - first < SPAN:
                continue
            node, at = self.tree.tags, first
            text = Text(space, prompt, root=first, depth=stretch.depth, before=prompt[:first])
            for piece, border in zip(pieces, borders, strict=True):
                key = object() if at == first else int(prompt[at])
                text = text._replace(path=prompt[first:border], start=at)
                node = self.tree.add(node, text, key=key)
                if piece.note is not None:
                    self.tree.tell("remember", piece.note, self.tree.id_of(node))
                at = border

    def touch(self, run: Run, *, going: Sequence[Range] = ()) -> Node:
        """Mark a source as used; the node that must stay while it is copied. What a conversation
        goes on from was used lately, not by one more, as in ``runtime.cache.sources``."""
        nodes = list(self.tree.nodes_of(run))
        goes_on = (
            any(part.start <= run.dst_start < part.stop for part in going)
            and run.src_stop == nodes[0].stop
            and not nodes[0].children
        )
        for node in nodes:
            goes_on = goes_on and self.tree.is_own(node)
            num = min(node.stop, run.src_stop) - max(node.start, run.src_start)
            self.tree.touch(node, 0.0 if goes_on else num / len(node))
        return nodes[0]

    def _joined(self, runs: Sequence[Run]) -> list[Run]:
        """The runs with joins by one rule for all matchers; runs that touch on both sides are one.

        A run follows an edit if the cached text of the run before it continues there, at most
        ``EDIT_GAP`` tokens later. The first one is a seam, whatever the exact prefix was.
        """
        out: list[Run] = []
        for run in runs:
            join: Join = run.join if run.join is Join.SAME else Join.SEAM
            if out and 0 <= run.src_start - out[-1].src_stop <= EDIT_GAP:
                before = out[-1]
                if self._same_path(before, run):
                    join = Join.EDIT
                    if (before.src_stop, before.dst_stop) == (run.src_start, run.dst_start):
                        length = before.length + run.length
                        out[-1] = before._replace(source=run.source, length=length)
                        continue
            out.append(run._replace(join=join))
        return out

    def _same_path(self, before: Run, after: Run) -> bool:
        if before.source == after.source:
            return True
        upper = next(self.tree.nodes_of(before))
        node: Node | None = next(self.tree.nodes_of(after))
        while node is not None and node.start >= upper.start:
            if node is upper:
                return True
            node = node.parent
        return False
