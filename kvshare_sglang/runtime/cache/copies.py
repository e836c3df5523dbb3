"""Evict copies in blended branches that text hangs on: the copies go, the text stays a source.

SGLang evicts leaves only, so new text at the end of a branch would keep all copies before it, and
who locks the text would lock them. A copy can be made again. So its node is cut out of the branch:
what hung on it hangs at the root from then on, under a key that no one can name. There it is no
prefix any more, and as good a source as before, for a source knows its positions itself.
"""

from collections.abc import Iterable
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

    def evict_cold(self, num: int) -> int:
        """Cut out copies that SGLang's policy would evict before any of the leaves, if they were
        leaves, until ``num`` slots are free. How many are. O(copies + leaves)."""
        inner = [node for node in self._nodes if node.children and not node.lock_ref]
        if not inner:
            return 0
        priority = self._cache.eviction_strategy.get_priority
        coldest = min(map(priority, self._cache.evictable_leaves), default=None)
        cold = [node for node in inner if coldest is None or priority(node) < coldest]
        return self._cut(cold, num)

    def evict_above(self, nodes: Iterable["TreeNode"], num: int) -> int:
        """The same for copies that stand before ``nodes``, whatever else is there."""
        found, seen = [], set()
        for node in nodes:
            while node.parent is not None and node not in seen:
                seen.add(node)
                node = node.parent
                if is_copy(node) and not node.lock_ref:
                    found.append(node)
        return self._cut(list(dict.fromkeys(found)), num)

    def _cut(self, nodes: "list[TreeNode]", num: int) -> int:
        """Of equal ones the last of a branch first: what is before it stays a prefix."""
        priority = self._cache.eviction_strategy.get_priority
        freed = 0
        for node in sorted(nodes, key=lambda one: (priority(one), -one.kvshare.start)):
            if freed >= num:
                break
            freed += len(node.key)
            self._cut_out(node)
        return freed

    def _cut_out(self, node: "TreeNode") -> None:
        cache, root = self._cache, self._cache.root_node
        for child in node.children.values():
            mine = child.key.extra_key
            mine.num_nodes -= 1  # of the branch there is at least ``node`` itself left
            alone = BranchKey(mine.namespace)
            alone.num_nodes = 1
            child.key = child.key[: len(child.key)]  # its own object, to be renamed
            child.key.extra_key = alone
            child.parent = root
            root.children[child.key.child_key(cache.page_size)] = child
        node.children.clear()
        cache.token_to_kv_pool_allocator.free(node.value)
        cache._delete_leaf(node)

    def check(self) -> None:
        """AssertionError unless the nodes are those that the tree has."""
        found, stack = set(), list(self._cache.root_node.children.values())
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            if is_copy(node):
                found.add(node)
        assert found == self._nodes


def is_copy(node: Any) -> bool:
    """Whether a node of SGLang's tree holds blended KV that is no source."""
    return isinstance(node.key.extra_key, BranchKey) and node.kvshare.segment is None
