"""Ranges of rows as requests, by SGLang's own planning: every row sees its own request's slots.

Its fa3 and flashinfer backends (paged, and ragged with paged) plan and call on a CPU; what their
kernels would read is recorded (``planners.py``). The kernels themselves run on GPUs alone.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import numpy as np
import planners
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvshare_sglang.plan import Rows
from kvshare_sglang.runtime import versions
from kvshare_sglang.runtime.batch import (
    BatchReuse,
    LayerView,
    cut_tokens,
    few_enough,
    few_enough_of,
    part_of_row,
    sub_batch,
)

BACKENDS = [(name, page) for name in ("fa3", "paged", "ragged") for page in (1, 16, 64)]


@pytest.fixture(scope="module")
def runner_of() -> Iterator[Callable[[str, int], SimpleNamespace]]:
    """One runner for each backend and page size."""
    made: dict[tuple[str, int], SimpleNamespace] = {}
    with planners.runners() as make:

        def get(name: str, page: int) -> SimpleNamespace:
            if (name, page) not in made:
                made[name, page] = make(name, page)
            return made[name, page]

        yield get


class Request:
    """Of a batch: its tokens are those from ``start`` on, and of them ``rows`` run."""

    def __init__(self, start: int, length: int, rows: Rows, decodes: bool = False) -> None:
        self.start, self.length, self.rows, self.decodes = start, length, rows, decodes
        self.whole = Rows([(start, length)])
        self.slots = np.zeros(0, np.int64)  # of its positions


@st.composite
def requests(draw: st.DrawFn) -> Request:
    """One whose rows lie apart, a plain chunk behind a prefix or none, or one that decodes."""
    length = draw(st.integers(1, planners.CONTEXT))
    kind = draw(st.sampled_from(["apart", "apart", "plain", "decodes"]))
    if kind == "decodes":
        return Request(length - 1, length, Rows([(length - 1, length)]), decodes=True)
    start = draw(st.sampled_from([0, draw(st.integers(0, length - 1))]))
    if kind == "plain":
        return Request(start, length, Rows([(start, length)]))
    return Request(start, length, some_rows(draw, start, length) | Rows([(length - 1, length)]))


def some_rows(draw: st.DrawFn, start: int, stop: int) -> Rows:
    """Any, in ranges of all lengths."""
    cuts = sorted(draw(st.sets(st.integers(start, stop), max_size=24)))
    return Rows([(a, b) for a, b in zip(cuts[::2], cuts[1::2], strict=False)])


def place(requests: list[Request], runner: SimpleNamespace, rng: np.random.Generator) -> None:
    """Give the requests pages anywhere in the pool, and rows of the page table in any order."""
    page = runner.page_size
    table = runner.req_to_token_pool.req_to_token
    table.fill_(0)
    pages = iter(rng.permutation(np.arange(1, planners.REQUESTS * planners.CONTEXT // page)))
    owners = rng.permutation(np.arange(1, planners.REQUESTS + 1))
    for one, owner in zip(requests, owners, strict=False):
        mine = np.array([next(pages) for _ in range(-(-one.length // page))])
        one.slots = (mine[:, None] * page + np.arange(page)).ravel()[: one.length]
        one.owner = int(owner)
        table[one.owner, : one.length] = torch.from_numpy(one.slots).int()


def batch_of(requests: list[Request]) -> Any:
    """The batch as SGLang builds it, with all tokens of the requests' chunks."""
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

    mixed = any(one.decodes for one in requests)
    counts = [one.length - one.start for one in requests]
    starts = [one.start for one in requests]
    lengths = torch.tensor([one.length for one in requests])
    slots = np.concatenate([one.slots[one.start :] for one in requests])
    fb = ForwardBatch(
        forward_mode=ForwardMode.MIXED if mixed else ForwardMode.EXTEND,
        batch_size=len(requests),
        input_ids=torch.zeros(sum(counts), dtype=torch.int64),
        req_pool_indices=torch.tensor([one.owner for one in requests]),
        seq_lens=lengths,
        out_cache_loc=torch.from_numpy(slots),
        seq_lens_sum=int(lengths.sum()),
        orig_seq_lens=lengths,
        seq_lens_cpu=lengths.clone(),
        positions=torch.cat([torch.arange(one.start, one.length) for one in requests]),
        extend_num_tokens=sum(counts),
        extend_seq_lens=torch.tensor(counts, dtype=torch.int32),
        extend_prefix_lens=torch.tensor(starts, dtype=torch.int32),
        extend_start_loc=torch.tensor(np.cumsum([0, *counts[:-1]]), dtype=torch.int32),
        extend_prefix_lens_cpu=starts,
        extend_seq_lens_cpu=counts,
        extend_logprob_start_lens_cpu=counts,
        rids=[str(i) for i in range(len(requests))],
    )
    versions.set_num_tokens(fb, sum(counts))
    return fb


def attend(runner: SimpleNamespace, fb: Any, *, reuse: BatchReuse) -> planners.Seen:
    """Plan the batch and call one layer; what its rows see."""
    backend = runner.attn_backend
    keys = runner.token_to_kv_pool.get_key_buffer(0)
    keys[:] = torch.arange(len(keys))[:, None, None]
    keys[fb.out_cache_loc] = planners.STALE  # until the layer stores them
    own = fb.out_cache_loc.float()[:, None]
    q, k = own.expand(-1, planners.HEADS * planners.DIM), own.expand(-1, planners.DIM)
    backend.kvshare.batch = reuse
    backend.kvshare.cuts_layers = True  # there are no layers to be cut
    try:
        with ExitStack() as stack:
            seen = planners.record(runner, stack)
            backend.init_forward_metadata(fb)
            backend.forward_extend(q, k.clone(), k.clone(), planners.layer(), fb)
    finally:
        backend.kvshare.batch = None
    # Where results are merged there are two for each row, else one.
    assert seen.launches == 1 + seen.merges
    return seen


def expected(requests: list[Request], rows: list[Rows]) -> dict[int, list[int]]:
    """The definition: the row at position p of a request sees its slots 0..p, each once."""
    out = {}
    for one, mine in zip(requests, rows, strict=True):
        for p in mine.positions.tolist():
            out[int(one.slots[p])] = sorted(one.slots[: p + 1].tolist())
    return out


def by_row(seen: planners.Seen) -> dict[int, list[int]]:
    return {row: sorted(slots) for row, slots in seen.slots.items()}


MANY = settings(
    max_examples=16, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
BATCHES = st.lists(requests(), min_size=1, max_size=5)


@pytest.mark.parametrize(("name", "page"), BACKENDS)
@MANY
@given(BATCHES, st.integers(0, 2**32 - 1))
def test_every_row_of_a_partial_batch_sees_its_own_slots_up_to_itself(
    name: str, page: int, runner_of: Any, batch: list[Request], seed: int
) -> None:
    runner = runner_of(name, page)
    place(batch, runner, np.random.default_rng(seed))
    fb = batch_of(batch)
    rows = few_enough([one.rows for one in batch], runner)
    cut_tokens(fb, [one.whole for one in batch], rows, runner)
    seen = attend(runner, fb, reuse=BatchReuse(rows=rows))
    assert by_row(seen) == expected(batch, rows)


@pytest.mark.parametrize(("name", "page"), BACKENDS)
@MANY
@given(BATCHES, st.integers(0, 2**32 - 1), st.data())
def test_so_does_every_row_of_a_pass_beside_the_batch(
    name: str, page: int, runner_of: Any, batch: list[Request], seed: int, data: st.DataObject
) -> None:
    """A trace's pass, or a refresh: some rows of some requests, the prefix included."""
    runner = runner_of(name, page)
    place(batch, runner, np.random.default_rng(seed))
    wanted = [some_rows(data.draw, 0, one.length) for one in batch]
    numbers = [i for i, mine in enumerate(wanted) if mine]
    fb = batch_of(batch)
    table = runner.req_to_token_pool.req_to_token
    rows = few_enough([wanted[i] for i in numbers], runner)
    parts = [
        part_of_row(
            fb, i, mine, tokens=np.zeros(batch[i].length, np.int64), table=table[batch[i].owner]
        )
        for i, mine in zip(numbers, rows, strict=True)
    ]
    if not parts:
        return
    view = sub_batch(fb, parts, None)
    seen = attend(runner, view, reuse=view.kvshare)
    assert by_row(seen) == expected([batch[i] for i in numbers], rows)


class Narrow:
    """Lets some rows go on."""

    layer, narrows = 0, True

    def __init__(self, rows: list[Rows]) -> None:
        self._rows = rows

    def observe(self, view: LayerView) -> list[Rows]:
        return self._rows


@pytest.mark.parametrize(("name", "page"), BACKENDS)
@MANY
@given(BATCHES, st.integers(0, 2**32 - 1))
def test_so_does_every_row_that_goes_on_in_the_middle_of_a_pass(
    name: str, page: int, runner_of: Any, batch: list[Request], seed: int
) -> None:
    """The batch runs all its rows up to a layer, and a few from there on."""
    runner = runner_of(name, page)
    place(batch, runner, np.random.default_rng(seed))
    fb, whole = batch_of(batch), [one.whole for one in batch]
    rows = few_enough_of([one.rows for one in batch], range(len(batch)), runner)
    seen = attend(runner, fb, reuse=BatchReuse(rows=whole, observer=Narrow(rows)))
    assert by_row(seen) == expected(batch, rows)
