"""Arguments that several commands take, and their checks, which come before anything is loaded."""

from __future__ import annotations

import argparse
from typing import Any


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        required=True,
        metavar="ID|DIR|demo",
        help="a hub id, a checkpoint's folder, or the model in the package",
    )


def add_loading(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--revision", metavar="REV", help="branch, tag or commit of a hub id")
    add("--device", choices=("cuda", "cpu"), help="default: the GPU if there is one")
    add("--max-context", type=int, metavar="N", help="most tokens of prompt and answer together")
    add(
        "--exact",
        action="store_true",
        help="on a GPU, keep float32 between the operations of long prompts and in the cache",
    )
    add("--check-weights", action="store_true", help="look for NaN and infinity in the weights first")


def add_thinking(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--system", metavar="TEXT", help="system message of the chat template")
    group.add_argument("--no-think", action="store_true", help="switch thinking off in the chat template")
    group.add_argument(
        "--thinking-budget",
        type=int,
        metavar="N",
        help="most tokens of thinking; then the model is told to answer, in the words that Qwen published for that",
    )


def add_sampling(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("sampling").add_argument
    add("--temperature", type=float, metavar="X", help="0 takes the most likely token")
    add("--top-k", type=int, metavar="N", help="keep the N most likely tokens (0: all)")
    add("--top-p", type=float, metavar="X", help="keep the fewest tokens whose probabilities reach X")
    add("--min-p", type=float, metavar="X", help="keep tokens at least X times as likely as the first")
    add("--repetition-penalty", type=float, metavar="X", help="above 1: repeat less")
    add("--presence-penalty", type=float, default=0.0, metavar="X", help="less of tokens already used")
    add("--frequency-penalty", type=float, default=0.0, metavar="X", help="the same for each use")
    add("--seed", type=int, metavar="N", help="the same seed gives the same text")


def sampling(options: argparse.Namespace, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The sampling settings that were given; impossible values end the program with status 2."""
    from cuqwen.config import SAMPLING_RANGES, check_sampling_value

    given = {name: getattr(options, name) for name in SAMPLING_RANGES if getattr(options, name) is not None}
    try:
        for name, value in given.items():
            check_sampling_value(name, value)
    except ValueError as error:
        parser.error(f"--{str(error).replace('_', '-')}")
    if options.no_think and options.thinking_budget is not None:
        parser.error("--thinking-budget: --no-think leaves no thinking to bound")
    return given


def at_least(options: argparse.Namespace, parser: argparse.ArgumentParser, least: int, *names: str) -> None:
    """Ends the program with status 2 if one of these options was given and is below `least`."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')}: wanted at least {least}, got {value}")
