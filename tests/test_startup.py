"""Start-up: kernels are compiled before they are needed, each once; no thread outlives what began it."""

import dataclasses
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from checkpoints import SPECS, write

import cuqwen
from cuqwen import api, driver, launch, memory, prompt, sources, startup, weights
from cuqwen.cache import KVCache
from cuqwen.config import Config
from cuqwen.model import CHUNK, Device, Qwen3
from cuqwen.sizes import config_of

A, B, C, D = ((name, name, ()) for name in "abcd")


@pytest.fixture
def no_thread_is_left():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


# --- which kernels ---------------------------------------------------------------------------------------------------


def listed(folder, exact=False, kv_dtype="float32"):
    config, device = Config.from_folder(folder), Device.cuda()
    kv = np.dtype(api.KV_DTYPES[kv_dtype])
    plan = dataclasses.replace(memory.plan(folder, config, device, kv, None, exact=exact), chunk=8)
    return list(startup.kernels(folder, config, device, kv, plan, exact=exact))


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["head_128", "qwen2_bias", "untied_sharded_f32"])
@pytest.mark.parametrize("exact", [False, True])
def test_what_is_listed_is_what_is_launched(tmp_path, monkeypatch, request, name, exact, kv_dtype):
    """On a GPU before Hopper: answers, greedy and sampled, launch what is listed and nothing else."""
    monkeypatch.setattr(launch, "wgmma_processors", lambda: 0)
    monkeypatch.setattr(launch, "free_bytes", lambda: 1 << 40)
    monkeypatch.setattr(launch, "resident_blocks", lambda *_: 0)
    monkeypatch.setattr(prompt, "WIDTHS", (8,))
    folder = write(tmp_path, SPECS[name])
    wanted = listed(folder, exact, kv_dtype)
    request.getfixturevalue("emulated_gpu").orders = ("ascending",)
    launched, load_function = {}, launch.load_function

    def note(*arguments):
        launched[arguments] = None
        return load_function(*arguments)

    monkeypatch.setattr(launch, "load_function", note)
    with cuqwen.load(folder, device="cuda", exact=exact, kv_dtype=kv_dtype) as model:
        for settings in ({"temperature": 0}, {"temperature": 1.0, "top_k": 5, "seed": 0}):
            list(model.stream([5, 6, 7, 8, 9, 10], max_tokens=3, **settings))
    assert launched.keys() == set(wanted)


@pytest.mark.parametrize("tokens", [20, 200, 2000, 5000, 8192])
def test_on_hopper_all_that_prompts_need_is_listed(on_hopper, tokens):
    """`Qwen3.step` of other lengths asks for nothing else; all is in the sources; the step in one launch comes first."""
    config, device, kv = config_of("0.6B"), Device.cuda(), np.dtype(ml_dtypes.bfloat16)
    plan = SimpleNamespace(chunk=CHUNK["cuda"], context=40960)
    wanted = list(startup.kernels(None, config, device, kv, plan, exact=False))
    assert [file for file, _, _ in wanted[:2]] == ["decode_step", "sample"]
    assert len(wanted) < 40 and any("wgmma" in entry for _, entry, _ in wanted)
    for file, entry, _ in wanted:
        assert entry in {found[2] for found in sources.ENTRY.finditer(sources.source(file))}
    with launch.noting() as noted:
        dry = dataclasses.replace(device, upload=lambda array: array)
        tensors = {
            name: startup._weight(dry, shape, "BF16") for name, shape in weights.expected_tensors(config).items()
        }
        model = Qwen3(config, weights.arrange(config, tensors), dry, kv)
        ids = dry.empty((tokens - 1,), np.int32)
        model.step(ids, ids, KVCache(config, 40960, kv, dry.empty))
    assert noted.keys() <= set(wanted)


@pytest.fixture
def on_hopper(monkeypatch):
    device = SimpleNamespace(id=0, compute_capability="90", use=lambda: None)
    cuda = SimpleNamespace(Device=lambda number=0: device)
    monkeypatch.setattr(launch, "cupy", lambda: SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(launch, "wgmma_processors", lambda: 132)
    monkeypatch.setattr(
        weights,
        "stored",
        lambda folder, c: {name: (shape, "BF16") for name, shape in weights.expected_tensors(c).items()},
    )


def test_noting_is_for_one_thread_and_ends_with_its_block(monkeypatch):
    monkeypatch.setattr(launch, "_load_function", lambda *request: request)
    with launch.noting() as noted:
        launch.load_function(*A)((1,), (32,), ())
        with ThreadPoolExecutor(1) as other:
            assert other.submit(launch.load_function, *B).result() == B
        launch.load_function(*A)
        assert not launch.empty((2, 3), np.float32).any()
    assert list(noted) == [A] and launch.load_function(*C) == C


# --- compiling -------------------------------------------------------------------------------------------------------


@pytest.fixture
def compiled(on_hopper, no_thread_is_left, monkeypatch):
    """The requests that were compiled, in the order in which they ended; those in `slow` last until `go` is set."""
    result = SimpleNamespace(done=[], slow=set(), go=threading.Event(), begun=threading.Semaphore(0))

    def compile(*request):
        result.begun.release()
        if request in result.slow:
            result.go.wait(10)
        if request == C:
            raise launch.DeviceError("cannot be compiled")
        result.done.append(request)

    monkeypatch.setattr(launch, "compile_function", compile)
    monkeypatch.setattr(startup, "PATIENCE", 0.05)
    return result


def test_all_is_compiled_when_the_block_ends_and_nobody_is_told_what_is_quick(compiled):
    told = []
    with startup.compiling([A, B, C], lambda *figures: told.append(figures)):
        pass
    assert sorted(compiled.done) == [A, B] and told == []


def test_people_are_told_what_they_wait_for(compiled):
    compiled.slow, told = {A, B}, []
    threading.Timer(0.2, compiled.go.set).start()
    with startup.compiling([A, B, C], lambda *figures: told.append(figures)):
        assert compiled.done == []
    assert sorted(compiled.done) == [A, B] and told[-1] == (3, 3)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_what_has_not_begun_is_left_out_when_the_block_fails(compiled, monkeypatch, error):
    monkeypatch.setattr(startup.os, "cpu_count", lambda: 1)
    compiled.slow = {A, B}  # by one thread, and by that which had begun them
    with pytest.raises(error), startup.compiling([A, B, D]):
        compiled.begun.acquire()
        time.sleep(10 * startup.QUICK)  # by now D waits for its turn
        threading.Timer(0.1, compiled.go.set).start()
        raise error
    assert sorted(compiled.done) == [A, B]


def test_errors_are_told_by_who_asks_for_the_kernel(monkeypatch):
    def module(*arguments):
        raise RuntimeError("no NVRTC")

    monkeypatch.setattr(launch, "_module", module)
    for _ in range(2):  # a failure is not remembered
        with pytest.raises(launch.DeviceError, match=r"kernels/a.cu cannot be compiled \(no NVRTC\)"):
            launch.load_function(*A)


WAITING = """
import argparse, time
from cuqwen import api
from cuqwen.commands import loading
def load(*arguments, compile_progress, **named):
    for done in (3, 20, 24):
        compile_progress(done, 24)
        time.sleep(0.2)
    return argparse.Namespace(fallback=None)
api.load = load
options = dict.fromkeys(("model", "max_context", "exact", "revision", "check_weights", "quiet"))
loading.load(argparse.Namespace(device="cpu", **options))
print("loaded")
"""


def test_in_a_terminal_a_bar_says_what_is_waited_for_and_is_gone_after():
    from terminal import in_terminal

    status, shown, _ = in_terminal([sys.executable, "-c", WAITING])
    bar, _, rest = shown.rpartition("\r")
    assert status == 0 and "compile, once on this machine" in bar and "20/24" in bar and rest.strip() == "loaded"


@pytest.mark.gpu
@pytest.mark.parametrize("exact", [False, True])
def test_a_model_that_is_loaded_compiles_nothing(tmp_path, monkeypatch, exact):
    model = cuqwen.load(write(tmp_path, SPECS["head_128"]), device="cuda", exact=exact)
    ready = launch._module.cache_info().currsize
    for length in (6, 40, 300, 41, 301):
        for settings in ({"temperature": 0}, {"temperature": 1.0, "top_k": 5, "seed": 0}):
            list(model.stream([5 + i % 250 for i in range(length)], max_tokens=5, **settings))
    assert launch._module.cache_info().currsize == ready


# --- the driver ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [0, 100, None])
def test_the_context_is_begun_in_a_thread_whatever_comes_of_it(monkeypatch, no_thread_is_left, status):
    calls = []

    def functions():
        if status is None:
            raise OSError("no driver")
        names = ("cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain")
        return SimpleNamespace(**{name: lambda *_, name=name: calls.append(name) or status for name in names})

    monkeypatch.setattr(driver, "functions", functions)
    driver.wake.cache_clear()
    driver.wake()
    driver.wake()
    for thread in threading.enumerate():
        if thread.name == "cuqwen-driver":
            thread.join()
    assert calls == {0: ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain"], 100: ["cuInit"], None: []}[status]
    driver.wake.cache_clear()
