"""The door to the operations: arguments are checked here once, then NumPy arrays go to the reference and CuPy arrays to
the kernels.

Rules that hold for all of them:

- Arrays are NumPy or CuPy arrays, all of one kind. CuPy arrays must be C-contiguous (a kernel sees only the pointer); a
  view that is not is refused by name.
- Activations are float32 (on NumPy also float64, which makes the whole operation float64). `rmsnorm` also reads bf16 and
  f16. Weight matrices are bf16 (`ml_dtypes.bfloat16`), f16 or f32; on NumPy also float64.
- Results are new float32 arrays (float64 for float64 activations) unless `out=` names where they go. Values are rounded
  once, when `out` is narrower. `out` must not overlap an input unless the operation says that it may.
- Integer arguments (`ids`, `positions`) are int32 on the GPU, any integer type on NumPy. A value out of range raises
  ValueError on NumPy; on the GPU, where looking would mean waiting, it gives NaN, and as a row to write to, nothing.
- Wrong shapes raise ValueError, wrong types TypeError.
"""

from __future__ import annotations

import numbers
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

from cuqwen import cuda, launch, reference

Array = Any

FLOATS = {np.dtype(t) for t in (np.float32, np.float16, ml_dtypes.bfloat16)}
F32 = {np.dtype(np.float32)}
F64 = {np.dtype(np.float64)}
INTEGERS = {np.dtype(t) for t in (np.int32, np.int64, np.uint32, np.uint64, np.int16, np.uint16, np.uint8, np.int8)}


class _Check:
    """The checks of one call: remembers the operation's name, the backend and the sizes behind the letters of shapes."""

    def __init__(self, operation: str) -> None:
        self.operation = operation
        self.backend: Any = None  # reference or cuda, from the first array on
        self.sizes: dict[str, int] = {}

    def array(self, name: str, array: Array, shape: str, dtypes: set[np.dtype], *, optional: bool = False) -> Array:
        """Check one argument. `shape` is a string such as "... C" or "T H D"; a letter means the same size throughout."""
        if array is None and optional:
            return None
        backend = backend_of(array)
        if backend is None:
            kind = type(array).__name__
            raise TypeError(f"{self.operation}: {name}: wanted a NumPy or CuPy array, got {kind}; use numpy.asarray")
        if self.backend is None:
            self.backend = backend
        if backend is not self.backend:
            raise TypeError(
                f"{self.operation}: {name}: wanted an array on the same side as the others, "
                "got a mixture of NumPy and CuPy; move it with cupy.asarray or cupy.asnumpy"
            )
        self._dtype(name, array, dtypes)
        self._shape(name, array, shape)
        if backend is cuda and not array.flags.c_contiguous:
            raise ValueError(
                f"{self.operation}: {name}: wanted a C-contiguous array, got a view; use cupy.ascontiguousarray"
            )
        return array

    def _dtype(self, name: str, array: Array, dtypes: set[np.dtype]) -> None:
        if dtypes is INTEGERS:
            allowed = INTEGERS if self.backend is reference else {np.dtype(np.int32)}
        else:
            allowed = dtypes | F64 if self.backend is reference and dtypes & FLOATS else dtypes
        if array.dtype not in allowed:
            wanted = "/".join(sorted(d.name for d in allowed))
            raise TypeError(f"{self.operation}: {name}: wanted dtype {wanted}, got {array.dtype}; use {name}.astype")

    def _shape(self, name: str, array: Array, shape: str) -> None:
        letters = shape.split()
        leading = letters[0] == "..."
        letters = letters[1:] if leading else letters
        fits = array.ndim >= len(letters) if leading else array.ndim == len(letters)
        sizes = array.shape[array.ndim - len(letters) :] if fits else ()
        for letter, size in zip(letters, sizes, strict=False):
            if letter in self.sizes and self.sizes[letter] != size:
                fits = False
        if not fits:
            known = ", ".join(f"{letter} = {self.sizes[letter]}" for letter in letters if letter in self.sizes)
            wanted = f"[{', '.join(shape.split())}]" + (f" with {known}" if known else "")
            raise ValueError(f"{self.operation}: {name}: wanted shape {wanted}, got {list(array.shape)}")
        self.sizes.update(zip(letters, sizes, strict=True))

    def out(self, name: str, out: Array | None, shape: tuple[int, ...], dtypes: set[np.dtype]) -> None:
        """Check where a result is to go."""
        if out is None:
            return
        self.array(name, out, "...", dtypes)
        if out.shape != shape:
            raise ValueError(f"{self.operation}: {name}: wanted shape {list(shape)}, got {list(out.shape)}")

    def rows(self, name: str, out: Array | None, rows: Array | None, shape: tuple[int, ...]) -> None:
        """Check where k or v is to go: an array of `shape`, or with `rows` one of any number of rows."""
        if rows is not None:
            self.array("rows", rows, "T", INTEGERS)
            if out is None:
                return
            self.array(name, out, "S K D", FLOATS)
            shape = (len(out), *shape[1:])
            if self.backend is reference and rows.size and not (rows.min() >= 0 and rows.max() < len(out)):
                got = f"{rows.min()}..{rows.max()}"
                raise ValueError(f"{self.operation}: rows: wanted 0..{len(out) - 1}, the rows of {name}, got {got}")
        self.out(name, out, shape, FLOATS)

    def positive(self, letter: str, name: str) -> None:
        if self.sizes[letter] < 1:
            raise ValueError(f"{self.operation}: {name}: wanted at least one element in its last axis, got 0")


def backend_of(array: Array) -> ModuleType | None:
    """The module that computes with `array`: `reference`, `cuda`, or None if it is neither a NumPy nor a CuPy array."""
    if isinstance(array, np.ndarray):
        return reference
    return cuda if launch.is_gpu_array(array) else None


def _check_eps(operation: str, eps: float) -> None:
    if isinstance(eps, bool) or not isinstance(eps, numbers.Real):
        raise TypeError(f"{operation}: eps: wanted a number, got {type(eps).__name__}")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"{operation}: eps: wanted a finite number from 0, got {eps}")


def _address(array: Array) -> int:
    return array.data.ptr if launch.is_gpu_array(array) else array.ctypes.data


def embed(ids: Array, table: Array, *, out: Array | None = None) -> Array:
    """Rows of an embedding table: `out[..., c] = table[ids[...], c]`.

    ids [...] integers in 0..V-1; table [V, C]; returns [..., C] float32.

    >>> import numpy as np
    >>> embed(np.array([1, 1]), np.array([[0, 1], [2, 3]], np.float32))
    array([[2., 3.],
           [2., 3.]], dtype=float32)
    """
    check = _Check("embed")
    check.array("ids", ids, "...", INTEGERS)
    check.array("table", table, "V C", FLOATS)
    check.out("out", out, (*ids.shape, table.shape[1]), F32)
    return check.backend.embed(ids, table, out=out)


def rmsnorm(x: Array, weight: Array, eps: float = 1e-6, *, out: Array | None = None) -> Array:
    """Root-mean-square normalisation over the last axis: `x / sqrt(mean(x**2) + eps) * weight`.

    x [..., C] float32, bf16 or f16; weight [C] likewise; returns [..., C] float32, or `out` (float32, bf16 or f16).
    (Zhang and Sennrich, arXiv 1910.07467, eq. 4.)

    >>> import numpy as np
    >>> rmsnorm(np.array([[3.0, 4.0]]), np.array([1.0, 2.0]), eps=0.0).round(4)
    array([[0.8485, 2.2627]])
    """
    check = _Check("rmsnorm")
    check.array("x", x, "... C", FLOATS)
    check.array("weight", weight, "C", FLOATS)
    check.positive("C", "x")
    check.out("out", out, x.shape, FLOATS)
    _check_eps("rmsnorm", eps)
    return check.backend.rmsnorm(x, weight, eps, out=out)


def matmul(x: Array, weight: Array, *, residual: Array | None = None, out: Array | None = None) -> Array:
    """Product with a weight matrix in the checkpoint's [out, in] layout: `x @ weight.T (+ residual)`.

    x [..., C] float32; weight [N, C] bf16, f16 or f32; residual [..., N] float32, added in the same pass, may be the same
    array as `out`; returns [..., N] float32. Products and sums are float32.

    >>> import numpy as np
    >>> matmul(np.array([[1.0, 2.0]], np.float32), np.array([[1, 1], [0, 10], [2, 0]], np.float32))
    array([[ 3., 20.,  2.]], dtype=float32)
    """
    check = _Check("matmul")
    check.array("x", x, "... C", F32)
    check.array("weight", weight, "N C", FLOATS)
    check.positive("C", "x")
    shape = (*x.shape[:-1], weight.shape[0])
    check.out("residual", residual, shape, F32)
    check.out("out", out, shape, F32)
    return check.backend.matmul(x, weight, residual=residual, out=out)


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
    """The three attention projections of a normalised input, with bias, gain and rotary embedding of q and k.

    x [T, C] float32; q_proj [H D, C], k_proj and v_proj [K D, C] of one type, bf16, f16 or f32; cos, sin [P, D/2] float32
    (see `rope_table`); positions [T] integers in 0..P-1; q_bias [H D], k_bias, v_bias [K D]; q_norm, k_norm [D].
    D is twice the width of `cos`; on the GPU a multiple of 4 up to 256.

    Returns (q [T, H, D], k [T, K, D], v [T, K, D], q_ms [T, H], k_ms [T, K]), float32. q and k are multiplied by their gains
    and rotated, but not divided by their root mean square: `q_ms` and `k_ms` are the mean squares before the gain, and
    `qk_norm` does the rest. That is exact, because a rotation keeps the sum of squares and a scalar commutes with it.
    `out` may name any of the five; k and v may be rounded to bf16 or f16 there. With `rows` [T], integers in 0..S-1, k and
    v of token t go to row rows[t] of what `out` names, which is then [S, K, D]: the keys and values of a cache.

    >>> import numpy as np
    >>> one, x = np.ones((2, 2), np.float32), np.array([[1.0, 2.0]], np.float32)
    >>> cos, sin = np.zeros((1, 1), np.float32), np.ones((1, 1), np.float32)    # a quarter turn
    >>> q, k, v, q_ms, k_ms = qkv_rope(x, one, one, one, cos, sin, np.array([0]), q_norm=np.array([1, 10], np.float32))
    >>> q, v, q_ms
    (array([[[-30.,   3.]]], dtype=float32), array([[[3., 3.]]], dtype=float32), array([[9.]], dtype=float32))
    """
    check = _Check("qkv_rope")
    check.array("x", x, "T C", F32)
    check.array("q_proj", q_proj, "HD C", FLOATS)
    check.array("k_proj", k_proj, "KD C", {q_proj.dtype})
    check.array("v_proj", v_proj, "KD C", {q_proj.dtype})
    check.array("cos", cos, "P D/2", F32)
    check.array("sin", sin, "P D/2", F32)
    check.array("positions", positions, "T", INTEGERS)
    dim = 2 * check.sizes["D/2"]
    check.sizes["D"] = dim
    check.positive("C", "x")
    for name, height in (("q_proj", check.sizes["HD"]), ("k_proj", check.sizes["KD"])):
        if dim == 0 or height == 0 or height % dim:
            raise ValueError(
                f"qkv_rope: {name}: wanted a multiple of D = {dim} rows (twice the width of cos), got {height}"
            )
    if check.backend is cuda and (dim % 4 or dim > cuda.MAX_HEAD_DIM):
        raise ValueError(f"qkv_rope: D: wanted a multiple of 4 up to {cuda.MAX_HEAD_DIM} on the GPU, got {dim}")
    check.array("q_bias", q_bias, "HD", FLOATS, optional=True)
    check.array("k_bias", k_bias, "KD", FLOATS, optional=True)
    check.array("v_bias", v_bias, "KD", FLOATS, optional=True)
    check.array("q_norm", q_norm, "D", FLOATS, optional=True)
    check.array("k_norm", k_norm, "D", FLOATS, optional=True)
    if len(out) != 5:
        raise ValueError(f"qkv_rope: out: wanted five arrays or None (q, k, v, q_ms, k_ms), got {len(out)}")
    tokens, heads, kv_heads = len(x), len(q_proj) // dim, len(k_proj) // dim
    check.out("out[0] (q)", out[0], (tokens, heads, dim), F32)
    check.rows("out[1] (k)", out[1], rows, (tokens, kv_heads, dim))
    check.rows("out[2] (v)", out[2], rows, (tokens, kv_heads, dim))
    check.out("out[3] (q_ms)", out[3], (tokens, heads), F32)
    check.out("out[4] (k_ms)", out[4], (tokens, kv_heads), F32)
    return check.backend.qkv_rope(
        x, q_proj, k_proj, v_proj, cos, sin, positions, rows=rows,
        q_bias=q_bias, k_bias=k_bias, v_bias=v_bias, q_norm=q_norm, k_norm=k_norm, out=out,
    )  # fmt: skip


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
    """The scalar part of Qwen3's per-head normalisation: `q / sqrt(q_ms + eps)` and `k / sqrt(k_ms + eps)`.

    q [T, H, D], k [T, K, D], q_ms [T, H], k_ms [T, K], float32, as `qkv_rope` returns them; returns (q, k) float32.
    `out` may name either; q in place, k also rounded to bf16 or f16. With `rows` [T], integers in 0..S-1, k of token t goes
    to row rows[t] of out[1], which is then [S, K, D]: the keys of a cache.

    >>> import numpy as np
    >>> q = np.array([[[3.0, 4.0]]], np.float32)
    >>> qk_norm(q, q, np.array([[4.0]], np.float32), np.array([[16.0]], np.float32), eps=0.0)
    (array([[[1.5, 2. ]]], dtype=float32), array([[[0.75, 1.  ]]], dtype=float32))
    """
    check = _Check("qk_norm")
    check.array("q", q, "T H D", F32)
    check.array("k", k, "T K D", F32)
    check.array("q_ms", q_ms, "T H", F32)
    check.array("k_ms", k_ms, "T K", F32)
    if len(out) != 2:
        raise ValueError(f"qk_norm: out: wanted two arrays or None (q, k), got {len(out)}")
    check.out("out[0] (q)", out[0], q.shape, F32)
    check.rows("out[1] (k)", out[1], rows, k.shape)
    _check_eps("qk_norm", eps)
    return check.backend.qk_norm(q, k, q_ms, k_ms, eps, rows=rows, out=out)


def attention(q: Array, keys: Array, values: Array, positions: Array, *, out: Array | None = None) -> Array:
    """Causal softmax attention with grouped heads over cached rows: query t sees rows 0..positions[t].

    q [T, H, D] float32; keys, values [S, K, D] of one type, float32, bf16 or f16, with H a multiple of K; positions [T]
    integers in 0..S-1; returns [T, H, D] float32. Head h uses row group h K // H; scores are scaled by 1/sqrt(D).
    On the GPU D is a multiple of 8 up to 256. (Vaswani et al., arXiv 1706.03762; Ainslie et al., arXiv 2305.13245.)

    >>> import numpy as np
    >>> q, rows = np.zeros((2, 1, 2), np.float32), np.array([[[1.0, 2.0]], [[3.0, 4.0]]], np.float32)
    >>> attention(q, rows, rows, np.array([0, 1]))[:, 0]
    array([[1., 2.],
           [2., 3.]], dtype=float32)
    """
    check = _Check("attention")
    check.array("q", q, "T H D", F32)
    check.array("keys", keys, "S K D", FLOATS)
    check.array("values", values, "S K D", {keys.dtype})
    check.array("positions", positions, "T", INTEGERS)
    heads, kv_heads, dim = (check.sizes[letter] for letter in "HKD")
    check.positive("D", "q")
    if kv_heads == 0 or heads == 0 or heads % kv_heads:
        raise ValueError(f"attention: q: wanted a multiple of K = {kv_heads} heads, got {heads}")
    if check.backend is cuda and (dim % 8 or dim > cuda.MAX_HEAD_DIM):
        raise ValueError(f"attention: D: wanted a multiple of 8 up to {cuda.MAX_HEAD_DIM} on the GPU, got {dim}")
    for name, array in (("keys", keys), ("values", values)):
        if check.backend is cuda and _address(array) % 16:
            raise ValueError(
                f"attention: {name}: wanted 16-byte aligned memory on the GPU, got a view off it; use .copy()"
            )
    check.out("out", out, q.shape, F32)
    return check.backend.attention(q, keys, values, positions, out=out)


def silu_mul(gate: Array, up: Array, *, out: Array | None = None) -> Array:
    """The gated activation of SwiGLU: `gate / (1 + exp(-gate)) * up`.

    gate, up [...] float32, the same shape; returns the same shape, float32. (Shazeer, arXiv 2002.05202.)

    >>> import numpy as np
    >>> silu_mul(np.array([0.0, 20.0], np.float32), np.array([1.0, 2.0], np.float32)).round(3)
    array([ 0., 40.], dtype=float32)
    """
    check = _Check("silu_mul")
    check.array("gate", gate, "...", F32)
    check.array("up", up, "...", F32)
    check.out("up", up, gate.shape, F32)
    check.out("out", out, gate.shape, F32)
    return check.backend.silu_mul(gate, up, out=out)


def argmax(x: Array, *, out: Array | None = None) -> Array:
    """Index of the largest element of the last axis, the lowest one among equals; NaN counts as largest.

    x [..., N] float32; returns [...] int32.

    >>> import numpy as np
    >>> argmax(np.array([[1.0, 5.0, 5.0], [2.0, 0.0, 1.0]], np.float32))
    array([1, 0], dtype=int32)
    """
    check = _Check("argmax")
    check.array("x", x, "... N", F32)
    check.positive("N", "x")
    check.out("out", out, x.shape[:-1], {np.dtype(np.int32)})
    return check.backend.argmax(x, out=out)
