"""``amflow`` and its subcommands. Each subcommand's module parses its own arguments and is imported when it runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from amflow_models.cli.errors import CommandError, MissingPackageError, needs_extra


@dataclass(frozen=True)
class Command:
    """A subcommand."""

    module: str  # has main(arguments), which returns the exit status
    extra: str | None  # installs all packages that the subcommand needs besides torch
    help: str


COMMANDS = {
    "demo": Command(
        "amflow_models.cli.demo", "demo", "AM flow of a real clip in a real DINOv2: timed, checked in float64, drawn"
    ),
    "visualize": Command(
        "amflow_models.cli.visualize",
        "demo",
        "draw AM flow, and what changes in the attention maps, for a video",
    ),
    "train": Command("amflow_models.train", "train", "train a video classifier with AM-flow adapters"),
    "evaluate": Command("amflow_models.evaluate", "train", "test a trained video classifier"),
    "predict": Command("amflow_models.cli.predict", "train", "classify videos with a trained video classifier"),
    "export": Command("amflow_models.export", "train", "export a trained classifier with torch.export"),
    "data": Command(
        "amflow_models.data.__main__", "train", "data list: list videos; data check: find problems in lists"
    ),
    "doctor": Command("amflow_models.cli.doctor", None, "print versions, devices, and which kernels run here"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs ``amflow``.

    Args:
        arguments: the words after ``amflow``; None takes them from `sys.argv`.

    Returns:
        The exit status: 0; 1 after a failure, which is printed to stderr in one line; 2 for wrong usage; 130 after
        Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    name = parser.parse_args(words[:1]).command  # the rest belongs to the subcommand
    if name is None:
        parser.print_help(sys.stderr)
        return 2
    command = COMMANDS[name]
    try:
        with needs_extra(command.extra) if command.extra else nullcontext():
            module: Any = import_module(command.module)
            return module.main(words[1:])
    except (CommandError, MissingPackageError) as error:  # others are bugs, which need a traceback
        print(f"amflow: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("amflow: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="amflow",
        description="AM flow: how attention maps change from one video frame to the next.",
        epilog="amflow COMMAND --help describes the arguments of a command.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.help, add_help=False)
    return parser


class _Version(argparse.Action):
    """Like argparse's action "version", but imports the package, and with it torch, only when it is used."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        import amflow_kernels

        print(f"amflow {amflow_kernels.__version__}")
        parser.exit()
