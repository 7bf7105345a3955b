"""Tokens a second of single-token steps: the step in one launch and the portable one, by model size, context and choice.

    python -m benchmarks.decode [--sizes 0.6B,1.7B,4B,8B] [--output benchmarks/results/decode.json]

Random weights of Qwen3's shapes and random keys and values as context. A row is wall-clock time over `TOKENS` tokens as
`generate` makes them: one step ahead of the host, each token read by it. `end_to_end` is `model.stream` on a checkpoint of
0.6B's shape, text and all. The floor is the bytes of weights and cache over the read bandwidth measured first.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks.record import ROOT, write_record
from benchmarks.timing import read_bandwidth
from cuqwen import launch
from cuqwen.config import Config
from cuqwen.decode import Choice, Decoder
from cuqwen.model import Device, Qwen3
from cuqwen.sampling import Sampling
from cuqwen.weights import LayerWeights, Weights

BF16 = ml_dtypes.bfloat16
TOKENS, SKIPPED, REPEATS = 400, 20, 3
SAMPLED = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "seed": 1}
CONTEXTS = (20, 128, 1024, 4096, 8192, 32768)
SIZES = {  # layers, hidden, query heads, feed-forward
    "0.6B": (28, 1024, 16, 3072), "1.7B": (28, 2048, 16, 6144), "4B": (36, 2560, 32, 9728), "8B": (36, 4096, 32, 12288),
}  # fmt: skip


def random_model(size: str, layers: int | None = None) -> Qwen3:
    """A network of Qwen3's shape, or of the first few layers of it, with random weights made on the GPU."""
    all_layers, hidden, heads, ffn = SIZES[size]
    layers = layers or all_layers
    config = Config(
        model_type="qwen3", hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=8, head_dim=128, vocab_size=151936, max_position_embeddings=40960, rms_norm_eps=1e-6,
        rope_theta=1e6, tie_word_embeddings=size != "8B", dtype="bfloat16", eos_token_id=(),
    )  # fmt: skip
    cp = launch.cupy()

    def matrix(*shape: int) -> Any:
        return (cp.random.standard_normal(shape, dtype=np.float32) * shape[1] ** -0.5).astype(BF16)

    def gain(width: int) -> Any:
        return 1 + 0.1 * cp.random.standard_normal(width, dtype=np.float32)

    width, kv_width = heads * 128, 8 * 128
    blocks = [
        LayerWeights(
            input_layernorm=gain(hidden), q_proj=matrix(width, hidden), k_proj=matrix(kv_width, hidden),
            v_proj=matrix(kv_width, hidden), q_bias=None, k_bias=None, v_bias=None, q_norm=gain(128), k_norm=gain(128),
            o_proj=matrix(hidden, width), post_attention_layernorm=gain(hidden), gate_proj=matrix(ffn, hidden),
            up_proj=matrix(ffn, hidden), down_proj=matrix(hidden, ffn),
        )
        for _ in range(layers)
    ]  # fmt: skip
    table = matrix(151936, hidden)
    head = table if config.tie_word_embeddings else matrix(151936, hidden)
    return Qwen3(config, Weights(table, blocks, gain(hidden), head), Device.cuda(), BF16)


def tokens_per_second(model: Qwen3, context: int, **sampling: Any) -> tuple[float, str | None]:
    """(tokens a second after `context` tokens, why not in one launch)."""
    cp = launch.cupy()
    cache = model.new_cache(context + TOKENS)
    for array in (cache.keys, cache.values):
        for layer in array:
            layer[...] = cp.random.standard_normal(layer.shape, dtype=np.float32).astype(BF16)
    cache.length = context
    choice = Choice(model, Sampling(**sampling), [1], 151669, TOKENS)
    decoder = Decoder(model, cache, choice)
    logits = decoder.step(launch.upload(np.array([1], np.int32)))
    times, read = [], launch.read_later(decoder.state)
    for _ in range(TOKENS - 2):
        logits, read, this = decoder.step(decoder.ids), launch.read_later(decoder.state), read
        choice.check(this(), logits)
        times.append(time.perf_counter())
    return (len(times) - SKIPPED) / (times[-1] - times[SKIPPED - 1]), decoder.obstacle


def rows(size: str, bandwidth: float) -> Iterator[dict[str, Any]]:
    model = random_model(size)
    plans = [(context, "greedy", {}, "0") for context in (CONTEXTS if size == "0.6B" else CONTEXTS[:3])]
    if size == "0.6B":
        plans += [(128, "sampled", SAMPLED, "0"), (128, "greedy", {}, "1"), (128, "sampled", SAMPLED, "1")]
    for context, name, sampling, portable in plans:
        os.environ["CUQWEN_PORTABLE"] = portable
        runs = [tokens_per_second(model, context, **sampling) for _ in range(REPEATS)]
        speed, moved = statistics.median(run[0] for run in runs), model.read_bytes_per_token(context + TOKENS // 2)
        yield {
            "size": size, "context": context, "choice": name, "one_launch": runs[0][1] is None, "why_not": runs[0][1],
            "tokens_per_second": [round(run[0], 1) for run in runs], "median": round(speed, 1),
            "microseconds": round(1e6 / speed, 1), "floor_microseconds": round(moved / bandwidth * 1e6, 1),
            "terabytes_per_second": round(moved * speed / 1e12, 3), "percent_of_read": round(100 * moved * speed / bandwidth, 1),
        }  # fmt: skip
    os.environ["CUQWEN_PORTABLE"] = "0"


def end_to_end() -> Iterator[dict[str, Any]]:
    sys.path.insert(0, str(ROOT / "tests"))
    from checkpoints import write_0_6b

    import cuqwen

    with tempfile.TemporaryDirectory() as scratch:
        model = cuqwen.load(write_0_6b(Path(scratch) / "model", k_gains="ordinary", seed=0), device="cuda")
        prompt = np.random.default_rng(0).integers(0, 151643, 128).tolist()
        for name, sampling in (("greedy", {"temperature": 0.0}), ("sampled", SAMPLED)):
            speeds = []
            for _ in range(REPEATS):
                times = [time.perf_counter() for _ in model.stream(prompt, max_tokens=TOKENS, **sampling)]
                if len(times) > 2 * SKIPPED:  # a random model may end early
                    speeds.append(round((len(times) - SKIPPED) / (times[-1] - times[SKIPPED - 1]), 1))
            yield {"context": 128, "choice": name, "tokens_per_second": speeds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--output", default="benchmarks/results/decode.json")
    options = parser.parse_args()
    bandwidth, results = read_bandwidth(), []
    print(f"read: {bandwidth / 1e12:.2f} TB/s", flush=True)
    for size in options.sizes.split(","):
        for row in rows(size, bandwidth):
            results.append(row)
            print("{size:5} {context:6} {choice:8} {median:8.1f} tok/s {microseconds:8.1f} us, floor {floor_microseconds:7.1f}, {percent_of_read:5.1f} % of read, one launch: {one_launch}".format(**row), flush=True)  # fmt: skip
        launch.cupy().get_default_memory_pool().free_all_blocks()
    ends = list(end_to_end())
    print(ends, flush=True)
    write_record(options.output, {"tokens": TOKENS, "sampling": SAMPLED, "read_bytes_per_second": bandwidth, "rows": results, "end_to_end": ends})  # fmt: skip


if __name__ == "__main__":
    main()
