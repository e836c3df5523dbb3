"""Each Triton kernel against its fp64 definition: compiled where there is a GPU, else in Triton's
interpreter. Shapes are small and awkward; what is not read or not to be written is nan."""

import pytest
import torch
from tolerances import TOL, assert_close

pytest.importorskip("triton")

from kvshare_sglang.kernels import reference
from kvshare_sglang.kernels.gpu import copy, mass, profile, rows
from kvshare_sglang.kernels.gpu.rows import Shape

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP8 = torch.float8_e4m3fn


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def far(got, want):
    return float(((got.double() - want).abs() / want.abs().clamp(min=1)).max())


# ---- scattered rows ----------------------------------------------------------------------------


class Paged:
    """Requests over a pool whose slots are in no order; slots that no request owns are nan."""

    def __init__(self, lengths, *, kv_heads, dim, dtype, seed=0):
        gen = seeded(seed)
        total = sum(lengths)
        self.k = torch.full((total + 7, kv_heads, dim), torch.nan).to(dtype)
        self.v = self.k.clone()
        self.table = torch.zeros(len(lengths) + 2, max(lengths) + 3, dtype=torch.int32)
        order = torch.randperm(total + 7, generator=gen)
        self.slots = list(order[:total].split(lengths))
        for i, slots in enumerate(self.slots):
            self.table[i + 1, : len(slots)] = slots.int()
            for buffer in (self.k, self.v):
                buffer[slots] = torch.randn(len(slots), kv_heads, dim, generator=gen).to(dtype)
        self.owners = torch.arange(1, len(lengths) + 1)

    def attend(self, positions, q, shape, *, programs, **scales):
        group = q.shape[1] // self.k.shape[1]
        plan = rows.plan(
            [(len(at), int(at[-1]) + 1) for at in positions],
            torch.cat(positions).to(DEVICE),
            self.owners.to(DEVICE),
            group=group, kv_heads=self.k.shape[1], shape=shape, programs=programs,
        )  # fmt: skip
        k, v, table = (x.to(DEVICE) for x in (self.k, self.v, self.table))
        out = rows.run(plan, q.to(DEVICE), k, v, table, scaling=0.2, shape=shape, **scales)
        return out.cpu(), plan

    def want(self, positions, q, *, k_scale=1.0, v_scale=1.0):
        out, base = [], 0
        for slots, at in zip(self.slots, positions, strict=True):
            mine = q[base : base + len(at)]
            base += len(at)
            k, v = (x[slots].float().double() for x in (self.k, self.v))
            out.append(reference.partial_attention(mine, k * k_scale, v * v_scale, at, scaling=0.2))
        return torch.cat(out)


def some(length, count, gen):
    """Positions, ascending; the last one is among them."""
    others = torch.randperm(length - 1, generator=gen)[: count - 1]
    return torch.cat((torch.sort(others)[0], torch.tensor([length - 1])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(4, 2, 64), (8, 1, 128), (2, 2, 16), (14, 2, 32), (6, 2, 16)]
)
@pytest.mark.parametrize("programs", [1, 10_000])
def test_scattered_rows_see_all_keys_up_to_their_own(dtype, heads, kv_heads, dim, programs):
    gen = seeded(heads)
    lengths, counts = [1, 70, 1100, 129], [1, 9, 5, 37]
    paged = Paged(lengths, kv_heads=kv_heads, dim=dim, dtype=dtype)
    positions = [some(n, c, gen) for n, c in zip(lengths, counts, strict=True)]
    q = torch.randn(sum(counts), heads, dim, generator=gen).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "KEYS_OF_SPLIT", 200)
        got, plan = paged.attend(positions, q, Shape(16, 16, 4, 2), programs=programs)
    assert [one.splits for one in plan.launches] == [2 if programs == 1 else 4]
    assert_close(got, paged.want(positions, q), dtype)


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("num", [15, 16, 17, 33])
def test_rows_side_by_side_are_causal_prefill(num, step):
    """The same kernel serves contiguous rows; tiles of sixteen, and a row more or less."""
    gen = seeded(num)
    paged = Paged([step * num + 40], kv_heads=1, dim=16, dtype=torch.float32)
    positions = [torch.arange(40, step * num + 40, step)]
    q = torch.randn(num, 1, 16, generator=gen)
    got, _ = paged.attend(positions, q, Shape(16, 16, 4, 2), programs=1)
    assert_close(got, paged.want(positions, q), torch.float32)


def test_a_cache_of_8_bits_is_multiplied_by_its_scales():
    gen = seeded(3)
    paged = Paged([90], kv_heads=2, dim=32, dtype=FP8)
    positions = [some(90, 20, gen)]
    q = torch.randn(20, 4, 32, generator=gen)
    scales = {"k_scale": 0.5, "v_scale": 3.0}
    got, _ = paged.attend(positions, q, Shape(16, 16, 4, 2), programs=1, **scales)
    assert_close(got, paged.want(positions, q, **scales), torch.float32)


def test_queries_may_be_a_slice_of_a_wider_projection():
    gen = seeded(4)
    paged = Paged([50], kv_heads=2, dim=16, dtype=torch.float32)
    positions = [some(50, 11, gen)]
    wide = torch.randn(11, 6, 16, generator=gen)
    got, _ = paged.attend(positions, wide[:, :4], Shape(16, 16, 4, 2), programs=1)
    assert_close(got, paged.want(positions, wide[:, :4]), torch.float32)


@pytest.mark.parametrize("at_once", [1, 16, 40])
def test_many_rows_are_attended_a_part_at_a_time(monkeypatch, at_once):
    """No more than so many rows, or one tile, need workspace at a time."""
    monkeypatch.setattr(rows, "ROWS_AT_ONCE", at_once)
    gen = seeded(6)
    paged = Paged([90, 200, 5], kv_heads=2, dim=16, dtype=torch.float32)
    positions = [some(n, c, gen) for n, c in ((90, 50), (200, 33), (5, 1))]
    q = torch.randn(84, 4, 16, generator=gen)
    got, plan = paged.attend(positions, q, Shape(16, 16, 4, 2), programs=1)
    assert [one.start for one in plan.launches] == [0, *(p.stop for p in plan.launches[:-1])]
    assert plan.launches[-1].stop == 84
    assert max(one.stop - one.start for one in plan.launches) <= max(at_once, 8)
    assert_close(got, paged.want(positions, q), torch.float32)


def test_a_launch_begins_with_the_tiles_of_most_keys():
    paged = Paged([900, 40], kv_heads=1, dim=16, dtype=torch.float32)
    positions = [torch.arange(0, 900, 9), torch.arange(40)]
    _, plan = paged.attend(positions, torch.zeros(140, 1, 16), Shape(16, 16, 4, 2), programs=1)
    (launch,) = plan.launches
    first, num, owner = launch.tiles.cpu()
    at = torch.cat(positions)
    last = at[first + num - 1]
    assert last[owner == 0].diff().max() < 0
    assert last[0] == 891
    assert launch.tiles[0].sort()[0].diff().min() > 0


def test_tiles_hold_every_row_once():
    counts = [(300, 900), (20, 20), (70, 5000)]
    tiles, keys = rows.cut(counts, group=7, block_m=128)
    assert (keys <= 5000).all()
    assert tiles[1].max() <= 128 // 7
    owned = [set() for _ in counts]
    starts = [0, 300, 320]
    for first, num, owner in tiles.T:
        mine = range(first - starts[owner], first - starts[owner] + num)
        assert owned[owner].isdisjoint(mine)
        owned[owner].update(mine)
    assert [len(one) for one in owned] == [num for num, _ in counts]


# ---- copy and rotate ---------------------------------------------------------------------------


def angles_of(rotary, limit=4096):
    freq = 1.0 / 500_000.0 ** (torch.arange(0, rotary, 2).double() / rotary)
    angle = torch.arange(limit).double()[:, None] * freq
    # yarn's magnitude is not 1
    return (torch.cat((angle.cos(), angle.sin()), dim=-1) * 1.2).float(), freq


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8], ids=str)
@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize(
    ("heads", "dim", "rotary"), [(2, 64, 64), (1, 128, 64), (3, 80, 32), (8, 128, 128)]
)
@pytest.mark.parametrize("n", [1, 5])
def test_a_copy_is_the_rotated_source_and_nothing_else_changes(dtype, neox, heads, dim, rotary, n):
    gen = seeded(n + heads)
    num_layers, slots = 11, 24
    table, freq = angles_of(rotary)
    k = [torch.randn(slots, heads, dim, generator=gen).to(dtype) for _ in range(num_layers)]
    v = [torch.randn(slots, heads, dim, generator=gen).to(dtype) for _ in range(num_layers)]
    before = [[one.clone() for one in side] for side in (k, v)]
    k, v = ([one.to(DEVICE) for one in side] for side in (k, v))
    order = torch.randperm(slots, generator=gen)
    src, dst = order[:n], order[n : 2 * n]
    old, new = torch.randint(0, 4096, (2, n), generator=gen).unbind()
    layers = copy.layers_of(k, v)
    assert copy.serves(layers, rotary)
    copy.run(
        layers, *(x.to(DEVICE) for x in (src, dst, old, new, table)), is_neox=neox, first_layer=1
    )
    kept = torch.ones(slots, dtype=torch.bool)
    kept[dst] = False
    most = TOL[dtype]["atol"] if dtype in TOL else 7e-2
    for i in range(num_layers):
        now_k, now_v = (side[i].cpu() for side in (k, v))
        old_k, old_v = (side[i] for side in before)
        same = kept if i else torch.ones(slots, dtype=torch.bool)
        for now, was in ((now_k, old_k), (now_v, old_v)):
            assert now.view(torch.uint8)[same].equal(was.view(torch.uint8)[same])
        if i == 0:
            continue
        want = reference.rotate_keys(old_k[src].float(), new - old, freq, is_neox=neox)
        assert far(now_k[dst].float(), want) <= most
        assert now_v[dst].view(torch.uint8).equal(old_v[src].view(torch.uint8))


def test_a_turn_past_the_range_of_8_bits_is_cut_off():
    k, v = [torch.full((2, 1, 16), 448.0).to(FP8)], [torch.zeros(2, 1, 16).to(FP8)]
    table, _ = angles_of(16)
    one = torch.tensor
    layers = copy.layers_of([x.to(DEVICE) for x in k], [x.to(DEVICE) for x in v])
    args = (one([0]), one([1]), one([0]), one([1]), table)
    copy.run(layers, *(x.to(DEVICE) for x in args), is_neox=True)
    assert layers.key.float().isfinite().all()


def test_what_the_kernel_cannot_rotate_is_told():
    k = [torch.zeros(2, 1, 48)]
    layers = copy.layers_of(k, k)
    assert not copy.serves(layers, 48)  # 24 pairs are no power of two
    assert copy.serves(layers, 32)
    with pytest.raises(ValueError, match="differ in shape"):
        copy.layers_of([torch.zeros(2, 1, 16), torch.zeros(3, 1, 16)], k)
    with pytest.raises(ValueError, match="cannot be copied in one pass"):
        copy.layers_of([torch.zeros(1, 2, 16).transpose(0, 1)], k)


# ---- attention mass ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("strongest", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 16), (7, 1, 32)])
@pytest.mark.parametrize(("num", "kv"), [(1, 1), (5, 70), (130, 300)])
def test_attention_mass_is_the_sum_of_softmax_weights(
    dtype, strongest, heads, kv_heads, dim, num, kv
):
    gen = seeded(num)
    at = some(kv, num, gen)
    q = torch.randn(num, heads, dim, generator=gen).to(dtype)
    keys = torch.randn(kv, kv_heads, dim, generator=gen).to(dtype)
    how = {"scaling": 0.3, "strongest_head": strongest}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mass, "KEYS_OF_SPLIT", 128)
        got = mass.run(q.to(DEVICE), at.to(DEVICE), keys.to(DEVICE), **how).cpu()
    want = reference.attention_mass(q, at, keys, **how)
    assert got.dtype == torch.float32
    assert far(got, want) <= TOL[dtype]["atol"]


# ---- profiles ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 16), (7, 1, 32), (6, 2, 16)])
@pytest.mark.parametrize(
    ("side_by_side", "programs"), [(True, 1), (False, 10_000)], ids=["a prompt's end", "lone rows"]
)
def test_a_profile_is_what_each_row_gives_to_keys_so_far_behind_it(
    dtype, heads, kv_heads, dim, side_by_side, programs, monkeypatch
):
    """Distances that end inside a step of keys, between two, and beyond the prompt; in two parts
    or more, and in more launches than one."""
    gen = seeded(dim + heads)
    lengths, counts = (1, 90, 37, 300), (1, 24, 37, 20)
    paged = Paged(lengths, kv_heads=kv_heads, dim=dim, dtype=dtype, seed=dim)
    at = [
        torch.arange(length - count, length) if side_by_side else some(length, count, gen)
        for length, count in zip(lengths, counts, strict=True)
    ]
    monkeypatch.setattr(rows, "KEYS_OF_SPLIT", 64)
    monkeypatch.setattr(rows, "ROWS_AT_ONCE", 50)
    q = torch.randn(sum(counts), heads, dim, generator=gen).to(dtype)
    edges = torch.tensor([0, 1, 2, 4, 8, 16, 33, 64, 128, 256, 512])
    shape = Shape(32, 32, 4, 1)
    plan = rows.plan(
        [(len(one), int(one[-1]) + 1) for one in at],
        torch.cat(at).to(DEVICE),
        paged.owners.to(DEVICE),
        group=heads // kv_heads, kv_heads=kv_heads, shape=shape, programs=programs,
    )  # fmt: skip
    assert len(plan.launches) > 1
    assert {launch.splits > 2 for launch in plan.launches} >= {programs > 1}
    there = (x.to(DEVICE) for x in (q, paged.k, paged.table, edges.int()))
    got = profile.run(plan, *there, scaling=0.3, shape=shape).cpu()
    base = 0
    for slots, one in zip(paged.slots, at, strict=True):
        mine = q[base : base + len(one)].float()
        want = reference.attention_profile(mine, one, paged.k[slots].float(), edges, scaling=0.3)
        assert far(got[base : base + len(one)], want) <= TOL[dtype]["atol"]
        base += len(one)
    assert base == len(got)
