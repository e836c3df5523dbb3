"""The book of waiting requests agrees with plain lists and sets, whatever is done to it."""

import copy
import sys

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvshare_sglang.policy.waiting import SAMPLE, Inverted, Waiting

words = st.lists(st.integers(0, 30).map(lambda i: 4 * i), max_size=12)


def array(hashes: list[int]) -> np.ndarray:
    return np.array(sorted(set(hashes)), np.uint64)


@given(st.lists(words, max_size=40), words, st.sets(st.integers(0, 39)))
def test_the_map_counts_what_each_number_holds(texts, asked, gone) -> None:
    it = Inverted()
    for number, text in enumerate(texts):
        it.add(number, array(text))
    want = [len({*text} & {*asked}) for text in texts]
    assert it.counts(array(asked), len(texts)).tolist() == want
    stay = [i for i in range(len(texts)) if i not in gone]
    new = np.full(len(texts), -1, np.int64)
    new[stay] = np.arange(len(stay))
    it.renumber(new)
    assert it.counts(array(asked), len(stay)).tolist() == [want[i] for i in stay]
    assert len(it) == sum(len({*texts[i]}) for i in stay)


def test_levels_stay_few() -> None:
    it = Inverted()
    for number in range(1000):
        it.add(number, np.arange(20, dtype=np.uint64) + np.uint64(7 * number))
    assert len(it) == 20_000
    assert len(it._levels) <= 12


class Book(RuleBasedStateMachine):
    """A second book that keeps everything in plain dicts, in order of arrival."""

    def __init__(self) -> None:
        super().__init__()
        self.it = Waiting()
        self.next = 0
        self.clock = 0
        self.plain: dict[int, dict] = {}
        self.computing: dict[int, set[int]] = {}

    @rule(tokens=st.integers(1, 5000), text=st.none() | words, twins=st.booleans())
    def come(self, tokens: int, text: list[int] | None, twins: bool) -> None:
        key, self.next = self.next, self.next + 1
        self.it.leave([])  # a round begins
        self.it.come([(key, tokens, tokens % 2)])
        self.plain[key] = {"cost": tokens, "tokens": tokens, "arrived": self.clock, "over": 0}
        self.plain[key] |= {"text": set(), "dirty": True, "known": False, "waited": 0}
        self.plain[key]["twins"] = twins and text is not None
        self.plain[key]["waits"] = False
        if text is not None:
            self.plain[key]["text"] = set(text)
            self.it.note_text(key, array(text))
            self.it.looked_up(key, cost=1 + tokens // 2, twins=twins)
            self.plain[key] |= {"cost": 1 + tokens // 2, "dirty": False, "known": True}

    def pick(self, index: int) -> int:
        return list(self.plain)[index % len(self.plain)]

    @precondition(lambda self: self.plain)
    @rule(index=st.integers(0, 99), cost=st.integers(1, 500), grouped=st.booleans())
    def let_in(self, index: int, cost: int, grouped: bool) -> None:
        key = self.pick(index)
        group = self.plain[key]["tokens"] % 2 if grouped else None
        most = self.it.let_in(key, cost, among=self.it.places(group))
        self.clock += cost
        del self.plain[key]
        for one in self.plain.values():
            one["waited"] += cost * one["waits"]
        older = [one for other, one in self.plain.items() if other < key]
        older = [one for one in older if group in (None, one["tokens"] % 2)]
        for one in older:
            one["over"] += cost
        assert most == max((one["over"] for one in older), default=0)

    @precondition(lambda self: self.plain)
    @rule(index=st.integers(0, 99))
    def leave(self, index: int) -> None:
        key = self.pick(index)
        self.it.leave([key, "never came"])
        del self.plain[key]

    @precondition(lambda self: self.plain)
    @rule(index=st.integers(0, 99), rows=st.integers(1, 50))
    def wait(self, index: int, rows: int) -> None:
        key = self.pick(index)
        self.it.patient_for(key, rows)
        self.plain[key]["waited"] += rows

    @rule(which=st.integers(0, 7))
    def wait_for_twins(self, which: int) -> None:
        some = [key for key in self.plain if which & (1 + key % 3)]
        self.it.wait([*some, "gone"])
        for key, one in self.plain.items():
            one["waits"] = key in some

    @rule(text=words, least=st.integers(1, 300))
    def ends(self, text: list[int], least: int) -> None:
        """Who waited for text of these hashes."""
        want = []
        for key, one in self.plain.items():
            tokens = len(one["text"] & {*text}) * (one["tokens"] / max(len(one["text"]), 1))
            want += [key] * (one["waits"] and int(tokens) >= least)
        assert list(self.it.that_wait_for(array(text), least)) == want

    @rule(text=words)
    def changed(self, text: list[int]) -> None:
        self.it.changed(array(text))
        for one in self.plain.values():
            one["dirty"] |= bool(one["text"] & {*text})
        for mine in self.computing.values():
            mine -= {*text}

    @rule(key=st.integers(1000, 1003), text=words)
    def computes(self, key: int, text: list[int]) -> None:
        self.it.computes(key, array(text))
        self.computing[key] = set(text)

    @rule(key=st.integers(1000, 1003))
    def computed(self, key: int) -> None:
        self.it.computed(key)
        self.computing.pop(key, None)

    @rule()
    def new_weights(self) -> None:
        self.it.forget_texts()
        self.computing.clear()
        for one in self.plain.values():
            one |= {"text": set(), "dirty": True, "known": False}

    @invariant()
    def agree(self) -> None:
        assert len(self.it) == len(self.plain)
        for key in self.plain:
            assert self.it.overtaken_at(self.it.place_of(key)) == self.plain[key]["over"]
        self.it = copy.deepcopy(self.it)
        self.it.leave([])
        queue = self.it.queue(bound=1000)
        mine = list(self.plain.values())
        assert list(self.it.keys) == list(self.plain)
        assert queue.cost.tolist() == [one["cost"] for one in mine]
        assert queue.tokens.tolist() == [one["tokens"] for one in mine]
        assert queue.age.tolist() == [self.clock - one["arrived"] for one in mine]
        assert queue.overtaken.tolist() == [one["over"] for one in mine]
        # Who could not reuse what others compute waits for no one.
        patience = [(1000 - one["waited"]) * one["twins"] for one in mine]
        assert queue.patience.tolist() == patience
        computed = set().union(*self.computing.values())
        for one, tokens in zip(mine, queue.shared.tolist(), strict=True):
            share = len(one["text"] & computed) / max(len(one["text"]), 1)
            assert abs(tokens - one["tokens"] * share) < 1
        assert list(self.it.dirty(range(len(mine)))) == [
            i for i, one in enumerate(mine) if one["dirty"]
        ]
        assert list(self.it.unknown) == [key for key, one in self.plain.items() if not one["known"]]


TestBook = Book.TestCase


def test_a_long_life_renumbers_and_forgets_nothing() -> None:
    it = Waiting()
    it.come([("old", 100, 0)])
    it.note_text("old", np.arange(40, dtype=np.uint64) * SAMPLE)
    it.looked_up("old", cost=100, twins=True)
    for i in range(6000):
        it.come([(i, 10, 0)])
        it.note_text(i, np.array([4 * i], np.uint64))
        it.leave([i])
    assert it._next_number < 6000
    assert len(it._map) < 5000
    it.wait(["old"])
    assert list(it.that_wait_for(np.arange(20, dtype=np.uint64) * SAMPLE, 50)) == ["old"]
    assert not list(it.that_wait_for(np.arange(20, dtype=np.uint64) * SAMPLE, 51))


def calls(num: int) -> int:
    """Function calls of a batch of so many from being let in to being through, others waiting."""
    it, count = Waiting(), 0
    text = [np.arange(4 * i, 4 * i + 4, dtype=np.uint64) * SAMPLE for i in range(num)]
    it.come((i, 60, 0) for i in range(2 * num))
    for i in range(2 * num):
        it.note_text(i, text[i % num])

    def counted(_frame: object, event: str, _arg: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(counted)
    try:
        for i in range(num):
            it.let_in(i, 60)
            it.computes(i, text[i])
        for i in range(num):
            it.changed(text[i])
        for i in range(num):
            it.computed(i)
        it.leave([])
    finally:
        sys.setprofile(None)
    return count


def test_a_batch_costs_what_its_requests_cost() -> None:
    assert calls(160) < 3 * calls(80)
