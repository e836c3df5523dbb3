"""Rows of a conversation whose front is new in every turn, whatever rows a model chooses.

The loop of the server without the server: match, plan, choose, compute, store.
"""

from collections.abc import Callable

import numpy as np
import pytest

from kvshare_sglang.plan import Join, Range, ReusePlan
from kvshare_sglang.policy.retain import fresh_stretches, page_borders
from kvshare_sglang.policy.select.attention_trace import AttentionTrace
from kvshare_sglang.radix_fuzzy.chunks import Bounds
from kvshare_sglang.radix_fuzzy.fingerprints import SPAN
from kvshare_sglang.radix_fuzzy.matching import LOOK_BACK
from kvshare_sglang.radix_fuzzy.tree import FuzzyTree

SPACE, BOUNDS = ("a", 0), Bounds(32, 128, 512)
FRONT, DOCUMENT, SAID, TURNS = 20, 2000, 60, 30

Mass = Callable[[np.random.Generator, int], np.ndarray]


def even(rng: np.random.Generator, num: int) -> np.ndarray:
    return rng.random(num) ** 8


def early(rng: np.random.Generator, num: int) -> np.ndarray:
    return rng.random(num) * np.exp(-np.arange(num) / 100)


def recent(rng: np.random.Generator, num: int) -> np.ndarray:
    return rng.random(num) * np.exp((np.arange(num) - num) / 100)


def store(tree: FuzzyTree, plan: ReusePlan, text: np.ndarray, page: int) -> None:
    """As ``runtime/cache/branches.py``: what is exact, then chunks of what came after it."""
    end = plan.exact_len // page * page  # of what is stored
    if end:
        tree.insert(SPACE, text[:end])
    for stretch in fresh_stretches(plan, len(text) // page * page, max_depth=1):
        first = max(stretch.start, end)
        if first >= stretch.stop:
            continue
        found = tree.new_chunks(
            SPACE, text[first : stretch.stop], depth=stretch.depth, bounds=BOUNDS
        )
        for chunks in found:
            at, borders = page_borders(first, [Range(c.start, c.stop) for c in chunks], page=page)
            new, last = max(first + chunks[0].start, at, end), None
            if borders[-1] - new < max(SPAN, page):
                continue
            for chunk, border in zip(chunks, borders, strict=True):
                if border > new:
                    last = tree.insert(
                        SPACE,
                        text[new:border],
                        start=new,
                        parent=last and last.id,
                        depth=stretch.depth,
                        before=text[:new],
                    )
                    tree.remember_chunk(chunk, last)
                    new = end = border


def assert_joins(tree: FuzzyTree, plan: ReusePlan, prompt: np.ndarray) -> None:
    """What stood before a run in the cache, back to the last edit, stands before it here: then no
    seam is there, and only then does text go on."""
    edited = 0
    for run in plan.runs:
        away = run.dst_start - edited
        if run.join in (Join.SEAM, Join.ON) and away >= LOOK_BACK:
            have = min(run.src_start - tree.segment(run.source).root_start, away)
            own = tree.path_tokens(run.source, run.src_start - have, run.src_start)
            same = np.array_equal(own, prompt[run.dst_start - have : run.dst_start])
            assert same or run.join is Join.SEAM, run
            assert not (same and have == away) or run.join is Join.ON, run
        if run.join is Join.EDIT:
            edited = run.dst_start


@pytest.mark.parametrize("budget", [0.15, 0.3])
@pytest.mark.parametrize("page", [1, 16, 64])
@pytest.mark.parametrize("mass", [even, early, recent])
def test_a_turn_costs_the_same_however_many_there_were(
    mass: Mass, page: int, budget: float
) -> None:
    """With pages it varies by what of the last turn's end did not fill one."""
    rng = np.random.default_rng(1)
    tree, selector = FuzzyTree(secret=7, later=True), AttentionTrace(16, 6)

    def words(num: int) -> np.ndarray:
        return rng.integers(10, 30_000, num).astype(np.int32)

    said, rows = [words(DOCUMENT)], []
    for _ in range(TURNS):
        said.append(words(SAID))
        front = words(int(rng.integers(12, 30)) if page > 1 else FRONT)
        prompt = np.concatenate([front, *said])
        answer = words(SAID)
        runs = tree.match(SPACE, prompt, max_depth=1)
        plan = selector.plan(runs, prompt_len=len(prompt), prefix_len=0, budget=budget)
        assert_joins(tree, plan, prompt)
        trace = selector.trace(plan, budget=budget)
        while not trace.done:
            trace.feed(mass(rng, len(prompt)))
        chosen = selector.rows(plan, trace)
        rows.append(chosen.num)
        store(tree, plan.recompute(chosen), np.concatenate([prompt, answer]), page)
        said.append(answer)
    assert rows[0] > DOCUMENT
    assert max(rows[2:]) <= 1.1 * rows[2] + 2 * (page - 1), rows
