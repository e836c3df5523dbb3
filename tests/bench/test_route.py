"""``bench route``: the index alone, and how results are put together."""

import contextlib
import socket
import threading

import pytest

from kvshare_sglang.bench.route import indexing, show
from kvshare_sglang.bench.route.faults import Shot, busiest, told
from kvshare_sglang.bench.route.relay import Relay
from kvshare_sglang.bench.route.replay import ratio


@pytest.fixture
def relayed(tmp_path):
    """A relay before a socket that echoes, and where its readers connect."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "up"))
    listener.listen()

    def echo():
        with contextlib.suppress(OSError):
            while True:
                peer = listener.accept()[0]
                threading.Thread(target=answer, args=(peer,), daemon=True).start()

    def answer(peer):
        with peer, contextlib.suppress(OSError):
            while data := peer.recv(100):
                peer.sendall(data)

    threading.Thread(target=echo, daemon=True).start()
    with contextlib.closing(Relay(f"ipc://{tmp_path}/down", f"ipc://{tmp_path}/up")) as relay:
        yield relay, str(tmp_path / "down")
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def connected(path):
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(30)
    client.connect(path)
    return client


def test_a_relay_hands_bytes_on_until_it_is_cut_and_again_when_it_is_mended(relayed):
    relay, path = relayed
    with connected(path) as before:
        before.sendall(b"one")
        assert before.recv(100) == b"one"
        relay.cut()
        assert before.recv(100) == b""
    with pytest.raises(ConnectionRefusedError):
        connected(path)
    relay.mend()
    with connected(path) as after:
        after.sendall(b"two")
        assert after.recv(100) == b"two"


def test_a_relay_that_lags_tells_all_in_order_and_what_lags_when_it_is_cut_is_lost(relayed):
    relay, path = relayed
    with connected(path) as client:
        relay.lag(0.05)
        told = bytes(range(200))
        for byte in told:
            client.sendall(bytes([byte]))
        heard = b""
        while len(heard) < len(told):
            heard += client.recv(100)
        assert heard == told
        relay.lag(3600)
        client.sendall(b"late")
        relay.cut()
        assert client.recv(100) == b""


def test_the_index_is_measured_and_the_best_worker_is_named(monkeypatch):
    monkeypatch.setattr(indexing, "HELD", 8000)
    monkeypatch.setattr(indexing, "TURNS", 8)
    monkeypatch.setattr(indexing, "LOOKED_AT", 8)
    one, few = indexing._measure(1), indexing._measure(3)
    assert (one["tokens"], few["tokens"]) == (7200, 3 * 7200)
    assert one["about_the_best"] == few["about_the_best"] == 1
    assert few["mib"] > one["mib"] > 0
    assert "100%" in indexing.show({"sizes": [one, few]})


def test_a_fault_is_told_by_who_was_inside_the_worker_that_it_befell():
    shots = [
        Shot(0.0, 0.5, "b", True, 1),
        Shot(0.5, 1.5, "b", True, 1),
        Shot(1.0, 9.0, "b", True, 1),  # inside
        Shot(1.5, 3.0, "a", True, 2),  # under way, served by the other one
        Shot(1.8, 4.0, None, False, 1),  # lost
        Shot(3.0, 3.5, "a", True, 1),
    ]
    victim = busiest(["a", "b"], shots[:2])
    assert victim == 1
    assert busiest(["a", "b"], []) == 0
    found = told(shots, 2.0, ["a", "b"], victim)
    assert (found["requests"], found["lost"], found["again"], found["longest_s"]) == (6, 1, 1, 8)
    assert (found["under_way"], found["inside"], found["before_p50_s"]) == (3, 2, 0.75)
    assert (found["after"], found["victim_served_after"], found["waited_2_s"]) == (1, 0, 2)


def test_a_result_says_what_was_reused_added_and_lost():
    arm = {"requests": 4, "exact_share": 0.1, "spread": 0.5, "p50_s": 0.2, "failed": 0}
    arms = {"cache_aware": {**arm, "reused_share": 0.2}, "router": {**arm, "reused_share": 0.3}}
    assert round(ratio(arms), 6) == 1.5
    added = {"total_ms": 2.0, "tokens": 100, "tokenise_ms": 1.0, "choose_ms": 0.5}
    added["router_cpu_ms"] = 3.0
    fault = {"requests": 9, "lost": 1, "again": 2, "longest_s": 3.0, "inside": 4}
    fault["before_p50_s"] = 0.5
    faults = {"router": {"stream cut": {**fault, "recovered_s": 1.5}, "kill -9 router": fault}}
    text = show({"arms": arms, "ratio": 1.5, "added": added, "faults": faults})
    assert "30.0%" in text
    assert "times cache_aware: 1.50" in text
    *_, cut, killed = (line.split() for line in text.splitlines())
    assert cut == "stream cut router 9 1 2 4 0.5 s 3.0 s 1.5 s".split()
    assert killed == "kill -9 router router 9 1 2 4 0.5 s 3.0 s -".split()
    same = {
        "burst": 4,
        "found": 0.6,
        "at once": 0.5,
        "at once, rows": 0.25,
        "after a beat": 1.0,
        "after a beat, rows": 0.75,
    }
    text = show(
        {"arms": arms, "ratio": 1.5, "added": added, "two_routers": {"requests": 4, **same}}
    )
    line = text.splitlines()[-1]
    assert [word for word in line.split() if "%" in word] == [
        "60.0%;", "50.0%", "100.0%", "25.0%,", "75.0%"
    ]  # fmt: skip
