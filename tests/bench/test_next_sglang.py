"""What the page on another SGLang says of a version, from made-up facts."""

from typing import Any

import pytest

from kvshare_sglang.bench import next_sglang

OLD: dict[str, Any] = {
    "wrapped": {"a.f": "self, x"},
    "overridden": {"Radix.evict": "self, params", "Radix.never": None},
    "attributes": {"Req.kvshare": "free"},
    "fields": {"Batch.input_ids": "there"},
    "used": {"Rotary.cos": "there"},
    "unneeded": ["Radix.never"],
    "judged": ["tp_size"],
    "settings": ["tp_size", "whatever"],
    "pins": {"torch": "torch==2.14.1"},
    "errors": [],
}


def told(smoke: str | None = None, **changes: Any) -> tuple[str, bool]:
    lines, broke = next_sglang.page("1", "2", OLD, {**OLD, **changes}, smoke)
    return "\n".join(lines), broke


def test_the_same_facts_break_nothing() -> None:
    text, broke = told()
    assert not broke
    assert "nothing broke" in text


def test_a_method_that_this_version_does_not_need_may_be_gone() -> None:
    needless = {"overridden": {}, "unneeded": ["Radix.evict"]}
    assert not told(**needless)[1]


@pytest.mark.sglang
def test_every_touch_is_there_in_the_sglang_that_is_installed() -> None:
    found = next_sglang.ask(None)
    assert found["errors"] == []
    assert [
        row for kind in next_sglang.KINDS for row in next_sglang.broken(kind, found, found)
    ] == []
    assert {kind for kind in next_sglang.KINDS if found[kind]} == set(next_sglang.KINDS)
    assert set(found["judged"]) & set(found["settings"])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"wrapped": {"a.f": None}}, "the function a.f is gone"),
        ({"wrapped": {}}, "the function a.f is gone"),
        ({"overridden": {"Radix.evict": None}}, "the method Radix.evict is gone"),
        ({"overridden": {**OLD["overridden"], "Radix.new": None}}, "the method Radix.new is gone"),
        ({"attributes": {"Req.kvshare": None}}, "the attribute Req.kvshare is gone"),
        (
            {"attributes": {"Req.kvshare": "taken by SGLang"}},
            "the attribute Req.kvshare is taken by SGLang",
        ),
        ({"fields": {"Batch.input_ids": None}}, "the field Batch.input_ids is gone"),
        ({"used": {"Rotary.cos": None}}, "the name Rotary.cos is gone"),
        ({"settings": ["whatever"]}, "the setting tp_size, which we judge, is gone"),
        ({"errors": ["ServerArgs: ImportError"]}, "ServerArgs: ImportError"),
        ({"smoke": "assert 1 == 2"}, "the smoke test failed: assert 1 == 2"),
    ],
)
def test_what_breaks_us_is_named(changes: dict[str, Any], named: str) -> None:
    text, broke = told(**changes)
    assert broke
    assert named in text


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"wrapped": {"a.f": "self, x, y"}}, "a.f: (self, x) -> (self, x, y)"),
        ({"settings": ["new_one", "tp_size", "whatever"]}, "new_one"),
        ({"settings": ["tp_size"]}, "- whatever"),
        ({"pins": {"torch": "torch==3.0"}}, "torch==3.0 (was torch==2.14.1)"),
    ],
)
def test_what_only_differs_is_shown_and_breaks_nothing(changes: dict[str, Any], named: str) -> None:
    text, broke = told(**changes)
    assert not broke
    assert named in text
