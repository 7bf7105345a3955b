"""The operations in NumPy: the truth that every kernel is held to.

Everything is computed in float64 if the first floating-point argument is float64 and in float32 otherwise; weights of
other types (bf16 and f16 are subsets of float32) are widened first. `ops` documents the arguments.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cuqwen.sampling import Sampling, choose

Array = Any


def _compute_dtype(x: Array) -> type:
    return np.float64 if x.dtype == np.float64 else np.float32


def _store(value: Array, out: Array | None, rows: Array | None = None) -> Array:
    if out is None:
        return value
    out[... if rows is None else rows] = value.astype(out.dtype, copy=False)
    return out


def embed(ids: Array, table: Array, *, out: Array | None = None) -> Array:
    if ids.size and not (ids.min() >= 0 and ids.max() < len(table)):
        raise ValueError(f"embed: ids: wanted 0..{len(table) - 1}, got {ids.min()}..{ids.max()}")
    return _store(table[ids].astype(_compute_dtype(table), copy=False), out)


def rmsnorm(
    x: Array, weight: Array, eps: float = 1e-6, *, residual: Array | None = None, out: Array | None = None
) -> Array:
    dtype = _compute_dtype(x)
    if residual is not None:
        x = np.add(residual, x, out=residual, casting="same_kind")
    x = x.astype(dtype, copy=False)
    # in float64, where no float32's square overflows or vanishes
    mean_square: Array = np.mean(np.square(x, dtype=np.float64), axis=-1, keepdims=True)
    root = np.sqrt(mean_square + float(dtype(eps))).astype(dtype, copy=False)
    with np.errstate(invalid="ignore"):  # 0/0 and inf/inf are NaN
        return _store(x / root * weight.astype(dtype, copy=False), out)


def matmul(x: Array, weight: Array, *, residual: Array | None = None, out: Array | None = None) -> Array:
    dtype = _compute_dtype(x)
    product = _product(x.astype(dtype, copy=False), weight.astype(dtype, copy=False))
    return _store(product if residual is None else product + residual, out)


def _product(x: Array, weight: Array) -> Array:
    """x @ weight.T. One row by a small matrix goes in pieces too small for OpenBLAS to share out among threads: these
    meet by spinning, which on busy cores costs more than the product (4096 x 256 on two: 900 us, by one thread 66)."""
    if x.size != weight.shape[1] or weight.size > 1 << 22:
        return x @ weight.T
    rows = max(1, (1 << 18) // weight.shape[1])
    row, product = x.reshape(-1), np.empty(len(weight), x.dtype)
    for first in range(0, len(weight), rows):
        np.matmul(weight[first : first + rows], row, out=product[first : first + rows])
    return product.reshape(*x.shape[:-1], len(weight))


def qkv_rope(
    x: Array,
    q_proj: Array,
    k_proj: Array,
    v_proj: Array,
    cos: Array,
    sin: Array,
    positions: Array,
    *,
    rows: Array | None = None,
    q_bias: Array | None = None,
    k_bias: Array | None = None,
    v_bias: Array | None = None,
    q_norm: Array | None = None,
    k_norm: Array | None = None,
    eps: float | None = None,
    out: tuple[Array | None, ...] = (None, None, None, None, None),
) -> tuple[Array, Array, Array, Array, Array]:
    dtype = _compute_dtype(x)
    half = cos.shape[-1]
    if positions.size and not (positions.min() >= 0 and positions.max() < len(cos)):
        raise ValueError(
            f"qkv_rope: positions: wanted 0..{len(cos) - 1}, the rows of cos, got {positions.min()}..{positions.max()}"
        )
    cos, sin = (a[positions].astype(dtype, copy=False)[:, None, :] for a in (cos, sin))

    def heads(proj: Array, bias: Array | None) -> Array:
        product = matmul(x, proj)
        if bias is not None:
            product = product + bias.astype(dtype, copy=False)
        return product.reshape(len(x), len(proj) // (2 * half), 2 * half)

    def rotate(a: Array, gain: Array | None) -> Array:
        if gain is not None:
            a = a * gain.astype(dtype, copy=False)
        low, high = a[..., :half], a[..., half:]
        return np.concatenate((low * cos - high * sin, high * cos + low * sin), axis=-1)

    q, k, v = heads(q_proj, q_bias), heads(k_proj, k_bias), heads(v_proj, v_bias)
    squares: list[Array] = [np.mean(np.square(a), axis=-1, dtype=dtype) for a in (q, k)]
    q, k = rotate(q, q_norm), rotate(k, k_norm)
    if eps is not None:
        q, k = qk_norm(q, k, squares[0], squares[1], eps)
    results = q, k, v, *squares
    targets = zip(results, out, (None, rows, rows, None, None), strict=True)
    return tuple(_store(value, target, at) for value, target, at in targets)


def qk_norm(
    q: Array,
    k: Array,
    q_ms: Array,
    k_ms: Array,
    eps: float = 1e-6,
    *,
    rows: Array | None = None,
    out: tuple[Array | None, Array | None] = (None, None),
) -> tuple[Array, Array]:
    dtype = _compute_dtype(q)
    q, k = (a / np.sqrt(ms + dtype(eps))[..., None] for a, ms in ((q, q_ms), (k, k_ms)))
    return _store(q, out[0]), _store(k, out[1], rows)


def attention(q: Array, keys: Array, values: Array, positions: Array, *, out: Array | None = None) -> Array:
    dtype = _compute_dtype(q)
    tokens, heads, dim = q.shape
    if positions.size and not (positions.min() >= 0 and positions.max() < len(keys)):
        raise ValueError(
            f"attention: positions: wanted 0..{len(keys) - 1}, the rows of keys, got {positions.min()}..{positions.max()}"
        )
    q, result = q.astype(dtype, copy=False), np.empty((tokens, heads, dim), dtype)
    block = 256  # queries at a time: bounds the scores to H x 256 x S
    for first in range(0, tokens, block):
        at = positions[first : first + block]
        seen = int(at.max()) + 1
        k = keys[:seen].astype(dtype, copy=False).transpose(1, 2, 0)  # [K, D, S]
        v = values[:seen].astype(dtype, copy=False).transpose(1, 0, 2)  # [K, S, D]
        grouped = q[first : first + block].reshape(len(at), k.shape[0], -1, dim).transpose(1, 2, 0, 3)  # [K, H/K, T, D]
        scores = grouped @ k[:, None] * dtype(dim**-0.5)
        scores = np.where(np.arange(seen) <= at[:, None], scores, -np.inf)
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=-1, keepdims=True)
        result[first : first + block] = (scores @ v[:, None]).transpose(2, 0, 1, 3).reshape(len(at), heads, dim)
    return _store(result, out)


def silu_mul(gate: Array, up: Array, *, out: Array | None = None) -> Array:
    with np.errstate(over="ignore"):  # exp(-gate) = inf gives the correct limit 0
        return _store(gate / (1 + np.exp(-gate)) * up, out)


def swiglu(x: Array, gate_proj: Array, up_proj: Array, *, out: Array | None = None) -> Array:
    return silu_mul(matmul(x, gate_proj), matmul(x, up_proj), out=out)


def argmax(x: Array, *, out: Array | None = None) -> Array:
    return _store(np.argmax(x, axis=-1).astype(np.int32), out)


def sample(
    logits: Array,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    *,
    uniforms: Array | None = None,
    step: Array | None = None,
    history: Array | None = None,
    out: Array | None = None,
) -> Array:
    penalties = repetition_penalty, presence_penalty, frequency_penalty
    sampling, uniform = Sampling(temperature, top_k, top_p, min_p, *penalties), 0.0
    if uniforms is not None and step is not None and temperature > 0:
        if not 0 <= step[0] < len(uniforms):
            raise ValueError(f"sample: step: wanted 0..{len(uniforms) - 1}, an index of uniforms, got {step[0]}")
        uniform = float(uniforms[step[0]])
    uses = np.zeros(len(logits), np.int32) if history is None else history
    token = choose(logits.astype(np.float64), sampling, uses > 0, np.maximum(uses - 1, 0), uniform)
    if step is not None and temperature > 0:
        step[0] += 1
    if history is not None:
        history[token] += 1 if history[token] else 2
    return _store(np.array([token], np.int32), out)
