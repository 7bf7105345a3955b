"""The memory plan: its numbers are those of the arrays that are made, and what does not fit is told before it is tried."""

import json
import weakref

import checkpoints
import ml_dtypes
import numpy as np
import pytest
from checkpoints import SPECS, Spec
from safetensors.numpy import load_file, save_file

import cuqwen
from cuqwen import launch, memory, weights
from cuqwen.cache import KVCache
from cuqwen.config import Config
from cuqwen.memory import FIXED_BYTES, plan
from cuqwen.model import Device, Qwen3

F32, BF16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)
GB = 10**9
TINY = Spec("tiny", 2, 1, 64, 64, 128, 264, max_position_embeddings=4096)
CASES = [
    (TINY, BF16, False),
    (TINY, BF16, True),
    (TINY, F32, False),
    (SPECS["qwen2_bias"], BF16, False),
    (SPECS["untied_sharded_f32"], BF16, False),
    (SPECS["no_prefix_f16"], F32, False),
]


class Counted:
    """The bytes of the arrays that a device's `empty` has handed out and that are still in use, and their maximum."""

    def __init__(self, monkeypatch):
        self.live = self.most = 0
        self.sizes = []
        original = launch.empty

        def empty(shape, dtype):
            array = original(shape, dtype)
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            self.live += size
            self.most = max(self.most, self.live)
            self.sizes.append(size)
            weakref.finalize(array.base, self._free, size)
            return array

        monkeypatch.setattr(launch, "empty", empty)
        monkeypatch.setattr(launch, "upload", lambda a: (b := launch.empty(a.shape, a.dtype)).__setitem__(..., a) or b)

    def _free(self, size):
        self.live -= size


@pytest.mark.parametrize("spec,kv,exact", CASES, ids=lambda value: getattr(value, "name", str(value)))
def test_the_plan_is_what_is_allocated(emulated_gpu, tmp_path, monkeypatch, spec, kv, exact):
    """Weights, cache with its tables, and the workspace while the second chunk of a prompt is read."""
    emulated_gpu.orders = ("ascending",)
    folder = checkpoints.write(tmp_path, spec)
    config, device = Config.from_folder(folder), Device.cuda()
    told = plan(folder, config, device, kv, 512, exact=exact)
    counted = Counted(monkeypatch)
    arrays = weights.read(folder, config, device.place_weight)
    assert counted.live == told.weights
    network = Qwen3(config, arrays, device, kv, exact=exact, chunk=24)
    before = counted.live
    network._grow_tables(512)
    cache = KVCache(config, 512, kv, device.empty)
    del network.cos, network.sin, network.positions
    network._grow_tables(512)
    assert counted.live - before + 256 * (config.head_dim * 4 + 4) == told.cache == 512 * told.bytes_per_token
    workspace = memory._workspace_bytes(
        config, 24, device, network.dtype, kv, {np.dtype(arrays.layers[0].q_proj.dtype)}
    )
    ids = np.arange(48, dtype=np.int32) % config.vocab_size
    before, counted.most = counted.live, 0
    network.forward(device.upload(ids[:24]), cache, rows=0)
    if spec is not TINY or kv != BF16:  # off the tensor cores operations have small arrays of their own
        assert counted.most - before <= workspace
        return
    # the ids besides
    assert counted.most - before - 24 * 4 == workspace - FIXED_BYTES
    held, made = counted.live, len(counted.sizes)
    network.forward(device.upload(ids[24:]), cache, rows=0)
    k_and_ids = 24 * config.num_key_value_heads * config.head_dim * 4, 24 * 4, 0
    assert set(counted.sizes[made:]) <= set(k_and_ids) and counted.live == held


def told(tmp_path, free, device="cuda", max_context=None, chunk=256, monkeypatch=None):
    """The plan for TINY, where so many bytes are free."""
    folder = tmp_path / "tiny"
    if not folder.exists():
        checkpoints.write(folder, TINY)
    monkeypatch.setattr(memory, "CHUNK", {"cpu": chunk, "cuda": chunk})
    monkeypatch.setattr(memory, "free_bytes", lambda _: free)
    place = Device.cuda() if device == "cuda" else Device.cpu()
    return plan(folder, Config.from_folder(folder), place, BF16 if device == "cuda" else F32, max_context)


def test_the_largest_context_that_fits(tmp_path, monkeypatch):
    whole = told(tmp_path, 80 * GB, monkeypatch=monkeypatch)
    assert whole.context == 4096 and whole.total == whole.weights + whole.cache + whole.workspace
    for context in (256, 512, 2048, 3840):
        free = (whole.weights + whole.workspace + (context + 200) * whole.bytes_per_token) / (1 - memory.SPARE)
        part = told(tmp_path, int(free), monkeypatch=monkeypatch)
        assert part.context == context and part.total <= free
    assert told(tmp_path, None, monkeypatch=monkeypatch).context == 4096  # where nobody knows
    exact = told(tmp_path, whole.total, max_context=4096, monkeypatch=monkeypatch)
    assert exact.context == 4096


def test_too_little_memory(tmp_path, monkeypatch):
    whole = told(tmp_path, 80 * GB, monkeypatch=monkeypatch)
    free = whole.weights + whole.workspace + 1100 * whole.bytes_per_token
    with pytest.raises(MemoryError) as caught:
        told(tmp_path, free, max_context=4096, monkeypatch=monkeypatch)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(f"load: {tmp_path / 'tiny'}: wanted ")
    for part in (
        "weights 0.00 GB",
        "for 4,096 tokens",
        "workspace 0.10 GB",
        "free on the GPU",
        "use max_context=1024 (--max-context 1024)",
    ):
        assert part in message, message
    assert told(tmp_path, free, max_context=1024, monkeypatch=monkeypatch).context == 1024
    for context in (None, 300, 4096):
        with pytest.raises(MemoryError, match="use a smaller model"):
            told(tmp_path, whole.weights + 1000, max_context=context, monkeypatch=monkeypatch)


def test_one_line(tmp_path, monkeypatch):
    text = str(told(tmp_path, 80 * GB, monkeypatch=monkeypatch))
    assert (
        text
        == "weights 0.00 GB + cache 0.00 GB for 4,096 tokens + workspace 0.10 GB = 0.10 GB of 80.00 GB free on the GPU"
    )
    assert "free" not in str(told(tmp_path, None, monkeypatch=monkeypatch))
    assert str(told(tmp_path, GB, device="cpu", monkeypatch=monkeypatch)).endswith("of 1.00 GB free in main memory")


def test_a_smaller_chunk_where_memory_is_tight(tmp_path, monkeypatch):
    whole = told(tmp_path, 80 * GB, chunk=4096, monkeypatch=monkeypatch)
    tight = told(tmp_path, whole.weights + 2 * whole.workspace, chunk=4096, monkeypatch=monkeypatch)
    assert tight.chunk < whole.chunk and tight.workspace < whole.workspace


def test_0_6b_by_hand(tmp_path, monkeypatch):
    """From the headers of a file without data: 751,632,384 weights, of which 596,049,920 once tied; 114,688 bytes of cache a
    token; and nothing is read."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(checkpoints.config_json(checkpoints.SHAPE_0_6B)))
    header, at = {}, 0
    for name, shape in checkpoints.tensor_shapes(checkpoints.SHAPE_0_6B).items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)  # a hole
    config = Config.from_folder(folder)
    monkeypatch.setattr(memory, "free_bytes", lambda _: 80 * GB)
    result = plan(folder, config, Device.cuda(), BF16)
    vectors = 28 * (2 * 1024 + 2 * 128) + 1024
    assert result.weights == 2 * 596_049_920 + 2 * vectors  # as float32
    assert result.context == 40960 and result.bytes_per_token == 114_688 + 128 * 4 + 4
    assert 4.6 * GB < result.cache < 4.8 * GB and result.workspace < 0.25 * GB
    monkeypatch.setattr(memory, "free_bytes", lambda _: 4 * GB)
    assert 20_000 < plan(folder, config, Device.cuda(), BF16).context < 24_000
    with pytest.raises(
        MemoryError,
        match=r"wanted 6\.\d\d GB \(weights 1\.19 GB .*, got 4\.00 GB free on the GPU; use max_context=2\d+ ",
    ):
        plan(folder, config, Device.cuda(), BF16, 40960)


def test_load_follows_the_plan(tmp_path, monkeypatch):
    folder = checkpoints.write(tmp_path, TINY)
    monkeypatch.setattr(memory, "CHUNK", {"cpu": 256})
    model = cuqwen.load(folder, device="cpu")
    assert model.memory_plan.context == model.max_context == 4096 and "4,096 tokens" in str(model.memory_plan)
    one, two = (plan(folder, model.config, Device.cpu(), F32, context) for context in (800, 1000))
    assert two.total - one.total == 200 * (
        one.bytes_per_token + 4 * (4 * 64 + 512 * 2)
    )  # cache, and what attention takes
    free = int(two.total / (1 - memory.SPARE))
    monkeypatch.setattr(memory, "free_bytes", lambda _: free)
    reads = []
    monkeypatch.setattr(weights, "read", lambda *_, original=weights.read, **__: reads.append(1) or original(*_, **__))
    assert cuqwen.load(folder, device="cpu").max_context == 768 and reads == [1]
    with pytest.raises(MemoryError, match=r"for 2,000 tokens .*in main memory; use max_context="):
        cuqwen.load(folder, device="cpu", max_context=2000)
    assert reads == [1]  # refused before anything was read


def test_a_copy_of_the_head_and_rotary_buffers_are_not_counted(tmp_path):
    folder = checkpoints.write(tmp_path, SPECS["tied_redundant_head"])
    config = Config.from_folder(folder)
    stored = weights.stored(folder, config)
    assert "lm_head.weight" not in stored and set(stored) == set(weights.expected_tensors(config))
    arrays = load_file(folder / "model.safetensors")
    arrays["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    assert weights.stored(folder, config) == stored
    del arrays["model.norm.weight"]
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(cuqwen.CheckpointError, match=r"1 missing: model\.norm\.weight"):
        weights.stored(folder, config)


def test_free_main_memory(tmp_path):
    """What Linux reports, and what a container may still have; an unreadable or unlimited one says nothing."""
    file = tmp_path / "meminfo"
    file.write_text("MemTotal:       16000 kB\nMemFree:  100 kB\nMemAvailable:    9000 kB\n")
    assert memory._available(file) == 9000 * 1024
    file.write_text("MemTotal: 16000 kB\n")
    assert memory._available(file) is None and memory._available(tmp_path / "absent") is None
    assert memory._cgroup(tmp_path) is None
    for name, text in (
        ("memory.max", "5000000\n"),
        ("memory.current", "4000000\n"),
        ("memory.stat", "anon 7\ninactive_file 300000\n"),
    ):
        (tmp_path / name).write_text(text)
    assert memory._cgroup(tmp_path) == 1_300_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._cgroup(tmp_path) is None
    assert memory.free_bytes(Device.cpu()) is None or memory.free_bytes(Device.cpu()) > 1 << 20


@pytest.fixture
def pools():
    """Bytes that CuPy's pools, recordings' own among them, have handed out: `live` now, `most` at a time."""
    hooks = pytest.importorskip("cupy.cuda.memory_hook")

    class Pools(hooks.MemoryHook):
        name, live, most = "Pools", 0, 0

        def malloc_postprocess(self, **call):
            self.live += call["mem_size"]
            self.most = max(self.most, self.live)

        def free_preprocess(self, **call):
            self.live -= call["mem_size"]

    with Pools() as hook:
        yield hook


@pytest.mark.gpu
@pytest.mark.parametrize("exact", [False, True])
def test_peak_of_the_gpu_is_within_the_plan(monkeypatch, pools, exact):
    """While weights are read, and prompts of several chunks and answers. What was planned for, but for most of what is planned
    without a pool knowing of it: kernels."""
    monkeypatch.setattr(memory, "CHUNK", {"cuda": 512})
    ids = np.resize(checkpoints.heldout_sequences(1, 256)[0], 2000)
    model = cuqwen.load("demo", device="cuda", exact=exact)
    for count in (2000, 500, 500, 20, 20):
        model.generate(ids[:count], max_tokens=20, temperature=0)
        ids = ids[::-1]
    arrays = model.memory_plan.total - FIXED_BYTES
    assert arrays <= pools.most <= arrays + (8 << 20)


@pytest.mark.gpu
def test_a_closed_model_gives_its_memory_back(pools):
    """At once, and its pool to the driver: weights, cache, recordings."""
    ids = np.resize(checkpoints.heldout_sequences(1, 256)[0], 1500)
    launch.release_memory()
    pool = launch.cupy().get_default_memory_pool()
    before = pool.total_bytes()
    for _ in range(2):
        with cuqwen.load("demo", device="cuda") as model:
            for count in (1500, 20, 20):
                model.generate(ids[:count], max_tokens=20, temperature=0)
            assert len(model.logits(ids[:300])) == 300
            assert pools.live > model.memory_plan.weights > 10 << 20
        assert max(pools.live, pool.total_bytes() - before) < 1 << 20


def test_the_plan_bounds_what_numpy_takes(tmp_path):
    """On the CPU it is an estimate: never less than the peak, and at most three times as much."""
    import tracemalloc

    spec = Spec("wide", 8, 4, 64, 256, 768, 4096, max_position_embeddings=4096)
    model = cuqwen.load(checkpoints.write(tmp_path, spec), device="cpu", max_context=2304)
    tracemalloc.start()
    model.generate(np.arange(2048) % 250, max_tokens=256, temperature=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= model.memory_plan.total - model.memory_plan.weights <= 3 * peak
