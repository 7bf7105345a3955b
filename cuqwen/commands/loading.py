"""A model for a command, with a bar where somebody looks on."""

from __future__ import annotations

import argparse
import contextlib
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
    with _hold_interrupts():
        from cuqwen import api, launch

        if options.device != "cpu":
            launch.has_gpu()  # imports CuPy
    show = terminal.for_a_person(options.quiet)
    with terminal.bar("load", "B", show=show, least=PROGRESS_FROM_BYTES) as progress:
        model = api.load(
            options.model,
            device=options.device,
            max_context=options.max_context,
            exact=options.exact,
            revision=options.revision,
            check_weights=options.check_weights,
            progress=progress,
            show_download=show,
        )
    if not options.quiet and (reason := model.fallback):
        print(f"cuqwen: each token takes many small kernels instead of one launch: {reason}", file=sys.stderr)
    return model


@contextlib.contextmanager
def _hold_interrupts() -> Iterator[None]:
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
    if received:
        raise KeyboardInterrupt
