"""A model for a command, with a bar where somebody looks on."""

from __future__ import annotations

import argparse
import contextlib
import re
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from cuqwen.commands import terminal

if TYPE_CHECKING:
    from cuqwen.api import Model

PROGRESS_FROM_BYTES = 200_000_000


def load(options: argparse.Namespace) -> Model:
    """What `--model` and its companions ask for."""
    from cuqwen import driver

    if options.device != "cpu":
        driver.wake()
    with hold_interrupts():
        from cuqwen import api
    show = terminal.for_a_person(options.quiet)
    with (
        _in_flags(),
        terminal.bar("load", "B", show=show, least=PROGRESS_FROM_BYTES) as progress,
        terminal.bar("compile, once on this machine", "kernel", show=show) as compile_progress,
    ):
        model = api.load(
            options.model,
            device=options.device,
            max_context=options.max_context,
            exact=options.exact,
            revision=options.revision,
            check_weights=options.check_weights,
            progress=progress,
            show_download=show,
            compile_progress=compile_progress,
        )
    if not options.quiet and (reason := model.fallback):
        print(f"cuqwen: each token takes many small kernels instead of one launch: {reason}", file=sys.stderr)
    return model


@contextlib.contextmanager
def _in_flags() -> Iterator[None]:
    """What `load` says of its arguments, in the command's words."""
    try:
        yield
    except (ValueError, MemoryError) as error:
        text = re.sub(r"max_context=(\d+) \(--max-context \1\)", r"--max-context \1", str(error).removeprefix("load: "))
        kind = MemoryError if isinstance(error, MemoryError) else ValueError  # others' subclasses take other arguments
        raise kind(re.sub("^max_context:", "--max-context:", text)) from None


@contextlib.contextmanager
def hold_interrupts() -> Iterator[None]:
    """Let an interrupt wait until the end of the block. In the middle of importing a C extension it would come out as an
    ImportError, after the extension has printed a traceback of its own."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # ignored, as under nohup
        yield
        return
    received: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if received:  # also where the block failed
            raise KeyboardInterrupt
