"""`cuqwen` with a clock: which part of a start takes from when to when.

    python -m benchmarks.spans BEGIN FILE COMMAND ARGUMENTS...

BEGIN: time.time() when the process was asked for. FILE: where the spans go, as JSON: {name: [from, to]} in seconds.
"""

from __future__ import annotations

import time

STARTED = time.time()

import functools  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable  # noqa: E402
from typing import Any  # noqa: E402


class Clock:
    """Notes when functions begin and end, in seconds since `begin`."""

    def __init__(self, begin: float) -> None:
        self.begin = begin
        self.spans: dict[str, list[float]] = {"Python": [0.0, STARTED - begin]}

    def __call__(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **named: Any) -> Any:
            started = time.time() - self.begin
            try:
                return function(*args, **named)
            finally:
                ended = time.time() - self.begin
                self.spans[name] = [self.spans.get(name, [started])[0], ended]

        return timed


def watch(clock: Clock) -> None:
    """Put the clock on what a start consists of. The order of imports stays what it is."""
    from cuqwen import driver
    from cuqwen.commands import loading

    driver._begin_context = clock("CUDA context", driver._begin_context)
    load = loading.load

    def load_watched(options: Any) -> Any:
        driver.wake()
        imported = clock("import NumPy and cuqwen", lambda: __import__("cuqwen.api"))
        imported()
        from cuqwen import api, generate, launch, memory, startup, weights

        api.Tokenizer.from_folder = clock("tokenizer", api.Tokenizer.from_folder)
        launch.has_gpu = clock("import CuPy", launch.has_gpu)
        memory.plan = clock("plan", memory.plan)
        startup.kernels = clock("list kernels", lambda *a, kernels=startup.kernels, **k: iter(list(kernels(*a, **k))))
        launch.compile_function = clock("kernels", launch.compile_function)
        weights.read = clock("weights", weights.read)
        api.Qwen3 = clock("network", api.Qwen3)
        for name in ("begin", "read", "decode"):
            setattr(generate.Sequence, name, clock(f"answer: {name}", getattr(generate.Sequence, name)))
        return clock("load", load)(options)

    loading.load = load_watched


def main() -> None:
    begin, path, *arguments = sys.argv[1:]
    clock = Clock(float(begin))
    watch(clock)
    from cuqwen import cli
    from cuqwen.commands import generate

    tell = generate._report
    generate._report = lambda *args: clock("first token", tell)(*args)
    status = cli.main(arguments)
    clock.spans["end"] = [time.time() - clock.begin] * 2
    with open(path, "w", encoding="utf-8") as file:
        json.dump({name: [round(t, 4) for t in span] for name, span in clock.spans.items()}, file)
    sys.exit(status)


if __name__ == "__main__":
    main()
