"""Time per token is compared prompt by prompt, over those that refreshed."""

import pytest

from kvshare_sglang.bench import tpot


def test_time_per_token_is_told_of_the_prompts_that_refreshed():
    off = [{"tpot_s": 0.010, "refreshed": 0}] * 4
    on = [{"tpot_s": 0.010 + 0.001 * rows, "refreshed": rows} for rows in (0, 2, 0, 2)]
    row = tpot.row("every 1", on, off)
    assert (row["n"], row["of"], row["refreshed_rows"]) == (2, 4, 1.0)
    assert row["ratio_off"] == pytest.approx(1.2)
    assert tpot.row("idle", off, off)["n"] == 4
    assert "1.200" in tpot.show([row])
