"""What a visit leaves behind: a small summary, and one archive that always fits.

Both are replaced in one step, so that a visit that is killed leaves whole files.
"""

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

LIMIT = 16 * 2**20  # bytes of a file that comes back
# Bytes of each log that are kept; the first row whose archive fits is taken.
CUTS = (1 << 20, 1 << 18, 1 << 16, 1 << 14, 1 << 12, 0)
HEAD = 2048  # of them from the start of a log, where versions and arguments are


def write_json(path: Path, value: Any) -> None:
    _replace(path, (json.dumps(value, indent=2, default=str) + "\n").encode())


def write_archive(path: Path, scratch: Path, *, limit: int = LIMIT) -> None:
    """All JSON files and logs below ``scratch``; logs are cut, and at last JSON left out, until
    the archive has at most ``limit`` bytes."""
    logs = sorted(scratch.rglob("*.log"))
    numbers = sorted(scratch.glob("*.json"), key=lambda file: file.stat().st_size)
    for keep in CUTS:
        if len(data := _archive(scratch, numbers, logs if keep else [], keep)) <= limit:
            break
    while len(data) > limit and numbers:
        numbers.pop()  # the largest
        data = _archive(scratch, numbers, [], 0)
    _replace(path, data)


def tail(log: Path, keep: int) -> bytes:
    """A log of at most about ``keep`` bytes: its start and its end."""
    with log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        if size <= keep:
            return file.read()
        start = file.read(min(HEAD, keep // 2))
        file.seek(size - (keep - len(start)))
        left = size - keep
        return start + b"\n[... %d bytes left out ...]\n" % left + file.read()


def _archive(scratch: Path, numbers: list[Path], logs: list[Path], keep: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=6) as tar:
        for file in [*numbers, *logs]:
            try:
                data = tail(file, keep) if file in logs else file.read_bytes()
            except OSError:
                continue  # a stage that runs meanwhile tidied up
            info = tarfile.TarInfo(file.relative_to(scratch).as_posix())
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def _replace(path: Path, data: bytes) -> None:
    """In one step: a reader sees the old file or the new one."""
    draft = path.with_name(path.name + ".part")
    draft.write_bytes(data)
    os.replace(draft, path)
