"""Re-rotated keys are those of the new positions, whatever RoPE's layout, scaling and dtype."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerances import TOL, assert_close

from kvshare_sglang.kernels import reference
from kvshare_sglang.kernels.rope_shift import plan_shift, rotate_keys

LIMIT = 4096
HEADS = 2


def frequencies(rotary_dim, base=10_000.0):
    return 1.0 / base ** (torch.arange(0, rotary_dim, 2).double() / rotary_dim)


def table(inv_freq, *, magnitude=1.0, limit=LIMIT):
    """The model's own table, as SGLang builds it: cosines and sines side by side, fp32."""
    angle = torch.arange(limit).double()[:, None] * inv_freq
    return (torch.cat((angle.cos(), angle.sin()), dim=-1) * magnitude).float()


def keys_of(num, dim, dtype=torch.float32, seed=0):
    return torch.randn(num, HEADS, dim, generator=torch.Generator().manual_seed(seed)).to(dtype)


def at(*positions):
    return torch.tensor(positions, dtype=torch.int64)


MOVES = [(0, 0), (5, 5), (0, 1), (1, 0), (0, LIMIT - 1), (LIMIT - 1, 0), (1000, 1016), (3000, 17)]
OLD, NEW = at(*(old for old, _ in MOVES)), at(*(new for _, new in MOVES))


@pytest.mark.parametrize("dtype", TOL, ids=str)
@pytest.mark.parametrize("is_neox", [True, False], ids=["neox", "gptj"])
@pytest.mark.parametrize(("dim", "rotary_dim"), [(16, 16), (16, 8), (6, 2), (64, 64)])
@pytest.mark.parametrize("magnitude", [1.0, 1.3, 0.4])
def test_keys_are_turned_as_the_reference_turns_them(dtype, is_neox, dim, rotary_dim, magnitude):
    inv_freq = frequencies(rotary_dim)
    keys = keys_of(len(MOVES), dim, dtype)
    shift = plan_shift(table(inv_freq, magnitude=magnitude), OLD, NEW)
    want = reference.rotate_keys(keys, NEW - OLD, inv_freq, is_neox=is_neox)
    assert_close(rotate_keys(keys, shift, is_neox=is_neox), want, dtype)


@pytest.mark.parametrize("is_neox", [True, False], ids=["neox", "gptj"])
@pytest.mark.parametrize("magnitude", [1.0, 1.3])
def test_a_moved_key_is_the_key_computed_fresh_at_the_new_position(is_neox, magnitude):
    inv_freq = frequencies(16)
    plain = keys_of(len(MOVES), 16)
    # from position 0 the reference *is* RoPE; yarn's magnitude scales every key alike
    cached = reference.rotate_keys(plain, OLD, inv_freq, is_neox=is_neox) * magnitude
    fresh = reference.rotate_keys(plain, NEW, inv_freq, is_neox=is_neox) * magnitude
    shift = plan_shift(table(inv_freq, magnitude=magnitude), OLD, NEW)
    assert_close(rotate_keys(cached.float(), shift, is_neox=is_neox), fresh, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_table_in_low_precision_gives_what_the_model_would_have_computed_with_it(dtype):
    # the model rotates by the rounded table, which is no exact rotation; the move undoes that one
    rough = table(frequencies(16)).to(dtype)
    plain = keys_of(len(MOVES), 16).double()

    def by_table(positions):
        cos, sin = rough[positions].double()[:, None].chunk(2, dim=-1)
        a, b = plain.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    moved = rotate_keys(by_table(OLD).float(), plan_shift(rough, OLD, NEW), is_neox=True)
    assert_close(moved, by_table(NEW), torch.float32)


POSITIONS = st.lists(st.tuples(*[st.integers(0, LIMIT - 1)] * 3), min_size=1, max_size=8)
TABLE = table(frequencies(16), magnitude=1.2)


@given(POSITIONS, st.booleans(), st.sampled_from((16, 20)))
def test_two_moves_are_one_move(moves, is_neox, dim):
    a, b, c = (at(*positions) for positions in zip(*moves, strict=True))
    keys = keys_of(len(moves), dim)
    once = rotate_keys(keys, plan_shift(TABLE, a, c), is_neox=is_neox)
    half = rotate_keys(keys, plan_shift(TABLE, a, b), is_neox=is_neox)
    twice = rotate_keys(half, plan_shift(TABLE, b, c), is_neox=is_neox)
    assert_close(twice, once, torch.float32)
    assert_close(once[..., 16:], keys[..., 16:], torch.float32)
    assert_close(once.norm(dim=-1), keys.norm(dim=-1), torch.float32)


@given(POSITIONS, st.booleans())
def test_only_the_distance_counts_and_no_distance_changes_nothing(moves, is_neox):
    a, b, _ = (at(*positions) for positions in zip(*moves, strict=True))
    keys = keys_of(len(moves), 16)
    stay = plan_shift(TABLE, a, a)
    assert not stay.sin.any()
    assert_close(rotate_keys(keys, stay, is_neox=is_neox), keys, torch.float32)
    lower = torch.minimum(a, b)
    there = plan_shift(TABLE, a, b)
    again = plan_shift(TABLE, a - lower, b - lower)
    for one, other in zip(there, again, strict=True):
        assert_close(one, other, torch.float32)


def test_the_cached_keys_are_left_as_they_are():
    keys = keys_of(len(MOVES), 20)
    before = keys.clone()
    rotate_keys(keys, plan_shift(TABLE, OLD, NEW), is_neox=True)
    assert torch.equal(keys, before)


def test_keys_need_not_lie_side_by_side():
    buffer = keys_of(2 * len(MOVES), 40)
    keys = buffer[::2, :, 1::2]
    assert not keys.is_contiguous()
    shift = plan_shift(TABLE, OLD, NEW)
    for is_neox in (True, False):
        want = rotate_keys(keys.contiguous(), shift, is_neox=is_neox)
        assert torch.equal(rotate_keys(keys, shift, is_neox=is_neox), want)


def test_nothing_to_move_is_no_error():
    shift = plan_shift(TABLE, at(), at())
    assert rotate_keys(keys_of(0, 16), shift, is_neox=True).shape == (0, HEADS, 16)


@pytest.mark.parametrize("bad", [LIMIT, -1])
@pytest.mark.parametrize("side", [0, 1])
def test_a_position_outside_the_table_is_refused(bad, side):
    sides = [at(3, 4), at(3, 4)]
    sides[side] = at(3, bad)
    with pytest.raises(ValueError, match=rf"in \[0, {LIMIT}\), got .*{bad}"):
        plan_shift(TABLE, *sides)


@pytest.mark.parametrize(
    ("old", "new"), [(at(1, 2), at(1)), (at(1, 2)[None], at(1, 2)[None]), (at(1)[0], at(1)[0])]
)
def test_positions_that_do_not_pair_up_are_refused(old, new):
    with pytest.raises(ValueError, match="two vectors of one length"):
        plan_shift(TABLE, old, new)


@pytest.mark.parametrize(("num", "dim"), [(2, 14), (3, 16), (1, 16)])
def test_keys_that_do_not_fit_the_angles_are_refused(num, dim):
    shift = plan_shift(TABLE, at(1, 2), at(3, 4))
    with pytest.raises(ValueError, match="2 angles of rotary_dim 16"):
        rotate_keys(keys_of(num, dim), shift, is_neox=True)


def test_fp8_keys_stay_in_range():
    top = torch.finfo(torch.float8_e4m3fn).max
    keys = torch.full((len(MOVES), 1, 16), top).to(torch.float8_e4m3fn)
    turned = rotate_keys(keys, plan_shift(TABLE, OLD, NEW), is_neox=True).float()
    assert turned.isfinite().all()
    assert (turned.abs() == top).any(), "nothing was turned past the range: the test shows nothing"
