"""The forward pass as a whole: kernels against the reference, whole prompts against single tokens, the cache."""

import ml_dtypes
import numpy as np
import pytest
from checkpoints import DEMO, SPECS, write

import cuqwen
from cuqwen import weights
from cuqwen.cache import KVCache
from cuqwen.config import Config
from cuqwen.decode import Decoder
from cuqwen.model import Device, Qwen3


def load(folder, device, kv_dtype):
    config = Config.from_folder(folder)
    return Qwen3(config, weights.read(folder, config, device.place_weight), device, kv_dtype)


def run(network, pieces, ids):
    """Logits of every token, the sequence fed in pieces of the given lengths; the cache is poisoned first."""
    cache = network.new_cache(len(ids) + 3)
    cache.keys[:], cache.values[:] = np.nan, np.nan
    ids = network.device.upload(np.asarray(ids, np.int32))
    rows, start = [], 0
    for length in pieces:
        rows.append(network.forward(ids[start : start + length], cache, rows=length))
        start += length
    assert cache.length == len(ids) == start
    return np.concatenate([host(row) for row in rows])


def host(array):
    return array.get() if hasattr(array, "get") else array


def error(got, truth):
    return np.linalg.norm(got - truth) / np.linalg.norm(truth)


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def kernels(request):
    """Call it for a Device whose operations run the CUDA sources, on the CPU or on a GPU. From that call on the emulated
    one takes every NumPy array, so the reference's figures must be there before."""

    def start():
        if request.param == "emulated":
            request.getfixturevalue("emulated_gpu")
        return Device.cuda()

    return start


@pytest.mark.parametrize("name", SPECS)
def test_kernels_compute_what_the_reference_computes(name, kernels, tmp_path):
    """Float32 sums in another order: at most four times the float32 reference's own error."""
    spec = SPECS[name]
    folder = write(tmp_path, spec)
    config = Config.from_folder(folder)
    if config.head_dim % 8:
        pytest.skip(f"the GPU takes head sizes that are multiples of 8, not {config.head_dim}")
    ids = np.random.default_rng(1).integers(0, config.vocab_size, 21)
    truth = run(load(folder, Device.cpu(np.float64), np.float64), [21], ids)
    own = error(run(load(folder, Device.cpu(), np.float32), [21], ids), truth)
    network = load(folder, kernels(), np.float32)
    for pieces in ([21], [12, 1, 1, 7], [1] * 5 + [16]):
        got = run(network, pieces, ids)
        assert got.dtype == np.float32
        assert error(got, truth) <= 4 * own


def test_demo_on_kernels_with_a_bf16_cache(kernels):
    """The cache's rounding is the only one: the error stays below that of rounding k and v alone in float64."""
    ids = np.random.default_rng(2).integers(0, 4095, 24)
    exact = run(load(DEMO, Device.cpu(np.float64), np.float64), [24], ids)
    rounded = run(load(DEMO, Device.cpu(np.float64), ml_dtypes.bfloat16), [24], ids)
    own = error(run(load(DEMO, Device.cpu(), np.float32), [24], ids), exact)
    got = run(load(DEMO, kernels(), ml_dtypes.bfloat16), [20, 1, 3], ids)
    assert error(got, exact) <= 1.25 * error(rounded, exact) + 4 * own


def test_k_is_rounded_once(kernels):
    """After its norm and rotation. The keys of layer 0 depend on nothing else that is rounded."""
    ids = np.arange(100, 140)

    def keys(device, kv_dtype):
        network = load(DEMO, device, kv_dtype)
        cache = network.new_cache(len(ids))
        network.forward(network.device.upload(ids.astype(np.int32)), cache)
        return host(cache.keys)[0].astype(np.float64)

    truth = keys(Device.cpu(np.float64), np.float64)
    half_ulp = 2.0 ** (np.floor(np.log2(np.abs(truth))) - 8)  # bf16 has 8 significant bits
    slack = 1e-5 * np.max(np.abs(truth), axis=-1, keepdims=True)  # float32's error before the rounding
    for device in (Device.cpu, kernels):
        assert np.all(np.abs(keys(device(), ml_dtypes.bfloat16) - truth) <= half_ulp + slack)


def test_bytes_per_token_are_those_of_the_cache():
    network = load(DEMO, Device.cpu(), np.float32)
    for dtype in (np.float32, ml_dtypes.bfloat16):
        cache = KVCache(network.config, 7, dtype, np.empty)
        assert 7 * KVCache.bytes_per_token(network.config, dtype) == cache.keys.nbytes + cache.values.nbytes


@pytest.mark.parametrize("pieces", [[1] * 40, [39, 1], [1, 39], [7, 13, 20]])
def test_a_prompt_fed_whole_equals_the_prompt_fed_in_pieces(pieces):
    network = load(DEMO, Device.cpu(np.float64), np.float64)
    ids = np.random.default_rng(3).integers(0, 4095, 40)
    whole = run(network, [40], ids)
    assert np.max(np.abs(run(network, pieces, ids) - whole)) <= 1e-12 * np.max(np.abs(whole))


def test_projections_of_mixed_types_are_refused():
    """The kernels would read the second as if it were of the first's type."""
    network = load(DEMO, Device.cpu(), np.float32)
    network.weights.layers[2].k_proj = network.weights.layers[2].k_proj.astype(ml_dtypes.bfloat16)
    with pytest.raises(cuqwen.CheckpointError, match=r"layers.2.self_attn: wanted q_proj, .* got bfloat16 and float32"):
        Qwen3(network.config, network.weights, Device.cuda(), ml_dtypes.bfloat16)


def test_a_full_cache_is_refused_and_left_as_it_was():
    network = load(DEMO, Device.cpu(), np.float32)
    cache = network.new_cache(4)
    network.forward(np.arange(3), cache)
    with pytest.raises(ValueError, match="wanted at most 1 more tokens, got 2"):
        network.forward(np.arange(2), cache)
    assert cache.length == 3
    before = network.forward(np.array([5]), cache)
    assert cache.length == 4 and np.all(np.isfinite(before))


def test_a_failure_inside_a_step_leaves_the_sequence_as_it_was(monkeypatch):
    network = load(DEMO, Device.cpu(), np.float32)
    cache = network.new_cache(8)
    network.forward(np.arange(3), cache)
    with monkeypatch.context() as patch:
        patch.setattr(network.weights, "lm_head", None)
        patch.setattr(network.weights.layers[-1], "down_proj", None)
        with pytest.raises(AttributeError):
            network.forward(np.array([7]), cache)
    assert cache.length == 3
    fresh = network.new_cache(8)
    network.forward(np.arange(3), fresh)
    assert np.array_equal(network.forward(np.array([9]), cache), network.forward(np.array([9]), fresh))


@pytest.mark.gpu
def test_load_on_the_gpu_through_the_public_face():
    model = cuqwen.load("demo", device="cuda")
    assert model.device == "cuda"
    logits = model.logits([1, 2, 3])
    assert logits.shape == (3, 4096) and logits.dtype == np.float32
    truth = cuqwen.load("demo", device="cpu", dtype="float64").logits([1, 2, 3])
    assert error(logits.get(), truth) < 2.0**-8  # the cache's rounding
    exact = cuqwen.load("demo", device="cuda", kv_dtype="float32")
    assert error(exact.logits([1, 2, 3]).get(), truth) < 1e-5
    assert exact.generate("In the beginning", max_tokens=64, temperature=0) == cuqwen.load(
        "demo", device="cpu"
    ).generate("In the beginning", max_tokens=64, temperature=0)


def test_recorded_steps_equal_single_launches(kernels, monkeypatch):
    """The portable ones: bit for bit, for two sequences whose steps alternate, up to a full cache; then with the tables replaced by longer
    ones, to which the recordings do not point."""
    monkeypatch.setenv("CUQWEN_PORTABLE", "1")
    network = load(DEMO, kernels(), ml_dtypes.bfloat16)
    length = 47 if network.device.upload(np.zeros(1)).__class__ is not np.ndarray else 11
    sequences = []
    for seed in (1, 2):
        ids = network.device.upload(np.random.default_rng(seed).integers(0, 4095, length).astype(np.int32))
        caches = network.new_cache(length), network.new_cache(length)
        for cache in caches:
            network.forward(ids[:7], cache)
        sequences.append((ids, *caches, Decoder(network, caches[1])))
    for at in range(7, length):
        if at == length - 1:
            longer = network.new_cache(600)
            longer.keys[:], longer.values[:] = 7.0, 7.0
        for ids, single, recorded, decoder in sequences:
            truth, got = network.forward(ids[at : at + 1], single), decoder.step(ids[at : at + 1])
            assert np.array_equal(host(got), host(truth))
            assert single.length == recorded.length == at + 1
    with pytest.raises(ValueError, match="wanted at most 0 more tokens"):
        decoder.step(ids[:1])


@pytest.mark.gpu
def test_no_wait_for_the_gpu_inside_a_step(monkeypatch):
    """A step enqueues everything and waits only where the chosen token is read."""
    import cupy

    network = load(DEMO, Device.cuda(), ml_dtypes.bfloat16)
    cache = network.new_cache(64)
    ids = network.device.upload(np.arange(5, dtype=np.int32))
    network.forward(ids, cache)  # compiles
    network.forward(ids[:1], cache)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        network.forward(ids[:1], cache)  # allocates on this stream
        stream.synchronize()
        stream.begin_capture()  # CuPy and the driver refuse anything that waits while a stream is captured
        network.forward(ids[:1], cache)
        graph = stream.end_capture()
    assert graph is not None
