"""What the TTFT bench expects of a server, held against what a server says."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from _mirror import Mirror, row_positions
from _server import ScriptError, ServerSpec
from _ttft_cases import moved_case
from _ttft_work import expected_rows, work_of

from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.policy.rows import must_run
from kvshare_sglang.policy.trace import rows_of

MODEL = {
    "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 4, "intermediate_size": 128,
    "vocab_size": 4096,
}  # fmt: skip
CONFIG = KVShareConfig(budget=0.05, select="trace")


@pytest.fixture
def plan(size=4096):
    case = moved_case(np.random.default_rng(0), size, 4096, reused=0.98)
    mirror = Mirror()
    for tokens in case.sources:
        mirror.add(tokens)
    return mirror.plan(case.prompt, CONFIG)


def spec(*, chunk, device="cuda"):
    return ServerSpec("trace", Path("model"), device, chunk=chunk)


def says(plan, computed):
    return {
        "exact_tokens": plan.prefix_len, "computed_tokens": computed, "recomputed_tokens": 9,
        "fuzzy_tokens": plan.prompt_len - plan.prefix_len - computed, "declined": None,
    }  # fmt: skip


def test_the_share_that_was_asked_for_is_reused(plan):
    assert plan.reused == pytest.approx(0.98 * plan.prompt_len, rel=0.01)


def test_a_prompt_longer_than_a_chunk_is_expected_to_go_by_structure(plan):
    by_structure = len(row_positions(plan, chunk=2048, max_rows=2048))
    rows, merged = expected_rows(plan, says(plan, by_structure), spec(chunk=2048), CONFIG)
    assert (len(rows), merged) == (by_structure, 0)


def test_rows_that_a_gpu_merged_are_counted_and_make_the_ceiling_lower(plan):
    count = len(must_run(plan, suffix=CONFIG.seam)) + rows_of(plan, CONFIG.budget)
    without = work_of(MODEL, plan, says(plan, count), spec(chunk=4096), CONFIG)
    merged = work_of(MODEL, plan, says(plan, count + 70), spec(chunk=4096), CONFIG)
    assert (without.merged_tokens, merged.merged_tokens) == (0, 70)
    assert merged.computed_share > without.computed_share
    with pytest.raises(ScriptError, match="the planner alone"):
        work_of(MODEL, plan, says(plan, count - 1), spec(chunk=4096), CONFIG)
    with pytest.raises(ScriptError, match="the planner alone"):
        work_of(MODEL, plan, says(plan, count + 70), spec(chunk=4096, device="cpu"), CONFIG)
