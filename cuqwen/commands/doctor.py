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
from time import perf_counter
from typing import Any

from cuqwen import __version__
from cuqwen.commands import terminal
from cuqwen.commands.figures import in_units

PACKAGES = ("numpy", "ml_dtypes", "safetensors", "tokenizers", "huggingface_hub", "jinja2", "tqdm")
# Of the largest value of a result. Sums of 256 terms in another order differ by about 1e-6 of it, one rounding to bf16
# makes 4e-3.
TOLERANCE = 1e-4
INSTALL = 'pip install "cuqwen[cuda13]" (driver 580 or newer) or "cuqwen[cuda12]" (525 or newer)'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = """Check the driver, the GPU, CuPy, the compiler and its headers, the folders for compiled kernels
    and for models, each operation against the NumPy reference, and the memory's speed. Exit status 1 if something is
    wrong. Without a GPU the CPU's part is checked."""
    parser.add_argument("--device", choices=("cuda", "cpu"), help="cuda: a missing GPU is wrong; cpu: look for none")


def run(given: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    terminal.use_utf8()
    report = Report()
    report.note("cuqwen", f"{__version__}, Python {platform.python_version()}, {platform.platform()}")
    _packages(report)
    driver = None if given.device == "cpu" else _driver(report, required=given.device == "cuda")
    has_gpu = given.device != "cpu" and _cupy(report, required=given.device == "cuda" or driver is not None)
    if has_gpu:
        _gpu(report)
    _models(report)
    _demo(report, has_gpu)
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
        terminal.write(f"{state:6}{what:15}{found}\n")


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
    free, total = device.mem_info
    capability = f"{device.compute_capability[:-1]}.{device.compute_capability[-1]}"
    processors = properties["multiProcessorCount"]
    report.ok(
        "GPU",
        f"{properties['name'].decode()}, compute capability {capability}, {processors} multiprocessors, "
        f"{in_units(free)} of {in_units(total)} free",
    )
    return True


def _gpu(report: Report) -> None:
    from cuqwen import launch
    from cuqwen.bandwidth import read_bandwidth

    cp = launch.cupy()

    def compile_headers() -> str:
        code = '#include <cuda_bf16.h>\nextern "C" __global__ void nothing() {}'
        cp.RawModule(code=code, options=("--std=c++17",)).get_function("nothing")
        return f"NVRTC {'.'.join(map(str, cp.cuda.nvrtc.getVersion()))}, with CUDA's headers"

    if not report.check("compiler", compile_headers, INSTALL):
        return
    cache = Path(os.environ.get("CUPY_CACHE_DIR", Path.home() / ".cupy" / "kernel_cache"))
    _folder(report, "kernel cache", cache, "CUPY_CACHE_DIR")
    check_operations(report)

    def bandwidth() -> str:
        found, peak = read_bandwidth("cuda"), launch.peak_bandwidth()
        share = f", {100 * found / peak:.0f} % of {in_units(peak)}/s" if peak else ""
        return f"reads {in_units(found)}/s{share}"

    report.check("memory", bandwidth, "see nvidia-smi for other programs, and for the clocks")


def check_operations(report: Report) -> None:
    """Each operation at one small shape on the GPU, compared with the reference; the first call compiles its kernels."""
    from cuqwen import launch, ops, reference

    for name, arguments, keywords in _calls():
        place: Callable[[Any], Any] = lambda value: launch.upload(value) if hasattr(value, "shape") else value  # noqa: E731
        started = perf_counter()
        try:
            placed = {key: place(value) for key, value in keywords.items()}
            results = _flat(getattr(ops, name)(*map(place, arguments), **placed))
            results = [result.get() if launch.is_gpu_array(result) else result for result in results]
        except Exception as error:  # as in Report.check
            report.fail(name, f"{type(error).__name__}: {error}"[:300], INSTALL)
            continue
        seconds = perf_counter() - started
        wanted = _flat(getattr(reference, name)(*arguments, **keywords))
        off = max(_difference(result, truth) for result, truth in zip(results, wanted, strict=True))
        text = f"{seconds:6.2f} s to compile or find, error {off:.0e}"
        if off <= TOLERANCE:
            report.ok(name, text)
        else:
            report.fail(name, text, "the kernel is wrong on this GPU: please report it with all of this")


def _flat(result: Any) -> list[Any]:
    return list(result) if isinstance(result, tuple) else [result]


def _difference(result: Any, truth: Any) -> float:
    """The largest difference, relative to the largest value; infinite for NaN."""
    import numpy as np

    difference = np.abs(np.asarray(result, np.float64) - truth).max() / max(np.abs(truth).max(), 1e-30)
    return float(difference) if np.isfinite(difference) else float("inf")


def _calls() -> list[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """(operation, arguments, keywords): 3 tokens, hidden size 256, 4 query and 2 key/value heads of 64."""
    import ml_dtypes
    import numpy as np

    from cuqwen import rope_table

    rng = np.random.default_rng(0)

    def normal(*shape: int, dtype: Any = np.float32) -> Any:
        return rng.standard_normal(shape, np.float32).astype(dtype)

    bf16 = ml_dtypes.bfloat16
    x, positions = normal(3, 256), np.array([5, 6, 7], np.int32)
    cos, sin = rope_table(64, 16, 1e6)
    wide = [normal(rows, 256, dtype=bf16) for rows in (256, 128, 128)]
    q, k, q_ms, k_ms = normal(3, 4, 64), normal(3, 2, 64), normal(3, 4) ** 2, normal(3, 2) ** 2
    drawn = {"uniforms": np.array([0.3]), "step": np.zeros(1, np.int32)}
    return [
        ("embed", (np.array([1, 7, 2], np.int32), normal(8, 256, dtype=bf16)), {}),
        ("rmsnorm", (x, normal(256)), {}),
        ("qkv_rope", (x, *wide, cos, sin, positions), {"q_norm": normal(64), "k_norm": normal(64)}),
        ("qk_norm", (q, k, q_ms, k_ms), {}),
        ("attention", (q, normal(16, 2, 64, dtype=bf16), normal(16, 2, 64, dtype=bf16), positions), {}),
        ("matmul", (x, normal(512, 256, dtype=bf16)), {"residual": normal(3, 512)}),
        ("swiglu", (x, normal(512, 256, dtype=bf16), normal(512, 256, dtype=bf16)), {}),
        ("silu_mul", (normal(3, 512), normal(3, 512)), {}),
        ("argmax", (normal(3, 1000),), {}),
        ("sample", (normal(1000), 0.8), {"top_k": 20, "top_p": 0.95, **drawn}),
    ]


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
    text = f"{folder}: {len(files)} files, {in_units(size)}; {in_units(room)} free"
    if os.access(existing, os.W_OK):
        report.ok(what, text)
    else:
        report.fail(what, f"{text}, but it cannot be written", f"set {variable} to a folder that can")


def _demo(report: Report, on_gpu_too: bool) -> None:
    """The demo model, by the same route as any other: on the CPU, and on the GPU if all was well with it."""
    from cuqwen import api

    def answer(device: str) -> list[int]:
        with api.load("demo", device=device) as model:
            return [step.token for step in model.stream("In the beginning", max_tokens=16, temperature=0)]

    truth: list[int] = []

    def on_cpu() -> str:
        truth.extend(answer("cpu"))
        return f"{len(truth)} tokens on the CPU"

    def on_gpu() -> str:
        tokens = answer("cuda")
        if tokens != truth:
            raise ValueError(f"wanted the CPU's tokens {truth}, got {tokens}")
        return "the same tokens on the GPU"

    if report.check("demo model", on_cpu, "install cuqwen again") and on_gpu_too and not report.wrong:
        report.check("demo model", on_gpu, "the kernels are wrong on this GPU: please report it with all of this")
