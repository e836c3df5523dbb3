"""The alignment is a cheapest edit script, held to the whole matrix of edit distances."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import edit_distance, script_cost

from kvshare_sglang.radix_fuzzy.align import MAX_GAP, align

SHORT = st.lists(st.integers(0, 3), max_size=20)
WORD = st.lists(st.integers(0, 3), min_size=60, max_size=70)  # around the 64-bit word
TOLERANCES = st.sampled_from((0.0, 0.1, 0.25, 0.5, 0.75, 1.0))


@st.composite
def edited(draw, text=SHORT):
    """A text and what a few edits make of it."""
    cached = draw(text)
    prompt = list(cached)
    for _ in range(draw(st.integers(0, 8))):
        at = draw(st.integers(0, len(prompt)))
        gone = draw(st.integers(0, 3))
        prompt[at : at + gone] = draw(st.lists(st.integers(0, 4), max_size=3))
    return cached, prompt


PAIRS = st.one_of(st.tuples(SHORT, SHORT), edited(), edited(WORD), st.tuples(WORD, WORD))


@given(PAIRS)
def test_blocks_map_equal_tokens_ascend_and_leave_the_fewest_edits(pair):
    cached, prompt = pair
    blocks = align(cached, prompt, tolerance=1.0)
    src = dst = 0
    for block in blocks:
        assert block.length > 0
        assert block.src >= src
        assert block.dst >= dst
        src, dst = block.src + block.length, block.dst + block.length
        assert cached[block.src : src] == prompt[block.dst : dst]
    assert src <= len(cached)
    assert dst <= len(prompt)
    assert script_cost(blocks, len(cached), len(prompt)) == edit_distance(cached, prompt)


@given(PAIRS, TOLERANCES)
def test_it_gives_up_exactly_when_the_distance_is_past_the_cutoff(pair, tolerance):
    cached, prompt = pair
    cutoff = tolerance * max(len(cached), len(prompt))
    given_up = align(cached, prompt, tolerance=tolerance) is None
    assert given_up == (edit_distance(cached, prompt) > cutoff)


@given(PAIRS, st.integers(0, 10))
def test_short_blocks_are_left_out_and_nothing_else_changes(pair, min_block):
    every = align(*pair, tolerance=1.0)
    long = align(*pair, tolerance=1.0, min_block=min_block)
    assert long == [block for block in every if block.length >= min_block]


@given(st.one_of(SHORT, WORD))
def test_aligning_a_text_with_itself_is_one_block(text):
    assert align(text, text, tolerance=0.0) == ([(0, 0, len(text))] if text else [])


@pytest.mark.parametrize("length", [63, 64, 65, 127, 128, 129, MAX_GAP])
def test_an_edit_beside_a_word_border_is_found(length):
    cached = list(range(length))
    for at in {0, 62, 63, 64, length - 1} & set(range(length)):
        prompt = [*cached[:at], -7, *cached[at + 1 :]]
        blocks = align(cached, prompt, tolerance=0.5)
        assert blocks == [b for b in ((0, 0, at), (at + 1, at + 1, length - at - 1)) if b[2]]


def test_a_stretch_that_would_take_too_long_is_past_the_cutoff():
    assert align(range(MAX_GAP), range(MAX_GAP), tolerance=0.5) is not None
    assert align(range(MAX_GAP + 1), range(MAX_GAP + 1), tolerance=1.0) is None
    assert align([], range(MAX_GAP + 1), tolerance=1.0) is None
