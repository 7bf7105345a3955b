"""Printing: text on standard output, everything else on standard error, nothing in the way of the text."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

DIM, PLAIN = "\x1b[2m", "\x1b[0m"


def write(text: str) -> None:
    """Show text on standard output at once."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(
            f"standard output: cannot be written ({error.strerror}); free some space or send it elsewhere"
        ) from None


def note(text: str) -> None:
    """Show a line on standard error, if somebody still reads it."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def use_utf8() -> None:
    """Text is UTF-8 in any locale."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8")


def has_colours(stream: TextIO) -> bool:
    """Whether escape sequences do what they should there: a terminal that is not dumb, and nobody has asked for none
    (https://no-color.org)."""
    if not stream.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    return (
        os.name != "nt" or "WT_SESSION" in os.environ or "TERM" in os.environ
    )  # the old console shows them as they are


@contextlib.contextmanager
def bar(what: str, unit: str, *, show: bool, least: int = 0) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on standard error, as a function of (done, all) that draws it and that is gone when the block ends; None if
    it is not to be shown. Work of fewer than `least` units in all is over before a bar can be seen."""
    drawn: Any = None

    def progress(done: int, total: int) -> None:
        nonlocal drawn
        if total < least:
            return
        if drawn is None:
            from tqdm import tqdm

            drawn = tqdm(total=total, unit=unit, unit_scale=unit == "B", desc=what, file=sys.stderr, leave=False)
        drawn.update(done - drawn.n)
        if done >= total:
            drawn.close()

    try:
        yield progress if show else None
    finally:
        if drawn is not None:
            drawn.close()


def for_a_person(quiet: bool) -> bool:
    """Whether somebody looks at standard error and wants to see how things go on."""
    return sys.stderr.isatty() and not quiet
