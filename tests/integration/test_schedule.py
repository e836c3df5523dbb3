"""``--schedule-policy kvshare`` on SGLang's own scheduler: who goes first, who waits for a twin."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Texts
from lab import Lab, computed, lab, request
from test_life import assert_clean

PERSISTENT = 8  # as in runtime/cache/queue.py, which a process with SGLang alone can import
BOUND = 700
OURS = {
    "kvshare": True,
    "schedule_policy": "kvshare",
    "kvshare_schedule_bound": BOUND,
    "chunked_prefill_size": 512,
    "max_running_requests": 8,
}


@pytest.fixture(scope="module", params=["overlap", "page 16"])
def it(request: pytest.FixtureRequest, llama: Path) -> Iterator[Lab]:
    overlap = {"disable_overlap_schedule": False}
    settings = overlap if request.param == "overlap" else {"page_size": 16}
    with lab(llama, **OURS, **settings) as one:
        yield one


@pytest.fixture(scope="module")
def narrow(llama: Path) -> Iterator[Lab]:
    """A request at a time, so that all others wait."""
    with lab(llama, **{**OURS, "max_running_requests": 1}) as one:
        yield one


def rows_of(answers: dict[str, dict[str, Any]]) -> list[int]:
    """Rows that ran for each, the most first."""
    return sorted((computed(answer["kvshare"]) for answer in answers.values()), reverse=True)


def assert_nothing_is_kept(it: Lab) -> None:
    assert_clean(it)
    assert it.ask("probes:queue_state")["kept"] == 0


# ---- twins -----------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [0, 3], ids=["as a prefix", "anywhere"])
@pytest.mark.parametrize("length", [300, 1300], ids=["one chunk", "three chunks"])
def test_of_eight_with_the_same_new_document_one_computes_and_seven_reuse(
    it: Lab, texts: Texts, before: int, length: int
) -> None:
    document = texts.passage(length)
    waits = it.ask("probes:queue_state")["waits"]
    answers = it.play(
        [
            [
                request(
                    f"r{i}", texts.passage(8 + before * i if before else 0) + document + [5, 7 + i]
                )
                for i in range(8)
            ]
        ]
    )
    most, *others = rows_of(answers)
    assert most >= length
    assert max(others) < 0.35 * length
    assert all(len(answer["output"]) == 8 for answer in answers.values())
    # Estimates, as below; all seven reused, so who was not seen as a twin came after the first.
    assert it.ask("probes:queue_state")["waits"] >= waits + 4
    assert_nothing_is_kept(it)


def test_of_more_than_a_round_looks_up_one_computes_too(it: Lab, texts: Texts) -> None:
    """Sixty prompts are more tokens than a round looks up: the last ones are known at admission."""
    document = texts.passage(300)
    script = [request(f"r{i}", [*texts.passage(8), *document, 5], new=2) for i in range(60)]
    most, *others = rows_of(it.play([script]))
    assert most >= 300
    assert max(others) < 0.5 * 300  # pages of 16 round up
    assert_nothing_is_kept(it)


def test_texts_of_other_namespaces_are_no_twins(it: Lab, texts: Texts) -> None:
    document = texts.passage(300)
    waits = it.ask("probes:queue_state")["waits"]
    answers = it.play([[request(f"r{i}", document, extra_key=f"t{i}") for i in range(3)]])
    assert min(rows_of(answers)) == 300
    assert it.ask("probes:queue_state")["waits"] == waits


@pytest.mark.parametrize("asked", ["exact", {"budget": 1.0}])
def test_requests_that_must_not_reuse_wait_for_nobody(it: Lab, texts: Texts, asked: Any) -> None:
    document = texts.passage(150)
    waits = it.ask("probes:queue_state")["waits"]
    script = [[request(f"r{i}", [9, 2 + i, *document], kvshare=asked) for i in range(3)]]
    assert all(answer["kvshare"]["copied_tokens"] == 0 for answer in it.play(script).values())
    assert it.ask("probes:queue_state")["waits"] == waits


def test_nobody_waits_for_text_that_is_too_deep_to_be_a_source(it: Lab, texts: Texts) -> None:
    """What is computed after text that was computed after reused text is never reused."""
    first, second, third = (texts.passage(300) for _ in range(3))
    it.one(first, new=2)
    it.one([*texts.passage(9), *first, *second], new=2)
    waits = it.ask("probes:queue_state")["waits"]
    answers = it.play(
        [[request(f"r{i}", [*texts.passage(9), *second, *third, 5, 7 + i]) for i in range(4)]]
    )
    assert all(answer["kvshare"]["source_depth"] == 1 for answer in answers.values())
    assert rows_of(answers)[-1] >= 300  # each computed the third, so no wait would have helped
    assert it.ask("probes:queue_state")["waits"] == waits


def test_nobody_waits_for_text_that_is_kept_back_while_decoding_watches_it(
    llama: Path, texts: Texts
) -> None:
    watching = {"kvshare_select": "trace", "kvshare_refresh_every": 4}
    with lab(llama, **{**OURS, **watching, "kvshare_schedule_bound": 20000}) as it:
        old, document = texts.passage(300), texts.passage(150)
        it.one(old, new=2)
        script = [request(f"r{i}", [*texts.passage(12), *old, *document, 7 + i]) for i in range(3)]
        assert rows_of(it.play([script]))[-1] >= 150
        assert it.ask("probes:queue_state")["waits"] == 0
        assert_nothing_is_kept(it)


def test_who_waited_for_a_twin_in_vain_waits_for_no_other(it: Lab, texts: Texts) -> None:
    """Whatever the reason: here lookups do not find what the twin left."""
    document, num = texts.passage(180), 6
    it.ask("probes:find_nothing", True)
    waits = it.ask("probes:queue_state")["waits"]
    answers = it.play([[request(f"r{i}", [*texts.passage(9), *document]) for i in range(num)]])
    it.ask("probes:find_nothing", False)
    assert all(answer["finish"]["type"] == "length" for answer in answers.values())
    # What two prompts share is estimated from a sample of their hashes, which are salted anew in
    # each process: not all may be seen as twins.
    assert it.ask("probes:queue_state")["waits"] >= waits + num // 2
    # The first alone, then all others, as many as a batch takes; not one after another.
    assert len(it.ask("probes:layer_rows")) <= 4
    assert_nothing_is_kept(it)


def test_a_twin_that_is_aborted_frees_those_that_wait_for_it(it: Lab, texts: Texts) -> None:
    document = texts.passage(1800)
    twins = [request(f"r{i}", [*texts.passage(9), *document], new=2) for i in range(3)]
    answers = it.play([twins, ("polls", 1), ("abort", "r0"), ("abort", "r1")])
    assert answers["r2"]["finish"]["type"] == "length"
    assert_nothing_is_kept(it)


@pytest.mark.parametrize("told", [True, False], ids=["told of it", "not told of it"])
def test_a_twin_that_is_retracted_and_aborted_frees_those_that_wait_for_it(
    it: Lab, texts: Texts, told: bool
) -> None:
    """Both before the next round, so that it is neither done nor seen waiting. Whoever comes after
    it on a server that is idle has no one to wait for, also if its release were not told."""
    document = texts.passage(3000)
    if not told:
        it.ask("probes:forget_no_twin", True)
    script = [
        request("A", document, new=4),
        ("polls", 1),
        ("call", "probes:note_prefill"),
        ("call", "probes:pause"),
        ("abort", "A"),
        ("call", "probes:resume"),
        ("polls", 2),
        ("call", "probes:note_prefill"),
        request("B", document, new=2),
        ("polls", 60),
        ("abort", "B"),  # so that a server that hangs ends the test
    ]
    answers = it.play(script)
    before, after = it.ask("probes:noted_prefill")
    if not told:
        it.ask("probes:forget_no_twin", False)
    assert before == ({"A"}, {"A"})
    assert after == ((set(), set()) if told else before)
    assert answers["B"]["finish"]["type"] == "length"
    assert_nothing_is_kept(it)


def test_text_that_is_cached_is_waited_for_no_more_whoever_waited_as_it_came(
    it: Lab, texts: Texts
) -> None:
    """The first chunk of a long prompt is in the tree when another that begins so comes; nobody
    waited as it was inserted."""
    start = texts.passage(400)
    waits = it.ask("probes:queue_state")["waits"]
    script = [
        request("long", [*start, *texts.passage(3000)], new=2),
        ("polls", 2),
        request("short", [*start, *texts.passage(150)], new=2),
    ]
    answers = it.play(script)
    assert answers["short"]["cached"] >= 384  # in whole pages
    assert it.ask("probes:queue_state")["waits"] == waits
    assert_nothing_is_kept(it)


# ---- order -----------------------------------------------------------------------------------


def long_and_short(texts: Texts) -> list[dict[str, Any]]:
    sizes = {"long": 900, "short1": 60, "short2": 50, "middle": 300}
    return [request(name, texts.passage(size), new=2) for name, size in sizes.items()]


def test_short_work_goes_first_and_well_cached_work_is_short(narrow: Lab, texts: Texts) -> None:
    cached = texts.passage(800)
    narrow.one(cached)
    script = [
        request("first", texts.passage(100)),
        [*long_and_short(texts), request("cached", [4, 5, *cached, *texts.passage(4)], new=2)],
    ]
    narrow.play(script)
    order = narrow.ask("probes:prefill_order")
    assert order[0] == "first"
    assert set(order[1:3]) == {"short1", "short2"}
    assert order[3:] == ["cached", "middle", "long"]
    assert_nothing_is_kept(narrow)


def test_without_the_flag_they_go_as_they_came(llama: Path, texts: Texts) -> None:
    """With the plug-in on and its schedule off, SGLang's order stands, and nothing is kept."""
    with lab(llama, kvshare=True, max_running_requests=1) as plain:
        plain.play([request("first", texts.passage(100)), long_and_short(texts)])
        assert plain.ask("probes:prefill_order") == ["first", "long", "short1", "short2", "middle"]
        assert plain.ask("probes:queue_state") == {"kept": -1, "waits": 0, "overtaken": 0}


def test_a_stream_of_short_ones_overtakes_by_the_bound_and_no_more(
    narrow: Lab, texts: Texts
) -> None:
    script: list[Any] = [request("first", texts.passage(100), new=20)]
    script.append(request("long", texts.passage(900), new=2))
    sizes = {f"s{i}": 45 + i for i in range(40)}
    script += [request(name, texts.passage(size), new=1) for name, size in sizes.items()]
    answers = narrow.play(script)
    assert all(answer["finish"]["type"] == "length" for answer in answers.values())
    order = narrow.ask("probes:prefill_order")
    overtook = sum(sizes.get(name, 0) for name in order[: order.index("long")])
    assert BOUND - 100 < overtook <= BOUND
    # Counted where it is enforced, and for every request of this server so far.
    assert overtook <= narrow.ask("probes:queue_state")["overtaken"] <= BOUND


def test_with_fair_shares_a_tenant_with_a_flood_of_short_ones_takes_its_half(
    llama: Path, texts: Texts
) -> None:
    quantum, sizes = 300, {}
    settings = {"max_running_requests": 1, "kvshare_schedule_quantum": quantum}
    with lab(llama, **{**OURS, **settings}) as fair:
        script = [request("first", texts.passage(100), new=30)]
        for tenant, num, size in (("hot", 20, 90), ("cold", 5, 350)):
            for i in range(num):
                sizes[f"{tenant}{i}"] = tenant, size
                script.append(request(f"{tenant}{i}", texts.passage(size), new=1, extra_key=tenant))
        fair.play(script)
        order = [sizes[name] for name in fair.ask("probes:prefill_order")[1:]]
        assert_nothing_is_kept(fair)
    last = [max(i for i, (one, _) in enumerate(order) if one == name) for name in ("hot", "cold")]
    served = {"hot": 0, "cold": 0}
    for tenant, size in order[: min(last) + 1]:  # as long as both wait
        served[tenant] += size
        assert abs(served["hot"] - served["cold"]) <= quantum + 350 + 10  # and what lookups cost
    assert min(served.values()) > 1000


def test_a_fault_in_ordering_fails_no_request(narrow: Lab, texts: Texts) -> None:
    narrow.ask("probes:break_order")
    answers = narrow.play([request("first", texts.passage(100)), *long_and_short(texts)])
    assert all(answer["finish"]["type"] == "length" for answer in answers.values())
    assert_nothing_is_kept(narrow)


@pytest.mark.parametrize("name", ["queue", "place_of", "let_in", "computes", "changed"])
def test_a_fault_that_stays_fails_no_request_and_ends_in_sglangs_order(
    narrow: Lab, texts: Texts, name: str
) -> None:
    """In making the order, in asking who must wait, as one is let in, and as the tree changes."""
    before = narrow.ask("probes:queue_faults")
    narrow.ask("probes:break_waiting", name)
    sizes = [100, *(40 + 30 * (i % 5) for i in range(14))]
    requests = [request(f"r{i}", texts.passage(size), new=1) for i, size in enumerate(sizes)]
    answers = narrow.play([requests[0], requests[1:]])
    found = narrow.ask("probes:mend_waiting")
    assert all(answer["finish"]["type"] == "length" for answer in answers.values())
    assert found["faults"] > before
    if name == "queue":
        assert found["off"]
        assert found["faults"] <= before + PERSISTENT
        assert narrow.ask("probes:prefill_order") == [one["rid"] for one in requests]
    assert_nothing_is_kept(narrow)


# ---- a server's life -------------------------------------------------------------------------


def test_aborts_flushes_new_weights_and_evictions_leave_nothing_behind(
    it: Lab, llama: Path, texts: Texts
) -> None:
    rng = random.Random(11)
    passages = [texts.passage(rng.randrange(80, 400)) for _ in range(12)]
    for part in range(2):
        script: list[Any] = []
        sent = []
        for i in range(16):
            rid = f"{part}-{i}"
            sent.append(rid)
            prompt = [*texts.passage(5), *rng.choice(passages), *rng.choice(passages)]
            options = {"kvshare": rng.choice([None, None, "exact"]), "new": rng.randrange(1, 12)}
            script.append(request(rid, prompt, extra_key=rng.choice([None, "t"]), **options))
            script.append(("polls", rng.randrange(3)))
            if rng.random() < 0.2:
                script.append(("abort", rng.choice(sent)))
            if i == 9:
                script += [("flush",), ("call", "probes:update_weights", str(llama), False)]
        answers = it.play(script)
        assert set(answers) == set(sent)
        assert all(answer["finish"] for answer in answers.values())
        assert_nothing_is_kept(it)
