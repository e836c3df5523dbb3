"""Prompts out of passages: the answer is there to be read, and what was cached is really other."""

import json
import random
import re

import pytest

from kvshare_sglang.bench import passages
from kvshare_sglang.bench.common import ScriptError
from kvshare_sglang.bench.passages import Passage
from kvshare_sglang.bench.text import prompts


def _pool(count):
    return [
        Passage(
            i,
            f"Mount T{i} is high. It was climbed in 19{i:02d} by a man called Ulf{i}. It is cold.",
            ((f"Who climbed T{i}?", (f"Ulf{i}",)), (f"When was T{i} climbed?", (f"19{i:02d}",))),
        )
        for i in range(count)
    ]


@pytest.fixture(params=[passages.codes, passages.qa])
def scene(request):
    return request.param(random.Random(3), _pool(20), 3)


def test_the_answer_is_in_the_passage_that_is_asked_about(scene):
    one, others = scene
    assert len(one.passages) == len(others) == 3
    found = [any(a in text for a in one.answers) for text in one.passages]
    assert found == [i == one.asked for i in range(3)]


@pytest.mark.parametrize("case", [passages.splice, passages.among])
def test_each_passage_was_cached_after_other_text(scene, case):
    one, others = scene
    asked = case(random.Random(1), one, others)
    for text in one.passages:
        (cached,) = (c for c in asked.cached if text in c)
        assert cached.split(text)[0] != asked.prompt.split(text)[0]


def test_an_edit_caches_the_prompt_with_another_answer(scene):
    one, others = scene
    asked = passages.edit(random.Random(1), one, others)
    assert asked is not None
    (cached,) = asked.cached
    assert not any(a in cached for a in one.answers)
    assert asked.prompt == passages.render(one.passages, one.question)


@pytest.mark.parametrize("near", [True, False], ids=["near", "far"])
@pytest.mark.parametrize("kind", passages.EDITS)
def test_a_small_edit_touches_one_passage_and_no_sentence_that_answers(kind, near):
    pool = prompts.pool(prompts.SAMPLE, longest=100_000)
    rng = random.Random(kind)
    seen = 0
    for _ in range(60):
        scene, others = passages.codes(rng, pool, 3)
        asked = passages.small_edit(rng, scene, others, kind=kind, near=near)
        if asked is None:
            continue
        seen += 1
        assert asked.prompt == passages.render(scene.passages, scene.question)
        (cached,) = asked.cached
        was, now = (text.split("\n\n") for text in (cached, asked.prompt))
        assert len(was) == len(now)  # no passage went
        changed = [i for i, (a, b) in enumerate(zip(was, now, strict=True)) if a != b]
        (place,) = set(changed) - {len(now) - 1}  # the last is the question
        assert (place - 1 == scene.asked) == near
        facts = [[p for p in parts if "access code of" in p] for parts in (was[:-1], now[:-1])]
        codes = [re.findall(r"access code of .+? is \d+", " ".join(part)) for part in facts]
        assert codes[0] == codes[1]
        assert len(codes[0]) == 3
    assert seen > 10


def test_what_the_small_edits_change():
    rng = random.Random(0)
    others = ["In 1920 a man called Ulf was seen in Oslo. It was cold."]
    assert passages.EDITS["name"](rng, "It lay by Rome.", others) in (
        "It lay by Ulf.", "It lay by Oslo.")  # fmt: skip
    number = passages.EDITS["number"](rng, "There were 23 ships.", others)
    assert number is not None
    assert re.fullmatch(r"There were (?!23)[1-9]{2} ships\.", number)
    date = passages.EDITS["date"](rng, "It fell in 1453.", others)
    assert date is not None
    assert re.fullmatch(r"It fell in 1[34]\d\d\.", date)
    assert passages.EDITS["negation"](rng, "It was not cold.", others) == "It was cold."
    assert passages.EDITS["negation"](rng, "It was cold.", others) == "It was not cold."
    assert passages.EDITS["sentence in"](rng, "It was cold.", others) == ""
    more = passages.EDITS["sentence out"](rng, "It is.", others)
    assert more in (f"It is. {one}" for one in ("In 1920 a man called Ulf was seen in Oslo.",
                                                "It was cold."))  # fmt: skip
    for kind in ("name", "number", "date", "negation"):
        assert passages.EDITS[kind](rng, "nothing of it here", others) is None


def test_a_case_of_which_the_passages_hold_nothing_ends_with_what_is_missing(tmp_path):
    file = tmp_path / "plain.jsonl"
    lines = [{"article": i, "text": f"all is well here {i}", "qas": []} for i in range(8)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    pool = prompts.pool(file, longest=1000)
    with pytest.raises(ScriptError, match="--case date near: the passages have no such text"):
        next(prompts.asked(pool, "codes3", "date near"))


def test_what_was_edited_may_have_moved_too(scene):
    one, others = scene
    asked = passages.moved_edit(random.Random(1), one, others)
    assert asked is not None
    assert asked.prompt == passages.render(one.passages, one.question)
    assert len(asked.cached) == 2
    cached = "\n\n".join(asked.cached)
    assert not any(a in cached for a in one.answers)
    assert one.passages[one.asked] not in cached


def test_a_longer_scene_holds_its_own_passages_in_order_and_asks_the_same(scene):
    one, others = scene
    long = passages.longer(random.Random(2), one, others, _pool(20), 7)
    assert len(long.passages) == 10
    assert [text for text in long.passages if text in one.passages] == list(one.passages)
    assert long.passages[long.asked] == one.passages[one.asked]
    assert len(set(long.passages)) == 10
    more = set(long.passages) - set(one.passages)
    assert not any(answer in text for text in more for answer in one.answers)
    assert not {text.split(" ")[1] for text in more} & {text.split(" ")[1] for text in others}


@pytest.mark.parametrize("case", [passages.misled, passages.clock, passages.question_first])
def test_what_stood_before_the_passages_was_other_text(scene, case):
    one, others = scene
    asked = case(random.Random(1), one, others)
    (cached,) = asked.cached
    passages_ = "\n\n".join(one.passages)
    assert asked.prompt.count(passages_) == cached.count(passages_) == 1
    assert asked.prompt.split(passages_)[0] != cached.split(passages_)[0]
    assert one.question in asked.prompt


def test_a_template_changes_every_number_and_nothing_else():
    one, others = passages.codes(random.Random(3), _pool(20), 3)
    asked = passages.template(random.Random(1), one, others)
    (cached,) = asked.cached
    words = [(a, b) for a, b in zip(asked.prompt.split(), cached.split(), strict=False)]
    numbers = [(a, b) for a, b in words if a.strip(".,").isdigit()]
    assert len(numbers) >= 6
    assert all(a != b for a, b in numbers)
    changed = [pair for pair in words if pair[0] != pair[1]]
    assert len(changed) <= len(numbers) + len(one.question.split())
    assert one.answers[0] not in cached


def test_an_answer_that_is_there_twice_is_not_edited(scene):
    one, others = scene
    twice = one._replace(passages=tuple(text + " " + text for text in one.passages))
    assert passages.edit(random.Random(1), twice, others) is None


@pytest.mark.parametrize(
    ("text", "answers", "right"),
    [
        ("The code is 4821.", ["4821"], True),
        ("The code is 48213.", ["4821"], False),
        ("It was the Duke of York!", ["Duke of York", "York's duke"], True),
        ("It was a duke.", ["Duke of York"], False),
        ("", ["four"], False),
    ],
)
def test_an_answer_counts_as_whole_words(text, answers, right):
    assert passages.is_right(text, answers) is right


def test_a_file_is_read_as_it_is_rendered(tmp_path):
    file = tmp_path / "qa.jsonl"
    file.write_text('{"article": 1, "text": "T.", "qas": [{"q": "Q?", "a": ["A", "B"]}]}\n')
    assert passages.load(file) == [Passage(1, "T.", (("Q?", ("A", "B")),))]
    file.write_text('{"article": 1}\n')
    with pytest.raises(KeyError):
        passages.load(file)


def test_each_turn_of_a_chat_asks_about_another_passage_and_is_answered_right():
    one, others = passages.codes(random.Random(3), _pool(20), 3)
    asked = passages.chat(random.Random(1), one, others)
    assert asked is not None
    first, *rest = asked.earlier
    assert all(text in first[0] for text in one.passages)
    said = [*(answer for _, answer in asked.earlier), asked.told + "."]
    assert all(any(words in text for text in one.passages) for words in said)
    assert len(set(said)) == 3  # each another one
    assert not any(text in question for question, _ in rest for text in one.passages)
    assert asked.prompt == one.question
    for question, answer in asked.earlier:
        place = answer.removeprefix("The access code of ").rpartition(" is ")[0]
        assert question.endswith(f"What is the access code of {place}?")


def test_passages_without_codes_make_no_chat():
    one, others = passages.qa(random.Random(3), _pool(20), 3)
    assert passages.chat(random.Random(1), one, others) is None
