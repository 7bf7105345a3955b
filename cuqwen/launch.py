"""CUDA sources to compiled kernels, and the few things that the package needs from a GPU.

The only module that imports CuPy, and only inside functions: `import cuqwen` needs neither CuPy nor a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# Inside the package in a wheel, beside it in a checkout or an editable install.
KERNEL_FOLDER = next(
    (p for p in (Path(__file__).parent / "kernels", Path(__file__).parent.parent / "kernels") if p.is_dir()),
    Path(__file__).parent / "kernels",
)

# What a launch may ask for without being allowed more first.
DEFAULT_SHARED_BYTES = 48 << 10

Launch = Callable[..., None]
Defines = tuple[tuple[str, str], ...]


class DeviceError(RuntimeError):
    """There is no usable NVIDIA GPU, or what CuPy needs to reach it is missing."""


def source(file: str) -> str:
    """The text of `kernels/<file>.cu` with our own headers pasted in, each once.

    CuPy's disk cache is keyed by the source text and not by the files that it includes, so a changed header would
    otherwise bring back the old kernel. `#line` keeps compiler messages pointing at the real files.
    """
    pasted: set[str] = set()

    def paste(name: str) -> str:
        path = KERNEL_FOLDER / name
        lines = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            include = re.match(r'\s*#include "([^"]+)"', line)
            if line.strip() == "#pragma once":
                lines.append("")
            elif include is None:
                lines.append(line)
            elif include[1] in pasted:
                lines.append("")
            else:
                pasted.add(include[1])
                lines += [paste(include[1]), f'#line {number + 1} "kernels/{name}"']
        return "\n".join([f'#line 1 "kernels/{name}"', *lines])

    return paste(f"{file}.cu") + "\n"


@functools.cache
def load_function(file: str, entry: str, defines: Defines) -> Launch:
    """Compile `kernels/<file>.cu` with `-D` for each of `defines` and return its entry point as
    `launch(grid, block, args, shared_bytes=0)`, which runs on CuPy's current stream.

    CuPy keeps the compiled code on disk; this function remembers the entry points of this process.
    """
    try:
        function = _module(file, defines).get_function(entry)
    except Exception as error:  # CuPy raises CompileException, NVRTCError or RuntimeError
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:300]
        raise DeviceError(
            f"kernels/{file}.cu cannot be compiled ({reason}); install NVRTC and the CUDA headers with "
            'pip install "cuqwen[cuda13]" or "cuqwen[cuda12]", or use device="cpu" (--device cpu)'
        ) from error

    def launch(grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...], shared_bytes: int = 0) -> None:
        for i, arg in enumerate(args):
            if isinstance(arg, (bool, int, float)) and not isinstance(arg, np.generic):  # np.float64 is a float
                # CuPy would hand over 8 bytes: a float parameter would read half of a double
                raise TypeError(
                    f"{entry}: argument {i} is a bare {type(arg).__name__}; wanted a NumPy scalar or an array"
                )
        if shared_bytes > DEFAULT_SHARED_BYTES:
            function.max_dynamic_shared_size_bytes = shared_bytes  # CuPy remembers the value: later calls cost little
        function(grid, block, args, shared_mem=shared_bytes)

    return launch


@functools.cache
def _module(file: str, defines: Defines) -> Any:
    options = ("--std=c++17", *(f"-D{name}={value}" for name, value in defines))
    return cupy().RawModule(code=source(file), options=options)


@functools.cache
def cupy() -> Any:
    """The cupy module; `DeviceError` with the remedy if it cannot be imported or sees no GPU."""
    try:
        import cupy
    except ImportError as error:
        raise DeviceError(
            f"CuPy cannot be imported ({error}); for an NVIDIA GPU install it with "
            'pip install "cuqwen[cuda13]" (driver 580 or newer) or "cuqwen[cuda12]", or use device="cpu"'
        ) from None
    if not cupy.cuda.is_available():
        raise DeviceError(
            "no NVIDIA GPU or no driver was found; see whether nvidia-smi lists a GPU, "
            'or use device="cpu" (--device cpu)'
        )
    major, minor = cupy.cuda.Device().compute_capability[:-1], cupy.cuda.Device().compute_capability[-1]
    if int(major) < 8:
        raise DeviceError(
            f"this GPU has compute capability {major}.{minor}; wanted 8.0 (Ampere) or newer for bf16; "
            'use device="cpu" (--device cpu)'
        )
    return cupy


def has_gpu() -> bool:
    """Whether kernels can run in this process."""
    try:
        cupy()
    except DeviceError:
        return False
    return True


def empty(shape: tuple[int, ...], dtype: Any) -> Any:
    """Uninitialised GPU memory as a CuPy array."""
    return cupy().empty(shape, dtype)


WORKSPACE_COUNTERS = 4096
_workspaces: dict[tuple[int, int], Any] = {}  # by device and stream


def workspace() -> Any:
    """int32 [4096] on the GPU, for kernels whose last block to finish sums up what the others left: counters of blocks.

    It is all zeros, and a kernel that uses it must leave it so. There is one for each stream, where launches follow each
    other, and one for each recording.
    """
    cp = cupy()
    key = cp.cuda.Device().id, cp.cuda.get_current_stream().ptr
    if key not in _workspaces:
        _workspaces[key] = _zeros(WORKSPACE_COUNTERS)
    return _workspaces[key]


def _zeros(size: int) -> Any:
    """int32 zeros that are there when this returns, also while the current stream is being captured."""
    cp = cupy()
    with cp.cuda.Stream(non_blocking=True) as stream:
        array = cp.zeros(size, np.int32)
        stream.synchronize()
    return array


def upload(array: np.ndarray) -> Any:
    """A copy of a NumPy array on the GPU, same shape and dtype."""
    return cupy().asarray(array)


def address(array: Any) -> int:
    """Where the elements of a CuPy or NumPy array begin."""
    return array.data.ptr if is_gpu_array(array) else array.ctypes.data


def is_gpu_array(array: Any) -> bool:
    """Whether `array` is a CuPy array; CuPy is not imported to find out."""
    return type(array).__module__.partition(".")[0] == "cupy"


def copy(target: Any, source: Any) -> None:
    """Copy a contiguous GPU array into another one of the same size, on the current stream."""
    target.data.copy_from_device_async(source.data, target.nbytes)


def record(work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """Record the launches of `work` as a CUDA graph. Returns (launch the graph on the current stream, what `work` returned).

    `work` must not wait for the GPU and must have run before, so that its kernels are compiled. It is not executed here.
    Its temporary arrays come from a memory pool of the graph's own, which nothing else can hand out again; the launcher
    keeps it, and all arrays that it has handed out keep it too. For their sake, and for that of the graph's `workspace`,
    two launches of one graph must follow each other and not overlap.
    """
    cp = cupy()
    cp.get_default_memory_pool().free_all_blocks()  # the graph's own pool cannot take its idle blocks
    pool, stream = cp.cuda.MemoryPool(), cp.cuda.Stream(non_blocking=True)
    with cp.cuda.using_allocator(pool.malloc), stream:
        key = cp.cuda.Device().id, stream.ptr
        counters = _workspaces[key] = _zeros(WORKSPACE_COUNTERS)
        stream.begin_capture()
        try:
            result = work()
        except BaseException:
            with contextlib.suppress(Exception):  # the capture may be invalid by now; the first error counts
                stream.end_capture()
            raise
        finally:
            del _workspaces[key]
        graph = stream.end_capture()

    def launch_graph(keep: Any = (pool, counters)) -> None:
        graph.launch(cp.cuda.get_current_stream())

    return launch_graph, result


def release_staging() -> None:
    """Free the page-locked host memory through which arrays were uploaded; CuPy keeps it otherwise."""
    cupy().get_default_pinned_memory_pool().free_all_blocks()


def free_bytes() -> int:
    """GPU memory that can still be allocated, CuPy's own idle blocks included."""
    cp = cupy()
    return cp.cuda.Device().mem_info[0] + cp.get_default_memory_pool().free_bytes()


def peak_bandwidth() -> float:
    """The GPU's theoretical memory bandwidth in bytes a second: clock x 2 (double data rate) x bus width."""
    attributes = cupy().cuda.Device().attributes
    return 2e3 * attributes["MemoryClockRate"] * attributes["GlobalMemoryBusWidth"] / 8


@functools.cache
def max_shared_bytes() -> int:
    """The most shared memory that one block can have on this GPU."""
    return cupy().cuda.Device().attributes["MaxSharedMemoryPerBlockOptin"]


def resident_blocks(file: str, entry: str, defines: Defines, threads: int, shared_bytes: int) -> int:
    """How many blocks of a kernel this GPU, or the part of it that this process has, can run at the same time.

    0 on a GPU older than Hopper (compute capability 9.0), whose instructions such kernels need.
    """
    return _resident_blocks(cupy().cuda.Device().id, file, entry, defines, threads, shared_bytes)


@functools.cache
def _resident_blocks(device_id: int, file: str, entry: str, defines: Defines, threads: int, shared_bytes: int) -> int:
    cp = cupy()
    device = cp.cuda.Device()
    if int(device.compute_capability) < 90 or shared_bytes > max_shared_bytes():
        return 0
    load_function(file, entry, defines)  # for its errors
    function = _module(file, defines).get_function(entry)
    function.max_dynamic_shared_size_bytes = shared_bytes
    blocks = cp.cuda.driver.occupancyMaxActiveBlocksPerMultiprocessor(function.kernel.ptr, threads, shared_bytes)
    return blocks * device.attributes["MultiProcessorCount"]


_copies: list[tuple[Any, Any]] = []  # (event, page-locked memory) of copies that may still be on their way


def read_later(array: Any) -> Callable[[], list[int]]:
    """Copies a small int32 array to the host after what is on the current stream now. Returns what waits for it and gives
    its elements."""
    if not is_gpu_array(array):
        values = array.tolist()
        return lambda: values
    cp = cupy()
    # memory that nobody asks for any more must outlive its copy: CuPy would hand it out again at once
    _copies[:] = [copy for copy in _copies if not copy[0].done]
    memory = cp.cuda.alloc_pinned_memory(array.nbytes)
    arrived, stream = cp.cuda.Event(block=False, disable_timing=True), cp.cuda.get_current_stream()
    array.data.copy_to_host_async(ctypes.c_void_p(memory.ptr), array.nbytes, stream)
    arrived.record(stream)
    _copies.append((arrived, memory))

    def read() -> list[int]:
        arrived.synchronize()
        return np.frombuffer(memory, np.int32, array.size).tolist()

    return read


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that GPU or host memory ran out."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
