"""`cuqwen doctor`: whether this machine has what cuqwen needs, and whether the kernels are right and fast on it. What it
prints is what an issue report wants to contain."""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from cuqwen import __version__
from cuqwen.commands import checks, loading, terminal
from cuqwen.commands.checks import INSTALL
from cuqwen.commands.figures import in_units

PACKAGES = ("numpy", "ml_dtypes", "safetensors", "tokenizers", "huggingface_hub", "jinja2", "tqdm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = """Check the driver, the GPU, CuPy, the compiler and its headers, the folders for compiled kernels
    and for models, what the GPU computes against NumPy, and the memory's speed. Exit status 1 if something is
    wrong. Without a GPU the CPU's part is checked."""
    parser.add_argument("--device", choices=("cuda", "cpu"), help="cuda: a missing GPU is wrong; cpu: look for none")


def run(given: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    terminal.use_utf8()
    report = Report()
    report.note("cuqwen", f"{__version__}, Python {platform.python_version()}, {platform.platform()}")
    _packages(report)
    driver = None if given.device == "cpu" else _driver(report, required=given.device == "cuda")
    works = (
        given.device != "cpu" and _cupy(report, required=given.device == "cuda" or driver is not None) and _gpu(report)
    )
    _models(report)
    checks.check_model(report, on_gpu=works)
    if report.wrong:
        terminal.write(f"{report.wrong} wrong: what to do stands behind each\n")
    else:
        terminal.write("all is well\n")
    return int(report.wrong > 0)


class Report:
    """Prints what was found, a line each, and counts what is wrong."""

    def __init__(self) -> None:
        self.wrong = 0

    def note(self, what: str, found: str) -> None:
        self._print("-", what, found)

    def ok(self, what: str, found: str) -> None:
        self._print("ok", what, found)

    def fail(self, what: str, found: str, remedy: str) -> None:
        self.wrong += 1
        self._print("WRONG", what, f"{' '.join(found.split())}; {remedy}")

    def check(self, what: str, work: Callable[[], str], remedy: str) -> bool:
        """Runs `work`, which says what it found or raises."""
        try:
            self.ok(what, work())
        except Exception as error:  # whatever a driver, a compiler or a broken installation may raise
            self.fail(what, f"{type(error).__name__}: {error}"[:300], remedy)
            return False
        return True

    @staticmethod
    def _print(state: str, what: str, found: str) -> None:
        terminal.write(f"{state:6}{what:22} {found}\n")


def _packages(report: Report) -> None:
    found, missing = [], []
    for name in PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        report.fail("packages", f"without {', '.join(missing)}", "pip install cuqwen")
    else:
        report.ok("packages", ", ".join(found))


def _driver(report: Report, *, required: bool) -> str | None:
    """What nvidia-smi says of driver and GPU."""
    remedy = "install NVIDIA's driver, or use --device cpu"
    program = shutil.which("nvidia-smi")
    if program is None:
        if required:
            report.fail("driver", "nvidia-smi was not found", remedy)
        else:
            report.note("driver", "none (nvidia-smi was not found): the CPU computes")
        return None
    query = [program, "--query-gpu=driver_version,name,memory.total,memory.used", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        report.fail("driver", f"nvidia-smi: {error}", remedy)
        return None
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        report.fail("driver", f"nvidia-smi: {done.stdout or done.stderr or 'no GPU'}", remedy)
        return None
    for line in lines:
        report.ok("driver", line)
    return lines[0]


def _cupy(report: Report, *, required: bool) -> bool:
    """Whether CuPy is there and sees a GPU that can be used."""
    from cuqwen import launch

    try:
        with loading.hold_interrupts():
            cp = launch.cupy()
    except launch.DeviceError as error:
        if required:
            found, _, remedy = str(error).partition("; ")
            report.fail("CuPy", found, remedy or INSTALL)
        else:
            report.note("CuPy", str(error))
        return False
    runtime, device = cp.cuda.runtime, cp.cuda.Device()
    properties = runtime.getDeviceProperties(device.id)
    versions = [f"{v // 1000}.{v % 1000 // 10}" for v in (runtime.runtimeGetVersion(), runtime.driverGetVersion())]
    report.ok("CuPy", f"{cp.__version__}, CUDA {versions[0]}; the driver takes CUDA up to {versions[1]}")
    try:
        free, total = device.mem_info
    except Exception as error:  # the first that needs a context
        report.fail("GPU", f"{type(error).__name__}: {error}"[:300], "see nvidia-smi for other programs on it")
        return False
    capability = f"{device.compute_capability[:-1]}.{device.compute_capability[-1]}"
    processors = properties["multiProcessorCount"]
    report.ok(
        "GPU",
        f"{properties['name'].decode()}, compute capability {capability}, {processors} multiprocessors, "
        f"{in_units(free)} of {in_units(total)} free",
    )
    return True


def _gpu(report: Report) -> bool:
    """Whether kernels can be compiled."""
    from cuqwen import launch
    from cuqwen.bandwidth import read_bandwidth

    cp = launch.cupy()

    def compile_headers() -> str:
        code = '#include <cuda_bf16.h>\nextern "C" __global__ void nothing() {}'
        cp.RawModule(code=code, options=("--std=c++17",)).get_function("nothing")
        return f"NVRTC {'.'.join(map(str, cp.cuda.nvrtc.getVersion()))}, with CUDA's headers"

    if not report.check("compiler", compile_headers, INSTALL):
        return False
    cache = Path(os.environ.get("CUPY_CACHE_DIR", Path.home() / ".cupy" / "kernel_cache"))
    _folder(report, "kernel cache", cache, "CUPY_CACHE_DIR")
    checks.check_operations(report)

    def bandwidth() -> str:
        found, peak = read_bandwidth("cuda"), launch.peak_bandwidth()
        share = f", {100 * found / peak:.0f} % of {in_units(peak)}/s" if peak else ""
        return f"reads {in_units(found)}/s{share}"

    report.check("memory", bandwidth, "see nvidia-smi for other programs, and for the clocks")
    return True


def _models(report: Report) -> None:
    try:
        from huggingface_hub import constants
    except ImportError as error:
        report.fail("models", str(error), "pip install cuqwen")
    else:
        _folder(report, "models", Path(constants.HF_HUB_CACHE), "HF_HOME")


def _folder(report: Report, what: str, folder: Path, variable: str) -> None:
    """Whether a folder can be written, and how much room there is."""
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    room = shutil.disk_usage(existing).free
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()] if folder.is_dir() else []
    size = 0
    for path in files:
        with contextlib.suppress(OSError):  # another program's temporary files come and go
            size += path.stat().st_size
    text = f"{folder}: {len(files)} file{'s' * (len(files) != 1)}, {in_units(size)}; {in_units(room)} free"
    if os.access(existing, os.W_OK):
        report.ok(what, text)
    else:
        report.fail(what, f"{text}, but it cannot be written", f"set {variable} to a folder that can")
