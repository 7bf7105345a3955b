"""qkv_rope with eps: what qk_norm makes of q and k, in the same launch where a tile holds whole heads."""

import numpy as np
import pytest
from test_ops import (
    BF16,
    F16,
    F32,
    Emulated,
    Reference,
    assert_close,
    norm_bound,
    poisoned,
    qkv_inputs,
    qkv_truth,
    rng,  # noqa: F401
    shape,  # noqa: F401
    side,  # noqa: F401
    wide,
)
from test_wgmma import needs_wgmma

from cuqwen import launch, ops, tiles


def run(side, inputs, **options):  # noqa: F811
    biases, gains = ([side.put(v) for v in inputs[key]] for key in ("biases", "gains"))
    return ops.qkv_rope(
        side.put(inputs["x"]), *map(side.put, inputs["projections"]), *map(side.put, inputs["tables"]), side.put(inputs["positions"]),
        **dict(zip(("q_bias", "k_bias", "v_bias", "q_norm", "k_norm"), [*biases, *gains], strict=True)), **options,
    )  # fmt: skip


def check(side, rng, T, H, K, D, C, x_type, q_type, kv_type, bias=False, eps=0.3):  # noqa: F811
    """q and k as of qk_norm, bit for bit, all else as without eps; and q and k against the formula."""
    inputs, rows = qkv_inputs(rng, T, H, K, D, C, bias=bias), rng.permutation(T + 3)[:T].astype(np.int32)
    inputs["x"] = inputs["x"].astype(x_type)
    cached = T + 3 if side is Reference else T + 2  # on a GPU rows beyond the cache go nowhere

    def outputs():
        cache = (side.put(poisoned((cached, K, D), kv_type)) for _ in range(2))
        return side.put(poisoned((T, H, D), q_type)), *cache, side.put(poisoned((T, H))), side.put(poisoned((T, K)))

    apart, together, rows_there = outputs(), outputs(), side.put(rows)
    q, k, *_ = run(side, inputs, rows=rows_there, out=(None, None, *apart[2:]))
    ops.qk_norm(q, k, *apart[3:], eps, rows=rows_there, out=apart[:2])
    run(side, inputs, rows=rows_there, eps=eps, out=together)
    for got, expected in zip(together, apart, strict=True):
        assert np.array_equal(wide(side.get(got)), wide(side.get(expected)), equal_nan=True)
    stored, (q, k, _, q_ms, k_ms) = rows < cached, qkv_truth(**inputs)
    assert_close(side.get(together[0]), q[0] / np.sqrt(q_ms[0] + eps)[..., None], norm_bound(q, q_ms, eps))
    truth, bound = k[0] / np.sqrt(k_ms[0] + eps)[..., None], norm_bound(k, k_ms, eps)
    assert_close(side.get(together[1])[rows[stored]], truth[stored], bound[stored])


@pytest.mark.parametrize("q_type,kv_type", [(BF16, BF16), (F32, F16)])
@pytest.mark.parametrize("T,H,K,D,C", [(1, 2, 1, 64, 40), (3, 2, 1, 128, 33), (35, 3, 1, 24, 50), (0, 2, 1, 64, 8)])
def test_without_tensor_cores(side, rng, T, H, K, D, C, q_type, kv_type):  # noqa: F811
    check(side, rng, T, H, K, D, C, F32, q_type, kv_type)


@pytest.mark.parametrize("x_type,q_type,kv_type", [(BF16, BF16, BF16), (F32, F32, F32)])
@pytest.mark.parametrize("T,H,K,D,C", [(65, 2, 1, 128, 72), (66, 3, 2, 64, 40)])
def test_on_tensor_cores(side, rng, shape, T, H, K, D, C, x_type, q_type, kv_type):  # noqa: F811
    check(side, rng, T, H, K, D, C, x_type, q_type, kv_type, bias=True)


@pytest.mark.parametrize("tile", ["wgmma_wide", "wgmma_turns", "wgmma_middle"])
@pytest.mark.parametrize("q_type,bias", [(BF16, False), (F32, True)])
@pytest.mark.parametrize("T,H,K,D,C", [(129, 2, 1, 128, 72), (66, 3, 2, 64, 136)])
def test_by_wgmma(side, rng, monkeypatch, tile, T, H, K, D, C, q_type, bias):  # noqa: F811
    needs_wgmma(side)
    if side is Emulated:
        monkeypatch.setattr(launch, "wgmma_processors", lambda: 2)
    monkeypatch.setattr(tiles, "choose", lambda *_: tile)
    check(side, rng, T, H, K, D, C, BF16, q_type, q_type, bias)


def test_results_where_none_are_named(side, rng):  # noqa: F811
    inputs = qkv_inputs(rng, 6, 2, 1, 64, 40)
    q, k, v, q_ms, k_ms = run(side, inputs)
    normed = run(side, inputs, eps=1e-6)
    for got, expected in zip(normed, (*ops.qk_norm(q, k, q_ms, k_ms, 1e-6), v, q_ms, k_ms), strict=True):
        assert np.array_equal(side.get(got), side.get(expected))


@pytest.mark.parametrize("eps", [-1e-6, float("nan"), "0"])
def test_eps_that_is_none(side, rng, eps):  # noqa: F811
    with pytest.raises((TypeError, ValueError), match="qkv_rope: eps: wanted"):
        run(side, qkv_inputs(rng, 1, 1, 1, 8, 8), eps=eps)
