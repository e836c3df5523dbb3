"""What one worker holds, rebuilt from what it tells: its fuzzy tree, and its exact prefixes. Pure.

The same class as in the worker, fed the same changes under the same secret, finds the same runs.
Beside it the grams of all workers go into one ``JointMap``, under a seed of the router's own.
"""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvshare_sglang import wire
from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.errors import TreeError
from kvshare_sglang.plan import Run
from kvshare_sglang.radix_fuzzy.fingerprints import (
    GRAM,
    SPAN,
    WINDOW,
    Tokens,
    namespace_seed,
    winnow,
)
from kvshare_sglang.radix_fuzzy.index import Words
from kvshare_sglang.radix_fuzzy.segments import Segment, common_prefix, path_tokens
from kvshare_sglang.radix_fuzzy.tree import FuzzyTree
from kvshare_sglang.router.joint import JointMap

Namespace = tuple[str | None, str | None]  # extra_key, cache_salt

_Head = tuple[wire.Space, int, int, bytes]  # above (0: nothing), start, tokens of the first page


def _space(namespace: Namespace, weights: int) -> object:
    """As the worker calls it: the hashes are seeded by that."""
    return namespace, weights


class _Held(NamedTuple):
    """A segment here; its grams in the joint map, each once: where it starts first, its hash."""

    segment: Segment
    head: _Head
    positions: npt.NDArray[np.int64]
    hashes: Words


class Mirror:
    """One worker's tree. ``number``: of the last changes that are in it. ``weights``: what its
    requests match is of these."""

    def __init__(self, snapshot: wire.Snapshot, joint: JointMap, worker: int, *, seed: int) -> None:
        """Empty: ``insert`` what the snapshot holds. Raises ValueError on options that are none."""
        if snapshot.page < 1:
            raise ValueError(f"pages of {snapshot.page} tokens")
        self.run, self.number, self.page = snapshot.run, snapshot.number, snapshot.page
        self.config = KVShareConfig(**snapshot.config)
        self.weights = 0
        self._tree = FuzzyTree(secret=snapshot.secret)
        self._joint, self._worker, self._seed = joint, worker, seed
        self._clear()

    def _clear(self) -> None:
        self._tree.clear()
        self._joint.drop(self._worker)
        self._held: dict[int, _Held] = {}  # by the worker's id
        self._heads: dict[_Head, Segment] = {}
        self._more: Counter[int] = Counter()  # hashes held more than once: how often more

    @property
    def num_tokens(self) -> int:
        return self._tree.num_tokens

    @property
    def nbytes(self) -> int:
        """Bytes of the tree and of the grams, without Python's objects."""
        return self._tree.nbytes + sum(16 * len(one.hashes) for one in self._held.values())

    # ---- in step with the worker ---------------------------------------------------------

    def apply(self, events: Iterable[wire.Insert | wire.Trim | wire.Clear]) -> None:
        """Raises TreeError where they do not follow from what is here: ask for a snapshot."""
        for event in events:
            match event:
                case wire.Insert():
                    self.insert(event)
                case wire.Trim(seg_id, stop):
                    self._trim(seg_id, stop)
                case wire.Clear():
                    self._clear()

    def insert(self, event: wire.Insert) -> None:
        above = self._held.get(event.parent)
        if (event.parent and above is None) or event.id in self._held:
            raise TreeError(f"segment {event.id} under {event.parent} does not fit what is here")
        tokens = np.frombuffer(event.tokens, "<i4")
        try:
            segment = self._tree.insert(
                _space(event.space[:2], event.space[2]),
                tokens,
                start=event.start,
                parent=above.segment.id if above else None,
                depth=event.depth,
                hashed=(event.context, event.near),
            )
        except ValueError as error:
            raise TreeError(str(error)) from None
        head = event.space, event.parent, event.start, tokens[: self.page].tobytes()
        marks = self._marks(segment, event.space[:2])
        self._held[event.id] = _Held(segment, head, *marks)
        if event.depth == 0:
            self._heads[head] = segment
        again = self._joint.add(marks[1], self._worker)
        self._more.update(marks[1][again].tolist())
        segment.payload = event.id

    def _marks(self, seg: Segment, namespace: Namespace) -> tuple[npt.NDArray[np.int64], Words]:
        """Grams that the path keeps and the path above it does not, each hash once, at its first
        place, which is the last to go."""
        seed = self.joint_seed(namespace, self._seed)
        left = max(seg.start - (SPAN - 1) - (WINDOW - 1), seg.root_start)
        path = path_tokens(seg, left, seg.stop)
        positions, hashes = winnow(path, seed=seed)
        if left < seg.start:
            above = winnow(path[: seg.start - left], seed=seed).positions
            own = ~np.isin(positions, above)
            positions, hashes = positions[own], hashes[own]
        hashes, first = np.unique(hashes, return_index=True)
        return positions[first] + left, hashes

    @staticmethod
    def joint_seed(namespace: Namespace, seed: int) -> int:
        return namespace_seed((seed, *namespace))

    def _trim(self, seg_id: int, stop: int) -> None:
        held = self._held.get(seg_id)
        if held is None:
            raise TreeError(f"segment {seg_id} is not here")
        segment, head, positions, hashes = held
        try:
            self._tree.trim(segment.id, stop)
        except ValueError as error:
            raise TreeError(str(error)) from None
        dies = positions + GRAM > stop if stop > segment.start else np.ones(len(positions), bool)
        self._forget(hashes[dies])
        if stop > segment.start:
            self._held[seg_id] = held._replace(positions=positions[~dies], hashes=hashes[~dies])
        else:
            del self._held[seg_id]
            if self._heads.get(head) is segment:
                del self._heads[head]

    def _forget(self, hashes: Words) -> None:
        """One place less for each hash; the bit goes with the last."""
        last = np.ones(len(hashes), bool)
        if self._more:
            for i, value in enumerate(hashes.tolist()):
                if more := self._more.get(value):
                    last[i] = False
                    if more == 1:
                        del self._more[value]
                    else:
                        self._more[value] = more - 1
        self._joint.discard(hashes[last], self._worker)

    # ---- lookup --------------------------------------------------------------------------

    def prefix_len(self, namespace: Namespace, prompt: Tokens) -> int:
        """Tokens that SGLang finds as an exact prefix: whole pages, never the last token."""
        space, page = (*namespace, self.weights), self.page
        whole = (len(prompt) - 1) // page * page
        at = above = 0
        while at < whole:
            segment = self._heads.get((space, above, at, prompt[at : at + page].tobytes()))
            if segment is None:
                break
            same = common_prefix(segment.tokens, prompt[at:whole])
            at += same // page * page
            above = segment.payload
            if same < page:
                break
        return at

    def match(self, namespace: Namespace, prompt: Tokens, *, start: int) -> tuple[Run, ...]:
        """The runs that the worker would find after its prefix."""
        return self._tree.match(
            _space(namespace, self.weights),
            prompt,
            start=start,
            max_depth=self.config.source_depth,
            tolerance=self.config.edit_tolerance,
        )

    def check(self) -> None:
        """Restate the invariants; AssertionError on the first that does not hold. O(all)."""
        self._tree.check()
        counts = Counter(h for one in self._held.values() for h in one.hashes.tolist())
        assert {h: n - 1 for h, n in counts.items() if n > 1} == dict(self._more)
        assert all(self._held[one.payload].segment is one for one in self._heads.values())
        assert self._tree.num_segments == len(self._held)
