"""The command line: which commands there are, and how a run ends. Only this module and `commands` print.

Text goes to stdout, everything else to stderr. Exit status 0; 1 for a failure, told in one line; 2 for wrong usage; 130
for an interrupted run.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from cuqwen import __version__

INTERRUPTED = 130

# name: (module with `add_arguments(parser)` and `run(options, parser)`, what it does)
COMMANDS = {
    "generate": ("cuqwen.commands.generate", "continue or answer a prompt"),
    "chat": ("cuqwen.commands.chat", "talk with a model"),
    "info": ("cuqwen.commands.info", "what a checkpoint is, from its headers alone"),
    "perplexity": ("cuqwen.commands.perplexity", "how well a model predicts a text"),
    "bench": ("cuqwen.commands.bench", "how fast a model is on this machine, beside its memory"),
    "doctor": ("cuqwen.commands.doctor", "check this machine and the kernels on it"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    _open_missing_streams()
    try:
        arguments = sys.argv[1:] if argv is None else list(argv)
        parser = _parser(arguments)
        wanted = f"wanted a command: {', '.join(COMMANDS)}"
        if arguments and not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
            parser.error(f"{wanted}; got {arguments[0]!r}")
        options, unknown = parser.parse_known_args(arguments)
        if "run" not in options:
            parser.error(wanted)
        if unknown:
            words = "prompt" in options and not unknown[0].startswith("-")
            remedy = "; put a text of several words in quotes" if words else ""
            options.parser.error(f"unrecognized arguments: {' '.join(unknown)}{remedy}")
        status = options.run(options, options.parser)
        sys.stdout.flush()
        return status or 0
    except (Exception, KeyboardInterrupt) as error:
        _give_up_stdout()
        if isinstance(error, KeyboardInterrupt):
            print("\ncuqwen: interrupted", file=sys.stderr)
            return INTERRUPTED
        if isinstance(error, BrokenPipeError):  # whoever read our output has had enough: nothing failed
            return 0
        if isinstance(error, (ValueError, RuntimeError, MemoryError, OSError)):
            print(f"cuqwen: error: {' '.join(str(error).split())}", file=sys.stderr)
            return 1
        raise


class Parser(argparse.ArgumentParser):
    """Says what is wrong, and where help is, in a line each. argparse would print the usage of all options before."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n{self.prog} --help tells what it takes\n")


def _parser(arguments: Sequence[str]) -> Parser:
    """Knows all commands, but the arguments only of those that are named: the module of another is not imported."""
    command = "COMMAND [OPTION ...]"
    parser = Parser(prog="cuqwen", usage=f"cuqwen {command}", description="Qwen3 on one NVIDIA GPU, without PyTorch.")
    parser.add_argument("--version", action="version", version=f"cuqwen {__version__}")
    # a metavar of this width leaves room for the longest name beside what it does
    commands = parser.add_subparsers(title="commands", metavar=command, prog="cuqwen")
    for name, (home, purpose) in COMMANDS.items():
        added = commands.add_parser(name, help=purpose, description=purpose)
        if name in arguments:
            module = importlib.import_module(home)
            module.add_arguments(added)
            added.set_defaults(run=module.run, parser=added)
    return parser


def _open_missing_streams() -> None:
    """Some schedulers start programs with standard streams closed. The next file to be opened would take such a
    stream's number, and receive what is printed."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def _give_up_stdout() -> None:
    """Write out what can be written, and keep the interpreter from trying again, and complaining, when it ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
