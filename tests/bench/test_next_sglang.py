"""What scripts/next_sglang.py says of a version, from made-up facts."""

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import next_sglang

OLD: dict[str, Any] = {
    "seams": {"a.f": "self, x"},
    "cache": {"evict": "self, params", "ours": None},
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


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seams": {"a.f": None}}, "a.f is gone"),
        ({"seams": {}}, "a.f is gone"),
        ({"cache": {"ours": None}}, "RadixCache.evict is gone"),
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
        ({"seams": {"a.f": "self, x, y"}}, "a.f: (self, x) -> (self, x, y)"),
        ({"settings": ["new_one", "tp_size", "whatever"]}, "new_one"),
        ({"settings": ["tp_size"]}, "- whatever"),
        ({"pins": {"torch": "torch==3.0"}}, "torch==3.0 (was torch==2.14.1)"),
    ],
)
def test_what_only_differs_is_shown_and_breaks_nothing(changes: dict[str, Any], named: str) -> None:
    text, broke = told(**changes)
    assert not broke
    assert named in text
