"""Times every operation on the GPU at the shapes of Qwen3-0.6B and 8B, for one token and for 512.

    python -m benchmarks.ops [--output benchmarks/results/ops.json]

Each function below is named as its operation and returns (call, bytes that must be moved, floating-point operations).
Inputs are rotated among sets that together exceed the L2 cache; times are medians of CUDA events around batches of calls,
launches included as a stream of calls pays them. The ceiling is measured first in the same run: a device-to-device copy.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks.record import write_record
from cuqwen import launch, ops, rope_table
from cuqwen.config import Config

BF16 = ml_dtypes.bfloat16
L2_BYTES = 64_000_000
CONTEXT = 1024
SHAPES = {
    "0.6B": dict(hidden_size=1024, intermediate_size=3072, num_attention_heads=16, vocab_size=151936),
    "8B": dict(hidden_size=4096, intermediate_size=12288, num_attention_heads=32, vocab_size=151936),
}

Timed = tuple[Callable[[int], Any], int, int]


def make(*shape: int, dtype: Any = np.float32) -> Any:
    """Normally distributed values on the GPU."""
    cp = launch.cupy()
    return (cp.random.standard_normal(shape, dtype=np.float32) * 0.02).astype(dtype)


def sets(*arrays: Callable[[], Any]) -> list[tuple[Any, ...]]:
    """As many copies of the inputs as it takes to exceed the L2 cache twice, four at least."""
    first = tuple(array() for array in arrays)
    count = min(64, max(4, 2 * L2_BYTES // max(1, sum(a.nbytes for a in first)) + 1))
    return [first, *(tuple(array() for array in arrays) for _ in range(count - 1))]


def embed(c: Config, T: int) -> Timed:
    table, ids = make(c.vocab_size, c.hidden_size, dtype=BF16), [launch.upload(np.random.default_rng(i).integers(0, c.vocab_size, T, np.int32)) for i in range(64)]  # fmt: skip
    return lambda i: ops.embed(ids[i % 64], table), T * c.hidden_size * 6, 0


def rmsnorm(c: Config, T: int) -> Timed:
    data, weight = sets(lambda: make(T, c.hidden_size)), make(c.hidden_size)
    return lambda i: ops.rmsnorm(data[i % len(data)][0], weight), T * c.hidden_size * 8, 4 * T * c.hidden_size


def matmul(c: Config, T: int) -> Timed:
    F, C = c.intermediate_size, c.hidden_size
    data = sets(lambda: make(T, C), lambda: make(F, C, dtype=BF16))
    return lambda i: ops.matmul(*data[i % len(data)]), F * C * 2 + 4 * T * (F + C), 2 * T * F * C


def qkv_rope(c: Config, T: int) -> Timed:
    C, D, H, K = c.hidden_size, c.head_dim, c.num_attention_heads, c.num_key_value_heads
    data = sets(lambda: make(T, C), *[lambda n=n: make(n * D, C, dtype=BF16) for n in (H, K, K)])
    cos, sin = map(launch.upload, rope_table(D, CONTEXT, 1e6))
    positions, gain = launch.upload(np.arange(T, dtype=np.int32)), make(D)
    rows = (H + 2 * K) * D
    call = lambda i: ops.qkv_rope(*data[i % len(data)], cos, sin, positions, q_norm=gain, k_norm=gain)  # noqa: E731
    return call, rows * C * 2 + 4 * T * (rows + C), 2 * T * rows * C


def qk_norm(c: Config, T: int) -> Timed:
    H, K, D = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    data = sets(*[lambda s=s: make(*s) for s in ((T, H, D), (T, K, D), (T, H), (T, K))])
    return lambda i: ops.qk_norm(*data[i % len(data)]), 8 * T * (H + K) * D, T * (H + K) * D


def attention(c: Config, T: int) -> Timed:
    H, K, D, S = c.num_attention_heads, c.num_key_value_heads, c.head_dim, CONTEXT
    data = sets(lambda: make(T, H, D), *[lambda: make(S, K, D, dtype=BF16)] * 2)
    positions = launch.upload(np.arange(S - T, S, dtype=np.int32))
    seen = T * S - T * (T - 1) // 2
    return lambda i: ops.attention(*data[i % len(data)], positions), 4 * S * K * D + 8 * T * H * D, 4 * seen * H * D


def silu_mul(c: Config, T: int) -> Timed:
    data = sets(*[lambda: make(T, c.intermediate_size)] * 2)
    return lambda i: ops.silu_mul(*data[i % len(data)]), 12 * T * c.intermediate_size, 0


def argmax(c: Config, T: int) -> Timed:
    data = sets(lambda: make(T, c.vocab_size))
    return lambda i: ops.argmax(data[i % len(data)][0]), 4 * T * c.vocab_size, 0


def microseconds(call: Callable[[int], Any], repeats: int = 15, batch: int = 20) -> float:
    """Median time of one call, in microseconds."""
    cp = launch.cupy()
    counter = itertools.count()
    times = []
    for _ in range(repeats + 3):  # the first three warm up
        start, stop = cp.cuda.Event(), cp.cuda.Event()
        start.record()
        for _ in range(batch):
            call(next(counter))
        stop.record()
        stop.synchronize()
        times.append(1e3 * cp.cuda.get_elapsed_time(start, stop) / batch)
    return statistics.median(times[3:])


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a 2 GB copy on the device."""
    source = launch.empty((1 << 30,), np.uint8)
    target = launch.empty(source.shape, np.uint8)
    return 2 * source.nbytes / microseconds(lambda _: launch.cupy().copyto(target, source), batch=3) * 1e6


def rows(ceiling: float) -> Iterator[dict[str, Any]]:
    timed = (embed, rmsnorm, qkv_rope, qk_norm, attention, matmul, silu_mul, argmax)
    for (size, shape), T, operation in itertools.product(SHAPES.items(), (1, 512), timed):
        if operation is argmax and T > 1:
            continue  # a step takes the arg-max of one row
        config = Config(
            model_type="qwen3", num_hidden_layers=1, num_key_value_heads=8, head_dim=128, max_position_embeddings=40960,
            rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=True, dtype="bfloat16", eos_token_id=(), **shape,
        )  # fmt: skip
        call, moved, flops = operation(config, T)
        time = microseconds(call)
        row = dict(operation=operation.__name__, shapes=size, tokens=T, microseconds=round(time, 2))
        row |= dict(
            gigabytes_per_second=round(moved / time / 1e3, 1),
            percent_of_copy=round(100 * moved / time * 1e6 / ceiling, 1),
        )
        row |= dict(teraflops=round(flops / time / 1e6, 2))
        yield row
        del call
        launch.cupy().get_default_memory_pool().free_all_blocks()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="benchmarks/results/ops.json")
    options = parser.parse_args()
    ceiling = copy_bandwidth()
    print(
        f"copy: {ceiling / 1e12:.2f} TB/s\n{'operation':10} {'shapes':6} {'T':>4} {'us':>9} {'GB/s':>8} {'% copy':>7} {'TFLOP/s':>8}"
    )
    results = []
    for row in rows(ceiling):
        results.append(row)
        print("{operation:10} {shapes:6} {tokens:4} {microseconds:9.2f} {gigabytes_per_second:8.1f} {percent_of_copy:7.1f} {teraflops:8.2f}".format(**row), flush=True)  # fmt: skip
    write_record(options.output, {"copy_bytes_per_second": ceiling, "rows": results})


if __name__ == "__main__":
    main()
