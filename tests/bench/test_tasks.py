"""Laws of the reader's tasks: what an edit, a splice and a template keep, and what they change."""

import random
from itertools import pairwise

import pytest

from kvshare_sglang.bench import tasks

SIZE = tasks.Size(18, prose=0)
KINDS = ("substitution", "insertion", "deletion")


def samples(task, count=40, **wanted):
    rng = random.Random(f"tests of {task}")
    return rng, [tasks.make(task, rng, SIZE, **wanted) for _ in range(count)]


@pytest.mark.parametrize("task", tasks.TASKS)
def test_a_sample_is_told_consistently_and_has_one_answer(task):
    _, made = samples(task)
    for sample in made:
        assert tasks.consistent(sample.documents)
        assert sample.answer
        assert sample.prompt.endswith(f"Q: {sample.question} A:")


@pytest.mark.parametrize("task", tasks.TASKS)
def test_the_same_seed_makes_the_same_samples(task):
    assert samples(task, 5)[1] == samples(task, 5)[1]


@pytest.mark.parametrize("task", tasks.TASKS)
def test_without_its_documents_a_question_has_no_answer(task):
    _, made = samples(task, 10)
    for sample in made:
        bare = tasks.Sample(task, sample.documents[:0], sample.ask)
        assert bare.answer is None


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_chain_of_some_depth_depends_on_that_many_more_facts(depth):
    _, made = samples("hops", 10, depth=depth)
    for sample in made:
        facts = [(d, i) for d, doc in enumerate(sample.documents) for i in range(len(doc.facts))]
        needed = 0
        for d, i in facts:
            doc = sample.documents[d]
            without = list(sample.documents)
            without[d] = doc._replace(facts=doc.facts[:i] + doc.facts[i + 1 :])
            needed += tasks.Sample("hops", tuple(without), sample.ask).answer is None
        assert needed == depth + 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changes", [True, False])
@pytest.mark.parametrize("task", tasks.TASKS)
def test_an_edit_touches_one_fact_and_changes_the_answer_only_if_asked(task, kind, changes):
    if kind == "deletion" and changes and task != "state":
        pytest.skip("without this fact there would be no answer")
    rng, made = samples(task)
    pairs = [tasks.edit(rng, s, kind, changes=changes) for s in made]
    found = [p for p in pairs if p is not None]
    assert len(found) > len(made) // 8
    step = {"substitution": 0, "insertion": 1, "deletion": -1}[kind]
    for pair in found:
        assert pair.changes == changes
        old, new = (
            [f for d in s.documents for f in d.facts] for s in (pair.cached[0], pair.prompt)
        )
        assert len(new) - len(old) == step
        same = sum(a == b for a, b in zip(old, new, strict=False))
        same_from_end = sum(a == b for a, b in zip(old[::-1], new[::-1], strict=False))
        assert max(same, same_from_end, len(new) - 1) == len(new) - 1 or step


def test_far_edits_are_before_near_ones():
    rng, made = samples("lookup")
    first = {}
    for where in ("far", "near"):
        pairs = [tasks.edit(rng, s, "substitution", changes=False, where=where) for s in made]
        first[where] = [
            next(i for i, (a, b) in enumerate(zip(*texts, strict=True)) if a != b) / len(texts[0])
            for pair in pairs
            if pair is not None
            for texts in [[pair.cached[0].prompt.split(), pair.prompt.prompt.split()]]
        ]
    assert max(first["far"]) < 0.45 < min(first["near"])


@pytest.mark.parametrize("task", tasks.TASKS)
def test_a_splice_has_cached_every_document_and_foreign_ones(task):
    rng, made = samples(task, 10)
    for sample, other in pairwise(made):
        pair = tasks.splice(rng, sample, foreign=other.documents)
        cached = [d for s in pair.cached for d in s.documents]
        assert set(sample.documents) <= set(cached)
        assert set(other.documents) & set(cached)
        assert pair.prompt == sample


@pytest.mark.parametrize("task", tasks.TASKS)
def test_a_template_keeps_the_frame(task):
    rng, made = samples(task, 10)
    for sample in made:
        (old,) = tasks.template(rng, sample).cached
        for a, b in zip(old.documents, sample.documents, strict=True):
            assert [(f.kind, f.key, f.phrase) for f in a.facts] == [
                (f.kind, f.key, f.phrase) for f in b.facts
            ]
        assert old.documents != sample.documents


def test_prose_to_train_on_and_to_test_on_are_apart():
    assert not set(tasks.prose("train")) & set(tasks.prose("test"))


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="task must be one of"):
        tasks.make("chess", random.Random(0), SIZE)


@pytest.mark.parametrize("task", ["hops", "state"])
def test_an_adversarial_prefix_steers_text_that_stays_the_same(task):
    rng, made = samples(task, 40)
    pairs = [p for s in made if (p := tasks.adversarial(rng, s)) is not None]
    assert len(pairs) >= 5
    for pair in pairs:
        (cached,) = pair.cached
        half = len(pair.prompt.documents) // 2
        assert cached.documents[half:] == pair.prompt.documents[half:]
        assert cached.documents[:half] != pair.prompt.documents[:half]
        assert None not in (cached.answer, pair.prompt.answer)
        assert pair.changes


@pytest.mark.parametrize("task", ["lookup", "hops", "state"])
def test_a_list_is_asked_without_its_keys_and_answered_as_read(task):
    rng = random.Random("lists")
    size = tasks.Size(60, 4)
    found = 0
    for _ in range(20):
        try:
            pair, parts = tasks.listing(rng, task, size, keys=4)
        except ValueError:
            continue
        found += 1
        text = "".join(key + value for key, value in parts)
        assert text == f" {pair.prompt.answer}"
        question = tasks.listing_prompt(pair.prompt).splitlines()[-1]
        assert not any(key in question.split() for key in pair.prompt.ask.keys)
    assert found >= 5


def test_lessons_spell_out_what_is_read():
    """A hint says what is known of its key from what is before it."""
    rng = random.Random("hints")
    told: set[str] = set()
    for _ in range(60):
        size = tasks.Size(16, 4, hints=0.5, rivals=0.5)
        documents = tasks.scene(rng, {"state": 12, "hops": 4}, size)
        facts = [f for d in documents for f in d.facts]
        for i, fact in enumerate(facts):
            if fact.kind in tasks.HINTS:
                told.add(fact.kind)
                topic = fact.kind.removeprefix("so ")
                before = tasks.read([tasks.Document("Note", tuple(facts[:i]))])
                assert before[topic, fact.key].answer == fact.value
    assert told == tasks.HINTS


def test_rivals_are_headers_of_one_kind_in_most_documents():
    rng = random.Random("rivals")
    for _ in range(20):
        documents = tasks.scene(rng, {"state": 16}, tasks.Size(16, 4, prose=0, rivals=1.0))
        kinds = [f.kind for d in documents for f in d.facts if f.kind in tasks.HEADERS]
        assert len(set(kinds)) == 1
        assert len(kinds) >= 4
        assert kinds[0] in ("role", "unit")
