"""NVRTC by ctypes: compiles the kernels to machine code for any architecture, without a GPU or a driver.

Needs the wheels nvidia-cuda-nvrtc (the library) and nvidia-cuda-runtime (cuda_bf16.h and its kin). Written to machine
code and not to PTX, because NVRTC does not look into inline PTX; ptxas does.

`python tests/nvrtc.py` prints registers, spills and shared memory of every kernel; with `--write` it also renews
`kernel_resources.json`, which `test_compile.py` compares with.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import hashlib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from cuda_cpu.build import cache_folder

from cuqwen import cuda, decode_step, launch, sources

ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")  # 90a: with wgmma, as launch.py compiles for Hopper
# CuPy's own, and ptxas's report in the log: two options and not one joined by a comma, of which NVRTC reads the first.
OPTIONS = ("--std=c++17", "-ftz=true", "--ptxas-options=-v", "--ptxas-options=--warn-on-spills")
TABLE = Path(__file__).parent / "kernel_resources.json"


def variants() -> Iterator[tuple[str, launch.Defines]]:
    """Every (file, -D constants) that is compiled here."""
    yield from cuda.variants()
    yield from decode_step.variants()


class CompileError(RuntimeError):
    """NVRTC refused a source; the message is its log."""


@dataclass(frozen=True)
class Resources:
    """What one entry point takes. registers: a thread; spills: bytes stored and loaded; shared: static bytes a block."""

    registers: int
    spill_stores: int
    spill_loads: int
    shared: int


@dataclass(frozen=True)
class Compiled:
    cubin: bytes
    resources: dict[str, Resources]  # by entry point
    warnings: str  # the log's lines that warn, "" if there are none


@functools.cache
def _toolkit() -> tuple[Path, Path] | None:
    """libnvrtc and the headers' folder, from the wheels: nvidia/cu13 in CUDA 13, a folder for each library in CUDA 12."""
    spec = importlib.util.find_spec("nvidia")
    for root in map(Path, spec.submodule_search_locations if spec and spec.submodule_search_locations else ()):
        for library, headers in (("cu13", "cu13"), ("cuda_nvrtc", "cuda_runtime")):
            found = sorted((root / library / "lib").glob("libnvrtc.so.*"))
            if found and (root / headers / "include" / "cuda_bf16.h").exists():
                return found[0], root / headers / "include"
    return None


def available() -> bool:
    return not unavailable_reason()


def unavailable_reason() -> str:
    """Why nothing can be compiled here; "" if it can."""
    if _toolkit() is None:
        return 'no NVRTC: pip install "cuda-toolkit[cudart,nvrtc]==13.*"'
    return ""


@functools.cache
def _library() -> ctypes.CDLL:
    if _toolkit() is None:
        raise RuntimeError(unavailable_reason())
    return ctypes.CDLL(str(_toolkit()[0]))


def version() -> str:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def _bytes(program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    getattr(_library(), f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(_library(), f"nvrtcGet{what}")(program, buffer)
    return buffer.raw


REPORT = re.compile(
    r"entry function '(?P<name>\S+)'.*?"
    r"(?P<spill_stores>\d+) bytes spill stores, (?P<spill_loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?:[^\n]*?, (?P<shared>\d+) bytes smem)?",
    re.S,
)


def compile(source: str, arch: str, defines: launch.Defines = (), name: str = "kernel.cu") -> Compiled:
    """CUDA source to machine code for sm_<arch>, with the options that CuPy uses. Raises CompileError with the log."""
    options = [*OPTIONS, f"-arch=sm_{arch}", *(f"-D{key}={value}" for key, value in defines)]
    options += [f"-I{toolkit[1]}" for toolkit in (_toolkit(),) if toolkit]
    program = ctypes.c_void_p()
    library = _library()
    library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), name.encode(), 0, None, None)
    try:
        array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        failed = library.nvrtcCompileProgram(program, len(options), array)
        log = _bytes(program, "ProgramLog").rstrip(b"\0").decode()
        if failed:
            raise CompileError(f"{name} for sm_{arch}: {log}")
        cubin = _bytes(program, "CUBIN")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))
    resources = {}
    for found in REPORT.finditer(log):
        fields = {key: int(value or 0) for key, value in found.groupdict().items() if key != "name"}
        resources[found["name"]] = Resources(**fields)
    warnings = "\n".join(line for line in log.splitlines() if "warning" in line.lower())
    return Compiled(cubin, resources, warnings)


def report(file: str, defines: launch.Defines, arch: str) -> tuple[dict[str, Resources], str]:
    """`compile` on a kernel of the package: its resources by entry point and its warnings, kept on disk by the hash of
    source, options and NVRTC's version, because ptxas takes up to half a second for each."""
    source = sources.source(file)
    key = hashlib.sha256(repr((source, arch, defines, OPTIONS, version(), REPORT.pattern)).encode()).hexdigest()
    path = cache_folder() / f"{file}-sm{arch}-{key[:20]}.json"
    if not path.exists():
        compiled = compile(source, arch, defines, f"{file}.cu")
        found = {
            "resources": {name: asdict(r) for name, r in compiled.resources.items()},
            "warnings": compiled.warnings,
        }
        partial = path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(found))
        partial.replace(path)
    found = json.loads(path.read_text())
    return {name: Resources(**fields) for name, fields in found["resources"].items()}, found["warnings"]


def number(arch: str) -> int:
    return int(arch.rstrip("a"))


def architectures(file: str) -> tuple[str, ...]:
    """Those that a kernel of the package is compiled for: all, or from NN on if a line of its head says `// Needs sm_NN`."""
    head = re.match(r"(//[^\n]*\n)*", sources.source(file).partition("\n")[2])[0]
    needs = re.search(r"^// Needs\s+sm_(\d+)", head, re.M)
    return tuple(arch for arch in ARCHITECTURES if number(arch) >= (int(needs[1]) if needs else 0))


Reports = dict[tuple[str, launch.Defines, str], tuple[dict[str, Resources], str]]


def _stands(defines: launch.Defines, arch: str) -> bool:
    """Whether a variant is compiled for an architecture: all are for sm_90a, and for the others those that a bf16 model needs
    and those of float32 throughout, which hold all that differs between architectures. (All of all took six minutes.)"""
    types = {value for _, value in defines}
    needed = dict(defines).get("W_TYPE", "bf16") == "bf16" and "f16" not in types
    return arch == "90a" or needed or not types & {"bf16", "f16"}


def report_all() -> Reports:
    """`report` on every variant of every kernel, and on those that stand for all on every architecture."""
    jobs = [
        (file, defines, arch) for file, defines in variants() for arch in architectures(file) if _stands(defines, arch)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # NVRTC compiles in several threads at once
        return dict(zip(jobs, pool.map(lambda job: report(*job), jobs), strict=True))


def table(reports: Reports) -> dict[str, dict[str, list[int]]]:
    """ "file DEFINES entry" -> sm_NN -> [registers, static shared bytes], for the variants that stand for all: no f16 (its
    code is bf16's but for the conversions), head size 128 where there is a choice."""
    rows: dict[str, dict[str, list[int]]] = {}
    for (file, defines, arch), (resources, _) in reports.items():
        if {"f16", "64"} & {value for _, value in defines}:
            continue
        for entry, r in resources.items():
            label = " ".join([file, *(f"{key}={value}" for key, value in defines), entry])
            rows.setdefault(label, {})[f"sm_{arch}"] = [r.registers, r.shared]
    return rows


def write_table(reports: Reports) -> None:
    rows = [f"  {json.dumps(label)}: {json.dumps(by_arch)}" for label, by_arch in sorted(table(reports).items())]
    head = f'{{\n"nvrtc": "{version()}",\n"columns": ["registers a thread", "static shared bytes a block"],\n"kernels": {{\n'
    TABLE.write_text(head + ",\n".join(rows) + "\n}\n}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile every kernel for every architecture and print what it takes.")
    parser.add_argument("--write", action="store_true", help=f"renew {TABLE.name}")
    options = parser.parse_args()
    reports = report_all()
    for (file, defines, arch), (resources, warnings) in reports.items():
        for entry, r in resources.items():
            print(f"sm_{arch:4}", file, *(f"{key}={value}" for key, value in defines), entry, asdict(r), warnings)
    if options.write:
        write_table(reports)


if __name__ == "__main__":
    main()
