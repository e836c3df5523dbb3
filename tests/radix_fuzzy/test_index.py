"""The fingerprint index equals a dict, however its keys collide and whenever it is rebuilt."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare_sglang.radix_fuzzy.index import FingerprintIndex

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
    keys, values = index.items()
    assert len(keys) == len(set(keys.tolist())) == len(index)
    return dict(zip(keys.tolist(), values.tolist(), strict=True))


@given(st.lists(st.tuples(BATCH, st.lists(KEYS, max_size=5)), max_size=12))
def test_without_deaths_it_is_a_dict(batches):
    index = FingerprintIndex(lambda values: np.ones(len(values), bool), capacity=CAPACITY)
    model = {}
    for batch, absent in batches:
        index.put(words([k for k, _ in batch]), words([v for _, v in batch]))
        model.update(dict(reversed(batch)))  # of equal keys in one batch the first wins
        assert everything(index) == model
        asked = [*model, *absent, *model]
        assert index.get(words(asked)).tolist() == [model.get(key, 0) for key in asked]


@given(st.lists(BATCH, max_size=12), st.integers(2, 5))
def test_a_rebuild_drops_the_dead_and_nothing_else(batches, modulus):
    def alive(values):
        return values % np.uint64(modulus) != 0

    index = FingerprintIndex(alive, capacity=CAPACITY)
    model = {}
    for batch in batches:
        index.put(words([k for k, _ in batch]), words([v for _, v in batch]))
        model.update(dict(reversed(batch)))
        held = everything(index)
        assert held.items() <= model.items()
        assert all(value % modulus == 0 for key, value in model.items() if key not in held)


@given(st.lists(BATCH, max_size=8))
def test_the_dead_do_not_make_it_grow(batches):
    dead = FingerprintIndex(lambda values: np.zeros(len(values), bool), capacity=CAPACITY)
    for batch in batches:
        dead.put(words([k for k, _ in batch]), words([v for _, v in batch]))
        # a rebuild keeps none, so the table has room for the largest batch and no more
        assert dead.nbytes <= 16 * max(CAPACITY, 4 * 30 / 0.6)


def test_clear_forgets_everything_and_gives_the_memory_back():
    index = FingerprintIndex(lambda values: np.ones(len(values), bool), capacity=CAPACITY)
    small = index.nbytes
    index.put(words(range(1, 1000)), words(range(1, 1000)))
    assert index.nbytes > small
    index.clear()
    assert (index.nbytes, len(index)) == (small, 0)
    assert not index.get(words(range(1, 1000))).any()


@pytest.mark.parametrize("num", [1, 1000])
def test_keys_that_all_want_one_slot_are_all_found(num):
    index = FingerprintIndex(lambda values: np.ones(len(values), bool))
    keys = words([7 + (i << 32) for i in range(num)])
    index.put(keys, keys + np.uint64(1))
    assert (index.get(keys) == keys + np.uint64(1)).all()
    assert not index.get(keys + np.uint64(1 << 60)).any()


def test_nothing_in_is_nothing_out():
    index = FingerprintIndex(lambda values: np.ones(len(values), bool))
    index.put(words([]), words([]))
    assert len(index) == 0
    assert len(index.get(words([]))) == 0
