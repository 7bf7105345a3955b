"""Functions in threads of their own, beside what the caller does."""

from __future__ import annotations

import _thread
from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

T = TypeVar("T")


class Outcome(Generic[T]):
    """What a function will return or raise."""

    def __init__(self) -> None:
        self._value: T | None = None
        self._error: BaseException | None = None
        self._is_there = False
        self._running = _thread.allocate_lock()
        self._running.acquire()

    def _begin(self, function: Callable[..., T], args: tuple[Any, ...]) -> None:
        try:
            self._value = function(*args)
        except BaseException as error:
            self._error = error
        self._is_there = True
        self._running.release()

    def wait(self) -> None:
        """Until it is there."""
        if not self._is_there:
            with self._running:
                pass

    def result(self) -> T:
        """Wait for it."""
        self.wait()
        if self._error is not None:
            raise self._error
        return cast(T, self._value)


class Beside:
    """`with Beside() as beside: outcome = beside.submit(function, *args)`; after the block all have ended.

    Not `threading` or `concurrent.futures`: their conditions and events are entered by Python code, and an interrupt there
    leaves a lock taken for ever, so that the thread that needs it next never ends, nor does who waits for that one.
    """

    def __init__(self) -> None:
        self._outcomes: list[Outcome[Any]] = []

    def submit(self, function: Callable[..., T], *args: Any) -> Outcome[T]:
        """Call function(*args) in a thread."""
        outcome: Outcome[T] = Outcome()
        _thread.start_new_thread(outcome._begin, (function, args))
        self._outcomes.append(outcome)
        return outcome

    def __enter__(self) -> Beside:
        return self

    def __exit__(self, *_: object) -> None:
        for outcome in self._outcomes:
            outcome.wait()
