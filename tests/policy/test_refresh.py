"""A watch looks, pauses, and ends where nothing was stale."""

import numpy as np

from kvshare_sglang.policy.refresh import IDLE, Watch


def test_a_watch_looks_pauses_and_ends():
    watch = Watch(np.array([False, True, True, True, True, True]))
    mass = np.array([0.9, 0.0, 0.3, 0.0, 0.0, 0.0])
    assert watch.tick()
    assert watch.wants(mass, above=0.2)
    assert not watch.wants(mass, above=0.3)
    watch.refreshed(np.array([2]), far=0.5, pause=3, unchanged=0.02)
    assert not watch.wants(mass, above=0.2)  # what was refreshed is read in peace
    assert [watch.tick() for _ in range(4)] == [False, False, True, True]
    for row in (1, 3, 4)[:IDLE]:
        assert not watch.over
        watch.refreshed(np.array([row]), far=0.0, pause=1, unchanged=0.02)
    assert watch.over


def test_a_watch_is_over_once_all_is_refreshed():
    watch = Watch(np.array([True, False]))
    watch.refreshed(np.array([0]), far=1.0, pause=1, unchanged=0.02)
    assert watch.over
