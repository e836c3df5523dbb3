"""The demo's story: its documents move and change as its titles say, and what it shows adds up."""

import os

import pytest

from kvshare_sglang.bench import models, passages
from kvshare_sglang.bench.common import ScriptError
from kvshare_sglang.bench.demo import story
from kvshare_sglang.bench.demo.story import Scene, Told, acts
from kvshare_sglang.bench.server import cpu_of
from kvshare_sglang.bench.smollm2 import ModelError
from kvshare_sglang.bench.text import prompts


def scene(text: str = "Yes.", **record: int) -> Scene:
    tokens = {"exact_tokens": 0, "blended_tokens": 2, "copied_tokens": 50}
    tokens |= {"recomputed_tokens": 8, "fresh_tokens": 40, **record}
    plain = Told("Yes.", 2.0, 1.5, 100, None)
    return Scene(acts()[1], plain, Told(text, 0.5, 0.5, 100, tokens))


def test_each_act_does_what_its_title_says():
    first, moved, edited, mixed, other = acts()
    assert sorted(moved.documents) == sorted(first.documents) != list(moved.documents)
    changed = [a != b for a, b in zip(first.documents, edited.documents, strict=True)]
    assert sum(changed) == 1
    assert edited.question == first.question  # the answer changes by the edit alone
    assert len(mixed.documents) < len(first.documents)
    assert not set(mixed.documents) <= set(edited.documents)
    assert other._replace(tenant="a", title="") == moved._replace(title="")
    assert other.tenant != moved.tenant
    assert len({*first.documents, *edited.documents, *mixed.documents}) == 6  # two edits
    sample = [one.text for one in passages.load(prompts.SAMPLE)]
    assert set(first.documents) <= set(sample)


def test_what_is_shown_adds_up():
    shown = story.show([scene()])
    assert "2 were an exact or blended prefix, 50 copied, 48 computed" in shown
    assert "4.0x as fast to the first token (3.0x in CPU time)" in shown
    assert "(the same)" in shown
    assert "(the same)" not in story.show([scene("No.")])


def test_an_act_that_copied_nothing_is_told():
    """The first has nothing to copy, and the last is another tenant's."""
    empty = scene(copied_tokens=0, declined="no_match")
    assert story.missed([empty, scene(), scene(), empty]) == []
    (told,) = story.missed([empty, scene(), empty, empty])
    assert told == f"{empty.act.title} (no_match)"
    assert story.missed([]) == []


def test_a_server_without_kvshare_is_told():
    silent = scene()
    silent = silent._replace(ours=silent.ours._replace(kvshare=None))
    with pytest.raises(ScriptError, match="said nothing of kvshare"):
        story.show([silent])


def test_processor_time_only_grows():
    before = cpu_of(os.getpid())
    sum(range(2_000_000))
    assert cpu_of(os.getpid()) >= before
    with pytest.raises(ScriptError, match="is gone"):
        cpu_of(2**22 + 1)


def test_without_the_model_the_demo_says_why_and_goes_on(monkeypatch, capsys):
    from kvshare_sglang.bench import demo

    def refuse(name: str) -> None:
        raise ModelError("pip could not fetch it")

    monkeypatch.setattr(models, "open_model", refuse)
    result: dict[str, object] = {}
    assert demo.tell_story(None, result) == []
    assert result == {}
    assert "no chat model here: pip could not fetch it" in capsys.readouterr().err


def test_the_picture_is_drawn(tmp_path):
    story.draw([scene(), scene("No.")], tmp_path / "story.png", subtitle="a test")
    assert (tmp_path / "story.png").stat().st_size > 10_000
