"""The forward pass as a whole: kernels against the reference, whole prompts against single tokens, the cache."""

import dataclasses
import itertools
import types

import ml_dtypes
import numpy as np
import pytest
from checkpoints import DEMO, SPECS, Spec, write

import cuqwen
from cuqwen import launch, prompt, reference, weights
from cuqwen.cache import KVCache
from cuqwen.config import Config
from cuqwen.decode import Decoder
from cuqwen.model import Device, Qwen3
from cuqwen.prompt import ShortPrompts

BF16 = np.dtype(ml_dtypes.bfloat16)


def load(folder, device, kv_dtype, **options):
    config = Config.from_folder(folder)
    return Qwen3(config, weights.read(folder, config, device.place_weight), device, kv_dtype, **options)


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

    def start(one_order=False):
        if request.param == "emulated":
            settings = request.getfixturevalue("emulated_gpu")
            settings.orders = settings.orders[:1] if one_order else settings.orders
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
    network = load(folder, kernels(), np.float32, exact=True)
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
    got = run(load(DEMO, kernels(), ml_dtypes.bfloat16, exact=True), [20, 1, 3], ids)
    assert error(got, exact) <= 1.25 * error(rounded, exact) + 4 * own


def test_k_is_rounded_once(kernels):
    """After its norm and rotation. The keys of layer 0 depend on nothing else that is rounded."""
    ids = np.arange(100, 140)

    def keys(device, kv_dtype):
        network = load(DEMO, device, kv_dtype, exact=True)
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


# --- prompts, chunk by chunk ---------------------------------------------------------------------------------------

PROMPT_SPECS = {
    spec.name: spec
    for spec in (
        Spec("normed_64", 4, 2, 64, 128, 192, 264, k_gains="ordinary"),
        Spec("normed_128", 2, 1, 128, 128, 192, 264, k_gains="ordinary"),
        Spec("biased_64", 2, 1, 64, 128, 192, 264, model_type="qwen2", tie_word_embeddings=False),
    )
}


def read(network, ids, chunk, **options):
    """Logits of every token, or of the last one, read in chunks; the cache is poisoned first."""
    cache = network.new_cache(len(ids) + 3)
    cache.keys[:], cache.values[:] = np.nan, np.nan
    network.chunk = chunk
    logits = network.read(np.asarray(ids, np.int32), cache, **options)
    assert cache.length == len(ids)
    return host(logits)


@pytest.mark.parametrize("chunk", [1, 7, 19, 20, 21, 64])
def test_a_prompt_is_read_in_chunks(chunk):
    """Of any length: each token goes in once, and the last one's logits come out, or every one's."""
    network = load(DEMO, Device.cpu(np.float64), np.float64)
    ids = np.random.default_rng(3).integers(0, 4095, 20)
    truth = run(network, [20], ids)
    assert error(read(network, ids, chunk, every_row=True), truth) <= 1e-12
    last = read(network, ids, chunk)
    assert last.shape == (1, 4096) and error(last, truth[-1:]) <= 1e-12


def test_chunks_are_even(monkeypatch):
    """A few tokens too many for a whole chunk take some from the one before; progress is told after each."""
    network, lengths, told = load(DEMO, Device.cpu(), np.float32), [], []
    monkeypatch.setattr(network, "forward", lambda ids, cache, **_: lengths.append(len(ids)))
    for total in (1, 40, 41, 49, 50, 80, 83, 121):
        del lengths[:], told[:]
        cache, network.chunk = network.new_cache(200), 40
        cache.length = 5
        network.read(np.zeros(total, np.int32), cache, progress=lambda *call: told.append(call))
        expected = {41: [30, 11], 49: [30, 19], 50: [40, 10], 80: [40, 40], 83: [40, 30, 13], 121: [40, 40, 30, 11]}
        assert lengths == expected.get(total, [total])
        assert told == [(5 + done, 5 + total) for done in itertools.accumulate(lengths)]


@pytest.mark.parametrize("name", PROMPT_SPECS)
def test_prompts_on_kernels(name, kernels, tmp_path):
    """Exact: float32's own error, in chunks or not. Otherwise: bf16 between the operations, and nowhere else.

    The yardstick is the reference with exactly those roundings: the kernels may err by a quarter more, for their luck, and
    must err by half as much at least, or they would be something else."""
    folder = write(tmp_path, PROMPT_SPECS[name])
    ids = np.random.default_rng(4).integers(0, 264, 83)
    truth = run(load(folder, Device.cpu(np.float64), BF16), [83], ids)
    own = error(run(load(folder, Device.cpu(), BF16), [83], ids), truth)
    rounded = error(run(load(folder, rounding_device(normed=name != "biased_64"), BF16), [83], ids), truth)
    device = kernels(one_order=True)
    for exact, least, most in ((True, 0, max(4 * own, 1e-5)), (False, 0.5 * rounded, 1.25 * rounded + 4 * own)):
        network = load(folder, device, BF16, exact=exact)
        assert (network.dtype == BF16) is not exact
        for chunk in (83, 40):
            got = read(network, ids, chunk, every_row=True)
            assert least <= error(got, truth) <= most, (exact, chunk)
            assert (
                np.array_equal(read(network, ids, chunk), got[-1:])
                or error(read(network, ids, chunk), got[-1:]) <= most
            )


def rounding_device(*, normed=True, layers=2):
    """The reference in float32, whose operations hand bf16 to each other where prompts on the GPU do."""

    def narrow(array):
        return array.astype(BF16).astype(np.float32)

    def rmsnorm(x, weight, eps, out=None):
        result = reference.rmsnorm(x, weight, eps)
        rmsnorm.calls += 1  # the last norm of a forward pass is not rounded
        return result if rmsnorm.calls % (2 * layers + 1) == 0 else narrow(result)

    def attention(q, keys, values, positions, out=None):
        return narrow(reference.attention(narrow(q) if normed else q, keys, values, positions))

    rmsnorm.calls = 0
    operations = types.SimpleNamespace(**{**vars(reference), "rmsnorm": rmsnorm, "attention": attention})
    operations.swiglu = lambda x, gate, up, out=None: narrow(reference.swiglu(x, gate, up))
    return dataclasses.replace(Device.cpu(), operations=operations)


def test_what_is_read_exactly_in_any_case(kernels, tmp_path):
    """Few tokens; weights that are not bf16; float32 asked for. A prompt on the kernels is not, and shows it."""
    spec = PROMPT_SPECS["normed_64"]
    device = kernels(one_order=True)
    for dtype in ("bfloat16", "float16", "float32"):
        folder = write(tmp_path / dtype, dataclasses.replace(spec, dtype=dtype))
        network = load(folder, device, np.float32)
        assert network.dtype == (BF16 if dtype == "bfloat16" else np.float32)
        ids = np.arange(9)
        few = run(network, [3, 3, 3], ids)
        exact = run(load(folder, device, np.float32, exact=True), [9], ids)
        assert error(few, exact) < 1e-5
        assert (error(run(network, [9], ids), exact) > 1e-4) == (dtype == "bfloat16")


def test_the_workspace_is_made_once(kernels, tmp_path):
    """And holds a prompt's activations; what is left over from a longer chunk, or a failed one, plays no part."""
    network = load(write(tmp_path, PROMPT_SPECS["normed_64"]), kernels(one_order=True), BF16)
    ids = np.random.default_rng(4).integers(0, 264, 40)
    network.chunk = 40
    first = read(network, ids, 40)
    space = network.workspace
    for array in space:
        if array is not None:
            array[...] = np.nan
    assert np.array_equal(read(network, ids, 40), first) and network.workspace is space
    short = read(network, ids[:12], 40)
    assert np.all(np.isfinite(short)) and network.workspace is space


@pytest.mark.parametrize("length", [5, 20, 32, 33, 64])
def test_short_prompts_equal_others(kernels, tmp_path, length):
    """Padded to 32 or 64 tokens, operation by operation and then recorded; after other tokens, and again after another
    prompt of about this length has been there. What lies behind the sequence in the cache stays untouched."""
    network = load(write(tmp_path, PROMPT_SPECS["normed_64"]), kernels(one_order=True), BF16, exact=True)
    rng = np.random.default_rng(length)
    first, *others = (rng.integers(0, 264, n).astype(np.int32) for n in (9, length, length - 1 + length % 2))
    cache, network.chunk = network.new_cache(80), 64
    run_one(network, first, cache)
    short, wanted = ShortPrompts(network, cache), []
    for ids in others:
        other = network.new_cache(80)
        run_one(network, first, other)
        wanted.append((run_one(network, ids, other), other))
    for turn in range(6):
        ids, (logits, other) = others[turn % 2], wanted[turn % 2]
        cache.length = 9
        for array in (cache.keys, cache.values):
            array[:, 9:] = np.nan
        got, end = host(short.read(ids)), 9 + len(ids)
        assert cache.length == end and error(got, logits) < 1e-5
        if turn == 4:  # what recordings use is replaced, and must live on
            network._grow_tables(300)
            network.forward(network.device.upload(np.zeros(network.chunk + 1, np.int32)), network.new_cache(70), rows=0)
        for mine, theirs in ((cache.keys, other.keys), (cache.values, other.values)):
            mine, theirs = (host(array).astype(np.float32) for array in (mine, theirs))
            assert np.isnan(mine[:, end:]).all()
            assert error(mine[:, :end], theirs[:, :end]) < 1e-3  # an ulp of bf16 here and there
    assert 1 <= len(short.recordings) <= 2


def run_one(network, ids, cache):
    return host(network.forward(network.device.upload(ids), cache))


def test_what_is_no_short_prompt(kernels, tmp_path):
    network = load(write(tmp_path, PROMPT_SPECS["normed_64"]), kernels(one_order=True), BF16)
    cache = network.new_cache(40)
    short = ShortPrompts(network, cache)
    assert short.widths == [32]
    for length in (1, 4, 33):
        assert short.read(np.zeros(length, np.int32)) is None and cache.length == 0
    cache.length = 30
    with pytest.raises(ValueError, match="read: ids: wanted at most 10 more tokens, got 11"):
        short.read(np.zeros(11, np.int32))
    assert cache.length == 30
    network.chunk = 31
    assert ShortPrompts(network, cache).widths == []


def test_only_the_last_recordings_are_kept(kernels, tmp_path, monkeypatch):
    """Each width: computed, then recorded, then replayed, unless too many others came between."""
    monkeypatch.setattr(prompt, "MOST_RECORDINGS", 2)
    monkeypatch.setattr(prompt, "WIDTHS", (6, 7, 8))
    network = load(write(tmp_path, PROMPT_SPECS["normed_64"]), kernels(one_order=True), BF16)
    records, record = [], launch.record
    monkeypatch.setattr(launch, "record", lambda work: records.append(1) or record(work))
    cache = network.new_cache(40)
    short, logits = ShortPrompts(network, cache), {}
    for length, recorded in (
        (6, 0),
        (6, 1),
        (6, 1),
        (7, 1),
        (7, 2),
        (8, 2),
        (8, 3),
        (7, 3),
        (6, 4),
        (6, 4),
        (8, 4),
        (7, 5),
    ):
        cache.length = 0
        got = host(short.read(np.arange(length, dtype=np.int32))).copy()
        assert len(records) == recorded and len(short.recordings) <= 2
        assert np.array_equal(logits.setdefault(length, got), got)


@pytest.mark.parametrize("depth", [0.01, 0.5, 0.99])
@pytest.mark.parametrize("size", ["small", pytest.param("32k", marks=pytest.mark.gpu)])
def test_a_needle_in_a_long_context(request, kernels, tmp_path, size, depth):
    """Five tokens of a long text are others: the last logits change, and by what they change in the reference. A chunk
    forgotten, a row off, or a position that is not attended to would show. 32k tokens in one layer, where the reference
    needs no other query than the last."""
    if size == "32k" and request.node.callspec.params["kernels"] == "emulated":
        pytest.skip("too large to emulate")
    length, layers, chunk = (400, 2, 96) if size == "small" else (32768, 1, 2048)
    spec = dataclasses.replace(PROMPT_SPECS["normed_64"], num_hidden_layers=layers, max_position_embeddings=40960)
    folder = write(tmp_path, spec)
    rng = np.random.default_rng(7)
    hay = rng.integers(0, 250, length)
    needle = hay.copy()
    at = min(int(depth * length), length - 12)
    needle[at : at + 5] = rng.integers(250, 264, 5)

    def last_logits(network, ids, chunk):
        cache = network.new_cache(length)
        for first in range(0, length - 1, chunk):
            piece = network.device.upload(ids[first : min(first + chunk, length - 1)].astype(np.int32))
            network.forward(piece, cache, rows=0)
        return host(network.forward(network.device.upload(ids[-1:].astype(np.int32)), cache))[0]

    truths = [last_logits(load(folder, Device.cpu(), np.float32), ids, 1024) for ids in (hay, needle)]
    network = load(folder, kernels(one_order=True), np.float32, exact=True)
    got = [read(network, ids, chunk)[0] for ids in (hay, needle)]
    change = truths[1] - truths[0]
    assert np.linalg.norm(change) > 1e-4 * np.linalg.norm(truths[0])  # fifty times float32's error or more
    assert np.linalg.norm((got[1] - got[0]) - change) <= 0.1 * np.linalg.norm(change)


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


@pytest.mark.parametrize(
    "given,kv_dtype",
    [
        ({}, BF16),
        ({"exact": True}, np.float32),
        ({"exact": True, "kv_dtype": "bfloat16"}, BF16),
        ({"kv_dtype": "float32"}, np.float32),
    ],
)
def test_exact_keeps_the_cache_in_float32(emulated_gpu, given, kv_dtype):
    model = cuqwen.load("demo", device="cuda", **given)
    config = model.config
    assert model.network.kv_dtype == kv_dtype and (model.network.dtype == BF16) is ("exact" not in given)
    tables = 4 * config.head_dim + 4
    assert model.memory_plan.bytes_per_token == KVCache.bytes_per_token(config, kv_dtype) + tables


@pytest.mark.gpu
def test_load_on_the_gpu_through_the_public_face():
    model = cuqwen.load("demo", device="cuda")
    assert model.device == "cuda"
    logits = model.logits([1, 2, 3])
    assert logits.shape == (3, 4096) and logits.dtype == np.float32
    truth = cuqwen.load("demo", device="cpu", dtype="float64").logits([1, 2, 3])
    assert error(logits.get(), truth) < 2.0**-8  # the cache's rounding
    exact = cuqwen.load("demo", device="cuda", exact=True)
    assert error(exact.logits([1, 2, 3]).get(), truth) < 1e-5
    ids = np.random.default_rng(6).integers(0, 4095, 700)
    truth = cuqwen.load("demo", device="cpu", dtype="float64").logits(ids)
    rounded = error(run(load(DEMO, rounding_device(layers=5), BF16), [700], ids), truth)
    assert error(exact.logits(ids).get(), truth) < 1e-5
    assert 0.5 * rounded < error(model.logits(ids).get(), truth) < 1.25 * rounded
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
