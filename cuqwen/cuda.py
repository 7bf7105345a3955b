"""The operations on the GPU: choose entry point, grid and block, launch. `ops` documents and has checked the arguments.

Each function launches on CuPy's current stream and does not wait for the GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

from cuqwen import launch

Array = Any

STORAGE = {np.dtype(np.float32): "f32", np.dtype(np.float16): "f16", np.dtype(ml_dtypes.bfloat16): "bf16"}
MAX_HEAD_DIM = 256
F32 = np.dtype(np.float32)
# Up to this many rows the weights are streamed once for each row (they come from L2 after the first); beyond it a
# block computes a tile. Both are right for any number of rows.
FEW_ROWS = 4


def variants() -> Iterator[tuple[str, launch.Defines]]:
    """Every (file, -D constants) that this package may compile, with head sizes 64 and 128 standing for all."""
    types = STORAGE.values()
    yield from (("argmax", ()), ("silu_mul", ()))
    yield from (("embed", (("TABLE_TYPE", t),)) for t in types)
    yield from (("matmul", (("W_TYPE", t),)) for t in types)
    yield from (("qk_norm", (("K_TYPE", t),)) for t in types)
    for x, w, o in itertools.product(types, repeat=3):
        yield "rmsnorm", (("X_TYPE", x), ("W_TYPE", w), ("OUT_TYPE", o))
    for dim in (64, 128):
        yield from (("attention", (("KV_TYPE", t), ("HEAD_DIM", str(dim)))) for t in types)
        for w, kv in itertools.product(types, repeat=2):
            yield "qkv_rope", (("W_TYPE", w), ("K_TYPE", kv), ("V_TYPE", kv), ("HEAD_DIM", str(dim)))
            if kv != "f32":  # k waits in float32 for its norm, v goes straight to the cache
                yield "qkv_rope", (("W_TYPE", w), ("K_TYPE", "f32"), ("V_TYPE", kv), ("HEAD_DIM", str(dim)))


def _run(
    file: str, entry: str, defines: dict[str, Any], grid: tuple[int, ...], block: int, args: tuple[Array, ...]
) -> None:
    named = tuple((key, value if isinstance(value, str) else STORAGE[value.dtype]) for key, value in defines.items())
    launch.load_function(file, entry, named)(grid, (block,), args)


def _float32(vector: Array | None) -> Array | None:
    """Gains and biases are read as float32, which holds every storage type exactly."""
    return vector if vector is None or vector.dtype == np.float32 else vector.astype(np.float32)


def _allocate(out: Array | None, shape: tuple[int, ...], dtype: Any = F32) -> Array:
    return launch.empty(shape, dtype) if out is None else out


def _blocks(n: int, size: int) -> int:
    return -(-n // size)


def embed(ids: Array, table: Array, *, out: Array | None = None) -> Array:
    rows, width = table.shape
    out = _allocate(out, (*ids.shape, width))
    if ids.size:
        args = (out, ids, table, np.int32(rows), np.int32(width))
        _run("embed", "embed", {"TABLE_TYPE": table}, (ids.size,), 256, args)
    return out


def rmsnorm(x: Array, weight: Array, eps: float = 1e-6, *, out: Array | None = None) -> Array:
    out = _allocate(out, x.shape)
    width = x.shape[-1]
    if x.size:
        types = {"X_TYPE": x, "W_TYPE": weight, "OUT_TYPE": out}
        args = (out, x, weight, np.int32(width), np.float32(eps))
        _run("rmsnorm", "rmsnorm_row", types, (x.size // width,), 256, args)
    return out


def matmul(x: Array, weight: Array, *, residual: Array | None = None, out: Array | None = None) -> Array:
    outputs, width = weight.shape
    out = _allocate(out, (*x.shape[:-1], outputs))
    rows = x.size // width
    if rows and outputs:
        args = (out, x, weight, residual, np.int32(rows), np.int32(outputs), np.int32(width))
        if rows <= FEW_ROWS:
            parts = 4 if outputs <= 2048 else 2 if outputs <= 4096 else 1
            grid = (_blocks(outputs * parts, 8), rows)
            _run("matmul", "matmul_row", {"W_TYPE": weight}, grid, 256, (*args, np.int32(parts)))
        else:
            _run("matmul", "matmul_tile", {"W_TYPE": weight}, (_blocks(outputs, 64), _blocks(rows, 64)), 256, args)
    return out


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
    out: tuple[Array | None, ...] = (None, None, None, None, None),
) -> tuple[Array, Array, Array, Array, Array]:
    tokens, width = x.shape
    dim = 2 * cos.shape[1]
    heads, kv_heads = len(q_proj) // dim, len(k_proj) // dim
    shapes = (
        (tokens, heads, dim),
        (tokens, kv_heads, dim),
        (tokens, kv_heads, dim),
        (tokens, heads),
        (tokens, kv_heads),
    )
    q, k, v, q_ms, k_ms = (_allocate(target, shape) for target, shape in zip(out, shapes, strict=True))
    if tokens:
        types = {"W_TYPE": q_proj, "K_TYPE": k, "V_TYPE": v, "HEAD_DIM": str(dim)}
        vectors = map(_float32, (q_bias, k_bias, v_bias, q_norm, k_norm))
        height = next((len(array) for array in out[1:3] if array is not None), tokens)
        sizes = map(np.int32, (tokens, heads, kv_heads, width, len(cos), height))
        targets = (None if array is None else rows for array in out[1:3])  # only what the caller named has such rows
        args = (q, k, v, q_ms, k_ms, x, q_proj, k_proj, v_proj, *vectors, cos, sin, positions, *targets, *sizes)
        if tokens <= FEW_ROWS:
            _run("qkv_rope", "qkv_rope_row", types, (tokens, heads + 2 * kv_heads), 1024, args)
        else:
            _run("qkv_rope", "qkv_rope_tile", types, (_blocks(tokens, 32), heads + 2 * kv_heads), 2 * dim, args)
    return q, k, v, q_ms, k_ms


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
    tokens, heads, dim = q.shape
    kv_heads = k.shape[1]
    q_out, k_out = _allocate(out[0], q.shape), _allocate(out[1], k.shape)
    if tokens:
        sizes = map(np.int32, (heads, kv_heads, dim, len(k_out)))
        target = None if out[1] is None else rows  # only what the caller named has such rows
        args = (q_out, k_out, q, k, q_ms, k_ms, target, *sizes, np.float32(eps))
        _run("qk_norm", "qk_norm", {"K_TYPE": k_out}, (tokens, heads + kv_heads), 128, args)
    return q_out, k_out


def attention(q: Array, keys: Array, values: Array, positions: Array, *, out: Array | None = None) -> Array:
    tokens, heads, dim = q.shape
    rows, kv_heads, _ = keys.shape
    out = _allocate(out, q.shape)
    if tokens:
        types = {"KV_TYPE": keys, "HEAD_DIM": str(dim)}
        sizes = map(np.int32, (heads, kv_heads, rows))
        args = (out, q, keys, values, positions, *sizes, np.float32(dim**-0.5))
        shares = _shares(tokens, heads, rows)
        if shares == 1:
            _run("attention", "attention_online", types, (tokens, heads), 256, args)
        else:
            partial, share = (
                launch.empty((tokens, heads, shares, dim), F32),
                launch.empty((tokens, heads, shares, 2), F32),
            )
            _run("attention", "attention_split", types, (tokens, heads, shares), 256, (partial, share, *args[1:]))
            merge = (out, partial, share, np.int32(heads), np.int32(shares))
            _run("attention", "attention_merge", types, (tokens, heads), 128, merge)
    return out


def _shares(tokens: int, heads: int, rows: int) -> int:
    """Blocks that share the keys of one head of one query: enough to fill the GPU, each with 128 rows or more."""
    if tokens > FEW_ROWS or rows <= 256:
        return 1
    return max(1, min(rows // 128, 512 // (tokens * heads), 32))


def silu_mul(gate: Array, up: Array, *, out: Array | None = None) -> Array:
    out = _allocate(out, gate.shape)
    if gate.size:
        _run("silu_mul", "silu_mul", {}, (_blocks(gate.size, 256),), 256, (out, gate, up, np.int64(gate.size)))
    return out


def argmax(x: Array, *, out: Array | None = None) -> Array:
    out = _allocate(out, x.shape[:-1], np.int32)
    width = x.shape[-1]
    if x.size:
        _run("argmax", "argmax_row", {}, (x.size // width,), 1024, (out, x, np.int32(width)))
    return out
