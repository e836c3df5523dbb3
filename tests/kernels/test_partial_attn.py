"""Attention of some rows equals the reference, however the rows are scattered and batched."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import TOL, assert_close

from kvshare_sglang.kernels import partial_attn, reference
from kvshare_sglang.kernels.partial_attn import BLOCK_QUERIES

DIM = 8


class Case:
    """A batch over a KV buffer whose slots are scattered; every request owns its slots."""

    def __init__(self, requests, *, kv_heads=2, group=2, dtype=torch.float32, v_dim=DIM, seed=0):
        """``requests``: (kv_len, ascending positions of the rows)."""
        rng = torch.Generator().manual_seed(seed)
        total = sum(kv_len for kv_len, _ in requests)
        self.positions = [torch.tensor(rows, dtype=torch.int64) for _, rows in requests]
        self.slots = list(
            torch.randperm(2 * total + 1, generator=rng)[:total].split([n for n, _ in requests])
        )
        shape = (2 * total + 1, kv_heads)
        # what no request owns must not be seen
        self.k = torch.full((*shape, DIM), torch.nan, dtype=dtype)
        self.v = torch.full((*shape, v_dim), torch.nan, dtype=dtype)
        for slots in self.slots:
            self.k[slots] = torch.randn(len(slots), kv_heads, DIM, generator=rng).to(dtype)
            self.v[slots] = torch.randn(len(slots), kv_heads, v_dim, generator=rng).to(dtype)
        num_rows = sum(map(len, self.positions))
        self.q = torch.randn(num_rows, kv_heads * group, DIM, generator=rng).to(dtype)

    def run(self):
        rows = list(zip(self.positions, self.slots, strict=True))
        group = self.q.shape[1] // self.k.shape[1]
        plan = partial_attn.plan(rows, group=group, dtype=self.q.dtype)
        return partial_attn.run(plan, self.q, self.k, self.v, scaling=0.3)

    def want(self):
        out, base = [], 0
        for positions, slots in zip(self.positions, self.slots, strict=True):
            q = self.q[base : base + len(positions)]
            out.append(
                reference.partial_attention(q, self.k[slots], self.v[slots], positions, scaling=0.3)
            )
            base += len(positions)
        return torch.cat(out)

    def check(self):
        assert_close(self.run(), self.want(), self.q.dtype)


@st.composite
def requests(draw):
    kv_len = draw(st.integers(1, 70))
    rows = draw(st.sets(st.integers(0, kv_len - 1), min_size=1))
    return kv_len, sorted(rows)


@given(st.lists(requests(), min_size=1, max_size=4), st.integers(1, 2), st.integers(1, 4))
@settings(max_examples=30)
def test_scattered_rows_see_every_key_up_to_their_own(batch, kv_heads, group):
    Case(batch, kv_heads=kv_heads, group=group).check()


@given(st.lists(requests(), min_size=1, max_size=3))
@settings(max_examples=30)
def test_blocks_of_any_size_give_the_same(batch):
    case = Case(batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partial_attn, "BLOCK_QUERIES", 7)
        assert_close(case.run(), case.want(), torch.float32)


@pytest.mark.parametrize("group", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", TOL, ids=str)
def test_grouped_heads_read_their_own_kv_head_in_every_dtype(group, dtype):
    Case([(40, [0, 3, 4, 39]), (9, [8])], kv_heads=3, group=group, dtype=dtype).check()


@pytest.mark.parametrize("num_rows", [BLOCK_QUERIES - 1, BLOCK_QUERIES, BLOCK_QUERIES + 1])
@pytest.mark.parametrize("step", [1, 2])
def test_rows_around_the_size_of_a_block(num_rows, step):
    kv_len = step * num_rows + 5
    Case([(kv_len, list(range(5, kv_len, step)))], kv_heads=1, group=1).check()


def test_a_request_of_one_row_and_one_without_any_stand_beside_others():
    Case([(30, [29]), (5, []), (1, [0]), (300, list(range(20, 300))), (2, [])], kv_heads=1).check()


def test_requests_may_share_slots():
    case = Case([(30, [3, 20, 29]), (30, [5, 29])])
    case.slots[1] = case.slots[0].clone()
    case.check()


def test_values_may_be_wider_than_keys():
    Case([(20, [3, 19])], v_dim=12).check()


def test_queries_may_be_a_slice_of_a_wider_projection():
    case = Case([(20, [3, 7, 19])])
    num_rows, heads, dim = case.q.shape
    wide = torch.full((num_rows, heads * dim + 10), torch.nan)
    wide[:, : heads * dim] = case.q.flatten(1)
    want = case.want()
    case.q = wide[:, : heads * dim].view(num_rows, heads, dim)
    assert not case.q.is_contiguous()
    assert_close(case.run(), want, torch.float32)


def test_slots_past_the_last_row_are_not_read():
    case = Case([(20, [3, 7])])
    case.k[case.slots[0][8:]] = torch.nan
    case.v[case.slots[0][8:]] = torch.nan
    case.check()


def test_no_row_at_all_is_no_error():
    case = Case([(5, [])])
    assert case.run().shape == (0, 4, DIM)
    assert partial_attn.plan([], group=1) == []


def test_a_row_past_its_slots_is_refused():
    with pytest.raises(ValueError, match="position 5 is outside the 5 slots given"):
        partial_attn.plan([(torch.tensor([2, 5]), torch.arange(5))], group=1)


def test_rows_given_twice_are_refused():
    # 3 rows between positions 2 and 4 look side by side unless each is checked
    with pytest.raises(ValueError, match="must ascend, each once"):
        partial_attn.plan([(torch.tensor([2, 2, 4]), torch.arange(5))], group=1)


def test_query_heads_that_do_not_share_evenly_are_refused():
    case = Case([(5, [4])], kv_heads=2, group=1)
    case.q = torch.zeros(1, 3, DIM)
    with pytest.raises(ValueError, match="3 query heads are not a multiple of 2 KV heads"):
        case.run()
