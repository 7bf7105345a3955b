"""Every operation, on each side that computes it, against its formula in float64 written out here.

Sides: the NumPy reference; the CUDA sources run on the CPU; with `-m gpu` the same sources on a GPU. Errors are held to
the bounds in the heads of the kernels: so many roundings (eps32 = 2**-24 each) of the sum of absolute terms.
"""

import ctypes
import math
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from cuqwen import cuda, driver, launch, ops, reference, rope_table, tiles

F32, F16, BF16 = np.float32, np.float16, ml_dtypes.bfloat16
STORAGE = (BF16, F16, F32)
EPS32 = 2.0**-24
HALF_ULP = {np.dtype(F32): 2.0**-24, np.dtype(F16): 2.0**-11, np.dtype(BF16): 2.0**-8}
TINY = {np.dtype(F32): 2.0**-126, np.dtype(F16): 2.0**-24, np.dtype(BF16): 2.0**-126}  # below: flushed or subnormal


class Reference:
    name = "reference"
    put = get = staticmethod(lambda array: array)


class Emulated(Reference):
    name = "emulated"


class Gpu:
    name = "gpu"

    @staticmethod
    def put(array):
        return None if array is None else launch.upload(np.asarray(array, order="C"))

    @staticmethod
    def get(array):
        return array.get()


@pytest.fixture(params=[Reference, Emulated, pytest.param(Gpu, marks=pytest.mark.gpu)], ids=lambda side: side.name)
def side(request):
    if request.param is Emulated:
        request.getfixturevalue("emulated_gpu")
    return request.param


@pytest.fixture
def rng(request):
    return np.random.default_rng(sum(map(ord, request.node.name)))


def random(rng, shape, dtype=F32, scale=1.0):
    return (rng.standard_normal(shape) * scale).astype(dtype)


def poisoned(shape, dtype=F32):
    return np.full(shape, np.nan).astype(dtype)


def wide(array):
    return None if array is None else array.astype(np.float64)


def assert_close(got, truth, bound):
    """|got - truth| <= bound elementwise, plus the rounding to the type of `got`."""
    assert got.shape == truth.shape
    slack = bound + (np.abs(truth) + bound) * HALF_ULP[got.dtype] + TINY[got.dtype]
    error = np.abs(got.astype(np.float64) - truth)
    assert np.all(error <= slack), f"worst: {np.max(error / slack):.2f} times the bound"  # NaN fails too


# ------------------------------------------------------------------------------------------------ embed


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("shape", [(1,), (0,), (3, 5)])
def test_embed(side, rng, dtype, shape):
    table = random(rng, (37, 70), dtype)
    ids = rng.integers(0, 37, shape).astype(np.int32)
    out = side.put(poisoned((*shape, 70)))
    assert ops.embed(side.put(ids), side.put(table), out=out) is out
    assert np.array_equal(side.get(out), table[ids].astype(F32))


def test_embed_of_an_unknown_id(side):
    table, ids = side.put(np.ones((4, 8), F32)), side.put(np.array([0, 4, -1], np.int32))
    if side is Reference:
        with pytest.raises(ValueError, match=r"ids: wanted 0\.\.3, got -1\.\.4"):
            ops.embed(ids, table)
    else:
        got = side.get(ops.embed(ids, table))
        assert np.all(got[0] == 1) and np.all(np.isnan(got[1:]))


# ---------------------------------------------------------------------------------------------- rmsnorm


def rmsnorm_truth(x, weight, eps):
    x, weight = wide(x), wide(weight)
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + float(F32(eps))) * weight


def check_rmsnorm(side, x, weight, out_dtype, eps=1e-6):
    out = side.put(poisoned(x.shape, out_dtype))
    ops.rmsnorm(side.put(x), side.put(weight), eps, out=out)
    truth = rmsnorm_truth(x, weight, eps)
    flushed = 2.0**-126 * np.abs(wide(weight))  # a normalised value below 2^-126
    assert_close(side.get(out), truth, np.abs(truth) * (x.shape[-1] / 2048 + 24) * EPS32 + flushed)


@pytest.mark.parametrize("shape", [(1, 1), (1, 1024), (3, 1000), (2, 5, 96), (0, 64), (4, 5120), (17, 72), (300, 8), (70, 16), (40, 264), (3, 1032), (2, 1001), (9, 33), (1, 16384), (2, 16392)])  # fmt: skip
def test_rmsnorm(side, rng, shape):
    check_rmsnorm(side, random(rng, shape), 1 + 0.1 * random(rng, shape[-1:]), F32)


@pytest.mark.parametrize("shape", [(1, 1024), (5, 72), (3, 2560), (3, 1001), (2, 7), (0, 8)])
@pytest.mark.parametrize("x_type,out_type", [(F32, F32), (BF16, BF16), (F32, BF16)])
def test_rmsnorm_adds_to_the_residual(side, rng, shape, x_type, out_type):
    x, before, weight = random(rng, shape, x_type), random(rng, shape), random(rng, shape[-1:], BF16)
    residual, out = side.put(before.copy()), side.put(poisoned(shape, out_type))
    assert ops.rmsnorm(side.put(x), side.put(weight), residual=residual, out=out) is out
    after = before + x.astype(F32)
    assert np.array_equal(side.get(residual), after)
    truth = rmsnorm_truth(after, weight, 1e-6)
    assert_close(side.get(out), truth, np.abs(truth) * (shape[-1] / 2048 + 24) * EPS32)


@pytest.mark.parametrize("C", [64, 1032])
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_rmsnorm_of_arrays_that_start_anywhere(side, rng, C, dtype):
    x, weight, before = random(rng, (3, C), dtype), random(rng, (C,), dtype), random(rng, (3, C))
    for which in range(3):
        arrays = [anywhere(side, a) if i == which else side.put(a.copy()) for i, a in enumerate((x, weight, before))]
        got = ops.rmsnorm(*arrays[:2], residual=arrays[2])
        truth = rmsnorm_truth(before + x.astype(F32), weight, 1e-6)
        assert_close(side.get(got), truth, np.abs(truth) * (C / 2048 + 24) * EPS32)


@pytest.mark.parametrize("C", [40, 999, 1024, 2056])
def test_a_normalised_row_does_not_depend_on_the_rows_beside_it(side, rng, C):
    x, weight = random(rng, (19, C)), side.put(random(rng, (C,)))
    many = side.get(ops.rmsnorm(side.put(x), weight))
    for rows in (1, 2, 9):
        assert np.array_equal(many[:rows], side.get(ops.rmsnorm(side.put(x[:rows]), weight)))


@pytest.mark.parametrize("x", STORAGE)
@pytest.mark.parametrize("weight", STORAGE)
@pytest.mark.parametrize("out", STORAGE)
def test_rmsnorm_types(side, rng, x, weight, out):
    check_rmsnorm(side, random(rng, (3, 200), x), random(rng, (200,), weight), out)


@pytest.mark.parametrize("scale", [1e-36, 1e-30, 1e-18, 1e-10, 1e-3, 1e3, 1e10, 1e15, 1e18, 1e30, 5e37])
@pytest.mark.parametrize("eps", [1e-6, 0.0, 2e-38, 1e30])
@pytest.mark.parametrize("C", [131, 2048])
def test_rmsnorm_extreme_scales_and_gains(side, rng, scale, eps, C):
    weight = random(rng, (C,))
    weight[::7] = 96.5
    x = random(rng, (4, C), scale=scale)
    x[1, 1:] = 0  # one value alone
    x[2, ::2] *= F32(1e-6)
    check_rmsnorm(side, np.where(np.abs(x) < TINY[x.dtype], F32(0), x), weight, F32, eps)


@pytest.mark.parametrize("C", [1024, 1031, 4096])
def test_rmsnorm_constant_and_zero_rows(side, C):
    x = np.repeat(np.array([[3.0], [-1e-3], [0.0], [1e-30], [1e30]], F32), C, axis=1)
    check_rmsnorm(side, x, np.full(C, 96.5, F32), F32)


@pytest.mark.parametrize("C", [8, 1031, 2048])
def test_rmsnorm_of_what_is_not_finite_and_of_zeros_without_eps(side, C):
    x = np.ones((4, C), F32)
    x[0], x[1, 3], x[2, 5], x[3, [1, 2]] = 0, np.nan, -np.inf, (np.inf, np.nan)
    got = side.get(ops.rmsnorm(side.put(x), side.put(np.full(C, 2, F32)), 0.0))
    with np.errstate(invalid="ignore"):
        assert np.array_equal(got, rmsnorm_truth(x, np.full(C, 2, F32), 0.0).astype(F32), equal_nan=True)
    assert np.isnan(got[[0, 1, 3]]).all() and np.isnan(got[2]).sum() == 1 and not got[2, :5].any()


def test_rmsnorm_returns_float32_for_bf16(side, rng):
    got = ops.rmsnorm(side.put(random(rng, (2, 64), BF16)), side.put(np.ones(64, BF16)))
    assert got.dtype == F32


# ----------------------------------------------------------------------------------------------- matmul

MATMUL_SHAPES = [
    (1, 64, 64),
    (1, 513, 1000),
    (4, 100, 96),
    (3, 9, 7),
    (5, 64, 64),
    (7, 65, 33),
    (64, 64, 512),
    (130, 70, 40),
    (1, 1, 1),
    (1, 5, 4616),  # each warp fetches more than it can have under way
    (3, 6, 2312),
]


def check_matmul(side, x, weight, residual=None, out=None):
    got = side.get(ops.matmul(side.put(x), side.put(weight), residual=residual, out=out))
    truth = wide(x) @ wide(weight).T
    return got, truth, product_terms(x) * EPS32 * (np.abs(wide(x)) @ np.abs(wide(weight)).T)


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("T,N,C", MATMUL_SHAPES)
def test_matmul(side, rng, T, N, C, dtype):
    assert_close(*check_matmul(side, random(rng, (T, C)), random(rng, (N, C), dtype)))


@pytest.mark.parametrize("T,dtype", [(0, BF16), (1, BF16), (9, BF16), (9, F16)])
def test_matmul_residual_in_place(side, rng, T, dtype):
    x, weight, residual = random(rng, (T, 96)), random(rng, (40, 96), dtype), random(rng, (T, 40))
    stream = side.put(residual.copy())
    got, truth, bound = check_matmul(side, x, weight, residual=stream, out=stream)
    truth = truth + residual
    assert_close(got, truth, bound + EPS32 * np.abs(truth))


def anywhere(side, array):
    """The array at an address that is a multiple of its element's size and of nothing more."""
    memory = np.zeros(array.size + 1, array.dtype)
    memory[1:] = array.reshape(-1)
    return side.put(memory)[1:].reshape(array.shape)


@pytest.mark.parametrize("T", [1, 6])
@pytest.mark.parametrize("dtype", STORAGE)
def test_arrays_that_start_anywhere(side, rng, T, dtype):
    """Rows that fit loads of 16 bytes by their length but not by their address."""
    x, weight = random(rng, (T, 64)), random(rng, (40, 64), dtype)
    truth, bound = wide(x) @ wide(weight).T, product_terms(x) * EPS32 * (np.abs(wide(x)) @ np.abs(wide(weight)).T)
    assert_close(side.get(ops.matmul(side.put(x), anywhere(side, weight))), truth, bound)
    assert_close(side.get(ops.matmul(anywhere(side, x), side.put(weight))), truth, bound)
    inputs = qkv_inputs(rng, T, 2, 1, 64, 64, dtype)
    truth = qkv_truth(**inputs)
    x, projections = side.put(inputs["x"]), [anywhere(side, proj) for proj in inputs["projections"]]
    tables, positions = map(side.put, inputs["tables"]), side.put(inputs["positions"])
    got = ops.qkv_rope(
        x, *projections, *tables, positions, q_norm=side.put(inputs["gains"][0]), k_norm=side.put(inputs["gains"][1])
    )
    for array, (value, error) in zip(got, truth, strict=True):
        assert_close(side.get(array), value, error)


@pytest.mark.parametrize("T", [2, 6])
def test_matmul_of_rows_that_are_not_aligned(side, rng, T):
    x, weight = side.put(random(rng, (T + 1, 33))), side.put(random(rng, (11, 33), BF16))
    got = side.get(ops.matmul(x[1:], weight[2:]))
    x, weight = wide(side.get(x))[1:], wide(side.get(weight))[2:]
    assert_close(got, x @ weight.T, 33 * EPS32 * (np.abs(x) @ np.abs(weight).T))


@pytest.mark.parametrize("T", [1, 70])
@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_matmul_extreme_scales(side, rng, T, scale):
    assert_close(*check_matmul(side, random(rng, (T, 200), scale=scale), random(rng, (65, 200), BF16, scale)))


@pytest.mark.parametrize("shape", [(2, 3, 16), (16,)])
def test_matmul_leading_dimensions(side, rng, shape):
    x, weight = random(rng, shape), random(rng, (5, 16), BF16)
    assert_close(*check_matmul(side, x, weight))


# --------------------------------------------------------------------------------- qkv_rope and qk_norm


def qkv_inputs(rng, T, H, K, D, C, dtype=BF16, bias=False, gain=True, scale=1.0):
    gains = [np.abs(random(rng, (D,), scale=10)) for _ in range(2)]
    gains[1][D // 3] = 96.5
    biases = [random(rng, (n * D,)) for n in (H, K, K)]
    return {
        "x": random(rng, (T, C), scale=scale),
        "projections": [random(rng, (n * D, C), dtype, C**-0.5) for n in (H, K, K)],
        "tables": rope_table(D, 4 * T + 9, 1e4),
        "positions": np.sort(rng.permutation(4 * T + 9)[:T]).astype(np.int32),
        "biases": biases if bias else [None] * 3,
        "gains": gains if gain else [None] * 2,
    }


def qkv_truth(x, projections, tables, positions, biases, gains):
    """(value, bound on its error without its last rounding) for q, k, v, q_ms, k_ms."""
    D = 2 * tables[0].shape[1]
    cos, sin = (wide(t)[positions][:, None] for t in tables)
    x = wide(x)
    results, squares = [], []
    for proj, bias, gain in zip(projections, biases, [*gains, None], strict=True):
        a, size = x @ wide(proj).T, np.abs(x) @ np.abs(wide(proj)).T
        if bias is not None:
            a, size = a + bias, size + np.abs(bias)
        a, size = (m.reshape(len(x), len(proj) // D, D) for m in (a, size))
        error = size * (product_terms(x) + 2) * EPS32
        squares.append(
            (np.mean(a * a, -1), np.mean(2 * np.abs(a) * error + error**2, -1) + np.mean(a * a, -1) * (D + 4) * EPS32)
        )
        if gain is not None:
            a, error = a * wide(gain), error * np.abs(wide(gain))
        if len(results) < 2:
            low, high, e_low, e_high = a[..., : D // 2], a[..., D // 2 :], error[..., : D // 2], error[..., D // 2 :]
            both = np.concatenate((np.abs(low) + np.abs(high),) * 2, -1)
            a = np.concatenate((low * cos - high * sin, high * cos + low * sin), -1)
            error = np.concatenate((e_low + e_high,) * 2, -1) + 4 * EPS32 * both
        results.append((a, error))
    return *results, squares[0], squares[1]


def norm_bound(head, squares, eps=1e-6):
    """The bound on a / sqrt(ms + eps), from those of a and ms (see `qkv_truth`) and the roundings of the division."""
    (a, error), (ms, ms_error) = head, squares
    scale, relative = 1 / np.sqrt(ms + eps)[..., None], (ms_error / (2 * (ms + eps)))[..., None]
    return (error + np.abs(a) * (relative + 6 * EPS32)) * scale


def run_qkv_rope(side, inputs, out=(None,) * 5, rows=None):
    biases, gains = ([side.put(v) for v in inputs[key]] for key in ("biases", "gains"))
    return ops.qkv_rope(
        side.put(inputs["x"]), *map(side.put, inputs["projections"]), *map(side.put, inputs["tables"]), side.put(inputs["positions"]),
        **dict(zip(("q_bias", "k_bias", "v_bias", "q_norm", "k_norm"), [*biases, *gains], strict=True)), out=out, rows=rows,
    )  # fmt: skip


QKV_SHAPES = [(1, 2, 1, 128, 256), (1, 4, 4, 64, 100), (4, 5, 1, 16, 33), (3, 8, 1, 8, 40), (5, 2, 1, 128, 64), (33, 4, 2, 64, 48), (70, 3, 3, 24, 50), (0, 2, 1, 32, 16), (2, 1, 1, 256, 32), (6, 1, 1, 256, 32), (9, 1, 1, 4, 8)]  # fmt: skip


@pytest.mark.parametrize("bias,gain", [(False, True), (True, False), (True, True), (False, False)])
@pytest.mark.parametrize("T,H,K,D,C", QKV_SHAPES)
def test_qkv_rope(side, rng, T, H, K, D, C, bias, gain):
    inputs = qkv_inputs(rng, T, H, K, D, C, bias=bias, gain=gain)
    shapes = (T, H, D), (T, K, D), (T, K, D), (T, H), (T, K)
    got = run_qkv_rope(side, inputs, out=tuple(side.put(poisoned(shape)) for shape in shapes))
    for array, (truth, bound) in zip(got, qkv_truth(**inputs), strict=True):
        assert_close(side.get(array), truth, bound)


@pytest.mark.parametrize("kv", STORAGE)
@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("T", [1, 6])
def test_qkv_rope_writes_rows_of_a_cache(side, rng, T, dtype, kv):
    inputs = qkv_inputs(rng, T, 2, 1, 64, 96, dtype)
    keys, values = side.put(poisoned((9, 1, 64), kv)), side.put(poisoned((9, 1, 64), kv))
    run_qkv_rope(side, inputs, out=(None, keys[2 : 2 + T], values[2 : 2 + T], None, None))
    _, k, v, *_ = qkv_truth(**inputs)
    for cache, (truth, bound) in ((keys, k), (values, v)):
        rows = side.get(cache)
        assert_close(rows[2 : 2 + T], truth, bound)
        assert np.all(np.isnan(rows[:2].astype(F32))) and np.all(np.isnan(rows[2 + T :].astype(F32)))


@pytest.mark.parametrize("kv", [BF16, F32])
@pytest.mark.parametrize("T", [1, 3, 6])
def test_qkv_rope_and_qk_norm_scatter_to_rows(side, rng, T, kv):
    """As in the model: q and k wait in float32, v and then the normalised k go to the rows named, in any order."""
    inputs, rows = qkv_inputs(rng, T, 2, 1, 64, 96), rng.permutation(9)[:T].astype(np.int32)
    keys, values, at = side.put(poisoned((9, 1, 64), kv)), side.put(poisoned((9, 1, 64), kv)), side.put(rows)
    q, k, v, q_ms, k_ms = run_qkv_rope(side, inputs, out=(None, None, values, None, None), rows=at)
    assert v is values and k.shape == (T, 1, 64)
    assert ops.qk_norm(q, k, q_ms, k_ms, rows=at, out=(q, keys))[1] is keys
    _, k, (v, v_bound), _, k_ms = qkv_truth(**inputs)
    normed = k[0] / np.sqrt(k_ms[0] + float(F32(1e-6)))[..., None]
    others = np.setdiff1d(np.arange(9), rows)
    for cache, truth, bound in ((keys, normed, norm_bound(k, k_ms)), (values, v, v_bound)):
        got = side.get(cache)
        assert_close(got[rows], truth, bound)
        assert np.all(np.isnan(got[others].astype(F32)))


@pytest.mark.parametrize("k_named", [False, True])
@pytest.mark.parametrize("v_named", [False, True])
@pytest.mark.parametrize("S,rows", [(100, [50, 51]), (5, [4, 2, 0, 1, 3]), (9, [8, 0, 3])])
def test_rows_count_only_for_what_out_names(side, rng, S, rows, k_named, v_named):
    inputs, at = qkv_inputs(rng, len(rows), 2, 1, 64, 96), side.put(np.array(rows, np.int32))
    keys, values = (side.put(poisoned((S, 1, 64))) if named else None for named in (k_named, v_named))
    q, k, v, q_ms, k_ms = run_qkv_rope(side, inputs, out=(None, keys, values, None, None), rows=at)
    _, k_truth, v_truth, *_ = qkv_truth(**inputs)
    for got, named, (truth, bound) in ((k, k_named, k_truth), (v, v_named, v_truth)):
        got = side.get(got)
        assert_close(got[rows] if named else got, truth, bound)
        assert not named or np.isnan(got).all(axis=(1, 2)).sum() == S - len(rows)
    if not k_named:
        plain, again = ops.qk_norm(q, k, q_ms, k_ms), ops.qk_norm(q, k, q_ms, k_ms, rows=at)
        assert all(np.array_equal(side.get(a), side.get(b)) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("T", [3, 6])
def test_rows_beyond_the_cache(side, rng, T):
    """NumPy refuses them; a kernel does not store such a token, and nothing beside the cache."""
    inputs, rows = qkv_inputs(rng, T, 2, 2, 64, 96), np.arange(T, dtype=np.int32)
    rows[:2] = -1, T
    memory = [side.put(poisoned((T + 2, 2, 64), BF16)) for _ in range(3)]
    keys, values, normed = (array[1 : T + 1] for array in memory)
    at = side.put(rows)
    if side is Reference:
        with pytest.raises(ValueError, match="rows: wanted"):
            run_qkv_rope(side, inputs, out=(None, keys, None, None, None), rows=at)
        return
    q, *_, q_ms, k_ms = run_qkv_rope(side, inputs, out=(None, keys, values, None, None), rows=at)
    ops.qk_norm(q, q, q_ms, k_ms, rows=at, out=(None, normed))
    for array in memory:
        got = side.get(array).astype(F32)
        assert np.all(np.isnan(got[[0, 1, 2, T + 1]])) and np.all(np.isfinite(got[3 : T + 1]))


@pytest.mark.parametrize("head_dim,theta", [(128, 1e6), (64, 1e4), (2, 5e6)])
def test_rope_table_is_rounded_once_near_and_far(head_dim, theta):
    """Half a unit in the last place of a number below 1, and float64's error in an angle of 40,959 rad."""
    cos, sin = rope_table(head_dim, 40960, theta)
    assert cos.shape == sin.shape == (40960, head_dim // 2) and cos.dtype == sin.dtype == F32
    assert np.all(cos[0] == 1) and np.all(sin[0] == 0)
    for position in (1, 2, 511, 40959):
        for i in {0, head_dim // 6, head_dim // 2 - 1}:
            angle = position * theta ** (-2 * i / head_dim)
            assert abs(cos[position, i] - math.cos(angle)) <= 2.0**-25 + 2e-11
            assert abs(sin[position, i] - math.sin(angle)) <= 2.0**-25 + 2e-11


@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_qkv_rope_extreme_scales(side, rng, T, scale):
    inputs = qkv_inputs(rng, T, 2, 1, 64, 96, scale=scale)
    for array, (truth, bound) in zip(run_qkv_rope(side, inputs), qkv_truth(**inputs), strict=True):
        assert_close(side.get(array), truth, bound)


@pytest.mark.parametrize("T", [2, 5])
def test_qkv_rope_beyond_the_table(side, rng, T):
    inputs = qkv_inputs(rng, T, 1, 1, 8, 16)
    inputs["positions"][1] = len(inputs["tables"][0])
    if side is Reference:
        with pytest.raises(ValueError, match="positions: wanted"):
            run_qkv_rope(side, inputs)
    else:
        q, k, v, *_ = (side.get(array) for array in run_qkv_rope(side, inputs))
        assert np.all(np.isnan(q[1])) and np.all(np.isnan(k[1])) and np.all(np.isfinite(v))
        assert np.all(np.isfinite(np.delete(q, 1, 0)))


@pytest.mark.parametrize("T,H,K,D", [(1, 16, 8, 128), (7, 4, 2, 64), (3, 5, 1, 20), (0, 2, 1, 8)])
@pytest.mark.parametrize("q_type,kv", [(F32, BF16), (F32, F16), (F32, F32), (BF16, BF16)])
def test_qk_norm(side, rng, T, H, K, D, q_type, kv):
    q, k, scale = random(rng, (T, H, D)), random(rng, (T, K, D)), 10.0 ** rng.integers(-6, 4, (T, 1))
    q_ms, k_ms = ((random(rng, (T, n)) ** 2 * scale).astype(F32) for n in (H, K))
    out = side.put(poisoned(q.shape, q_type)), side.put(poisoned(k.shape, kv))
    got = ops.qk_norm(*map(side.put, (q, k, q_ms, k_ms)), 1e-6, out=out)
    for array, a, ms in zip(got, (q, k), (q_ms, k_ms), strict=True):
        truth = wide(a) / np.sqrt(wide(ms) + float(F32(1e-6)))[..., None]
        assert_close(side.get(array), truth, 4 * EPS32 * np.abs(truth))


def test_qk_norm_in_place(side, rng):
    q = random(rng, (2, 3, 16))
    a, k = side.put(q.copy()), side.put(q[:, :1].copy())
    ms = side.put(np.full((2, 3), 4.0, F32))
    ops.qk_norm(a, k, ms, side.put(np.full((2, 1), 4.0, F32)), 0.0, out=(a, k))
    assert np.array_equal(side.get(a), q / 2) and np.array_equal(side.get(k), q[:, :1] / 2)


@pytest.mark.parametrize("T", [1, 40])
def test_the_two_steps_equal_the_published_order(side, rng, T):
    """rope(g x / rms(x)), norm before RoPE, as Qwen3 is published: what the split must not change."""
    H, D, C, eps = 2, 128, 256, 1e-6
    inputs = qkv_inputs(rng, T, H, H, D, C)
    q, k, _, q_ms, k_ms = run_qkv_rope(side, inputs)
    got = ops.qk_norm(q, k, q_ms, k_ms, eps)
    q_truth, k_truth, _, q_squares, k_squares = qkv_truth(**inputs)
    bounds = [norm_bound(q_truth, q_squares), norm_bound(k_truth, k_squares)]
    cos, sin = (wide(t)[inputs["positions"]][:, None] for t in inputs["tables"])
    for array, proj, gain in zip(got, inputs["projections"], inputs["gains"], strict=False):
        a = (wide(inputs["x"]) @ wide(proj).T).reshape(T, H, D)
        a = a / np.sqrt(np.mean(a * a, -1, keepdims=True) + eps) * gain
        low, high = a[..., : D // 2], a[..., D // 2 :]
        truth = np.concatenate((low * cos - high * sin, high * cos + low * sin), -1)
        assert_close(side.get(array), truth, bounds.pop(0))


# -------------------------------------------------------------------------------------------- attention


def attention_truth(q, keys, values, positions):
    grouped = q.shape[1] > 2 * keys.shape[1] and keys.dtype == BF16 and q.shape[2] in (64, 128)
    q, keys, values = wide(q), wide(keys), wide(values)
    group, out = q.shape[1] // keys.shape[1], np.empty(q.shape)
    bound = np.empty(q.shape)
    for t, last in enumerate(positions):
        for h in range(q.shape[1]):
            k, v = keys[: last + 1, h // group], values[: last + 1, h // group]
            scores = k @ q[t, h] / np.sqrt(q.shape[2])
            size = np.abs(k) @ np.abs(q[t, h]) / np.sqrt(q.shape[2])
            p = np.exp(scores - scores.max())
            p /= p.sum()
            out[t, h] = p @ v
            # an error e in every score changes the weights by a factor of at most exp(2 e)
            if grouped:  # the bound of kernels/attention_group.cu
                roundings = (last + 1) / 16 + 64 + 47 + (q.shape[2] / 16 + 34) * size.max()
            else:  # at most 13 roundings make a score, its product with 1/sqrt(D) and exp some more. Keys go to 8 to 512
                # groups, these to up to 64 shares
                groups = 256 >> (-(-q.shape[2] // 8) - 1).bit_length()  # at least
                roundings = (last + 1) / groups + groups + 64 + 16 + (13 + 4) * 2 * size.max()
            bound[t, h] = roundings * EPS32 * (p @ np.abs(v)) * 2
    return out, bound


ATTENTION_SHAPES = [(1, 16, 8, 128, 0), (1, 4, 2, 64, 70), (1, 8, 1, 128, 31), (5, 5, 1, 24, 32), (9, 2, 2, 8, 0), (40, 4, 1, 64, 3), (3, 1, 1, 256, 40), (0, 2, 1, 8, 4), (1, 4, 2, 128, 300), (4, 8, 1, 64, 510), (2, 2, 2, 24, 1100), (1, 10, 2, 64, 500), (2, 6, 2, 96, 300), (1, 3, 3, 40, 600), (1, 5, 1, 128, 900), (3, 24, 3, 128, 130), (2, 20, 1, 64, 300)]  # fmt: skip


@pytest.mark.parametrize("kv", STORAGE)
@pytest.mark.parametrize("T,H,K,D,start", ATTENTION_SHAPES)
def test_attention(side, rng, T, H, K, D, start, kv):
    q, used = random(rng, (T, H, D)), start + T
    keys, values = (random(rng, (used + 5, K, D), kv) for _ in range(2))
    keys[used:], values[used:] = np.nan, np.nan  # rows that nobody has written
    positions = np.arange(start, used, dtype=np.int32)
    out = side.put(poisoned(q.shape))
    ops.attention(*map(side.put, (q, keys, values, positions)), out=out)
    assert_close(side.get(out), *attention_truth(q, keys, values, positions))


@pytest.mark.parametrize("scale", [1e-20, 30.0, 300.0])
@pytest.mark.parametrize("heads", [2, 3])
def test_attention_extreme_scores(side, rng, scale, heads):
    """From all scores equal to one score winning by hundreds."""
    q, keys = random(rng, (3, heads, 64), scale=scale), random(rng, (90, 1, 64), BF16)
    values, positions = random(rng, (90, 1, 64), BF16), np.array([0, 45, 89], np.int32)
    got = side.get(ops.attention(*map(side.put, (q, keys, values, positions))))
    assert_close(got, *attention_truth(q, keys, values, positions))


@pytest.mark.parametrize("last", [0, 127, 128, 255, 256, 511, 512, 700, 2499])
@pytest.mark.parametrize("heads", [2, 3])
def test_attention_of_a_short_sequence_in_a_long_cache(side, rng, last, heads):
    """Most of the blocks that share the keys get none."""
    q, (keys, values) = random(rng, (1, heads, 64)), (random(rng, (2500, 1, 64), BF16) for _ in range(2))
    keys[last + 1 :], values[last + 1 :] = np.nan, np.nan
    positions = np.array([last], np.int32)
    got = side.get(ops.attention(*map(side.put, (q, keys, values, positions))))
    assert_close(got, *attention_truth(q, keys, values, positions))


@pytest.mark.parametrize("T,H,K,S", [(1, 396, 132, 300), (2, 99, 33, 600), (1, 18, 1, 2100)])
def test_attention_with_more_keys_than_warps_take_at_once(side, rng, T, H, K, S):
    q, (keys, values) = random(rng, (T, H, 64), scale=4), (random(rng, (S, K, 64), BF16) for _ in range(2))
    positions = np.arange(S - T, S, dtype=np.int32)
    got = side.get(ops.attention(*map(side.put, (q, keys, values, positions))))
    truth, bound = attention_truth(q, keys, values, positions)
    assert_close(got, truth, bound)
    # Less than 1 on an H100, though tensor cores cut where float32 rounds; without the last part of half of q 19 to 42.
    plain = reference.attention(q, keys, values, positions)
    assert np.linalg.norm(got - truth) <= 16 * np.linalg.norm(plain - truth)


@pytest.mark.parametrize("tokens,rows", [(2, 700), (5, 20)])
@pytest.mark.parametrize("heads,dim", [(2, 8), (3, 64)])
def test_attention_beyond_the_cache(side, rng, tokens, rows, heads, dim):
    q, keys = random(rng, (tokens, heads, dim)), random(rng, (rows, 1, dim), BF16)
    positions = np.zeros(tokens, np.int32)
    positions[1] = rows
    if side is Reference:
        with pytest.raises(ValueError, match="attention: positions: wanted"):
            ops.attention(q, keys, keys, positions)
    else:
        got = side.get(ops.attention(*map(side.put, (q, keys, keys, positions))))
        assert np.all(np.isnan(got[1])) and np.all(np.isfinite(np.delete(got, 1, 0)))


@pytest.mark.parametrize("T,S", [(6, 6), (2, 900)])
@pytest.mark.parametrize("heads,dim", [(4, 32), (6, 64)])
def test_attention_may_overwrite_its_queries(side, rng, T, S, heads, dim):
    q, rows = random(rng, (T, heads, dim)), random(rng, (S, 2, dim), BF16)
    positions = np.arange(S - T, S, dtype=np.int32)
    queries = side.put(q.copy())
    ops.attention(queries, side.put(rows), side.put(rows), side.put(positions), out=queries)
    assert_close(side.get(queries), *attention_truth(q, rows, rows, positions))


# ------------------------------------------------------------------------------------ silu_mul, argmax


@pytest.mark.parametrize("shape", [(1,), (3, 257), (0, 8), (2, 3, 100)])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 50.0, 1e30])
def test_silu_mul(side, rng, shape, scale):
    gate, up = random(rng, shape, scale=scale), random(rng, shape)
    out = side.put(poisoned(shape))
    ops.silu_mul(side.put(gate), side.put(up), out=out)
    with np.errstate(over="ignore"):
        truth = wide(gate) / (1 + np.exp(-wide(gate))) * wide(up)
    # from gate = -88.7 on exp overflows in float32 and the result is 0 where the truth is below 1e-36
    assert_close(side.get(out), truth, 6 * EPS32 * np.abs(truth) + 1e-36 * np.abs(wide(up)))


def test_silu_mul_rounds_once_to_bf16(side, rng):
    gate, up = random(rng, (3, 100)), random(rng, (3, 100))
    out = side.put(poisoned((3, 100), BF16))
    assert ops.silu_mul(side.put(gate), side.put(up), out=out) is out
    truth = wide(gate) / (1 + np.exp(-wide(gate))) * wide(up)
    assert_close(side.get(out), truth, 6 * EPS32 * np.abs(truth))


def swiglu_truth(x, gate_proj, up_proj):
    """(value, bound on its error before the last rounding) from those of the two products."""
    x, gate_proj, up_proj = map(wide, (x, gate_proj, up_proj))
    g, u = x @ gate_proj.T, x @ up_proj.T
    e_g, e_u = (product_terms(x) * EPS32 * (np.abs(x) @ np.abs(w).T) for w in (gate_proj, up_proj))
    with np.errstate(over="ignore"):
        silu = g / (1 + np.exp(-g))
    bound = 1.1 * e_g * np.abs(u) + np.abs(silu) * e_u + 1.1 * e_g * e_u + 6 * EPS32 * np.abs(silu * u)
    return silu * u, bound + 1e-36 * np.abs(u)  # exp overflows in float32, see test_silu_mul


def product_terms(x):
    """Roundings of a dot product: by rows of x (up to 4) the bound of WarpDots, else those of kernels/mma.cuh, which are
    above that of one sum in any order."""
    C = x.shape[-1]
    return C / 32 + 14 if x.size <= 4 * C else max(11 / 8 * C, C / 32 + 90) + 2


@pytest.mark.parametrize("T,F,C", [(1, 64, 64), (1, 513, 1000), (4, 100, 96), (3, 9, 7), (2, 33, 1032), (1, 40, 2304), (0, 8, 16), (7, 65, 33), (9, 1, 1)])  # fmt: skip
@pytest.mark.parametrize("dtype", STORAGE)
def test_swiglu(side, rng, T, F, C, dtype):
    x, weights = random(rng, (T, C)), [random(rng, (F, C), dtype, 2 * C**-0.5) for _ in range(2)]
    out = side.put(poisoned((T, F)))
    assert ops.swiglu(side.put(x), *map(side.put, weights), out=out) is out
    assert_close(side.get(out), *swiglu_truth(x, *weights))


@pytest.mark.parametrize("T", [1, 3, 6])
@pytest.mark.parametrize("x_type,out_type", [(BF16, F32), (F32, BF16), (BF16, BF16)])
def test_swiglu_of_and_to_bf16(side, rng, T, x_type, out_type):
    x, weights = random(rng, (2, T, 200), x_type)[0], [random(rng, (40, 200), BF16, 0.1) for _ in range(2)]
    out = side.put(poisoned((T, 40), out_type))
    ops.swiglu(side.put(x), *map(side.put, weights), out=out)
    assert_close(side.get(out), *swiglu_truth(x, *weights))


@pytest.mark.parametrize("scale", [1e-12, 1e6, 1e12])
def test_swiglu_extreme_scales(side, rng, scale):
    x, weights = random(rng, (2, 96), scale=scale), [random(rng, (24, 96), BF16) for _ in range(2)]
    assert_close(side.get(ops.swiglu(side.put(x), *map(side.put, weights))), *swiglu_truth(x, *weights))


def test_swiglu_is_two_products_and_silu_mul(side, rng):
    """Bit for bit where as many warps share a sum, here 2,048 columns or more."""
    x, weights = side.put(random(rng, (1, 64))), [side.put(random(rng, (4096, 64), BF16)) for _ in range(2)]
    got = side.get(ops.swiglu(x, *weights))
    assert np.array_equal(got, side.get(ops.silu_mul(*(ops.matmul(x, w) for w in weights))))


@pytest.mark.parametrize("C", [552, 1064, 2088, 4136])
def test_many_warps_share_a_product(side, rng, C):
    """Few columns, long sums: 2, 4, 8 and 8 warps."""
    for T in (1, 3):
        x, weight = random(rng, (T, C)), random(rng, (21, C), BF16)
        got = side.get(ops.matmul(side.put(x), side.put(weight)))
        bound = product_terms(x) * EPS32 * (np.abs(wide(x)) @ np.abs(wide(weight)).T)
        assert_close(got, wide(x) @ wide(weight).T, bound)


# --------------------------------------------------------------------------- many rows, on tensor cores


@pytest.fixture(params=["mma_few", "mma_middle", "mma_wide"])
def shape(request, side, monkeypatch):
    """Each tile of kernels/mma.cuh, whatever `cuda` would choose."""
    if side is Reference and request.param != "mma_few":
        pytest.skip("NumPy has no tiles")
    monkeypatch.setattr(tiles, "choose", lambda *_: request.param)
    return request.param


def test_the_tile_that_is_chosen():
    def choice(rows, columns, x_type=BF16, head=0):
        return tiles.choose(np.dtype(x_type), 8, head, False, rows, columns)

    assert [choice(rows, 4096) for rows in (5, 32, 128, 512, 2048)] == [
        "mma_few",
        "mma_few",
        "mma_middle",
        "mma_wide",
        "mma_wide",
    ]
    assert [choice(rows, 1024) for rows in (5, 128, 512, 2048)] == ["mma_few", "mma_few", "mma_middle", "mma_wide"]
    assert [choice(rows, 1024, F32) for rows in (5, 512, 2048)] == ["mma_few", "mma_middle", "mma_wide"]
    assert [choice(rows, 4096, BF16, 128) for rows in (5, 2048)] == ["mma_few", "mma_wide"]


def check_products(side, rng, T, N, C, x_type):
    """Ragged in rows, columns and depth; in place; what lies beside the output stays."""
    x, weights = random(rng, (T, C), x_type), [random(rng, (N, C), BF16, C**-0.5) for _ in range(2)]
    residual, memory = random(rng, (T, N)), side.put(poisoned((T + 2, N)))
    stream = memory[1 : T + 1]
    stream[...] = side.put(residual)
    got, truth, bound = check_matmul(side, x, weights[0], residual=stream, out=stream)
    assert_close(got, truth + residual, bound + EPS32 * np.abs(truth + residual))
    assert np.all(np.isnan(side.get(memory)[[0, T + 1]]))
    for out_type in (F32, BF16):
        memory = side.put(poisoned((T + 2, N), out_type))
        ops.swiglu(side.put(x), *map(side.put, weights), out=memory[1 : T + 1])
        got = side.get(memory)
        assert_close(got[1 : T + 1], *swiglu_truth(x, *weights))
        assert np.all(np.isnan(got[[0, T + 1]].astype(F32)))


@pytest.mark.parametrize("x_type", [BF16, F32])
@pytest.mark.parametrize("T,N,C", [(5, 31, 72), (17, 40, 136), (70, 257, 8), (130, 66, 264)])
def test_products_of_many_rows(side, rng, shape, T, N, C, x_type):
    check_products(side, rng, T, N, C, x_type)


@pytest.mark.parametrize("x_type", [BF16, F32])
def test_sums_of_one_sign(side, rng, x_type):
    """What tensor cores cut off adds up: they round toward zero."""
    x, weight = np.abs(random(rng, (5, 4104), x_type)), np.abs(random(rng, (9, 4104), BF16))
    got = side.get(ops.matmul(side.put(x), side.put(weight)))
    truth = wide(x) @ wide(weight).T
    terms = 4104 / 32 + 90 if side is not Reference and x_type == F32 else 11 / 8 * 4104
    assert_close(got, truth, terms * EPS32 * truth)


@pytest.mark.parametrize("T", [5, 65])
@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1.0, 1e10, 1e30, 1e38])
def test_float32_rows_keep_all_their_bits(side, rng, shape, T, scale):
    """By a permutation: the parts into which a value is cut add up to it, and no part is lost."""
    x = (rng.uniform(1, 2, (T, 64)) * rng.choice([-1, 1], (T, 64)) * scale).astype(F32)
    order = rng.permutation(64)
    got = side.get(ops.matmul(side.put(x), side.put(np.eye(64, dtype=BF16)[order])))
    assert np.array_equal(got, x[:, order])


def test_the_largest_float32_row(side, shape):
    x = np.full((5, 16), np.finfo(F32).max)
    x[1], x[2, 3] = -x[1], 0
    got = side.get(ops.matmul(side.put(x), side.put(np.eye(16, dtype=BF16))))
    assert np.array_equal(got, x)


def check_tiles_agree(side, rng, monkeypatch, D, N, x_type, parts):
    """Each (tile, slice of the rows) of `parts` against the first, which has them all: bit for bit."""
    inputs = qkv_inputs(rng, parts[0][1].stop, 2, 1, D, 104, bias=True)
    x, gate, up = inputs["x"].astype(x_type), *(random(rng, (N, 104), BF16) for _ in range(2))
    whole = None
    for tile, few in parts:
        rows = side.put(x[few])
        with_heads = tile if tile != "wgmma_few" else "wgmma_middle"
        monkeypatch.setattr(tiles, "choose", lambda *_, tile=with_heads: tile)
        results = run_qkv_rope(side, {**inputs, "x": x[few], "positions": inputs["positions"][few]})
        monkeypatch.setattr(tiles, "choose", lambda *_, tile=tile: tile)
        results += ops.matmul(rows, side.put(gate)), ops.swiglu(rows, side.put(gate), side.put(up))
        results = [side.get(array) for array in results]
        whole = whole or results
        for got, expected in zip(results, whole, strict=True):
            assert np.array_equal(got, expected[few])


@pytest.mark.parametrize("x_type", [BF16, F32])
@pytest.mark.parametrize("D", [64, 128])
def test_a_row_is_the_same_in_every_tile(side, rng, monkeypatch, x_type, D):
    if side is Reference:
        pytest.skip("the order in which OpenBLAS adds depends on the shape")
    parts = (
        ("mma_wide", slice(0, 130)),
        ("mma_middle", slice(0, 130)),
        ("mma_few", slice(60, 93)),
        ("mma_wide", slice(3, 8)),
    )
    check_tiles_agree(side, rng, monkeypatch, D, 40, x_type, parts)


def check_heads(side, rng, T, H, K, D, C, bias, gain, x_type, cached):
    """k and v to rows of a cache of `cached` rows, in any order; those outside of it go nowhere."""
    inputs, rows = qkv_inputs(rng, T, H, K, D, C, bias=bias, gain=gain), rng.permutation(T + 3)[:T].astype(np.int32)
    inputs["x"] = inputs["x"].astype(x_type)
    q, q_ms, k_ms = (side.put(poisoned(shape)) for shape in ((T, H, D), (T, H), (T, K)))
    keys, values = side.put(poisoned((cached, K, D))), side.put(poisoned((cached, K, D), BF16))
    run_qkv_rope(side, inputs, out=(q, keys, values, q_ms, k_ms), rows=side.put(rows))
    truths, stored = qkv_truth(**inputs), rows < cached
    others = np.setdiff1d(np.arange(cached), rows)
    for array, (truth, bound) in zip((q, q_ms, k_ms), (truths[0], *truths[3:]), strict=True):
        assert_close(side.get(array), truth, bound)
    for array, (truth, bound) in zip((keys, values), truths[1:3], strict=True):
        got = side.get(array)
        assert_close(got[rows[stored]], truth[stored], bound[stored])
        assert np.all(np.isnan(got[others].astype(F32)))


@pytest.mark.parametrize("x_type", [BF16, F32])
@pytest.mark.parametrize("bias,gain", [(False, True), (True, False)])
@pytest.mark.parametrize("T,H,K,D,C", [(17, 1, 1, 128, 40), (65, 2, 1, 128, 72), (66, 3, 2, 64, 40)])
def test_qkv_rope_of_many_rows(side, rng, shape, T, H, K, D, C, bias, gain, x_type):
    """Whole heads a tile, one or two, of one kind or of two."""
    check_heads(side, rng, T, H, K, D, C, bias, gain, x_type, cached=T + 3)


@pytest.mark.parametrize(
    "rows,N", [(1, 1), (1, 31), (1, 151936), (3, 1025), (5, 4096), (0, 7), (2, 4099), (3, 9001), (1, 300001)]
)
def test_argmax(side, rng, rows, N):
    x = random(rng, (rows, N))
    out = side.put(np.full(rows, -7, np.int32))
    ops.argmax(side.put(x), out=out)
    assert np.array_equal(side.get(out), np.argmax(x, -1))


@pytest.mark.parametrize("N", [300, 9001])
def test_argmax_finds_it_anywhere(side, N):
    """Whichever thread and block has it, the last one as well."""
    places = np.append(np.arange(0, N, N // 13), N - 1)
    x = np.zeros((len(places), N), F32)
    x[np.arange(len(places)), places] = 1
    assert np.array_equal(side.get(ops.argmax(side.put(x))), places)


@pytest.mark.parametrize("N", [2000, 20000, 20001])
def test_argmax_ties_infinities_and_nan(side, N):
    x = np.full((6, N), -1.0, F32)
    x[0, [7, 1500]] = 3.0
    x[1, :] = -np.inf
    x[2, [1999, 40]] = np.inf
    x[3, [1033, 1900]] = np.nan, np.inf
    x[4, [1, 2]] = 0.0, -0.0
    x[5, [3, 4]] = -0.0, 0.0
    assert np.array_equal(side.get(ops.argmax(side.put(x))), np.argmax(x, -1))


# ---------------------------------------------------------------------------- what holds for all of them


def test_float64_is_float64_throughout(rng):
    inputs = qkv_inputs(rng, 3, 2, 1, 16, 24)
    inputs = {k: [wide(a) for a in v] if isinstance(v, (list, tuple)) else v for k, v in inputs.items()}
    inputs["x"], inputs["tables"] = wide(inputs["x"]), rope_table(16, 21, 1e4, np.float64)
    got = run_qkv_rope(Reference, inputs)
    for array, (truth, bound) in zip(got, qkv_truth(**inputs), strict=True):
        assert array.dtype == np.float64 and np.all(np.abs(array - truth) <= bound * 2.0**-29)
    x = rng.standard_normal((2, 8))
    assert np.array_equal(ops.rmsnorm(x, np.ones(8)), x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-6))
    for array in (
        ops.matmul(x, x),
        ops.silu_mul(x, x),
        ops.embed(np.array([1]), x),
        *ops.qk_norm(*[x[:, None]] * 2, x[:, :1], x[:, :1] ** 2),
    ):
        assert array.dtype == np.float64


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("more", [0, 1])
def test_a_row_does_not_depend_on_the_rows_beside_it(side, rng, rows, more):
    """Bit for bit, up to 4 rows and beyond; between the two they sum in different orders."""
    if side is Reference:
        pytest.skip("NumPy's BLAS chooses its own order of summation")
    rows, total = (rows, 4) if not more else (rows + 4, 40)
    x, weight = random(rng, (total, 96)), side.put(random(rng, (70, 96), BF16))
    few, many = (side.get(ops.matmul(side.put(x[:n]), weight)) for n in (rows, total))
    assert np.array_equal(few, many[:rows])
    few, many = (side.get(ops.swiglu(side.put(x[:n]), weight, weight)) for n in (rows, total))
    assert np.array_equal(few, many[:rows])
    inputs = qkv_inputs(rng, total, 2, 1, 32, 96)
    cut = {**inputs, "x": inputs["x"][:rows], "positions": inputs["positions"][:rows]}
    for few, many in zip(run_qkv_rope(side, cut), run_qkv_rope(side, inputs), strict=True):
        assert np.array_equal(side.get(few), side.get(many)[:rows])
    q, positions = random(rng, (total, 5, 64)), np.arange(50, 50 + total, dtype=np.int32)
    for kv in (F32, BF16):  # so few of them that no two blocks share a head's
        keys = side.put(random(rng, (90, 1, 64), kv))
        calls = ((side.put(q[:n]), keys, keys, side.put(positions[:n])) for n in (rows, total))
        few, many = (side.get(ops.attention(*call)) for call in calls)
        assert np.array_equal(few, many[:rows])


@pytest.mark.parametrize("T", [1, 4])
def test_counters_are_left_zero(side, rng, T):
    """By what sums up in its last block, whatever ran before: repeated calls, other sizes, other rows."""
    if side is Reference:
        pytest.skip("NumPy has no blocks")
    x = random(rng, (T, 9000))
    for heads in (3, 1, 2, 3):
        inputs = qkv_inputs(rng, T, heads, 1, 128, 64)
        for array, (truth, bound) in zip(run_qkv_rope(side, inputs), qkv_truth(**inputs), strict=True):
            assert_close(side.get(array), truth, bound)
        assert np.array_equal(side.get(ops.argmax(side.put(x))), np.argmax(x, -1))
        assert not side.get(launch.workspace()).any()


@pytest.mark.gpu
def test_every_stream_and_every_recording_has_counters_of_its_own(rng):
    import cupy

    x = [Gpu.put(random(rng, (3, 9000))) for _ in range(2)]
    truth = [array.get().argmax(-1) for array in x]
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(2)]
    counters = []
    for stream in streams:
        with stream:
            counters.append(launch.workspace())
            assert launch.workspace() is counters[-1]
    assert counters[0].data.ptr != counters[1].data.ptr != launch.workspace().data.ptr
    cupy.cuda.Device().synchronize()
    recordings = [launch.record(lambda array=array: (ops.argmax(array), launch.workspace())) for array in x]
    assert len({array.data.ptr for array in (*counters, launch.workspace(), *(r[1][1] for r in recordings))}) == 5
    for _ in range(50):  # at once
        for (start, _), stream in zip(recordings, streams, strict=True):
            with stream:
                start()
    cupy.cuda.Device().synchronize()
    for (_, (found, left)), expected in zip(recordings, truth, strict=True):
        assert np.array_equal(found.get(), expected) and not left.get().any()


@pytest.mark.gpu
def test_hundred_runs_are_identical(rng):
    x, weight = Gpu.put(random(rng, (33, 1024))), Gpu.put(random(rng, (2048, 1024), BF16))
    inputs, q = qkv_inputs(rng, 33, 16, 8, 128, 1024), Gpu.put(random(rng, (33, 16, 128)))
    keys, positions = Gpu.put(random(rng, (500, 8, 128), BF16)), Gpu.put(np.arange(467, 500, dtype=np.int32))
    last = positions[-1:]

    def results():
        yield from run_qkv_rope(Gpu, inputs)
        yield from (ops.matmul(x, weight), ops.matmul(x[:1], weight), ops.rmsnorm(x, weight[0]))
        yield from (ops.swiglu(x[:1], weight, weight), ops.swiglu(x[:3], weight, weight))
        yield from run_qkv_rope(Gpu, {**inputs, "x": inputs["x"][:1], "positions": inputs["positions"][:1]})
        yield ops.attention(q, keys, keys, positions)
        yield ops.attention(q[:1], keys, keys, last)

    first = [array.get() for array in results()]
    for _ in range(100):
        assert all(np.array_equal(a.get(), b) for a, b in zip(results(), first, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("hidden,heads,kv_heads,ffn", [(1024, 16, 8, 3072), (2560, 32, 8, 9728), (5120, 64, 8, 25600)])
@pytest.mark.parametrize("T", [1, 3, 17, 130])
def test_real_sizes_on_the_gpu(rng, hidden, heads, kv_heads, ffn, T):
    """The shapes of 0.6B, 4B and 32B."""
    inputs = qkv_inputs(rng, T, heads, kv_heads, 128, hidden)
    for array, (truth, bound) in zip(run_qkv_rope(Gpu, inputs), qkv_truth(**inputs), strict=True):
        assert_close(array.get(), truth, bound)
    assert_close(*check_matmul(Gpu, random(rng, (T, ffn)), random(rng, (hidden, ffn), BF16)))
    q, rows = random(rng, (T, heads, 128)), random(rng, (700, kv_heads, 128), BF16)
    positions = np.arange(700 - T, 700, dtype=np.int32)
    got = ops.attention(*map(Gpu.put, (q, rows, rows, positions))).get()
    assert_close(got, *attention_truth(q, rows, rows, positions))


@pytest.mark.parametrize("call,error,message", [
    (lambda a: ops.rmsnorm([1.0], a(4)), TypeError, "rmsnorm: x: wanted a NumPy or CuPy array, got list"),
    (lambda a: ops.rmsnorm(a(2, 4), a(5)), ValueError, r"rmsnorm: weight: wanted shape \[C\] with C = 4, got \[5\]"),
    (lambda a: ops.rmsnorm(a(2, 4), a(4), -1.0), ValueError, "rmsnorm: eps: wanted a finite number from 0, got -1.0"),
    (lambda a: ops.rmsnorm(a(2, 0), a(0)), ValueError, "rmsnorm: x: wanted at least one element"),
    (lambda a: ops.rmsnorm(a(2, 4, dtype=np.int32), a(4)), TypeError, "rmsnorm: x: wanted dtype .*, got int32"),
    (lambda a: ops.rmsnorm(a(2, 4), a(4), out=a(4, 4)), ValueError, r"rmsnorm: out: wanted shape \[2, 4\], got \[4, 4\]"),
    (lambda a: ops.matmul(a(2, 4), a(3, 5)), ValueError, r"matmul: weight: wanted shape \[N, C\] with C = 4, got \[3, 5\]"),
    (lambda a: ops.matmul(a(2, 4, dtype=F16), a(3, 4)), TypeError, "matmul: x: wanted dtype .*, got float16"),
    (lambda a: ops.swiglu(a(2, 4), a(3, 4), a(4, 4)), ValueError, r"swiglu: up_proj: wanted shape \[F, C\] with F = 3, C = 4, got \[4, 4\]"),
    (lambda a: ops.swiglu(a(2, 4), a(3, 4), a(3, 4, dtype=BF16)), TypeError, "swiglu: up_proj: wanted dtype"),
    (lambda a: ops.matmul(a(2, 4), a(3, 4), residual=a(2, 2)), ValueError, r"matmul: residual: wanted shape \[\.\.\., N\] with N = 3, got \[2, 2\]"),
    (lambda a: ops.matmul(a(2, 4), a(3, 4), residual=a(4, 3)), ValueError, r"matmul: residual: wanted leading dimensions that broadcast with \[2\], .* got \[4\]"),
    (lambda a: ops.embed(a(2), a(3, 4)), TypeError, "embed: ids: wanted dtype .*, got float32"),
    (lambda a: ops.rmsnorm(a(2, 4), a(4), "1e-6"), TypeError, "rmsnorm: eps: wanted a number, got str"),
    (lambda a: ops.attention(a(1, 2, 0), a(4, 2, 0), a(4, 2, 0), a(1, dtype=np.int32)), ValueError, "attention: q: wanted at least one"),
    (lambda a: ops.attention(a(1, 0, 8), a(4, 2, 8), a(4, 2, 8), a(1, dtype=np.int32)), ValueError, "attention: q: wanted a multiple"),
    (lambda a: ops.argmax(a(2, 3), out=a(2, dtype=np.float64)), TypeError, "argmax: out: wanted dtype int32"),
    (lambda a: ops.silu_mul(a(2), a(3)), ValueError, r"silu_mul: up: wanted leading dimensions that broadcast with \[2\], .* got \[3\]"),
    (lambda a: ops.argmax(a(0)), ValueError, "argmax: x: wanted at least one"),
    (lambda a: ops.attention(a(1, 3, 8), a(4, 2, 8), a(4, 2, 8), a(1, dtype=np.int32)), ValueError, "attention: q: wanted a multiple of K = 2 heads, got 3"),
    (lambda a: ops.attention(a(1, 2, 8), a(4, 2, 8), a(4, 2, 8, dtype=BF16), a(1, dtype=np.int32)), TypeError, "attention: values"),
    (lambda a: ops.qkv_rope(a(1, 4), a(6, 4), a(8, 4), a(8, 4), a(9, 4), a(9, 4), a(1, dtype=np.int32)), ValueError, "qkv_rope: q_proj: wanted a multiple of D = 8 rows"),
    (lambda a: ops.qkv_rope(a(1, 4), a(8, 4), a(8, 4), a(8, 4), a(9, 4), a(9, 4), a(1, dtype=np.int32), out=(None,)), ValueError, "qkv_rope: out: wanted five"),
    (lambda a: ops.qk_norm(a(3, 2, 8), a(3, 2, 8), a(3, 2), a(3, 2), rows=a(2, dtype=np.int32), out=(None, a(9, 2, 8))), ValueError, r"qk_norm: rows: wanted leading dimensions that broadcast with \[3\], .* got \[2\]"),
    (lambda a: ops.qk_norm(a(2, 8), a(2, 8), a(2), a(2), rows=a(1, dtype=np.int32), out=(None, a(9, 2, 4))), ValueError, r"qk_norm: out\[1\] \(k\): wanted shape \[9, 2, 8\], got \[9, 2, 4\]"),
    (lambda a: ops.qk_norm(a(2, 8), a(2, 8), a(2), a(2), rows=1.5), TypeError, "qk_norm: rows: wanted a NumPy or CuPy array, got float"),
    (lambda a: ops.attention(a(2, 8), a(4, 2, 8), a(4, 2, 8), True), TypeError, "attention: positions: wanted a NumPy or CuPy array, got bool"),
    (lambda a: ops.attention(a(3, 2, 8), a(4, 2, 8), a(4, 2, 8), a(2, dtype=np.int32)), ValueError, r"attention: positions: wanted leading dimensions that broadcast with \[3\], .* got \[2\]"),
    (lambda a: ops.attention(a(8), a(4, 2, 8), a(4, 2, 8), 0), ValueError, r"attention: q: wanted shape \[\.\.\., H, D\], got \[8\]"),
    (lambda a: ops.qk_norm(a(1, 2, 8), a(1, 2, 8), a(1, 2), a(1, 2), out=(None, a(9, 2, 8))), ValueError, r"qk_norm: out\[1\] \(k\): wanted shape \[1, 2, 8\]"),
    (lambda a: ops.qk_norm(a(1, 2, 8), a(1, 2, 8), a(1, 2), a(1, 3)), ValueError, "qk_norm: k_ms"),
])  # fmt: skip
def test_refusals(side, call, error, message):
    def array(*shape, dtype=F32):
        return side.put(np.zeros(shape, dtype))

    with pytest.raises(error, match=message):
        call(array)


@pytest.mark.parametrize("lead,positions", [((), ()), ((6,), ()), ((2, 3), (3,)), ((2, 3), (2, 1)), ((3,), (2, 1)), ((0, 2), (2,)), ((2, 1, 3), (1,))])  # fmt: skip
def test_leading_dimensions_broadcast(side, rng, lead, positions):
    """The NumPy way, and then as if they had been one: what the two ways compute is the same, bit for bit."""
    H, K, D, S = 4, 2, 64, 20
    full = np.broadcast_shapes(lead, positions)
    T = math.prod(full)
    inputs = qkv_inputs(rng, T, H, K, D, 96)
    inputs["x"] = random(rng, (*lead, 96))
    inputs["positions"] = np.asarray(rng.integers(0, 12, positions), np.int32)
    at = np.broadcast_to(inputs["positions"], full).reshape(T).copy()
    flat = {**inputs, "x": np.broadcast_to(inputs["x"], (*full, 96)).reshape(T, 96), "positions": at}
    results, truths = run_qkv_rope(side, inputs), run_qkv_rope(side, flat)
    keys, values = (side.put(random(rng, (S, K, D), BF16)) for _ in range(2))
    results += ops.qk_norm(results[0], results[1], *results[3:])
    truths += ops.qk_norm(truths[0], truths[1], *truths[3:])
    results += (ops.attention(results[-2], keys, values, side.put(inputs["positions"])),)
    truths += (ops.attention(truths[-2], keys, values, side.put(at)),)
    cores = ((H, D), (K, D), (K, D), (H,), (K,), (H, D), (K, D), (H, D))
    for got, truth, core in zip(results, truths, cores, strict=True):
        assert got.shape == (*full, *core)
        assert np.array_equal(side.get(got).reshape(T, *core), side.get(truth))
    out = tuple(side.put(poisoned(array.shape)) for array in results)
    again = run_qkv_rope(side, inputs, out=out[:5])
    again += ops.qk_norm(results[0], results[1], *results[3:5], out=out[5:7])
    again += (ops.attention(results[5], keys, values, side.put(inputs["positions"]), out=out[7]),)
    for got, target, expected in zip(again, out, results, strict=True):
        assert got is target and np.array_equal(side.get(got), side.get(expected))
    gate, up = (np.asarray(rng.standard_normal(shape), F32) for shape in (lead, positions))
    got = side.get(ops.silu_mul(side.put(gate), side.put(up)))
    repeated = [side.put(np.broadcast_to(a, full).copy()) for a in (gate, up)]
    assert got.shape == full and np.array_equal(got, side.get(ops.silu_mul(*repeated)))


@pytest.mark.parametrize("lead,rows", [((), 4), ((1, 1), 4), ((1, 3), [0, 5, 2]), ((2, 3), [[3], [1]]), ((2, 3), [[0, 6, 2], [4, 1, 5]])])  # fmt: skip
def test_rows_broadcast(side, rng, lead, rows):
    core, S = (2, 8), 7
    k = random(rng, (*np.shape(rows), *core))  # tokens that share a row have the same k, so that any one's is right
    q, cache = side.put(random(rng, (*lead, 4, 8))), side.put(poisoned((S, *core)))
    at = rows if isinstance(rows, int) else side.put(np.array(rows, np.int32))
    ms = side.put(np.zeros(4, F32)), side.put(np.zeros(2, F32))
    q_out, k_out = ops.qk_norm(q, side.put(k), *ms, 1.0, rows=at, out=(None, cache))
    assert k_out is cache and q_out.shape == (*lead, 4, 8)
    expected = poisoned((S, *core))
    expected[rows] = k
    assert np.array_equal(side.get(cache), expected, equal_nan=True)


def test_a_position_may_be_a_python_int(side, rng):
    q, rows = side.put(random(rng, (3, 2, 64))), side.put(random(rng, (9, 1, 64)))
    got, array = (side.get(ops.attention(q, rows, rows, at)) for at in (5, side.put(np.full(3, 5, np.int32))))
    assert np.array_equal(got, array)
    for far in (9, -1, 2**40, -(2**40)):
        if side is Reference:
            with pytest.raises(ValueError, match=r"attention: positions: wanted 0\.\.8"):
                ops.attention(q, rows, rows, far)
        else:
            assert np.all(np.isnan(side.get(ops.attention(q, rows, rows, far))))


@pytest.mark.parametrize("T", [1, 2, 6])
def test_a_residual_broadcasts(side, rng, T):
    """One row, as a bias is; and one x to which several rows are added."""
    x, weight, bias = random(rng, (T, 96)), random(rng, (40, 96), BF16), random(rng, (40,))
    got, truth, bound = check_matmul(side, x, weight, residual=side.put(bias))
    assert_close(got, truth + bias, bound + EPS32 * np.abs(truth + bias))
    rows = random(rng, (3, T, 40))
    got, truth, bound = check_matmul(side, x, weight, residual=side.put(rows))
    assert_close(got, truth + rows, bound + EPS32 * np.abs(truth + rows))


def test_numpy_takes_any_view(rng):
    x, weight = (rng.integers(-9, 9, shape).astype(F32) for shape in ((96, 4), (96, 40)))  # no sum of these is rounded
    assert np.array_equal(ops.matmul(x.T, weight.T), ops.matmul(x.T.copy(), weight.T.copy()))
    big = np.zeros((3, 2, 5, 2, 8), F32)
    q, k, ms = random(rng, (3, 2, 2, 8)), random(rng, (3, 2, 2, 8)), np.ones((3, 2, 2), F32)
    q_out, _ = ops.qk_norm(q, k, ms, ms, out=(big[:, :, 1], big[:, :, 3]))
    assert q_out.base is big and np.array_equal(big[:, :, 1], ops.qk_norm(q, k, ms, ms)[0])
    assert np.array_equal(big[:, :, 3], ops.qk_norm(q, k, ms, ms)[1]) and not big[:, :, ::2].any()


@pytest.mark.parametrize("call,message", [
    (lambda a, m: ops.rmsnorm(m[:2], a(8), out=m[:2]), "rmsnorm: out: wanted memory of its own, got memory shared with x"),
    (lambda a, m: ops.rmsnorm(a(2, 8), m[0], out=m[:2]), "rmsnorm: out: .* shared with weight"),
    (lambda a, m: ops.matmul(m[:2], a(8, 8), out=m[1:3]), "matmul: out: .* shared with x"),
    (lambda a, m: ops.matmul(a(2, 8), a(8, 8), residual=m[:2], out=m[1:3]), "matmul: out: wanted memory of its own or the very array residual, got memory shared with residual"),
    (lambda a, m: ops.matmul(a(2, 8), a(8, 8), residual=m[0], out=m[:2]), "matmul: out: .* shared with residual"),
    (lambda a, m: ops.silu_mul(m[:2], a(2, 8), out=m[1:3]), "silu_mul: out: .* shared with gate"),
    (lambda a, m: ops.embed(a(2, dtype=np.int32), m, out=m[:2]), "embed: out: .* shared with table"),
    (lambda a, m: ops.attention(a(1, 1, 8), m[:, None], m[:, None], 0, out=m[3:, None]), "attention: out: .* shared with keys"),
    (lambda a, m: ops.qk_norm(m[:1, None], a(1, 1, 8), a(1, 1), a(1, 1), out=(None, m[:1, None])), r"qk_norm: out\[1\] \(k\): .* shared with q"),
    (lambda a, m: ops.qk_norm(a(1, 1, 8), m[:1, None], a(1, 1), a(1, 1), rows=0, out=(None, m[:, None])), r"qk_norm: out\[1\] \(k\): .* shared with k"),
    (lambda a, m: ops.qk_norm(a(1, 1, 8), a(1, 1, 8), a(1, 1), a(1, 1), out=(m[:1, None], m[:1, None])), r"qk_norm: out\[1\] \(k\): .* shared with out\[0\] \(q\)"),
    (lambda a, m: ops.qkv_rope(m[:1], a(8, 8), a(8, 8), a(8, 8), a(9, 4), a(9, 4), 0, out=(m[:1, None], None, None, None, None)), r"qkv_rope: out\[0\] \(q\): .* shared with x"),
])  # fmt: skip
def test_memory_that_results_may_not_share(side, call, message):
    def array(*shape, dtype=F32):
        return side.put(np.zeros(shape, dtype))

    with pytest.raises(ValueError, match=message):
        call(array, array(4, 8))


def test_memory_that_results_may_share(side, rng):
    """The very same array where an operation says so; what lies beside it; nothing at all."""
    x, rows = random(rng, (2, 3, 2, 64)), side.put(random(rng, (6, 2, 64)))
    for make in (
        lambda a: ops.silu_mul(a, side.put(x), out=a),
        lambda a: ops.silu_mul(side.put(x), a, out=a),
        lambda a: ops.attention(a, rows, rows, 5, out=a),
        lambda a: ops.qk_norm(a, side.put(x), *[side.put(np.ones((2, 3, 2), F32))] * 2, out=(a, None))[0],
        lambda a: ops.qk_norm(side.put(x), a, *[side.put(np.ones((2, 3, 2), F32))] * 2, out=(None, a))[1],
    ):
        a = side.put(x.copy())
        assert make(a) is a and not np.array_equal(side.get(a), x)
    memory = side.put(np.ones((4, 64), F32))
    assert np.array_equal(
        side.get(ops.rmsnorm(memory[:2], side.put(np.ones(64, F32)), 0.0, out=memory[2:])), np.ones((2, 64))
    )
    assert ops.rmsnorm(memory[2:2], memory[3], out=memory[2:2]).shape == (0, 64)


def test_refusals_that_only_kernels_make(side, rng):
    if side is Reference:
        pytest.skip("NumPy takes views and any head size")
    a, ids = (lambda *shape: side.put(np.zeros(shape, F32))), side.put(np.zeros(1, np.int32))
    with pytest.raises(ValueError, match="rmsnorm: x: wanted a C-contiguous array, got a view"):
        ops.rmsnorm(a(4, 8).T, a(4))
    with pytest.raises(ValueError, match="attention: D: wanted a multiple of 8 up to 256 on the GPU, got 12"):
        ops.attention(a(1, 1, 12), a(1, 1, 12), a(1, 1, 12), ids)
    with pytest.raises(ValueError, match="qkv_rope: D: wanted a multiple of 4 up to 256 on the GPU, got 6"):
        ops.qkv_rope(a(1, 4), a(6, 4), a(6, 4), a(6, 4), a(9, 3), a(9, 3), ids)
    off = side.put(np.zeros(65, BF16))[1:].reshape(1, 1, 64)
    with pytest.raises(ValueError, match="attention: keys: wanted 16-byte aligned memory"):
        ops.attention(a(1, 1, 64), off, off, ids)
    with pytest.raises(TypeError, match="embed: ids: wanted dtype int32, got int64"):
        ops.embed(side.put(np.zeros(1, np.int64)), a(2, 2))


def test_a_dependent_launch_as_the_driver_gets_it(monkeypatch):
    """The structures of cuda.h by their offsets in bytes, and where each parameter's value is."""
    seen = {}

    def launched(config, function, parameters, extra):
        raw = ctypes.string_at(ctypes.addressof(config._obj), 56)
        attribute = ctypes.string_at(int.from_bytes(raw[40:48], "little"), 72)
        values = [ctypes.string_at(parameters[i], size) for i, size in enumerate((8, 8, 4, 4, 128))]
        seen.update(sizes=np.frombuffer(raw[:28], np.uint32).tolist(), stream=int.from_bytes(raw[32:40], "little"))
        seen.update(number=int.from_bytes(raw[48:52], "little"), function=function.value, values=values, extra=extra)
        seen.update(attribute=np.frombuffer(attribute, np.int32).tolist())
        return 0 if function.value == 99 else 801

    stream = SimpleNamespace(ptr=77)
    monkeypatch.setattr(driver, "functions", lambda: SimpleNamespace(cuLaunchKernelEx=launched))
    cuda = SimpleNamespace(get_current_stream=lambda: stream)
    monkeypatch.setattr(launch, "cupy", lambda: SimpleNamespace(cuda=cuda))
    array = np.zeros(3, np.float32)
    structure = np.arange(16, dtype=np.uint64).view("V128")
    args = (array, None, np.int32(-5), np.float32(1e-6), structure)
    launch._launch_dependent("f", 99, (4, np.int32(2)), (256,), args, 1024)
    assert seen["sizes"] == [4, 2, 1, 256, 1, 1, 1024] and (seen["stream"], seen["number"]) == (77, 1)
    assert seen["attribute"] == [6, 0, 1, *[0] * 15] and seen["extra"] is None
    pointers = array.ctypes.data.to_bytes(8, "little"), bytes(8)
    assert seen["values"] == [*pointers, np.int32(-5).tobytes(), np.float32(1e-6).tobytes(), structure.tobytes()]
    with pytest.raises(launch.DeviceError, match="f: cuLaunchKernelEx: wanted CUDA_SUCCESS, got CUresult 801; update"):
        launch._launch_dependent("f", 1, (1,), (32,), args, 0)


@pytest.mark.parametrize("pairs,width,parts", [(512, 2048, 4), (1024, 2048, 4), (512, 3072, 8), (3072, 1024, 2), (6144, 2048, 1), (9728, 2560, 4), (2048, 12288, 4), (75968, 1024, 1), (20, 96, 1)])  # fmt: skip
def test_warps_that_share_a_dot_product(pairs, width, parts):
    """What was fastest on an H100 at the shapes of Qwen3-0.6B to 8B (kernels/LOG.md)."""
    assert cuda._short_parts(pairs, width) == parts
