"""Times every operation on the GPU at the shapes of the Qwen3 models, beside PyTorch in the same run.

    python -m benchmarks.ops [--sizes 0.6B,8B] [--tokens 1,512,2048] [--operations matmul,rmsnorm] [--no-torch] [--no-large]
                             [--compile-seconds 150] [--output benchmarks/results/ops.json]

A row is one operation at one shape: the GPU's time for a call inside a CUDA graph (see timing.py), with its inputs rotated
so that weights come from memory and not from the L2 cache; GB/s of the bytes that must be moved and TFLOP/s; the floor,
which is these bytes or operations at the ceiling measured first in the same run, and the percentage of that ceiling.
Ceilings: "read" for what reads nearly all that it moves (weights, caches), "copy" for what reads and writes, "tensor" for
what takes longest to compute (PyTorch's bf16 product of two 8192 x 8192 matrices).

Beside it PyTorch as its users write the same operation, all in bf16 (ours: float32 activations, bf16 weights), timed the
same way, eager and through torch.compile (by default at 0.6B and 8B alone: a compilation takes two seconds). A dash: not
there, not supported, or the time for compiling is used up.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks import timing
from benchmarks.record import write_record
from cuqwen import cuda, launch, ops, rope_table
from cuqwen.bandwidth import read_bandwidth

F32, BF16, I32 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.int32)
CONTEXT = 1024  # rows of the cache that a single token attends to; a prompt of T tokens attends to itself


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that its kernels see."""

    C: int
    F: int
    H: int
    K: int = 8
    D: int = 128
    V: int = 151936


SHAPES = {
    "0.6B": Shape(1024, 3072, 16),
    "1.7B": Shape(2048, 6144, 16),
    "4B": Shape(2560, 9728, 32),
    "8B": Shape(4096, 12288, 32),
    "14B": Shape(5120, 17408, 40),
    "32B": Shape(5120, 25600, 64),
}
FEW_SIZES = ("0.6B", "8B")  # the ones compiled, and timed for more than one token, unless others are asked for
# Where a launch's beginning and end count little: rmsnorm's rows, matmul's T, N and C, attention's T with 16 and 8 heads of 128
LARGE_ROWS, LARGE_SIDE, LARGE_PROMPT = ((1 << 20, 1024), (8192, 4096)), 4096, 8192

Spec = tuple[tuple[int, ...], np.dtype]  # of an input that is rotated; integers are below the last entry of `below`


@dataclass(frozen=True)
class Work:
    """One row: inputs that are rotated, the call on them, what it must move and compute, and the same in PyTorch."""

    what: str
    inputs: tuple[Spec, ...]
    ours: Callable[..., Any]
    ceiling: str  # "read" or "copy"
    moved: int
    flops: int
    torch: Callable[..., Any] | None = None  # on tensors of the shapes below, activations bf16
    torch_inputs: tuple[Spec, ...] | None = None  # `inputs` unless PyTorch wants other shapes
    below: int = 1


def functional() -> Any:
    import torch.nn.functional

    return torch.nn.functional


def embed(s: Shape, T: int) -> Iterator[Work]:
    table, inputs = make((s.V, s.C), BF16), (((T,), I32),)
    weight = as_torch(table)
    yield Work(
        "", inputs, lambda ids: ops.embed(ids, table), "copy", T * s.C * 6, 0,
        lambda ids: functional().embedding(ids, weight), below=s.V,
    )  # fmt: skip


def rmsnorm(s: Shape, T: int) -> Iterator[Work]:
    yield from rmsnorm_of(T, s.C, F32, "")
    if T > 1:
        yield from rmsnorm_of(T, s.C, BF16, "to bf16", F32)
    weight = make((s.C,), F32)
    gain = as_torch(weight, dtype=BF16)
    yield Work(
        "residual", (((T, s.C), F32), ((T, s.C), F32)), lambda x, r: ops.rmsnorm(x, weight, residual=r), "copy",
        16 * T * s.C, 5 * T * s.C, lambda x, r: functional().rms_norm(x + r, (s.C,), gain, 1e-6),
    )  # fmt: skip


def rmsnorm_of(rows: int, C: int, dtype: np.dtype, what: str, read: np.dtype | None = None) -> Iterator[Work]:
    read, weight = read or dtype, make((C,), F32)
    gain = as_torch(weight, dtype=BF16)
    specs, torch_specs = (((rows, C), read), ((rows, C), dtype)), (((rows, C), BF16),)
    yield Work(
        what, specs, lambda x, out: ops.rmsnorm(x, weight, out=out), "copy",
        rows * C * (read.itemsize + dtype.itemsize), 4 * rows * C,
        lambda x: functional().rms_norm(x, (C,), gain, 1e-6), torch_specs,
    )  # fmt: skip


def matmul(s: Shape, T: int) -> Iterator[Work]:
    for what, N, C in (("o", s.C, s.H * s.D), ("down", s.C, s.F)):
        for x in (F32, BF16) if T > 1 else (F32,):
            inputs = ((T, C), x), ((N, C), BF16), ((T, N), F32)
            yield Work(
                what if x == F32 else f"{what}, x bf16", inputs,
                lambda x, w, r: ops.matmul(x, w, residual=r, out=r), "read" if T == 1 else "copy",
                2 * N * C + T * (x.itemsize * C + 8 * N), 2 * T * N * C,
                (lambda x, w, r: r + functional().linear(x, w)) if x == (F32 if T == 1 else BF16) else None,
            )  # fmt: skip
    if T == 1:
        inputs = ((1, s.C), F32), ((s.V, s.C), BF16)
        yield Work(
            "head", inputs, lambda x, w: ops.matmul(x, w), "read", 2 * s.V * s.C + 4 * (s.C + s.V), 2 * s.V * s.C,
            lambda x, w: functional().linear(x, w),
        )  # fmt: skip


def swiglu(s: Shape, T: int) -> Iterator[Work]:
    for x in (F32, BF16) if T > 1 else (F32,):  # the result likewise, as prompts are read
        inputs = ((T, s.C), x), ((s.F, s.C), BF16), ((s.F, s.C), BF16), ((T, s.F), x)
        yield Work(
            "" if x == F32 else "x bf16", inputs, lambda x, g, u, out: ops.swiglu(x, g, u, out=out),
            "read" if T == 1 else "copy", 4 * s.F * s.C + T * x.itemsize * (s.C + s.F), 4 * T * s.F * s.C,
            (lambda x, g, u, _: functional().silu(functional().linear(x, g)) * functional().linear(x, u))
            if x == (F32 if T == 1 else BF16) else None,
        )  # fmt: skip


def qkv_rope(s: Shape, T: int) -> Iterator[Work]:
    H, K, D, C = s.H, s.K, s.D, s.C
    tables = rope_table(D, max(T, CONTEXT), 1e6)
    cos, sin = map(launch.upload, tables)
    positions = launch.upload(np.arange(T, dtype=np.int32) + (CONTEXT - 1 if T == 1 else 0))
    gain, heads = make((D,), F32), H + 2 * K
    values = make((max(T, CONTEXT), K, D), BF16)
    options = dict(rows=positions, q_norm=gain, k_norm=gain, out=(None, None, values, None, None))
    turned = [as_torch(launch.upload(np.concatenate((a[:T], a[:T]), -1)[:, None]), dtype=BF16) for a in tables]

    def rotate(a: Any) -> Any:
        import torch

        cos, sin = turned
        low, high = a.chunk(2, -1)
        return a * cos + torch.cat((-high, low), -1) * sin

    def in_torch(x: Any, w: Any) -> Any:
        q, k, v = functional().linear(x, w).view(T, heads, D).split((H, K, K), 1)
        return rotate(q), rotate(k), v

    for x in (F32, BF16) if T > 1 else (F32,):
        yield Work(
            "" if x == F32 else "x bf16", (((T, C), x), *(((n * D, C), BF16) for n in (H, K, K))),
            lambda x, q, k, v: ops.qkv_rope(x, q, k, v, cos, sin, positions, **options), "read" if T == 1 else "copy",
            2 * heads * D * C + T * (x.itemsize * C + D * (4 * H + 6 * K)), 2 * T * heads * D * C,
            in_torch if x == (F32 if T == 1 else BF16) else None, (((T, C), BF16), ((heads * D, C), BF16)),
        )  # fmt: skip


def qk_norm(s: Shape, T: int) -> Iterator[Work]:
    H, K, D = s.H, s.K, s.D
    keys, rows = make((max(T, CONTEXT), K, D), BF16), launch.upload(np.arange(T, dtype=np.int32))
    gain = as_torch(make((D,), BF16))

    def in_torch(q: Any, k: Any) -> Any:
        return functional().rms_norm(q, (D,), gain, 1e-6), functional().rms_norm(k, (D,), gain, 1e-6)

    for x in (F32, BF16) if T > 1 else (F32,):
        out = make((T, H, D), x), keys
        yield Work(
            "" if x == F32 else "q to bf16", (((T, H, D), F32), ((T, K, D), F32), ((T, H), F32), ((T, K), F32)),
            lambda q, k, q_ms, k_ms, out=out: ops.qk_norm(q, k, q_ms, k_ms, rows=rows, out=out), "copy",
            T * ((4 + x.itemsize) * H + 6 * K) * D + 4 * T * (H + K), T * (H + K) * D,
            in_torch if x == (F32 if T == 1 else BF16) else None, (((T, H, D), BF16), ((T, K, D), BF16)),
        )  # fmt: skip


def attention(s: Shape, T: int) -> Iterator[Work]:
    H, K, D = s.H, s.K, s.D
    for S in (CONTEXT, 8 * CONTEXT, 32 * CONTEXT) if T == 1 else (T,):
        positions = launch.upload(np.arange(S - T, S, dtype=np.int32))
        seen = T * S - T * (T - 1) // 2

        def in_torch(q: Any, k: Any, v: Any) -> Any:
            return functional().scaled_dot_product_attention(q, k, v, is_causal=T > 1, enable_gqa=True)

        for x in (F32, BF16) if T > 1 else (F32,):
            out, cache = make((T, H, D), x), x if T > 1 else BF16
            yield Work(
                f"S {S}" if x == F32 else f"S {S}, q bf16", (((T, H, D), x), ((S, K, D), cache), ((S, K, D), cache)),
                lambda q, k, v, positions=positions, out=out: ops.attention(q, k, v, positions, out=out),
                "read" if T == 1 else "copy", 2 * (cache.itemsize * S * K + x.itemsize * T * H) * D, 4 * seen * H * D,
                in_torch if x == (F32 if T == 1 else BF16) else None,
                (((1, H, T, D), BF16), ((1, K, S, D), BF16), ((1, K, S, D), BF16)),
            )  # fmt: skip


def silu_mul(s: Shape, T: int) -> Iterator[Work]:
    yield Work(
        "", (((T, s.F), F32), ((T, s.F), F32)), lambda gate, up: ops.silu_mul(gate, up), "copy", 12 * T * s.F, 0,
        lambda gate, up: functional().silu(gate) * up,
    )  # fmt: skip


def argmax(s: Shape, T: int) -> Iterator[Work]:
    if T == 1:  # a step takes the arg-max of one row
        yield Work(
            "", (((1, s.V), F32),), lambda x: ops.argmax(x), "read", 4 * s.V, 0, lambda x: x.argmax(-1)
        )  # fmt: skip


def sample(s: Shape, T: int) -> Iterator[Work]:
    """With logits as peaked as a language model's, and as in a decoder just written, so not rotated."""
    rng = np.random.default_rng(0)  # the same in each run: how many ids top_p leaves decides the time
    logits = launch.upload(4 * rng.standard_normal(s.V, np.float32))
    draws, step = launch.upload(rng.random(1 << 16)), launch.upload(np.zeros(1, np.int32))
    tensor = as_torch(logits)

    def in_torch(top_k: int) -> Any:
        scores, ids = TORCH.topk(tensor / 0.6, top_k) if top_k else TORCH.sort(tensor / 0.6, descending=True)
        p = functional().softmax(scores, -1)
        p = p.masked_fill(p.cumsum(-1) - p > 0.95, 0.0)
        return ids.gather(-1, TORCH.multinomial(p, 1))

    for top_k, top_p in ((20, 0.95), (0, 0.95)) if T == 1 else ():
        yield Work(
            f"top_p {top_p}" + f", top_k {top_k}" * (top_k > 0), (),
            lambda top_k=top_k, top_p=top_p: ops.sample(logits, 0.6, top_k, top_p, uniforms=draws, step=step),
            "read", 4 * s.V, 0, lambda top_k=top_k: in_torch(top_k),
        )  # fmt: skip


def large_rmsnorm() -> Iterator[tuple[int, Work]]:
    for (rows, C), dtype in itertools.product(LARGE_ROWS, (F32, BF16)):
        for work in rmsnorm_of(rows, C, dtype, f"C {C}, {dtype.name}"):
            yield rows, work


def large_matmul() -> Iterator[tuple[int, Work]]:
    n = LARGE_SIDE
    yield n, Work(
        f"N {n}, C {n}, x bf16", (((n, n), BF16), ((n, n), BF16), ((n, n), F32)),
        lambda x, w, out: ops.matmul(x, w, out=out), "copy", 8 * n * n, 2 * n**3,
        lambda x, w, _: functional().linear(x, w),
    )  # fmt: skip


def large_attention() -> Iterator[tuple[int, Work]]:
    T = LARGE_PROMPT
    yield T, next(work for work in attention(SHAPES["0.6B"], T) if work.inputs[0][1] == BF16)


LARGE = {"rmsnorm": large_rmsnorm, "matmul": large_matmul, "attention": large_attention}
OPERATIONS = (embed, rmsnorm, qkv_rope, qk_norm, attention, matmul, swiglu, silu_mul, argmax, sample)


# ---- arrays ----

TORCH: Any = None  # the module, if it is there and sees the GPU


def make(shape: tuple[int, ...], dtype: np.dtype, below: int = 1) -> Any:
    """On the GPU: normally distributed values of deviation 0.02, or integers below `below`."""
    cp = launch.cupy()
    if dtype == I32:
        return cp.random.randint(0, below, shape, np.int32)
    return (cp.random.standard_normal(shape, dtype=np.float32) * np.float32(0.02)).astype(dtype)


def as_torch(array: Any, dtype: np.dtype | None = None) -> Any:
    """The array as PyTorch's, in bf16 if it holds floats of that type or if asked for; None without PyTorch."""
    if TORCH is None:
        return None
    if array.dtype == BF16:
        return TORCH.from_dlpack(array.view(np.int16)).view(TORCH.bfloat16)
    tensor = TORCH.from_dlpack(array)
    return tensor.to(TORCH.bfloat16) if dtype == BF16 else tensor.clone()


def torch_sets(work: Work, room: int) -> list[tuple[Any, ...]]:
    def first() -> tuple[Any, ...]:
        specs = work.torch_inputs or work.inputs
        return tuple(
            TORCH.randint(0, work.below, shape, device="cuda") if dtype == I32
            else 0.02 * TORCH.randn(shape, device="cuda", dtype=TORCH.bfloat16)
            for shape, dtype in specs
        )  # fmt: skip

    def again(tensor: Any) -> Any:
        return TORCH.randint_like(tensor, work.below) if tensor.dtype == TORCH.int64 else tensor.clone()

    return timing.rotated(first, again, room)


def our_sets(work: Work, room: int) -> list[tuple[Any, ...]]:
    def again(array: Any) -> Any:
        return make(array.shape, I32, work.below) if array.dtype == I32 else array.copy()

    return timing.rotated(lambda: tuple(make(*spec, work.below) for spec in work.inputs), again, room)


# ---- rows ----


class Ceilings:
    """Measured once, before everything else."""

    def __init__(self) -> None:
        self.read, self.copy = read_bandwidth("cuda"), timing.copy_bandwidth()
        self.node = timing.node_microseconds()
        self.tensor = timing.matmul_flops(TORCH) if TORCH is not None else None
        free_memory()

    def floor(self, work: Work) -> tuple[float, str]:
        """(microseconds, the ceiling that gives them)."""
        moving = 1e6 * work.moved / getattr(self, work.ceiling)
        computing = 1e6 * work.flops / self.tensor if self.tensor else 0.0
        return (computing, "tensor") if computing > moving else (moving, work.ceiling)

    def __str__(self) -> str:
        tensor = f", {self.tensor / 1e12:.0f} TFLOP/s" if self.tensor else ""
        memory = f"read {self.read / 1e12:.2f} TB/s, copy {self.copy / 1e12:.2f} TB/s"
        return f"{memory}{tensor}, empty node {self.node:.2f} us"


class Compiler:
    """torch.compile with what is left of the seconds for it."""

    def __init__(self, seconds: float, mode: str) -> None:
        self.left, self.mode = seconds, mode

    def time(self, function: Callable[..., Any], data: list[tuple[Any, ...]]) -> timing.Time | None:
        if self.left < 1:
            return None
        start = perf_counter()
        try:
            TORCH.compiler.reset()
            compiled = TORCH.compile(function, mode=self.mode, dynamic=False)
            with timing.time_limit(min(60, self.left)):
                compiled(*data[0])
                TORCH.cuda.synchronize()
            self.left -= perf_counter() - start
            return timing.torch_time(TORCH, lambda i: compiled(*data[i]), len(data))
        except Exception as error:
            self.left -= perf_counter() - start
            print(f"torch.compile: {type(error).__name__}: {str(error).splitlines()[:1]}", file=sys.stderr)
            return None


def free_memory() -> None:
    launch.cupy().get_default_memory_pool().free_all_blocks()
    if TORCH is not None:
        TORCH.cuda.empty_cache()


def row(size: str, T: int, operation: str, work: Work, ceilings: Ceilings, compiler: Compiler | None) -> dict[str, Any]:
    room = 2 * launch.cupy().cuda.Device().attributes["L2CacheSize"]
    data = our_sets(work, room)
    time = timing.graph_time(lambda i: work.ours(*data[i]), len(data))
    floor, ceiling = ceilings.floor(work)
    result = dict(operation=operation, what=work.what, size=size, tokens=T)
    result |= dict(microseconds=round(time.microseconds, 2), deviation_percent=round(time.percent, 1))
    result |= dict(gigabytes_per_second=round(work.moved / time.microseconds / 1e3, 1))
    result |= dict(teraflops=round(work.flops / time.microseconds / 1e6, 2))
    result |= dict(floor_microseconds=round(floor, 2), ceiling=ceiling)
    result |= dict(percent_of_ceiling=round(100 * floor / time.microseconds, 1), torch=None, torch_compiled=None)
    del data
    free_memory()
    if TORCH is not None and work.torch is not None:
        data = torch_sets(work, room)
        for key, measure in (
            ("torch", lambda: timing.torch_time(TORCH, lambda i: work.torch(*data[i]), len(data))),
            ("torch_compiled", lambda: compiler and compiler.time(work.torch, data)),
        ):
            try:
                time = measure()
            except Exception as error:  # an operation that this version or this recording does not support
                print(f"{operation}: {key}: {type(error).__name__}: {str(error).splitlines()[:1]}", file=sys.stderr)
                continue
            result[key] = time and round(time.microseconds, 2)
        del data
        free_memory()
    return result


def rows(options: argparse.Namespace, ceilings: Ceilings) -> Iterator[dict[str, Any]]:
    """What was measured; of an operation that fails only its "error", so that the others' time is not lost."""
    compiler = Compiler(options.compile_seconds, options.compile_mode)
    for T, size, operation, work in works(options):
        try:
            compiled = options.sizes or size in FEW_SIZES or size not in SHAPES
            yield row(size, T, operation, work, ceilings, compiler if compiled else None)
        except Exception as error:
            yield {"operation": operation, "what": work.what, "size": size, "tokens": T, "error": repr(error)[:300]}
            free_memory()


def works(options: argparse.Namespace) -> Iterator[tuple[int, str, str, Work]]:
    wanted = [f for f in OPERATIONS if options.operations is None or f.__name__ in options.operations]
    for T, (size, shape) in itertools.product(options.tokens, SHAPES.items()):
        if size not in (options.sizes or (SHAPES if T == 1 else FEW_SIZES)):
            continue
        for operation in wanted:
            for work in operation(shape, T):
                yield T, size, operation.__name__, work
    for name in [operation.__name__ for operation in wanted if options.large and operation.__name__ in LARGE]:
        for T, work in LARGE[name]():
            yield T, "large", name, work


COLUMNS = (
    ("operation", "operation"), ("what", "what"), ("shape", "size"), ("T", "tokens"), ("us", "microseconds"),
    ("± %", "deviation_percent"), ("GB/s", "gigabytes_per_second"), ("TFLOP/s", "teraflops"),
    ("floor us", "floor_microseconds"), ("ceiling", "ceiling"), ("% of it", "percent_of_ceiling"),
    ("torch us", "torch"), ("compiled us", "torch_compiled"),
)  # fmt: skip


def line(result: dict[str, Any], columns: tuple[tuple[str, str], ...] = COLUMNS) -> str:
    return "| " + " | ".join("–" if result[key] is None else str(result[key]) for _, key in columns) + " |"


def head(columns: tuple[tuple[str, str], ...] = COLUMNS) -> str:
    return "| " + " | ".join(name for name, _ in columns) + " |\n" + "|---" * len(columns) + "|"


HOST = (("operation", "operation"), ("through ops, us", "ops"), ("behind it, us", "cuda"))


def host_rows(wanted: list[str] | None) -> Iterator[dict[str, Any]]:
    """What one token's calls cost in Python at 0.6B shapes: through the door, and behind it (as the model calls them)."""
    for operation in OPERATIONS:
        name = operation.__name__
        if wanted is None or name in wanted:
            try:
                through, behind = host_microseconds(name, next(operation(SHAPES["0.6B"], 1)))
            except Exception as error:
                yield {"operation": name, "error": repr(error)[:300]}
                continue
            yield {"operation": name, "ops": round(through, 1), "cuda": round(behind, 1)}


def host_microseconds(name: str, work: Work) -> tuple[float, float]:
    data = tuple(make(*spec, work.below) for spec in work.inputs)
    front = getattr(ops, name)
    through = timing.host_microseconds(lambda: work.ours(*data))
    setattr(ops, name, getattr(cuda, name))
    try:
        return through, timing.host_microseconds(lambda: work.ours(*data))
    finally:
        setattr(ops, name, front)


def words(text: str) -> list[str]:
    return text.split(",")


def main() -> None:
    global TORCH
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = f"all for one token, else {', '.join(FEW_SIZES)}"
    parser.add_argument("--sizes", type=words, help=f"of {', '.join(SHAPES)} (default: {default})")
    parser.add_argument("--tokens", type=lambda text: [int(n) for n in words(text)], default=[1, 512, 2048])
    parser.add_argument("--operations", type=words, help="default: all")
    parser.add_argument("--no-torch", dest="torch", action="store_false")
    parser.add_argument("--no-large", dest="large", action="store_false", help="without the largest shapes")
    parser.add_argument("--compile-seconds", type=float, default=150, help="for torch.compile, all in all")
    parser.add_argument("--compile-mode", default="default", help="max-autotune-no-cudagraphs takes minutes")
    parser.add_argument("--output", default="benchmarks/results/ops.json")
    options = parser.parse_args()
    unknown = {*(options.sizes or ())} - set(SHAPES) or {*(options.operations or ())} - {f.__name__ for f in OPERATIONS}
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    launch.cupy()
    if options.torch:
        try:
            import torch

            TORCH = torch if torch.cuda.is_available() else None
        except ImportError:
            print("PyTorch is not installed: only our own times", file=sys.stderr)
    ceilings = Ceilings()
    print(f"{ceilings}\n\n{head()}", flush=True)
    results = []
    for result in rows(options, ceilings):
        results.append(result)
        print(line(result) if "error" not in result else f"failed: {result}", flush=True)
    print(f"\n{head(HOST)}")
    host = list(host_rows(options.operations))
    for result in host:
        print(line(result, HOST) if "error" not in result else f"failed: {result}")
    figures = {"ceilings": vars(ceilings), "rows": results, "host_microseconds": host}
    write_record(options.output, figures)
    sys.exit(any("error" in result for result in results + host))


if __name__ == "__main__":
    main()
