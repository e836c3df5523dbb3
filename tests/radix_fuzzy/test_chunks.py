"""Chunks partition a text within their bounds and are the same wherever the text stands."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import fresh, random_tokens, texts

from kvshare_sglang.radix_fuzzy.chunks import Bounds, cut
from kvshare_sglang.radix_fuzzy.fingerprints import WINDOW, winnow

BOUNDS = st.tuples(st.integers(1, 60), st.integers(0, 60), st.integers(0, 100)).map(
    lambda b: Bounds(b[0], b[0] + b[1], sum(b))
)
LONG = st.one_of(texts(max_parts=20), fresh(2000))


@given(LONG, BOUNDS)
def test_chunks_partition_the_text_within_their_bounds(tokens, bounds):
    lo, _, hi = bounds
    chunks = cut(tokens, bounds=bounds)
    stops = [0, *(chunk.stop for chunk in chunks)]
    assert [chunk.start for chunk in chunks] == stops[:-1]
    assert stops[-1] == len(tokens)
    assert all(lo <= chunk.stop - chunk.start <= hi for chunk in chunks[:-1])
    assert all(0 < chunk.stop - chunk.start <= hi for chunk in chunks)


@given(LONG, st.integers(0, 2**64 - 1))
def test_a_cut_stands_where_a_fingerprint_does_if_there_is_one_in_bounds(tokens, seed):
    kept = set(winnow(tokens, seed=seed).positions.tolist())
    for chunk in cut(tokens, bounds=Bounds(32, 32 + WINDOW // 2, 32 + WINDOW), seed=seed)[:-1]:
        in_bounds = kept & set(range(chunk.start + 32, chunk.start + 32 + WINDOW + 1))
        assert chunk.stop in in_bounds or (
            not in_bounds and chunk.stop == chunk.start + 32 + WINDOW
        )


@given(LONG)
def test_equal_keys_mean_equal_text(tokens):
    by_key = {}
    for chunk in cut(tokens):
        content = tokens[chunk.start : chunk.stop].tolist()
        assert by_key.setdefault(chunk.key, content) == content


@given(st.integers(0, 2**32), st.integers(0, 400), st.integers(0, 400))
def test_the_same_text_is_cut_alike_wherever_it_stands(seed, before, behind):
    text = random_tokens(seed, 4000)
    around = [random_tokens(seed + 1, before), text, random_tokens(seed + 2, behind)]
    alone = {chunk.key for chunk in cut(text)}
    moved = cut(np.concatenate(around))
    # by here the cuts have met, and they never part again before the end of the text is near
    settled = [c for c in moved if c.start >= before + 2000 and c.stop <= before + 4000 - 256 - 16]
    assert settled
    assert all(chunk.key in alone for chunk in settled)


@given(texts(), st.integers(1, 2**64 - 1))
def test_a_seed_changes_every_key(tokens, seed):
    assert not {c.key for c in cut(tokens)} & {c.key for c in cut(tokens, seed=seed)}


@given(st.integers(0, 2**32), st.integers(16, 64), st.integers(64, 400))
def test_chunks_have_their_target_length_on_average(seed, least, target):
    tokens = random_tokens(seed, 200 * target)
    chunks = cut(tokens, bounds=Bounds(least, target, 4 * target))
    # a little above: right behind a cut stand hashes that were larger than its own
    assert 0.95 * target <= len(tokens) / len(chunks) <= 1.25 * target


@pytest.mark.parametrize("period", [1, 2, 16, 40])
def test_text_that_repeats_is_not_cut_at_the_lower_bound(period):
    tokens = np.tile(random_tokens(period, period), 20_000 // period)
    chunks = cut(tokens)
    assert 100 <= len(tokens) / len(chunks) <= 512
    assert len({chunk.key for chunk in chunks}) <= 4


@pytest.mark.parametrize("bounds", [(0, 5, 10), (-1, 5, 10), (6, 5, 10), (1, 11, 10)])
def test_bounds_out_of_order_are_refused(bounds):
    with pytest.raises(ValueError, match="bounds must be 1 <= least <= target <= most, got"):
        cut(np.arange(5, dtype=np.int32), bounds=Bounds(*bounds))


def test_an_empty_text_has_no_chunks():
    assert cut(np.empty(0, np.int32)) == []
