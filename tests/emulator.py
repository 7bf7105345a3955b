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
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from cuqwen import cuda, launch, ops

HEADERS = Path(__file__).parent / "cuda_cpu"
ORDERS = ("ascending", "descending", "shuffled")
SANITIZE = "CUQWEN_SANITIZE"  # environment variable: the value of -fsanitize, see `sanitized`
RED_ZONE = 4096  # bytes on either side of an array that nobody may write
ALIGNMENT = 256  # of an array's first byte, as cudaMalloc has it
LIMITS = ((2**31 - 1, 65535, 65535), (1024, 1024, 64))  # the largest grid and block


class KernelError(RuntimeError):
    """A launch that a GPU would not survive, or that gives different results in different thread orders."""


@dataclass
class Settings:
    orders: tuple[str, ...] = ("ascending",)  # every launch runs in each and must give the same bytes
    seed: int = 1  # of the order "shuffled"
    workers: int = os.cpu_count() or 1  # OS threads for the blocks of a launch
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


# ---- the compiler ----


@functools.cache
def compiler() -> tuple[str, ...]:
    """The C++ compiler's command, () if there is none."""
    for command in filter(None, (os.environ.get("CXX"), "g++", "clang++")):
        words = tuple(shlex.split(command))
        if shutil.which(words[0]):
            return words
    zig = subprocess.run([sys.executable, "-m", "ziglang", "version"], capture_output=True, check=False)
    return (sys.executable, "-m", "ziglang", "c++") if zig.returncode == 0 else ()


def available() -> bool:
    return not unavailable_reason()


def unavailable_reason() -> str:
    """Why no kernel can run on this CPU; "" if they can."""
    if sys.platform != "linux":
        return f"kernels run on the CPU under Linux only, this is {sys.platform}"
    return "" if compiler() else "no C++ compiler: install g++ or clang++, or `pip install ziglang`, or set CXX"


needs_emulator = pytest.mark.skipif(not available(), reason=unavailable_reason())


def _compile_environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}  # the compiler itself needs no sanitizer


def _run(*command: str, text: str | None = None) -> str:
    done = subprocess.run(
        command, input=text, capture_output=True, text=True, check=False, env=_compile_environment(), encoding="utf-8"
    )
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stderr}")
    return done.stdout


@functools.cache
def _compiler_version() -> str:
    return _run(*compiler(), "--version")


@functools.cache
def _flags() -> tuple[str, ...]:
    # Kernels read memory through other types (uint4 for eight bf16). No contraction: results must not depend on whether
    # this CPU has FMA, only speed may.
    sanitizers = os.environ.get(SANITIZE)
    # with sanitizers the time goes into compiling
    flags = [
        "-std=c++17",
        "-O0" if sanitizers else "-O2",
        "-fPIC",
        "-pthread",
        "-fno-strict-aliasing",
        "-ffp-contract=off",
        f"-I{HEADERS}",
    ]
    with contextlib.suppress(OSError):
        features = set(re.search(r"^flags\s*:(.*)", Path("/proc/cpuinfo").read_text(), re.M)[1].split())
        flags += [f"-m{feature}" for feature in ("fma", "avx2") if feature in features]
    if sanitizers:
        flags += [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-g1", "-fno-omit-frame-pointer"]
    return tuple(flags)


@functools.cache
def cache_folder() -> Path:
    """Where compiled kernels are kept, by the hash of all that went into them."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("CUQWEN_TEST_CACHE") or Path(home) / "cuqwen-tests")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="cuqwen-tests-"))
    return folder


def _build(
    name: str, text: Callable[[], str], key: str, flags: tuple[str, ...] = (), link: tuple[str, ...] = ()
) -> Path:
    """Compile C++ `text` into a shared library; again only if something changed. Safe when two processes race."""
    headers = [path.read_text() for path in sorted(HEADERS.iterdir())]
    what = [_compiler_version(), *compiler(), *_flags(), *flags, *link, *headers, key]
    path = cache_folder() / f"{name}-{hashlib.sha256(chr(0).join(what).encode()).hexdigest()[:20]}.so"
    if not path.exists():
        partial = path.with_suffix(f".{os.getpid()}.partial")
        try:
            output = ("-shared", "-o", str(partial))
            # -x none: what follows the source on stdin are libraries again
            _run(*compiler(), *_flags(), *flags, *output, "-x", "c++", "-", "-x", "none", *link, text=text())
            partial.replace(path)  # atomic: a reader sees all of it or nothing
        finally:
            partial.unlink(missing_ok=True)
    return path


@functools.cache
def _runtime() -> Path:
    text = (HEADERS / "runtime.cpp").read_text()
    # The scheduler itself is not instrumented: AddressSanitizer would take the frames of functions that never return,
    # because their fibre is done, for those of the stack's next user.
    flags = ("-fno-sanitize=all",) if os.environ.get(SANITIZE) else ()
    flags += ("-DEMU_ASAN",) if "address" in os.environ.get(SANITIZE, "") else ()
    return _build("runtime", lambda: text, text, flags)


# `extern "C" __global__ void __launch_bounds__(THREADS) name(`, after the preprocessor
ENTRY = re.compile(
    r'extern\s+"C"\s+__global__\s+(?:void\s+)?(?:__launch_bounds__\s*\(((?:[^()]|\([^()]*\))*)\)\s*)?(?:void\s+)?(\w+)\s*\('
)


def entries(text: str, defines: launch.Defines) -> list[tuple[str, str]]:
    """The kernels that a source has under these constants, each with the arguments of its __launch_bounds__ or ""."""
    own = re.sub(r"^\s*#include\s*<.*", "", text, flags=re.M)
    options = [f"-D{name}={value}" for name, value in defines]
    expanded = _run(*compiler(), "-E", "-P", "-DCUQWEN_CPU", *options, "-x", "c++", "-", text=own)
    return [(name, bounds) for bounds, name in ENTRY.findall(expanded)]


def source(file: str) -> str:
    """The text of kernels/<file>.cu, or of <file>.cu for an absolute path; our headers pasted in."""
    return launch.source(file.removesuffix(".cu")).replace('"kernels//', '"/')


@functools.cache
def _library(file: str, defines: launch.Defines) -> ctypes.CDLL:
    text = source(file)
    options = [f"-D{name}={value}" for name, value in defines]

    def unit() -> str:
        found = entries(text, defines)
        kernels = [f"EMU_KERNEL({name}{', ' if bounds else ''}{bounds})" for name, bounds in found]
        return "\n".join(['#include "cuda_cpu.h"', text, *kernels, ""])

    flags = ("-fvisibility=hidden", "-Wno-unknown-pragmas", "-DCUQWEN_CPU", *options)
    return ctypes.CDLL(str(_build(Path(file).stem, unit, text, flags, (str(_runtime()),))))


def build_all() -> None:
    """Compile every variant that the package may ask for, on all cores; afterwards `load_function` finds them."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda variant: _library(*variant), cuda.variants()))


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
    )


@functools.cache
def load_function(
    file: str, entry: str, defines: launch.Defines = (), *, cooperative: bool = False
) -> Callable[..., None]:
    """Compile kernels/<file>.cu (or an absolute path) with `-D` for each of `defines` and return its entry point as
    `launch(grid, block, args, shared_bytes=0)`, which returns when the kernel has ended.

    args: C-contiguous NumPy arrays for pointers, None for a null pointer, NumPy scalars. Raises TypeError for an argument
    that the parameter cannot take, ValueError for a grid or block that a GPU refuses, KernelError for what goes wrong
    inside. With `cooperative` all blocks run at once and may wait for each other.
    """
    library = _library(file, defines)
    try:
        describe = getattr(library, f"emu_kernel_{entry}")
    except AttributeError:
        found = ", ".join(name for name, _ in entries(source(file), defines))
        raise ValueError(f'{file}: no entry point extern "C" __global__ {entry}; found {found}') from None
    describe.restype = ctypes.POINTER(_Kernel)
    kernel = describe().contents
    launch_kernel = ctypes.CDLL(str(_runtime())).emu_launch

    def run(order: str, dims: ctypes.Array, shared_bytes: int, pointers: ctypes.Array) -> None:
        options = _Options(ORDERS.index(order), settings.seed, settings.workers, cooperative, settings.patience)
        error = ctypes.create_string_buffer(4096)
        if launch_kernel(
            ctypes.byref(kernel), ctypes.byref(options), dims, ctypes.c_size_t(shared_bytes), pointers, error, 4096
        ):
            raise KernelError(f"{entry}, threads {order}: {error.value.decode()}")

    def start(grid: tuple[int, ...], block: tuple[int, ...], args: tuple, shared_bytes: int = 0) -> None:
        dims = _dimensions(entry, grid, block, kernel.max_threads)
        keep = [_bytes_of(entry, i, arg, kernel) for i, arg in enumerate(_counted(entry, args, kernel))]
        pointers = (ctypes.c_void_p * (len(keep) + 1))(*map(ctypes.addressof, keep))
        written = {i: a for i, a in enumerate(args) if isinstance(a, np.ndarray) and not kernel.parameter[i].is_const}
        before = {i: a.copy() for i, a in written.items()} if len(settings.orders) > 1 else {}
        first: dict[int, np.ndarray] = {}
        for turn, order in enumerate(settings.orders):
            if turn:
                for i, array in written.items():
                    array[...] = before[i]
            run(order, dims, shared_bytes, pointers)
            for i, array in written.items():
                _check_red_zone(array, f"{entry}: argument {i}")
                if turn:
                    _compare(entry, i, first[i], array, order)
                elif len(settings.orders) > 1:
                    first[i] = array.copy()

    start.max_threads = kernel.max_threads
    return start


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
    if not isinstance(arg, np.generic):
        raise TypeError(f"{name}: wanted a NumPy scalar {wanted} of {parameter.size} bytes, got {type(arg).__name__}")
    if arg.itemsize != parameter.size or (wanted and arg.dtype.name != wanted):
        raise TypeError(
            f"{name}: wanted {wanted or 'a scalar'} of {parameter.size} bytes, got {arg.dtype} of {arg.itemsize}"
        )
    return ctypes.create_string_buffer(arg.tobytes(), parameter.size)


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


@pytest.fixture
def emulated_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    """The package's GPU path on NumPy arrays: `ops` takes the way to `cuda`, kernels run here, in all thread orders.

    Gives the settings, to be changed for the test's duration (`emulated_gpu.orders = ("ascending",)` is three times
    faster). Memory that the package allocates is poisoned and has red zones, which are checked when the test ends.
    """
    if not available():
        pytest.skip(unavailable_reason())
    for name in ("orders", "seed", "workers", "patience"):  # to be restored
        monkeypatch.setattr(settings, name, getattr(settings, name))
    # under the sanitizers once is enough: what they look for does not depend on the order
    settings.orders = ORDERS[:1] if os.environ.get(SANITIZE) else ORDERS
    replaced = {
        "load_function": load_function,
        "empty": empty,
        "upload": upload,
        "has_gpu": lambda: True,
        "cupy": lambda: None,
        "free_bytes": lambda: 1 << 40,
        "peak_bandwidth": lambda: 1e12,
    }
    for name, function in replaced.items():
        monkeypatch.setattr(launch, name, function)
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
    if "Free Software Foundation" not in _compiler_version():
        pytest.skip(f"sanitizers need g++, not {shlex.join(compiler())}")
    environment = {
        **os.environ,
        SANITIZE: sanitizers,
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:abort_on_error=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), str(Path(__file__).parent)]),
    }
    if "address" in sanitizers:
        environment["LD_PRELOAD"] = _run(*compiler(), "-print-file-name=libasan.so").strip()
        if not os.path.isabs(environment["LD_PRELOAD"]):
            pytest.skip("g++ comes without libasan.so here")
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, env=environment, timeout=timeout
    )
