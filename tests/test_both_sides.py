"""Every kernel on the CPU and on the GPU, on the same inputs in one process: the two executions agree.

What tests/test_ops.py shows of the sources run on the CPU then holds of the GPU, and the other way round. Where a kernel
uses nothing but +, -, fmaf, / and sqrt the two results are the same bits. Elsewhere the bound of the comparison counts
roundings (eps32 = 2**-24 each) of what the case's `size` gives:

- NVRTC contracts a * b + c to one rounding, the compiler for the CPU does not. Our sums of products are written as fmaf,
  so this concerns rotations and sums of two squares: 5 roundings.
- expf of the GPU is within 2 ulp, that of the CPU within 1: together 6 roundings.
- A tensor core adds the products of a step in an order and with a width of its own: twice the bound of kernels/mma.cuh.

A new kernel is one `Case` in the table below; without one `test_every_entry_point_has_a_case` fails.
"""

import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import ml_dtypes
import numpy as np
import pytest

from cuqwen import launch, ops, rope_table, sources, tiles
from cuqwen.config import Config
from cuqwen.decode_step import DecodeStep
from cuqwen.model import Device, Qwen3
from cuqwen.weights import LayerWeights, Weights

F32, F16, BF16 = np.float32, np.float16, ml_dtypes.bfloat16
EPS32 = 2.0**-24
HALF_ULP = {np.dtype(F32): 2.0**-24, np.dtype(F16): 2.0**-11, np.dtype(BF16): 2.0**-8}


@dataclass(frozen=True)
class Case:
    """One call. `make(random, type)` gives the call's arguments in NumPy arrays; `entries` are the entry points that it
    must launch, `within` the roundings by which each result may differ, 0 for the same bits."""

    entries: str
    operation: Callable
    make: Callable[..., tuple[tuple, dict]]
    within: tuple[float, ...] = (0,)
    size: Callable | None = None  # (*arguments) -> what the roundings count of, for each result; None: the results
    types: tuple = (BF16, F16, F32)
    capability: int = 80  # the compute capability that it needs
    # Of kernels/mma.cuh or wgmma.cuh, where the wrapper would take another one for so few products; "mma": not wgmma.cuh on Hopper
    tile: str = ""


class Random:
    """Random arrays: `random(3, 4)` float32, `random(3, 4, dtype=BF16)`, `random.below(9, 3)` integers."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)

    def __call__(self, *shape, dtype=F32, scale=1.0):
        return (self.rng.standard_normal(shape) * scale).astype(dtype)

    def below(self, n, *shape):
        return self.rng.integers(0, n, shape).astype(np.int32)


def call(*arguments, **named):
    return arguments, named


def empty(*shape, dtype=F32):
    return np.full(shape, np.nan).astype(dtype)


def qkv(r, w, T, H=4, K=2, D=64, C=96, x=F32, bias=True):
    """The arguments of a qkv_rope whose k waits in float32 and whose v goes to rows of a cache of the weights' type."""
    heads = (H, K, K)
    names = ("q_bias", "k_bias", "v_bias")
    named = {name: r(n * D) for name, n in zip(names, heads, strict=True)} if bias else {}
    named |= {name: np.abs(r(D, scale=10)) for name in ("q_norm", "k_norm")}
    rows = r.rng.permutation(T + 5)[:T].astype(np.int32)
    projections = (r(n * D, C, dtype=w, scale=C**-0.5) for n in heads)
    out = (None, None, empty(T + 5, K, D, dtype=w), None, None)
    return call(r(T, C, dtype=x), *projections, *rope_table(D, 40, 1e4), r.below(40, T), rows=rows, out=out, **named)


def absolute(array):
    return np.abs(array.astype(np.float64))


def products(x, weight, *others, residual=None):
    """sum_c |x w|, and the residual."""
    return [absolute(x) @ absolute(weight).T + (0 if residual is None else absolute(residual))]


def qkv_sizes(x, q_proj, k_proj, v_proj, cos, sin, positions, rows, out, q_norm, k_norm, **biases):
    """Of q, k and v the products, times the gain, of both elements of a pair; of a mean square 2 a da."""
    D, sizes, squares = 2 * cos.shape[1], [], []
    for name, proj, gain in (("q", q_proj, q_norm), ("k", k_proj, k_norm), ("v", v_proj, None)):
        [a] = products(x, proj, residual=biases.get(f"{name}_bias"))
        a = a.reshape(len(x), -1, D)
        squares.append(2 * (a * a).mean(-1))
        if gain is None:
            cached = np.zeros(out[2].shape)  # the rows of other tokens stay as they were
            cached[rows] = a
            sizes.append(cached)
        else:
            low, high = np.split(a * gain, 2, -1)
            sizes.append(np.concatenate((low + high,) * 2, -1))
    return [*sizes, *squares[:2]]


def gated_products(x, gate_proj, up_proj, out=None):
    """An error e in all of the products g and u changes silu(g) u by 1.1 e |u| + e |silu(g)| at most."""
    return [2.2 * products(x, gate_proj)[0] * products(x, up_proj)[0]]


def attention(r, kv, T, S, H=4, K=2, D=64):
    return call(r(T, H, D), r(S, K, D, dtype=kv), r(S, K, D, dtype=kv), np.arange(S - T, S, dtype=np.int32))


def prompt(r, kv, q, D, T=150, S=190):
    """Queries of which the last are in a block of their own and the first two nowhere in the cache."""
    positions = np.arange(S - T, S, dtype=np.int32)
    positions[:2] = -1, S
    return call(r(T, 4, D, dtype=q), r(S, 2, D, dtype=kv), r(S, 2, D, dtype=kv), positions, out=empty(T, 4, D, dtype=q))


def largest_value(q, keys, values, positions, out=None):
    return [np.abs(values.astype(F32)).max()]


def rmsnorm_residual(*arguments, residual):
    return ops.rmsnorm(*arguments, residual=residual), residual


def sample(*arguments, **named):
    """All that a draw writes."""
    return ops.sample(*arguments, **named), named["step"], named["history"]


def sampling(r, *settings):
    step, history = np.array([2], np.int32), r.below(3, 3000)
    return call(r(3000, scale=3), *settings, uniforms=r.rng.random(4), step=step, history=history)


def reading(words, out):
    """The number that read_all tells of is among the words."""
    launch.load_function("read", "read_all", ())((2,), (512,), (words, np.int64(len(words)), out))
    return out


NETWORK = Config(
    model_type="qwen3", hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=64, vocab_size=96, max_position_embeddings=64, rms_norm_eps=1e-6, rope_theta=1e4, tie_word_embeddings=True,
    dtype="bfloat16", eos_token_id=(),
)  # fmt: skip


def network(r):
    """The weights of a small Qwen3."""
    C, F, H, K, D = 128, 192, 4, 2, 64
    matrices = {"q_proj": (H * D, C), "k_proj": (K * D, C), "v_proj": (K * D, C), "o_proj": (C, H * D), "gate_proj": (F, C), "up_proj": (F, C), "down_proj": (C, F)}  # fmt: skip
    vectors = {"input_layernorm": C, "post_attention_layernorm": C, "q_norm": D, "k_norm": D}
    layers = [
        {name: r(*shape, dtype=BF16, scale=shape[1] ** -0.5) for name, shape in matrices.items()}
        | {name: 1 + r(size, scale=0.1) for name, size in vectors.items()}
        for _ in range(2)
    ]
    return call(r(96, C, dtype=BF16), layers, 1 + r(C, scale=0.1))


def three_steps(embed_tokens, layers, norm):
    """Logits of three tokens, each the arg-max of the one before; the last id and position; the cache's rows."""
    weights = Weights(embed_tokens, [LayerWeights(**layer) for layer in layers], norm, embed_tokens)
    model = Qwen3(NETWORK, weights, Device.cuda(), BF16)
    cache = model.new_cache(16)
    with mock.patch.object(launch, "resident_blocks", lambda *_: BLOCKS):
        step = DecodeStep(model, cache, 96)
    launch.copy(step.ids, launch.upload(np.array([7], np.int32)))
    launch.copy(step.position, launch.upload(np.array([0], np.int32)))
    logits = []
    for _ in range(3):
        step()
        logits.append(step.logits.copy())
    return *logits, step.ids, step.position, cache.keys[:, :3], cache.values[:, :3]


# With the default sizes, the largest absolute value of a row: q and k are rotated, v is not.
QKV = (5, 5, 0, 5, 5)
# Expf in a weight, in up to four shrinkages and in two merges, above and below the fraction.
ATTENTION = 6 * 7 * 2
# Twice the bound of kernels/attention_mma.cu with scores up to 4: by bf16 queries one weight in two may be rounded otherwise.
ATTENTION_MMA = 2 * (190 / 32 + 176 + 8 * (11 / 8 * 128 + 16))
SILU = 6 + 2
# A token's way through two layers. Not derived: 4 were measured (H100 80GB HBM3, 2026-11-22)
STEP = 100
BLOCKS = 6  # of the launch that is a whole step: they wait for each other


TILES = ("mma_few", 33), ("mma_middle", 130), ("mma_wide", 130)  # with rows of x
WGMMA = ("wgmma_wide", 260), ("wgmma_turns", 260), ("wgmma_middle", 130), ("wgmma_few", 130)


def on_tensor_cores(x, C):
    return 2 * (C / 32 + 90 if x == F32 else 11 / 8 * C)


CASES = [
    Case("embed", ops.embed, lambda r, w: call(r.below(9, 5), r(9, 70, dtype=w))),
    Case("rmsnorm_row", ops.rmsnorm, lambda r, w: call(r(11, 1000, dtype=w), r(1000), out=empty(11, 1000, dtype=w))),
    Case("rmsnorm_lanes", ops.rmsnorm, lambda r, w: call(r(3, 77, dtype=w), r(77, dtype=w))),
    Case("rmsnorm_add_row", rmsnorm_residual, lambda r, w: call(r(3, 5120, dtype=w), r(5120), residual=r(3, 5120))),
    Case("rmsnorm_add_row", rmsnorm_residual, lambda r, w: call(r(3, 1000, dtype=w), r(1000), residual=r(3, 1000))),
    Case("rmsnorm_add_lanes", rmsnorm_residual, lambda r, w: call(r(9, 200, dtype=w), r(200), residual=r(9, 200))),
    Case("rmsnorm_row", ops.rmsnorm, lambda r, w: call(r(3, 1031, dtype=w), r(1031))),
    Case("matmul_row", ops.matmul, lambda r, w: call(r(1, 96), r(40, 96, dtype=w), residual=r(1, 40))),
    Case("matmul_row", ops.matmul, lambda r, w: call(r(1, 2100, dtype=BF16), r(41, 2100, dtype=w))),
    Case("matmul_rows", ops.matmul, lambda r, w: call(r(3, 96), r(40, 96, dtype=w), residual=r(3, 40))),
    Case("matmul_tile", ops.matmul, lambda r, w: call(r(70, 99), r(75, 99, dtype=w), residual=r(70, 75))),
    Case("swiglu_row", ops.swiglu, lambda r, w: call(r(1, 96), r(40, 96, dtype=w), r(40, 96, dtype=w)), (SILU,)),
    Case("swiglu_rows", ops.swiglu, lambda r, w: call(r(3, 96), r(40, 96, dtype=w), r(40, 96, dtype=w), out=empty(3, 40, dtype=BF16)), (SILU,)),
    Case("matmul_tile silu_mul", ops.swiglu, lambda r, w: call(r(7, 96), r(40, 96, dtype=w), r(40, 96, dtype=w)), (SILU,), types=(F16, F32)),
    Case("qkv_rope_row", ops.qkv_rope, lambda r, w: qkv(r, w, 1), QKV),
    Case("qkv_rope_rows", ops.qkv_rope, lambda r, w: qkv(r, w, 3), QKV),
    Case("qkv_rope_tile", ops.qkv_rope, lambda r, w: qkv(r, w, 37, C=99), QKV),
    *(Case(f"matmul_{tile}", ops.matmul, lambda r, w, x=x, T=T: call(r(T, 160, dtype=x), r(75, 160, dtype=w), residual=r(T, 75)), (on_tensor_cores(x, 160),), products, (BF16,), tile=tile) for tile, T in TILES for x in (F32, BF16)),
    *(Case(f"swiglu_{tile}", ops.swiglu, lambda r, w, x=x, T=T: call(r(T, 96, dtype=x), r(75, 96, dtype=w), r(75, 96, dtype=w)), (SILU + on_tensor_cores(x, 96),), gated_products, (BF16,), tile=tile) for tile, T in TILES for x in (F32, BF16)),
    *(Case(f"qkv_rope_{tile}", ops.qkv_rope, lambda r, w, x=x, T=T, D=D: qkv(r, w, T, D=D, x=x), (5 + on_tensor_cores(x, 96),), qkv_sizes, (BF16,), tile=tile) for tile, T in TILES for x, D in ((F32, 128), (BF16, 64))),
    *(Case(f"matmul_{tile}", ops.matmul, lambda r, w, T=T: call(r(T, 160, dtype=BF16), r(272, 160, dtype=w), residual=r(T, 272)), (on_tensor_cores(BF16, 160),), products, (BF16,), 90, tile) for tile, T in WGMMA),
    *(Case(f"swiglu_{tile}", ops.swiglu, lambda r, w, T=T: call(r(T, 96, dtype=BF16), r(144, 96, dtype=w), r(144, 96, dtype=w), out=empty(T, 144, dtype=BF16)), (SILU + on_tensor_cores(BF16, 96),), gated_products, (BF16,), 90, tile) for tile, T in WGMMA),
    *(Case(f"qkv_rope_{tile}", ops.qkv_rope, lambda r, w, T=T, D=D: qkv(r, w, T, D=D, x=BF16), (5 + on_tensor_cores(BF16, 96),), qkv_sizes, (BF16,), 90, tile) for (tile, T), D in zip(WGMMA[:3], (128, 64, 128), strict=True)),
    Case("qk_norm", ops.qk_norm, lambda r, w: call(r(3, 4, 64), r(3, 2, 64), r(3, 4) ** 2, r(3, 2) ** 2, rows=r.rng.permutation(7)[:3].astype(np.int32), out=(None, empty(7, 2, 64, dtype=w)))),
    Case("attention_1", ops.attention, lambda r, w: attention(r, w, 7, 90, H=2, D=24), (ATTENTION,), largest_value),
    Case("attention_2", ops.attention, lambda r, w: attention(r, w, 2, 700), (ATTENTION,), largest_value),
    Case("attention_4", ops.attention, lambda r, w: attention(r, w, 1, 300, H=10, D=96), (ATTENTION,), largest_value),
    *(Case("attention_group", ops.attention, lambda r, w, H=H, D=D: attention(r, w, 2, 700, H=H, D=D), (ATTENTION_MMA,), largest_value, (BF16,)) for H, D in ((6, 64), (10, 128), (18, 64))),
    *(Case("attention_mma", ops.attention, lambda r, w, q=q, D=D: prompt(r, w, q, D), (roundings,), largest_value, (BF16,), tile="mma") for q, D, roundings in ((F32, 64, ATTENTION_MMA), (F32, 128, ATTENTION_MMA), (BF16, 64, 2.0**16), (BF16, 128, 2.0**16))),
    *(Case("attention_wgmma", ops.attention, lambda r, w, D=D: prompt(r, w, BF16, D), (2.0**16,), largest_value, (BF16,), 90, "wgmma") for D in (64, 128)),
    Case("silu_mul", ops.silu_mul, lambda r, w: call(r(3, 257, scale=20), r(3, 257), out=empty(3, 257, dtype=w)), (SILU,), types=(F32, BF16)),
    Case("argmax_row", ops.argmax, lambda r, w: call(r(3, 3000)), types=(F32,)),
    Case("argmax_row", ops.argmax, lambda r, w: call(r(3, 9000)), types=(F32,)),
    *(Case("sample", sample, lambda r, w, settings=settings: sampling(r, *settings), types=(F32,)) for settings in ((), (0.8,), (0.8, 20), (0.8, 2500), (1.0, 0, 0.9), (1.0, 0, 1.0, 0.05), (0.7, 20, 0.95, 0.02, 1.2, 0.3, 0.1))),
    Case("read_all", reading, lambda r, w: call(np.eye(9000, 4, k=2 - 8191, dtype=np.uint32) * np.uint32(0x12345678), np.zeros(1, np.uint32)), types=(F32,)),
    Case("decode_step", three_steps, lambda r, w: network(r), (STEP, STEP, STEP, 0, 0, STEP, STEP), types=(BF16,), capability=90),
]  # fmt: skip
PARAMETERS = [
    pytest.param(case, dtype, id=f"{number}-{case.entries.replace(' ', '+')}-{np.dtype(dtype).name}")
    for number, case in enumerate(CASES)
    for dtype in case.types
]


def entry_points():
    """The names behind `extern "C" __global__` in kernels/."""
    for path in sources.KERNEL_FOLDER.glob("*.cu"):
        text = re.sub(r"//.*", "", path.read_text())
        for declared in re.findall(r'extern\s+"C"\s+__global__([^{;]*)', text):
            without_bounds = re.sub(r"__\w+__\s*\((?:[^()]|\([^()]*\))*\)", "", declared)
            yield re.search(r"(\w+)\s*\(", without_bounds)[1]


@contextlib.contextmanager
def noted_launches():
    """Inside, every launch is also noted as (file, entry point, constants, grid, block, bytes of shared memory)."""
    launches, load_function = [], launch.load_function

    def noting(file, entry, defines):
        start = load_function(file, entry, defines)

        def noted(grid, block, args, shared_bytes=0, dependent=False):
            launches.append((file, entry, defines, tuple(map(int, grid)), tuple(map(int, block)), int(shared_bytes)))
            start(grid, block, args, shared_bytes, dependent)

        return noted

    launch.load_function = noting
    try:
        yield launches
    finally:
        launch.load_function = load_function


def placed(value, put):
    """`value` with every array in it put somewhere else."""
    if isinstance(value, np.ndarray):
        return put(value.copy())
    if isinstance(value, (tuple, list)):
        return type(value)(placed(item, put) for item in value)
    return {key: placed(item, put) for key, item in value.items()} if isinstance(value, dict) else value


def execute(case, arguments, put, get):
    """(the call's results as NumPy arrays, what was launched for them)."""
    forced = mock.patch.object(tiles, "choose", lambda *_: case.tile) if case.tile else contextlib.nullcontext()
    without = (
        mock.patch.object(launch, "wgmma_processors", lambda: 0) if case.tile == "mma" else contextlib.nullcontext()
    )
    with noted_launches() as launches, forced, without:
        positional, named = placed(arguments, put)
        results = case.operation(*positional, **named)
    return [get(a) for a in (results if isinstance(results, tuple) else (results,))], launches


def arguments_of(case, dtype):
    return case.make(Random(sum(map(ord, case.entries))), dtype)


def emulate(case, arguments, request):
    settings = request.getfixturevalue("emulated_gpu")
    settings.orders, settings.resident_blocks = ("ascending",), BLOCKS  # other tests compare the orders of threads
    processors = (
        mock.patch.object(launch, "wgmma_processors", lambda: 132)
        if case.tile.startswith("wgmma")
        else contextlib.nullcontext()
    )
    with processors:
        return execute(case, arguments, lambda array: array, lambda array: array)


def assert_agree(case, arguments, gpu, cpu):
    within = case.within * len(cpu) if len(case.within) == 1 else case.within
    positional, named = arguments
    sizes = [np.abs(a.astype(np.float64)) for a in cpu]
    sizes = [a.max(axis=-1, keepdims=True, initial=0, where=~np.isnan(a)) for a in sizes]
    if case.size is not None:
        sizes = case.size(*positional, **named)
    for number, (a, b, roundings, size) in enumerate(zip(gpu, cpu, within, sizes, strict=True)):
        assert a.dtype == b.dtype and a.shape == b.shape and np.isfinite(b).any()
        if roundings == 0:
            different = np.flatnonzero(~((a == b) | ((a != a) & (b != b))))
            assert not different.size, (
                f"result {number}: {different.size} of {a.size} differ, first at {different[0]}: {a.flat[different[0]]} on the GPU, {b.flat[different[0]]} on the CPU"
            )
            continue
        assert np.array_equal(np.isnan(a), np.isnan(b))
        bound = roundings * EPS32 * size
        if b.dtype != F32:  # a difference before the last rounding may move it by one unit in the last place
            bound = bound + 2 * HALF_ULP[b.dtype] * np.abs(b.astype(np.float64))
        error = np.abs(a.astype(np.float64) - b.astype(np.float64))
        worst = np.nanmax(error / np.maximum(bound, 1e-300), initial=0)
        assert worst <= 1, f"result {number}: worst {worst:.2f} times the bound"


@pytest.mark.gpu
@pytest.mark.parametrize("case,dtype", PARAMETERS)
def test_both_executions_agree(case, dtype, request):
    if int(launch.cupy().cuda.Device().compute_capability) < case.capability:
        pytest.skip(f"needs compute capability {case.capability / 10}")
    arguments = arguments_of(case, dtype)
    gpu, launched = execute(case, arguments, launch.upload, lambda array: array.get())
    cpu, launched_too = emulate(case, arguments, request)  # from here on the package's GPU is the CPU
    assert launched == launched_too and {entry for _, entry, *_ in launched} == set(case.entries.split())
    assert_agree(case, arguments, gpu, cpu)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.entries.replace(" ", "+"))
def test_cases_launch_what_they_name(case, request):
    arguments = arguments_of(case, case.types[0])
    results, launched = emulate(case, arguments, request)
    assert {entry for _, entry, *_ in launched} == set(case.entries.split())
    assert_agree(case, arguments, results, results)  # that the bounds have the results' shapes


def test_every_entry_point_has_a_case():
    covered = {entry for case in CASES for entry in case.entries.split()}
    assert covered == set(entry_points())


@pytest.mark.parametrize("off,caught", [(0, False), (2.0**-23, True)])
def test_the_comparison_notices_one_bit(off, caught):
    case = next(case for case in CASES if case.entries == "matmul_row")
    one, other = np.ones((3, 40), F32), np.ones((3, 40), F32)
    other[2, 3] += off
    with pytest.raises(AssertionError, match=r"1 of 120 differ, first at 83") if caught else contextlib.nullcontext():
        assert_agree(case, call(), [other], [one])
