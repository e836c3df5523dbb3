"""``python -m kvshare_sglang.bench COMMAND``: which commands there are, and what all of them share.

A command is a module with a docstring whose first line is its help, ``add_arguments(parser)`` and
``run(args) -> int``, the exit status. It is imported only when it is asked for.
"""

import argparse
import ast
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvshare_sglang.bench.common import ScriptError, default_device

COMMANDS = {
    name: f"kvshare_sglang.bench.{name}"
    for name in (
        *("ttft", "tpot", "match", "replay", "quality", "decode", "stream", "gate"),
        *("text", "why", "demo", "reader", "conversation", "schedule", "load", "simulate"),
        *("route", "agents", "calibrate"),
    )
}


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        args, module = parse(words)
        status: int = module.run(args)
    except ScriptError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the servers were stopped", file=sys.stderr)
        return 130
    return status


def parse(words: list[str]) -> tuple[argparse.Namespace, Any]:
    """The arguments, and the module that runs them."""
    parser = argparse.ArgumentParser(
        prog="python -m kvshare_sglang.bench", description="Measure kvshare_sglang."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = next((word for word in words if not word.startswith("-")), None)
    module: Any = None
    for name in COMMANDS:
        text = about(name)
        # A command may say better what a shared option means to it.
        its = commands.add_parser(
            name, help=text, description=text, parents=[shared()], conflict_handler="resolve"
        )
        if name == chosen:
            module = load(name)
            module.add_arguments(its)
    args = parser.parse_args(words)
    args.device = args.device or default_device()
    return args, module


def shared() -> argparse.ArgumentParser:
    """The options of every command."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--json", type=Path, metavar="OUT", help="where the result goes")
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    return parser


def load(name: str) -> Any:
    """The module of a command. Raises ScriptError where it is missing."""
    try:
        return importlib.import_module(COMMANDS[name])
    except ModuleNotFoundError as error:
        if error.name == COMMANDS[name]:
            raise ScriptError(f"{name} is not there: no module {error.name}") from None
        raise ScriptError(f"{name} needs {error.name}: pip install -e '.[bench]'") from None


def about(name: str) -> str:
    """The first line of a command's docstring, read without importing it."""
    spec = importlib.util.find_spec(COMMANDS[name])
    if spec is None or spec.origin is None:
        return "(missing)"
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    return (ast.get_docstring(tree) or "").partition("\n")[0].replace("%", "%%")


if __name__ == "__main__":
    sys.exit(main())
