"""The step in one launch against float64 and against the step operation by operation, emulated and on a GPU."""

import itertools

import ml_dtypes
import numpy as np
import pytest
from checkpoints import Spec, write

from cuqwen import decode_step, launch, weights
from cuqwen.config import Config
from cuqwen.decode import Choice, Decoder
from cuqwen.decode_step import ENDED, NO_CHOICE, DecodeStep
from cuqwen.model import Device, Qwen3
from cuqwen.sampling import Sampling

F32, BF16 = np.float32, ml_dtypes.bfloat16
SPECS = {
    spec.name: spec
    for spec in (
        Spec("two_heads_a_key_head", 4, 2, 64, 128, 192, 264),
        Spec("untied_no_gain_biases", 7, 1, 64, 448, 320, 272, model_type="qwen2", tie_word_embeddings=False),
        Spec("two_heads_together_ragged_segments", 4, 1, 128, 1088, 1216, 264, k_gains="ordinary"),
        Spec("frames_of_four_rows", 4, 1, 128, 1088, 2112, 264, k_gains="ordinary"),
        Spec("two_segments_each", 16, 8, 128, 2048, 2176, 520, num_hidden_layers=1, k_gains="ordinary"),
    )
}
BLOCKS = {
    "two_heads_a_key_head": 5, "untied_no_gain_biases": 8, "two_heads_together_ragged_segments": 17, "frames_of_four_rows": 17,
}  # fmt: skip


def load(folder, device, kv_dtype=F32):
    config = Config.from_folder(folder)
    return Qwen3(config, weights.read(folder, config, device.place_weight), device, kv_dtype)


def host(array):
    return array.get() if hasattr(array, "get") else np.array(array)


def error(got, truth):
    return np.linalg.norm(got - truth) / np.linalg.norm(truth)


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def start(request, monkeypatch):
    """Call it with a number of blocks for a Device; what the CPU's own arithmetic is for must be there before."""

    def begin(blocks, one_order=False):
        if request.param == "emulated":
            settings = request.getfixturevalue("emulated_gpu")
            settings.resident_blocks = blocks
            settings.patience = 20
            settings.orders = settings.orders[:1] if one_order else settings.orders
        elif launch.resident_blocks("silu_mul", "silu_mul", (("OUT_TYPE", "f32"),), 256, 0) == 0:
            pytest.skip("needs a GPU of compute capability 9.0 or newer")
        monkeypatch.setattr(launch, "resident_blocks", lambda *_: blocks)
        return Device.cuda()

    begin.emulated = request.param == "emulated"
    return begin


def put(array, values):
    array[...] = Device.cuda().upload(np.asarray(values, array.dtype))


@pytest.mark.parametrize("kv", [F32, BF16])
@pytest.mark.parametrize("name", SPECS)
def test_decode_step(start, tmp_path, name, kv, monkeypatch):
    """The steps of a sequence: at most twice the error of the operations one by one, against float64 throughout. The largest
    errors of all steps are compared: either side is lucky in some of them."""
    if name not in BLOCKS and start.emulated:
        pytest.skip("too large to emulate")
    if name == "frames_of_four_rows":
        monkeypatch.setattr(decode_step, "_segment", lambda c: 2048)
    folder = write(tmp_path, SPECS[name])
    ids = np.random.default_rng(0).integers(0, 256, 6).astype(np.int32)
    reference = load(folder, Device.cpu(np.float64), np.float64)
    truth = reference.forward(ids, reference.new_cache(9), rows=len(ids))
    device = start(BLOCKS.get(name, 128))
    network = load(folder, device, kv)
    by_operations, cache = network.new_cache(9), network.new_cache(9)
    put(cache.keys, np.full(cache.keys.shape, np.nan)), put(cache.values, np.full(cache.values.shape, np.nan))
    step = DecodeStep(network, cache, SPECS[name].vocab_size)
    mine_errors, theirs_errors = [], []
    for at, token in enumerate(ids):
        wanted = host(network.forward(device.upload(ids[at : at + 1]), by_operations))[0]
        put(step.ids, [token]), put(step.position, [at])
        step()
        logits = host(step.logits)[0]
        mine_errors.append(error(logits, truth[at])), theirs_errors.append(error(wanted, truth[at]))
        assert (
            error(logits, wanted) < 1e-3
        )  # the newest k and v are read as they are stored: one not rounded to bf16 shows
        assert host(step.ids)[0] == np.argmax(logits) and host(step.position)[0] == at + 1
    floor = 4e-7 if kv is F32 else 2e-3  # both are right to some roundings: of sums, of k and v
    assert max(mine_errors) <= 2 * max(theirs_errors) + floor
    for mine, theirs in ((cache.keys, by_operations.keys), (cache.values, by_operations.values)):
        mine, theirs = (host(array).astype(np.float64) for array in (mine, theirs))
        assert np.all(np.isnan(mine[:, 6:]))
        assert np.abs(mine - theirs)[:, :6].max() <= (1e-4 if kv is F32 else 0.02) * np.abs(theirs[:, :6]).max()


@pytest.mark.parametrize(
    "heads,dim,kv,cached",
    [
        *((2, 64, F32, cached) for cached in (63, 64, 65, 192, 193, 300, 600, 1100)),
        (1, 64, F32, 1100), (1, 64, F32, 2100),
        *((heads, dim, kv, cached) for heads in (2, 4) for dim in (64, 128) for kv in (BF16, np.float16) for cached in (15, 193, 517)),
        (4, 128, F32, 193),
    ],
)  # fmt: skip
def test_decode_step_shares_out_the_keys(start, tmp_path, heads, dim, kv, cached):
    """From 193 cached keys on several blocks, up to 16, share a head's. Scores that grow by hundreds from the first key to the last,
    so that a softmax must follow them. Poison behind the sequence must not be read."""
    spec = Spec("long", heads, 1, dim, 128, 192, 264, num_hidden_layers=1, k_gains="ordinary")
    folder = write(tmp_path, spec)
    rng = np.random.default_rng(cached)
    rows = [rng.standard_normal((1, cached, 1, dim)) for _ in range(2)]
    rows[0] *= np.linspace(0.1, 300, cached)[:, None, None] if cached % 2 else 1
    rows = [array.astype(kv).astype(F32) for array in rows]
    reference = load(folder, Device.cpu(np.float64), np.float64)
    cache = reference.new_cache(cached + 1)
    cache.keys[:, :cached], cache.values[:, :cached], cache.length = *rows, cached
    truth = reference.forward(np.array([7]), cache)[0]
    device = start(16 if heads == 1 else 8)
    network = load(folder, device, kv)
    caches = [network.new_cache(cached + 40) for _ in range(2)]
    for cache in caches:
        for array, known in zip((cache.keys, cache.values), rows, strict=True):
            filled = np.full(array.shape, np.nan, F32)
            filled[:, :cached] = known
            put(array, filled)
        cache.length = cached
    step = DecodeStep(network, caches[0], spec.vocab_size)
    put(step.ids, [7]), put(step.position, [cached])
    step()
    theirs = error(host(network.forward(device.upload(np.array([7], np.int32)), caches[1]))[0], truth)
    assert error(host(step.logits)[0], truth) <= 2 * theirs + 1e-5


def test_decode_step_continues_by_itself(start, tmp_path):
    """ids and position of one launch are the input of the next; the launches of other sequences do not disturb it."""
    spec = SPECS["two_heads_a_key_head"]
    network = load(write(tmp_path, spec), start(5), BF16)
    sequences = []
    for first in (3, 200):
        step = DecodeStep(network, network.new_cache(12), 256)
        put(step.ids, [first]), put(step.position, [0])
        sequences.append((step, [first]))
    for _ in range(5):
        for step, ids in sequences:
            step()
            ids.append(int(host(step.ids)[0]))
    for _, ids in sequences:
        cache = network.new_cache(12)
        for token, following in itertools.pairwise(ids):
            logits = host(network.forward(network.device.upload(np.array([token], np.int32)), cache))[0, :256]
            assert logits[following] >= logits.max() - 1e-3 * np.abs(logits).max()


def test_decoder_continues_what_it_has_not_written(start, tmp_path):
    """One launch a step, its id and position left on the device; in between the operations append tokens."""
    network = load(write(tmp_path, SPECS["two_heads_a_key_head"]), start(5, one_order=True))
    ids = network.device.upload(np.random.default_rng(3).integers(0, 256, 8).astype(np.int32))
    cache, other = network.new_cache(9), network.new_cache(9)
    decoder = Decoder(network, cache)
    assert decoder.one_launch is not None
    for first, last in ((0, 1), (1, 2), (2, 5), (5, 6), (6, 7)):
        wanted = host(network.forward(ids[first:last], other))[0]
        step = decoder.step if last == first + 1 else lambda ids: network.forward(ids, cache)
        assert error(host(step(ids[first:last]))[0], wanted) < 1e-5
        assert cache.length == other.length == last
    chosen = np.argmax(wanted)
    assert host(decoder.ids)[0] == chosen
    wanted = network.forward(network.device.upload(np.array([chosen], np.int32)), other)
    assert error(host(decoder.step(decoder.ids))[0], host(wanted)[0]) < 1e-5


@pytest.mark.parametrize("poison", [None, np.nan, np.inf, -np.inf])
def test_decode_step_without_a_choice(start, tmp_path, poison):
    """Equal logits give the lowest id; NaN and infinities none. Ids from n_ids on do not count."""
    spec = Spec("flat", 2, 1, 64, 64, 128, 264, num_hidden_layers=1, tie_word_embeddings=False)
    network = load(write(tmp_path, spec), start(2))
    head = np.zeros(network.weights.lm_head.shape, F32)
    head[260] = 1.0
    if poison is not None and np.isinf(poison):
        # products that overflow when they are added, each of them finite: all logits below n_ids are +inf, or all -inf
        put(network.weights.norm, np.full(64, 1e19, F32))
        put(network.weights.embed_tokens, np.ones(network.weights.embed_tokens.shape, F32))
        for layer in network.weights.layers:
            (
                put(layer.o_proj, np.zeros(layer.o_proj.shape, F32)),
                put(layer.down_proj, np.zeros(layer.down_proj.shape, F32)),
            )
        head[:256] = np.copysign(1e19, poison)
    elif poison is not None:
        put(network.weights.norm, np.full(64, np.nan, F32))
    put(network.weights.lm_head, head)
    step = DecodeStep(network, network.new_cache(4), 256)
    put(step.ids, [1]), put(step.position, [0])
    step()
    logits = host(step.logits)[0, :256]
    assert np.array_equal(logits, np.full(256, 0 if poison is None else poison, F32), equal_nan=True)
    assert host(step.state).tolist() == ([0, 0] if poison is None else [NO_CHOICE, ENDED])


@pytest.mark.parametrize("token,position", [(-1, 2), (264, 2), (1, -1), (1, 4)])
def test_decode_step_of_what_does_not_exist(start, tmp_path, token, position):
    """An id outside the vocabulary or a position outside the cache: NaN comes out, and nothing is read or written there."""
    network = load(write(tmp_path, SPECS["two_heads_a_key_head"]), start(5))
    cache = network.new_cache(4)
    for array in (cache.keys, cache.values):
        put(array, np.full(array.shape, 3.0, F32))
    step = DecodeStep(network, cache, 264)
    put(step.ids, [token]), put(step.position, [position])
    step()
    assert host(step.state).tolist() == [NO_CHOICE, ENDED] and np.isnan(host(step.logits)).all()
    assert (host(cache.keys) == 3).all() and (host(cache.values) == 3).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_decode_step_gives_up_when_words_never_come(start, tmp_path, temperature):
    """After two seconds the blocks go on, the host is told, also where a sampler comes after, and it stays so."""
    network = load(write(tmp_path, SPECS["two_heads_a_key_head"]), start(5, one_order=True), BF16)
    choice = Choice(network, Sampling(temperature=temperature), [1], 256, 4)
    decoder = Decoder(network, network.new_cache(4), choice)
    ids = network.device.upload(np.array([1], np.int32))
    choice(network.forward(ids, network.new_cache(4)), decoder.ids)  # compiles the sampler
    decoder.one_launch.grid = (3,)  # of four heads the last is nobody's
    for _ in range(2):
        logits = decoder.step(ids)
        with pytest.raises(launch.DeviceError, match="decode_step: a block waited two seconds for another one"):
            choice.check(launch.read_later(decoder.state)(), logits)
    decoder.one_launch.grid = (5,)
    decoder.one_launch()
    assert host(decoder.state).tolist() == [NO_CHOICE, 1]


@pytest.mark.parametrize("change,message", [
    ({"dtype": "float16"}, "it takes bf16 weights"),
    ({"vocab_size": 301}, "a vocabulary that is a multiple of 8"),
    ({"intermediate_size": 200}, "widths that are multiples of 64"),
    ({"head_dim": 32}, "heads of 64 or 128"),
    ({"hidden_size": 2048}, "that runs 32 blocks with 219 KB of shared memory at once"),
])  # fmt: skip
def test_obstacles(start, tmp_path, change, message):
    spec = Spec(**{**vars(SPECS["two_heads_a_key_head"]), **change})
    network = load(write(tmp_path, spec), start(8))
    assert message in decode_step.obstacle(network)
    with pytest.raises(ValueError, match=f"decode_step: .*{message}"):
        DecodeStep(network, network.new_cache(4), 256)


@pytest.mark.gpu
@pytest.mark.parametrize("size", ["0.6B", "1.7B", "4B", "8B"])
def test_decode_step_at_real_sizes(size):
    """Two layers of each model after 700 tokens, with what the GPU has: near the operations, and the same bits 100 times."""
    from benchmarks.decode import random_model

    network = random_model(size, layers=2)
    if decode_step.obstacle(network):
        pytest.skip(decode_step.obstacle(network))
    ids = network.device.upload(np.random.default_rng(1).integers(0, 151936, 701).astype(np.int32))
    cache, other = network.new_cache(704), network.new_cache(704)
    network.forward(ids[:700], cache)
    other.keys[...], other.values[...] = cache.keys, cache.values
    wanted = host(network.forward(ids[700:], cache))[0]
    step, results = DecodeStep(network, other, 151936), []
    for _ in range(100):
        put(step.ids, host(ids[700:])), put(step.position, [700])
        step()
        results.append(host(step.logits)[0])
    assert error(results[0], wanted) < 2e-3  # k and v of the new token are rounded to bf16 in both
    assert all(np.array_equal(results[0], row) for row in results)
