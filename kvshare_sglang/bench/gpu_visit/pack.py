"""Lay out what must travel to a GPU machine, and refuse beforehand what is too large."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

MIB = 2**20
LIMIT_MIB = 64  # what a transfer takes
MARK = "commit.txt"  # is in every folder that was packed


class PackError(Exception):
    """Something the user can mend; shown as one message."""


class Item(NamedTuple):
    """A file, and where it goes in the folder that travels."""

    source: Path
    target: str

    @property
    def size(self) -> int:
        return self.source.stat().st_size


def listed(root: Path, listing: Path) -> list[Item]:
    """The files that the lines of ``listing`` name. Raises PackError on a line without any."""
    found: dict[str, Item] = {}
    for number, line in enumerate(listing.read_text().splitlines(), start=1):
        pattern = line.partition("#")[0].strip()
        if not pattern:
            continue
        files = [file for path in root.glob(pattern) for file in _files(path)]
        if not files:
            raise PackError(f"{listing.name}, line {number}: nothing matches {pattern!r}")
        for file in files:
            target = file.relative_to(root).as_posix()
            found[target] = Item(file, target)
    return list(found.values())


def of_kit(kit: Path) -> list[Item]:
    """All files of a kit. Raises PackError unless it can be installed."""
    if not (kit / "install.sh").is_file():
        raise PackError(f"--kit must be a folder with an install.sh, {kit} has none")
    return [Item(file, f"kit/{file.relative_to(kit).as_posix()}") for file in _files(kit)]


def check_size(items: list[Item], *, limit: float) -> int:
    """Bytes in all. Raises PackError above ``limit`` bytes, naming what is largest."""
    total = sum(item.size for item in items)
    if total > limit:
        largest = sorted(items, key=lambda item: -item.size)[:5]
        largest = [item for item in largest if item.size > total / 100]
        names = ", ".join(f"{item.target} ({_mib(item.size)})" for item in largest)
        raise PackError(f"{_mib(total)} would travel, the limit is {_mib(limit)}; largest: {names}")
    return total


def pack(root: Path, listing: Path, carry: Path, *, kit: Path | None, limit: float) -> str:
    """Make ``carry`` anew with all that travels; returns a line for the user. Raises PackError,
    before anything is written, if it is too large or ``carry`` holds anything else."""
    items = listed(root, listing) + (of_kit(kit) if kit else [])
    total = check_size(items, limit=limit)
    if carry.exists() and (not carry.is_dir() or any(carry.iterdir())):
        if not (carry / MARK).is_file():
            raise PackError(f"{carry} holds something that was not packed here: name another")
        shutil.rmtree(carry)
    for item in items:
        target = carry / item.target
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(item.source, target)
    (carry / MARK).write_text(commit_of(root) + "\n")
    # Wherever it lies, it is no part of a checkout.
    (carry / ".gitignore").write_text("*\n")
    return f"{carry}: {len(items)} files, {_mib(total)} of {_mib(limit)}"


def commit_of(root: Path) -> str:
    """The commit of a checkout, with ``+`` after it if files differ; else what pack wrote down."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError:
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    if (root / MARK).is_file():
        return (root / MARK).read_text().strip()
    head = git("rev-parse", "--short=12", "HEAD")
    return head + ("+" if git("status", "--porcelain") else "") if head else "unknown"


def _files(path: Path) -> Iterator[Path]:
    """The file itself, or all files below a folder but what Python left there."""
    if path.is_file():
        yield path
        return
    for file in sorted(path.rglob("*")):
        if file.is_file() and "__pycache__" not in file.parts:
            yield file


def _mib(size: float) -> str:
    return f"{size / MIB:.1f} MiB"
