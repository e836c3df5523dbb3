"""A batch of more rows than a chunk in several passes: all rows run, in order, few at a time."""

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kvshare_sglang.plan import Rows
from kvshare_sglang.runtime.slices import sliced


@st.composite
def batches(draw: Any) -> list[Rows]:
    out = []
    for _ in range(draw(st.integers(1, 5))):
        mask = draw(st.lists(st.booleans(), min_size=1, max_size=60))
        mask[-1] = True  # SGLang's batch has the last token of each request
        out.append(Rows.where(np.array(mask)))
    return out


@given(batches(), st.integers(1, 40), st.sets(st.integers(0, 4)))
def test_every_row_runs_after_all_before_it_and_the_last_ones_at_the_end(
    rows: list[Rows], most: int, whole: set[int]
) -> None:
    parts = sliced(rows, most=most, whole=whole)
    for number, mine in enumerate(rows):
        last = mine.positions[-1]
        ran = np.concatenate([part[number].positions for part in parts])
        assert ran[ran != last].tolist() == mine.positions[:-1].tolist()
        assert all(part[number] for part in parts)
        assert parts[-1][number].positions[-1] == last
        if number in whole:  # SGLang looks for something of each of its tokens
            assert parts[-1][number] == mine
    for part in parts:
        kept = sum(one.num - 1 for i, one in enumerate(rows) if i in whole and part is parts[-1])
        assert sum(one.num for one in part) <= max(most, len(rows) + 1 + kept)
        # Attention on a GPU has room for so many ranges as the batch had, and no more.
        assert sum(one.num_ranges for one in part) <= sum(one.num_ranges for one in rows)


@given(batches())
def test_what_fits_is_one_part(rows: list[Rows]) -> None:
    assert sliced(rows, most=sum(one.num for one in rows)) == [rows]
