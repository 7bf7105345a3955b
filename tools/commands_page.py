"""Brings the tables of options in docs/commands.md up to date with the commands: python -m tools.commands_page"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from cuqwen import cli

PAGE = Path(__file__).resolve().parents[1] / "docs" / "commands.md"
BLOCK = re.compile(r"(<!-- options of (\w+) -->\n).*?(<!-- end -->)", re.S)


def options_of(command: str) -> str:
    """A Markdown table of what a command takes."""
    subparsers = next(a for a in cli._parser([command])._actions if isinstance(a, argparse._SubParsersAction))
    parser = subparsers.choices[command]
    lines = [f"{' '.join((parser.description or '').split())}\n", "| | |", "| --- | --- |"]
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        value = action.metavar or "|".join(action.choices or ()) or ("" if action.nargs == 0 else action.dest.upper())
        value = value if isinstance(value, str) else " ".join(value)
        name = f"{', '.join(action.option_strings)} {value}".strip().replace("|", "\\|")
        lines.append(f"| `{name}` | {(action.help or '').replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


def render(text: str) -> str:
    """The page with its tables as they should be."""
    return BLOCK.sub(lambda found: f"{found[1]}{options_of(found[2])}{found[3]}", text)


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
