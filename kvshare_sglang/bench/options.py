"""What the commands about answers take alike: a model directory, a page of tables."""

import argparse
from pathlib import Path
from typing import Any

from kvshare_sglang.bench import models
from kvshare_sglang.bench.common import ScriptError
from kvshare_sglang.runtime import calibration


def add_model(parser: argparse.ArgumentParser, *, default: Path = models.READER) -> None:
    named = {models.READER: "the reader"}.get(default, str(default))
    parser.add_argument(
        "--model", type=Path, default=default, metavar="DIR",
        help=f"a directory, or {models.FETCHED}; default: {named}",
    )  # fmt: skip


def add_table(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--table", type=Path, metavar="PAGE.md", help="write the tables that it has markers for"
    )


def model_directory(path: Path) -> Path:
    """The Hugging Face directory that ``--model`` names. Raises ScriptError where it names none."""
    if str(path) == models.FETCHED:
        return models.open_model(models.FETCHED).path
    return models.load(path).path


def measured(model: Path) -> dict[str, Any]:
    """How traces choose, and with which budget, as a server on a CPU takes it from the calibration
    of a model; nothing where there is none."""
    found = calibration.find(str(model))
    if found is None:
        return {}
    depends_at, budget = found.depends or (0.0, found.budget)
    which = 1 if found.depends else 0
    where = {"probe_at": found.probe_at, "stretch": found.stretch}
    where |= {"doubt": calibration.doubt_of(found.noise[which]), "doubt_shift": found.shift[which]}
    return {**where, "depends_at": depends_at, "budget": budget}


def check_layers(layers: list[int], *, of: int) -> None:
    """Raise ScriptError where ``--layer`` names one that the model does not have."""
    if not all(0 <= layer < of for layer in layers):
        raise ScriptError(f"--layer must be in [0, {of}), got {', '.join(map(str, layers))}")
