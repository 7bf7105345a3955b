"""Compiled kernels and their launches, recordings of them, and the few things that the package needs from a GPU.

The only module that imports CuPy, and only inside functions: `import cuqwen` needs neither CuPy nor a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from cuqwen import driver_calls
from cuqwen.sources import source

# What a launch may ask for without being allowed more first.
DEFAULT_SHARED_BYTES = 48 << 10

Launch = Callable[..., None]
Defines = tuple[tuple[str, str], ...]
Request = tuple[str, str, Defines]  # the arguments of `load_function`


class DeviceError(RuntimeError):
    """There is no usable NVIDIA GPU, or what CuPy needs to reach it is missing."""


def load_function(file: str, entry: str, defines: Defines) -> Launch:
    """Compile `kernels/<file>.cu` with each of `defines` as a macro and return its entry point as
    `launch(grid, block, args, shared_bytes=0, dependent=False)`, which runs on CuPy's current stream.

    `dependent` says that the kernel waits by itself (griddepcontrol_wait in kernels/ptx.cuh) before it reads what launches
    before it have written, or writes: inside `record` it may then start while they still run.

    CuPy keeps the compiled code on disk; this function remembers the entry points of this process.
    """
    if _thread.noted is not None:
        _thread.noted[file, entry, defines] = None
        return lambda *_: None
    return _load_function(file, entry, defines)


@functools.cache
def _load_function(file: str, entry: str, defines: Defines) -> Launch:
    function = compile_function(file, entry, defines)
    accepted: set[tuple[type, ...]] = set()  # types of arguments
    allowed: dict[int, int] = {}  # bytes of shared memory, by the function on a device: each driver call costs the host

    def launch(
        grid: tuple[int, ...],
        block: tuple[int, ...],
        args: tuple[Any, ...],
        shared_bytes: int = 0,
        dependent: bool = False,
    ) -> None:
        types = tuple(map(type, args))
        if types not in accepted:
            _refuse_bare_numbers(entry, types)
            accepted.add(types)
        if shared_bytes > DEFAULT_SHARED_BYTES and allowed.get(function.kernel.ptr, 0) < shared_bytes:
            function.max_dynamic_shared_size_bytes = allowed[function.kernel.ptr] = shared_bytes
        if dependent and _overlapping:
            _launch_dependent(entry, function.kernel.ptr, grid, block, args, shared_bytes)
        else:
            function(grid, block, args, shared_mem=shared_bytes)

    return launch


def compile_function(file: str, entry: str, defines: Defines) -> Any:
    """The entry point, compiled, as CuPy's function. Raises DeviceError with the reason."""
    try:
        return _module(file, defines, entry).get_function(entry)
    except Exception as error:  # CuPy raises CompileException, NVRTCError or RuntimeError
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:300]
        raise DeviceError(
            f"kernels/{file}.cu cannot be compiled ({reason}); install NVRTC and the CUDA headers with "
            'pip install "cuqwen[cuda13]" or "cuqwen[cuda12]", or use device="cpu" (--device cpu)'
        ) from error


class _Thread(threading.local):
    noted: dict[Request, None] | None = None  # while `noting`


_thread = _Thread()


@contextlib.contextmanager
def noting() -> Iterator[dict[Request, None]]:
    """Inside the block operations called by this thread compute nothing; which entry points they would have launched is noted
    in what the block is given, in order. Arrays that they make are NumPy's, all elements of one being the same zero."""
    noted: dict[Request, None] = {}
    _thread.noted = noted
    try:
        yield noted
    finally:
        _thread.noted = None


def _refuse_bare_numbers(entry: str, types: tuple[type, ...]) -> None:
    for i, kind in enumerate(types):
        if issubclass(kind, (bool, int, float)) and not issubclass(kind, np.generic):  # np.float64 is a float
            # CuPy would hand over 8 bytes: a float parameter would read half of a double
            raise TypeError(f"{entry}: argument {i} is a bare {kind.__name__}; wanted a NumPy scalar or an array")


_overlapping = False  # inside `record`, on a GPU that has dependent launches


def _launch_dependent(
    entry: str, function: int, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...], shared_bytes: int
) -> None:
    """What CuPy's launch does, with the attribute that lets the kernel start before those before it have ended."""
    values = [
        ctypes.create_string_buffer(arg.tobytes(), arg.nbytes)
        if arg is not None and (isinstance(arg, np.generic) or arg.dtype.type is np.void)  # an array of one structure
        else ctypes.c_void_p(None if arg is None else address(arg))
        for arg in args
    ]
    stream = cupy().cuda.get_current_stream().ptr
    error = driver_calls.launch_dependent(function, grid, block, values, shared_bytes, stream)
    if error:
        raise DeviceError(f"{entry}: cuLaunchKernelEx: wanted CUDA_SUCCESS, got CUresult {error}; update the driver")


def _has_dependent_launches() -> bool:
    """Whether this GPU (Hopper or later) and its driver (CUDA 12.3 or later) let recorded launches overlap."""
    cuda = cupy().cuda
    return int(cuda.Device().compute_capability) >= 90 and cuda.runtime.driverGetVersion() >= 12030


@functools.cache
def _module(file: str, defines: Defines, entry: str | None = None) -> Any:
    # not as options: for each set of options that it has not met, CuPy asks NVRTC what an empty file becomes, 20 ms a time
    constants = "".join(f"#define {name} {value}\n" for name, value in defines)
    options: tuple[str, ...] = ("--std=c++17",)
    if cupy().cuda.Device().compute_capability == "90":
        options += ("-arch=sm_90a",)  # goes before CuPy's sm_90: with wgmma, which no other architecture has
    return cupy().RawModule(code=constants + source(file, entry), options=options)


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
    if _thread.noted is not None:
        return np.lib.stride_tricks.as_strided(np.zeros(1, dtype), shape, [0] * len(shape))
    return cupy().empty(shape, dtype)


WORKSPACE_COUNTERS = 4096
_workspaces: dict[tuple[int, int], Any] = {}  # by device and stream


def workspace() -> Any:
    """int32 [4096] on the GPU, for kernels whose last block to finish sums up what the others left: counters of blocks.

    It is all zeros, and a kernel that uses it must leave it so. There is one for each stream, where launches follow each
    other, and one for each recording.
    """
    if _thread.noted is not None:
        return np.zeros(WORKSPACE_COUNTERS, np.int32)
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


def host_array(size: int, dtype: Any) -> tuple[np.ndarray, Any]:
    """Zeros in page-locked memory of the host, which kernels can read and write while it looks: as a NumPy array [size],
    and as the array that stands for it in a launch."""
    cp = cupy()
    dtype = np.dtype(dtype)
    memory = cp.cuda.alloc_pinned_memory(size * dtype.itemsize)
    array = np.frombuffer(memory, dtype, size)
    array[...] = 0
    held = cp.cuda.UnownedMemory(memory.ptr, array.nbytes, memory, cp.cuda.Device().id)
    return array, cp.ndarray((size,), dtype, cp.cuda.MemoryPointer(held, 0))


def address(array: Any) -> int:
    """Where the elements of a CuPy or NumPy array begin."""
    return array.data.ptr if is_gpu_array(array) else array.ctypes.data


def is_gpu_array(array: Any) -> bool:
    """Whether `array` is a CuPy array; CuPy is not imported to find out."""
    kind = type(array)
    if kind not in _of_cupy:
        _of_cupy[kind] = kind.__module__.partition(".")[0] == "cupy"
    return _of_cupy[kind]


_of_cupy: dict[type, bool] = {}  # types of arrays seen


def copy(target: Any, source: Any) -> None:
    """Copy a contiguous GPU array into another one of the same size, on the current stream."""
    target.data.copy_from_device_async(source.data, target.nbytes)


def record(work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """Record the launches of `work` as a CUDA graph. Returns (launch the graph on the current stream, what `work` returned).

    `work` must not wait for the GPU and must have run before, so that its kernels are compiled. It is not executed here.
    Its temporary arrays come from a memory pool of the graph's own, which nothing else can hand out again; the launcher
    keeps it, and all arrays that it has handed out keep it too. For their sake, and for that of the graph's `workspace`,
    two launches of one graph must follow each other and not overlap. Its launches may overlap with each other, but for what
    the operations know to follow from what; what they take as weights, tables and positions `work` must not write.
    """
    global _overlapping
    cp = cupy()
    cp.get_default_memory_pool().free_all_blocks()  # the graph's own pool cannot take its idle blocks
    pool, stream = cp.cuda.MemoryPool(), cp.cuda.Stream(non_blocking=True)
    with cp.cuda.using_allocator(pool.malloc), stream:
        key = cp.cuda.Device().id, stream.ptr
        counters = _workspaces[key] = _zeros(WORKSPACE_COUNTERS)
        stream.begin_capture()
        _overlapping = _has_dependent_launches()
        try:
            result = work()
        except BaseException:
            with contextlib.suppress(Exception):  # the capture may be invalid by now; the first error counts
                stream.end_capture()
            raise
        finally:
            _overlapping = False
            del _workspaces[key]
        graph = stream.end_capture()

    def launch_graph(keep: Any = (pool, counters)) -> None:
        graph.launch(cp.cuda.get_current_stream())

    return launch_graph, result


def release_memory() -> None:
    """Give GPU memory that no array uses back to the driver."""
    cupy().get_default_memory_pool().free_all_blocks()


def free_bytes() -> int:
    """GPU memory that can still be allocated, CuPy's own idle blocks included."""
    cp = cupy()
    try:
        free = cp.cuda.Device().mem_info[0]
    except cp.cuda.runtime.CUDARuntimeError as error:
        raise DeviceError(
            f"this GPU gives this process no memory ({error}); see nvidia-smi for others, "
            'or use device="cpu" (--device cpu)'
        ) from None
    return int(free + cp.get_default_memory_pool().free_bytes())


def peak_bandwidth() -> float:
    """The GPU's theoretical memory bandwidth in bytes a second: clock x 2 (double data rate) x bus width."""
    attributes = cupy().cuda.Device().attributes
    return 2e3 * attributes["MemoryClockRate"] * attributes["GlobalMemoryBusWidth"] / 8


@functools.cache
def max_shared_bytes() -> int:
    """The most shared memory that one block can have on this GPU."""
    return cupy().cuda.Device().attributes["MaxSharedMemoryPerBlockOptin"]


def wgmma_processors() -> int:
    """How many multiprocessors this GPU has, if they have wgmma (compute capability 9.0), else 0."""
    return _wgmma_processors(cupy().cuda.Device().id)


@functools.cache
def _wgmma_processors(device_id: int) -> int:
    device = cupy().cuda.Device(device_id)
    return device.attributes["MultiProcessorCount"] if device.compute_capability == "90" else 0


def tensor_map(matrix: Any, box_rows: int) -> np.ndarray:
    """What bulk_copy_2d (kernels/ptx.cuh) must know of a bf16 matrix [.., C] on the GPU, C-contiguous, to copy boxes of
    `box_rows` rows (up to 256) and 64 columns: a CUtensorMap in an array of one, which is how CuPy passes a structure.

    The matrix must begin at a multiple of 16 bytes, C be a multiple of 8. Raises DeviceError for what the driver refuses.
    """
    if _thread.noted is not None:
        return np.zeros(1, "V128")
    columns = matrix.shape[-1]
    return _tensor_map(address(matrix), matrix.size // columns, columns, box_rows)


@functools.lru_cache(4096)
def _tensor_map(start: int, rows: int, columns: int, box_rows: int) -> np.ndarray:
    memory = np.zeros(128 + 64, np.uint8)
    place = memory[-memory.ctypes.data % 64 :][:128]  # the driver wants it so
    error = driver_calls.encode_tensor_map(place.ctypes.data, start, rows, columns, box_rows)
    if error:
        raise DeviceError(f"tensor_map: {rows} x {columns} at {start:#x}: cuTensorMapEncodeTiled gave CUresult {error}")
    return place.copy().view("V128")


def resident_blocks(file: str, entry: str, defines: Defines, threads: int, shared_bytes: int) -> int:
    """How many blocks of a kernel this GPU, or the part of it that this process has, can run at the same time.

    0 on a GPU older than Hopper (compute capability 9.0), whose instructions such kernels need.
    """
    if _thread.noted is not None:
        load_function(file, entry, defines)
        return 1 << 30 if int(cupy().cuda.Device().compute_capability) >= 90 else 0
    return _resident_blocks(cupy().cuda.Device().id, file, entry, defines, threads, shared_bytes)


@functools.cache
def _resident_blocks(device_id: int, file: str, entry: str, defines: Defines, threads: int, shared_bytes: int) -> int:
    cp = cupy()
    device = cp.cuda.Device()
    if int(device.compute_capability) < 90 or shared_bytes > max_shared_bytes():
        return 0
    load_function(file, entry, defines)  # for its errors
    function = _module(file, defines, entry).get_function(entry)
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


def wait() -> None:
    """Until the GPU has done what is on the current stream."""
    cupy().cuda.get_current_stream().synchronize()


def is_idle() -> bool:
    """Whether nothing on the current stream is left to do, because it is done or because it failed."""
    not_ready = 600  # cudaErrorNotReady
    return bool(cupy().cuda.runtime.streamQuery(cupy().cuda.get_current_stream().ptr) != not_ready)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that GPU or host memory ran out."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return any(name in str(error) for name in ("cudaErrorMemoryAllocation", "CUDA_ERROR_OUT_OF_MEMORY"))
