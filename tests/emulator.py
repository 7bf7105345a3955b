"""Runs the package's CUDA kernels on the CPU: the very same sources, compiled by the C++ compiler with `cuda_cpu/`.

`load_function` has the contract of `cuqwen.launch.load_function`, with NumPy arrays in place of CuPy's and more checks:
dtypes against the kernel's parameters, block sizes against `__launch_bounds__`, writes just outside an array. The
fixture `emulated_gpu` puts it in the package's place, so that `cuqwen.cuda` and whole models run on NumPy arrays.

What it cannot show: speed, the GPU's memory model between blocks (x86 is stricter), its approximate functions and
flush-to-zero, what NVRTC alone refuses (`test_compile.py` shows that).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import shlex
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from cuda_cpu import build
from cuda_cpu.build import SANITIZE, available, unavailable_reason
from recorder import Recorder, TensorMap, behind, pointer

from cuqwen import cuda, launch, ops, staging, startup

ORDERS = ("ascending", "descending", "shuffled")
RED_ZONE = 4096  # bytes on either side of an array that nobody may write
ALIGNMENT = 256  # of an array's first byte, as cudaMalloc has it
MAX_SHARED = 227 << 10  # bytes a block on sm_90
LIMITS = ((2**31 - 1, 65535, 65535), (1024, 1024, 64))  # the largest grid and block


class KernelError(RuntimeError):
    """A launch that a GPU would not survive, or that gives different results in different thread orders."""


@dataclass
class Settings:
    orders: tuple[str, ...] = ("ascending",)  # every launch runs in each and must give the same bytes
    seed: int = 1  # of the order "shuffled"
    workers: int = os.cpu_count() or 1  # OS threads for the blocks of a launch
    resident_blocks: int = 1  # at least so many blocks run at once, whatever `workers`, and may wait for each other
    patience: float = 60.0  # seconds of nothing but polling until that counts as a deadlock


settings = Settings()


@contextlib.contextmanager
def orders(*names: str) -> Iterator[None]:
    """Inside, every launch runs in each of these thread orders (default: all) and raises KernelError if they differ."""
    before, settings.orders = settings.orders, names or ORDERS
    try:
        yield
    finally:
        settings.orders = before


needs_emulator = pytest.mark.skipif(not available(), reason=unavailable_reason())


# ---- launching ----


class _Parameter(ctypes.Structure):  # as in cuda_cpu/runtime.h, here and below
    _fields_ = (
        ("type", ctypes.c_char_p),
        ("size", ctypes.c_int),
        ("is_pointer", ctypes.c_int),
        ("is_const", ctypes.c_int),
    )


class _Kernel(ctypes.Structure):
    _fields_ = (
        ("call", ctypes.c_void_p),
        ("shared_anchor", ctypes.c_void_p),
        ("max_threads", ctypes.c_int),
        ("parameters", ctypes.c_int),
        ("parameter", _Parameter * 64),
    )


class _Options(ctypes.Structure):
    _fields_ = (
        ("order", ctypes.c_int),
        ("seed", ctypes.c_uint),
        ("workers", ctypes.c_int),
        ("cooperative", ctypes.c_int),
        ("patience", ctypes.c_double),
        ("late", ctypes.c_void_p),
        ("lates", ctypes.c_int),
        ("dependent", ctypes.c_int),
    )


class _Late(ctypes.Structure):
    _fields_ = (
        ("memory", ctypes.c_void_p),
        ("before", ctypes.c_void_p),
        ("after", ctypes.c_void_p),
        ("bytes", ctypes.c_size_t),
    )


@functools.cache
def load_function(
    file: str, entry: str, defines: launch.Defines = (), *, cooperative: bool = False
) -> Callable[..., None]:
    """Compile kernels/<file>.cu (or an absolute path) with `-D` for each of `defines` and return its entry point as
    `launch(grid, block, args, shared_bytes=0, dependent=False, late=())`, which returns when the kernel has ended.

    args: C-contiguous NumPy arrays for pointers, None for a null pointer, NumPy scalars. Raises TypeError for an argument
    that the parameter cannot take, ValueError for a grid or block that a GPU refuses, KernelError for what goes wrong
    inside. A `dependent` launch must call griddepcontrol_wait before it writes; the arguments numbered in `late`, which
    launches before it have written, hold NaN until then. With `cooperative` all blocks run at once and may wait for each other; without, as many as the larger one of
    `settings.workers` and `settings.resident_blocks`.
    """
    library = build.kernel_library(file, defines)
    try:
        describe = getattr(library, f"emu_kernel_{entry}")
    except AttributeError:
        found = ", ".join(name for name, _ in build.entries(build.source(file), defines))
        raise ValueError(f'{file}: no entry point extern "C" __global__ {entry}; found {found}') from None
    describe.restype = ctypes.POINTER(_Kernel)
    kernel = describe().contents
    launch_kernel = ctypes.CDLL(str(build.runtime())).emu_launch

    def run(
        order: str, dims: ctypes.Array, shared_bytes: int, pointers: ctypes.Array, lates: list[_Late] | None
    ) -> None:
        workers = max(settings.workers, settings.resident_blocks)
        options = _Options(ORDERS.index(order), settings.seed, workers, cooperative, settings.patience)
        if lates is not None:
            array = (_Late * len(lates))(*lates)
            options.late, options.lates, options.dependent = ctypes.addressof(array), len(lates), True
        error = ctypes.create_string_buffer(4096)
        if launch_kernel(
            ctypes.byref(kernel), ctypes.byref(options), dims, ctypes.c_size_t(shared_bytes), pointers, error, 4096
        ):
            raise KernelError(f"{entry}, threads {order}: {error.value.decode()}")

    def start(
        grid: tuple[int, ...],
        block: tuple[int, ...],
        args: tuple,
        shared_bytes: int = 0,
        dependent: bool = False,
        late: tuple[int, ...] = (),
    ) -> None:
        dims = _dimensions(entry, grid, block, kernel.max_threads)
        if not 0 <= shared_bytes <= MAX_SHARED:
            raise ValueError(f"{entry}: shared_bytes: wanted 0 to {MAX_SHARED}, got {shared_bytes}")
        keep = [_bytes_of(entry, i, arg, kernel) for i, arg in enumerate(_counted(entry, args, kernel))]
        pointers = (ctypes.c_void_p * (len(keep) + 1))(*map(ctypes.addressof, keep))
        written = {i: a for i, a in enumerate(args) if isinstance(a, np.ndarray) and not kernel.parameter[i].is_const}
        before = {i: a.copy() for i, a in written.items()} if len(settings.orders) > 1 else {}
        first: dict[int, np.ndarray] = {}
        for turn, order in enumerate(settings.orders):
            if turn:
                for i, array in written.items():
                    array[...] = before[i]
            content = _hold_back(args, written, late) if dependent else {}
            run(order, dims, shared_bytes, pointers, [late for _, late in content.values()] if dependent else None)
            for i, array in written.items():
                _check_red_zone(array, f"{entry}: argument {i}")
                if turn:
                    _compare(entry, i, first[i], array, order)
                elif len(settings.orders) > 1:
                    first[i] = array.copy()

    start.max_threads = kernel.max_threads
    start.writes = [
        i for i in range(kernel.parameters) if kernel.parameter[i].is_pointer and not kernel.parameter[i].is_const
    ]
    return start


def _hold_back(args: tuple, written: dict[int, np.ndarray], late: tuple[int, ...]) -> dict[int, tuple[list, _Late]]:
    """Fills the arguments in `late` with NaN until the launch waits. (Copies that must live on, what the runtime is told)
    for each array, by address, that the launch may not read or write before."""
    held = {}
    for i in {*written, *late}:
        array = behind(args[i])
        if not isinstance(array, np.ndarray) or array.ctypes.data in held:
            continue
        now = array.tobytes()
        nan = b"\xff" * len(now)
        is_late = any(
            isinstance(args[j], np.ndarray) and behind(args[j]).ctypes.data == array.ctypes.data for j in late
        )
        copies = [ctypes.create_string_buffer(data, len(now)) for data in (nan if is_late else now, now)]
        if is_late:
            ctypes.memmove(array.ctypes.data, nan, len(now))
        addresses = [array.ctypes.data, *map(ctypes.addressof, copies)]
        held[array.ctypes.data] = copies, _Late(*addresses, len(now))
    return held


def _dimensions(entry: str, grid: tuple[int, ...], block: tuple[int, ...], max_threads: int) -> ctypes.Array:
    full = [(*map(int, dims), 1, 1)[:3] for dims in (grid, block)]
    for what, dims, limits in zip(("grid", "block"), full, LIMITS, strict=True):
        if any(not 1 <= size <= limit for size, limit in zip(dims, limits, strict=True)):
            raise ValueError(f"{entry}: {what}: wanted sizes from 1 to {limits}, got {dims}")
    if (threads := int(np.prod(full[1]))) > max_threads:
        raise ValueError(f"{entry}: block: wanted at most {max_threads} threads (__launch_bounds__), got {threads}")
    return (ctypes.c_uint * 6)(*full[0], *full[1])


def _counted(entry: str, args: tuple, kernel: _Kernel) -> tuple:
    if len(args) != kernel.parameters:
        raise TypeError(f"{entry}: wanted {kernel.parameters} arguments, got {len(args)}")
    return args


def _bytes_of(entry: str, i: int, arg: object, kernel: _Kernel) -> ctypes.Array | ctypes.c_void_p:
    """The argument as the kernel's parameter is laid out in memory."""
    parameter = kernel.parameter[i]
    wanted, name = parameter.type.decode(), f"{entry}: argument {i}"
    if parameter.is_pointer:
        if arg is None:
            return ctypes.c_void_p(None)
        if not isinstance(arg, np.ndarray):
            raise TypeError(f"{name}: wanted an array of {wanted or 'any type'} or None, got {type(arg).__name__}")
        if wanted and arg.dtype.name != wanted:
            raise TypeError(f"{name}: wanted an array of {wanted}, got {arg.dtype.name}")
        if not arg.flags.c_contiguous:
            raise TypeError(f"{name}: wanted a C-contiguous array, got strides {arg.strides} for shape {arg.shape}")
        if not (arg.flags.writeable or parameter.is_const):
            raise TypeError(f"{name}: wanted an array that may be written, got a read-only one")
        return ctypes.c_void_p(arg.ctypes.data)
    if isinstance(arg, np.ndarray) and arg.dtype.type is np.void and arg.shape == (1,):
        arg = arg[0]  # a structure as CuPy takes it
    if not isinstance(arg, np.generic):
        raise TypeError(f"{name}: wanted a NumPy scalar {wanted} of {parameter.size} bytes, got {type(arg).__name__}")
    if arg.itemsize != parameter.size or (wanted and arg.dtype.name != wanted):
        raise TypeError(
            f"{name}: wanted {wanted or 'a scalar'} of {parameter.size} bytes, got {arg.dtype} of {arg.itemsize}"
        )
    room = ctypes.create_string_buffer(parameter.size + 63)  # aligned to 64 bytes, the most that a type asks for
    placed = (ctypes.c_char * parameter.size).from_buffer(room, -ctypes.addressof(room) % 64)
    placed.raw = arg.tobytes()
    return placed


def _compare(entry: str, i: int, first: np.ndarray, array: np.ndarray, order: str) -> None:
    a, b = (
        np.ascontiguousarray(x).view(np.uint8).reshape(array.size, -1) for x in (first.reshape(-1), array.reshape(-1))
    )
    different = np.flatnonzero((a != b).any(axis=1))
    if different.size:
        where = tuple(map(int, np.unravel_index(different[0], array.shape)))
        raise KernelError(
            f"{entry}: argument {i} depends on the order of threads: {different.size} of {array.size} elements, first at "
            f"{where}: {first[where]} with threads {settings.orders[0]}, {array[where]} {order}; is a barrier missing?"
        )


# ---- memory ----

_zones: dict[int, tuple[weakref.ref, int, int]] = {}  # id of the owning array -> it, first and last byte of the middle


def empty(shape: tuple[int, ...], dtype: object) -> np.ndarray:
    """Uninitialised memory as from cudaMalloc, aligned likewise: reads as NaN, and so do the red zones beside it."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    owner = np.full(size + 2 * RED_ZONE + ALIGNMENT, 0xFF, np.uint8)
    start = -(-(owner.ctypes.data + RED_ZONE) // ALIGNMENT) * ALIGNMENT - owner.ctypes.data
    number = id(owner)
    _zones[number] = (weakref.ref(owner, lambda _: _zones.pop(number, None)), start, start + size)
    if poison := _address_sanitizer():
        address = owner.ctypes.data + start
        poison(ctypes.c_void_p(address - RED_ZONE), ctypes.c_size_t(RED_ZONE))
        poison(ctypes.c_void_p(address + size), ctypes.c_size_t(RED_ZONE))
    return owner[start : start + size].view(dtype).reshape(shape)


def upload(array: np.ndarray) -> np.ndarray:
    """A copy of an array in memory from `empty`."""
    copy = empty(array.shape, array.dtype)
    copy[...] = array
    return copy


def tensor_map(matrix: np.ndarray, box_rows: int) -> np.ndarray:
    """The twin of launch.tensor_map, as ptx_twins.h reads it."""
    columns = matrix.shape[-1]
    words = np.zeros(16, np.uint64)
    words[:5] = matrix.ctypes.data, matrix.size // columns, columns, box_rows, 0x70616D726F736E74
    result = words.view("V128").view(TensorMap)
    result.matrix = pointer(matrix)
    return result


@functools.cache
def _address_sanitizer() -> Callable | None:
    """AddressSanitizer's function that forbids memory to instrumented code (kernels; NumPy may still look)."""
    return getattr(ctypes.CDLL(None), "__asan_poison_memory_region", None)


def _check_red_zone(array: np.ndarray, name: str) -> None:
    owner = array if array.base is None else array.base
    _, start, stop = _zones.get(id(owner), (None, 0, 0))
    if stop == 0 and start == 0:
        return
    for side, zone in (("before", owner[:start]), ("after", owner[stop:])):
        if (zone != 0xFF).any():
            raise KernelError(f"{name}: something was written just {side} an array of {stop - start} bytes")


class Sender:
    """`staging.Sender` for NumPy arrays."""

    def __init__(self, device: int, size: int) -> None:
        self.buffer = memoryview(bytearray(size))

    def after(self, event: None) -> None:
        pass

    def send(self, array: np.ndarray, first: int, count: int) -> None:
        array.reshape(-1).view(np.uint8)[first : first + count] = np.frombuffer(self.buffer, np.uint8)[:count]

    def close(self) -> None:
        pass


@pytest.fixture
def emulated_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    """The package's GPU path on NumPy arrays: `ops` takes the way to `cuda`, kernels run here, in all thread orders.

    Gives the settings, to be changed for the test's duration (`emulated_gpu.orders = ("ascending",)` is three times
    faster). Memory that the package allocates is poisoned and has red zones, which are checked when the test ends.
    """
    if not available():
        pytest.skip(unavailable_reason())
    for name in ("orders", "seed", "workers", "resident_blocks", "patience"):  # to be restored
        monkeypatch.setattr(settings, name, getattr(settings, name))
    # under the sanitizers once is enough: what they look for does not depend on the order
    settings.orders = ORDERS[:1] if os.environ.get(SANITIZE) else ORDERS
    recorder = Recorder(load_function, empty)
    replaced = {
        "load_function": recorder.load_function,
        "empty": recorder.empty,
        "workspace": recorder.workspace,
        "record": recorder.record,
        "copy": recorder.copy,
        "upload": upload,
        "tensor_map": tensor_map,
        "host_array": lambda size, dtype: (array := upload(np.zeros(size, dtype)), array),
        "wgmma_processors": lambda: 0,  # as on a GPU before Hopper, unless a test says otherwise
        "wait": lambda: None,
        "is_idle": lambda: True,
        "has_gpu": lambda: True,
        "cupy": lambda: None,
        "free_bytes": lambda: 1 << 40,
        "release_memory": lambda: None,
        "peak_bandwidth": lambda: 1e12,
        "max_shared_bytes": lambda: MAX_SHARED,
        "resident_blocks": lambda *_: 0,  # as on a GPU before Hopper, unless a test says otherwise
    }
    for name, function in replaced.items():
        monkeypatch.setattr(launch, name, function)
    monkeypatch.setattr(startup, "compiling", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(staging, "Sender", Sender)
    monkeypatch.setattr(staging, "now", lambda: (0, None))
    monkeypatch.setattr(ops, "backend_of", lambda array: cuda if isinstance(array, np.ndarray) else None)
    yield settings
    for owner in [reference() for reference, _, _ in _zones.values()]:
        if owner is not None:
            _check_red_zone(owner, "at the end")


# ---- sanitizers ----


def sanitized(
    *arguments: str, sanitizers: str = "address,undefined", timeout: float = 600
) -> subprocess.CompletedProcess:
    """Run Python with these arguments and all kernels built with -fsanitize; skips the test if that cannot be had.

    A process of its own, because AddressSanitizer must be loaded before everything else and ends what it finds fault in.
    """
    if "Free Software Foundation" not in build.compiler_version():
        pytest.skip(f"sanitizers need g++, not {shlex.join(build.compiler())}")
    environment = {
        **os.environ,
        SANITIZE: sanitizers,
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:abort_on_error=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), str(Path(__file__).parent)]),
    }
    if "address" in sanitizers:
        environment["LD_PRELOAD"] = build.run(*build.compiler(), "-print-file-name=libasan.so").strip()
        if not os.path.isabs(environment["LD_PRELOAD"]):
            pytest.skip("g++ comes without libasan.so here")
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, env=environment, timeout=timeout
    )
