"""The ring against its definition, and what is learned where the gateway's is another one."""

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from kvshare_sglang.router.ring import LONGEST_KEY, Keys, Ring


def urls(num):
    return [f"http://10.0.0.{i}:{30000 + i}" for i in range(num)]


def who(names, key, down=()):
    """The gateway's rule: the first point at or after the key whose worker answers."""
    hashed = lambda text: int.from_bytes(blake3(text.encode()).digest()[:8], "little")  # noqa: E731
    points = sorted((hashed(f"{name}#{i}"), name) for name in names for i in range(150))
    ahead = [name for at, name in points if at >= hashed(key)] + [name for _, name in points]
    return next(name for name in ahead if name not in down)


@given(st.integers(1, 7), st.text(max_size=20))
def test_a_key_is_served_by_the_next_point_and_then_by_the_next_other_worker(num, key):
    names = urls(num)
    best, second = Ring(names).pair(key)
    assert names[best] == who(names, key)
    if num > 1:
        assert names[second] == who(names, key, down=(names[best],))


@pytest.mark.parametrize("num", [1, 2, 3, 8])
def test_there_is_a_key_for_each_worker_and_each_next_one(num):
    names = urls(num)
    keys = Keys(names)
    for best in range(num):
        for second in range(num):
            if best == second and num > 1:
                continue
            key, named = keys.key([best, second] if num > 1 else [best])
            assert (named, len(key) <= LONGEST_KEY) == (second, True)
            assert names[best] == who(names, key)
            if num > 1:
                assert names[second] == who(names, key, down=(names[best],))


def test_with_64_workers_each_has_a_key_and_nearly_every_pair_has():
    keys = Keys(urls(64))
    assert all(keys.key([best, *range(64)]) for best in range(64))
    assert keys.num_pairs > 0.85 * 64 * 63


def test_where_the_gateway_has_another_ring_its_answers_teach_which_key_is_whose():
    keys = Keys(urls(2))
    theirs = Keys([f"{url}/" for url in urls(2)])  # in another spelling, so on another ring
    for _ in range(40):
        for best in (0, 1):
            named = keys.key([best, 1 - best])
            key = keys.spare() if named is None else named[0]  # the router tries them too
            keys.served(key, Ring([f"{url}/" for url in urls(2)]).pair(key)[0])
    for best in (0, 1):
        named = keys.key([best, 1 - best])
        assert named is not None
        assert Ring([f"{url}/" for url in urls(2)]).pair(named[0])[0] == best
    assert theirs.key([0, 1]) is not None
