"""The fuzzy tree against a plain model under any history, and what it makes of edited text."""

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from oracles import covered
from strategies import NAMESPACES, fresh, random_tokens, texts

from kvshare_sglang.errors import TreeError
from kvshare_sglang.plan import Join, Run, check_runs
from kvshare_sglang.radix_fuzzy import fingerprints, segments
from kvshare_sglang.radix_fuzzy import tree as tree_module
from kvshare_sglang.radix_fuzzy.chunks import Chunk
from kvshare_sglang.radix_fuzzy.fingerprints import GRAM, SPAN
from kvshare_sglang.radix_fuzzy.tree import FuzzyTree

MAX_DEPTH = 2


@dataclass
class Known:
    """What the model knows of a live segment: the tokens of its whole path, from ``root``."""

    namespace: object
    depth: int
    parent: int | None
    root: int
    start: int
    path: list[int]

    @property
    def stop(self):
        return self.root + len(self.path)

    def tokens(self, start, stop):
        return self.path[start - self.root : stop - self.root]


class Place(NamedTuple):
    """Where a gram was inserted: the segment whose path it stands in, and its position."""

    segment: int
    position: int
    depth: int


class TreeMachine(RuleBasedStateMachine):
    """Insert, branch, trim, pin and flush as a cache would; match at any time."""

    @initialize()
    def start(self):
        self.tree = FuzzyTree()
        self.forget()

    def forget(self):
        self.live = {}
        self.pinned = []  # (run, id of the segment that holds its end, its tokens, the pin)
        self.history = {}  # (namespace, gram) -> every place it was ever inserted at, in order

    # ---- the cache's life ---------------------------------------------------------------

    @rule(
        namespace=st.sampled_from(NAMESPACES),
        text=texts(),
        start=st.sampled_from((0, 0, 1, 100)),
        depth=st.integers(0, MAX_DEPTH),
    )
    def insert_root(self, namespace, text, start, depth):
        self.insert(namespace, text, start=start, depth=depth)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), text=texts(), at_end=st.booleans())
    def insert_child(self, data, text, at_end):
        parent = data.draw(st.sampled_from(sorted(self.live)))
        above = self.live[parent]
        start = above.stop if at_end else data.draw(st.integers(above.start + 1, above.stop))
        self.insert(above.namespace, text, start=start, depth=above.depth, parent=parent)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def insert_a_copy(self, data):
        copied = self.live[data.draw(st.sampled_from(sorted(self.live)))]
        depth = data.draw(st.integers(0, MAX_DEPTH))
        self.insert(copied.namespace, np.array(copied.path, np.int32), start=0, depth=depth)

    def insert(self, namespace, text, *, start, depth, parent=None):
        segment = self.tree.insert(namespace, text, start=start, parent=parent, depth=depth)
        above = self.live.get(parent)
        root = above.root if above else start
        path = (above.tokens(root, start) if above else []) + text.tolist()
        known = self.live[segment.id] = Known(namespace, depth, parent, root, start, path)
        # grams that the new text completes, and those beside them that its windows may keep
        for at in range(max(start - SPAN, root), known.stop - GRAM + 1):
            gram = (namespace, *known.tokens(at, at + GRAM))
            self.history.setdefault(gram, []).append(Place(segment.id, at, depth))

    @precondition(lambda self: self.live)
    @rule(data=st.data(), whole=st.booleans())
    def trim(self, data, whole):
        key = data.draw(st.sampled_from(sorted(self.live)))
        known = self.live[key]
        children = [child.start for child in self.live.values() if child.parent == key]
        pins = [run.src_stop for run, owner, *_ in self.pinned if owner == key]
        lowest = max([known.start, *children])
        stop = lowest if whole else data.draw(st.integers(lowest, known.stop))
        if any(pin > stop for pin in pins):
            with pytest.raises(TreeError, match=f"trim to {stop} .* pinned up to {max(pins)}"):
                self.tree.trim(key, stop)
            return
        self.tree.trim(key, stop)
        known.path = known.tokens(known.root, stop)
        if stop == known.start:
            del self.live[key]

    @rule()
    def clear(self):
        self.tree.clear()
        self.forget()

    # ---- lookups and pins ---------------------------------------------------------------

    @rule(
        data=st.data(),
        namespace=st.sampled_from(NAMESPACES),
        max_depth=st.integers(0, MAX_DEPTH),
        tolerance=st.sampled_from((0.0, 0.5, 1.0)),
    )
    def match(self, data, namespace, max_depth, tolerance):
        prompt = data.draw(self.prompts())
        start = data.draw(st.one_of(st.just(0), st.integers(0, len(prompt))))
        before = self.snapshot()
        runs = self.tree.match(
            namespace, prompt, start=start, max_depth=max_depth, tolerance=tolerance
        )
        assert self.snapshot() == before
        check_runs(runs, start=start, stop=len(prompt))
        for run in runs:
            known = self.live[run.source]
            assert known.namespace == namespace
            assert run.depth == known.depth <= max_depth
            cached = known.tokens(run.src_start, run.src_stop)
            assert cached == prompt[run.dst_start : run.dst_stop].tolist()
            pieces = self.tree.pieces(run)
            assert [(a, b) for _, a, b in pieces] == [
                (max(run.src_start, seg.start), min(run.src_stop, b)) for seg, _, b in pieces
            ]
            assert sum(b - a for _, a, b in pieces) == run.length
        for before, run in pairwise(runs):
            if run.join is Join.EDIT:  # one cached text goes on
                last = before.src_stop - 1
                assert last < run.src_start
                assert self.owner(before.source, last) == self.owner(run.source, last)
        self.check_nothing_findable_is_missed(namespace, prompt, start, max_depth, covered(runs))
        for run in runs:
            if data.draw(st.booleans()):
                self.pin(run, data)

    def check_nothing_findable_is_missed(self, namespace, prompt, start, max_depth, have):
        """No whole span is left uncovered that stands in one segment and that nothing hides."""
        prompt = prompt.tolist()
        for at in range(start, len(prompt) - SPAN + 1):
            if not have.isdisjoint(range(at, at + SPAN)):
                continue
            first, *others = (
                self.findable(namespace, prompt[at + i : at + i + GRAM], max_depth)
                for i in range(SPAN - GRAM + 1)
            )
            assert first is None or any(
                place != first._replace(position=first.position + i)
                for i, place in enumerate(others, start=1)
            ), f"prompt[{at}:{at + SPAN}] stands at {first} and was not found"

    def findable(self, namespace, gram, max_depth):
        """The place of a gram that a match must find: its newest one, if nothing hides it."""
        places = self.history.get((namespace, *gram))
        if not places:
            return None
        newest = places[-1]
        known = self.live.get(newest.segment)
        hidden = (
            known is None
            or newest.depth > max_depth
            or newest.depth > min(place.depth for place in places)
            or sum(place.segment == newest.segment for place in places) > 1
            or not known.start <= newest.position <= known.stop - GRAM
        )
        return None if hidden else newest

    def prompts(self):
        """Stretches of live paths, moved, cut and with text between them."""
        paths = [np.array(known.path, np.int32) for known in self.live.values()]
        sources = [texts(max_parts=2), fresh(20)]
        if paths:
            slices = st.tuples(st.sampled_from(paths), st.integers(0, 40), st.integers(0, 40))
            sources += [slices.map(lambda s: s[0][s[1] : len(s[0]) - s[2]])] * 2
        return st.lists(st.one_of(sources), min_size=1, max_size=5).map(np.concatenate)

    def snapshot(self):
        tree = self.tree
        held = [(s.id, s.tokens.tolist(), dict(s.pins)) for s in map(tree.segment, self.live)]
        entries = sorted(zip(*(part.tolist() for part in tree._index.items()), strict=True))
        stamps = [tree.stamp(space) for space in NAMESPACES]
        return stamps, tree.num_tokens, tree.num_segments, tree.num_pins, held, entries

    def pin(self, run, data):
        """Pin a run or, as a plan does, a part of it."""
        a, b = sorted(data.draw(st.tuples(*[st.integers(run.dst_start, run.dst_stop)] * 2)))
        if a < b:
            run = run.cut(a, b)
        pin = self.tree.pin(run)
        owner = self.owner(run.source, run.src_stop - 1)
        assert (pin.owner.id, pin.stop) == (owner, run.src_stop)
        tokens = self.live[run.source].tokens(run.src_start, run.src_stop)
        self.pinned.append((run, owner, tokens, pin))

    def owner(self, segment, position):
        """The segment that holds a position of a path."""
        while position < self.live[segment].start:
            segment = self.live[segment].parent
        return segment

    @precondition(lambda self: self.pinned)
    @rule(data=st.data())
    def unpin(self, data):
        i = data.draw(st.integers(0, len(self.pinned) - 1))
        *_, pin = self.pinned.pop(i)
        self.tree.unpin(pin)
        if all(pin[1:] != other[1:] or pin.owner is not other.owner for *_, other in self.pinned):
            with pytest.raises(TreeError, match="nothing is pinned"):
                self.tree.unpin(pin)

    # ---- what always holds --------------------------------------------------------------

    @invariant()
    def the_tree_holds_its_own_invariants(self):
        self.tree.check()

    @invariant()
    def the_tree_holds_what_the_model_holds(self):
        tree = self.tree
        assert tree.num_segments == len(self.live)
        assert tree.num_tokens == sum(known.stop - known.start for known in self.live.values())
        for key, known in self.live.items():
            assert tree.path_tokens(key, known.root, known.stop).tolist() == known.path

    @invariant()
    def what_is_pinned_is_alive(self):
        assert self.tree.num_pins == len(self.pinned)
        for run, owner, tokens, _ in self.pinned:
            assert self.live[owner].tokens(run.src_start, run.src_stop) == tokens


TreeMachine.TestCase.settings = settings(stateful_step_count=25)
test_any_history_agrees_with_the_model = TreeMachine.TestCase


class LaterMachine(TreeMachine):
    """The same laws where the index is filled only when something is looked up."""

    @initialize()
    def start(self):
        self.tree = FuzzyTree(later=True)
        self.forget()

    @rule()
    def settle(self):
        self.tree.settle()

    @invariant()
    def the_tree_holds_its_own_invariants(self):
        """Only at the end: a check fills the index."""

    def snapshot(self):
        return super().snapshot()[:-1]  # a lookup fills the index

    def teardown(self):
        self.tree.check()


LaterMachine.TestCase.settings = settings(stateful_step_count=25)
test_any_history_agrees_with_the_model_later = LaterMachine.TestCase


def test_an_index_filled_later_waits_for_a_lookup_and_is_not_kept_waiting_for_ever(monkeypatch):
    monkeypatch.setattr(tree_module, "MOST_UNINDEXED", 3)
    tree, text = FuzzyTree(later=True), np.arange(1, 200, dtype=np.int32)
    tree.insert("n", text)
    assert not tree._index.items()[0].size
    assert [run.length for run in tree.match("n", text)] == [199]
    assert tree._index.items()[0].size
    before = tree._index.items()[0].size
    for i in range(3):  # the third is one too many
        assert tree._index.items()[0].size == before
        tree.insert("n", text + 1000 * (i + 1))
    assert tree._index.items()[0].size > before


# ---- scenarios --------------------------------------------------------------------------

TEXT = random_tokens(1, 1500)
PREFACE, REST = random_tokens(2, 300), random_tokens(3, 200)


def tree_of(*segments, namespace=None):
    """A tree that holds one path of the segments, and the ids of these."""
    tree, ids, start = FuzzyTree(), [], 0
    for tokens in segments:
        parent = ids[-1] if ids else None
        ids.append(tree.insert(namespace, tokens, start=start, parent=parent).id)
        start += len(tokens)
    return tree, ids


def assert_equal_tokens(tree, prompt):
    runs = tree.match(None, prompt)
    assert runs
    for run in runs:
        cached = tree.path_tokens(run.source, run.src_start, run.src_stop)
        assert cached.tolist() == prompt[run.dst_start : run.dst_stop].tolist()


def test_a_text_inserted_once_is_found_whole_wherever_it_stands():
    tree, (home,) = tree_of(TEXT)
    for before in (0, 1, 15, 16, 300):
        prompt = np.concatenate([PREFACE[:before], TEXT, REST])
        join = Join.SEAM if before in (0, 300) else Join.EDIT
        assert tree.match(None, prompt) == (Run(home, 0, before, len(TEXT), join=join),)


def test_spans_side_by_side_are_each_found():
    tree, (home,) = tree_of(TEXT)
    for first in range(100):
        for second in (first + 200, first + 203):
            spans = [TEXT[at : at + SPAN] for at in (second, first)]
            assert tree.match(None, np.concatenate(spans)) == (
                Run(home, second, 0, SPAN),
                Run(home, first, SPAN, SPAN),
            )


def test_a_part_of_a_text_is_found_to_its_last_token():
    tree, (home,) = tree_of(TEXT)
    for start, stop in ((0, SPAN), (7, 7 + SPAN), (700, 999), (len(TEXT) - SPAN, len(TEXT))):
        prompt = np.concatenate([PREFACE, TEXT[start:stop], REST])
        assert tree.match(None, prompt) == (Run(home, start, len(PREFACE), stop - start),)


@pytest.mark.parametrize(
    ("at", "gone", "new"),
    [
        (700, 0, 1),
        (700, 0, 40),
        (700, 0, 2000),
        (700, 1, 0),
        (700, 40, 0),
        (700, 1, 1),
        (700, 40, 5),
    ],
)
def test_an_edit_leaves_two_runs_and_the_second_says_so(at, gone, new):
    tree, (home,) = tree_of(TEXT)
    prompt = np.concatenate([PREFACE, TEXT[:at], random_tokens(9, new), TEXT[at + gone :]])
    second = len(PREFACE) + at + new
    assert tree.match(None, prompt) == (
        Run(home, 0, len(PREFACE), at),
        Run(home, at + gone, second, len(TEXT) - at - gone, join=Join.EDIT),
    )


@pytest.mark.parametrize(("gone", "new"), [(1, 0), (40, 0), (0, 1), (0, 2000), (40, 5), (1, 1)])
def test_behind_an_exact_prefix_a_run_is_joined_as_if_the_prefix_were_a_run(gone, new):
    tree, _ = tree_of(TEXT)
    prompt = np.concatenate([TEXT[:700], random_tokens(9, new), TEXT[700 + gone :]])
    assert tree.match(None, prompt, start=700) == tree.match(None, prompt)[1:]
    # an insertion may begin as the text behind it does: then the prefix ends in it
    echoed = np.concatenate([TEXT[:706], random_tokens(9, 30), TEXT[700:]])
    (run,) = tree.match(None, echoed, start=706)
    assert (run.src_start, run.join) == (700, Join.EDIT)


def test_text_that_goes_on_behind_a_prefix_cut_at_a_page_is_not_edited():
    tree, _ = tree_of(TEXT)
    prompt = np.concatenate([TEXT[:750], random_tokens(9, 40)])
    assert tree.match(None, prompt, start=704) == (Run(1, 704, 704, 46),)


def test_behind_a_prefix_in_text_computed_behind_reuse_a_run_is_an_edit_too():
    tree = FuzzyTree()
    low = tree.insert(None, TEXT[400:900], start=400, depth=1).id
    # what stood before it is not known to the tree: at 420 too little is to tell
    for start, join in ((600, Join.EDIT), (420, Join.SEAM)):
        prompt = np.concatenate([TEXT[:start], TEXT[start + 10 : 900]])
        (run,) = tree.match(None, prompt, start=start, max_depth=1)
        assert (run.source, run.src_start, run.join) == (low, start + 10, join)


def test_behind_a_prefix_of_other_text_a_run_is_a_seam():
    tree, _ = tree_of(TEXT)
    other = np.concatenate([random_tokens(8, 700), TEXT[700:]])
    jump = np.concatenate([TEXT[:300], TEXT[1200:]])
    for prompt, start in ((other, 700), (jump, 300)):
        assert tree.match(None, prompt, start=start)[0].join is Join.SEAM


@pytest.mark.parametrize("prefix", [0, 1, SPAN - 1])
def test_a_short_front_that_was_replaced_is_an_edit(prefix):
    """A clock in front of all: nothing tells a run behind it from text that goes on."""
    for was, now, join in ((20, 25, Join.EDIT), (64, 64, Join.EDIT), (65, 30, Join.SEAM),
                           (30, 65, Join.SEAM), (20, 300, Join.SEAM)):  # fmt: skip
        tree = FuzzyTree()
        tree.insert(None, np.concatenate([TEXT[:prefix], PREFACE[: was - prefix], TEXT[100:]]))
        prompt = np.concatenate([TEXT[:prefix], random_tokens(9, now - prefix), TEXT[100:]])
        (run,) = tree.match(None, prompt, start=prefix)
        assert (run.src_start, run.dst_start, run.join) == (was, now, join)


def test_what_jumps_far_ahead_or_back_is_a_seam():
    tree, (home,) = tree_of(TEXT)
    ahead = tree.match(None, np.concatenate([TEXT[:100], TEXT[1200:]]))
    back = tree.match(None, np.concatenate([TEXT[1200:], TEXT[:100]]))
    assert ahead == (Run(home, 0, 0, 100), Run(home, 1200, 100, 300))
    assert back == (Run(home, 1200, 0, 300), Run(home, 0, 300, 100))


def test_equal_text_too_short_for_a_fingerprint_is_aligned_between_edits():
    tree, (home,) = tree_of(TEXT)
    prompt = TEXT.copy()
    prompt[[700, 712]] = 60_000
    assert tree.match(None, prompt) == (
        Run(home, 0, 0, 700),
        Run(home, 701, 701, 11, join=Join.EDIT),
        Run(home, 713, 713, len(TEXT) - 713, join=Join.EDIT),
    )
    assert len(tree.match(None, prompt, tolerance=0.0)) == 2
    assert tree.match(None, np.insert(prompt, 700, 60_001)) == (
        Run(home, 0, 0, 700),
        Run(home, 701, 702, 11, join=Join.EDIT),
        Run(home, 713, 714, len(TEXT) - 713, join=Join.EDIT),
    )


@pytest.mark.parametrize("borders", [(500,), (500, 516, 1000), tuple(range(10, 1500, 10))])
def test_a_run_across_segments_is_one_run(borders):
    tree, ids = tree_of(*np.split(TEXT, borders))
    prompt = np.concatenate([PREFACE, TEXT, REST])
    (run,) = tree.match(None, prompt)
    assert run.join is Join.SEAM
    assert (run.src_start, run.dst_start) == (0, len(PREFACE))
    assert len(TEXT) - run.length < SPAN  # a last bit behind a border may be too short to count
    assert {seg.id for seg, _, _ in tree.pieces(run)} <= set(ids)


def test_every_window_of_a_path_is_indexed_wherever_its_borders_are():
    whole, _ = tree_of(TEXT[:200])
    for border in range(150, 190):
        split, _ = tree_of(TEXT[:border], TEXT[border:200])
        assert set(split._index.items()[0].tolist()) == set(whole._index.items()[0].tolist())


@pytest.mark.parametrize("gone", [1, 3, 7, 8, 12])
def test_text_deleted_before_a_border_is_not_taken_for_equal(gone):
    for border in range(150, 190):
        tree, ids = tree_of(TEXT[:border], TEXT[border:300])
        prompt = np.concatenate([TEXT[: border - gone], TEXT[border:300]])
        assert tree.match(None, prompt) == (
            Run(ids[0], 0, 0, border - gone),
            Run(ids[1], border, border - gone, 300 - border, join=Join.EDIT),
        )
        for skip in range(border - 20, border - gone):
            assert_equal_tokens(tree, prompt[skip:])


@pytest.mark.parametrize("gone", [1, 3, 7, 8, 12])
def test_text_deleted_behind_a_border_is_not_taken_for_equal(gone):
    for border in range(150, 190):
        tree, ids = tree_of(TEXT[:border], TEXT[border:300])
        prompt = np.concatenate([TEXT[:border], TEXT[border + gone : 300]])
        assert tree.match(None, prompt) == (
            Run(ids[0], 0, 0, border),
            Run(ids[1], border + gone, border, 300 - border - gone, join=Join.EDIT),
        )
        for skip in range(border - 20, border):
            assert_equal_tokens(tree, prompt[skip:])


def test_text_of_another_path_is_a_seam_even_where_positions_go_on():
    tree, (left,) = tree_of(TEXT[:500])
    right = tree.insert(None, REST, start=600).id
    prompt = np.concatenate([TEXT[:500], REST])
    assert tree.match(None, prompt) == (Run(left, 0, 0, 500), Run(right, 600, 500, 200))


def test_branches_of_one_text_are_each_found_with_their_own_past():
    tree, (trunk,) = tree_of(TEXT[:500])
    left = tree.insert(None, TEXT[600:900], start=200, parent=trunk).id
    right = tree.insert(None, TEXT[1000:1300], start=200, parent=trunk).id
    for child, own in ((left, TEXT[600:900]), (right, TEXT[1000:1300])):
        (run,) = tree.match(None, np.concatenate([PREFACE, TEXT[:200], own, REST]))
        assert run == Run(child, 0, len(PREFACE), 500)


def test_namespaces_never_see_each_other():
    tree, _ = tree_of(TEXT, namespace="a")
    assert tree.match("b", TEXT) == ()
    tree.insert("b", REST)
    for other in ("b", None, ("a",), "A"):
        assert tree.match(other, TEXT) == ()
    assert len(tree.match("a", TEXT)) == 1


def test_namespaces_that_look_alike_never_see_each_other():
    class Name:
        def __repr__(self):
            return "name"

    one, other = Name(), Name()
    tree, _ = tree_of(TEXT, namespace=one)
    tree.insert(other, REST)
    assert tree.match(other, TEXT) == ()
    assert len(tree.match(one, TEXT)) == 1


def test_a_deeper_copy_does_not_hide_a_shallower_one():
    tree = FuzzyTree()
    exact = tree.insert(None, TEXT).id
    deeper = tree.insert(None, TEXT, start=7, depth=1).id
    for max_depth in (0, 1):
        assert [run.source for run in tree.match(None, TEXT, max_depth=max_depth)] == [exact]
    tree.trim(exact, 0)
    again = tree.insert(None, TEXT, start=9, depth=1).id
    assert tree.match(None, TEXT) == ()
    assert [run.source for run in tree.match(None, TEXT, max_depth=1)] == [again] != [deeper]


def test_of_equal_copies_the_newest_serves_and_outlives_the_others():
    tree = FuzzyTree()
    copies = [tree.insert(None, TEXT, start=i).id for i in (1, 2, 3)]
    for gone in copies[:2]:
        assert tree.match(None, TEXT) == (Run(copies[2], 3, 0, len(TEXT), join=Join.EDIT),)
        tree.trim(gone, tree.segment(gone).start)
    assert tree.match(None, TEXT) == (Run(copies[2], 3, 0, len(TEXT), join=Join.EDIT),)


def test_of_equal_copies_the_one_at_the_same_position_serves():
    tree = FuzzyTree()
    copies = [tree.insert(None, TEXT, start=i).id for i in (3, 0, 2)]
    assert tree.match(None, TEXT) == (Run(copies[1], 0, 0, len(TEXT)),)


def test_the_source_behind_more_of_the_prompts_own_text_serves():
    tree = FuzzyTree()
    before, text = TEXT[:40], TEXT[400:700]
    alike = tree.insert(None, np.concatenate([TEXT[900:950], before[-10:], text])).id
    tree.insert(None, np.concatenate([TEXT[1000:1060], text]))
    tree.insert(None, np.concatenate([TEXT[1100:1150], before[-3:], text]))
    prompt = np.concatenate([before, text])
    (run,) = tree.match(None, prompt, start=40)
    assert (run.source, run.dst_start, run.length) == (alike, 40, 300)


def test_few_long_runs_are_better_than_many_short_ones():
    """A short run from the left must not cut up a longer one that begins a little later."""
    tree = FuzzyTree()
    tree.insert(None, np.concatenate([TEXT[:30], random_tokens(7, 50)]))
    whole = tree.insert(None, np.concatenate([random_tokens(8, 50), TEXT[5:400]])).id
    runs = tree.match(None, TEXT[:400])
    assert [(run.dst_start, run.dst_stop) for run in runs if run.source == whole] == [(5, 400)] or [
        (run.dst_start, run.dst_stop) for run in runs
    ] == [(0, 30), (30, 400)]
    inner = tree.insert(None, np.concatenate([random_tokens(9, 50), TEXT[20:50]])).id
    assert inner not in [run.source for run in tree.match(None, TEXT[5:400])]


def test_text_goes_on_into_what_hangs_on_it():
    """A piece behind a border is found however short it is."""
    tree, (home, tail) = tree_of(TEXT[:500], TEXT[500:505])
    assert tree.match(None, TEXT[300:505]) == (Run(tail, 300, 0, 205),)
    other = np.concatenate([TEXT[300:500], [7, 8, 9]]).astype(np.int32)
    assert tree.match(None, other) == (Run(home, 300, 0, 200),)
    tree.trim(tail, 500)
    assert tree.match(None, TEXT[300:505]) == (Run(home, 300, 0, 200),)


def test_a_span_that_began_in_the_prefix_counts_behind_it():
    tree, (home,) = tree_of(TEXT[100:400])
    prompt = TEXT[100:120]
    (run,) = tree.match(None, prompt, start=9)
    assert (run.dst_start, run.dst_stop, run.src_start) == (9, 20, 9)
    assert run.source == home


def test_the_dead_are_not_found():
    tree, (home, child) = tree_of(TEXT[:1000], TEXT[1000:])
    tree.trim(child, 1000)
    assert tree.match(None, TEXT) == (Run(home, 0, 0, 1000),)
    tree.trim(home, 400)
    assert tree.match(None, TEXT) == (Run(home, 0, 0, 400),)
    tree.trim(home, 0)
    assert tree.match(None, TEXT) == ()
    assert (tree.num_segments, tree.num_tokens) == (0, 0)


def test_a_part_of_a_run_stays_pinned_when_the_segment_it_was_found_in_goes():
    tree, (trunk, tail) = tree_of(TEXT[:500], TEXT[500:540])
    (run,) = tree.match(None, TEXT[:540])
    part = run.cut(100, 450)  # as a plan cuts the end of the prompt off
    assert part.source == tail
    pin = tree.pin(part)
    tree.trim(tail, 500)
    tree.trim(trunk, 450)
    with pytest.raises(TreeError):
        tree.trim(trunk, 449)
    tree.unpin(pin)
    assert tree.num_pins == 0
    tree.trim(trunk, 449)


@pytest.mark.parametrize("buckets", [1, 16, 4096])
def test_texts_that_share_every_hash_are_told_apart_by_their_tokens(buckets, monkeypatch):
    """A hash says where to look: what is found is compared, token by token, in its namespace."""
    hashes = fingerprints.gram_hashes

    def few(tokens, *, seed=0):
        return hashes(tokens) % np.uint64(buckets) + np.uint64(1)  # of any namespace, too

    monkeypatch.setattr(fingerprints, "gram_hashes", few)
    tree = FuzzyTree()
    for i, namespace in enumerate((None, "a", None, "b", "a")):
        tree.insert(namespace, random_tokens(i, 400))
    found = dict.fromkeys((None, "a", "b"), 0)
    for namespace in found:
        for i in range(5):
            text = random_tokens(i, 400)
            prompt = np.concatenate([random_tokens(50 + i, 30), text[100:], text[:90]])
            for run in tree.match(namespace, prompt):
                assert tree.segment(run.source).namespace == namespace
                cached = tree.path_tokens(run.source, run.src_start, run.src_stop)
                assert cached.tolist() == prompt[run.dst_start : run.dst_stop].tolist()
                found[namespace] += run.length
    if buckets == 4096:
        assert min(found.values()) > 250, found


def test_what_was_trimmed_since_the_match_cannot_be_pinned():
    tree, (home,) = tree_of(TEXT)
    (run,) = tree.match(None, TEXT)
    tree.trim(home, 1499)
    with pytest.raises(TreeError, match="past the last position alive, 1499"):
        tree.pin(run)
    assert tree.num_pins == 0


def test_a_pin_is_taken_back_once():
    tree, _ = tree_of(TEXT)
    (run,) = tree.match(None, TEXT)
    pin = tree.pin(run)
    tree.unpin(pin)
    with pytest.raises(TreeError, match="nothing is pinned up to 1500"):
        tree.unpin(pin)
    pin = tree.pin(run)
    tree.clear()
    tree.insert(None, TEXT)
    with pytest.raises(TreeError, match="nothing is pinned up to 1500"):
        tree.unpin(pin)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"tokens": TEXT[:0]}, "at least 1 token, got 0"),
        ({"start": -1}, "start must be at least 0, got -1"),
        ({"start": 0, "parent": 1}, r"start must be in \[1, 1500\], got 0"),
        ({"start": 1501, "parent": 1}, r"start must be in \[1, 1500\], got 1501"),
        ({"start": 9, "parent": 1, "depth": 1}, "depth must be the parent's 0, got 1"),
        ({"start": 9, "parent": 1, "namespace": "b"}, "namespace 'b' is not that of the parent"),
    ],
)
def test_text_that_hangs_nowhere_is_refused_and_changes_nothing(kwargs, message):
    tree, (home,) = tree_of(TEXT)
    assert home == 1
    with pytest.raises(ValueError, match=message):
        tree.insert(kwargs.pop("namespace", None), **{"tokens": REST, **kwargs})
    tree.check()
    assert (tree.num_segments, tree.num_tokens) == (1, len(TEXT))


def test_a_trim_outside_the_segment_is_refused():
    tree, (home, child) = tree_of(TEXT[:500], TEXT[500:])
    for stop in (499, 1501):
        with pytest.raises(ValueError, match=rf"in \[500, 1500\], got {stop}"):
            tree.trim(child, stop)
    with pytest.raises(KeyError):
        tree.trim(child + 1, 0)
    assert tree.match(None, TEXT) == (Run(child, 0, 0, 1500),)
    assert home != child


def test_a_flush_forgets_everything():
    tree, _ = tree_of(TEXT)
    stamp, size = tree.stamp(None), tree.nbytes
    tree.clear()
    tree.check()
    assert tree.match(None, TEXT) == ()
    assert tree.nbytes < size
    assert tree.stamp(None) == 0
    tree.insert(None, TEXT)
    assert tree.stamp(None) > stamp


def test_a_stamp_changes_with_its_own_namespace_only():
    tree = FuzzyTree()
    home = tree.insert("a", TEXT[:300])
    stamps = [tree.stamp("a")]
    tree.insert("b", TEXT[:300])
    assert tree.stamp("a") == stamps[0] != tree.stamp("b")
    tree.insert("a", TEXT[300:400])
    stamps.append(tree.stamp("a"))
    tree.trim(home.id, 100)
    stamps.append(tree.stamp("a"))
    tree.trim(home.id, 0)
    stamps.append(tree.stamp("a"))
    assert len(set(stamps)) == 4
    other = tree.insert("c", TEXT[:50])
    tree.trim(other.id, 0)
    tree.insert("c", TEXT[:50])  # gone and back: not what it was
    assert tree.stamp("c") > stamps[-1]
    assert tree.stamp("never") == 0


@pytest.mark.parametrize("period", [1, 2, 3, 8, 9, 20])
def test_a_prompt_of_few_tokens_over_and_over_gives_few_runs_and_little_work(monkeypatch, period):
    compared = []
    compare = segments.common_prefix

    def counted(a, b):
        compared.append(compare(a, b))
        return compared[-1]

    monkeypatch.setattr(segments, "common_prefix", counted)
    cached = np.resize(np.arange(period, dtype=np.int32), 8192)
    tree, _ = tree_of(cached)
    runs = tree.match(None, np.concatenate([PREFACE, cached]))
    assert len(runs) <= 2
    assert sum(run.length for run in runs) > 8192 - period
    longer = tree.match(None, np.resize(cached, 4 * 8192))
    assert len(longer) <= 2 * 4
    assert len(compared) <= 32


class Counting(np.ndarray):
    """Counts the elements that are compared."""

    compared = 0

    def __ne__(self, other):
        Counting.compared += len(self)
        return np.asarray(self) != np.asarray(other)


@pytest.mark.parametrize("equal", [0, 1, 63, 64, 65, 1000, 100_000])
def test_comparing_costs_what_is_equal_and_not_what_could_have_been(equal):
    a, b = (random_tokens(1, 100_000).view(Counting) for _ in range(2))
    b[equal:] += 1
    Counting.compared = 0
    assert segments.common_prefix(a, b) == equal
    assert Counting.compared <= 8 * equal + 64


# ---- chunks that are stored already -----------------------------------------------------


def test_chunks_are_unknown_until_a_live_segment_stores_them():
    tree = FuzzyTree()
    (stretch,) = tree.new_chunks(None, TEXT, depth=1)
    assert [stretch[0].start, stretch[-1].stop] == [0, len(TEXT)]
    middle = stretch[2]
    home = tree.insert(None, TEXT[middle.start : middle.stop], depth=1)
    tree.remember_chunk(middle, home)
    left, right = tree.new_chunks(None, TEXT, depth=1)
    assert [*left, middle, *right] == stretch
    assert tree.new_chunks(None, TEXT, depth=0) == [stretch]
    assert len(tree.new_chunks("b", TEXT, depth=1)) == 1
    tree.trim(home.id, 30)  # its head is no chunk
    assert tree.new_chunks(None, TEXT, depth=1) == [stretch]
    tree.trim(home.id, 0)
    assert tree.new_chunks(None, TEXT, depth=1) == [stretch]


def test_chunks_that_repeat_in_one_text_are_given_once():
    tree = FuzzyTree()
    text = np.tile(TEXT[:600], 5)
    keys = [c.key for part in tree.new_chunks(None, text, depth=1) for c in part]
    assert len(keys) == len(set(keys)) < 12


def test_chunks_of_dead_segments_are_not_remembered_for_ever():
    tree = FuzzyTree()
    for i in range(6000):
        segment = tree.insert(None, TEXT[:1])
        tree.remember_chunk(Chunk(0, 1, i), segment)
        tree.trim(segment.id, 0)
    assert len(tree._chunk_home) <= 4096 + 1


def test_what_is_gone_costs_nothing():
    """Namespaces and segments come and go for ever; users choose the names of namespaces."""
    tree = FuzzyTree()
    for round_ in range(9000):
        segment = tree.insert(("user", round_), TEXT[: 4 + 40 * (round_ % 30 == 0)])
        tree.trim(segment.id, 0)
    tree.check()
    assert tree._namespaces == {}
    assert len(tree._free_spaces) == 1
    assert len(tree._stops) <= 8192
    assert tree._index.nbytes <= 2**17


def test_an_id_that_is_used_again_brings_nothing_back():
    tree = FuzzyTree()
    old = tree.insert("a", TEXT[:200])
    for chunk in [c for stretch in tree.new_chunks("a", TEXT[:200], depth=0) for c in stretch]:
        tree.remember_chunk(chunk, old)
    tree.trim(old.id, 0)
    tree._index.compact()
    new = tree.insert("b", TEXT[600:900])
    assert new.id == old.id
    tree.check()
    assert tree.match("a", TEXT[:200]) == tree.match("b", TEXT[:200]) == ()
    assert tree.new_chunks("a", TEXT[:200], depth=0)
    (run,) = tree.match("b", TEXT[600:900])
    assert run.length == 300


# ---- text behind its own old text ----------------------------------------------------------


def test_a_prompt_that_goes_on_knows_its_own_text():
    """Inexact text is at home where all that stood before it stands before it again."""
    tree = FuzzyTree(secret=5)
    before, own, more = TEXT[:300], TEXT[300:500], TEXT[500:600]
    tree.insert(None, own, start=300, depth=1, before=before)
    (run,) = tree.match(None, TEXT[:600], max_depth=1)
    assert (run.dst_start, run.length, run.join) == (300, 200, Join.SAME)
    other = before.copy()
    other[7] += 1
    moved = np.concatenate([before[1:], own, more])
    edited = np.concatenate([before, own[:90], [7], own[91:], more]).astype(np.int32)
    for prompt in (np.concatenate([other, own, more]), moved):
        (run,) = tree.match(None, prompt, max_depth=1)
        assert run.join is Join.ON  # what stood just before it stands there still
    elsewhere = np.concatenate([before[:280], own, more])
    (run,) = tree.match(None, elsewhere, max_depth=1)
    assert run.join is Join.SEAM
    first, second = tree.match(None, edited, max_depth=1)
    assert (first.join, second.join) == (Join.SAME, Join.EDIT)


@pytest.mark.parametrize("between", [0, 30, 80, 300])
def test_moved_texts_stay_moved_whatever_stands_between_them(between):
    """The same words, a template's, before and after each text say nothing of where it stood."""
    words = random_tokens(50, between)
    first, second, third, fourth = (random_tokens(51 + i, 300) for i in range(4))
    tree = FuzzyTree()
    tree.insert(None, np.concatenate([PREFACE, first, words, second]))
    tree.insert(None, np.concatenate([third, words, fourth]))
    prompt = np.concatenate([random_tokens(60, 200), first, words, fourth])
    assert [run.join for run in tree.match(None, prompt)] == [Join.SEAM] * 2
    # Nor where all before them is an exact prefix, or was edited above the last that was moved.
    stem = np.concatenate([PREFACE, first, words])
    (run,) = tree.match(None, np.concatenate([stem, fourth]), start=len(stem))
    assert (run.src_start, run.join) == (len(third) + between, Join.SEAM)
    edited = np.concatenate([PREFACE[5:], first, words, fourth])
    assert tree.match(None, edited)[-1].join is Join.SEAM


@pytest.mark.parametrize("at", [70, 400])
def test_text_goes_on_where_a_run_begins_in_the_middle_of_its_path(at):
    """Newer text of the same conversation covers its beginning, older its end."""
    tree = FuzzyTree()
    front = [random_tokens(60 + i, 20) for i in range(6)]  # a clock's
    home = tree.insert(None, TEXT[:900], start=20, depth=1, before=front[0]).id
    for i in range(1, 5):  # as many as the index keeps of a gram
        tree.insert(None, np.concatenate([front[i], TEXT[:at], random_tokens(70 + i, 40)]))
    prompt = np.concatenate([front[5], TEXT[:900]])
    first, second = tree.match(None, prompt, max_depth=1)
    assert first.source != home == second.source
    assert (first.join, second.join) == (Join.EDIT, Join.ON)
    assert second.dst_start == 20 + at


def test_a_child_has_its_parents_context():
    tree = FuzzyTree()
    home = tree.insert(None, TEXT[300:400], start=300, depth=1, before=TEXT[:300]).id
    tree.insert(None, TEXT[400:500], start=400, parent=home, depth=1)
    (run,) = tree.match(None, TEXT[:500], max_depth=1, start=350)
    assert (run.dst_start, run.dst_stop, run.join) == (350, 500, Join.SAME)


def test_own_text_is_told_as_by_comparing_all_that_stood_before():
    """Many segments of several paths, edits anywhere: the law is a comparison of whole lists."""
    rng = np.random.default_rng(3)
    for _ in range(20):
        tree, stood = FuzzyTree(secret=2), {}
        for _ in range(3):
            path = TEXT[: int(rng.integers(300, 900))].copy()
            if rng.random() < 0.7:
                path[rng.integers(len(path))] += 1
            root = at = int(rng.integers(0, 120))
            parent = None
            while at < len(path):
                stop = min(at + int(rng.integers(20, 90)), len(path))
                seg = tree.insert(
                    None, path[at:stop], start=at, parent=parent, depth=1, before=path[:root]
                )
                parent, at = seg.id, stop
                stood[seg.id] = path
        prompt = TEXT[:900].copy()
        for _ in range(int(rng.integers(0, 3))):
            prompt[rng.integers(len(prompt))] += 1
        for run in tree.match(None, prompt, max_depth=1):
            before = stood[run.source][: run.src_start].tolist()
            same = run.shift == 0 and before == prompt[: run.dst_start].tolist()
            assert (run.join is Join.SAME) == same


def test_a_text_behind_many_short_finds_is_found():
    """Known phrases of 14 tokens, thousands of them, and a cached document at the end."""
    rng = np.random.default_rng(0)
    phrases = [random_tokens(1000 + i, 14) for i in range(60)]

    def boilerplate(length):
        parts = []
        while sum(map(len, parts)) < length:
            parts += [phrases[rng.integers(60)], rng.integers(0, 50000, 2).astype(np.int32)]
        return np.concatenate(parts)

    tree = FuzzyTree()
    tree.insert(None, boilerplate(3000))
    tree.insert(None, TEXT[:800])
    for front in (4000, 24000):
        prompt = np.concatenate([boilerplate(front), TEXT[:800]])
        assert max(run.length for run in tree.match(None, prompt)) >= 800


def test_text_without_a_context_is_never_at_home():
    tree, _ = tree_of(TEXT)
    (run,) = tree.match(None, TEXT)
    assert run.join is Join.SEAM


# ---- who is told of changes ------------------------------------------------------------------


@given(st.data())
def test_a_match_changes_only_for_prompts_that_hold_a_hash_that_was_told(
    data: st.DataObject,
) -> None:
    tree = FuzzyTree(secret=3)
    told: list[set[int]] = []
    tree.listener = lambda hashes: told.append(set(hashes.tolist()))
    prompts = data.draw(st.lists(texts(), min_size=1, max_size=4))
    alive: list[int] = []
    for _ in range(data.draw(st.integers(1, 8))):
        before = [tree.match(None, prompt, max_depth=1) for prompt in prompts]
        told.clear()
        if alive and data.draw(st.booleans()):
            segment = tree.segment(data.draw(st.sampled_from(alive)))
            # As caches evict: nothing that another segment goes on from.
            above = max((child.start for child in segment.children.values()), default=0)
            stop = data.draw(st.integers(max(segment.start, above), segment.stop))
            tree.trim(segment.id, stop)
            alive = [one for one in alive if one != segment.id or stop > segment.start]
        else:
            parent = data.draw(st.sampled_from([None, *alive]))
            start = 0 if parent is None else tree.segment(parent).stop
            depth = data.draw(st.integers(0, 1)) if parent is None else tree.segment(parent).depth
            new = tree.insert(None, data.draw(texts()), start=start, parent=parent, depth=depth)
            alive.append(new.id)
        (hashes,) = told
        for prompt, was in zip(prompts, before, strict=True):
            if tree.match(None, prompt, max_depth=1) != was:
                assert hashes & set(tree.marks(None, prompt).hashes.tolist())


def test_a_clear_is_told_and_marks_are_of_the_namespace() -> None:
    tree = FuzzyTree(secret=3)
    told: list[object] = []
    tree.listener = told.append
    tree.clear()
    assert told == [None]
    text = np.arange(100, dtype=np.int32)
    tree.insert("a", text)
    assert told[1].tolist() == tree.marks("a", text).hashes.tolist()
    assert not set(told[1].tolist()) & set(tree.marks("b", text).hashes.tolist())
