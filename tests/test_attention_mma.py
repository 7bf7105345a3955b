"""Attention of more than a few queries on tensor cores, against its formula in float64.

By mma and by wgmma, on the CUDA source run on the CPU in three orders of threads, and with `-m gpu` on a GPU. Errors are held
to the bounds in the head of kernels/attention_mma.cu, and all in all to a multiple of those of a plain
implementation in the same precision.
"""

import ml_dtypes
import numpy as np
import pytest

from cuqwen import cuda, launch, ops, reference

F32, F16, BF16 = np.float32, np.float16, ml_dtypes.bfloat16
EPS32 = 2.0**-24
HALF_ULP = {np.dtype(F32): 2.0**-24, np.dtype(BF16): 2.0**-8}


@pytest.fixture(params=["emulated", "emulated-wgmma", pytest.param("gpu", marks=pytest.mark.gpu)])
def side(request, monkeypatch):
    if request.param != "gpu":
        settings = request.getfixturevalue("emulated_gpu")
        if request.param == "emulated-wgmma":
            settings.orders = ("shuffled",)
            monkeypatch.setattr(launch, "wgmma_processors", lambda: 132)
    return request.param


@pytest.fixture
def rng(request):
    return np.random.default_rng(sum(map(ord, request.node.name)))


def attend(side, q, keys, values, positions, out=F32):
    """ops.attention into poisoned memory of the type `out`."""
    if side == "emulated-wgmma" and q.dtype == F32:
        pytest.skip("wgmma is for bf16 queries")
    result = launch.upload(np.full(q.shape, np.nan).astype(out))
    arrays = (launch.upload(np.ascontiguousarray(a)) for a in (q, keys, values, positions))
    assert ops.attention(*arrays, out=result) is result
    return result.get() if side == "gpu" else result


def truth(q, keys, values, positions, round_weights=lambda p: p):
    """(the formula, sum of weight |v|, the largest sum |q k| / sqrt(D) of a key seen, keys seen)."""
    q, keys, values = (a.astype(np.float64) for a in (q, keys, values))
    group, root = q.shape[1] // keys.shape[1], np.sqrt(q.shape[2])
    out, size, largest = np.empty(q.shape), np.empty(q.shape), np.empty((*q.shape[:2], 1))
    for t, last in enumerate(positions):
        for h in range(q.shape[1]):
            k, v = keys[: last + 1, h // group], values[: last + 1, h // group]
            scores = k @ q[t, h] / root
            p = np.exp(scores - scores.max())
            out[t, h], size[t, h] = round_weights(p) @ v / p.sum(), p @ np.abs(v) / p.sum()
            largest[t, h] = (np.abs(k) @ np.abs(q[t, h])).max() / root
    return out, size, largest, positions[:, None, None] + 1.0


def bound(q, keys, size, largest, seen):
    """That of the kernel's head."""
    D = q.shape[2]
    if keys.dtype == F32:
        return (seen / 32 + 256 + 2 * (13 / 8 * D + 25) * largest) * EPS32 * size
    if q.dtype == F32:
        return (seen / 32 + 176 + 2 * (11 / 8 * D + 16) * largest) * EPS32 * size
    return (2.0**-8 + (1.5 * seen + 64 + 2 * (11 / 8 * D + 4) * largest) * EPS32) * size


def check(got, q, keys, values, positions):
    true, *sizes = truth(q, keys, values, positions)
    within = bound(q, keys, *sizes)
    error = np.abs(got.astype(np.float64) - true)
    slack = within + (np.abs(true) + within) * HALF_ULP[got.dtype] + 2.0**-126
    assert np.all(error <= slack), f"worst: {np.max(error / slack):.2f} times the bound"  # NaN fails too
    if sizes[1].max() < 1e3:  # of larger scores float32 itself loses as much
        plain = reference.attention(q, keys, values, positions).astype(got.dtype)
        if q.dtype == BF16:
            plain = truth(q, keys, values, positions, lambda p: p.astype(BF16).astype(np.float64))[0].astype(BF16)
        # Tensor cores cut where float32 rounds, by up to four times as much and always towards zero; a part of float32 queries or
        # weights that was left out would make it 60 times.
        times = 2 if q.dtype == BF16 else 16
        assert np.linalg.norm(error) <= times * np.linalg.norm(plain.astype(np.float64) - true)


def inputs(rng, T, H, K, D, start, q_type, kv_type=BF16, scale=1.0, spare=9):
    """q, keys, values and positions of T queries behind `start` cached rows; `spare` rows of the cache were never written."""
    q = (rng.standard_normal((T, H, D)) * scale).astype(q_type)
    keys, values = (rng.standard_normal((start + T + spare, K, D)).astype(kv_type) for _ in range(2))
    keys[start + T :], values[start + T :] = np.nan, np.nan
    return q, keys, values, np.arange(start, start + T, dtype=np.int32)


SHAPES = [(5, 2, 2, 64, 0), (5, 8, 1, 128, 60), (17, 4, 2, 128, 3), (64, 4, 1, 64, 0), (130, 2, 1, 128, 70), (130, 2, 2, 64, 0), (200, 16, 16, 64, 11), (20, 2, 1, 64, 800)]  # fmt: skip


TYPES = pytest.mark.parametrize("q_type,kv_type", [(F32, BF16), (BF16, BF16), (F32, F32)])


@TYPES
@pytest.mark.parametrize("out_type", [F32, BF16])
@pytest.mark.parametrize("T,H,K,D,start", SHAPES)
def test_prompts(side, rng, T, H, K, D, start, q_type, kv_type, out_type):
    arrays = inputs(rng, T, H, K, D, start, q_type, kv_type)
    check(attend(side, *arrays, out_type), *arrays)


def test_both_heights_of_a_block_give_the_same_bits(side, rng, monkeypatch):
    arrays = inputs(rng, 150, 2, 1, 64, 33, BF16)
    plain, run = attend(side, *arrays), cuda._run

    def higher(file, entry, defines, grid, block, args, shared_bytes):
        assert grid == (2, 3)
        height = {"GROUPS": "2"} if "GROUPS" in defines else {"ROWS": "128"}
        run(
            file, entry, defines | height, (2, 2), 384 if "GROUPS" in defines else 128, args, shared_bytes + 2 * 64 * 64
        )

    monkeypatch.setattr(cuda, "_run", higher)
    assert np.array_equal(attend(side, *arrays), plain)


@TYPES
@pytest.mark.parametrize("D", [64, 128])
def test_a_row_does_not_depend_on_the_others(side, rng, D, q_type, kv_type):
    """The same bits whether a prompt is read at once, in chunks, or in another order, and whatever the other rows are."""
    q, keys, values, positions = inputs(rng, 150, 2, 1, D, 40, q_type, kv_type)
    whole = attend(side, q, keys, values, positions)
    for cut in (5, 77):
        for part in (slice(None, cut), slice(cut, None)):
            assert np.array_equal(attend(side, q[part], keys, values, positions[part]), whole[part])
    order = rng.permutation(150)
    assert np.array_equal(attend(side, q[order], keys, values, positions[order]), whole[order])
    q[10:], keys[60:], values[60:] = 3 * q[10:], 2, 2  # beyond what the first 10 see, or others
    assert np.array_equal(attend(side, q, keys, values, positions)[:10], whole[:10])


@TYPES
@pytest.mark.parametrize("scale", [1e-20, 300.0, 1e4])
def test_extreme_scores(side, rng, scale, q_type, kv_type):
    """From all scores equal to one score winning by thousands, with either sign."""
    arrays = inputs(rng, 70, 2, 1, 64, 21, q_type, kv_type, scale)
    check(attend(side, *arrays), *arrays)


@TYPES
@pytest.mark.parametrize("score", [-1e4, 0.0, 1e4])
def test_constant_rows(side, q_type, kv_type, score):
    """Equal scores, however large, give the mean of the values, which are whole numbers here. Where scores are so large that
    2^(top - top) is not 1, bf16 rounds that weight, and all others alike."""
    q, keys = np.full((40, 1, 64), score / 8).astype(q_type), np.full((64, 1, 64), 1.0).astype(kv_type)
    values = np.repeat(np.arange(64), 64).reshape(64, 1, 64).astype(kv_type)
    positions = np.arange(24, 64, dtype=np.int32)
    mean = np.broadcast_to((positions / 2)[:, None, None], q.shape)
    np.testing.assert_allclose(
        attend(side, q, keys, values, positions), mean, rtol=2.0**-8 if score and q_type == BF16 else 16 * EPS32
    )


@TYPES
def test_positions_in_any_order_and_beyond_the_cache(side, rng, q_type, kv_type):
    q, keys, values, _ = inputs(rng, 80, 2, 1, 64, 20, q_type, kv_type, spare=0)
    positions = rng.integers(0, 100, 80).astype(np.int32)
    wrong = np.array([0, 7, 63, 79])
    positions[wrong] = -1, 100, 2**31 - 1, -(2**31)
    got, right = attend(side, q, keys, values, positions), np.delete(np.arange(80), wrong)
    assert np.all(np.isnan(got[wrong]))
    check(got[right], q[right], keys, values, positions[right])


@TYPES
def test_all_positions_beyond_the_cache(side, rng, q_type, kv_type):
    q = rng.standard_normal((6, 1, 64)).astype(q_type)
    empty = np.empty((0, 1, 64), kv_type)
    assert np.all(np.isnan(attend(side, q, empty, empty, np.zeros(6, np.int32))))


@TYPES
def test_queries_may_be_overwritten(side, rng, q_type, kv_type):
    arrays = inputs(rng, 70, 4, 2, 64, 2, q_type, kv_type)
    q, *others = map(launch.upload, arrays)
    ops.attention(q, *others, out=q)
    check(q.get() if side == "gpu" else q, *arrays)


@pytest.mark.parametrize("T,D,kv", [(3, 64, BF16), (7, 24, BF16), (7, 64, F16), (7, 64, F32)])
@pytest.mark.parametrize("q_type,out_type", [(BF16, BF16), (BF16, F32), (F32, BF16)])
def test_bf16_queries_and_results_without_tensor_cores(side, rng, T, D, kv, q_type, out_type):
    """Few queries, and what the tensor cores do not serve: computed in float32 from the same queries, rounded once."""
    q, keys, values, positions = inputs(rng, T, 2, 1, D, 30, q_type)
    keys, values = keys.astype(kv), values.astype(kv)
    got = attend(side, q, keys, values, positions, out_type)
    assert np.array_equal(got, attend(side, q.astype(F32), keys, values, positions).astype(out_type))


def test_unaligned_queries_take_the_other_kernel(side, rng):
    arrays = inputs(rng, 6, 2, 1, 64, 0, F32)
    shifted = launch.upload(np.concatenate((np.zeros(1, F32), arrays[0].ravel())))[1:].reshape(arrays[0].shape)
    got = ops.attention(shifted, *map(launch.upload, arrays[1:]))
    check(got.get() if side == "gpu" else got, *arrays)


@pytest.mark.gpu
@TYPES
@pytest.mark.parametrize("T,start,H,K,D", [(2048, 0, 16, 8, 128), (777, 5000, 8, 1, 128), (4100, 12, 14, 2, 64)])
def test_real_sizes(rng, T, start, H, K, D, q_type, kv_type):
    """All rows are checked for NaN, some against the formula: the first and last, and those around the edges of blocks."""
    arrays = inputs(rng, T, H, K, D, start, q_type, kv_type)
    got = attend("gpu", *arrays, q_type)
    assert np.all(np.isfinite(got.astype(F32)))
    rows = np.unique([0, 1, 63, 64, 127, 128, T // 2, T - 129, T - 128, T - 2, T - 1])
    q, keys, values, positions = arrays
    check(got[rows], q[rows], keys, values, positions[rows])
