"""The commands about real passages: their prompts, their arms, and runs that were stopped go on."""

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from kvshare_sglang.bench import common, passages, why
from kvshare_sglang.bench.models import READER
from kvshare_sglang.bench.quality.cases import Encoder
from kvshare_sglang.bench.quality.outcomes import apart
from kvshare_sglang.bench.text import arms, prompts, report, requests
from kvshare_sglang.bench.text.chat import Texts, alike
from kvshare_sglang.bench.text.lines import begin, fill
from kvshare_sglang.bench.text.places import PARTS, Places, part_and_side
from kvshare_sglang.bench.texts import fitting
from kvshare_sglang.config import KVShareConfig
from kvshare_sglang.sim.engine import Lab, Model

WORDS = "the old town has a long wall and a mill by the river that nobody uses any more".split()


def _pool(count):
    rng = random.Random(0)

    def text(i):
        said = " ".join(rng.choices(WORDS, k=30))
        return f"Town {i} is old. It is said that {said}. It has 19{i:02d} people."

    return [passages.Passage(i, text(i), ()) for i in range(count)]


class Plain(Texts):
    """The reader's tokens, and no chat around what the user says."""

    def __init__(self):
        self._encode, self.stop = Encoder(READER), 0

    def placed(self, text, earlier=()):
        text = " ".join([*(words for turn in earlier for words in turn), text])
        code = self._encode._tokenizer.encode(text)
        return np.asarray(code.ids, np.int32), text, np.asarray(code.offsets)

    def told(self, text):
        return self._encode(text)

    def text(self, ids):
        return self._encode._tokenizer.decode(ids)


@pytest.fixture(scope="module")
def model():
    return Model(READER)


@pytest.fixture
def one():
    return next(prompts.asked(_pool(12), "codes3", "splice"))


def test_prompts_of_a_task_and_case_are_always_the_same_ones():
    first, again = (
        list(itertools.islice(prompts.asked(_pool(12), "codes3", "edit"), 3)) for _ in range(2)
    )
    assert first == again
    assert len({one.prompt for one in first}) == 3
    other = list(itertools.islice(prompts.asked(_pool(12), "codes3", "edit", draw=1), 3))
    assert not {one.prompt for one in first} & {one.prompt for one in other}
    assert next(prompts.asked(_pool(12), "codes3", "alone")).cached == ()


def _makes(task: str, case: str) -> bool:
    """A chat asks for codes; far from the passage that is asked about is another one."""
    return ("codes" in task or case != prompts.CHAT) and (task, case[-3:]) != ("qa1", "far")


@pytest.mark.parametrize(
    ("task", "case"), [(t, c) for t in prompts.TASKS for c in prompts.CASES if _makes(t, c)]
)
def test_the_sample_that_comes_with_the_project_has_prompts_of_each_task_and_case(task, case):
    pool = prompts.pool(prompts.SAMPLE, longest=700)
    assert all(any(a in p.text for a in answers) for p in pool for _, answers in p.qas)
    for one in itertools.islice(prompts.asked(pool, task, case), 3):
        assert passages.is_right(one.told, one.answers)
        said = " ".join([one.prompt, *(user for user, _ in one.earlier)])
        assert sum(p.text[:40] in said for p in pool) >= prompts.TASKS[task][1] - 1


def test_too_few_passages_are_refused_with_how_many_there_are():
    with pytest.raises(common.ScriptError, match=r"codes3 needs 6 passages .* got 5"):
        next(prompts.asked(_pool(5), "codes3", "splice"))
    with pytest.raises(common.ScriptError, match=r"qa1 needs 2 passages .* got 0"):
        next(prompts.asked(_pool(5), "qa1", "splice"))


def test_a_file_of_another_form_is_refused(tmp_path):
    file = tmp_path / "qa.jsonl"
    with pytest.raises(common.ScriptError, match="cannot be read: No such file"):
        prompts.pool(file, longest=700)
    file.write_text('{"article": 1}\n')
    with pytest.raises(common.ScriptError, match=r"must hold .* on each line: KeyError"):
        prompts.pool(file, longest=700)


def test_a_run_that_was_stopped_goes_on_with_the_next_prompt(tmp_path):
    file, asked = tmp_path / "a.jsonl", []

    def rows(many):
        asked.append(many)
        return [{"n": one} for one in many]

    for n, together in ((2, 1), (7, 3)):
        with common.Progress(n) as bar:
            fill(file, itertools.count(), n, rows, bar, together=together)
    assert asked == [[0], [1], [2, 3, 4], [5, 6]]
    assert [json.loads(line)["n"] for line in file.read_text().splitlines()] == list(range(7))


def test_all_rows_again_are_full_prefill_and_copies_are_not(model, one):
    chosen = {name: arms.ARMS[name] for name in ("all", "copies", "trace refresh")}
    row = arms.reused(model, Plain(), one, chosen, seed=0)
    found = row["arms"]
    assert list(found) == ["full", *chosen]
    assert found["all"]["kl"] < 1e-5
    assert found["all"].get("top1_sure", 1) == found["all"]["first"] == 1
    assert (found["all"]["same"], found["all"]["recomputed"]) == (True, 1)
    assert found["all"]["margin"] == pytest.approx(found["full"]["margin"], abs=1e-2)
    assert found["copies"]["kl"] > 10 * found["all"]["kl"]
    assert found["copies"]["recomputed"] < 0.1 < found["trace refresh"]["recomputed"]
    assert row["copied"] > 0.5


def test_arms_are_asked_for_at_several_budgets():
    at = arms.chosen(["copies", "trace", "epic"], [0.1, 0.3])
    assert list(at) == ["copies", "trace 0.1", "trace 0.3", "epic 0.1", "epic 0.3"]
    assert [arm.budget for arm in at.values()] == [0.0, 0.1, 0.3, 0.1, 0.3]
    assert arms.chosen(["trace"], []) == {"trace": arms.ARMS["trace"]}


def _played(model, file, prompts, *, n):
    words, lab = Plain(), Lab(model, KVShareConfig(min_reuse=16))
    chosen = arms.chosen(["copies", "rerun"], [])
    played = requests.Played(model, words, lab, chosen)
    with common.Progress(n) as bar:
        fill(file, played.arriving(prompts), n, lambda some: [played.row(x) for x in some], bar)
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_requests_reuse_those_before_them_also_where_a_run_goes_on(model, tmp_path):
    """The third has both others' text, in another order; the first has nothing to reuse."""
    parts = [" ".join(p.text for p in _pool(4)[i : i + 2]) for i in (0, 2)]
    said = [*parts, f"Of two regions. {parts[1]} And now {parts[0]}"]
    file = tmp_path / "asked.json"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in said))
    many, _ = fitting(file, Plain().told, limit=9, most=500)
    assert [len(ids) for ids in many] == [len(Plain().told(text)) for text in said]

    first, _, third = _played(model, tmp_path / "a.jsonl", many, n=3)
    assert first["copied"] == 0
    assert first["arms"]["copies"] == first["arms"]["full"] | {"recomputed": 1, "computed": 1}
    assert third["copied"] > 0.5
    copies, rerun = third["arms"]["copies"], third["arms"]["rerun"]
    assert copies["kl"] > 10 * rerun["kl"]
    assert (rerun["same"], rerun["rouge_l"], rerun["computed"]) == (True, 1, 1)
    assert not {"right", "margin", "nll"} & copies.keys()

    _played(model, tmp_path / "b.jsonl", many, n=2)
    assert _played(model, tmp_path / "b.jsonl", many, n=3)[2] == third
    rows = {row["arm"]: row for row in report.summary(tmp_path)}
    assert (rows["copies"]["n"], rows["copies"]["right"]) == (3, None)
    assert rows["copies"]["reusing"] == pytest.approx(1 / 3)
    assert report.show(list(rows.values()))


def test_a_file_without_prompts_that_fit_is_refused(tmp_path):
    file = tmp_path / "asked.jsonl"
    file.write_text('{"prompt": "one two three"}\n')
    with pytest.raises(common.ScriptError, match=r"no prompt of .* has 1 to 2 tokens"):
        fitting(file, Plain().told, limit=1, most=2)
    file.write_text('{"text": 1}\n')
    with pytest.raises(common.ScriptError, match="no file of JSON lines with 'prompt'"):
        fitting(file, Plain().told, limit=1, most=2)


def test_prompts_whose_kv_does_not_fit_are_refused(model):
    with pytest.raises(common.ScriptError, match=r"KV of 1 prompts takes .* GB, more than half"):
        requests.check_memory(model, [range(10**9)])


def test_a_folder_takes_lines_of_one_setting_only(tmp_path):
    """Lines of another draw would count as done, under the new draw's name."""
    begin(tmp_path / "a", {"draw": 2})  # it failed before its first line
    begin(tmp_path / "a", {"draw": 0, "arm": ["trace"]})
    (tmp_path / "a" / "codes3-edit.jsonl").write_text("{}\n")
    begin(tmp_path / "a", {"draw": 0, "arm": ["trace"]})
    with pytest.raises(common.ScriptError, match="made with draw 0, and now it is 1: give another"):
        begin(tmp_path / "a", {"draw": 1, "arm": ["trace"]})
    with pytest.raises(common.ScriptError, match=r"made with arm .*, and now it is None"):
        begin(tmp_path / "a", {"draw": 0})
    (tmp_path / "a" / "settings.json").unlink()
    with pytest.raises(common.ScriptError, match=r"holds lines, and no settings.json says of what"):
        begin(tmp_path / "a", {"draw": 0, "arm": ["trace"]})


def test_rouge_l_is_of_the_longest_common_subsequence():
    assert alike([1, 2, 3, 4], [1, 9, 3]) == {"same": False, "rouge_l": pytest.approx(4 / 7)}
    assert alike([5], [5]) == {"same": True, "rouge_l": 1}


def test_tokens_that_full_prefill_is_sure_of_are_told_apart():
    """Three tokens: sure and kept, sure and lost, not sure and lost."""
    true = torch.tensor([[0.6, 0.2, 0.2], [0.8, 0.1, 0.1], [0.4, 0.3, 0.3]])
    along = torch.tensor([[0.6, 0.2, 0.2], [0.2, 0.7, 0.1], [0.3, 0.4, 0.3]])
    far = apart(true.log(), along.log())
    assert (far.top1, far.sure) == (pytest.approx(1 / 3), 0.5)
    by_hand = [0.0, 0.8 * np.log(4) - 0.1 * np.log(7), 0.4 * np.log(4 / 3) + 0.3 * np.log(3 / 4)]
    assert far.kl == pytest.approx(np.mean(by_hand))
    assert far.kl_most == pytest.approx(max(by_hand))
    assert apart(true[2:].log(), along[2:].log()).sure is None


def test_where_every_copy_is_put_right_nothing_is_wrong(model, one, monkeypatch):
    monkeypatch.setitem(PARTS, "everything", lambda p: np.ones(len(p.ids), bool))
    names = ("nothing", "everything", "everything | run", "everything | K")
    found = why.why(model, Plain(), one, {n: part_and_side(n) for n in names})["arms"]
    assert found["everything"]["share"] == 1
    assert max(found["everything"]["kl"], found["everything | run"]["kl"]) < 1e-5
    assert found["nothing"]["share"] == 0
    assert found["nothing"]["kl"] > found["everything | K"]["kl"] > 1e-5


def test_places_are_those_of_the_words(one):
    texts = Plain()
    places = Places(texts, one)
    assert one.answers[0] in texts.text(places.ids[places.digits].tolist()).replace(" ", "")
    assert not (places.digits & ~places.fact).any()
    assert not (places.fact & ~places.facts).any()
    assert not (places.fact & ~places.passage).any()
    split = [PARTS[name](places) for name in ("before it", "its sentence", "after it")]
    assert (np.sum(split, axis=0) == 1).all()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("its colour", "--part must be one of nothing, .*, got 'its colour'"),
        ("its digits | Q", "must be one of K, V, run, got 'Q'"),
    ],
)
def test_a_part_that_is_not_known_is_refused(name, said):
    with pytest.raises(common.ScriptError, match=said):
        part_and_side(name)


def test_measured_lines_are_still_summed_up():
    """Margins came later than answers, and one part had another name."""
    folder = Path(__file__).resolve().parents[2] / "benchmarks" / "smollm2"
    rows = {row["arm"]: row for row in report.summary(folder / "patched-more")}
    assert rows["all sentences | run"]["kl"] == pytest.approx(0.0123, abs=5e-5)
    assert report.show(report.summary(folder / "reuse"))
