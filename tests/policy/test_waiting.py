"""The book of waiting requests agrees with plain lists and sets, whatever is done to it."""

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
        self.it.come([(key, tokens)])
        self.plain[key] = {"cost": tokens, "tokens": tokens, "arrived": self.clock, "over": 0}
        self.plain[key] |= {"text": set(), "dirty": True, "known": False, "waited": 0}
        self.plain[key]["twins"] = twins and text is not None
        if text is not None:
            self.plain[key]["text"] = set(text)
            self.it.note_text(key, array(text))
            self.it.looked_up(key, cost=1 + tokens // 2, twins=twins)
            self.plain[key] |= {"cost": 1 + tokens // 2, "dirty": False, "known": True}

    def pick(self, index: int) -> int:
        return list(self.plain)[index % len(self.plain)]

    @precondition(lambda self: self.plain)
    @rule(index=st.integers(0, 99), cost=st.integers(1, 500))
    def let_in(self, index: int, cost: int) -> None:
        key = self.pick(index)
        most = self.it.let_in(key, cost)
        self.clock += cost
        del self.plain[key]
        older = [one for other, one in self.plain.items() if other < key]
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
        self.it.wait_for_twins([self.it.place_of(key)], rows)
        self.plain[key]["waited"] += rows

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
    it.come([("old", 100)])
    it.note_text("old", np.arange(40, dtype=np.uint64) * SAMPLE)
    it.looked_up("old", cost=100, twins=True)
    for i in range(6000):
        it.come([(i, 10)])
        it.note_text(i, np.array([4 * i], np.uint64))
        it.leave([i])
    assert it._next_number < 6000
    assert len(it._map) < 5000
    assert it.tokens_of(np.arange(20, dtype=np.uint64) * SAMPLE).tolist() == [50]
