"""`cuqwen doctor`: what it says of this machine without a GPU, of the emulated one, and of what is broken."""

import dataclasses
import re
import subprocess

import numpy as np
import pytest
from terminal import CUQWEN, environment
from test_structure import OPERATIONS

import cuqwen
from cuqwen import cli, cuda, launch, tiles
from cuqwen.commands import checks, doctor


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
    """ok or WRONG, by operation, or way to compute a model."""
    return {
        name: state
        for state, name in re.findall(r"^(ok|WRONG) +(\w+(?:[, ]+\w+)*?)(?=  | +\d+\.| +\w+Error)", out, re.M)
    }


TILED = ("qkv_rope", "attention", "matmul", "swiglu")  # what has kernels of its own for prompts
LAYER = checks.Sizes(40, 128, 2, 1, 64, 192)


def run_operations(capsys):
    checks.check_operations(report := doctor.Report(), layer=LAYER)
    out = capsys.readouterr().out
    return report, out, states(out)


@pytest.fixture
def entries(emulated_gpu, monkeypatch):
    """The entry points that run, on an emulated GPU with wgmma."""
    emulated_gpu.orders, names, load = ("ascending",), set(), launch.load_function
    monkeypatch.setattr(
        launch, "load_function", lambda file, entry, *rest: names.add(entry) or load(file, entry, *rest)
    )
    monkeypatch.setattr(launch, "wgmma_processors", lambda: 2)
    choose = tiles.choose  # one so small would not be worth it
    monkeypatch.setattr(tiles, "choose", lambda *key: "wgmma_middle" if key[3] else choose(*key))
    return names


def test_every_operation_is_compared_with_the_reference(entries, monkeypatch, capsys):
    """By every kind of kernel. One that is wrong by a little, or not a number, or does not compile, is found."""
    report, _, found = run_operations(capsys)
    assert set(found) == {*OPERATIONS, *(f"{name}, 40 {dtype}" for name in TILED for dtype in ("float32", "bf16"))}
    assert report.wrong == 0 and set(found.values()) == {"ok"}
    for name in ("matmul", "swiglu", "qkv_rope"):
        assert {f"{name}_rows", f"{name}_wgmma_middle"} <= entries and any(f"{name}_mma" in entry for entry in entries)
    assert {"attention_2", "attention_mma", "attention_wgmma"} <= entries

    rmsnorm, swiglu, attention = cuda.rmsnorm, cuda.swiglu, cuda._attention_tiles
    monkeypatch.setattr(cuda, "rmsnorm", lambda *a, **k: rmsnorm(*a, **k) * np.float32(1.0005))
    monkeypatch.setattr(cuda, "swiglu", lambda *a, **k: swiglu(*a, **k) * np.float32("nan"))

    def off(out, *rest):
        attention(out, *rest)
        out[-1] *= np.float32(1.1)

    def broken(*a, **k):
        raise RuntimeError("kernels/matmul.cu(3): error")

    monkeypatch.setattr(cuda, "matmul", broken)
    monkeypatch.setattr(cuda, "_attention_tiles", off)
    report, out, found = run_operations(capsys)
    tiled = {f"{name}, 40 {dtype}" for name in TILED[1:] for dtype in ("float32", "bf16")}
    assert {name for name, state in found.items() if state == "WRONG"} == {"rmsnorm", "swiglu", "matmul", *tiled}
    assert report.wrong == 9 and "kernels/matmul.cu(3): error; pip install" in out
    assert re.search(r"WRONG attention, 40 bf16 .*; use --exact until it is mended", out)
    assert re.search(r"WRONG rmsnorm .*; use --device cpu until it is mended", out)


@pytest.fixture
def small_answers(emulated_gpu, monkeypatch):
    """On an emulated GPU of so many blocks that a token is made in one launch."""
    emulated_gpu.orders, emulated_gpu.resident_blocks = ("ascending",), 5
    monkeypatch.setattr(launch, "resident_blocks", lambda *_: 5)
    monkeypatch.setattr(checks, "ANSWER", 2)


def test_a_model_is_compared_with_float64(small_answers, monkeypatch, capsys):
    """Its prompts, the third of which is a recording that is repeated, and its tokens in one launch and by many."""
    records, record = [], launch.record

    def noted(work):
        launched, result = record(work)
        records.append([])
        return (lambda here=records[-1]: here.append(1) or launched()), result

    monkeypatch.setattr(launch, "record", noted)
    entries, load = set(), launch.load_function
    monkeypatch.setattr(launch, "load_function", lambda file, name, *rest: entries.add(name) or load(file, name, *rest))
    checks.check_model(report := doctor.Report(), on_gpu=True)
    found = states(capsys.readouterr().out)
    assert report.wrong == 0 and found == dict.fromkeys(("demo model", "one launch", "portable", "prompts"), "ok")
    assert sorted(map(len, records))[-3:] >= [2, 2, 2] and {"decode_step", "attention_2"} <= entries


@pytest.mark.parametrize("tokens", [False, True], ids=["logits", "tokens"])
def test_a_model_that_is_wrong_is_found(small_answers, monkeypatch, capsys, tokens):
    """And told with what to use instead: prompts or steps that are off, or tokens that are not those of the logits."""
    stream = cuqwen.Model.stream
    monkeypatch.setattr(checks, "PROMPTS", checks.PROMPTS[:1])

    def spoiled(model, *arguments, **keywords):
        for step in stream(model, *arguments, **keywords):
            if model.device == "cuda" and tokens and keywords["temperature"]:
                step = dataclasses.replace(step, token=step.token + 1)
            elif model.device == "cuda" and not tokens and step.top_logprobs:
                off = tuple((token, 1.03 * logprob) for token, logprob in step.top_logprobs)
                step = dataclasses.replace(step, top_logprobs=off)
            yield step

    monkeypatch.setattr(cuqwen.Model, "stream", spoiled)
    checks.check_model(report := doctor.Report(), on_gpu=True)
    out = capsys.readouterr().out
    instead = {"one launch": "set CUQWEN_PORTABLE=1", "portable": "use --device cpu", "prompts": "use --exact"}
    if tokens:
        del instead["prompts"]
    assert report.wrong == len(instead)
    for label, remedy in instead.items():
        told = "wanted the tokens .*, got" if tokens else "error .*, allowed"
        assert re.search(rf"WRONG {label} +.*{told} .*; {remedy} until it is mended, and please report it", out), out


def test_a_gpu_without_the_one_launch_step(small_answers, monkeypatch, capsys):
    monkeypatch.setattr(launch, "resident_blocks", lambda *_: 0)
    monkeypatch.setattr(checks, "PROMPTS", checks.PROMPTS[:1])
    checks.check_model(report := doctor.Report(), on_gpu=True)
    assert report.wrong == 0 and re.search(
        r"- +one launch +not on this GPU: it takes a GPU of", capsys.readouterr().out
    )


@pytest.mark.gpu
def test_on_a_gpu(capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert out.endswith("all is well\n") and {"qkv_rope, 512 bf16", "portable", "prompts"} <= states(out).keys()


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_difference(bad):
    truth = np.array([3.0, -4.0])
    assert checks._difference(truth, truth) == 0
    assert checks._difference(truth + np.array([0, 0.04]), truth) == pytest.approx(0.01)
    assert checks._difference(truth + np.array([bad, 0]), truth) == float("inf")
    assert checks._difference(np.zeros(2), np.zeros(2)) == 0
    rows = np.array([[3.0, 4.0], [0.0, 1.0]])
    assert checks._distance(rows, rows) == 0 and checks._distance(rows + bad, rows) == float("inf")
    assert checks._distance(rows + np.array([0, 0.2]), rows) == pytest.approx(0.2)
