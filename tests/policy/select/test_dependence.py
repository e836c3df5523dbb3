"""What a copied row rests on outside of what stands before it, against attention row by row."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvshare_sglang.plan import Join, ReusePlan, Run
from kvshare_sglang.policy.select.dependence import EDGES, RANGES, beyond, outside


def profiles_of(attention: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The definition: of rows at positions ``at``, [n, keys]."""
    keys = np.arange(attention.shape[1])
    return np.array(
        [
            [row[keys <= i - edge].sum() for edge in EDGES]
            for row, i in zip(attention, at, strict=True)
        ]
    )


def attention(rng: np.random.Generator, tokens: int) -> np.ndarray:
    weights = np.tril(rng.random((tokens, tokens)) ** 4)
    weights[:, 0] = 0  # left out of a profile
    return np.asarray(weights / weights.sum(1, keepdims=True).clip(1e-9))


def about(found: np.ndarray, exact: np.ndarray) -> None:
    """As far as a profile tells: attention here is noise, of which edges see sums."""
    assert np.abs(found - exact).mean() < 0.05
    assert np.corrcoef(found, exact)[0, 1] > 0.6


@given(st.integers(0, 2**32 - 1), st.integers(2, 200))
def test_at_an_edge_it_is_exact_and_between_two_it_is_between_them(seed: int, tokens: int) -> None:
    rng = np.random.default_rng(seed)
    weights, at = attention(rng, tokens), np.arange(tokens)
    profiles = profiles_of(weights, at)
    far = int(rng.integers(0, tokens))
    exact = np.array([row[: max(i - far + 1, 0)].sum() for i, row in enumerate(weights)])
    found = beyond(profiles, np.full(tokens, far), at)
    if far in EDGES:
        np.testing.assert_allclose(found, exact, atol=1e-9)
    near = max(edge for edge in EDGES if edge <= far)
    over = min(edge for edge in EDGES if edge > far)
    for row in range(tokens):
        high = profiles[row, EDGES.index(near)]
        low = profiles[row, EDGES.index(over)]
        assert low - 1e-9 <= found[row] <= high + 1e-9
    assert (found[at < far] == 0).all()  # there is nothing


def plan(*runs: Run, prompt_len: int, prefix_len: int = 0) -> ReusePlan:
    return ReusePlan(prompt_len, prefix_len, runs, runs)


def test_of_a_moved_passage_all_that_was_before_it_is_outside() -> None:
    weights = attention(np.random.default_rng(1), 300)
    run = Run(1, 64, 10, 128)
    at = np.arange(run.src_start, run.src_stop)
    profiles = np.full((200, len(EDGES)), np.nan)
    profiles[run.dst_start : run.dst_stop] = profiles_of(weights, np.arange(300))[at]
    found = outside(plan(run, prompt_len=200), profiles)
    assert found is not None
    exact = weights[at, : run.src_start].sum(1)
    here = found[run.dst_start : run.dst_stop]
    about(here, exact)
    # of rows of which nothing is known, what the others have on average
    np.testing.assert_allclose(found[0], here.mean())


def test_behind_an_edit_only_the_text_that_was_replaced_is_outside() -> None:
    """The document is moved, and tokens 96 to 112 of it are others now."""
    weights = attention(np.random.default_rng(2), 300)
    before, behind = Run(1, 64, 10, 32), Run(1, 112, 61, 100)
    profiles = np.full((200, len(EDGES)), np.nan)
    of_source = profiles_of(weights, np.arange(300))
    for run in (before, behind):
        profiles[run.dst_start : run.dst_stop] = of_source[run.src_start : run.src_stop]
    found = outside(plan(before, behind, prompt_len=200), profiles)
    assert found is not None
    at = np.arange(behind.src_start, behind.src_stop)
    exact = weights[at, :64].sum(1) + weights[at, 96:112].sum(1)
    about(found[behind.dst_start : behind.dst_stop], exact)
    # another source's run at the same shift is no part of it
    other = outside(plan(before._replace(source=2), behind, prompt_len=200), profiles)
    assert other is not None
    assert (
        other[behind.dst_start : behind.dst_stop] > found[behind.dst_start : behind.dst_stop]
    ).all()


@pytest.mark.parametrize(("join", "all_of_it"), [(Join.EDIT, False), (Join.SEAM, True)])
def test_a_prefix_hit_is_there_where_the_run_goes_on_behind_an_edit(
    join: Join, all_of_it: bool
) -> None:
    weights = attention(np.random.default_rng(3), 300)
    run = Run(1, 72, 70, 100, join=join)
    at = np.arange(run.src_start, run.src_stop)
    profiles = np.full((180, len(EDGES)), np.nan)
    profiles[run.dst_start : run.dst_stop] = profiles_of(weights, np.arange(300))[at]
    found = outside(plan(run, prompt_len=180, prefix_len=64), profiles)
    assert found is not None
    first = 0 if all_of_it else 64
    exact = weights[at, first : run.src_start].sum(1)
    about(found[run.dst_start : run.dst_stop], exact)


def given_by(weights: np.ndarray, *runs: Run, tokens: int) -> np.ndarray:
    """Profiles of the runs' rows in the prompt, from attention in their one source."""
    of_source = profiles_of(weights, np.arange(len(weights)))
    profiles = np.full((tokens, len(EDGES)), np.nan)
    for run in runs:
        profiles[run.dst_start : run.dst_stop] = of_source[run.src_start : run.src_stop]
    return profiles


def test_what_goes_on_is_the_text_before_it_whatever_segments_hold_it() -> None:
    """A passage moved; behind an edit of it its text goes on in another segment of the path, and
    behind that, with text between that is no run, as in the cache."""
    weights = attention(np.random.default_rng(4), 300)
    moved = Run(1, 64, 10, 32)
    behind = Run(2, 104, 50, 60, join=Join.EDIT)
    later = Run(3, 200, 146, 50, join=Join.ON)
    runs = (moved, behind, later)
    found = outside(plan(*runs, prompt_len=200), given_by(weights, *runs, tokens=200))
    assert found is not None
    for run in (behind, later):
        at = np.arange(run.src_start, run.src_stop)
        exact = weights[at, :64].sum(1) + weights[at, 96:104].sum(1)
        about(found[run.dst_start : run.dst_stop], exact)


def test_behind_all_that_was_before_it_nothing_is_outside() -> None:
    weights = attention(np.random.default_rng(5), 300)
    run = Run(1, 100, 100, 60, join=Join.SAME)
    found = outside(plan(run, prompt_len=200), given_by(weights, run, tokens=200))
    assert found is not None
    assert (found == 0).all()


def test_a_passage_that_moved_is_no_part_of_the_prefix_hit() -> None:
    """Behind it its text goes on after an edit: the prefix is as foreign to that as to itself."""
    weights = attention(np.random.default_rng(6), 300)
    moved, behind = Run(1, 130, 120, 50), Run(1, 190, 182, 60, join=Join.EDIT)
    of_prompt = plan(moved, behind, prompt_len=250, prefix_len=100)
    found = outside(of_prompt, given_by(weights, moved, behind, tokens=250))
    assert found is not None
    at = np.arange(behind.src_start, behind.src_stop)
    exact = weights[at, :130].sum(1) + weights[at, 180:190].sum(1)
    about(found[behind.dst_start : behind.dst_stop], exact)


def test_of_very_many_runs_the_nearest_are_told_apart() -> None:
    """Those further back count as one with what is between them."""
    weights = attention(np.random.default_rng(7), 400)
    runs = [Run(1, 20 + 12 * i, 20 + 12 * i, 8, join=Join.EDIT) for i in range(30)]
    found = outside(
        plan(*runs, prompt_len=400, prefix_len=16), given_by(weights, *runs, tokens=400)
    )
    assert found is not None
    for number in (5, 29):
        run = runs[number]
        at = np.arange(run.src_start, run.src_stop)
        gaps = range(max(number - RANGES + 1, 0), number + 1)
        exact = sum(weights[at, 12 * i + 16 : 12 * i + 20].sum(1) for i in gaps)
        assert abs(found[run.dst_start : run.dst_stop].mean() - exact.mean()) < 0.05


def test_without_any_profile_nothing_is_said() -> None:
    run = Run(1, 64, 10, 64)
    assert outside(plan(run, prompt_len=100), np.full((100, len(EDGES)), np.nan)) is None
