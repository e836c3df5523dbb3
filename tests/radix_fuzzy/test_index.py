"""The index equals a dict of short lists, however its keys collide and it is rebuilt."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare_sglang.radix_fuzzy.index import PLACES, FingerprintIndex

CAPACITY = 8
# Keys that fall on few slots of a table of any small size, and some that fall anywhere.
KEYS = st.one_of(
    st.builds(lambda home, i: home + 1024 * i, st.integers(1, 3), st.integers(0, 20)),
    st.integers(1, 2**64 - 1),
)
BATCH = st.lists(st.tuples(KEYS, st.integers(1, 2**64 - 1)), max_size=30)


def words(values):
    return np.array(values, np.uint64)


def everything(index):
    """Each key with its values, in the order in which a lookup gives them."""
    keys, _ = index.items()
    assert len(keys) == len(index)
    unique = np.unique(keys)
    which, values = index.find(unique)
    assert len(values) == len(keys)
    out = {key: [] for key in unique.tolist()}
    for key, value in zip(unique[which].tolist(), values.tolist(), strict=True):
        out[key].append(value)
    return out


def put(index, model, batch):
    """The law in plain lines: the newest value first, a few of each key."""
    index.put(words([k for k, _ in batch]), words([v for _, v in batch]))
    for key, value in dict(reversed(batch)).items():  # of equal keys in one batch the first counts
        model[key] = [value, *model.get(key, [])][:PLACES]


def immortal(values):
    return np.ones(len(values), bool)


@given(st.lists(st.tuples(BATCH, st.lists(KEYS, max_size=5)), max_size=12))
def test_without_deaths_it_is_a_dict_of_short_lists(batches):
    index, model = FingerprintIndex(immortal, capacity=CAPACITY), {}
    for batch, absent in batches:
        put(index, model, batch)
        assert everything(index) == model
        asked = [*model, *absent, *model]
        which, values = index.find(words(asked))
        expected = [(i, value) for i, key in enumerate(asked) for value in model.get(key, [])]
        assert list(zip(which.tolist(), values.tolist(), strict=True)) == expected


@given(st.lists(BATCH, max_size=12))
def test_better_values_stay_and_come_first(batches):
    index = FingerprintIndex(immortal, better=lambda old, new: old < new, capacity=CAPACITY)
    model = {}
    for batch in batches:
        put(index, {}, batch)
        for key, value in dict(reversed(batch)).items():
            model[key] = sorted([value, *model.get(key, [])])[:PLACES]
        assert everything(index) == model


@given(st.lists(BATCH, max_size=12), st.integers(2, 5), st.integers(0, 11))
def test_the_dead_give_way_and_the_living_stay(batches, modulus, when):
    """Every living value is found until it is the oldest of too many."""
    killed = False

    def alive(values):
        return values % np.uint64(modulus) != 0 if killed else immortal(values)

    index, model = FingerprintIndex(alive, capacity=CAPACITY), {}
    for i, batch in enumerate(batches):
        killed = killed or i >= when
        put(index, model, batch)
        held = everything(index)
        for key, values in model.items():
            living = [v for v in values if not killed or v % modulus]
            mine = [v for v in held.get(key, []) if not killed or v % modulus]
            assert set(living) <= set(mine)
    index.compact()
    assert all(not killed or v % modulus for values in everything(index).values() for v in values)


@given(st.lists(BATCH, min_size=1, max_size=30))
def test_the_dead_do_not_make_it_grow(batches):
    calls = []
    dead = FingerprintIndex(
        lambda values: np.zeros(len(values), bool),
        dropped=lambda: calls.append(1),
        capacity=CAPACITY,
    )
    for batch in batches:
        dead.put(words([k for k, _ in batch]), words([v for _, v in batch]))
        # a rebuild keeps none, so the table has room for the largest batch and no more
        assert dead.nbytes <= 16 * 2 * max(CAPACITY, 30 / 0.56)
    dead.compact()
    assert (len(dead), bool(calls)) == (0, True)


@pytest.mark.parametrize("capacity", [0, 3, -8])
def test_a_capacity_that_is_no_power_of_two_is_refused(capacity):
    with pytest.raises(ValueError, match=f"power of two, got {capacity}"):
        FingerprintIndex(immortal, capacity=capacity)


@pytest.mark.parametrize("num", [1, 1000])
def test_keys_that_all_want_one_slot_are_all_found(num):
    index = FingerprintIndex(immortal)
    keys = words([7 + (i << 32) for i in range(num)])
    index.put(keys, keys + np.uint64(1))
    which, values = index.find(keys)
    assert (which == np.arange(num)).all()
    assert (values == keys + np.uint64(1)).all()
    assert len(index.find(keys + np.uint64(1 << 60))[0]) == 0


def test_what_is_given_is_left_as_it_is():
    index = FingerprintIndex(immortal)
    keys, values = words([5, 6]), words([1, 2])
    for _ in range(3):
        index.put(keys, values)
        assert (keys.tolist(), values.tolist()) == ([5, 6], [1, 2])
        values = values + np.uint64(10)
        keys, values = keys.copy(), words([1, 2])


def test_nothing_in_is_nothing_out():
    index = FingerprintIndex(immortal)
    index.put(words([]), words([]))
    assert len(index) == 0
    assert len(index.find(words([]))[0]) == 0


def test_the_newest_living_values_of_a_key_are_kept_whatever_died():
    """Dead values on a chain are no places: the law of a dict, with deaths, in a crowded table."""
    rng = random.Random(1)
    for _ in range(200):
        dead, model, n = set(), {}, 1
        index = FingerprintIndex(
            lambda values, dead=dead: np.array([int(v) not in dead | {0} for v in values], bool),
            capacity=16,
        )
        for _ in range(30):
            batch = {rng.choice([1, 17, 33, 49, 2, 65]): 0 for _ in range(rng.randrange(1, 4))}
            for key in batch:
                batch[key], n = n, n + 1
            index.put(words(list(batch)), words(list(batch.values())))
            for key, value in batch.items():
                old = [v for v in model.get(key, []) if v not in dead]
                model[key] = [value, *old][:PLACES]
            dead |= {rng.randrange(1, n) for _ in range(rng.randrange(0, 3))}
            for key, values in model.items():
                found = set(index.find(words([key]))[1].tolist())
                assert {v for v in values if v not in dead} <= found
