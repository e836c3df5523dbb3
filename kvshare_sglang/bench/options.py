"""What the commands about answers take alike: a model directory, a page of tables."""

import argparse
from pathlib import Path

from kvshare_sglang.bench import models
from kvshare_sglang.bench.common import ScriptError


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=Path, default=models.READER, metavar="DIR", help="default: the reader"
    )


def add_table(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--table", type=Path, metavar="PAGE.md", help="write the tables that it has markers for"
    )


def check_model(path: Path) -> None:
    """Raise ScriptError where ``--model`` names no Hugging Face directory."""
    if not (path / "config.json").is_file():
        raise ScriptError(f"--model {path} holds no config.json")


def check_layers(layers: list[int], *, of: int) -> None:
    """Raise ScriptError where ``--layer`` names one that the model does not have."""
    if not all(0 <= layer < of for layer in layers):
        raise ScriptError(f"--layer must be in [0, {of}), got {', '.join(map(str, layers))}")
