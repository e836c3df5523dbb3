"""What the command match counts, held to plain definitions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import prompts_with_runs

from kvshare_sglang.bench.match import spans
from kvshare_sglang.bench.match.baselines import MATCHERS
from kvshare_sglang.bench.match.ceiling import ceiling
from kvshare_sglang.bench.match.hashing import window_hashes
from kvshare_sglang.bench.match.requests import Requests
from kvshare_sglang.plan import Join, Run
from kvshare_sglang.radix_fuzzy.segments import common_prefix
from kvshare_sglang.sim.life import Life
from kvshare_sglang.sim.matcher import KVShare
from kvshare_sglang.sim.useful import useful

MIN_COPY = 32
HEADS = {Join.SEAM: 16, Join.EDIT: 32, Join.ON: 0, Join.SAME: 0}

TEXTS = st.lists(
    st.lists(st.integers(0, 3), min_size=2, max_size=80).map(lambda ids: np.array(ids, np.int32)),
    min_size=1,
    max_size=6,
)


def stretches(draw_from: int, lengths: list[int]) -> list[np.ndarray]:
    """Prompts made of a few long passages, so that the matchers have something to find."""
    rng = np.random.default_rng(draw_from)
    passages = [rng.integers(0, 1000, n).astype(np.int32) for n in lengths]
    return [
        np.concatenate([passages[i] for i in rng.permutation(len(passages))[:4]]) for _ in range(12)
    ]


def useful_by_definition(runs: tuple[Run, ...], *, stop: int) -> set[int]:
    """Position by position: slow, plain, hard to get wrong."""
    out: set[int] = set()
    for run in runs:
        first = run.dst_start + HEADS[run.join]
        kept = [p for p in range(run.dst_start, run.dst_stop) if first <= p < stop]
        out.update(kept if len(kept) >= MIN_COPY else ())
    return out


@given(prompts_with_runs(), st.integers(0, 40))
def test_useful_tokens_are_those_of_the_definition(case, tail):
    runs, _, prompt_len = case
    stop = max(prompt_len - tail, 0)
    got = {p for run in useful(runs, stop=stop) for p in range(run.dst_start, run.dst_stop)}
    assert got == useful_by_definition(runs, stop=stop)


def test_nothing_short_is_useful():
    assert useful([Run(1, 0, 0, 16 + MIN_COPY - 1)], stop=100) == []
    assert useful([Run(1, 0, 0, 16 + MIN_COPY)], stop=100) == [Run(1, 16, 16, MIN_COPY)]


@given(TEXTS)
def test_the_ceiling_is_every_span_of_16_seen_before(prompts):
    seen: set[bytes] = set()
    for prompt, mask in zip(prompts, ceiling(prompts, [None] * len(prompts)), strict=True):
        grams = [prompt[i : i + 16].tobytes() for i in range(len(prompt) - 15)]
        covered = {i + j for i, gram in enumerate(grams) if gram in seen for j in range(16)}
        assert set(np.flatnonzero(mask).tolist()) == covered
        seen.update(grams)


@given(TEXTS, st.integers(2, 12))
def test_shared_spans_are_those_of_the_definition(prompts, span):
    """In ten lines: a token counts that lies in a span of an earlier prompt, but in no prefix."""
    texts = [prompt.tolist() for prompt in prompts]
    beyond, prefix = [], 0
    for n, text in enumerate(texts):
        head = max([0, *(common_prefix(prompts[n], e) for e in prompts[:n])])
        earlier = {tuple(e[j : j + span]) for e in texts[:n] for j in range(len(e) - span + 1)}
        at = [i for i in range(len(text) - span + 1) if tuple(text[i : i + span]) in earlier]
        found = {i + k for i in at for k in range(span)} - set(range(head))
        beyond, prefix = [*beyond, len(found)], prefix + head
    for spaces, factor in (["a"] * len(prompts), 1), (list(range(len(prompts))), 0):
        file = Requests("file", prompts, spaces)
        (row,) = spans.measure([file], spans=(span,))["file"]
        assert round(row["beyond_share"] * file.num_tokens) == factor * sum(beyond)
        assert round(row["prefix_share"] * file.num_tokens) == factor * prefix
        assert row["enough"] == factor * sum(tokens >= spans.ENOUGH for tokens in beyond)


def test_the_ceiling_ends_at_the_namespace():
    text = np.arange(40, dtype=np.int32)
    masks = ceiling([text, text, text], ["a", "b", "a"])
    assert [mask.all() for mask in masks] == [False, False, True]
    assert not masks[1].any()


@pytest.mark.parametrize("name", MATCHERS)
@pytest.mark.parametrize("settings", [{"keep_all": True}, {"max_depth": 1}, {"capacity": 2500}])
def test_every_matcher_maps_equal_tokens_whatever_its_cache_goes_through(name, settings):
    life = Life(MATCHERS[name](), **settings)
    if name.startswith("fixed"):
        life.tree.matcher = type(life.matcher)(32)
    for prompt in stretches(1, [300, 256, 500, 150, 420]):
        served = life.serve(None, prompt)
        assert served.unequal == 0
        assert served.prefix_len + served.found <= len(prompt)
        assert life.resident == sum(len(n) for s in life.tree.segments.values() for n in s.nodes)
        assert life.resident <= (life.tree.capacity or life.resident)
    assert not life.look("another", prompt).runs


def test_window_hashes_do_not_depend_on_the_place():
    text = np.random.default_rng(0).integers(0, 9, 200).astype(np.int32)
    hashes = window_hashes(np.concatenate([text, text[50:]]), 20, 7)
    assert (hashes[50:181] == hashes[200:]).all()
    assert len(set(hashes[:181].tolist())) == 181


def test_a_request_that_reuses_leaves_its_exact_part_and_deeper_fresh_text():
    rng = np.random.default_rng(0)
    a, b, c = (rng.integers(0, 1000, 400).astype(np.int32) for _ in "abc")
    life = Life(KVShare(), max_depth=1)
    life.serve(None, np.concatenate([a, b]))
    served = life.serve(None, np.concatenate([c, b, a[::-1]]))
    assert served.num_useful == 400 - 16
    nodes = [node for s in life.tree.segments.values() for node in s.nodes]
    assert sum(len(n) for n in nodes if n.depth == 0) == 800 + 400 + 16  # the seam is exact
    assert sum(len(n) for n in nodes if n.depth == 1) == 400
