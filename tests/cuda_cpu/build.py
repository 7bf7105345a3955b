"""Kernel sources to shared libraries for this CPU, by whatever C++ compiler there is; kept on disk by content."""

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
import threading
from collections.abc import Callable
from pathlib import Path

from cuqwen import launch, sources

HEADERS = Path(__file__).parent
SANITIZE = "CUQWEN_SANITIZE"  # environment variable: the value of -fsanitize, see `emulator.sanitized`


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


def compile_environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}  # the compiler itself needs no sanitizer


def run(*command: str, text: str | None = None) -> str:
    done = subprocess.run(
        command, input=text, capture_output=True, text=True, check=False, env=compile_environment(), encoding="utf-8"
    )
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stderr}")
    return done.stdout


@functools.cache
def compiler_version() -> str:
    return run(*compiler(), "--version")


@functools.cache
def compile_flags() -> tuple[str, ...]:
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
        features = re.search(r"^flags\s*:(.*)", Path("/proc/cpuinfo").read_text(), re.M)  # x86 alone has such a line
        flags += [f"-m{feature}" for feature in ("fma", "avx2") if features and f" {feature} " in f"{features[1]} "]
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
    headers = [path.read_text() for path in sorted(HEADERS.glob("*.h"))]
    what = [compiler_version(), *compiler(), *compile_flags(), *flags, *link, *headers, key]
    path = cache_folder() / f"{name}-{hashlib.sha256(chr(0).join(what).encode()).hexdigest()[:20]}.so"
    if not path.exists():
        partial = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}.partial")
        try:
            output = ("-shared", "-o", str(partial))
            # -x none: what follows the source on stdin are libraries again
            run(*compiler(), *compile_flags(), *flags, *output, "-x", "c++", "-", "-x", "none", *link, text=text())
            partial.replace(path)  # atomic: a reader sees all of it or nothing
        finally:
            partial.unlink(missing_ok=True)
    return path


@functools.cache
def runtime() -> Path:
    text = '#line 1 "tests/cuda_cpu/runtime.cpp"\n' + (HEADERS / "runtime.cpp").read_text()
    # The scheduler itself is not instrumented: AddressSanitizer would take the frames of functions that never return,
    # because their fibre is done, for those of the stack's next user.
    flags = ("-fno-sanitize=all", "-O2") if os.environ.get(SANITIZE) else ()
    flags += ("-DEMU_ASAN",) if "address" in os.environ.get(SANITIZE, "") else ()
    return _build("runtime", lambda: text, text, flags)


# `extern "C" __global__ void __launch_bounds__(THREADS) name(`, after the preprocessor
ENTRY = re.compile(
    r'extern\s+"C"\s+__global__\s+(?:void\s+)?(?:__cluster_dims__\s*\([^()]*\)\s*)?'
    r"(?:__launch_bounds__\s*\(((?:[^()]|\([^()]*\))*)\)\s*)?(?:void\s+)?(\w+)\s*\("
)


# What sm_90a alone has runs here as well.
MACROS = ("-DCUQWEN_CPU", "-D__CUDA_ARCH_FEAT_SM90_ALL")


def entries(text: str, defines: launch.Defines) -> list[tuple[str, str]]:
    """The kernels that a source has under these constants, each with the arguments of its __launch_bounds__ or ""."""
    own = re.sub(r"^\s*#include\s*<.*", "", text, flags=re.M)
    options = [f"-D{name}={value}" for name, value in defines]
    expanded = run(*compiler(), "-E", "-P", *MACROS, *options, "-x", "c++", "-", text=own)
    return [(name, bounds) for bounds, name in ENTRY.findall(expanded)]


def source(file: str) -> str:
    """The text of kernels/<file>.cu, or of <file>.cu for an absolute path; our headers pasted in."""
    return sources.source(file.removesuffix(".cu")).replace('"kernels//', '"/')


@functools.cache
def kernel_library(file: str, defines: launch.Defines) -> ctypes.CDLL:
    text = source(file)
    options = [f"-D{name}={value}" for name, value in defines]

    def unit() -> str:
        found = entries(text, defines)
        kernels = [f"EMU_KERNEL({name}{', ' if bounds else ''}{bounds})" for name, bounds in found]
        return "\n".join(['#include "cuda_cpu.h"', text, '#line 1 "tests/cuda_cpu/build.py"', *kernels, ""])

    flags = ("-fvisibility=hidden", "-Wno-unknown-pragmas", *MACROS, *options)
    return ctypes.CDLL(str(_build(Path(file).stem, unit, text, flags, (str(runtime()),))))
