"""From files into arrays on the GPU: by several threads, each with a page-locked buffer of its own, which it fills and sends.

While some send, others read, and no thread needs Python for more than three calls a piece.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import numpy as np

from cuqwen.checkpoint import Tensor, opened, read_into
from cuqwen.launch import cupy

THREADS = 12  # at most
SHARE = 192 << 20  # bytes of all tensors for which one more thread is worth its buffer
STRETCH = 32 << 20  # bytes that a thread takes on at once
PIECE = 8 << 20  # bytes that it reads, then sends
HUGE_PAGE = 2 << 20  # bytes


class Filling:
    """Fills arrays on the current GPU with tensors that have `total` bytes together. However the block ends, no thread is left
    when it has."""

    def __init__(self, total: int) -> None:
        self._pool = futures.ThreadPoolExecutor(max(1, min(THREADS, total // SHARE)), "cuqwen-weights")
        self._size = min(PIECE, total)
        self._stretches: list[futures.Future[int]] = []
        self._stop, self._own = threading.Event(), threading.local()
        self._senders: list[Sender] = []

    def __enter__(self) -> Filling:
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)
        for sender in self._senders:
            sender.close()

    def begin(self, tensor: Tensor, array: Any) -> None:
        """Have the threads fill this array too, once all is done that the current stream has been given: what had its memory
        before may still be read there."""
        moment = now()
        for first in range(0, tensor.nbytes, STRETCH):
            last = min(first + STRETCH, tensor.nbytes)
            self._stretches.append(self._pool.submit(self._fill, tensor, array, first, last, moment))

    def counts(self) -> Iterator[int]:
        """Bytes that have arrived, as they do, until all have. Raises what a thread raises."""
        for stretch in futures.as_completed(self._stretches):
            yield stretch.result()

    def _fill(self, tensor: Tensor, array: Any, first: int, last: int, moment: tuple[int, Any]) -> int:
        if not hasattr(self._own, "sender"):
            self._own.sender = Sender(moment[0], self._size)
            self._senders.append(self._own.sender)
        sender = self._own.sender
        sender.after(moment[1])
        with opened(tensor.path) as file:
            file.seek(tensor.offset + first)
            for at in range(first, last, self._size):
                if self._stop.is_set():
                    break
                memory = sender.buffer[: last - at]
                read_into(file, memory)
                sender.send(array, at, len(memory))
        return last - first


def now() -> tuple[int, Any]:
    """The current device, and an event there at the end of all that the current stream was given so far."""
    event = cupy().cuda.Event(disable_timing=True)
    event.record()
    return int(cupy().cuda.Device().id), event


class Sender:
    """Copies bytes from the host into arrays on `device`, which becomes the current one of the calling thread: fill `buffer`,
    of `size` bytes, then `send` it."""

    def __init__(self, device: int, size: int) -> None:
        cuda = cupy().cuda
        cuda.Device(device).use()
        self._stream = cuda.Stream(non_blocking=True)
        memory = np.empty(size + HUGE_PAGE, np.uint8)
        self._memory = memory[-memory.ctypes.data % HUGE_PAGE :][:size]  # NumPy asks for huge pages from 4 MB on
        self.buffer, self._address = self._memory.data, ctypes.c_void_p(self._memory.ctypes.data)
        self._unlock: Callable[[], None] | None = None

    def after(self, event: Any) -> None:
        """What is sent from now on arrives after this event."""
        self._stream.wait_event(event)

    def send(self, array: Any, first: int, count: int) -> None:
        """Copy the first `count` bytes of the buffer to those of `array` from `first` on; they are there when it returns."""
        if self._unlock is None:  # its pages are there now: threads fetch them side by side, the driver one by one
            self._unlock = _page_lock(self._memory)
        (array.data + first).copy_from_host_async(self._address, count, self._stream)
        self._stream.synchronize()

    def close(self) -> None:
        if self._unlock is not None:
            self._unlock()


def _page_lock(memory: np.ndarray) -> Callable[[], None]:
    """Lets the GPU copy from this memory by itself, until what is returned is called. Where no more can be locked (WSL 2 has
    little), it stays ordinary memory."""
    runtime, start = cupy().cuda.runtime, memory.ctypes.data
    try:
        runtime.hostRegister(start, memory.nbytes, 0)
    except runtime.CUDARuntimeError:
        return lambda: None

    def unlock() -> None:
        with contextlib.suppress(runtime.CUDARuntimeError):  # of a GPU that has failed: the copy has told
            runtime.hostUnregister(start)

    return unlock
