"""Tables in pages of Markdown, between markers: written by the command that measured them."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from kvshare_sglang.bench.common import ScriptError


def write(path: Path, name: str, lines: Sequence[str]) -> None:
    """Replace what is between ``<!-- name -->`` and ``<!-- /name -->`` of a page by ``lines``.

    Raises ScriptError, and changes nothing, unless the page holds the pair once, in this order.
    """
    start, stop = f"<!-- {name} -->", f"<!-- /{name} -->"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ScriptError(f"{path} cannot be read: {error.strerror}") from None
    found = re.findall(f"{re.escape(start)}|{re.escape(stop)}", text)
    if found != [start, stop]:
        held = ", ".join(found) or "no such marker"
        raise ScriptError(f"{path} must hold {start} and {stop} once, it holds {held}")
    before, _, rest = text.partition(start)
    after = rest.partition(stop)[2]
    path.write_text("\n".join([before + start, *lines, stop + after]), encoding="utf-8")


def write_marked(path: Path, tables: Mapping[str, Sequence[str]]) -> list[str]:
    """Write those of ``tables`` (lines by name) that a page has markers for; their names.

    Raises ScriptError where it has none for any.
    """
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    names = [name for name in tables if f"<!-- {name} -->" in text]
    if not names:
        raise ScriptError(f"{path} must hold a marker of one of: {', '.join(tables)}")
    for name in names:
        write(path, name, tables[name])
    return names


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table: the first column to the left, the others to the right."""
    rule = ["---", *("---:" for _ in head[1:])]
    return ["| " + " | ".join(cells) + " |" for cells in (head, rule, *rows)]
