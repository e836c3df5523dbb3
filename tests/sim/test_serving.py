"""Simulated servers obey the laws of queues, and hold what the real index would find."""

import dataclasses
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvshare_sglang.bench.common import ScriptError
from kvshare_sglang.bench.simulate import calibrate, policies, synthetic
from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.policy.select.attention_trace import AttentionTrace
from kvshare_sglang.sim.caches import DocumentCache, TextCache
from kvshare_sglang.sim.life import Life
from kvshare_sglang.sim.matcher import KVShare
from kvshare_sglang.sim.mirror import Mirror
from kvshare_sglang.sim.radix import by_frequency, lru
from kvshare_sglang.sim.serving import Job, Limits, StepCosts, Work, simulate

COSTS = StepCosts(
    step=0.5,
    row=0.01,
    copy=0.001,
    request=0.25,
    decode_step=0.125,
    decode_request=0.0625,
    overhead=0,
)


def text(seed, length):
    return np.random.default_rng(seed).integers(0, 5000, length).astype(np.int32)


def jobs(lengths, gaps, new_tokens=1):
    times = np.cumsum(gaps)
    return [
        Job(i, float(at), n, new_tokens, prompt=text(i, n))
        for i, (at, n) in enumerate(zip(times, lengths, strict=True))
    ]


def serve(these, *, order="fcfs", route="least_load", workers=1, reuse=False, limits=Limits(),  # noqa: B008
          cache=TextCache, capacity=10**6, bound=4096, costs=COSTS):  # fmt: skip
    caches = [cache(capacity=capacity, reuse=reuse) for _ in range(workers)]
    return simulate(
        these, caches, order=policies.order_of(order, bound=bound),
        choose=policies.route_of(route), costs=costs, limits=limits,
    )  # fmt: skip


QUEUES = st.lists(st.tuples(st.integers(2, 90), st.floats(0, 3)), min_size=1, max_size=25)


# ---- time -----------------------------------------------------------------------------------


@given(QUEUES)
def test_one_request_at_a_time_waits_as_lindley_says(queue):
    """D. V. Lindley (1952): wait = max(0, wait of the one before + its service - the gap)."""
    lengths, gaps = zip(*queue, strict=True)
    result = serve(jobs(lengths, gaps), limits=Limits(chunk=1000, max_running=1))
    wait = 0.0
    for i, (length, got) in enumerate(zip(lengths, result.waits, strict=True)):
        if i:
            wait = max(0.0, wait + COSTS.prefill(lengths[i - 1], 0, 1) - gaps[i])
        assert got == pytest.approx(wait + COSTS.prefill(length, 0, 1))
    assert sum(result.busy_s) == pytest.approx(sum(COSTS.prefill(n, 0, 1) for n in lengths))


def test_a_long_prompt_comes_in_chunks_and_a_short_one_rides_along():
    result = serve(jobs([250, 30], [0, 0.1]), limits=Limits(chunk=100))
    first, second = result.jobs
    steps = [COSTS.prefill(100, 0, 1)] * 2 + [COSTS.prefill(80, 0, 2)]
    assert first.first_s == second.first_s == pytest.approx(sum(steps))


@given(QUEUES, st.integers(1, 3), st.sampled_from([1, 8]))
def test_what_is_read_late_is_read_after_the_step_that_follows_if_one_does(
    queue, new_tokens, max_running
):
    """Prompts as long as a chunk, one a step. Where one request runs at a time, it holds its place
    until its last token was read, so nothing but its first one is late, by a decode step."""
    _, gaps = zip(*queue, strict=True)
    limits = Limits(chunk=50, max_running=max_running)
    num = 1 if max_running > 1 else new_tokens
    now, late = (
        serve(jobs([50] * len(gaps), gaps, num), limits=limits, costs=COSTS._replace(late=is_late))
        for is_late in (False, True)
    )
    assert now.busy_s == pytest.approx(late.busy_s)
    step = COSTS.prefill(50, 0, 1)
    for i, (soon, seen) in enumerate(zip(now.jobs, late.jobs, strict=True)):
        if max_running == 1:
            assert seen.first_s - soon.first_s == pytest.approx(COSTS.decode(1) if num > 1 else 0)
            assert seen.end_s == pytest.approx(soon.end_s)
        else:
            following = [one for one in now.jobs[i + 1 : i + 2] if one.due_s <= soon.end_s]
            assert seen.first_s == seen.end_s == pytest.approx(soon.end_s + step * len(following))


def test_what_was_not_read_is_known_to_nobody():
    """Text of a step is no prefix in the next one, whose batch was chosen before."""
    one, other = (Job(i, 0.0, 100, 1, prompt=text(7, 100)) for i in range(2))
    for late, exact in ((False, 99), (True, 0)):
        limits = Limits(chunk=100)
        these = [dataclasses.replace(one), dataclasses.replace(other)]
        done = serve(these, limits=limits, costs=COSTS._replace(late=late)).jobs
        assert (done[0].work.exact, done[1].work.exact) == (0, exact)


def test_a_row_pays_for_what_it_attends_to_whatever_the_chunks():
    """A prompt attends to as many pairs as counting gives; cut in chunks, to no more or less."""
    costs = StepCosts(step=0, row=0, pair=1, copy=0, request=0, overhead=0)
    for chunk in (1000, 64, 7):
        result = simulate(
            jobs([200], [0]), [TextCache(capacity=1000)], order=policies.fcfs,
            choose=policies.least_load, costs=costs, limits=Limits(chunk=chunk),
        )  # fmt: skip
        assert result.busy_s[0] == pytest.approx(sum(range(1, 201)), rel=0.01)


def test_where_attention_pads_each_chunk_pays_for_all_up_to_its_end():
    """What reused has attention of ours, which does not pad."""
    costs = StepCosts(step=0, row=0, pair=1, copy=0, request=0, overhead=0, pads=True)
    for chunk, ends in ((1000, [200]), (64, [64, 128, 192, 200])):
        result = serve(jobs([200], [0]), limits=Limits(chunk=chunk), costs=costs)
        assert result.busy_s[0] == sum(end**2 / 2 for end in ends)
    moved = [text(1, 400), np.concatenate([text(2, 20), text(1, 400)])]
    both = []
    for pads in (True, False):
        these = [Job(i, 1e6 * i, len(one), 1, prompt=one) for i, one in enumerate(moved)]
        done = serve(these, reuse=True, costs=costs._replace(pads=pads)).jobs
        assert done[1].work.copied > 100
        both.append(done[1].first_s - done[1].due_s)
    assert both[0] == both[1]


def test_those_who_decode_share_a_step_and_let_prefill_go_first():
    these = jobs([10, 10, 10, 10], [0, 0.1, 0.1, 1.9], new_tokens=3)
    these[0].new_tokens = 1
    result = serve(these, limits=Limits(chunk=100))
    alone = COSTS.prefill(10, 0, 1)
    pair, late = alone + COSTS.prefill(20, 0, 2), alone
    _, a, b, c = result.jobs
    # The last comes while the first two decode once, and is let in before they go on.
    assert a.first_s == b.first_s == pytest.approx(pair)
    assert c.first_s == pytest.approx(pair + COSTS.decode(2) + late)
    assert a.end_s == pytest.approx(c.first_s + COSTS.decode(3))
    assert c.end_s == pytest.approx(a.end_s + COSTS.decode(1))


@given(QUEUES, st.sampled_from(["fcfs", "lpm", "hrrn"]), st.integers(1, 3), st.integers(20, 200))
def test_whatever_the_order_all_are_served_and_no_work_is_lost(queue, order, workers, chunk):
    lengths, gaps = zip(*queue, strict=True)
    limits = Limits(chunk=chunk, max_running=4, memory=150)

    def run():
        return serve(jobs(lengths, gaps, 2), order=order, workers=workers, limits=limits)

    result = run()
    assert np.array_equal(result.waits, run().waits)
    for job in result.jobs:
        assert job.work.exact + job.work.rows == job.tokens
        assert job.due_s < job.first_s < job.end_s
    least = sum(COSTS.row * job.work.rows for job in result.jobs)
    assert sum(result.busy_s) > least


def test_short_work_goes_first_under_hrrn_and_known_text_under_lpm():
    known = text(9, 400)
    first = Job(0, 0, 400, 1, prompt=known)
    long = Job(1, 0.1, 300, 1, prompt=text(1, 300))
    short = Job(2, 0.2, 20, 1, prompt=text(2, 20))
    hit = Job(3, 0.3, 380, 1, prompt=np.concatenate([known[:370], text(3, 10)]))

    def after(order):
        these = [
            Job(j.number, j.due_s, j.tokens, 1, prompt=j.prompt) for j in (first, long, short, hit)
        ]
        done = serve(these, order=order, limits=Limits(chunk=400, max_running=1)).jobs
        return sorted((1, 2, 3), key=lambda i: done[i].first_s)

    assert after("fcfs") == [1, 2, 3]
    assert after("lpm")[0] == 3
    # Nobody has aged when the long one is let in; then the ratios are 300 / 10 and 300 / 20.
    assert after("hrrn") == [1, 3, 2]


def test_the_plug_ins_own_order_keeps_its_bound():
    rng = np.random.default_rng(0)
    these = jobs([1500, *rng.integers(20, 200, 60).tolist()], [0.0, *[0.05] * 60])
    result = serve(these, order="kvshare", limits=Limits(chunk=200, max_running=2), bound=1000)
    worst = max(job.overtaken for job in result.jobs)
    assert 0 < worst <= 1000


# ---- what is held ----------------------------------------------------------------------------


@given(st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=40), min_size=1, max_size=8))
def test_without_reuse_a_hit_is_the_longest_prefix_of_any_prompt_before(prompts):
    cache = TextCache(capacity=10**6, reuse=False)
    for i, prompt in enumerate(prompts):
        common = [
            next((k for k, (a, b) in enumerate(zip(prompt[:-1], other, strict=False)) if a != b),
                 min(len(prompt) - 1, len(other)))
            for other in prompts[:i]
        ]  # fmt: skip
        job = Job(i, 0, len(prompt), 1, prompt=np.array(prompt, np.int32))
        exact = max(common, default=0)
        assert cache.prefix(job) == exact
        assert cache.look(job) == cache.take(job) == Work(exact, 0, len(prompt) - exact)
        cache.leave(job)


@settings(max_examples=25)
@given(st.permutations(range(6)), st.integers(0, 3))
def test_moved_text_costs_what_the_server_would_run(order, drop):
    """The mirror asks the server's own selector and admission, over a cache of its own."""
    parts = [text(10 + i, 90) for i in range(6)]
    cached = np.concatenate(parts)
    prompt = np.concatenate([text(1, 20), *(parts[i] for i in order[drop:]), text(2, 15)])
    cache, mirror, config = TextCache(capacity=10**6), Mirror(), KVShareConfig()
    before = Job(0, 0, len(cached), 1, prompt=cached)
    cache.take(before)
    cache.leave(before)
    mirror.add(cached)
    selector = AttentionTrace(config.seam)
    plan = mirror.plan(prompt, config, selector)
    rows = selector.most_rows(plan, budget=config.budget)
    got = cache.look(Job(1, 0, len(prompt), 1, prompt=prompt))
    assert got == Work(plan.prefix_len, len(prompt) - plan.prefix_len - rows, rows)
    assert got.copied > 0


def test_a_full_cache_forgets_and_never_holds_more():
    cache = TextCache(capacity=1000)
    for i in range(12):
        job = Job(i, 0, 300, 1, prompt=text(i % 5, 300))
        cache.take(job)
        cache.leave(job)
        assert cache.held <= 1000
    assert cache.prefix(Job(99, 0, 300, 1, prompt=text(11 % 5, 300))) == 299
    huge = Job(100, 0, 1200, 1, prompt=text(50, 1200))
    assert cache.take(huge).rows == 1200
    cache.leave(huge)
    assert cache.held <= 1000


def test_counted_documents_are_hits_in_place_and_copies_elsewhere():
    cache = DocumentCache(capacity=10**6, budget=0.1)

    def job(*documents):
        held = tuple((number, 100) for number in documents)
        return Job(0, 0, 100 * len(documents) + 20, 1, documents=held)

    for documents, want in (
        ((1, 2, 3), Work(0, 0, 320)),
        ((1, 2, 4), Work(200, 0, 120)),  # a prefix of two
        ((3, 1), Work(0, 180, 40)),  # both held elsewhere: a tenth runs again
        ((9, 3, 1), Work(0, 160, 160)),  # behind 100 new tokens: a tenth of 200 + 2 * 100
    ):
        assert cache.take(job(*documents)) == want, documents
        cache.leave(job(*documents))
    plain = DocumentCache(capacity=250, reuse=False)
    for documents, want in (((1, 2), 0), ((2, 1), 0), ((2, 1), 200), ((5, 2), 0), ((1, 5), 0)):
        assert plain.take(job(*documents)).exact == want
        assert plain.take(job(*documents)).copied == 0
        plain.leave(job(*documents))
        assert plain.held <= 250


def test_synthetic_requests_come_at_their_rate_and_favour_few():
    made = list(synthetic.requests(4000, rate=50, documents=1000))
    assert made[-1].due_s == pytest.approx(4000 / 50, rel=0.1)
    asked = np.bincount([number for job in made for number, _ in job.documents], minlength=1000)
    assert asked[0] > asked[10] > asked[500]
    assert all(job.tokens == 60 + sum(n for _, n in job.documents) for job in made)
    assert all(len(set(job.documents)) == len(job.documents) for job in made)
    again = list(synthetic.requests(4000, rate=50, documents=1000))
    assert [job.documents for job in again] == [job.documents for job in made]


@pytest.mark.parametrize("clock", [0, 5])
def test_what_one_program_goes_on_from_outlives_no_other_program(clock):
    """Programs in a pool for three of them run as much as under LRU, whether their turns are
    prefixes or, with new words in front, copies."""
    rng = np.random.default_rng(4)
    live, prompts = [], []
    for turn in range(90):
        if turn % 15 < 3:  # one begins; only the last three go on
            live = [text(turn, 250), *live][:3]
        i = int(rng.integers(len(live)))
        prompts.append(np.concatenate([text(1000 + turn, clock), live[i]]))
        live[i] = np.concatenate([live[i], text(2000 + turn, 50)])
    ran = {}
    for policy in (by_frequency, lru):
        life = Life(KVShare(KVShareConfig()), capacity=2000, max_depth=1, policy=policy)
        found = [life.serve(None, prompt) for prompt in prompts]
        ran[policy] = sum(one.prompt_len - one.prefix_len - one.num_useful for one in found)
    assert ran[by_frequency] <= 1.02 * ran[lru] < 0.6 * sum(map(len, prompts))


# ---- who goes where ----------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["cheapest", "kvshare"])
def test_moved_text_goes_to_who_holds_it_only_where_that_is_asked(route):
    """Two groups ask for documents of their own in ever new orders; a worker can hold one's."""
    rng = np.random.default_rng(3)
    groups = [[text(100 * g + i, 150) for i in range(10)] for g in range(2)]
    made = []
    for i in range(60):
        group = groups[int(rng.integers(2))]
        parts = [group[k] for k in rng.permutation(10)[:4]]
        prompt = np.concatenate([*parts, text(900 + i, 12)])
        made.append(Job(i, 9.0 * i, len(prompt), 1, prompt=prompt))

    def found(name, workers):
        these = [Job(j.number, j.due_s, j.tokens, 1, prompt=j.prompt) for j in made]
        result = serve(these, route=name, workers=workers, reuse=True, capacity=2300)
        return sum(job.work.copied + job.work.exact for job in result.jobs)

    # More than four workers: only some are asked exactly.
    for workers in (2, 6):
        told = {name: found(name, workers) for name in (route, "random", "cache_aware")}
        assert told[route] > 1.3 * max(told["random"], told["cache_aware"]), told


def test_a_prompt_goes_where_its_prefix_went_under_cache_aware():
    shared = [text(1, 200), text(2, 200)]
    made = [
        Job(i, 5.0 * i, 210, 1, prompt=np.concatenate([shared[i % 2], text(50 + i, 10)]))
        for i in range(10)
    ]
    result = serve(made, route="cache_aware", workers=2)
    assert {job.worker for job in result.jobs[::2]} == {result.jobs[0].worker}
    assert {job.worker for job in result.jobs} == {0, 1}


def test_policies_are_named_or_given():
    assert policies.order_of("kvshare_sglang.bench.simulate.policies:lpm", bound=1) is policies.lpm
    assert (
        policies.route_of("kvshare_sglang.bench.simulate.policies:least_load")
        is policies.least_load
    )
    for wrong in ("sjf", "no.such.module:f", "kvshare_sglang.bench.simulate.policies:sjf"):
        with pytest.raises(ScriptError):
            policies.order_of(wrong, bound=1)


# ---- step costs --------------------------------------------------------------------------------


@given(st.tuples(*[st.floats(0.001, 1)] * 6), st.integers(0, 100))
def test_costs_are_found_again_in_what_they_made(true, seed):
    overhead, step, row, pair, copy, request = true
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(30):
        steps, rows, pairs, copied, num = (int(rng.integers(1, hi)) for hi in (4, 50, 60, 50, 9))
        seconds = overhead + steps * step + rows * row + pairs * pair
        seconds += copied * copy + num * request
        samples.append(calibrate.Sample(seconds, steps, rows, pairs, copied, num))
    costs, left = calibrate.fit(samples, {1: 0.5, 8: 0.5 + 7 * 0.25})
    got = (costs.overhead, costs.step, costs.row, costs.pair, costs.copy, costs.request)
    assert got == pytest.approx(true, rel=1e-4, abs=1e-6)
    assert left < 1e-6
    assert (costs.decode_step, costs.decode_request) == pytest.approx((0.25, 0.25))


class KnownServer:
    """Answers as a server of known costs would: alone, or in a burst, in the order they come."""

    TRUE = np.array([0.02, 0.03, 0.0004, 2e-8, 4e-5, 0.004])
    spec = SimpleNamespace(name="known")

    def __init__(self, most):
        self.most, self.came, self.lock = most, 0, threading.Lock()

    def flush(self):
        self.came = 0

    def ask(self, ids):
        with self.lock:
            self.came += 1
            burst = self.came if len(ids) == calibrate.SHORT else 1
        moved = len(ids) - 48 in calibrate.LENGTHS
        copied = len(ids) * 4 // 5 if moved else 0
        run = len(ids) - copied
        steps = calibrate.steps_of(burst, most=self.most)
        pairs = run * (len(ids) - run / 2)
        done = np.array([1, steps, burst * run, burst * pairs, copied, burst])
        return SimpleNamespace(ttft_s=done @ self.TRUE, kvshare={"copied_tokens": copied})


@pytest.mark.parametrize("most", [8, 64])
def test_what_is_measured_tells_the_costs_apart_also_where_times_are_noisy(most):
    server = KnownServer(most)
    samples = calibrate.measure(server, vocab=99, chunk=2048, most=most, reuse=True, repeats=1)
    costs, _ = calibrate.fit(samples, {1: 0.1})
    got = (costs.overhead, costs.step, costs.row, costs.pair, costs.copy, costs.request)
    assert got == pytest.approx(server.TRUE, rel=1e-6)
    # The variance of least squares, sigma**2 / (A'A): relative to each cost, at 3% of noise.
    done = np.array([[1.0, *one[1:]] for one in samples]) * server.TRUE
    done /= done.sum(axis=1, keepdims=True)
    deviation = 0.03 * np.sqrt(np.diag(np.linalg.inv(done.T @ done)))
    overhead, step, *_, request = deviation
    assert overhead < 0.3
    assert step < 0.25
    assert request < 0.6


@given(st.integers(0, 200))
def test_no_cost_is_negative_whatever_was_measured(seed):
    rng = np.random.default_rng(seed)
    samples = [
        calibrate.Sample(float(rng.uniform(0.01, 1)), *(int(x) for x in rng.integers(1, 9, 5)))
        for _ in range(8)
    ]
    costs, _ = calibrate.fit(samples, {1: 0.3, 8: 0.2})
    assert min(costs) >= 0


def test_too_few_samples_are_refused():
    with pytest.raises(ScriptError, match="at least 7 samples, got 1"):
        calibrate.fit([calibrate.Sample(1, 1, 1, 1, 1, 1)], {1: 0.1})
