"""Evict copies in blended branches that text hangs on: the copies go, the text stays a source.

SGLang evicts leaves only and locks paths, so new text at the end of a branch would keep all copies
before it, and who copies the text would lock them. A copy can be made again. So its node is cut out
of the branch: what hung on it hangs at the root from then on, under a key that no one can name.
There it is no prefix any more, and as good a source as before, for a source knows its positions
itself. And who holds a source holds no copy before it: only a prefix hit does.

What counts as a copy here is all of a branch that is no source: copied rows, those computed again
among them, and new text that is too short or too deep to be copied by others.
"""

import heapq
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from kvshare_sglang.runtime.cache.index_sync import BranchKey

if TYPE_CHECKING:
    from sglang.srt.mem_cache.radix_cache import TreeNode

    from kvshare_sglang.runtime.cache.radix import FuzzyRadixCache


class Copies:
    """The nodes of a cache's branches that are no sources."""

    def __init__(self, cache: "FuzzyRadixCache") -> None:
        self._cache = cache
        self._nodes: set[TreeNode] = set()

    def note(self, node: "TreeNode") -> None:
        """``node`` is new, by insertion or by a split."""
        if is_copy(node):
            self._nodes.add(node)

    def removed(self, node: "TreeNode") -> None:
        self._nodes.discard(node)

    def forget(self) -> None:
        """The tree was flushed."""
        self._nodes.clear()

    def hold(self, source: "TreeNode") -> None:
        """Keep ``source`` from eviction, and of what is before it all that is no copy."""
        self._count(source, 1)

    def let_go(self, source: "TreeNode") -> None:
        """Take one ``hold`` back."""
        self._count(source, -1)

    def _count(self, node: "TreeNode", holds: int) -> None:
        """So many holds more, or less, from ``node`` to the root: SGLang's locks on what is no
        copy. A copy only counts them, for when it is cut out and what is before it is let go."""
        cache = self._cache
        while holds and node is not cache.root_node:
            if is_copy(node):
                node.kvshare.passed += holds
            else:
                was, node.lock_ref = node.lock_ref, node.lock_ref + holds
                if (was == 0) != (node.lock_ref == 0):
                    tokens = len(node.key) if was == 0 else -len(node.key)
                    cache.protected_size_ += tokens
                    cache.evictable_size_ -= tokens
                cache._update_leaf_status(node)
            node = node.parent

    def evict_cold(self, num: int) -> int:
        """Cut out copies that SGLang's policy would evict, if they were leaves, on the way to
        ``num`` free slots. How many slots that frees. O(copies + leaves + evicted nodes)."""
        inner = [node for node in self._nodes if node.children and not node.lock_ref]
        if not inner:
            return 0
        cache = self._cache
        priority = cache.eviction_strategy.get_priority
        heap = [(priority(node), node) for node in (*inner, *cache.evictable_leaves)]
        heapq.heapify(heap)
        # What SGLang's own eviction will take, which goes on from leaves to their parents, and how
        # many children that leaves to a parent.
        taken: set[TreeNode] = set()
        left: dict[TreeNode, int] = {}
        cut = leaves = 0
        while heap and cut + leaves < num:
            _, node = heapq.heappop(heap)
            if node in taken or (is_copy(node) and node not in self._nodes):
                continue
            if left.get(node, len(node.children)):
                # Of the branch the last copies first: what is before them stays a prefix, and once
                # ``node`` goes nobody gets to those.
                for one in list(_copies_from(node)):
                    if cut + leaves >= num:
                        break
                    cut += len(one.key)
                    if one in taken:
                        taken.remove(one)
                        leaves -= len(one.key)
                    elif one.parent in left:
                        left[one.parent] -= 1
                    self._cut_out(one)
                continue
            taken.add(node)
            leaves += len(node.key)
            above = node.parent
            left[above] = left.get(above, len(above.children)) - 1
            if above is not cache.root_node and not left[above] and not above.lock_ref:
                heapq.heappush(heap, (priority(above), above))
        return cut

    def _cut_out(self, node: "TreeNode") -> None:
        cache, root = self._cache, self._cache.root_node
        self._count(node.parent, -node.kvshare.passed)
        for child in node.children.values():
            old = child.key.extra_key
            alone = BranchKey(old.namespace)
            alone.num_nodes = 1
            child.key = child.key[: len(child.key)]  # its own object, to be renamed
            child.key.extra_key = alone
            child.parent = root
            root.children[child.key.child_key(cache.page_size)] = child
            cache.branches.left(old)
        node.children.clear()
        cache.token_to_kv_pool_allocator.free(node.value)
        cache._delete_leaf(node)

    def check(self) -> None:
        """AssertionError unless the nodes are those that the tree has, and branches and holds are
        counted."""
        passed: Counter[TreeNode] = Counter()
        for node in self._cache.sources.held():
            while node.parent is not None:
                passed[node] += 1
                node = node.parent
        found, counts, stack = set(), Counter[BranchKey](), [self._cache.root_node]
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            if node.parent is not None and isinstance(node.key.extra_key, BranchKey):
                counts[node.key.extra_key] += 1
                if is_copy(node):
                    found.add(node)
                    assert node.kvshare.passed == passed[node]
        assert found == self._nodes
        assert all(key.num_nodes == count for key, count in counts.items())
        self._cache.branches.check(counts)


def is_copy(node: Any) -> bool:
    """Whether a node of SGLang's tree holds blended KV that is no source."""
    return isinstance(node.key.extra_key, BranchKey) and node.kvshare.segment is None


def _copies_from(node: "TreeNode") -> "Iterator[TreeNode]":
    """The copies at ``node`` and below, children before their parents."""
    stack, order = [node], []
    while stack:
        one = stack.pop()
        order.append(one)
        stack.extend(one.children.values())
    return (one for one in reversed(order) if is_copy(one))
