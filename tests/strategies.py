"""Hypothesis strategies: texts that share much with each other, and runs over a prompt."""

import numpy as np
from hypothesis import strategies as st

from kvshare_sglang.plan import Join, Run

NAMESPACES = (None, "a", ("a", None))

_PHRASES = [
    np.random.default_rng(i).integers(0, 50_000, 4 + 6 * i).astype(np.int32) for i in range(9)
]


def random_tokens(seed: int, length: int, *, vocab: int = 50_000) -> np.ndarray:
    """Text that shares no gram with any other but by a miracle, if ``vocab`` is large."""
    return np.random.default_rng((seed, length, vocab)).integers(0, vocab, length).astype(np.int32)


def fresh(max_len: int = 60) -> st.SearchStrategy[np.ndarray]:
    return st.builds(random_tokens, st.integers(0, 2**32), st.integers(1, max_len))


def repetitive(max_len: int = 60) -> st.SearchStrategy[np.ndarray]:
    """One to three tokens over and over: every gram is tied with others."""
    period = st.lists(st.integers(0, 2), min_size=1, max_size=3)
    return st.builds(
        lambda unit, length: np.resize(np.array(unit, np.int32), length),
        period,
        st.integers(1, max_len),
    )


def phrases() -> st.SearchStrategy[np.ndarray]:
    """Stretches that many texts have in common."""
    return st.builds(
        lambda phrase, skip: phrase[skip:],
        st.sampled_from(_PHRASES),
        st.integers(0, 3),
    )


def texts(max_parts: int = 5) -> st.SearchStrategy[np.ndarray]:
    """Token sequences of phrases, fresh and repetitive stretches; never empty."""
    part = st.one_of(phrases(), fresh(), repetitive())
    return st.lists(part, min_size=1, max_size=max_parts).map(np.concatenate)


@st.composite
def prompts_with_runs(draw: st.DrawFn) -> tuple[tuple[Run, ...], int, int]:
    """``(runs, prefix_len, prompt_len)``: ascending, disjoint runs behind a prefix."""
    prefix_len = at = draw(st.integers(0, 100))
    runs = []
    for i in range(draw(st.integers(0, 6))):
        at += draw(st.sampled_from((0, 1, 16, 17, 40)))
        length = draw(st.one_of(st.integers(1, 80), st.integers(30, 600)))
        join = draw(st.sampled_from(Join))
        runs.append(
            Run(i + 1, draw(st.integers(0, 1000)), at, length, draw(st.integers(0, 2)), join)
        )
        at += length
    return tuple(runs), prefix_len, at + draw(st.sampled_from((0, 1, 5, 16, 40)))
