"""The operations on the GPU: choose entry point, grid and block, launch. `ops` documents and has checked the arguments.

Each function launches on CuPy's current stream and does not wait for the GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from cuqwen import launch

Array = Any

STORAGE = {np.dtype(np.float32): "f32", np.dtype(np.float16): "f16", np.dtype(ml_dtypes.bfloat16): "bf16"}
MAX_HEAD_DIM = 256
F32 = np.dtype(np.float32)
# Up to this many rows a warp computes dot products and streams the weights once; beyond it a block computes a tile.
FEW_ROWS = 4


def variants() -> Iterator[tuple[str, launch.Defines]]:
    """Every (file, -D constants) that this package may compile, with head sizes 64 and 128 standing for all."""
    types = STORAGE.values()
    yield "argmax", ()
    yield "sample", ()
    yield from (("silu_mul", (("OUT_TYPE", t),)) for t in ("f32", "bf16"))
    yield from (("embed", (("TABLE_TYPE", t),)) for t in types)
    for x, w in itertools.product(("f32", "bf16"), types):
        yield "matmul", (("X_TYPE", x), ("W_TYPE", w))
        yield from (("swiglu", (("X_TYPE", x), ("W_TYPE", w), ("OUT_TYPE", o))) for o in ("f32", "bf16"))
    yield from (("qk_norm", (("K_TYPE", t),)) for t in types)
    for x, w, o in itertools.product(types, repeat=3):
        yield "rmsnorm", (("X_TYPE", x), ("W_TYPE", w), ("OUT_TYPE", o))
    for dim in (64, 128):
        yield from (("attention", (("KV_TYPE", t), ("HEAD_DIM", str(dim)))) for t in types)
        for x, w, kv in itertools.product(("f32", "bf16"), types, types):
            head = ("X_TYPE", x), ("W_TYPE", w)
            yield "qkv_rope", (*head, ("K_TYPE", kv), ("V_TYPE", kv), ("HEAD_DIM", str(dim)))
            if kv != "f32":  # k waits in float32 for its norm, v goes straight to the cache
                yield "qkv_rope", (*head, ("K_TYPE", "f32"), ("V_TYPE", kv), ("HEAD_DIM", str(dim)))


def _run(
    file: str,
    entry: str,
    defines: dict[str, Any],
    grid: tuple[int, ...],
    block: int,
    args: tuple[Array, ...],
    shared_bytes: int = 0,
) -> None:
    named = tuple((key, value if isinstance(value, str) else STORAGE[value.dtype]) for key, value in defines.items())
    launch.load_function(file, entry, named)(grid, (block,), args, shared_bytes)


class Tile(NamedTuple):
    """A shape of kernels/mma.cuh: outputs of a block, its threads, bytes of shared memory; what an SM of an H100 reaches
    with one block, and with as many as it holds, as parts of what it reaches with the best shape (kernels/LOG.md)."""

    rows: int
    columns: int
    threads: int
    shared_bytes: int
    alone: float
    together: float


def _tiles(x: Array, head: int = 0) -> dict[str, Tile]:
    """The shapes for an x of this type, with whole heads of `head` elements."""

    def tile(rows: int, columns: int, threads: int, depth: int, stages: int, alone: float, together: float) -> Tile:
        shared_bytes = stages * depth * (rows * x.dtype.itemsize + columns * 2)
        return Tile(rows, columns, threads, shared_bytes, alone, together)

    few = head or 32
    few_stages = 6 if few == 32 else 4
    if x.dtype == F32:
        wide, middle = tile(128, 128, 256, 32, 3, 1.0, 1.0), tile(64, 128, 128, 32, 3, 1.2, 0.9)
        return {"wide": wide, "middle": middle, "few": tile(32, few, 128, 64, few_stages, 0.3, 0.4)}
    middle = tile(64, 128, 128, 64, 4, 0.5, 0.75) if head == 128 else tile(64, 64, 128, 64, 6, 0.39, 0.6)
    return {
        "wide": tile(128, 128, 128, 64, 3, 0.75, 1.0),
        "middle": middle,
        "few": tile(32, few, 128, 64, few_stages, 0.15, 0.25),
    }


def _choose(tiles: dict[str, Tile], rows: int, columns: int) -> str:
    """The shape with which the busiest of an H100's 132 SMs is done first. Up to 32 rows fetching the weights is all."""

    def time(shape: str) -> float:
        tile = tiles[shape]
        busiest = _blocks(_blocks(rows, tile.rows) * _blocks(columns, tile.columns), 132)
        return busiest * tile.rows * tile.columns / (tile.alone if busiest == 1 else tile.together)

    return "few" if rows <= 32 else min(tiles, key=time)


def _on_tensor_cores(x: Array, *weights: Array) -> bool:
    """Whether the kernels for tensor cores can compute this: bf16 weights, and rows that 16-byte copies can fetch."""
    aligned = all(launch.address(array) % 16 == 0 for array in (x, *weights))
    return STORAGE[weights[0].dtype] == "bf16" and x.shape[-1] % 8 == 0 and aligned


def _run_tiles(
    file: str, defines: dict[str, Any], tiles: dict[str, Tile], rows: int, columns: int, args: tuple[Array, ...]
) -> None:
    shape = _choose(tiles, rows, columns)
    tile = tiles[shape]
    grid = (_blocks(rows, tile.rows) * _blocks(columns, tile.columns),)
    _run(file, f"{file}_mma_{shape}", defines, grid, tile.threads, args, tile.shared_bytes)


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


def rmsnorm(
    x: Array, weight: Array, eps: float = 1e-6, *, residual: Array | None = None, out: Array | None = None
) -> Array:
    out = _allocate(out, x.shape)
    width = x.shape[-1]
    if x.size:
        rows = x.size // width
        types = {"X_TYPE": x, "W_TYPE": weight, "OUT_TYPE": out}
        args = (out, x, weight, residual, np.int32(rows), np.int32(width), np.float32(eps))
        kind = "rmsnorm_" if residual is None else "rmsnorm_add_"
        if width <= 1024:
            lanes = min(32, 1 << (_blocks(width, 16) - 1).bit_length())
            threads = min(256, 32 * _blocks(rows * lanes, 32))
            entry, grid = kind + ("lanes" if width <= 512 else "warp"), _blocks(rows * lanes, threads)
        else:
            entry, grid, lanes, threads = kind + "row", rows, 1, 32 * min(32, _blocks(width, 512))
        _run("rmsnorm", entry, types, (grid,), threads, (*args, np.int32(lanes)))
    return out


def matmul(x: Array, weight: Array, *, residual: Array | None = None, out: Array | None = None) -> Array:
    outputs, width = weight.shape
    out = _allocate(out, (*x.shape[:-1], outputs))
    rows = x.size // width
    if rows and outputs:
        args = (out, x, weight, residual, np.int32(rows), np.int32(outputs), np.int32(width))
        types = {"X_TYPE": x, "W_TYPE": weight}
        if rows <= FEW_ROWS:
            parts = _parts(_blocks(outputs, 2), width, _least_parts(width))
            entry, columns = ("matmul_row", 2) if rows == 1 else ("matmul_rows", 4)
            _run("matmul", entry, types, (_blocks(outputs * parts, 8 * columns),), 256, (*args, np.int32(parts)))
        elif _on_tensor_cores(x, weight):
            _run_tiles("matmul", types, _tiles(x), rows, outputs, args)
        else:
            _run("matmul", "matmul_tile", types, (_blocks(outputs, 64), _blocks(rows, 64)), 256, args)
    return out


def _parts(pairs: int, width: int, least: int = 1) -> int:
    """Warps that share a pair of dot products: enough for 2,048 on the GPU, each with 256 elements or more."""
    return next((n for n in (1, 2, 4) if n >= least and (n * pairs >= 2048 or 512 * n > width)), 8)


def _least_parts(width: int) -> int:
    """Long sums are shared in any case: each warp ends sooner, and with it the last one (3 % for Qwen3-8B on an H100)."""
    return 1 if width < 2048 else 2 if width < 4096 else 4


def swiglu(x: Array, gate_proj: Array, up_proj: Array, *, out: Array | None = None) -> Array:
    outputs, width = gate_proj.shape
    out = _allocate(out, (*x.shape[:-1], outputs))
    rows = x.size // width
    if 0 < rows <= FEW_ROWS and outputs:
        parts = _parts(outputs, width, _least_parts(width))
        args = (out, x, gate_proj, up_proj, *map(np.int32, (rows, outputs, width, parts)))
        entry, columns = ("swiglu_row", 1) if rows == 1 else ("swiglu_rows", 2)
        types = {"X_TYPE": x, "W_TYPE": gate_proj, "OUT_TYPE": out}
        _run("swiglu", entry, types, (_blocks(outputs * parts, 8 * columns),), 256, args)
    elif rows and outputs and _on_tensor_cores(x, gate_proj, up_proj):
        args = (out, x, gate_proj, up_proj, *map(np.int32, (rows, outputs, width)))
        types = {"X_TYPE": x, "W_TYPE": gate_proj, "OUT_TYPE": out}
        _run_tiles("swiglu", types, _tiles(x), rows, 2 * outputs, args)
    elif rows:
        silu_mul(matmul(x, gate_proj), matmul(x, up_proj), out=out)
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
        types = {"X_TYPE": x, "W_TYPE": q_proj, "K_TYPE": k, "V_TYPE": v, "HEAD_DIM": str(dim)}
        vectors = map(_float32, (q_bias, k_bias, v_bias, q_norm, k_norm))
        height = next((len(array) for array in out[1:3] if array is not None), tokens)
        sizes = map(np.int32, (tokens, heads, kv_heads, width, len(cos), height))
        targets = (None if array is None else rows for array in out[1:3])  # only what the caller named has such rows
        args = (q, k, v, q_ms, k_ms, x, q_proj, k_proj, v_proj, *vectors, cos, sin, positions, *targets, *sizes)
        parts = _parts((heads + 2 * kv_heads) * dim // 2, width)
        entry, pairs = ("qkv_rope_row", 1) if tokens == 1 else ("qkv_rope_rows", 2)
        blocks = _blocks(dim // 2 * parts, 8 * pairs)
        leaves = 1 << (blocks - 1).bit_length()
        if tokens <= FEW_ROWS and tokens * (heads + kv_heads) * leaves <= launch.WORKSPACE_COUNTERS:
            args = (*args, np.int32(parts), np.int32(leaves), launch.workspace())
            _run("qkv_rope", entry, types, (blocks, heads + 2 * kv_heads), 256, args)
        elif dim in (64, 128) and tokens > FEW_ROWS and _on_tensor_cores(x, q_proj, k_proj, v_proj):
            _run_tiles("qkv_rope", types, _tiles(x, dim), tokens, (heads + 2 * kv_heads) * dim, args)
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
        args = (out, gate, up, np.int64(gate.size))
        _run("silu_mul", "silu_mul", {"OUT_TYPE": out}, (_blocks(gate.size, 256),), 256, args)
    return out


def argmax(x: Array, *, out: Array | None = None) -> Array:
    out = _allocate(out, x.shape[:-1], np.int32)
    width = x.shape[-1]
    if x.size:
        rows = x.size // width
        blocks = min(_blocks(width, 1024), 128) if width > 4096 and rows <= launch.WORKSPACE_COUNTERS else 1
        scratch = (launch.empty((rows, blocks), np.uint64), launch.workspace()) if blocks > 1 else (None, None)
        _run("argmax", "argmax_row", {}, (blocks, rows), 256, (out, x, np.int32(width), *scratch))
    return out


# Groups of consecutive ids by whose maxima `sample` bounds what it must look at: as many as the kernel has room for, but
# none with less than 4 ids a lane.
SAMPLE_GROUPS, SAMPLE_IDS_PER_LANE = 2048, 4


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
    out = _allocate(out, (1,), np.int32)
    size = len(logits)
    per_lane = max(SAMPLE_IDS_PER_LANE, _blocks(size, 32 * SAMPLE_GROUPS))
    groups = _blocks(size, 32 * per_lane)
    kept = top_k if 0 < top_k < size else 0
    summed = temperature > 0 and (kept > groups or (kept == 0 and (top_p < 1 or min_p == 0)))
    sums = (launch.empty((groups,), np.float64), launch.empty((size,), np.float64)) if summed else (None, None)
    numbers = np.int32(0 if uniforms is None else len(uniforms)), np.int32(kept)
    reals = map(np.float64, (temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty))
    args = (out, step, history, launch.empty((groups,), np.uint64), *sums, launch.workspace(), logits, uniforms)
    _run(
        "sample",
        "sample",
        {},
        (_blocks(groups, 16),),
        512,
        (*args, np.int32(size), np.int32(per_lane), *numbers, *reals),
    )
    return out
