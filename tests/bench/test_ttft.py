"""What the command ttft expects of a server, held against what a server says."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from kvshare_sglang.bench.__main__ import main
from kvshare_sglang.bench.common import ScriptError
from kvshare_sglang.bench.server import ServerSpec
from kvshare_sglang.bench.ttft.cases import moved_case
from kvshare_sglang.bench.ttft.work import choice_of, expected_rows, work_of
from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.sim.mirror import Mirror

MODEL = {
    "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 4, "intermediate_size": 128,
    "vocab_size": 4096,
}  # fmt: skip
CONFIG = KVShareConfig(budget=0.05, select="trace")


SIZE = 4096


@pytest.fixture(scope="module")
def choose():
    """The choice of a server."""
    case = moved_case(np.random.default_rng(0), SIZE, 4096, reused=0.98)
    mirror = Mirror()
    for tokens in case.sources:
        mirror.add(tokens)
    return lambda: choice_of(mirror, case.prompt, CONFIG)


def spec(*, chunk, device="cuda"):
    return ServerSpec("trace", Path("model"), device, chunk=chunk)


def says(choice, computed):
    plan = choice.plan
    return {
        "exact_tokens": plan.prefix_len, "recomputed_tokens": 9, "fresh_tokens": computed - 9,
        "copied_tokens": plan.prompt_len - plan.prefix_len - computed, "declined": None,
        "select": choice.selector.name, "select_reason": choice.reason,
    }  # fmt: skip


def test_the_share_that_was_asked_for_is_reused(choose):
    assert choose().plan.reused == pytest.approx(0.98 * SIZE, rel=0.01)


def test_a_prompt_of_more_rows_than_a_chunk_may_run_its_chunks_ends_too(choose):
    chunk = 256  # rows: 2% of new text, and 5% again
    choice = choose()
    assert (choice.selector.name, choice.reason) == ("trace", None)
    count = choice.selector.most_rows(choice.plan, budget=CONFIG.budget)
    for more in (0, 15, -7):
        info = says(choice, count + more)
        rows, merged = expected_rows(choice, info, spec(chunk=chunk, device="cpu"), CONFIG)
        assert (len(rows), merged) == (count + more, max(more, 0))
    wrong = {**says(choice, count), "select_reason": "chunked"}, says(choice, count * 9 // 10)
    for told in wrong:
        with pytest.raises(ScriptError, match="the planner alone"):
            expected_rows(choice, told, spec(chunk=chunk, device="cpu"), CONFIG)


def test_rows_that_a_gpu_merged_are_counted_and_make_the_ceiling_lower(choose):
    choice = choose()
    count = choice.selector.most_rows(choice.plan, budget=CONFIG.budget)
    without = work_of(MODEL, choice, says(choice, count), spec(chunk=4096), CONFIG)
    merged = work_of(MODEL, choice, says(choice, count + 70), spec(chunk=4096), CONFIG)
    assert (without.merged_tokens, merged.merged_tokens) == (0, 70)
    assert merged.computed_share > without.computed_share
    with pytest.raises(ScriptError, match="the planner alone"):
        work_of(MODEL, choice, says(choice, count - 1), spec(chunk=4096), CONFIG)
    with pytest.raises(ScriptError, match="the planner alone"):
        work_of(MODEL, choice, says(choice, count + 70), spec(chunk=4096, device="cpu"), CONFIG)


RESULT = {
    "rows": [{"prompt_tokens": 1024, "ttft_plain_p50_s": 2.09, "ttft_kvshare_p50_s": 0.543,
              "ratio_plain": 3.74, "computed_share": 0.2, "recomputed_share": 0.1, "ceiling": 5.0}],
    "miss": {"lookup_ms_p50_8k": 0.3, "ttft_ratio_p50": None, "ci95": None},
    "env": {"gpu": None, "device": "cpu", "cpu": "a CPU", "cores": 2, "commit": "abc",
            "model": {"name": "bench-100m-1"}},
}  # fmt: skip


def test_the_speed_table_is_written_from_an_earlier_result(tmp_path):
    (tmp_path / "old.json").write_text(json.dumps(RESULT))
    page = tmp_path / "README.md"
    page.write_text("<!-- speed -->\nold\n<!-- /speed -->\n<!-- old --><!-- /old -->\nend\n")
    assert main(["ttft", "--result", str(tmp_path / "old.json"), "--table", str(page)]) == 0
    lines = page.read_text().splitlines()
    assert "| 1024 | 2.09 s | 0.543 s | 3.74x | 20% |" in lines
    assert "| 1024 | kvshare | 2.09 s | 0.543 s | 3.74x | - | 5.00x | - |" in lines
    assert "old" not in lines
    assert lines[-1] == "end"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--arms", "plain,nothing"], "--arms knows plain, allrows, kvshare, window, trace; got"),
        (["--arms", "plain"], "--arms must name one that reuses, got plain"),
        (["--sizes", "100"], r"--sizes must be in \[256, 14894\]"),
        (["--reused", "1.0"], r"--reused must be in \(0, 1\), got \[1.0\]"),
        (["--result", "no-such-file"], "--result no-such-file cannot be read: "),
    ],
)
def test_bad_values_are_refused_with_their_limits(words, told, capsys):
    assert main(["ttft", *words]) == 1
    assert re.search(told, capsys.readouterr().err)
