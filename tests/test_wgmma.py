"""Products by Hopper's wgmma, on the CPU from the same source and with `-m gpu` on a GPU that has it."""

import re
from pathlib import Path

import emulator
import numpy as np
import pytest
from test_ops import (
    BF16,
    EPS32,
    F32,
    Emulated,
    Gpu,
    Reference,
    assert_close,
    check_heads,
    check_matmul,
    check_products,
    check_tiles_agree,
    poisoned,
    qkv_inputs,
    qkv_truth,
    random,
    rng,  # noqa: F401
    run_qkv_rope,
    side,  # noqa: F401
    swiglu_truth,
    wide,
)

from cuqwen import launch, ops, tiles


def needs_wgmma(side):  # noqa: F811
    if side is Reference or (side is Gpu and not launch.wgmma_processors()):
        pytest.skip("needs a GPU of compute capability 9.0, or the emulator")


TILES = ("wgmma_wide", "wgmma_turns", "wgmma_middle", "wgmma_few")


@pytest.fixture(params=TILES)
def tile(request, side, monkeypatch):  # noqa: F811
    """Each tile of kernels/wgmma.cuh; on the CPU by two blocks, which makes each compute several tiles."""
    needs_wgmma(side)
    if side is Emulated:
        monkeypatch.setattr(launch, "wgmma_processors", lambda: 2)
    monkeypatch.setattr(tiles, "choose", lambda *_: request.param)
    return request.param


def test_the_tile_that_is_chosen():
    def choice(rows, columns, C, head=0):
        return tiles.choose(np.dtype(BF16), C, head, True, rows, columns)

    assert [choice(rows, 4096, 1024, 128) for rows in (5, 512, 2048)] == ["mma_few", "wgmma_middle", "wgmma_turns"]
    assert [choice(rows, 1024, 3072) for rows in (32, 512, 2048)] == ["mma_few", "wgmma_few", "wgmma_middle"]
    assert [choice(rows, 4096, 4096) for rows in (2048, 4096)] == ["wgmma_wide", "wgmma_wide"]
    assert "wgmma_few" not in tiles.shapes(np.dtype(BF16), 8, 128, wgmma=True)


@pytest.fixture
def heads_tile(tile):
    """Those that hold whole heads."""
    if tile == "wgmma_few":
        pytest.skip("half a head")
    return tile


@pytest.mark.parametrize(
    "T,N,C", [(5, 32, 72), (129, 48, 136), (70, 272, 8), (257, 80, 264), (130, 144, 64), (2048, 16, 8)]
)
def test_products(side, rng, tile, T, N, C):  # noqa: F811
    check_products(side, rng, T, N, C, BF16)


@pytest.mark.parametrize("bias,gain", [(False, True), (True, False)])
@pytest.mark.parametrize("T,H,K,D,C", [(17, 1, 1, 128, 40), (129, 2, 1, 128, 72), (66, 3, 2, 64, 136)])
def test_heads(side, rng, heads_tile, T, H, K, D, C, bias, gain):  # noqa: F811
    """Tiles of one head to four, of one kind or of several."""
    check_heads(side, rng, T, H, K, D, C, bias, gain, BF16, cached=T + 2)


def test_a_position_outside_of_the_table(side, rng, heads_tile):  # noqa: F811
    inputs = qkv_inputs(rng, 7, 1, 1, 64, 72)
    inputs["x"], inputs["positions"] = inputs["x"].astype(BF16), np.array([0, -1, 1, 37, 2, 10**6, 3], np.int32)
    q, k, v, q_ms, k_ms = map(side.get, run_qkv_rope(side, inputs))
    outside = [1, 3, 5]
    assert np.isnan(q[outside]).all() and np.isnan(k[outside]).all() and not np.isnan(np.delete(q, outside, 0)).any()
    assert not (np.isnan(v).any() or np.isnan(q_ms).any() or np.isnan(k_ms).any())


def test_sums_of_one_sign(side, rng, tile):  # noqa: F811
    """What tensor cores cut off adds up: they round toward zero."""
    x, weight = np.abs(random(rng, (5, 4104), BF16)), np.abs(random(rng, (16, 4104), BF16))
    got = side.get(ops.matmul(side.put(x), side.put(weight)))
    truth = wide(x) @ wide(weight).T
    assert_close(got, truth, 21 / 32 * 4104 * EPS32 * truth)


@pytest.mark.parametrize("D", [64, 128])
def test_a_row_is_the_same_in_every_tile(side, rng, monkeypatch, D):  # noqa: F811
    needs_wgmma(side)
    if side is Emulated:
        monkeypatch.setattr(launch, "wgmma_processors", lambda: 2)
    parts = [(name, slice(0, 260)) for name in TILES]
    parts += ("wgmma_wide", slice(255, 260)), ("wgmma_turns", slice(3, 8))
    check_tiles_agree(side, rng, monkeypatch, D, 144, BF16, parts)


def test_recorded_products_wait_for_what_they_read(side, rng, tile):  # noqa: F811
    """In a chain of launches that may overlap: what an earlier one writes is NaN until then."""
    x, gain, weight = (
        side.put(random(rng, (130, 144))),
        side.put(np.ones(144, F32)),
        side.put(random(rng, (144, 144), BF16)),
    )
    h, gated, out = *(side.put(poisoned((130, 144), BF16)) for _ in range(2)), side.put(poisoned((130, 144)))

    def chain():
        ops.rmsnorm(x, gain, out=h)
        ops.matmul(h, weight, residual=x, out=x)
        ops.rmsnorm(x, gain, out=h)
        ops.swiglu(h, weight, weight, out=gated)
        return ops.matmul(gated, weight, out=out)

    before = side.get(x).copy()
    expected = side.get(chain()).copy()
    replay, _ = launch.record(chain)
    x[...], out[...] = side.put(before), np.float32(np.nan)
    replay()
    assert np.array_equal(side.get(out), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("hidden,heads,kv_heads,ffn,T", [(1024, 16, 8, 3072, 2100), (4096, 32, 8, 12288, 300)])
def test_real_sizes_on_the_gpu(rng, hidden, heads, kv_heads, ffn, T):  # noqa: F811
    """The shapes of 0.6B and 8B, in the tile that is chosen for them."""
    needs_wgmma(Gpu)
    inputs = qkv_inputs(rng, T, heads, kv_heads, 128, hidden)
    inputs["x"] = inputs["x"].astype(BF16)
    for array, (truth, bound) in zip(run_qkv_rope(Gpu, inputs), qkv_truth(**inputs), strict=True):
        assert_close(array.get(), truth, bound)
    gate, up, down = (
        random(rng, shape, BF16, shape[1] ** -0.5) for shape in ((ffn, hidden), (ffn, hidden), (hidden, ffn))
    )
    assert_close(ops.swiglu(*map(Gpu.put, (inputs["x"], gate, up))).get(), *swiglu_truth(inputs["x"], gate, up))
    assert_close(*check_matmul(Gpu, random(rng, (T, ffn), BF16), down))


# ---- the instructions themselves (tests/planted/ptx_sm90a.cu) ----

PLANTED = Path(__file__).parent / "planted" / "ptx_sm90a"
NAMES = re.search(r"enum Fault \{(.*?)\}", PLANTED.with_suffix(".cu").read_text(), re.S)[1].replace("\n", "").split(",")
NUMBERS = {name.strip(): np.int32(number) for number, name in enumerate(NAMES)}
FAULTS = {  # the report; `PLACE` is where it stands
    "NO_FENCE": "wgmma_m64n128 PLACE: no wgmma_fence since its accumulators could be touched",
    "NO_FENCE_AFTER_WAIT": "wgmma_m64n128 PLACE: no wgmma_fence since its accumulators could be touched",
    "NO_COMMIT": "a thread returned without waiting for 12 products, the first by wgmma_m64n128 PLACE",
    "READ_BEFORE_WAIT": "",
    "WRITTEN_BEFORE_WAIT": "wgmma_wait: an accumulator was written before it was waited for",
    "RELEASED_BEFORE_WAIT": "argument 0 depends on the order of threads: .* nan",
    "NEVER_WAITED": "a thread returned without waiting for 4 products, the first by wgmma_m64n128 PLACE",
    "THREE_WARPS": "warp 3 took part in 0 products of a warpgroup, warp 0 in 8: wanted all four in each",
    "OTHER_OPERANDS": "wgmma_m64n128 PLACE: lane 1 brings other operands than lane 0",
    "MISPLACED_TILE": "wgmma_m64n128 PLACE: a matrix that does not begin at a multiple of 1024 bytes",
    "NO_WAIT_FOR_DATA": "deadlock: .* waits at mbarrier_wait PLACE, phase",
    "NO_MAP": "bulk_copy_2d PLACE: this is no map of launch.tensor_map",
}


def run_warpgroup(side, rng, C, fault="NONE"):  # noqa: F811
    x, w = random(rng, (64, C), BF16), random(rng, (128, C), BF16)
    out, there = side.put(poisoned((64, 128))), [side.put(x), side.put(w)]
    maps = [launch.tensor_map(matrix, len(matrix)) for matrix in there]
    warpgroup = launch.load_function(str(PLANTED), "warpgroup", ())
    warpgroup((1,), (160,), (out, *maps, np.int32(-(-C // 64)), NUMBERS[fault]), 2 * 192 * 128 + 512)
    return side.get(out), wide(x) @ wide(w).T, 21 / 32 * C * EPS32 * (np.abs(wide(x)) @ np.abs(wide(w)).T)


@pytest.mark.parametrize("C", [8, 64, 320])
def test_a_product_by_a_warpgroup(side, rng, C):  # noqa: F811
    needs_wgmma(side)
    assert_close(*run_warpgroup(side, rng, C))


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_with_a_product_is_reported(emulated_gpu, rng, fault):  # noqa: F811
    emulated_gpu.orders = emulator.ORDERS
    C = 128 if fault == "THREE_WARPS" else 192
    if fault == "READ_BEFORE_WAIT":
        assert np.isnan(run_warpgroup(Emulated, rng, C, fault)[0]).all()
        return
    message = FAULTS[fault].replace("PLACE", r"\(\S+/planted/ptx_sm90a\.cu:\d+\)")
    with pytest.raises(emulator.KernelError, match=message):
        run_warpgroup(Emulated, rng, C, fault)


def test_the_table_of_faults_is_complete():
    assert set(NUMBERS) == {"NONE", *FAULTS}


@pytest.mark.parametrize("column,row", [(0, 0), (8, 3), (-16, -2), (64, 0), (0, 20), (32, 17)])
def test_boxes_of_a_matrix(side, column, row):  # noqa: F811
    """Zeros outside of it; 16-byte pieces of a row where wgmma looks for them."""
    needs_wgmma(side)
    x = np.arange(1, 20 * 72 + 1, dtype=np.uint16).reshape(20, 72)
    out, there = side.put(np.zeros((24, 64), np.uint16)), side.put(x.view(BF16))
    boxes = launch.load_function(str(PLANTED), "boxes", ())
    boxes((1,), (32,), (out, launch.tensor_map(there, 24), *map(np.int32, (24, column, row))), 24 * 128)
    padded = np.zeros((100, 300), np.uint16)
    padded[40:60, 100:172] = x
    box = padded[40 + row : 64 + row, 100 + column : 164 + column].reshape(24, 8, 8)
    pieces = np.arange(8) ^ np.arange(24)[:, None] % 8
    np.testing.assert_array_equal(side.get(out).reshape(24, 8, 8), np.take_along_axis(box, pieces[..., None], 1))
