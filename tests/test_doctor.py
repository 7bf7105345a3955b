"""`cuqwen doctor`: what it says of this machine without a GPU, of the emulated one, and of what is broken."""

import re
import subprocess

import numpy as np
import pytest
from terminal import CUQWEN, environment
from test_structure import OPERATIONS

from cuqwen import cuda
from cuqwen.commands import doctor


def run(*arguments, **env):
    done = subprocess.run(
        [*CUQWEN, "doctor", *arguments], capture_output=True, text=True, env=environment(**env), timeout=100
    )
    assert "Traceback" not in done.stderr and done.stderr == ""
    for line in done.stdout.splitlines()[:-1]:
        assert re.match(r"(-|ok|WRONG) +\S", line), line
    return done.returncode, done.stdout


def test_without_a_gpu_all_is_well(tmp_path):
    status, out = run(PATH="", HF_HOME=str(tmp_path))
    assert status == 0 and "WRONG" not in out and out.endswith("all is well\n")
    for text in ("numpy 2", "nvidia-smi was not found", "16 tokens on the CPU", str(tmp_path)):
        assert text in out, text


def test_a_gpu_that_is_asked_for_and_missing_is_wrong():
    status, out = run("--device", "cuda", PATH="")
    assert status == 1 and out.count("WRONG") == 2 and out.endswith("2 wrong: what to do stands behind each\n")
    for line in out.splitlines():
        if line.startswith("WRONG"):
            assert "; " in line and ("install" in line or "--device cpu" in line)
    status, out = run("--device", "cpu", PATH="")
    assert status == 0 and "driver" not in out and "CuPy" not in out


def test_a_driver_without_cupy_is_wrong(tmp_path):
    """As after an installation without one of the extras."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '580.1, Some GPU, 81559 MiB, 0 MiB'\n")
    program.chmod(0o755)
    (tmp_path / "cupy.py").write_text("raise ImportError('no such library')")
    status, out = run(PATH=f"{tmp_path}:/bin:/usr/bin", PYTHONPATH=f"{tmp_path}:{environment()['PYTHONPATH']}")
    assert (
        status == 1 and "580.1, Some GPU" in out and re.search(r"WRONG CuPy .*no such library.*cuqwen\[cuda13\]", out)
    )
    program.write_text("#!/bin/sh\necho 'Failed to initialize NVML'; exit 9\n")
    status, out = run(PATH=f"{tmp_path}:/bin:/usr/bin")
    assert status == 1 and re.search(r"WRONG driver .*Failed to initialize NVML.*; install", out)


def test_a_folder_that_cannot_be_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    report = doctor.Report()
    doctor._folder(report, "models", tmp_path / "a" / "b", "HF_HOME")
    assert report.wrong == 1 and "set HF_HOME" in capsys.readouterr().out


def states(out):
    """ok or WRONG, by operation."""
    return {name: state for state, name in re.findall(r"^(ok|WRONG) +(\w+)", out, re.M)}


def test_every_operation_is_compared_with_the_reference(emulated_gpu, monkeypatch, capsys):
    """And a kernel that is wrong by a little, or not a number, or does not compile, is found."""
    emulated_gpu.orders = ("ascending",)
    doctor.check_operations(report := doctor.Report())
    found = states(capsys.readouterr().out)
    assert set(found) == set(OPERATIONS)
    assert report.wrong == 0 and set(found.values()) == {"ok"}

    rmsnorm, swiglu = cuda.rmsnorm, cuda.swiglu
    monkeypatch.setattr(cuda, "rmsnorm", lambda *a, **k: rmsnorm(*a, **k) * np.float32(1.0005))
    monkeypatch.setattr(cuda, "swiglu", lambda *a, **k: swiglu(*a, **k) * np.float32("nan"))

    def broken(*a, **k):
        raise RuntimeError("kernels/matmul.cu(3): error")

    monkeypatch.setattr(cuda, "matmul", broken)
    doctor.check_operations(report := doctor.Report())
    out = capsys.readouterr().out
    assert report.wrong == 3
    assert {name for name, state in states(out).items() if state == "WRONG"} == {"rmsnorm", "swiglu", "matmul"}
    assert "kernels/matmul.cu(3): error; " in out


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_difference(bad):
    truth = np.array([3.0, -4.0])
    assert doctor._difference(truth, truth) == 0
    assert doctor._difference(truth + np.array([0, 0.04]), truth) == pytest.approx(0.01)
    assert doctor._difference(truth + np.array([bad, 0]), truth) == float("inf")
    assert doctor._difference(np.zeros(2), np.zeros(2)) == 0
