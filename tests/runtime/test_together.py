"""What is known at the same time goes to the device in one copy; the values are what they were."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from kvshare_sglang.plan import Join, Range, Rows, Run
from kvshare_sglang.policy.select.attention_trace import AttentionTrace
from kvshare_sglang.policy.select.base import copy_all
from kvshare_sglang.runtime import batch, copying
from kvshare_sglang.runtime.trace_on_device import DeviceTrace

TYPES = st.sampled_from([np.int64, np.int32, np.bool_, np.float32, np.uint8])
ARRAYS = TYPES.flatmap(
    lambda kind: arrays.arrays(kind, arrays.array_shapes(min_dims=1, max_dims=2, min_side=0))
)


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A device that is not the host; the sizes of what was copied to it, in bytes."""
    return pretend(monkeypatch)


def pretend(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    sizes: list[int] = []

    def pinned(num_bytes: int) -> torch.Tensor:
        sizes.append(num_bytes)
        return torch.full((num_bytes,), 0xAB, dtype=torch.uint8)

    monkeypatch.setattr(batch, "stays", lambda device: False)
    monkeypatch.setattr(batch, "_pinned", pinned)
    return sizes


@given(st.lists(ARRAYS, min_size=1, max_size=6))
def test_any_tensors_arrive_as_they_were_in_one_copy(hosts: list[np.ndarray]) -> None:
    tensors = [torch.from_numpy(one.copy()) for one in hosts]
    with pytest.MonkeyPatch.context() as patch:
        sizes = pretend(patch)
        there = batch.together(tensors, "cpu")
    assert len(sizes) == 1
    for was, now in zip(tensors, there, strict=True):
        assert (now.dtype, now.shape) == (was.dtype, was.shape)
        assert now.numpy().tobytes() == was.numpy().tobytes()
        assert now.data_ptr() != was.data_ptr() or not was.numel()
        # As far from each other as tensors of their own.
        assert (now.data_ptr() - there[0].data_ptr()) % 16 == 0 or not was.numel()


def test_on_the_host_nothing_is_copied() -> None:
    host = torch.arange(3)
    (same,) = batch.together([host], "cpu")
    assert same is host


def forward_batch(length: int) -> Any:
    whole = torch.arange(length)
    return SimpleNamespace(
        input_ids=whole + 7, positions=whole.clone(), out_cache_loc=whole + 100,
        req_pool_indices=torch.tensor([3]), seq_lens=torch.tensor([length]),
        extend_seq_lens_cpu=[length], extend_logprob_start_lens_cpu=[length],
        num_token_non_padded_cpu=length,
    )  # fmt: skip


LENGTH = 400
ROWS = Rows([(0, 5), (90, 100), (399, 400)])
RUNS = (Run(0, 10, 40, 150, join=Join.SEAM), Run(1, 0, 200, 150, join=Join.EDIT))


def steps() -> dict[str, Any]:
    """What a partial batch copies to the device, by what does it; and what it makes of it."""
    plan = copy_all(RUNS, prompt_len=LENGTH, prefix_len=0, suffix=16)
    selector = AttentionTrace(16, 6)

    def copied() -> list[torch.Tensor]:
        state = SimpleNamespace(plan=plan, src_slots=torch.arange(300) + 1000)
        slots = torch.arange(LENGTH) + 100
        return list(copying.rows_of(state, plan.runs, Range(0, LENGTH), slots))

    def cut() -> list[torch.Tensor]:
        fb = forward_batch(LENGTH)
        kept = batch.cut_tokens(fb, [Rows([(0, LENGTH)])], [ROWS], SimpleNamespace())
        return [kept, fb.input_ids, fb.positions, fb.out_cache_loc, fb.extend_seq_lens]

    def traced() -> list[torch.Tensor]:
        trace = DeviceTrace(selector.trace(plan, budget=0.1), selector.required(plan, 0), "cpu")
        return [*trace._kept, trace._open, trace.rows.at, *trace.asking[:2]]

    def ranges() -> list[torch.Tensor]:
        view = batch.runs_as_rows(forward_batch(LENGTH), [ROWS])
        lengths = [view.seq_lens, view.extend_prefix_lens, view.extend_seq_lens]
        return [view.req_pool_indices, *lengths, view.extend_start_loc]

    def part() -> list[torch.Tensor]:
        tokens, table = np.arange(LENGTH), torch.arange(LENGTH) + 100
        made = batch.part_of_row(forward_batch(LENGTH), 0, ROWS, tokens=tokens, table=table)
        return [made.ids, made.slots]

    return {"copied": copied, "cut": cut, "traced": traced, "ranges": ranges, "part": part}


@pytest.mark.parametrize("step", steps())
def test_each_step_of_a_partial_batch_copies_once(step: str, copies: list[int]) -> None:
    there = steps()[step]()
    assert len(copies) == 1
    if step == "cut":  # the kept tokens' places, int64, and one count
        assert copies == [8 * ROWS.num + 16]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch, "stays", lambda device: True)
        here = steps()[step]()
    assert len(copies) == 1
    for got, want in zip(there, here, strict=True):
        assert got.dtype == want.dtype
        assert got.equal(want)
