"""Prose from Python's own documentation: what the reader learns from, and what is held out."""

import ast
import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Literal


@cache
def prose(split: Literal["train", "test"]) -> tuple[str, ...]:
    """Paragraphs of the documentation in Python's standard library; test modules are held out."""
    return tuple(text for name, text in _paragraphs() if (_held_out(name)) == (split == "test"))


def sentences(split: Literal["train", "test"]) -> tuple[str, ...]:
    """Single sentences of that prose, as filler between facts."""
    parts = (s for text in prose(split) for s in re.split(r"(?<=[.])\s+", text))
    return tuple(s for s in parts if re.fullmatch(r"[A-Z][a-z]+ [A-Za-z ,'-]{20,80}\.", s))


def _held_out(name: str) -> bool:
    return sum(name.encode()) % 10 == 0


@cache
def _paragraphs() -> tuple[tuple[str, str], ...]:
    found, seen = [], set[str]()
    for name, doc in _docs():
        for part in re.split(r"\n\s*\n", doc):
            text = re.sub(r"\s+", " ", part).strip()
            letters = sum(c.isalpha() or c in " ,." for c in text)
            if 120 <= len(text) <= 1200 and letters > 0.95 * len(text) and text not in seen:
                seen.add(text)
                found.append((name, text))
    return tuple(found)


def _docs() -> Iterator[tuple[str, str]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        topics = {}  # type: ignore[misc]
    yield from sorted(topics.items())
    root = Path(os.__file__).parent
    for path in sorted([*root.glob("*.py"), *root.glob("[a-z]*/*.py")]):
        if "site-packages" in path.parts or "test" in str(path.relative_to(root)):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8", errors="ignore"))
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield path.stem, ast.get_docstring(node) or ""
