"""How kernels are timed, and the ceilings that they are held to, measured on the same GPU in the same run.

Everything is timed inside CUDA graphs: a graph of many calls is recorded once, and each of its replays lies between two
events. So what counts is the GPU's time for one call in a stream of calls, a kernel's launch inside a graph included
(about 1 us), and nothing of Python or of the framework that made the calls.
"""

from __future__ import annotations

import contextlib
import itertools
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cuqwen import launch
from cuqwen.bandwidth import gpu_seconds

REPLAYS = 9  # of each graph, that count
# Of replays before: a GPU that had nothing to do takes so long to raise its clocks. rmsnorm of a million rows in bf16 takes 1,650 us
# on an H100 until then, and 1,435 afterwards.
WARM_UP_SECONDS = 0.04
GRAPH_SECONDS = 1.5e-3  # about what a graph lasts: long beside its own start, short enough for hundreds of rows
MAX_CALLS = 256

# Loads of 16 bytes, four under way in each thread.
KERNELS = r"""
extern "C" __global__ void __launch_bounds__(512) copy_all(const uint4* __restrict__ p, long long n, uint4* __restrict__ out) {
    const long long step = (long long)gridDim.x * 512;
    for (long long i = blockIdx.x * 512ll + threadIdx.x; i < n; i += 4 * step) {
        uint4 v[4];
        #pragma unroll
        for (int k = 0; k < 4; k++) if (i + k * step < n) v[k] = p[i + k * step];
        #pragma unroll
        for (int k = 0; k < 4; k++) if (i + k * step < n) out[i + k * step] = v[k];
    }
}
extern "C" __global__ void nothing() {}
"""


@dataclass(frozen=True)
class Time:
    """Of one call, over the replays of a graph: median in microseconds, and the standard deviation in percent of it."""

    microseconds: float
    percent: float

    @classmethod
    def of(cls, milliseconds: Sequence[float], calls: int) -> Time:
        median = statistics.median(milliseconds)
        return cls(1e3 * median / calls, 100 * statistics.stdev(milliseconds) / median)


def calls_for(seconds: float, sets: int) -> int:
    """How many calls of `seconds` a graph is to hold: each set of inputs equally often, GRAPH_SECONDS if that may be."""
    wanted = min(MAX_CALLS, GRAPH_SECONDS / max(seconds, 1e-7))
    return sets * max(1, round(wanted / sets))


def graph_time(call: Callable[[int], Any], sets: int) -> Time:
    """The time of `call(i)`, which uses the i-th of `sets` sets of inputs."""

    def record(calls: int) -> Callable[[], None]:
        def work() -> None:
            for i in range(calls):
                call(i % sets)

        replay, _ = launch.record(work)
        replay()
        return replay

    call(0)  # compiles
    calls = calls_for(gpu_seconds(record(sets)) / sets, sets)
    replay = record(calls)
    return Time.of(warm(lambda: 1e3 * gpu_seconds(replay)), calls)


def warm(milliseconds: Callable[[], float]) -> list[float]:
    """Of REPLAYS calls, after others of WARM_UP_SECONDS."""
    until = time.perf_counter() + WARM_UP_SECONDS
    while time.perf_counter() < until:
        milliseconds()
    return [milliseconds() for _ in range(REPLAYS)]


def torch_time(torch: Any, call: Callable[[int], Any], sets: int) -> Time:
    """The same for a call of PyTorch's."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def milliseconds(work: Callable[[], Any]) -> float:
        start.record()
        work()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop)

    def record(calls: int) -> Any:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(calls):
                call(i % sets)
        graph.replay()
        return graph

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # what PyTorch sets up on first use may not happen while it records
        for _ in range(3):
            call(0)
    stream.synchronize()
    calls = calls_for(1e-3 * milliseconds(record(sets).replay) / sets, sets)
    graph = record(calls)
    return Time.of(warm(lambda: milliseconds(graph.replay)), calls)


def host_microseconds(call: Callable[[], Any], calls: int = 200) -> float:
    """What a call costs its caller in Python: median over batches that the GPU's queue takes without waiting."""
    times = []
    for _ in range(5):
        launch.cupy().cuda.Device().synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls)
    launch.cupy().cuda.Device().synchronize()
    return 1e6 * statistics.median(times)


def copy_bandwidth(size: int = 1 << 30) -> float:
    """Bytes a second, read and written, of a copy on the device: by the kernel above or by the driver, which is faster.
    (In a graph on an H100 the driver's copy reaches 2.42 TB/s, a kernel 2.95.)"""
    cp = launch.cupy()
    source, target = cp.zeros(size, np.uint8), cp.empty(size, np.uint8)
    kernel, words = cp.RawKernel(KERNELS, "copy_all"), size // 16
    processors = cp.cuda.Device().attributes["MultiProcessorCount"]
    # from two blocks a multiprocessor to one turn each
    grids = (*(processors * blocks for blocks in (2, 3, 4, 8, 32)), -(-words // (512 * 4)))
    calls = [lambda _, grid=grid: kernel((grid,), (512,), (source, np.int64(words), target)) for grid in grids]
    return (
        2e6 * size / min(graph_time(call, 1).microseconds for call in [lambda _: launch.copy(target, source), *calls])
    )


def node_microseconds() -> float:
    """What a kernel that does nothing takes in a graph."""
    kernel = launch.cupy().RawKernel(KERNELS, "nothing")
    return graph_time(lambda _: kernel((1,), (32,), ()), 1).microseconds


def matmul_flops(torch: Any, size: int = 8192) -> float:
    """FLOP/s of PyTorch's product of two bf16 matrices, the ceiling for what tensor cores compute."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / torch_time(torch, lambda _: a @ b, 1).microseconds * 1e6


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError inside when that much time has passed (main thread only)."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"took more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def rotated(make: Callable[[], tuple[Any, ...]], copy: Callable[[Any], Any], room: int) -> list[tuple[Any, ...]]:
    """Sets of inputs that together take more than `room` bytes, 64 sets at most: what a call reads has left the L2 cache
    by then. What is too small for that (activations of one token) is found there, as in a model, where the operation
    before has just written it."""
    first = make()
    size = max(1, sum(array.nbytes for array in first))
    count = min(64, room // size + 1) if size < room else 1
    return [first, *(tuple(map(copy, first)) for _ in itertools.repeat(None, count - 1))]
