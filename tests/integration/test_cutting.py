"""Eviction over trees of any shape, on SGLang's tree and ours: copies are cut out, sources held."""

import random
from array import array
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.policy.evict import Frequency
from kvshare_sglang.runtime.report import Report

SPACE = (None, None)
USES = (0.0, 1.0, 3.0)
Node = Any


class Pool:
    """An allocator that hands out slots in a row, and takes each back once."""

    device = "cpu"
    size = 10_000

    def __init__(self) -> None:
        self.given, self.freed = 0, set[int]()

    def take(self, num: int) -> torch.Tensor:
        self.given += num
        return torch.arange(self.given - num, self.given)

    def free(self, slots: torch.Tensor) -> None:
        found = set(slots.tolist())
        assert not found & self.freed
        self.freed |= found

    def free_segment(self, slots: torch.Tensor, start_pos: int = 0) -> None:
        self.free(slots)


class Tree:
    """A cache, and what stands in it by hand."""

    def __init__(self, page: int = 1) -> None:
        from sglang.srt.mem_cache.cache_init_params import CacheInitParams

        from kvshare_sglang.runtime.cache.radix import FuzzyRadixCache

        self.pool, self.page, self.token = Pool(), page, 0
        params = CacheInitParams(
            disable=False,
            req_to_token_pool=None,
            token_to_kv_pool_allocator=self.pool,
            page_size=page,
        )
        nobody: Any = SimpleNamespace(new_weights=lambda: None)
        self.cache = FuzzyRadixCache(
            params,
            config=KVShareConfig(),
            report=Report(),
            choosing=nobody,
            shadow=nobody,
            accepts=lambda req: True,
        )
        self.root = self.cache.root_node
        self.held: list[Node] = []
        self.locked: list[Node] = []

    def add(self, above: Node, num: int, kind: str, *, uses: float = 0.0) -> Node:
        """A node of new text: "exact", or in a branch a "copy" or a "source"."""
        from sglang.srt.mem_cache.radix_cache import RadixKey

        from kvshare_sglang.runtime.cache.index_sync import BranchKey

        cache, before = self.cache, path_of(above)
        ids = array("q", range(self.token, self.token + num))
        self.token += num
        blended = kind != "exact"
        mine = cache.branches._keys.setdefault(SPACE, BranchKey(SPACE)) if blended else None
        _, node = cache._insert_helper(above, RadixKey(ids, extra_key=mine), self.pool.take(num))
        if blended:
            cache.sync.added_blended(
                node,
                space=SPACE,
                start=len(before),
                depth=1,
                open_rows=np.full(num, kind == "copy"),
                source_depth=1 if kind == "source" else None,
                before=np.array(before, np.int32),
            )
            cache.copies.note(node)
        node.kvshare.frequency = Frequency(uses, cache.usage.fills)
        return node

    def nodes(self) -> list[Node]:
        found, stack = [], list(self.root.children.values())
        while stack:
            node = stack.pop()
            stack += node.children.values()
            found.append(node)
        return found

    def hold(self, node: Node) -> None:
        self.cache.copies.hold(node)
        self.held.append(node)
        self._tell()

    def let_go(self, node: Node) -> None:
        self.held.remove(node)
        self.cache.copies.let_go(node)
        self._tell()

    def _tell(self) -> None:
        state: Any = SimpleNamespace(locked=[(None, node) for node in self.held], reuses=False)
        self.cache.sources._holders = {0: state}

    def lock(self, node: Node) -> None:
        """As a prefix hit does."""
        self.cache.inc_lock_ref(node)
        self.locked.append(node)

    def unlock(self, node: Node) -> None:
        self.locked.remove(node)
        self.cache.dec_lock_ref(node)

    def evict(self, num: int) -> int:
        from sglang.srt.mem_cache.base_prefix_cache import EvictParams

        return int(self.cache.evict(EvictParams(num_tokens=num)).num_tokens_evicted)

    def check(self) -> None:
        """Locks and sizes, counted anew."""
        from kvshare_sglang.runtime.cache.copies import is_copy

        locks: Counter[Node] = Counter()
        for node, over_copies in [(n, True) for n in self.held] + [(n, False) for n in self.locked]:
            while node is not self.root:
                locks[node] += not (over_copies and is_copy(node))
                node = node.parent
        nodes = self.nodes()
        for node in nodes:
            assert node.lock_ref == locks[node]
            is_leaf = not node.children and not node.lock_ref
            assert (node in self.cache.evictable_leaves) == is_leaf
        free = sum(len(node.key) for node in nodes if not node.lock_ref)
        every = sum(len(node.key) for node in nodes)
        assert (self.cache.evictable_size(), self.cache.protected_size()) == (free, every - free)
        assert self.pool.given - len(self.pool.freed) == every
        self.cache.check()


def can_be_reached(node: Node) -> bool:
    """Whether requests get there: nothing before it was cut out."""
    while node.parent.parent is not None:
        node = node.parent
    return bool(node.kvshare.start == 0)


def path_of(node: Node) -> list[int]:
    ids: list[int] = []
    while node.parent is not None:
        ids = [*node.key.token_ids, *ids]
        node = node.parent
    return ids


@given(st.integers(0, 2**32), st.sampled_from([1, 16]))
def test_all_that_is_evictable_can_be_had_whatever_is_held_or_locked(seed: int, page: int) -> None:
    """SGLang admits by what is evictable, and raises where eviction brings less. Nothing held or
    locked goes, no slot is freed twice, and every lock is let go in the end."""
    from kvshare_sglang.runtime.cache.copies import is_copy
    from kvshare_sglang.runtime.cache.index_sync import BranchKey

    rng, tree = random.Random(seed), Tree(page)
    for _ in range(40):
        nodes, what = tree.nodes(), rng.random()
        if what < 0.5 or not nodes:
            above = rng.choice([*filter(can_be_reached, nodes), tree.root, tree.root])
            in_branch = isinstance(above.key.extra_key, BranchKey)
            kind = rng.choice(["copy", "source"] if in_branch else ["exact", "copy", "copy"])
            tree.add(above, page * rng.randrange(1, 5) + 32, kind, uses=rng.choice(USES))
        elif what < 0.62:
            if not is_copy(node := rng.choice(nodes)):
                tree.hold(node)
        elif what < 0.68 and tree.held:
            tree.let_go(rng.choice(tree.held))
        elif what < 0.71:
            tree.lock(rng.choice(nodes))
        elif what < 0.76 and tree.locked:
            tree.unlock(rng.choice(tree.locked))
        elif what < 0.85:
            node = rng.choice(nodes)
            if len(node.key) > page:
                at = page * rng.randrange(1, -(-len(node.key) // page))
                tree.cache._split_node(node.key, node, at)
        elif size := tree.cache.evictable_size():
            num = rng.choice([rng.randrange(1, size + 1), size])
            assert tree.evict(num) >= num
            kept = set(tree.nodes())
            assert kept.issuperset([*tree.held, *tree.locked])
        tree.check()
    for node in list(tree.held):
        tree.let_go(node)
    for node in list(tree.locked):
        tree.unlock(node)
    tree.check()
    assert tree.cache.protected_size() == 0
    assert all(node.kvshare.passed == 0 for node in tree.nodes())
    tree.evict(tree.cache.evictable_size())
    assert tree.pool.given == len(tree.pool.freed)
    assert not tree.nodes()


def test_a_conversation_that_goes_on_is_not_cut_while_others_are_over() -> None:
    """Its copies, used a moment ago, come after chains of old turns, of which only the last are
    leaves."""
    tree = Tree()
    for _ in range(8):
        above = tree.root
        for _ in range(10):
            above = tree.add(above, 30, "exact")
    copies = tree.add(tree.add(tree.root, 40, "exact"), 300, "copy", uses=1.0)
    tree.hold(tree.add(copies, 40, "source"))
    for num in (100, 400, 700, 1000):
        assert tree.evict(num) >= num
        assert copies.children
    assert tree.evict(400) >= 400  # 200 tokens of old turns were left
    assert copies not in tree.nodes()
    tree.check()


@pytest.mark.parametrize("uses", [0.0, 1.0])
def test_a_short_answer_at_the_end_of_a_branch_is_counted_once(uses: float) -> None:
    tree = Tree()
    for _ in range(8):
        source = tree.add(tree.add(tree.root, 300, "copy", uses=uses), 60, "source")
        tree.add(source, 40, "copy")
        tree.hold(source)
    size = tree.cache.evictable_size()
    assert size == 8 * 340
    assert tree.evict(size - 100) >= size - 100
    tree.check()


def test_an_eviction_frees_a_little_ahead_where_it_can() -> None:
    """Each looks at all leaves and copies, and one token a step would be asked for."""
    tree, ahead = Tree(), Pool.size // 256
    nodes = [tree.add(tree.root, 10, "exact") for _ in range(12)]
    assert ahead == 39
    assert tree.evict(1) == 40
    tree.hold(nodes[-1])
    assert tree.evict(1) == 40
    assert tree.evict(1) == 30
    assert tree.nodes() == nodes[-1:]
