"""The router's index against the worker's own tree, and against definitions."""

from collections import Counter

import numpy as np
import pytest
from history import SPACES, Told, live
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import random_tokens, texts

from kvshare_sglang import wire
from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.errors import ConfigError, TreeError
from kvshare_sglang.policy.options import RequestOptions
from kvshare_sglang.radix_fuzzy.fingerprints import winnow
from kvshare_sglang.radix_fuzzy.segments import path_tokens
from kvshare_sglang.radix_fuzzy.tree import FuzzyTree
from kvshare_sglang.router import index as index_module
from kvshare_sglang.router.cost import AFFINITY, SLACK, UNSAID, Standing, Work, order, work_of
from kvshare_sglang.router.gateway import CHECK_S, FAILURES
from kvshare_sglang.router.index import AVOID_S, RECENT_S, SILENT_S, SUSPECT_S, Index
from kvshare_sglang.router.joint import JointMap, coverage
from kvshare_sglang.router.mirror import Mirror

AUTO = RequestOptions()
NONE = (None, None)


def mirror_of(told, joint=None, worker=0):
    """A mirror that has heard everything from the start."""
    return Mirror(told.snapshot(), joint or JointMap(), worker, seed=3)


def runs_of(tree, space, prompt, start=0):
    extra_key, salt, weights = space
    return tree.match(((extra_key, salt), weights), prompt, start=start, max_depth=1, tolerance=0.8)


def renamed(runs, ids):
    return [run._replace(source=ids[run.source]) for run in runs]


# ---- a mirror ----------------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.data())
def test_a_mirror_that_heard_everything_finds_the_very_runs_that_the_worker_finds(data):
    told = Told()
    mirror = mirror_of(told)
    for _ in range(3):
        live(told, data, data.draw(st.integers(1, 6)))
        for message in told.changes():
            mirror.apply(message.events)
        mirror.check()
        told.tree.check()
        theirs = {held.segment.id: seg_id for seg_id, held in mirror._held.items()}
        for space in SPACES:
            prompt = data.draw(texts())
            ours = renamed(mirror.match(space[:2], prompt, start=0), theirs)
            assert ours == list(runs_of(told.tree, space, prompt))


@settings(max_examples=40)
@given(st.data())
def test_a_mirror_from_a_snapshot_is_the_tree_that_its_segments_make(data):
    """And goes on with the changes after it as that tree would."""
    told = Told()
    live(told, data, 8)
    told.changes()
    snapshot = told.snapshot()
    mirror = mirror_of(told)
    built, ids = FuzzyTree(secret=7), {}
    for one in snapshot.segments:
        mirror.insert(one)
        extra_key, salt, weights = one.space
        ids[one.id] = built.insert(
            ((extra_key, salt), weights),
            np.frombuffer(one.tokens, np.int32),
            start=one.start,
            parent=ids.get(one.parent),
            depth=one.depth,
            hashed=(one.context, one.near),
        ).id
    mirror.check()
    assert mirror.num_tokens == told.tree.num_tokens
    back = {held.segment.id: ids[seg_id] for seg_id, held in mirror._held.items()}
    prompt = data.draw(texts())
    for space in SPACES:
        found = renamed(mirror.match(space[:2], prompt, start=0), back)
        assert found == list(runs_of(built, space, prompt))
    live(told, data, 4)
    for message in told.changes():
        mirror.apply(message.events)
    mirror.check()
    assert mirror.num_tokens == told.tree.num_tokens


@settings(max_examples=40)
@given(st.data())
def test_the_exact_prefix_is_the_longest_that_any_path_from_the_root_begins_with(data):
    """Paths of depth 0 that begin at 0 are what SGLang's own tree holds."""
    told, stored = Told(), []
    mirror = mirror_of(told)
    for _ in range(data.draw(st.integers(1, 5))):
        store(told, data.draw(st.sampled_from(stored or [()])), data.draw(texts()), stored)
    for message in told.changes():
        mirror.apply(message.events)
    stems = [np.array(one, np.int32) for one in stored]
    base = data.draw(st.sampled_from(stems))
    prompt = np.concatenate([base[: data.draw(st.integers(0, len(base)))], data.draw(texts())])
    same = [len(np.flatnonzero(np.cumprod(a == b))) for a, b in (cut(s, prompt) for s in stems)]
    assert mirror.prefix_len(NONE, prompt) == min(max(same), len(prompt) - 1)
    assert mirror.prefix_len(("other", None), prompt) == 0


def cut(a, b):
    size = min(len(a), len(b))
    return a[:size], b[:size]


def store(told, stem, text, stored):
    """As a prefix cache does: what is new hangs where the longest known prefix ends."""
    tokens = np.concatenate([np.array(stem, np.int32), text])
    shared, parent = 0, None
    for seg in told.tree.segments():
        path = path_tokens(seg, 0, seg.stop)
        a, b = cut(path, tokens)
        same = int(np.cumprod(a == b).sum())
        if same > shared:
            shared = same
            parent = seg if same > seg.start else parent
            while parent.start >= same:
                parent = parent.parent
    if shared < len(tokens):
        told.insert(SPACES[0], tokens[shared:], start=shared, parent=parent.id if shared else None)
    stored.append(tokens.tolist())


@settings(max_examples=40)
@given(st.data())
def test_the_joint_map_says_of_each_gram_who_holds_it(data):
    """The bits of a worker are the grams of its live segments, counted anew."""
    joint = JointMap(capacity=64)
    lives = [Told(secret=i) for i in range(3)]
    mirrors = [mirror_of(told, joint, worker=i) for i, told in enumerate(lives)]
    for _ in range(2):
        for told, mirror in zip(lives, mirrors, strict=True):
            live(told, data, data.draw(st.integers(0, 4)))
            for message in told.changes():
                mirror.apply(message.events)
    held = [{h for one in mirror._held.values() for h in one.hashes.tolist()} for mirror in mirrors]
    every = np.array(sorted(set().union(*held)), np.uint64)
    masks = joint.find(every).tolist()
    assert masks == [sum(1 << i for i in range(3) if h in held[i]) for h in every.tolist()]
    joint.drop(1)
    assert not any(mask & 2 for mask in joint.find(every).tolist())


def test_text_that_is_trimmed_is_held_no_more_and_what_is_left_of_it_still_is():
    told, joint = Told(), JointMap()
    mirror = mirror_of(told, joint)
    text = random_tokens(1, 400)
    seg = told.insert(SPACES[0], text)
    told.insert(SPACES[0], text[200:300], start=7, depth=1, before=text[:7])  # a second place
    told.tree.trim(seg.id, 150)
    for message in told.changes():
        mirror.apply(message.events)
    marks = winnow(text, seed=Mirror.joint_seed(NONE, 3))
    there = joint.find(marks.hashes) > 0
    inside = (marks.positions + 8 <= 150) | ((marks.positions > 210) & (marks.positions < 280))
    outside = (marks.positions > 150) & (marks.positions < 190) | (marks.positions > 300)
    assert there[inside].all()
    assert not there[outside].any()


@pytest.mark.parametrize("wrong", ["parent", "twice", "unknown", "stop"])
def test_changes_that_do_not_follow_are_refused(wrong):
    told = Told()
    mirror = mirror_of(told)
    seg = told.insert(SPACES[0], random_tokens(1, 50))
    (message,) = told.changes()[-1:]
    events = {
        "parent": [message.events[-1].__class__(9, SPACES[0], 4, 8, 0, 0, 0, b"\0\0\0\0")],
        "twice": message.events * 2,
        "unknown": [wire.Trim(77, 0)],
        "stop": [*message.events, wire.Trim(seg.id, 51)],
    }[wrong]
    with pytest.raises(TreeError):
        mirror.apply(events)


# ---- the joint map -----------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(st.sampled_from("adD"), st.sets(st.integers(1, 300)), st.integers(0, 63)),
        max_size=25,
    )
)
def test_the_joint_map_is_a_dictionary_of_sets(steps):
    joint, held = JointMap(capacity=16), {}
    for what, keys, worker in steps:
        array = np.array(sorted(keys), np.uint64) << np.uint64(7)  # they collide
        if what == "a":
            had = joint.add(array, worker)
            assert had.tolist() == [worker in held.get(k, ()) for k in sorted(keys)]
            for k in keys:
                held.setdefault(k, set()).add(worker)
        elif what == "d":
            joint.discard(array, worker)
            for k in keys:
                held.get(k, set()).discard(worker)
        else:
            joint.drop(worker)
            for workers in held.values():
                workers.discard(worker)
        all_keys = np.arange(1, 301, dtype=np.uint64) << np.uint64(7)
        expected = [sum(1 << w for w in held.get(k, ())) for k in range(1, 301)]
        assert joint.find(all_keys).tolist() == expected


@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(1, 16)), min_size=1, max_size=20))
def test_coverage_adds_the_widths_of_each_workers_keys(pairs):
    masks = np.array([mask for mask, _ in pairs], np.uint64)
    widths = np.array([width for _, width in pairs], np.float32)
    expected = [sum(w for mask, w in pairs if mask >> i & 1) for i in range(64)]
    assert coverage(masks, widths).tolist() == expected


# ---- whom to name ------------------------------------------------------------------------------


def filled(texts_by_worker, **config):
    """An index whose workers hold these texts."""
    index, lives = Index(len(texts_by_worker), secret=5), []
    for worker, held in enumerate(texts_by_worker):
        told = Told(secret=worker)
        for text in held:
            told.insert(SPACES[0], text)
        told.changes()
        snapshot = told.snapshot(**config)
        mirror = index.begin(worker, snapshot)
        for one in snapshot.segments:
            mirror.insert(one)
        index.hear(worker, beat(told), 0.0)
        lives.append(told)
    return index, lives


def beat(told, **load):
    fields = {"weights": 0, "running": 0, "waiting": 0, "rows": 0, "rows_per_s": 0.0} | load
    return wire.Beat(1, told.number, **fields)


DOCS = [random_tokens(100 + i, 300) for i in range(8)]
QUESTION = random_tokens(99, 30)


def prompt_of(*docs):
    return np.concatenate([random_tokens(sum(docs), 20), *(DOCS[i] for i in docs), QUESTION])


def test_a_prompt_goes_where_its_text_is_in_whatever_order():
    index, _ = filled([[DOCS[0], DOCS[1]], [DOCS[2], DOCS[3]], [DOCS[4], DOCS[2]]])
    assert index.choose(prompt_of(1, 0), NONE, AUTO, 0.0).order[0] == 0
    assert index.choose(prompt_of(3, 2), NONE, AUTO, 0.0).order == [1, 2, 0]
    # Nor is it known to those of another namespace, or of another salt.
    for other in (("other", None), (None, "other")):
        assert index.choose(prompt_of(3, 2), other, AUTO, 0.0).work == Work(650, 0, 0)


def test_the_work_that_is_predicted_is_that_of_the_workers_own_plan():
    index, lives = filled([[DOCS[0]], [DOCS[1]]], select="window")
    prompt = prompt_of(0)
    config = KVShareConfig(select="window")
    runs = runs_of(lives[0].tree, SPACES[0], prompt)
    expected = work_of(runs, config, AUTO, prompt_len=len(prompt), prefix_len=0)
    choice = index.choose(prompt, NONE, AUTO, 0.0)
    assert (choice.order[0], choice.work) == (0, expected)
    assert 0 < expected.rows < 200
    exact = index.choose(prompt, NONE, RequestOptions("exact"), 0.0)
    assert exact.work == Work(len(prompt), 0, 0)


def test_a_long_queue_outweighs_cached_text():
    index, lives = filled([[DOCS[0]], [DOCS[1]]])
    prompt = prompt_of(0)
    index.hear(0, beat(lives[0], rows=100), 0.0)
    assert index.choose(prompt, NONE, AUTO, 0.0).order[0] == 0
    index.hear(0, beat(lives[0], rows=2000), 0.0)
    assert index.choose(prompt, NONE, AUTO, 0.0).order[0] == 1


def test_what_was_just_routed_is_queue_until_it_answers_and_held_for_some_seconds():
    index, lives = filled([[DOCS[0]], [DOCS[1], DOCS[2]]])
    prompt = prompt_of(5)
    first = index.choose(prompt, NONE, AUTO, 1.0)
    assert first.order[0] == 0  # it holds less
    ticket = index.route(1, first, 1.0)
    assert index.standings(1.0)[1].rows == first.work.rows == len(prompt)
    index.answers(1, ticket)
    index.answers(1, ticket)
    assert index.standings(1.0)[1].rows == 0
    for now, best in ((1.1, 1), (1 + RECENT_S / 2, 1), (2 + RECENT_S, 0)):
        for worker, told in enumerate(lives):
            index.hear(worker, beat(told), now)
        again = np.concatenate([QUESTION, prompt])
        assert index.choose(again, NONE, AUTO, now).order[0] == best


@pytest.mark.parametrize("what", ["gap", "other run", "lost changes", "misfit"])
def test_a_worker_that_missed_something_is_forgotten_until_a_snapshot_comes(what):
    index, lives = filled([[DOCS[0]], [DOCS[1]]])
    told = lives[0]
    told.insert(SPACES[0], DOCS[2])
    (message,) = told.changes()
    wrong = {
        "gap": wire.Changes(1, message.number + 1, message.events),
        "other run": wire.Changes(2, message.number, message.events),
        "lost changes": wire.Beat(1, message.number, 0, 0, 0, 0, 0.0),
        "misfit": wire.Changes(1, message.number, [wire.Trim(99, 0)]),
    }[what]
    assert not index.hear(0, wrong, 1.0)
    assert not index.hear(0, message, 1.0)  # what follows is of no use
    assert index.workers[0].mirror is None
    choice = index.choose(prompt_of(0), NONE, AUTO, 1.0)
    assert choice.work is None or choice.work.copied == 0
    assert not index._joint.find(winnow(DOCS[0], seed=Mirror.joint_seed(NONE, 5)).hashes).any()
    snapshot = told.snapshot()
    mirror = index.begin(0, snapshot)
    for one in snapshot.segments:
        mirror.insert(one)
    assert index.hear(0, beat(told), 1.0)
    assert index.choose(prompt_of(2, 0), NONE, AUTO, 1.0).order[0] == 0


def test_a_silent_worker_is_left_alone_until_the_gateway_must_have_noticed():
    index, lives = filled([[DOCS[0]], [DOCS[1]]])
    # It may ask anew only when the last check is over.
    noticed = (FAILURES + 1) * CHECK_S + FAILURES * CHECK_S
    assert noticed <= AVOID_S - 1
    for now, best in ((0.0, 0), (SILENT_S + 0.1, 1), (noticed, 1), (AVOID_S + 0.1, 0)):
        index.hear(1, beat(lives[1]), now)
        assert index.choose(prompt_of(0), NONE, AUTO, now).order[0] == best


def test_a_worker_for_which_another_one_stood_in_is_left_alone_longer_each_time():
    index, lives = filled([[DOCS[0]], [DOCS[1]]])
    now, pauses = 0.0, []
    for _ in range(3):
        for worker, told in enumerate(lives):
            index.hear(worker, beat(told), now)
        assert index.choose(prompt_of(0), NONE, AUTO, now).order[0] == 0
        for _ in range(5):  # at once: one failure
            index.served(0, 1, now)
        assert index.choose(prompt_of(0), NONE, AUTO, now).order[0] == 1
        pauses.append(index.workers[0].suspect - now)
        now = index.workers[0].suspect
    assert pauses == [SUSPECT_S, 2 * SUSPECT_S, 4 * SUSPECT_S]
    index.served(0, 1, now)
    index.served(0, 0, now)
    assert index.choose(prompt_of(0), NONE, AUTO, now).order[0] == 0


def test_without_any_stream_requests_are_spread_by_what_was_sent():
    index, counts = Index(3), Counter()
    for i in range(30):
        choice = index.choose(random_tokens(i, 100), NONE, AUTO, float(i))
        counts[choice.order[0]] += 1
        index.answers(choice.order[0], index.route(choice.order[0], choice, float(i)))
    assert counts == {0: 10, 1: 10, 2: 10}


@pytest.mark.parametrize("held", [0, 8])
@pytest.mark.parametrize("silent", [[0], [1], [0, 2]])
def test_new_text_is_spread_alike_where_some_workers_tell_of_themselves_and_some_do_not(
    silent, held
):
    """Each is known to hold little or much, each request decodes for a long while."""
    index, lives = filled([DOCS[:held]] * 3)
    decoding = [[], [], []]
    for worker in silent:
        index.forget(worker)
        index.workers[worker].heard = None
    for i in range(300):
        now = i / 10
        for worker, told in enumerate(lives):
            while decoding[worker] and decoding[worker][0][0] <= now:
                index.ended(worker, decoding[worker].pop(0)[1])
            if worker not in silent:
                index.hear(worker, beat(told, running=len(decoding[worker])), now)
        choice = index.choose(random_tokens(i, 100), NONE, AUTO, now)
        best = choice.order[0]
        ticket = index.route(best, choice, now)
        index.answers(best, ticket)
        decoding[best].append((now + 15, ticket))
        numbers = list(map(len, decoding))
        assert max(numbers) - min(numbers) <= 5, numbers
    assert sum(numbers) == 150


def test_new_text_goes_to_the_one_of_those_that_say_nothing_that_was_sent_less():
    """Also where nothing decodes that would tell them apart."""
    index, _ = filled([DOCS[:1]] * 3)
    counts = Counter()
    for worker in (0, 2):
        index.forget(worker)
        index.workers[worker].heard = None
    for i in range(30):
        choice = index.choose(random_tokens(i, 100), NONE, AUTO, 0.0)
        counts[choice.order[0]] += 1
        index.ended(choice.order[0], index.route(choice.order[0], choice, 0.0))
    assert max(counts.values()) - min(counts[w] for w in range(3)) <= 3, counts


def test_what_was_sent_is_bounded_and_still_says_who_got_less(monkeypatch):
    monkeypatch.setattr(index_module, "MOST_SENT", 1000)
    index, counts = Index(3), Counter()
    for i in range(300):
        choice = index.choose(random_tokens(i, 100), NONE, AUTO, float(i))
        counts[choice.order[0]] += 1
        index.answers(choice.order[0], index.route(choice.order[0], choice, float(i)))
        assert all(index.standings(0.0)[w].held <= 1000 for w in range(3))
    assert max(counts.values()) - min(counts.values()) <= 3


@given(
    st.lists(
        st.tuples(st.integers(1, 500), st.integers(0, 400), st.integers(0, 999), st.booleans()),
        min_size=1,
        max_size=6,
    )
)
def test_the_best_is_about_as_cheap_as_any_and_holds_least_of_those(workers):
    works = [Work(rows, 0, 0) for rows, *_ in workers]
    standings = [Standing(rows=queue, held=held, avoid=a) for _, queue, held, a in workers]
    ranked = order(works, standings, prompt_len=500)
    assert sorted(ranked) == list(range(len(workers)))
    costs = [AFFINITY * rows + queue for rows, queue, *_ in workers]
    allowed = [i for i in ranked if not workers[i][3]] or ranked
    alike = [i for i in allowed if costs[i] <= min(costs[i] for i in allowed) + SLACK * 500]
    assert workers[ranked[0]][2] == min(workers[i][2] for i in alike)
    assert ranked[0] in alike
    rest = [(workers[i][3], costs[i]) for i in ranked[1:]]
    assert rest == sorted(rest)


def test_text_outweighs_a_request_under_way_and_not_a_queue_of_them():
    """Computing 500 rows anew costs all who come later; waiting behind 1,500 costs this one."""
    works = [Work(1000, 500, 0), Work(1500, 0, 0)]
    for queue, best in ((1500, 0), (2500, 1)):
        assert order(works, [Standing(rows=queue), Standing()], prompt_len=1500)[0] == best


def test_a_faster_worker_gets_the_longer_queue():
    standings = [Standing(rows=900, rows_per_s=1000), Standing(rows=500, rows_per_s=300)]
    assert order([Work(100, 0, 0)] * 2, standings, prompt_len=100)[0] == 0


def test_a_pace_says_so_much_and_no_more():
    """One that was slow under another load keeps the text that it holds."""
    works = [Work(100, 1900, 0), Work(2000, 0, 0)]
    standings = [Standing(rows_per_s=50), Standing(rows=2000, rows_per_s=5000)]
    assert order(works, standings, prompt_len=2000)[0] == 0


def test_an_answer_that_comes_whole_is_queue_until_the_beats_tell_of_it():
    index, lives = filled([[DOCS[0]], [DOCS[1]]])
    choice = index.choose(prompt_of(5), NONE, AUTO, 1.0)
    index.route(0, choice, 1.0, streams=False)
    index.route(1, choice, 1.0, streams=True)
    for worker, told in enumerate(lives):
        index.hear(worker, beat(told), 1.1)
    assert index.standings(1.1)[0].rows == index.standings(1.1)[1].rows == choice.work.rows
    for worker, told in enumerate(lives):
        index.hear(worker, beat(told, running=1), 2.0)
    assert index.standings(2.0)[0].rows == 0  # it decodes, and says so
    assert index.standings(2.0)[1].rows == choice.work.rows
    assert index.standings(2.0 + SILENT_S)[0].rows == choice.work.rows  # it says nothing any more


def test_more_workers_than_bits_are_refused():
    with pytest.raises(ConfigError, match="64"):
        Index(65)


def test_only_a_few_workers_are_looked_at_exactly(monkeypatch):
    index, _ = filled([[DOCS[i % 8]] for i in range(6)])
    asked = []
    real = Index.work
    monkeypatch.setattr(Index, "work", lambda self, i, *a: asked.append(i) or real(self, i, *a))
    index.choose(prompt_of(4), NONE, AUTO, 0.0)
    assert len(asked) == index_module.EXACTLY
    assert 4 in asked


@pytest.mark.parametrize("options", [AUTO, RequestOptions("exact")])
def test_a_prompt_in_very_many_pieces_is_guessed_and_goes_where_its_text_is(options, monkeypatch):
    """A match takes time for each piece, in which no answer passes."""
    monkeypatch.setattr(index_module, "MOST_PIECES", 10)
    asked, text = [], random_tokens(3, 1200)
    real = Index.work
    monkeypatch.setattr(Index, "work", lambda self, i, *a: asked.append(i) or real(self, i, *a))
    index, _ = filled([[DOCS[0]], [DOCS[1], text]])
    for every, exactly in ((300, True), (40, False)):
        prompt = text.copy()
        prompt[every::every] = -1
        choice = index.choose(prompt, NONE, options, 0.0)
        assert choice.order[0] == 1
        assert (1 in asked) == exactly
        assert 0 in asked  # which holds none of it
        assert (choice.work.rows < 900) == (options is AUTO)
        asked.clear()


@pytest.mark.parametrize("options", [RequestOptions("exact"), RequestOptions(budget=1.0)])
def test_what_may_not_be_copied_goes_where_its_prefix_is_among_many_workers(options):
    """Others hold as much of its text, in other places, and less in all."""
    prompt = prompt_of(1, 2, 3)
    others = [[DOCS[3], DOCS[2], DOCS[1]]] * 5
    index, _ = filled([*others, [prompt[:900], DOCS[4]]])
    choice = index.choose(prompt, NONE, options, 0.0)
    assert choice.order[0] == 5
    assert choice.work == Work(len(prompt) - 900, 0, 900)


def test_twins_that_may_copy_nothing_meet():
    index, _ = filled([[]] * 6)
    exact, prompt = RequestOptions("exact"), prompt_of(1, 2)
    index.route(4, index.choose(prompt, NONE, exact, 0.0), 0.0)
    assert index.choose(prompt, NONE, exact, 0.1).order[0] == 4
    moved = np.concatenate([QUESTION, prompt])
    assert index.choose(moved, NONE, exact, 0.1).order[0] == 0


def test_a_request_that_says_nothing_gets_what_its_worker_gives_by_default():
    prompt = prompt_of(1)
    for default in ("auto", "exact"):
        index, _ = filled([[DOCS[1]], [DOCS[2]]], default=default)
        unsaid, said = (
            index.choose(prompt, NONE, RequestOptions(mode), 0.0) for mode in (UNSAID, default)
        )
        assert (unsaid.order, unsaid.work) == (said.order, said.work)
        assert (unsaid.work.copied > 0) == (default == "auto")
        assert index.choose(prompt, NONE, AUTO, 0.0).work.copied > 0


@pytest.mark.parametrize("configured", ["auto", "exact"])
def test_a_request_that_says_nothing_gets_what_the_last_beat_told(configured):
    """Reuse is switched off, by a gate or by hand, and on again while a worker runs."""
    prompt = prompt_of(1)
    index, lives = filled([[DOCS[1]], [DOCS[2]]], default=configured)
    for default in ("exact", "auto", "exact"):
        index.hear(0, beat(lives[0], default=default), 0.0)
        unsaid, said = (
            index.work(0, prompt, NONE, RequestOptions(mode)) for mode in (UNSAID, default)
        )
        assert unsaid == said
        assert (unsaid.copied > 0) == (default == "auto")


def test_what_was_routed_counts_as_held_while_it_waits(monkeypatch):
    prompt = prompt_of(5)
    again = np.concatenate([QUESTION, prompt])
    index, lives = filled([[DOCS[0]], [DOCS[1], DOCS[2]]])

    def best(now):
        for worker, told in enumerate(lives):
            index.hear(worker, beat(told), now)
        return index.choose(again, NONE, AUTO, now).order[0]

    ticket = index.route(1, index.choose(prompt, NONE, AUTO, 0.0), 0.0, streams=False)
    assert [best(10.0 * i) for i in range(6)] == [1] * 6
    index.answers(1, ticket)
    index.answers(1, ticket)
    assert best(50 + RECENT_S / 2) == 1
    assert best(52 + RECENT_S) == 0
    # Not without bound, and not where the worker is gone.
    index.route(1, index.choose(prompt, NONE, AUTO, 70.0), 70.0, streams=False)
    monkeypatch.setattr(index_module, "MOST_WAITING", index._recent._size + 1)
    more = random_tokens(7, 400)
    index.route(0, index.choose(more, NONE, AUTO, 70.0), 70.0)
    assert len(index._recent._waiting) == 1
    index.forget(1)
    assert (index._recent._size, index._recent._waiting) == (0, {})
