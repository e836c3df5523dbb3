"""The matchers that are compared: SGLang's prefix, published rules, the plug-in's own tree. Pure.

A baseline keeps a view of the whole path; only ``kvshare`` keeps tokens of its own.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from kvshare_sglang.bench.match.hashing import window_hashes
from kvshare_sglang.plan import Run
from kvshare_sglang.radix_fuzzy.fingerprints import SPAN, Tokens, namespace_seed
from kvshare_sglang.radix_fuzzy.index import Bools, Words
from kvshare_sglang.radix_fuzzy.segments import common_prefix
from kvshare_sglang.sim.matcher import KVShare, Matcher, Piece, Text

FIXED_LEN = 256  # chunk length of the fixed matchers: LMCache's

_BITS, _LOW = np.uint64(32), np.uint64(2**32 - 1)


class Prefix:
    """SGLang alone: nothing beyond the exact prefix."""

    copies_tokens = False

    def __init__(self) -> None:
        self._next = 0

    def insert(self, text: Text) -> int:
        self._next += 1
        return self._next

    def trim(self, segment: int, stop: int) -> None:
        pass

    def match(self, space: object, prompt: Tokens, *, start: int, max_depth: int) -> Sequence[Run]:
        return ()

    def pieces(self, space: object, tokens: Tokens, *, depth: int) -> list[list[Piece]]:
        return [[Piece(0, len(tokens))]]

    def remember(self, note: object, segment: int) -> None:
        pass


class Indexed(Prefix):
    """A baseline: some grams of the cached text in a hash table, the newest place of each."""

    gram: int  # tokens hashed together

    def __init__(self) -> None:
        super().__init__()
        self._paths: dict[int, tuple[Tokens, int]] = {}  # path and where it begins
        self._seeds: dict[object, int] = {}
        self._stops = np.zeros(64, np.int64)
        self._depths = np.zeros(64, np.int64)
        self._index: dict[int, int] = {}

    def insert(self, text: Text) -> int:
        segment = super().insert(text)
        if segment >= len(self._stops):
            self._stops = np.concatenate([self._stops, np.zeros_like(self._stops)])
            self._depths = np.concatenate([self._depths, np.zeros_like(self._depths)])
        path, root = text.path, text.root
        self._paths[segment] = path, root
        self._stops[segment] = root + len(path)
        self._depths[segment] = text.depth
        keys, places = self._to_store(path, root, max(text.start - root, 0), self._seed(text.space))
        values = (np.uint64(segment) << _BITS) | (places + root).astype(np.uint64)
        # Of equal grams of one text the first counts, of several texts the newest.
        self._index.update(reversed([*zip(keys.tolist(), values.tolist(), strict=True)]))
        return segment

    def trim(self, segment: int, stop: int) -> None:
        path, root = self._paths[segment]
        self._stops[segment] = stop
        self._paths[segment] = path[: stop - root], root

    def _hits(
        self, keys: Words, places: npt.NDArray[np.int64], max_depth: int
    ) -> list[tuple[int, int, int]]:
        """``(prompt position, segment, path position)`` of each gram that is in the cache."""
        found = np.array([self._index.get(key, 0) for key in keys.tolist()], np.uint64)
        segments = (found >> _BITS).astype(np.int64)
        ok = self._alive(found) & (self._depths[segments] <= max_depth)
        sources = (found[ok] & _LOW).astype(np.int64)
        return list(zip(places[ok].tolist(), segments[ok].tolist(), sources.tolist(), strict=True))

    def _seed(self, space: object) -> int:
        if space not in self._seeds:
            self._seeds[space] = namespace_seed(space)
        return self._seeds[space]

    def _alive(self, values: Words) -> Bools:
        stops = self._stops[(values >> _BITS).astype(np.int64)]
        mask: Bools = (values & _LOW).astype(np.int64) + self.gram <= stops
        return mask

    def _to_store(
        self, path: Tokens, root: int, fresh: int, seed: int
    ) -> tuple[Words, npt.NDArray[np.int64]]:
        """Keys and offsets in ``path`` of the grams to index that end after offset ``fresh``."""
        raise NotImplementedError


class FixedAnyOffset(Indexed):
    """LMCache-like: chunks at multiples of a length, whose hashes are probed at every offset."""

    def __init__(self, length: int = FIXED_LEN) -> None:
        self.gram = length
        super().__init__()

    def _to_store(
        self, path: Tokens, root: int, fresh: int, seed: int
    ) -> tuple[Words, npt.NDArray[np.int64]]:
        size = self.gram
        # The chunk that holds the first fresh token may begin above it.
        first = max((root + fresh) // size * size, -(-root // size) * size) - root
        if len(path) - first < size:
            return np.empty(0, np.uint64), np.empty(0, np.int64)
        places = np.arange(first, len(path) - size + 1, size)
        return window_hashes(path[first:], size, seed)[places - first], places

    def match(self, space: object, prompt: Tokens, *, start: int, max_depth: int) -> Sequence[Run]:
        keys = window_hashes(prompt[start:], self.gram, self._seed(space))
        places = self._probes(start, len(keys))
        return self._join(self._hits(keys[places - start], places, max_depth), prompt)

    def _probes(self, start: int, num: int) -> npt.NDArray[np.int64]:
        return np.arange(start, start + num)

    def _join(self, hits: list[tuple[int, int, int]], prompt: Tokens) -> list[Run]:
        runs: list[Run] = []
        end = 0
        for at, segment, src in hits:
            if at < end:
                continue
            path, root = self._paths[segment]
            cached = path[src - root : src - root + self.gram]
            if not np.array_equal(cached, prompt[at : at + self.gram]):
                continue
            end = at + self.gram
            last = runs[-1] if runs else None
            if last and last.source == segment and (last.src_stop, last.dst_stop) == (src, at):
                runs[-1] = last._replace(length=last.length + self.gram)
            else:
                runs.append(Run(segment, src, at, self.gram, int(self._depths[segment])))
        return runs


class FixedAligned(FixedAnyOffset):
    """EPIC-like: equal chunks at multiples of a length, in the cache and in the prompt."""

    def _probes(self, start: int, num: int) -> npt.NDArray[np.int64]:
        return np.arange(-(-start // self.gram) * self.gram, start + num, self.gram)


class Winnow(Indexed):
    """Plain winnowing: every kept gram leads to one place, from which it is extended exactly."""

    gram = 8
    window = SPAN - gram + 1

    def match(self, space: object, prompt: Tokens, *, start: int, max_depth: int) -> Sequence[Run]:
        keys, places = self._kept(prompt[start:], self._seed(space))
        runs: list[Run] = []
        end = start
        for at, segment, src in self._hits(keys, places + start, max_depth):
            if at < end:
                continue
            path, root = self._paths[segment]
            src -= root
            ahead = common_prefix(path[src:], prompt[at:])
            back = common_prefix(path[:src][::-1], prompt[:at][::-1])
            if ahead + back < SPAN:
                continue
            back = min(back, at - end)
            run = Run(segment, root + src - back, at - back, ahead + back)
            runs.append(run._replace(depth=int(self._depths[segment])))
            end = at + ahead
        return runs

    def _to_store(
        self, path: Tokens, root: int, fresh: int, seed: int
    ) -> tuple[Words, npt.NDArray[np.int64]]:
        keys, places = self._kept(path, seed)
        own = places + self.gram > fresh
        return keys[own], places[own]

    def _kept(self, tokens: Tokens, seed: int) -> tuple[Words, npt.NDArray[np.int64]]:
        hashes = window_hashes(tokens, self.gram, seed)
        num = len(hashes) - self.window + 1
        if num <= 0:
            return np.empty(0, np.uint64), np.empty(0, np.int64)
        windows = np.lib.stride_tricks.sliding_window_view(hashes, self.window)
        places = np.unique(windows.argmin(1) + np.arange(num))
        return hashes[places], places


MATCHERS: dict[str, Callable[[], Matcher]] = {
    "prefix": Prefix,
    "fixed-aligned": FixedAligned,
    "fixed-any-offset": FixedAnyOffset,
    "winnow": Winnow,
    "kvshare": KVShare,
}
