"""The emulator that runs our kernels on the CPU: what it computes is CUDA, and what it is there to catch, it catches."""

import contextlib
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import emulator
import ml_dtypes
import numpy as np
import nvrtc
import pytest
from cuda_cpu import build

from cuqwen import launch, ops, reference

PLANTED = Path(__file__).parent / "planted"
BF16 = ml_dtypes.bfloat16
LANES = np.arange(32)
F32 = (("OUT_TYPE", "f32"),)

pytestmark = emulator.needs_emulator


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def intrinsics(request):
    """Calls an entry point of planted/<file>.cu; on the CPU in all thread orders, with `-m gpu` on the GPU instead."""

    def on_a_gpu(entry, grid, block, *args, shared_bytes=0, cooperative=False, file="intrinsics"):
        cupy = launch.cupy()
        if file.endswith("sm90") and int(cupy.cuda.Device().compute_capability) < 90:
            pytest.skip("needs sm_90")
        function = launch.load_function(str(PLANTED / file), entry, ())
        # CuPy takes a structure as an array of one
        there = [
            cupy.asarray(a) if isinstance(a, np.ndarray) else np.array([a]) if isinstance(a, np.void) else a
            for a in args
        ]
        function(grid, block, tuple(there), shared_bytes)
        for here, result in zip(args, there, strict=True):
            if isinstance(here, np.ndarray):
                here[...] = result.get()

    on_a_gpu.on = "gpu"
    return on_a_gpu if request.param == "gpu" else request.getfixturevalue("on_the_cpu")


@pytest.fixture
def on_the_cpu():
    def call(entry, grid, block, *args, shared_bytes=0, cooperative=False, file="intrinsics"):
        function = emulator.load_function(str(PLANTED / file), entry, (), cooperative=cooperative)
        with emulator.orders():
            function(grid, block, args, shared_bytes)

    call.on = "cpu"
    return call


def planted(file, entry):
    return emulator.load_function(str(PLANTED / file), entry)


# ---- it is CUDA ----


@pytest.mark.parametrize(
    "argument, width", [(0, 32), (1, 32), (5, 32), (16, 32), (31, 32), (1, 8), (3, 4), (2, 16), (7, 8)]
)
def test_shuffles(intrinsics, rng, argument, width):
    x = rng.integers(-1000, 1000, 32).astype(np.int32)
    out = np.zeros((10, 32), np.int32)
    intrinsics("shuffles", (1,), (32,), out, x, np.int32(argument), np.int32(width))
    segment = LANES // width * width

    def up(width):
        return np.where(LANES % width >= argument, LANES - argument, LANES)

    def down(width):
        return np.where(LANES % width + argument < width, LANES + argument, LANES)

    xor = LANES ^ argument
    sources = [
        np.full(32, argument), segment + argument % width, up(32), up(width), down(32), down(width),
        xor, np.where(xor < segment + width, xor, LANES), x & 31, xor,
    ]  # fmt: skip
    np.testing.assert_array_equal(out, np.stack([x[s] for s in sources]))


def test_halves_of_a_warp_with_masks_of_their_own(intrinsics, rng):
    x, out = rng.integers(0, 1000, 32).astype(np.int32), np.zeros(32, np.int32)
    intrinsics("half_warps", (1,), (32,), out, x)
    v = np.where(LANES < 16, x[:16].sum() + x[3], x[16:].max())
    np.testing.assert_array_equal(out, v + v[::-1])


def test_votes_and_warp_reductions(intrinsics, rng):
    x, out = rng.integers(-500, 500, 32).astype(np.int32), np.zeros((13, 32), np.uint32)
    intrinsics("votes", (1,), (32,), out, x)
    u = x.astype(np.uint32)
    ballot = int(((x > 0) << LANES.astype(np.uint64)).sum())
    match = [int(((x & 3) == (v & 3)).astype(np.uint64) @ (1 << LANES.astype(np.uint64))) for v in x]
    bits = np.bitwise_and.reduce(u | 8) ^ np.bitwise_or.reduce(u & 0xF0F)
    rows = [
        ballot, 0, 1, 1, 0, match, u.sum(dtype=np.uint32), u.min(), u.max(), x.min().astype(np.uint32),
        x.max().astype(np.uint32), bits, np.bitwise_xor.reduce(u),
    ]  # fmt: skip
    np.testing.assert_array_equal(out, np.stack([np.broadcast_to(np.asarray(row, np.uint32), 32) for row in rows]))


@pytest.mark.parametrize("threads", [32, 96, 256])
def test_barriers_and_shared_memory(intrinsics, rng, threads):
    x = rng.standard_normal((5, threads)).astype(np.float32)
    out, counts = np.zeros_like(x), np.zeros((5, 3), np.int32)
    intrinsics("barriers", (5,), (threads,), out, counts, x, shared_bytes=4 * threads)
    np.testing.assert_array_equal(out, x[:, ::-1])
    np.testing.assert_array_equal(counts, np.stack([(x > 0).sum(1), (x > 2).any(1), (x > -2).all(1)], 1))


def test_atomics(intrinsics, rng):
    x = rng.integers(1, 1000, (7, 128)).astype(np.int32)
    ints = np.array([0, 0, 10**6, 0, -1, 0, 0, 0, 50, 3], np.int32)
    wide, total = np.zeros(3, np.uint64), np.zeros(1, np.float32)
    intrinsics("atomics", (7,), (128,), ints, wide, total, x)
    n, s = x.size, int(x.sum())
    down = 50
    for _ in range(n):
        down = 99 if down == 0 else down - 1
    folds = [int(f.reduce(x, axis=None)) for f in (np.bitwise_and, np.bitwise_or, np.bitwise_xor)]
    assert ints.tolist() == [s, -s, x.min(), x.max(), *folds, n % 100, down, 3 + n]
    assert wide.tolist() == [s << 20, int(x.max()) << 20, 5]
    assert total[0] == s


def awkward_floats(rng):
    """Floats that rounding to 16 bits can get wrong: every bf16 and half, the midpoints between neighbours and the
    floats beside those; random bits; subnormals, infinities, NaN."""
    patterns = np.arange(65536, dtype=np.uint16)
    exact = np.concatenate([patterns.view(BF16).astype(np.float32), patterns.view(np.float16).astype(np.float32)])
    bits = np.concatenate([(patterns.astype(np.uint32) << 16) + 0x8000, exact.view(np.uint32) + 0x1000])
    near = np.concatenate([bits - 1, bits, bits + 1]).astype(np.uint32).view(np.float32)
    random = rng.integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    in_half_range = (rng.standard_normal(200_000) * 2.0 ** rng.integers(-28, 17, 200_000)).astype(np.float32)
    special = np.array(
        [0, -0.0, np.inf, -np.inf, np.nan, 65504, 65519.996, 65520, 2**-24, 2**-25, 3 * 2**-26, 1e-45], np.float32
    )
    half = (np.arange(2048, dtype=np.float64) * 2.0**-25).astype(np.float32)  # subnormal halves and their midpoints
    return np.concatenate([exact, near, random, in_half_range, special, half, -half])


def same(a, b):
    """Equal bit by bit, any NaN for any NaN."""
    a, b = np.asarray(a), np.asarray(b)
    nan = np.isnan(b.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(a.astype(np.float32)), nan)
    width = f"u{a.itemsize}"
    np.testing.assert_array_equal(a.view(width)[~nan], b.view(width)[~nan])


def test_conversions_are_rounded_exactly(rng):
    """Over all 65,536 patterns of both types and half a million floats. (A GPU run flushes float32 subnormals.)"""
    x = awkward_floats(rng)
    patterns = np.resize(np.arange(65536, dtype=np.uint16), x.size)
    b, h = patterns.view(BF16), patterns.view(np.float16)
    to_bf16, to_f16 = np.zeros(x.size, BF16), np.zeros(x.size, np.float16)
    from_bf16, from_f16 = np.zeros(x.size, np.float32), np.zeros(x.size, np.float32)
    convert = planted("intrinsics", "conversions")
    convert((-(-x.size // 256),), (256,), (to_bf16, to_f16, from_bf16, from_f16, x, b, h, np.int32(x.size)))
    with np.errstate(all="ignore"):
        same(to_bf16, x.astype(BF16))
        same(to_f16, x.astype(np.float16))
    same(from_bf16, b.astype(np.float32))
    same(from_f16, h.astype(np.float32))


def test_pairs_and_arithmetic_in_16_bits(rng):
    """Each operation rounded once: against NumPy's float64 result rounded to the type."""
    n = 20_000
    x = (rng.standard_normal((n // 2, 2)) * 2.0 ** rng.integers(-6, 6, (n // 2, 2))).astype(np.float32)
    out = np.zeros((2, 4, n // 2, 2), np.float32)
    planted("intrinsics", "pairs")((-(-n // 512),), (256,), (out, x, np.int32(n)))
    for got, dtype in zip(out, (BF16, np.float16), strict=True):
        v = x.astype(dtype)
        a, b = v[:, 0].astype(np.float64), v[:, 1].astype(np.float64)
        same(got[0], v.astype(np.float32))
        same(got[1], v.astype(np.float32))
        # float64 holds sums and products of 11-bit numbers of these magnitudes exactly, so this rounds once
        same(got[2], np.stack([a + b, a * b], 1).astype(dtype).astype(np.float32))
        same(got[3], np.stack([(a - b).astype(dtype), a < b], 1).astype(np.float32))


def test_indices(intrinsics):
    grid, block = (3, 4, 2), (5, 3, 4)
    out = np.full((24, 60, 2), -1, np.int32)
    intrinsics("indices", grid, block, out)
    np.testing.assert_array_equal(out[:, :, 0], np.broadcast_to(np.arange(60), (24, 60)))
    assert (out[:, :, 1] == 2000 + 400 + 32).all()


def test_arguments_of_every_kind(intrinsics):
    pair = np.array((3, 0.5), np.dtype([("number", "i4"), ("scale", "f4")]))[()]
    out = np.zeros(1, np.float32)
    intrinsics("arguments", (1,), (32,), out, None, pair, np.int64(1 << 40), np.float16(0.25), np.bool_(True))
    assert out[0] == 1.5 + 1 + 0.25 + 1


def test_arithmetic(intrinsics):
    x, y, u, s = np.float32(1.7), np.float32(3.3), np.uint32(0xCAFE), np.int32(96)
    out = np.zeros(10, np.float32)
    intrinsics("arithmetic", (1,), (32,), out, x, y, u, s)
    exact_product_error = float(x) * float(y) - float(x * y)
    reverse = int(f"{int(u):032b}"[::-1], 2)
    wanted = [-x, bin(u).count("1") * 1000 + 25 * 10 + 6, x, 0xCAFE, 1 / np.sqrt(float(x)), exact_product_error,
              0x5678CAFE, reverse, int(u) >> 1, x / y]  # fmt: skip
    np.testing.assert_allclose(out, np.array(wanted, np.float64), rtol=2**-22)  # rsqrtf: 2 ulp on a GPU
    assert out[9] == x / y and out[5] == np.float32(exact_product_error)


def test_blocks_may_wait_for_each_other_in_a_cooperative_launch(intrinsics):
    out, values, arrived = np.zeros(512, np.int32), np.zeros(512, np.int32), np.zeros(1, np.uint32)
    intrinsics("grid_barrier", (8,), (64,), out, values, arrived, cooperative=True)
    np.testing.assert_array_equal(out, np.arange(512)[::-1])


@pytest.mark.skipif(not nvrtc.available(), reason=nvrtc.unavailable_reason())
@pytest.mark.parametrize("file", ["intrinsics", "barriers", "memory", "ptx", "ptx_sm90", "ptx_sm90a", "dependent"])
def test_the_kernels_here_are_cuda(file):
    assert nvrtc.compile(build.source(str(PLANTED / file)), "90a").resources


def test_the_fallback_without_assembly(monkeypatch):
    """Other processors switch fibres by swapcontext; the same kernel, the same results."""
    flags = (*build.compile_flags(), "-DEMU_UCONTEXT")
    monkeypatch.setattr(build, "compile_flags", lambda: flags)
    caches = (build.runtime, build.kernel_library, emulator.load_function)
    for cache in caches:
        cache.cache_clear()
    try:
        x, out, counts = np.arange(96, dtype=np.float32), np.zeros(96, np.float32), np.zeros(3, np.int32)
        with emulator.orders():
            planted("intrinsics", "barriers")((1,), (96,), (out, counts, x), 4 * 96)
        np.testing.assert_array_equal(out, x[::-1])
        with pytest.raises(emulator.KernelError, match="must reach"):
            planted("barriers", "barrier_after_return")((1,), (64,), (out,))
    finally:
        for cache in caches:
            cache.cache_clear()


# ---- the instructions of ptx.cuh ----


def faults(file):
    """The names in the planted file's `enum Fault`, with their numbers as kernels take them."""
    names = re.search(r"enum Fault \{(.*?)\}", (PLANTED / f"{file}.cu").read_text(), re.S)[1].split(",")
    return {name.strip(): np.int32(i) for i, name in enumerate(names)}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("m, n, k", [(16, 16, 16), (64, 48, 80), (32, 16, 256)])
def test_a_tile_product_by_mma(intrinsics, rng, m, n, k, transposed):
    """bf16 products are exact in float32 and each of the k / 16 steps rounds the sum; a GPU also truncates inside of a
    step, to within one unit in the last place of the largest term for each of 17 terms."""
    x, w = (rng.standard_normal(shape).astype(BF16) for shape in ((m, k), (n, k)))
    out = np.full((m, n), np.nan, np.float32)
    layout = np.ascontiguousarray(w.T) if transposed else w
    scalars = np.int32(n), np.int32(k), np.bool_(transposed)
    intrinsics("tile_product", (n // 16, m // 16), (32,), out, x, layout, *scalars, file="ptx")
    wide = x.astype(np.float64), w.astype(np.float64).T
    error = np.abs(out - wide[0] @ wide[1]) / (np.abs(wide[0]) @ np.abs(wide[1]))
    step = 2.0**-24 if intrinsics.on == "cpu" else 17 * 2.0**-23
    assert error.max() <= k / 16 * step


def test_matrices_in_fragments(intrinsics):
    rows = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)
    out = np.zeros((2, 32, 4), np.uint32)
    intrinsics("fragments", (1,), (32,), out, rows.view(np.uint32).reshape(-1), np.int32(0), file="ptx")
    # by row = lane / 4, lane % 4, matrix, pair
    pairs = out.view(np.uint16).reshape(2, 8, 4, 4, 2).transpose(0, 3, 1, 2, 4)
    np.testing.assert_array_equal(pairs[0].reshape(4, 8, 8), rows)
    np.testing.assert_array_equal(pairs[1].reshape(4, 8, 8), rows.transpose(0, 2, 1))


PIPELINE = {  # fault -> the report; `PLACE` as below
    "NO_WAIT": "cp_async16 PLACE: something else was written to its destination before it was waited for",
    "ONE_GROUP_TOO_FEW": "a thread returned without waiting for 1 copies, the first by cp_async16 PLACE",
    "NO_BARRIER_AFTER_WAIT": "argument 0 depends on the order of threads: .* nan ",
    "NO_BARRIER_BEFORE_REUSE": "argument 0 depends on the order of threads: .* nan",
    "MISALIGNED": "cp_async16 PLACE: misaligned address in global memory: 0x.*4, wanted a multiple of 16",
    "NEVER_WAITED": "a thread returned without waiting for 1 copies, the first by cp_async16 PLACE",
    "TOO_MANY_BYTES": "cp_async16 PLACE: bytes: wanted 0 to 16, got 32",
    "MISALIGNED_ROW": "ldmatrix_x4 PLACE: misaligned address in shared memory: 0x.*8, wanted a multiple of 16",
    "PAST_SHARED_MEMORY": "ldmatrix_x4 PLACE: 16 bytes at 0x.* do not lie in the block's shared memory",
}


def run_pipeline(call, rng, fault="NONE", tiles=9, length=301):
    x = rng.integers(-8, 8, (tiles, 512)).astype(np.float32)
    out = np.full(512, np.nan, np.float32)
    call("pipeline", (1,), (128,), out, x, np.int32(tiles), np.int32(length), faults("ptx")[fault], file="ptx")
    x[-1, length:] = 0
    return out, x.sum(0)


@pytest.mark.parametrize("tiles, length", [(1, 512), (2, 0), (9, 301), (20, 3)])
def test_copies_arrive_when_they_are_waited_for(intrinsics, rng, tiles, length):
    np.testing.assert_array_equal(*run_pipeline(intrinsics, rng, tiles=tiles, length=length))


def reported(message, file):
    return pytest.raises(emulator.KernelError, match=message.replace("PLACE", rf"\(\S+/planted/{file}\.cu:\d+\)"))


@pytest.mark.parametrize("fault", PIPELINE)
def test_what_is_wrong_with_a_copy_is_reported(on_the_cpu, rng, fault):
    with reported(PIPELINE[fault], "ptx"):
        if fault in ("MISALIGNED_ROW", "PAST_SHARED_MEMORY"):
            out, rows = np.zeros(256, np.uint32), np.zeros(128, np.uint32)
            offset = np.int32(8 if fault == "MISALIGNED_ROW" else 1 << 20)
            on_the_cpu("fragments", (1,), (32,), out, rows, offset, file="ptx")
        else:
            run_pipeline(on_the_cpu, rng, fault)


def test_nothing_is_copied_from_wherever_that_is(on_the_cpu):
    """The source of no bytes is not read: behind the end of an array it may well be another one's memory."""
    out = np.full(4, np.nan, np.float32)
    on_the_cpu("copy_of_nothing", (1,), (1,), out, file="ptx")
    assert not out.any()


@pytest.mark.parametrize("after_the_wait", [True, False])
def test_what_is_overwritten_while_it_is_copied_reads_as_nan(on_the_cpu, after_the_wait):
    x, out = np.arange(128, dtype=np.float32), np.zeros(128, np.float32)
    wanted = np.where((LANES[:4] == 1) & (not after_the_wait), np.float32(np.nan), x.reshape(32, 4))
    on_the_cpu("source_changes", (1,), (32,), out, x, np.bool_(after_the_wait), file="ptx")
    np.testing.assert_array_equal(out.reshape(32, 4), wanted)
    assert (x[1::4] == -1).all()


def test_the_table_of_faults_is_complete():
    sanitized = {"NONE", "PAST_THE_END"}
    assert set(faults("ptx")) == set(PIPELINE) | sanitized
    assert set(faults("ptx_sm90")) == set(RING) | set(PAIRS) | set(EXCHANGE) | sanitized


RING = {
    "NO_WAIT_FOR_DATA": r"deadlock: .* wait at mbarrier_wait PLACE, phase",
    "WRONG_PARITY": r"deadlock: .* wait at mbarrier_wait PLACE, phase",
    "NO_WAIT_FOR_SLOT": "mbarrier_arrive_expect PLACE: one arrival too many in phase 0, which has all 1",
    "RELEASED_TOO_EARLY": "argument 0 depends on the order of threads",
    "NO_SYNCWARP_BEFORE_RELEASE": "threads shuffled: ",
    "NO_BARRIER_AFTER_INIT": "mbarrier_wait PLACE: the mbarrier was not initialised",
    "TOO_MANY_BYTES_ANNOUNCED": "deadlock: .*0 of 1 arrivals are missing, copies of 1024 of 1040 announced bytes were issued",
    "TOO_FEW_BYTES_ANNOUNCED": "bulk_copy_once PLACE: copies of 1024 bytes were issued in phase 0, 1008 announced",
    "ONE_ARRIVAL_TOO_MANY": "deadlock: ",
    "ONE_ARRIVAL_TOO_FEW": "deadlock: .*1 of 5 arrivals are missing",
    "MISALIGNED_SOURCE": "bulk_copy_once PLACE: misaligned address in global memory: 0x.*4, wanted a multiple of 16",
    "MISALIGNED_SLOT": "bulk_copy_once PLACE: misaligned address in shared memory: 0x.*4, wanted a multiple of 16",
    "ODD_SIZE": "bulk_copy_once PLACE: bytes: wanted a positive multiple of 16, got 1016",
    "PAST_THE_SLOTS": "bulk_copy_once PLACE: 1024 bytes at 0x.* do not lie in the block's shared memory",
    "NEVER_WAITED": "a block ended without waiting for 1 bulk copies, the first by bulk_copy_once PLACE",
    "INITIALISED_TWICE": "mbarrier_init PLACE: the mbarrier was initialised before",
    "OVERWRITTEN": "PLACE: the mbarrier was overwritten",
}


def run_ring(call, rng, fault="NONE", tiles=20):
    x = rng.integers(-8, 8, (tiles, 256)).astype(np.float32)
    out = np.full(256, np.nan, np.float32)
    number = faults("ptx_sm90")[fault]
    call("ring", (1,), (160,), out, x, np.int32(tiles), number, file="ptx_sm90", shared_bytes=3 * 1024)
    return out, x.sum(0)


@pytest.mark.parametrize("tiles", [0, 1, 3, 4, 100])
def test_a_ring_of_bulk_copies(intrinsics, rng, tiles):
    np.testing.assert_array_equal(*run_ring(intrinsics, rng, tiles=tiles))


@pytest.mark.parametrize("fault", RING)
def test_what_is_wrong_with_a_ring_is_reported(on_the_cpu, rng, fault):
    with reported(RING[fault], "ptx_sm90"):
        run_ring(on_the_cpu, rng, fault)


PAIRS = {
    "ANOTHER_COUNT": "named_barrier PLACE: threads wait at barrier 1 for 64 threads, one more comes and wants 96",
    "TOO_MANY_THREADS": "deadlock: .* 63 more wait at named_barrier PLACE, barrier 3: 64 of 96 threads are there",
    "TOO_FEW_THREADS": "argument 0 depends on the order of threads: .* nan",
    "HALF_A_WARP": "deadlock: .* wait at named_barrier PLACE, barrier 1: 0 of 64 threads are there",
    "WRONG_ID": "named_barrier PLACE: id: wanted 1 to 15, got 16",
}


def run_pairs(call, rng, fault="NONE"):
    x, out = rng.standard_normal((21, 32)).astype(np.float32), np.full((21, 32), np.nan, np.float32)
    call("pairs_of_warps", (1,), (128,), out, x, np.int32(21), faults("ptx_sm90")[fault], file="ptx_sm90")
    return out, x[:, ::-1]


def test_barriers_of_a_part_of_the_block(intrinsics, rng):
    np.testing.assert_array_equal(*run_pairs(intrinsics, rng))


@pytest.mark.parametrize("fault", PAIRS)
def test_what_is_wrong_with_a_named_barrier_is_reported(on_the_cpu, rng, fault):
    with reported(PAIRS[fault], "ptx_sm90"):
        run_pairs(on_the_cpu, rng, fault)


EXCHANGE = {
    "NEVER_SENT": r"nothing but polling for too long: .* wait at load_relaxed2 PLACE; 0 threads have returned; noticed in block",
    "NO_TAG": "argument 0 depends on the order of threads",
    "TAG_IN_THE_OTHER_WORD": "argument 0 depends on the order of threads",
}


def run_exchange(call, blocks, fault="NONE", rounds=50, **keywords):
    out, words = np.zeros((blocks, 64), np.uint64), np.zeros((2, blocks, 64), np.uint64)
    scalars = np.int32(rounds), faults("ptx_sm90")[fault]
    call("exchange", (blocks,), (32,), out, words, *scalars, file="ptx_sm90", **keywords)
    numbers = np.arange(1, 64 * blocks + 1, dtype=np.uint64).reshape(blocks, 32, 2)
    for _ in range(rounds):
        x, y = (numbers * np.arange(1, blocks + 1, dtype=np.uint64)[:, None, None]).sum(0).T
        numbers = np.broadcast_to(np.stack([(x + y) % 1000003, (3 * x + y) % 1000003], 1), numbers.shape)
    return out, numbers.reshape(blocks, 64)


@pytest.mark.parametrize("blocks", [1, 2, 4, 8])
def test_blocks_exchange_numbers_while_they_run(intrinsics, blocks):
    np.testing.assert_array_equal(*run_exchange(intrinsics, blocks, cooperative=True))


def test_a_kernel_that_gives_up_after_a_while_is_no_deadlock(intrinsics):
    out = np.zeros(1, np.int32)
    intrinsics("gives_up", (1,), (32,), out, file="ptx_sm90")
    assert out[0] == 1


def test_a_word_goes_round(intrinsics):
    """Also a test of the clock that all blocks share: a turn takes a GPU between 100 ns and 100 us."""
    done, word = np.zeros(3, np.int32), np.zeros(1, np.uint64)
    times = np.zeros(3, np.uint64) if intrinsics.on == "gpu" else None
    intrinsics("round_trip", (3,), (32,), done, times, word, np.int32(100), file="ptx_sm90", cooperative=True)
    assert word[0] == 300 and done.tolist() == [100] * 3
    if times is not None:
        assert (times > 300 * 100).all() and (times < 300 * 100_000).all()


@pytest.mark.parametrize("fault", EXCHANGE)
def test_what_is_wrong_between_blocks_is_reported(on_the_cpu, monkeypatch, fault):
    monkeypatch.setattr(emulator.settings, "patience", 0.3 if fault == "NEVER_SENT" else 60)
    with reported(EXCHANGE[fault], "ptx_sm90"):
        run_exchange(on_the_cpu, 4, fault, cooperative=True)


def test_as_many_blocks_run_at_once_as_settings_say(on_the_cpu, monkeypatch):
    monkeypatch.setattr(emulator.settings, "workers", 2)
    monkeypatch.setattr(emulator.settings, "resident_blocks", 4)
    np.testing.assert_array_equal(*run_exchange(on_the_cpu, 4))
    monkeypatch.setattr(emulator.settings, "resident_blocks", 1)
    monkeypatch.setattr(emulator.settings, "patience", 0.3)
    message = "polling .* 2 of 4 blocks have not started, because no more than 2 run at once: .* need cooperative"
    with reported(message, "ptx_sm90"):
        run_exchange(on_the_cpu, 4)


def test_a_fence_between_proxies_changes_nothing_here(intrinsics):
    out = np.zeros(32, np.float32)
    intrinsics("proxies", (1,), (32,), out, file="ptx_sm90")
    np.testing.assert_array_equal(out, np.arange(32)[::-1])


# What a launch that overlaps with those before it reports by fault.
DEPENDENT = {
    "READS_EARLY": "argument 0 depends on the order of threads",  # the first to wait lets the result arrive
    "WRITES_EARLY": "griddepcontrol_wait PLACE: something was written before to an array of 384 bytes",
    "NEVER_WAITS": "it ends without griddepcontrol_wait",
}


@pytest.mark.parametrize("fault", ["NONE", *DEPENDENT])
def test_a_dependent_launch_waits_before_it_touches_what_others_use(rng, fault):
    assert set(faults("dependent")) == {"NONE", *DEPENDENT}
    x, y = rng.standard_normal((2, 96)).astype(np.float32)
    out = y.copy()
    launches = [reported(DEPENDENT[fault], "dependent")] if fault in DEPENDENT else []
    with contextlib.ExitStack() as stack:
        for context in (emulator.orders(), *launches):
            stack.enter_context(context)
        planted("dependent", "add")((3,), (32,), (out, x, faults("dependent")[fault]), 0, True, (1,))
    if fault == "NONE":
        np.testing.assert_array_equal(out, x + y)


# ---- it catches what it is there to catch ----


@pytest.mark.parametrize("entry, threads", [("missing_barrier", 128), ("missing_syncwarp", 32)])
def test_a_missing_barrier_shows_as_a_difference_between_thread_orders(entry, threads):
    x, out = np.arange(threads, dtype=np.float32), np.zeros(threads, np.float32)
    kernel = planted("barriers", entry)
    with emulator.orders(), pytest.raises(emulator.KernelError, match="depends on the order of threads"):
        kernel((1,), (threads,), (out, x))
    kernel((1,), (threads,), (out, x))
    assert np.isnan(out).any()  # and what was not yet written reads as NaN


def test_a_missing_barrier_before_shared_memory_is_used_again():
    x, out = np.arange(256, dtype=np.float32), np.zeros((2, 256), np.float32)
    with emulator.orders(), pytest.raises(emulator.KernelError, match="depends on the order of threads"):
        planted("barriers", "missing_second_barrier")((1,), (256,), (out, x))


def test_a_result_that_depends_on_the_order_of_blocks():
    with emulator.orders(), pytest.raises(emulator.KernelError, match="depends on the order"):
        planted("barriers", "last_block_wins")((64,), (32,), (np.zeros(1, np.int32),))


PLACE = r"\(\S+/planted/barriers\.cu:\d+\)"
FAULTY_BARRIERS = {  # threads of a block, the report
    "barrier_after_return": (64, f"__syncthreads {PLACE}, which every thread of a block must reach"),
    "barrier_in_branch": (64, f"wait at different barriers: __syncthreads {PLACE} and __syncthreads {PLACE}"),
    "shuffle_in_branch": (
        64,
        rf"deadlock: (?=.*62 more wait at __syncthreads {PLACE}).*thread \(32,0,0\) waits at __shfl_xor_sync {PLACE}",
    ),
    "wrong_mask": (32, f"__shfl_xor_sync {PLACE}: lane 31 is not in its own mask 0x7fffffff"),
}


@pytest.mark.parametrize("order", emulator.ORDERS)
@pytest.mark.parametrize("entry", FAULTY_BARRIERS)
def test_divergent_barriers_are_reported_with_place_block_and_thread(entry, order):
    threads, message = FAULTY_BARRIERS[entry]
    message = rf"{entry}, threads {order}: .*{message}.*; noticed in block \([01],0,0\), thread \(\d+,0,0\)"
    with emulator.orders(order), pytest.raises(emulator.KernelError, match=message):
        planted("barriers", entry)((2,), (threads,), (np.zeros(threads, np.float32),))


def test_lanes_that_are_not_there_read_as_nan():
    out = np.zeros(20, np.float32)
    planted("barriers", "absent_lanes")((1,), (20,), (out,))
    np.testing.assert_array_equal(out, [*range(1, 20), np.nan])


def test_waiting_for_ever_is_reported(monkeypatch):
    monkeypatch.setattr(emulator.settings, "patience", 0.2)
    with pytest.raises(
        emulator.KernelError, match=r"nothing but polling for too long: .*__nanosleep \(\S*barriers.cu:\d+\)"
    ):
        planted("barriers", "waits_for_ever")((1,), (32,), (np.zeros(1, np.int32),))


def test_uninitialised_shared_memory_reads_as_nan():
    out = np.zeros((4, 2), np.float32)  # four blocks on each OS thread: none may see the one before
    for _ in range(2):
        planted("memory", "uninitialised")((4,), (32,), (out,), 33 * 4)
        assert np.isnan(out).all()
        out[:] = 0


def test_a_write_past_dynamic_shared_memory():
    kernel, out = planted("memory", "dynamic_shared_overrun"), np.zeros(32, np.float32)
    kernel((1,), (32,), (out, np.int32(30)), 31 * 4)
    with pytest.raises(emulator.KernelError, match="past the 124 bytes of dynamic shared memory"):
        kernel((1,), (32,), (out, np.int32(31)), 31 * 4)


def test_a_stack_that_overflows():
    kernel, out = planted("memory", "large_frame"), np.zeros(32, np.float32)
    with pytest.raises(emulator.KernelError, match="stack overflow"):
        kernel((1,), (32,), (out, np.int32(17000)))


def test_a_write_past_an_array_is_noticed_in_its_red_zone():
    kernel = planted("memory", "write_past_end")
    for shape in ((40,), (8, 5)):
        out = emulator.empty(shape, np.float32)
        assert np.isnan(out).all() and out.ctypes.data % emulator.ALIGNMENT == 0
        kernel((2,), (32,), (out, np.int32(39)))
        with pytest.raises(
            emulator.KernelError, match="argument 0: something was written just after an array of 160 bytes"
        ):
            kernel((2,), (32,), (out, np.int32(40)))


def test_a_read_past_an_array_gives_nan():
    out, x = emulator.empty((40,), np.float32), emulator.upload(np.ones(40, np.float32))
    planted("memory", "read_past_end")((2,), (32,), (out, x, np.int32(40)))
    np.testing.assert_array_equal(out, [2] * 39 + [np.nan])


SANITIZED = """
import numpy as np, emulator
from test_emulator import faults
out, x = emulator.empty((40,), np.float32), emulator.upload(np.ones(200, np.float32))
plain = np.zeros(40, np.float32)
call = lambda file, entry: emulator.load_function({planted!r} + "/" + file, entry)
{statement}
print("survived")
"""
FAULTS = {  # what it is -> statement with the fault, the same without, what the sanitizer says
    "global write": ("call('memory', 'write_past_end')((2,), (32,), (out, np.int32({})))", 40, 39, "AddressSanitizer"),
    "global write to NumPy's memory": (
        "call('memory', 'write_past_end')((2,), (32,), (plain, np.int32({})))", 40, 39, "heap-buffer-overflow",
    ),
    "global read": ("call('memory', 'read_past_end')((7,), (32,), (emulator.empty((224,), np.float32), x, np.int32({})))", 200, 199, "AddressSanitizer"),
    "shared index": ("call('memory', 'shared_index')((1,), (32,), (out, np.int32({})))", 1, 0, "out of bounds"),
    "dynamic shared memory": (
        "call('memory', 'dynamic_shared_overrun')((1,), (32,), (out, np.int32({})), 31 * 4)", 31, 30, "AddressSanitizer",
    ),
    "misaligned 16-byte load": (
        "call('memory', 'misaligned')((1,), (2,), (out.reshape(-1)[:8], x[{}:]))", 0, 3, "misaligned address",
    ),
    "source of a 16-byte copy": (
        "call('ptx', 'pipeline')((1,), (128,), (emulator.empty((512,), np.float32), emulator.upload(np.ones(198, np.float32)), np.int32(1), np.int32(198), faults('ptx')['{}']))",
        "PAST_THE_END", "NONE", "AddressSanitizer",
    ),
    "source of a bulk copy": (
        "call('ptx_sm90', 'ring')((1,), (160,), (emulator.empty((256,), np.float32), emulator.upload(np.ones((5, 256), np.float32)), np.int32(5), faults('ptx_sm90')['{}']), 3072)",
        "PAST_THE_END", "NONE", "AddressSanitizer",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_sanitizers_stop_at_accesses_that_a_gpu_may_not_survive(fault):
    statement, bad, good, message = FAULTS[fault]
    programs = [SANITIZED.format(planted=str(PLANTED), statement=statement.format(value)) for value in (good, bad)]
    right, wrong = (emulator.sanitized("-c", program) for program in programs)
    assert right.returncode == 0 and "survived" in right.stdout, right.stderr
    assert wrong.returncode != 0 and message in wrong.stderr, wrong.stderr
    assert re.search(r"planted/\w+\.cu:\d+", wrong.stderr), "the report names the line in the kernel"


def test_sanitizers_accept_fibres_that_are_given_up():
    statement = """
for entry in ("barrier_after_return", "barrier_in_branch", "shuffle_in_branch") * 3:
    for order in emulator.ORDERS:
        try:
            with emulator.orders(order):
                call("barriers", entry)((3,), (64,), (np.zeros(64, np.float32),))
        except emulator.KernelError as error:
            print(error)
        else:
            raise SystemExit("not caught")
n = np.zeros(3, np.int32)
call("intrinsics", "barriers")((5,), (96,), (np.zeros(480, np.float32), np.zeros(15, np.int32), np.zeros(480, np.float32)), 384)
"""
    done = emulator.sanitized("-c", SANITIZED.format(planted=str(PLANTED), statement=statement))
    assert done.returncode == 0 and "survived" in done.stdout, done.stderr


def test_all_operations_under_the_sanitizers():
    """The tests of the operations on the emulated GPU once more, with every kernel built to stop at a bad access."""
    arguments = (
        "-m",
        "pytest",
        "-q",
        "-s",
        "-x",
        "-p",
        "no:cacheprovider",
        str(Path(__file__).parent / "test_ops.py"),
        "-k",
    )
    halves = (
        "emulated and qkv_rope",
        "emulated and not qkv_rope",
    )  # most of the time goes into compiling: use two cores
    with ThreadPoolExecutor() as pool:
        for done in pool.map(lambda half: emulator.sanitized(*arguments, half), halves):
            assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


# ---- it refuses what a GPU would misread ----


def call_silu(*args, grid=(1,), block=(256,)):
    emulator.load_function("silu_mul", "silu_mul", F32)(grid, block, args)


def test_arguments_are_refused_by_name():
    x = np.zeros(256, np.float32)
    read_only = np.zeros(256, np.float32)
    read_only.flags.writeable = False
    call_silu(x, read_only, x, np.int64(256))
    cases = [
        ((x, x, x, 256), "argument 3: wanted a NumPy scalar int64 of 8 bytes, got int"),
        ((x, x, x, 256.0), "argument 3: .* got float"),
        ((x, x, x, np.int32(256)), "argument 3: wanted int64 of 8 bytes, got int32 of 4"),
        ((x, x, x, np.float64(256)), "argument 3: wanted int64 of 8 bytes, got float64"),
        ((x, x, x), "wanted 4 arguments, got 3"),
        ((x, x, x, np.int64(1), np.int64(1)), "wanted 4 arguments, got 5"),
        ((x, x.astype(np.float64), x, np.int64(256)), "argument 1: wanted an array of float32, got float64"),
        ((x, np.zeros((256, 2), np.float32)[:, 0], x, np.int64(256)), "argument 1: wanted a C-contiguous array"),
        ((read_only, x, x, np.int64(256)), "argument 0: wanted an array that may be written"),
        ((x, [1.0], x, np.int64(256)), "argument 1: wanted an array of float32 or None, got list"),
        ((x, np.float32(1), x, np.int64(256)), "argument 1: wanted an array of float32 or None, got float32"),
    ]
    for args, message in cases:
        with pytest.raises(TypeError, match=f"silu_mul: {message}"):
            call_silu(*args)


def test_grids_and_blocks_are_refused_as_by_a_gpu():
    args = (np.zeros(256, np.float32),) * 3 + (np.int64(0),)
    for grid, block, message in (
        ((0,), (256,), "grid: wanted sizes from 1"),
        ((1, 70000), (256,), "grid"),
        ((1,), (0,), "block"),
        ((1,), (257,), "at most 256 threads"),
        ((1,), (16, 17), "at most 256 threads"),
    ):
        with pytest.raises(ValueError, match=message):
            call_silu(*args, grid=grid, block=block)


def test_unknown_entry_points_and_constants():
    with pytest.raises(ValueError, match=r"no entry point .* nothing; found silu_mul"):
        emulator.load_function("silu_mul", "nothing", F32)
    with pytest.raises(RuntimeError, match=r"kernels/embed.cu:\d+"):
        emulator.load_function("embed", "embed", (("TABLE_TYPE", "no_such_type"),))


# ---- in the package's place ----


def test_the_packages_gpu_path_runs_on_numpy_arrays(emulated_gpu, rng):
    assert emulated_gpu.orders == emulator.ORDERS
    x, w = rng.standard_normal((3, 40)).astype(np.float32), rng.standard_normal(40).astype(np.float32)
    out = ops.rmsnorm(launch.upload(x), launch.upload(w))
    assert out.base is not None and out.ctypes.data % emulator.ALIGNMENT == 0  # from `empty`, not from the reference
    np.testing.assert_allclose(out, reference.rmsnorm(x.astype(np.float64), w.astype(np.float64)), rtol=1e-5)


def test_compiling_in_two_processes_at_once(tmp_path):
    code = f"import emulator; emulator.load_function({str(PLANTED / 'memory')!r}, 'misaligned'); print('loaded')"
    environment = {
        **os.environ,
        "CUQWEN_TEST_CACHE": str(tmp_path),
        "PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parent.parent}",
    }
    processes = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [p.communicate(timeout=120)[0] for p in processes] == ["loaded\n", "loaded\n"]
    assert not list(tmp_path.rglob("*.partial")) and len(list(tmp_path.rglob("*.so"))) == 2
