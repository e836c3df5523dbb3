"""Tables of the docs: written between two marks of a page, never by hand."""

import re
from collections.abc import Sequence
from pathlib import Path


def write(path: Path, name: str, lines: Sequence[str]) -> None:
    """Put ``lines`` between ``<!-- name -->`` and ``<!-- /name -->``, in place of what is there.

    Raises ValueError where the page has no such marks.
    """
    page = path.read_text(encoding="utf-8")
    start, stop = f"<!-- {name} -->", f"<!-- /{name} -->"
    block = "\n".join([start, *lines, stop])
    marked = re.compile(f"{re.escape(start)}.*?{re.escape(stop)}", re.DOTALL)
    new, count = marked.subn(lambda _: block, page)
    if count != 1:
        raise ValueError(f"{path} must hold {start} and {stop} once, found {count} times")
    path.write_text(new, encoding="utf-8")
