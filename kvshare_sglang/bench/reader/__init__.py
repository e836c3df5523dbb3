"""The reader, the small trained model that answers are measured with: train it, or examine it."""

import argparse
from pathlib import Path

from kvshare_sglang.bench.reader import evaluate, train

COMMANDS = {"eval": evaluate, "train": train}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="do", required=True, metavar="eval|train")
    for name, module in COMMANDS.items():
        text = (module.__doc__ or "").partition("\n")[0]
        its = commands.add_parser(name, help=text, description=text)
        # Suppressed where it is not given: else it would undo what was said before the name.
        its.add_argument("--device", default=argparse.SUPPRESS, help="cpu or cuda")
        if module is evaluate:
            its.add_argument(
                "--json", type=Path, metavar="OUT", default=argparse.SUPPRESS,
                help="where the result goes",
            )  # fmt: skip
        module.add_arguments(its)


def run(args: argparse.Namespace) -> int:
    return COMMANDS[args.do].run(args)
