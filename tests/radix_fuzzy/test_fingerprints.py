"""Winnowing keeps the minima of all windows, so that shared spans always share a fingerprint."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import window_minima
from strategies import random_tokens, texts

from kvshare_sglang.radix_fuzzy.fingerprints import (
    GRAM,
    SPAN,
    WINDOW,
    gram_hashes,
    namespace_seed,
    winnow,
)

SEEDS = st.integers(0, 2**64 - 1)


@given(texts(), SEEDS)
def test_winnow_keeps_the_minimum_of_every_window_and_all_its_ties(tokens, seed):
    hashes = gram_hashes(tokens, seed=seed)
    marks = winnow(tokens, seed=seed)
    assert marks.positions.tolist() == window_minima(hashes.tolist(), WINDOW)
    assert (marks.hashes == hashes[marks.positions]).all()


@given(texts(), SEEDS)
def test_a_hash_depends_on_the_gram_alone(tokens, seed):
    hashes = gram_hashes(tokens, seed=seed)
    assert len(hashes) == max(len(tokens) - GRAM + 1, 0)
    for i, value in enumerate(hashes.tolist()):
        alone = gram_hashes(tokens[i : i + GRAM], seed=seed)
        assert alone.tolist() == [value]
        assert value != 0


@given(texts(), texts(), texts(), texts(), texts(), SEEDS)
def test_texts_that_share_a_span_share_a_fingerprint_in_it(a, b, c, d, shared, seed):
    shared = np.resize(shared, SPAN)
    one, other = np.concatenate([a, shared, b]), np.concatenate([c, shared, d])

    def inside(tokens, at):
        marks = winnow(tokens, seed=seed)
        own = (marks.positions >= at) & (marks.positions <= at + SPAN - GRAM)
        return set(marks.hashes[own].tolist())

    assert inside(one, len(a)) & inside(other, len(c))


@given(texts(), texts(), texts(), SEEDS)
def test_what_is_kept_deep_inside_a_text_does_not_depend_on_what_surrounds_it(text, a, b, seed):
    moved = winnow(np.concatenate([a, text, b]), seed=seed).positions - len(a)
    alone = winnow(text, seed=seed).positions
    # a gram whose windows all lie in the text; nearer to its ends, windows reach out of it
    lo, hi = WINDOW - 1, len(text) - GRAM - (WINDOW - 1)
    deep = [p for p in moved.tolist() if lo <= p <= hi]
    assert deep == [p for p in alone.tolist() if lo <= p <= hi]
    # and whatever is kept alone is kept in any surroundings
    assert set(alone.tolist()) <= set(moved.tolist())


@given(st.integers(0, 2**32))
def test_namespaces_share_no_hash(seed):
    text = random_tokens(seed, 200)
    names = (None, "None", "a", ("a", None), ("a", "None"), (None, "a"), 1, "1")
    kept = [set(winnow(text, seed=namespace_seed(name)).hashes.tolist()) for name in names]
    assert sum(map(len, kept)) == len(set().union(*kept))


@pytest.mark.parametrize("length", range(SPAN + 2))
def test_a_text_below_a_span_has_no_fingerprint_and_one_of_a_span_has(length):
    marks = winnow(random_tokens(length, length))
    assert (len(marks.positions) > 0) == (length >= SPAN)
    assert len(gram_hashes(random_tokens(length, length))) == max(length - GRAM + 1, 0)


def test_fingerprints_are_as_sparse_as_winnowing_promises():
    kept = len(winnow(random_tokens(1, 100_000)).positions)
    assert kept == pytest.approx(100_000 * 2 / (WINDOW + 1), rel=0.02)


def test_grams_of_neighbouring_token_ids_do_not_collide():
    base = np.arange(100, 100 + GRAM)
    grams = [base + d for d in np.stack(np.meshgrid(*[[0, 1, 2]] * GRAM), -1).reshape(-1, GRAM)]
    hashes = {int(gram_hashes(gram.astype(np.int32))[0]) for gram in grams}
    assert len(hashes) == len(grams) == 3**GRAM
