"""The operations on the GPU: choose entry point, grid and block, launch. `ops` documents and has checked the arguments.

Each function launches on CuPy's current stream and does not wait for the GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from cuqwen import launch, tiles

Array = Any

F32, BF16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)
STORAGE = {F32: "f32", np.dtype(np.float16): "f16", BF16: "bf16"}
MAX_HEAD_DIM = 256
# Up to this many rows a warp computes dot products and streams the weights once; beyond it a block computes a tile.
FEW_ROWS = 4


def variants() -> Iterator[tuple[str, launch.Defines]]:
    """Every (file, -D constants) that this package may compile, with head sizes 64 and 128 standing for all."""
    types = STORAGE.values()
    yield "argmax", ()
    yield "sample", ()
    yield "read", ()
    yield from (("silu_mul", (("OUT_TYPE", t),)) for t in ("f32", "bf16"))
    yield from (("embed", (("TABLE_TYPE", t),)) for t in types)
    for x, w in itertools.product(("f32", "bf16"), types):
        yield "matmul", (("X_TYPE", x), ("W_TYPE", w))
        yield from (("swiglu", (("X_TYPE", x), ("W_TYPE", w), ("OUT_TYPE", o))) for o in ("f32", "bf16"))
    yield from (("qk_norm", (("Q_TYPE", q), ("K_TYPE", k))) for q in ("f32", "bf16") for k in types)
    for x, w, o in itertools.product(types, repeat=3):
        yield "rmsnorm", (("X_TYPE", x), ("W_TYPE", w), ("OUT_TYPE", o))
    for dim in (64, 128):
        yield from (("attention", (("KV_TYPE", t), ("HEAD_DIM", str(dim)))) for t in types)
        yield "attention_group", (("HEAD_DIM", str(dim)),)
        kinds = ("f32", "f32", 64), ("f32", "bf16", 64), ("bf16", "bf16", 64), ("bf16", "bf16", 128)
        for (q, kv, rows), out in itertools.product(kinds, ("f32", "bf16")):
            storage = ("Q_TYPE", q), ("KV_TYPE", kv), ("OUT_TYPE", out)
            yield "attention_mma", (*storage, ("HEAD_DIM", str(dim)), ("ROWS", str(rows)))
        for out, groups in itertools.product(("f32", "bf16"), "12"):
            yield "attention_wgmma", (("OUT_TYPE", out), ("HEAD_DIM", str(dim)), ("GROUPS", groups))
        for x, w, kv in itertools.product(("f32", "bf16"), types, types):
            head = ("X_TYPE", x), ("W_TYPE", w), ("Q_TYPE", "f32")
            yield "qkv_rope", (*head, ("K_TYPE", kv), ("V_TYPE", kv), ("HEAD_DIM", str(dim)))
            if kv != "f32":  # k waits in float32 for its norm, v goes straight to the cache
                yield "qkv_rope", (*head, ("K_TYPE", "f32"), ("V_TYPE", kv), ("HEAD_DIM", str(dim)))
        prompts = (("X_TYPE", "bf16"), ("W_TYPE", "bf16"), ("Q_TYPE", "bf16"))
        yield "qkv_rope", (*prompts, ("K_TYPE", "bf16"), ("V_TYPE", "bf16"), ("HEAD_DIM", str(dim)))


def _run(
    file: str,
    entry: str,
    defines: dict[str, Any],
    grid: tuple[int, ...],
    block: int,
    args: tuple[Array, ...],
    shared_bytes: int = 0,
    dependent: bool = False,
) -> None:
    named = tuple((key, value if isinstance(value, str) else STORAGE[value.dtype]) for key, value in defines.items())
    launch.load_function(file, entry, named)(grid, (block,), args, shared_bytes, dependent)


def _on_tensor_cores(x: Array, *weights: Array) -> bool:
    """Whether the kernels for tensor cores can compute this: bf16 weights, and rows that 16-byte copies can fetch."""
    return STORAGE[weights[0].dtype] == "bf16" and x.shape[-1] % 8 == 0 and _aligned(x, *weights)


def _aligned(*arrays: Array | None) -> bool:
    return all(array is None or launch.address(array) % 16 == 0 for array in arrays)


def _run_tiles(
    file: str,
    defines: dict[str, Any],
    matrices: tuple[Array, ...],
    others: tuple[Array | None, ...],
    columns: int,
    args: tuple[Array, ...],
    first: int,
    head: int = 0,
) -> None:
    """Launches the best shape for matrices[0] [.., C] times the rows of the others, `columns` in all, which reads and
    writes `others` too; args[first:] begins with the matrices."""
    x = matrices[0]
    words = columns % 16 == 0 and _aligned(*others)
    kind = x.dtype, x.shape[-1], head, x.dtype != F32 and words and launch.wgmma_processors() > 0
    rows = x.size // x.shape[-1]
    shape = tiles.choose(*kind, rows, columns)
    tile = tiles.shapes(*kind)[shape]
    blocks = tile.blocks(rows, columns)
    if tile.box:
        blocks = min(blocks, launch.wgmma_processors() // 2 * 2)
        maps = (launch.tensor_map(m, tile.rows if m is x else tile.box) for m in matrices)
        args = (*args[:first], *maps, *args[first + len(matrices) :])
    # Of more rows the blocks take several turns, and those of the next launch begin to fetch while the last are at work
    dependent = tile.box > 0 and rows <= tiles.OVERLAP_ROWS
    _run(file, f"{file}_{shape}", defines, (blocks,), tile.threads, args, tile.shared_bytes, dependent)


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
        _run("embed", "embed", {"TABLE_TYPE": table}, (ids.size,), 256, args, dependent=True)
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
        if width <= 512:
            lanes = min(32, 1 << (_blocks(width, 16) - 1).bit_length())
            threads = min(256, 32 * _blocks(rows * lanes, 32))
            entry, grid = kind + "lanes", _blocks(rows * lanes, threads)
        else:
            entry, grid, lanes, threads = kind + "row", rows, 1, 32 * min(32, _blocks(width, 512))
        _run("rmsnorm", entry, types, (grid,), threads, (*args, np.int32(lanes)), dependent=True)
    return out


def matmul(x: Array, weight: Array, *, residual: Array | None = None, out: Array | None = None) -> Array:
    outputs, width = weight.shape
    out = _allocate(out, (*x.shape[:-1], outputs))
    rows = x.size // width
    if rows and outputs:
        args = (out, x, weight, residual, np.int32(rows), np.int32(outputs), np.int32(width))
        types = {"X_TYPE": x, "W_TYPE": weight}
        if rows <= FEW_ROWS:
            parts = _short_parts(_blocks(outputs, 2), width)
            entry, columns = ("matmul_row", 2) if rows == 1 else ("matmul_rows", 4)
            grid = (_blocks(outputs * parts, 8 * columns),)
            _run("matmul", entry, types, grid, 256, (*args, np.int32(parts)), dependent=True)
        elif _on_tensor_cores(x, weight):
            _run_tiles("matmul", types, (x, weight), (out, residual), outputs, args, 1)
        else:
            _run("matmul", "matmul_tile", types, (_blocks(outputs, 64), _blocks(rows, 64)), 256, args)
    return out


def _parts(pairs: int, width: int, warps: int) -> int:
    """Warps that share a pair of dot products: as many as an H100 holds at once, which is `warps`, but none with less than
    256 elements."""
    return next((n for n in (8, 4, 2) if n * pairs <= warps and 256 * n < width), 1)


def _short_parts(pairs: int, width: int) -> int:
    """The same, but where more than three quarters of the loads would not be under way from the start four in any case: then
    blocks are shorter, and with them the last ones (5 % for Qwen3-8B)."""
    parts = _parts(pairs, width, 6336)
    return parts if 2048 * parts >= width else 4


def swiglu(x: Array, gate_proj: Array, up_proj: Array, *, out: Array | None = None) -> Array:
    outputs, width = gate_proj.shape
    out = _allocate(out, (*x.shape[:-1], outputs))
    rows = x.size // width
    if 0 < rows <= FEW_ROWS and outputs:
        parts = _short_parts(outputs, width)
        args = (out, x, gate_proj, up_proj, *map(np.int32, (rows, outputs, width, parts)))
        entry, columns = ("swiglu_row", 1) if rows == 1 else ("swiglu_rows", 2)
        types = {"X_TYPE": x, "W_TYPE": gate_proj, "OUT_TYPE": out}
        _run("swiglu", entry, types, (_blocks(outputs * parts, 8 * columns),), 256, args, dependent=True)
    elif rows and outputs and _on_tensor_cores(x, gate_proj, up_proj):
        args = (out, x, gate_proj, up_proj, *map(np.int32, (rows, outputs, width)))
        types = {"X_TYPE": x, "W_TYPE": gate_proj, "OUT_TYPE": out}
        _run_tiles("swiglu", types, (x, gate_proj, up_proj), (out,), 2 * outputs, args, 1)
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
    eps: float | None = None,
    out: tuple[Array | None, ...] = (None, None, None, None, None),
) -> tuple[Array, Array, Array, Array, Array]:
    tokens, width = x.shape
    dim = 2 * cos.shape[1]
    by_tiles = dim in (64, 128) and tokens > FEW_ROWS and _on_tensor_cores(x, q_proj, k_proj, v_proj)
    target = out[0]
    if not by_tiles and (eps is not None or (target is not None and target.dtype != F32)):
        # where no block has a whole head at hand in the end, and q must wait for its norm in float32
        q, k, v, q_ms, k_ms = qkv_rope(
            x, q_proj, k_proj, v_proj, cos, sin, positions, rows=rows, q_bias=q_bias, k_bias=k_bias, v_bias=v_bias,
            q_norm=q_norm, k_norm=k_norm,
            out=(target if target is not None and target.dtype == F32 else None, out[1] if eps is None else None, *out[2:]),
        )  # fmt: skip
        target = q if target is None else target
        if eps is None:
            target[...] = q
            return target, k, v, q_ms, k_ms
        return *qk_norm(q, k, q_ms, k_ms, eps, rows=rows, out=(target, out[1])), v, q_ms, k_ms
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
        types = {"X_TYPE": x, "W_TYPE": q_proj, "Q_TYPE": q, "K_TYPE": k, "V_TYPE": v, "HEAD_DIM": str(dim)}
        vectors = map(_float32, (q_bias, k_bias, v_bias, q_norm, k_norm))
        height = next((len(array) for array in out[1:3] if array is not None), tokens)
        sizes = map(np.int32, (tokens, heads, kv_heads, width, len(cos), height))
        targets = (None if array is None else rows for array in out[1:3])  # only what the caller named has such rows
        args = (q, k, v, q_ms, k_ms, x, q_proj, k_proj, v_proj, *vectors, cos, sin, positions, *targets, *sizes)
        parts = _parts((heads + 2 * kv_heads) * dim // 2, width, 5280)
        entry, pairs = ("qkv_rope_row", 1) if tokens == 1 else ("qkv_rope_rows", 2)
        blocks = _blocks(dim // 2 * parts, 8 * pairs)
        leaves = 1 << (blocks - 1).bit_length()
        if tokens <= FEW_ROWS and tokens * (heads + kv_heads) * leaves <= launch.WORKSPACE_COUNTERS:
            args = (*args, np.int32(parts), np.int32(leaves), launch.workspace())
            _run("qkv_rope", entry, types, (blocks, heads + 2 * kv_heads), 256, args, dependent=True)
        elif by_tiles:
            columns, args = (heads + 2 * kv_heads) * dim, (*args, np.float32(-1 if eps is None else eps))
            _run_tiles("qkv_rope", types, (x, q_proj, k_proj, v_proj), (q, k, v, cos, sin), columns, args, 5, dim)
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
        grid = (tokens, _blocks(heads + kv_heads, 4))
        _run("qk_norm", "qk_norm", {"Q_TYPE": q_out, "K_TYPE": k_out}, grid, 128, args, dependent=True)
    return q_out, k_out


def attention(q: Array, keys: Array, values: Array, positions: Array, *, out: Array | None = None) -> Array:
    tokens, heads, dim = q.shape
    rows, kv_heads, _ = keys.shape
    out = _allocate(out, q.shape)
    fits = keys.dtype in (BF16, q.dtype) and q.dtype in (BF16, F32) and _aligned(q, keys, values, out)
    if tokens > FEW_ROWS and dim in (64, 128) and fits:
        _attention_tiles(out, q, keys, values, positions)
    elif out.dtype != F32 or q.dtype != F32 or not _aligned(q, out):
        out[...] = attention(q.astype(F32), keys, values, positions)
    elif tokens:
        group = heads // kv_heads
        grouped = group > 2 and dim in (64, 128) and keys.dtype == BF16
        together = 8 if grouped else group if group <= 2 else 4
        blocks = kv_heads * _blocks(group, together)
        # On an H100's 132 SMs two blocks each, or one of those that fill it by themselves, with a tile of keys or four
        most, keys_of_block = (132, 8192 // dim) if grouped else (264, 1024 >> (_blocks(dim, 8) - 1).bit_length())
        shares = max(1, min(_blocks(rows, keys_of_block), most // (tokens * blocks), 64))
        scratch = (
            (
                launch.empty((tokens, heads, shares, dim), F32),
                launch.empty((tokens, heads, shares, 2), F32),
                launch.workspace(),
            )
            if shares > 1
            else (None, None, None)
        )
        sizes = map(np.int32, (heads, kv_heads, rows))
        args = (out, q, keys, values, positions, *sizes, np.float32(dim**-0.5 / np.log(2)), *scratch)
        grid = (tokens, blocks, shares)
        if grouped:
            types, shared_bytes = {"HEAD_DIM": str(dim)}, 64 * dim + (64 << 10)
            _run("attention_group", "attention_group", types, grid, 256, args, shared_bytes, dependent=True)
        else:
            types = {"KV_TYPE": keys, "HEAD_DIM": str(dim)}
            _run("attention", f"attention_{together}", types, grid, 256, args, dependent=True)
    return out


def _attention_tiles(out: Array, q: Array, keys: Array, values: Array, positions: Array) -> None:
    tokens, heads, dim = q.shape
    cached, kv_heads, _ = keys.shape
    sizes = map(np.int32, (tokens, heads, kv_heads, cached))
    args = (out, q, keys, values, positions, *sizes, np.float32(dim**-0.5 / np.log(2)))
    by_wgmma = q.dtype != F32 and launch.wgmma_processors() > 0
    # Blocks of 128 queries fetch half as much as those of 64, but too few of them leave an H100's 132 SMs idle.
    rows = 128 if q.dtype != F32 and _blocks(tokens, 128) * heads > (132 if by_wgmma else 512) else 64
    grid = heads, _blocks(tokens, rows)
    if by_wgmma:
        types = {"OUT_TYPE": out, "HEAD_DIM": str(dim), "GROUPS": str(rows // 64)}
        _run("attention_wgmma", "attention_wgmma", types, grid, 2 * rows + 128, args, 2 * dim * (rows + 4 * 128))
    else:
        types = {"Q_TYPE": q, "KV_TYPE": keys, "OUT_TYPE": out, "HEAD_DIM": str(dim), "ROWS": str(rows)}
        parts, tile = (3, 32) if q.dtype == F32 else (1, 64)  # as the kernel has them
        held = 6 if keys.dtype == F32 else 4  # tiles
        _run("attention_mma", "attention_mma", types, grid, 128, args, 2 * dim * (parts * rows + held * tile) + 16)


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
        _run("argmax", "argmax_row", {}, (blocks, rows), 256, (out, x, np.int32(width), *scratch), dependent=True)
    return out


# Of kernels/sample.cu: groups of consecutive ids at most, ids of a lane in a group at least, threads, bytes of `Shared`.
SAMPLE_GROUPS, SAMPLE_IDS_PER_LANE, SAMPLE_THREADS, SAMPLE_SHARED_BYTES = 2048, 4, 256, 96 << 10


class SamplingPlan(NamedTuple):
    """How kernels/sample.cu chooses among `groups` groups of logits: its arguments from step to relative, and from shift on."""

    groups: int
    arrays: tuple[Array | None, ...]
    numbers: tuple[np.generic, ...]

    @classmethod
    def of(
        cls,
        size: int,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        repetition_penalty: float,
        presence_penalty: float,
        frequency_penalty: float,
        *,
        uniforms: Array | None,
        step: Array | None,
        history: Array | None,
    ) -> SamplingPlan:
        """For `size` logits, with scratch memory of its own."""
        per_lane = max(SAMPLE_IDS_PER_LANE, _blocks(size, 32 * SAMPLE_GROUPS))
        shift = (32 * per_lane - 1).bit_length()
        groups = _blocks(size, 1 << shift)
        kept = top_k if 0 < top_k < size else 0
        # two and a half segments or more for each token wanted: fewer let more tokens through, more take longer to compare
        wanted = min(SAMPLE_GROUPS, max(64, _blocks(5 * kept, 2)))
        segments = 1 << (wanted - 1).bit_length() if temperature > 0 and 0 < kept <= groups else 0
        summed = temperature > 0 and not segments and (kept or top_p < 1 or min_p == 0)
        tops = launch.empty((groups,), np.uint32) if segments else None
        maxima = None if segments else launch.empty((groups,), np.uint64)
        sums = launch.empty((groups,), np.float64) if summed else None
        relative = launch.empty((size,), np.float64) if summed and top_p < 1 else None
        inverse = min(1 / temperature, 1e308) if temperature > 0 else 0.0
        reals = (temperature, inverse, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty)
        integers = (shift, segments, 0 if uniforms is None else len(uniforms), kept)
        arrays = (step, history, tops, maxima, sums, relative)
        return cls(groups, arrays, (*map(np.int32, integers), *map(np.float64, reals)))


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
    settings = (temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty)
    plan = SamplingPlan.of(len(logits), *settings, uniforms=uniforms, step=step, history=history)
    args = (out, *plan.arrays, launch.workspace(), logits, uniforms, np.int32(len(logits)), *plan.numbers)
    grid = (_blocks(plan.groups, SAMPLE_THREADS // 32),)
    _run("sample", "sample", {}, grid, SAMPLE_THREADS, args, SAMPLE_SHARED_BYTES, dependent=True)
    return out
