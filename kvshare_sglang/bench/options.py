"""What commands refuse and what several of them take: a model directory, a place for results."""

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from kvshare_sglang.bench import models


def refuse(message: str) -> NoReturn:
    """End the program as argparse does for an argument it cannot take."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=Path, default=models.READER, metavar="DIR", help="default: the reader"
    )


def add_results(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--json", type=Path, metavar="OUT", help="where the result goes")
    add("--table", type=Path, metavar="PAGE.md", help="a page whose marked tables are written anew")


def check_model(path: Path) -> None:
    """Refuse ``--model`` where it names no Hugging Face directory."""
    if not (path / "config.json").is_file():
        refuse(f"--model {path} holds no config.json")


def check_layers(layers: list[int], *, of: int) -> None:
    """Refuse ``--layer`` where the model has no such layer."""
    if not all(0 <= layer < of for layer in layers):
        refuse(f"--layer must be in [0, {of}), got {', '.join(map(str, layers))}")


def default_device() -> str:
    """Where torch runs: the GPU that it sees, or the CPU."""
    import torch  # only those who measure wait for it, not those who ask for help

    return "cuda" if torch.cuda.is_available() else "cpu"
