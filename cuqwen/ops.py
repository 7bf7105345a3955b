"""The door to the operations: arguments are checked here once, then NumPy arrays go to the reference and CuPy arrays to
the kernels.

Rules that hold for all of them:

- Arrays are NumPy or CuPy arrays, all of one kind. CuPy arrays must be C-contiguous (a kernel sees only the pointer); a
  view that is not is refused by name. NumPy arrays may be any views.
- "[...]" in a shape stands for any number of leading dimensions, none included. Those of all arguments of a call
  broadcast against each other the NumPy way, and the results have the broadcast ones: x [B, T, C] goes with positions
  [T], [B, 1] or []. What has to be repeated for that is copied first, on either side. All other dimensions must be as
  stated: the same letter, the same size. `out=` must have the result's shape, like NumPy's.
- Activations are float32 (on NumPy also float64, which makes the whole operation float64); where an operation says that
  it takes bf16 too, that value was rounded once by whoever made it, and all arithmetic on it is float32. Weight matrices
  are bf16 (`ml_dtypes.bfloat16`), f16 or f32; on NumPy also float64. Nothing else is converted: no int, no float64 on
  the GPU.
- Results are new float32 arrays (float64 for float64 activations) unless `out=` names where they go. Values are rounded
  once, when `out` is narrower. `out` must not share memory with an input, unless the operation says that it may be the
  very same array, nor with another result; where it does, ValueError.
- Integer arguments (`ids`, `positions`, `rows`) are int32 on the GPU, any integer type on NumPy; `positions` and `rows`
  may also be a Python int (on the GPU it is uploaded at each call). A value out of range raises ValueError on NumPy; on
  the GPU, where looking would mean waiting, it gives NaN, and as a row to write to, nothing.
- Wrong shapes raise ValueError, wrong types TypeError.
"""

from __future__ import annotations

import functools
import math
import numbers
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

from cuqwen import cuda, launch, reference
from cuqwen.sampling import Sampling

Array = Any

FLOATS = {np.dtype(t) for t in (np.float32, np.float16, ml_dtypes.bfloat16)}
F32 = {np.dtype(np.float32)}
ACTIVATIONS = F32 | {np.dtype(ml_dtypes.bfloat16)}
F64 = {np.dtype(np.float64)}
I32 = {np.dtype(np.int32)}
INTEGERS = {np.dtype(t) for t in (np.int32, np.int64, np.uint32, np.uint64, np.int16, np.uint16, np.uint8, np.int8)}


class _Check:
    """The checks of one call: remembers the operation's name, the backend and the sizes behind the letters of shapes."""

    def __init__(self, operation: str) -> None:
        self.operation = operation
        self.backend: Any = None  # reference or cuda, from the first array on
        self.sizes: dict[str, int] = {}
        self.lead: tuple[int, ...] = ()  # what the leading dimensions of the arrays so far broadcast to
        self.type: type | None = None  # that of the first array
        self.arrays: dict[str, Array] = {}
        self.spans: dict[str, tuple[int, int]] = {}  # their bytes, on the GPU, where a result is to be kept off them

    def array(self, name: str, array: Array, shape: str, dtypes: set[np.dtype], *, optional: bool = False) -> Array:
        """Check one input. `shape` is a string such as "... C" or "S K D": a letter means the same size throughout, the
        dots mean leading dimensions that broadcast (see `flat`)."""
        if array is None and optional:
            return None
        self._kind(name, array, dtypes)
        self._shape(name, array, shape)
        self.arrays[name] = array
        return array

    def integers(self, name: str, value: Array | int, shape: str, *, optional: bool = False) -> Array:
        """Check an argument of integers, which may be a Python int; returns the array."""
        if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
            clipped = min(max(int(value), -1), 2**31 - 1)  # what is cut off is out of range either way
            value = np.array(clipped, np.int32)
            value = launch.upload(value) if self.backend is cuda else value
        return self.array(name, value, shape, INTEGERS, optional=optional)

    def _kind(self, name: str, array: Array, dtypes: set[np.dtype]) -> None:
        if type(array) is not self.type:
            backend = backend_of(array)
            if backend is None:
                kind = type(array).__name__
                raise TypeError(
                    f"{self.operation}: {name}: wanted a NumPy or CuPy array, got {kind}; use numpy.asarray"
                )
            if self.backend is None:
                self.backend, self.type = backend, type(array)
            if backend is not self.backend:
                raise TypeError(
                    f"{self.operation}: {name}: wanted an array on the same side as the others, "
                    "got a mixture of NumPy and CuPy; move it with cupy.asarray or cupy.asnumpy"
                )
        self._dtype(name, array, dtypes)
        if self.backend is cuda and not array.flags.c_contiguous:
            raise ValueError(
                f"{self.operation}: {name}: wanted a C-contiguous array, got a view; use cupy.ascontiguousarray"
            )

    def _dtype(self, name: str, array: Array, dtypes: set[np.dtype]) -> None:
        if dtypes is INTEGERS:
            allowed = INTEGERS if self.backend is reference else I32
        else:
            allowed = dtypes | F64 if self.backend is reference and dtypes & FLOATS else dtypes
        if array.dtype not in allowed:
            wanted = "/".join(sorted(d.name for d in allowed))
            raise TypeError(f"{self.operation}: {name}: wanted dtype {wanted}, got {array.dtype}; use {name}.astype")

    def _shape(self, name: str, array: Array, shape: str) -> None:
        leading, letters = _letters(shape)
        sizes = array.shape
        core = len(sizes) - len(letters)  # where the dimensions of the letters begin
        lead, sizes = sizes[:core], sizes[core:]
        fits = core == 0 or (core > 0 and leading)
        for letter, size in zip(letters, sizes, strict=False):
            if self.sizes.get(letter, size) != size:
                fits = False
        if not fits:
            known = ", ".join(f"{letter} = {self.sizes[letter]}" for letter in letters if letter in self.sizes)
            wanted = f"[{', '.join(shape.split())}]" + (f" with {known}" if known else "")
            raise ValueError(f"{self.operation}: {name}: wanted shape {wanted}, got {list(array.shape)}")
        self.sizes.update(zip(letters, sizes, strict=True))
        if leading and lead and lead != self.lead:
            try:
                self.lead = np.broadcast_shapes(self.lead, lead) if self.lead else lead
            except ValueError:
                raise ValueError(
                    f"{self.operation}: {name}: wanted leading dimensions that broadcast with {list(self.lead)}, those of "
                    f"the arguments before, got {list(lead)}"
                ) from None

    def out(self, name: str, out: Array | None, shape: tuple[int, ...], dtypes: set[np.dtype], *same: str) -> None:
        """Check where a result is to go. `same` names the inputs of which `out` may be the very same array."""
        if out is None:
            return
        self._kind(name, out, dtypes)
        if out.shape != shape:
            raise ValueError(f"{self.operation}: {name}: wanted shape {list(shape)}, got {list(out.shape)}")
        self._apart(name, out, same)

    def rows(self, name: str, out: Array | None, rows: Array | None, core: tuple[int, ...], *same: str) -> None:
        """Check where k or v is to go: an array of the leading dimensions and `core`, or with `rows` [S, *core] for any S."""
        if rows is None:
            self.out(name, out, (*self.lead, *core), FLOATS, *same)
        elif out is not None:
            self.out(name, out, (*out.shape[:1], *core), FLOATS)
            if self.backend is reference and rows.size and not (rows.min() >= 0 and rows.max() < len(out)):
                got = f"{rows.min()}..{rows.max()}"
                raise ValueError(f"{self.operation}: rows: wanted 0..{len(out) - 1}, the rows of {name}, got {got}")

    def _apart(self, name: str, out: Array, same: tuple[str, ...]) -> None:
        """Refuse a result that shares memory with an input or another result: an answer would depend on who is first."""
        for other in self._sharing(out):
            if not (other in same and _is_same(out, self.arrays[other])):
                raise ValueError(
                    f"{self.operation}: {name}: wanted memory of its own"
                    + (f" or the very array {other}" if other in same else "")
                    + f", got memory shared with {other}; use an array of its own or a copy of {other}"
                )
        self.arrays[name] = out

    def _sharing(self, out: Array) -> list[str]:
        """The names of the arrays so far that have a byte in common with `out`."""
        if isinstance(out, np.ndarray):  # the bounds first: they are cheap
            return [name for name, a in self.arrays.items() if np.may_share_memory(out, a) and np.shares_memory(out, a)]
        for name, array in self.arrays.items():
            if name not in self.spans:
                self.spans[name] = _span(array)
        first, last = _span(out)
        return [name for name, (start, stop) in self.spans.items() if first < stop and start < last]

    # The backends of the operations below take one leading dimension, T tokens; these bring arguments there and results back.

    def flat(self, array: Array, core: int) -> Array:
        """An input with its leading dimensions broadcast to the call's and made one; `core` dimensions stay."""
        if array is None:
            return None
        shape = array.shape[array.ndim - core :]
        if len(self.lead) == 1 and array.shape == self.lead + shape:
            return array
        array = self.broadcast(array, core)
        return array.reshape((math.prod(self.lead), *shape))

    def broadcast(self, array: Array, core: int) -> Array:
        """An input with its leading dimensions broadcast to the call's: a copy on the GPU if that repeats anything."""
        if array is None or array.shape[: array.ndim - core] == self.lead:
            return array
        shape = self.lead + array.shape[array.ndim - core :]
        if self.backend is cuda and array.size == math.prod(shape):
            return array.reshape(shape)
        array = np.broadcast_to(array, shape)  # NumPy hands this on to CuPy for a CuPy array
        return array.copy() if self.backend is cuda else array

    def flat_out(self, out: Array, core: int) -> Array:
        """Where the backend is to write: `out` with one leading dimension, None where no such view of it exists."""
        if out is None or len(self.lead) == 1:
            return out
        return out.reshape((math.prod(self.lead), *out.shape[out.ndim - core :])) if out.flags.c_contiguous else None

    def shaped(self, result: Array, out: Array) -> Array:
        """The caller's `out`, filled, or the backend's result with all leading dimensions."""
        if len(self.lead) == 1:
            return result
        if out is None:
            return result.reshape(self.lead + result.shape[1:])
        if not out.flags.c_contiguous:
            out[...] = result.reshape(out.shape)
        return out

    def positive(self, letter: str, name: str) -> None:
        if self.sizes[letter] < 1:
            raise ValueError(f"{self.operation}: {name}: wanted at least one element in its last axis, got 0")


@functools.cache
def _letters(shape: str) -> tuple[bool, tuple[str, ...]]:
    """Whether `shape` begins with dots, and its letters."""
    letters = tuple(shape.split())
    return letters[0] == "...", letters[letters[0] == "..." :]


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


def _span(array: Array) -> tuple[int, int]:
    """The addresses of a CuPy array's first byte and of the one behind its last; (0, 0) of an empty one."""
    start, size = array.data.ptr, array.nbytes
    return (start, start + size) if size else (0, 0)


def _is_same(a: Array, b: Array) -> bool:
    return (
        launch.address(a) == launch.address(b) and a.shape == b.shape and a.strides == b.strides and a.dtype == b.dtype
    )


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


def rmsnorm(
    x: Array, weight: Array, eps: float = 1e-6, *, residual: Array | None = None, out: Array | None = None
) -> Array:
    """Root-mean-square normalisation over the last axis: `x / sqrt(mean(x**2) + eps) * weight`.

    x [..., C] float32, bf16 or f16; weight [C] likewise; returns [..., C] float32, or `out` (float32, bf16 or f16). With
    `residual` [..., C] float32, x is added to it in place in the same pass, and the sum is what is normalised. Squares
    neither overflow nor vanish: any finite x is served, but for subnormal values on the GPU, which count as zeros. As
    NumPy has it, a row of zeros with eps = 0 gives NaN, NaN anywhere makes its row NaN, and an infinity makes itself NaN
    and the finite values beside it 0. (Zhang and Sennrich, arXiv 1910.07467, eq. 4.)

    >>> import numpy as np
    >>> rmsnorm(np.array([[3.0, 4.0]]), np.array([1.0, 2.0]), eps=0.0).round(4)
    array([[0.8485, 2.2627]])
    """
    check = _Check("rmsnorm")
    check.array("x", x, "... C", FLOATS)
    check.array("weight", weight, "C", FLOATS)
    check.positive("C", "x")
    check.out("residual", residual, x.shape, F32)  # read and written: it may not share memory with anything either
    check.out("out", out, x.shape, FLOATS)
    _check_eps("rmsnorm", eps)
    return check.backend.rmsnorm(x, weight, eps, residual=residual, out=out)


def matmul(x: Array, weight: Array, *, residual: Array | None = None, out: Array | None = None) -> Array:
    """Product with a weight matrix in the checkpoint's [out, in] layout: `x @ weight.T (+ residual)`.

    x [..., C] float32 or bf16; weight [N, C] bf16, f16 or f32; residual [..., N] float32, added in the same pass, may be the
    same array as `out`; returns [..., N] float32, with the leading dimensions of x and residual broadcast (so a residual [N]
    is a bias). Products and sums are float32.

    >>> import numpy as np
    >>> matmul(np.array([[1.0, 2.0]], np.float32), np.array([[1, 1], [0, 10], [2, 0]], np.float32))
    array([[ 3., 20.,  2.]], dtype=float32)
    """
    check = _Check("matmul")
    check.array("x", x, "... C", ACTIVATIONS)
    check.array("weight", weight, "N C", FLOATS)
    check.positive("C", "x")
    check.array("residual", residual, "... N", F32, optional=True)
    check.out("out", out, (*check.lead, weight.shape[0]), F32, "residual")
    return check.backend.matmul(check.broadcast(x, 1), weight, residual=check.broadcast(residual, 1), out=out)


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
    """The three attention projections of a normalised input, with bias, gain and rotary embedding of q and k.

    x [..., C] float32 or bf16; q_proj [H D, C], k_proj and v_proj [K D, C] of one type, bf16, f16 or f32; cos, sin [P, D/2]
    float32 (see `rope_table`); positions [...] integers in 0..P-1; q_bias [H D], k_bias, v_bias [K D]; q_norm, k_norm [D].
    D is twice the width of `cos`; on the GPU a multiple of 4 up to 256.

    Returns (q [..., H, D], k [..., K, D], v [..., K, D], q_ms [..., H], k_ms [..., K]), float32. q and k are multiplied by
    their gains and rotated, but not divided by their root mean square: `q_ms` and `k_ms` are the mean squares before the
    gain, and `qk_norm` does the rest. That is exact, because a rotation keeps the sum of squares and a scalar commutes with
    it. With `eps`, q and k come as `qk_norm` returns them, the same bits, without a trip through memory where that can be.
    `out` may name any of the five; q may be rounded to bf16 there, k and v to bf16 or f16. With `rows` [...], integers in
    0..S-1, k and v of a token go to the row that `rows` has for it of what `out` names, which is then [S, K, D]: the keys
    and values of a cache. Of tokens with the same row, the last one's stay on NumPy, any one's on the GPU.

    >>> import numpy as np
    >>> one, x = np.ones((2, 2), np.float32), np.array([[1.0, 2.0]], np.float32)
    >>> cos, sin = np.zeros((1, 1), np.float32), np.ones((1, 1), np.float32)    # a quarter turn
    >>> q, k, v, q_ms, k_ms = qkv_rope(x, one, one, one, cos, sin, np.array([0]), q_norm=np.array([1, 10], np.float32))
    >>> q, v, q_ms
    (array([[[-30.,   3.]]], dtype=float32), array([[[3., 3.]]], dtype=float32), array([[9.]], dtype=float32))
    """
    check = _Check("qkv_rope")
    check.array("x", x, "... C", ACTIVATIONS)
    check.array("q_proj", q_proj, "HD C", FLOATS)
    check.array("k_proj", k_proj, "KD C", {q_proj.dtype})
    check.array("v_proj", v_proj, "KD C", {q_proj.dtype})
    check.array("cos", cos, "P D/2", F32)
    check.array("sin", sin, "P D/2", F32)
    positions = check.integers("positions", positions, "...")
    rows = check.integers("rows", rows, "...", optional=True)
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
    heads, kv_heads = len(q_proj) // dim, len(k_proj) // dim
    if eps is not None:
        _check_eps("qkv_rope", eps)
    check.out("out[0] (q)", out[0], (*check.lead, heads, dim), ACTIVATIONS)
    check.rows("out[1] (k)", out[1], rows, (kv_heads, dim))
    check.rows("out[2] (v)", out[2], rows, (kv_heads, dim))
    check.out("out[3] (q_ms)", out[3], (*check.lead, heads), F32)
    check.out("out[4] (k_ms)", out[4], (*check.lead, kv_heads), F32)
    k_cached, v_cached = (rows is not None and array is not None for array in out[1:3])
    cached = False, k_cached, v_cached, False, False  # what goes to rows has no leading dimensions
    targets = zip(out, (2, 2, 2, 1, 1), cached, strict=True)
    results = check.backend.qkv_rope(
        check.flat(x, 1), q_proj, k_proj, v_proj, cos, sin, check.flat(positions, 0), rows=check.flat(rows, 0),
        q_bias=q_bias, k_bias=k_bias, v_bias=v_bias, q_norm=q_norm, k_norm=k_norm, eps=eps,
        out=tuple(array if to_rows else check.flat_out(array, core) for array, core, to_rows in targets),
    )  # fmt: skip
    shaped = zip(results, out, cached, strict=True)
    q, k, v, q_ms, k_ms = (a if to_rows else check.shaped(a, target) for a, target, to_rows in shaped)
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
    """The scalar part of Qwen3's per-head normalisation: `q / sqrt(q_ms + eps)` and `k / sqrt(k_ms + eps)`.

    q [..., H, D], k [..., K, D], q_ms [..., H], k_ms [..., K], float32, as `qkv_rope` returns them; returns (q, k) float32.
    `out` may name either; q and k may be the same arrays as the inputs, q may also be rounded to bf16, k to bf16 or f16.
    With `rows` [...], integers in 0..S-1, k of a token goes to the row that `rows` has for it of out[1], which is then
    [S, K, D]: the keys of a cache.

    >>> import numpy as np
    >>> q = np.array([[[3.0, 4.0]]], np.float32)
    >>> qk_norm(q, q, np.array([[4.0]], np.float32), np.array([[16.0]], np.float32), eps=0.0)
    (array([[[1.5, 2. ]]], dtype=float32), array([[[0.75, 1.  ]]], dtype=float32))
    """
    check = _Check("qk_norm")
    check.array("q", q, "... H D", F32)
    check.array("k", k, "... K D", F32)
    check.array("q_ms", q_ms, "... H", F32)
    check.array("k_ms", k_ms, "... K", F32)
    rows = check.integers("rows", rows, "...", optional=True)
    if len(out) != 2:
        raise ValueError(f"qk_norm: out: wanted two arrays or None (q, k), got {len(out)}")
    check.out("out[0] (q)", out[0], (*check.lead, *q.shape[-2:]), ACTIVATIONS, "q")
    check.rows("out[1] (k)", out[1], rows, k.shape[-2:], "k")
    _check_eps("qk_norm", eps)
    cached = rows is not None and out[1] is not None
    targets = check.flat_out(out[0], 2), out[1] if cached else check.flat_out(out[1], 2)
    arrays = check.flat(q, 2), check.flat(k, 2), check.flat(q_ms, 1), check.flat(k_ms, 1)
    q, k = check.backend.qk_norm(*arrays, eps, rows=check.flat(rows, 0), out=targets)
    return check.shaped(q, out[0]), k if cached else check.shaped(k, out[1])


def attention(q: Array, keys: Array, values: Array, positions: Array, *, out: Array | None = None) -> Array:
    """Causal softmax attention with grouped heads over cached rows: a query at position p sees rows 0..p.

    q [..., H, D] float32 or bf16; keys, values [S, K, D] of one type, float32, bf16 or f16, with H a multiple of K;
    positions [...] integers in 0..S-1; returns [..., H, D] float32, or bf16 into `out`, which may be the same array as q.
    Head h uses row group h K // H; scores are scaled by 1/sqrt(D). On the GPU D is a multiple of 8 up to 256, and with bf16
    q, keys and values the weights of more than a few queries are rounded to bf16 too.
    (Vaswani et al., arXiv 1706.03762; Ainslie et al., arXiv 2305.13245.)

    >>> import numpy as np
    >>> q, rows = np.zeros((2, 1, 2), np.float32), np.array([[[1.0, 2.0]], [[3.0, 4.0]]], np.float32)
    >>> attention(q, rows, rows, np.array([0, 1]))[:, 0]
    array([[1., 2.],
           [2., 3.]], dtype=float32)
    """
    check = _Check("attention")
    check.array("q", q, "... H D", ACTIVATIONS)
    check.array("keys", keys, "S K D", FLOATS)
    check.array("values", values, "S K D", {keys.dtype})
    positions = check.integers("positions", positions, "...")
    heads, kv_heads, dim = (check.sizes[letter] for letter in "HKD")
    check.positive("D", "q")
    if kv_heads == 0 or heads == 0 or heads % kv_heads:
        raise ValueError(f"attention: q: wanted a multiple of K = {kv_heads} heads, got {heads}")
    if check.backend is cuda and (dim % 8 or dim > cuda.MAX_HEAD_DIM):
        raise ValueError(f"attention: D: wanted a multiple of 8 up to {cuda.MAX_HEAD_DIM} on the GPU, got {dim}")
    for name, array in (("keys", keys), ("values", values)):
        if check.backend is cuda and launch.address(array) % 16:
            raise ValueError(
                f"attention: {name}: wanted 16-byte aligned memory on the GPU, got a view off it; use .copy()"
            )
    check.out("out", out, (*check.lead, heads, dim), ACTIVATIONS, "q")
    queries, target = check.flat(q, 2), check.flat_out(out, 2)
    result = check.backend.attention(queries, keys, values, check.flat(positions, 0), out=target)
    return check.shaped(result, out)


def silu_mul(gate: Array, up: Array, *, out: Array | None = None) -> Array:
    """The gated activation of SwiGLU: `gate / (1 + exp(-gate)) * up`.

    gate, up [...] float32, broadcast; returns [...] float32, or `out` (float32 or bf16), which may be the same array as
    either. (Shazeer, arXiv 2002.05202.)

    >>> import numpy as np
    >>> silu_mul(np.array([0.0, 20.0], np.float32), np.array([1.0, 2.0], np.float32)).round(3)
    array([ 0., 40.], dtype=float32)
    """
    check = _Check("silu_mul")
    check.array("gate", gate, "...", F32)
    check.array("up", up, "...", F32)
    check.out("out", out, check.lead, ACTIVATIONS, "gate", "up")
    return check.backend.silu_mul(check.broadcast(gate, 0), check.broadcast(up, 0), out=out)


def swiglu(x: Array, gate_proj: Array, up_proj: Array, *, out: Array | None = None) -> Array:
    """The first half of a gated feed-forward block: `silu_mul(x @ gate_proj.T, x @ up_proj.T)`.

    x [..., C] float32 or bf16; gate_proj, up_proj [F, C] of one type, bf16, f16 or f32; returns [..., F] float32, or `out`
    (float32 or bf16). Products, sums and silu are float32. (Shazeer, arXiv 2002.05202.)

    >>> import numpy as np
    >>> swiglu(np.array([[1.0, 2.0]]), np.array([[2.0, -1.0], [0.0, 10.0]]), np.array([[5.0, 0.0], [1.0, 1.0]])).round(3)
    array([[ 0., 60.]])
    """
    check = _Check("swiglu")
    check.array("x", x, "... C", ACTIVATIONS)
    check.array("gate_proj", gate_proj, "F C", FLOATS)
    check.array("up_proj", up_proj, "F C", {gate_proj.dtype})
    check.positive("C", "x")
    check.out("out", out, (*x.shape[:-1], len(gate_proj)), ACTIVATIONS)
    return check.backend.swiglu(x, gate_proj, up_proj, out=out)


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
    """The next token, chosen by its logits; everything that changes from token to token is in arrays, so that it can be
    recorded. `sampling` says what the settings mean, in which order they act and how the token is drawn.

    logits [N] float32; uniforms [U] float64 in [0, 1) and step [1] int32, both needed for temperature > 0: the token is
    drawn by uniforms[step[0]], and step[0] becomes one more; history [N] int32, needed for penalties: 0 for a token not
    used yet, 1 for one that is in the prompt only, c + 1 for one that is c times in the answer; the chosen token's is
    brought up to date. Returns [1] int32. Where NaN, +inf or nothing but -inf leave no choice, or step is not in 0..U-1:
    ValueError on NumPy, the token -1 on the GPU.

    >>> import numpy as np
    >>> uniforms, step = np.array([0.1, 0.8]), np.zeros(1, np.int32)
    >>> logits = np.log(np.array([0.4, 0.1, 0.2, 0.3], np.float32))
    >>> [int(sample(logits, 1.0, top_k=3, uniforms=uniforms, step=step)[0]) for _ in range(2)]    # by 4/9, 0, 2/9, 3/9
    [0, 3]
    """
    check = _Check("sample")
    check.array("logits", logits, "N", F32)
    check.positive("N", "logits")
    check.array("uniforms", uniforms, "U", F64, optional=True)
    check.array("step", step, "1", {np.dtype(np.int32)}, optional=True)
    check.array("history", history, "N", {np.dtype(np.int32)}, optional=True)
    penalties = repetition_penalty, presence_penalty, frequency_penalty
    try:
        sampling = Sampling(temperature, top_k, top_p, min_p, *penalties)
    except (TypeError, ValueError) as error:
        raise type(error)(f"sample: {error}") from None
    if sampling.temperature > 0 and (uniforms is None or step is None):
        raise ValueError("sample: wanted uniforms and step for a temperature above 0, got None")
    if sampling.has_penalties and history is None:
        raise ValueError("sample: wanted history for penalties, got None")
    if step is not None and step.shape != (1,):
        raise ValueError(f"sample: step: wanted shape [1], got {list(step.shape)}")
    check.out("out", out, (1,), {np.dtype(np.int32)})
    return check.backend.sample(
        logits, temperature, top_k, top_p, min_p, *penalties, uniforms=uniforms, step=step, history=history, out=out
    )
