"""What is left of a run: a line of JSON for each prompt, so that one that was stopped goes on."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from kvshare_sglang.bench.common import Progress, ScriptError, write_json

T = TypeVar("T")


def begin(folder: Path, settings: dict[str, Any]) -> None:
    """Make a folder for lines, or go on in one. Raises ScriptError where those it holds came of
    other ``settings``, or nobody knows of which: they would count as done."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "settings.json"
    if not any(lines.stat().st_size for lines in folder.glob("*.jsonl")):
        write_json(file, settings)
        return
    if not file.exists():
        raise ScriptError(f"{folder} holds lines, and no {file.name} says of what: another --out")
    before = json.loads(file.read_text())
    for name in before.keys() | settings.keys():
        if before.get(name) != settings.get(name):
            raise ScriptError(
                f"{folder} holds lines made with {name} {before.get(name)}, and now it is"
                f" {settings.get(name)}: give another --out"
            )


def fill(
    file: Path, prompts: Iterator[T], n: int, rows: Callable[[list[T]], list[dict[str, Any]]],
    bar: Progress, *, together: int = 1,
) -> None:  # fmt: skip
    """Add to ``file`` the rows of the first ``n`` prompts that it does not hold yet; ``rows`` gets
    ``together`` of them at once."""
    have = len(file.read_text().splitlines()) if file.exists() else 0
    bar.update(min(have, n))
    todo: list[T] = []
    for i, one in zip(range(n), prompts, strict=False):
        if i < have:
            continue
        todo.append(one)
        if len(todo) < together and i + 1 < n:
            continue
        found = rows(todo)
        with file.open("a") as out:
            out.writelines(json.dumps(row) + "\n" for row in found)
        bar.update(len(todo))
        todo = []
