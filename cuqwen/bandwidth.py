"""How fast memory can be read: the ceiling that benchmarks hold a token to."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np

from cuqwen import launch

SECONDS = 0.02  # about what a measurement of one shape of the kernel lasts


def read_bandwidth(device: str, size: int | None = None) -> float:
    """Bytes a second that reading `size` bytes takes on "cuda", where it is a kernel of its own in a CUDA graph, or on "cpu",
    where it is NumPy's product of a matrix and a vector, which is what single tokens are made of there.

    size: 2 GiB on a GPU (less where less is free) and 256 MiB on a CPU unless given; more than any cache holds.
    """
    if device == "cpu":
        return _by_numpy(size or 1 << 28)
    return _by_kernel(size or min(1 << 31, launch.free_bytes() // 2))


def _by_numpy(size: int) -> float:
    width = 4096
    matrix, vector = np.ones((max(1, size // (4 * width)), width), np.float32), np.ones(width, np.float32)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        matrix @ vector
        times.append(time.perf_counter() - start)
    return matrix.nbytes / min(times[1:])


def _by_kernel(size: int) -> float:
    cp = launch.cupy()
    kernel, words = launch.load_function("read", "read_all", ()), size // 16
    source, out = cp.zeros(16 * words, np.uint8), cp.zeros(1, np.uint32)
    processors = cp.cuda.Device().attributes["MultiProcessorCount"]
    # from two blocks a multiprocessor to one turn each: which is best differs from GPU to GPU
    grids = (*(processors * blocks for blocks in (2, 3, 4, 8, 32)), -(-words // (512 * 8)))

    def seconds(grid: int) -> float:
        args = (source, np.int64(words), out)
        kernel((grid,), (512,), args)
        replay, _ = launch.record(lambda: [kernel((grid,), (512,), args) for _ in range(4)])
        once = gpu_seconds(replay)
        return statistics.median(gpu_seconds(replay) for _ in range(max(3, min(50, int(SECONDS / once))))) / 4

    return 16 * words / min(map(seconds, grids))


def gpu_seconds(work: Callable[[], object]) -> float:
    """The GPU's time for what `work` launches."""
    cp = launch.cupy()
    start, stop = cp.cuda.Event(), cp.cuda.Event()
    start.record()
    work()
    stop.record()
    stop.synchronize()
    return 1e-3 * cp.cuda.get_elapsed_time(start, stop)
