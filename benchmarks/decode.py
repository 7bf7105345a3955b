"""Tokens a second of single-token steps: the step in one launch and the portable one, by model size, context and choice.

    python -m benchmarks.decode [--sizes 0.6B,1.7B,4B,8B] [--compare] [--folder CHECKPOINT] [--output FILE]

Random weights of Qwen3's shapes and random keys and values as context. A row is wall-clock time over answers as `generate`
makes them, each token read by the host, that begin at the row's context: `TOKENS` tokens, `FEW` for larger sizes and long
contexts; at the shortest context ten that stay within 128 tokens.
`end_to_end` is `model.stream` on a checkpoint of 0.6B's shape, text and all. The floor is the bytes of weights and cache over
the read bandwidth measured first. --compare: transformers' `generate` on random weights of 0.6B's shape, eager, and with a
static cache and torch.compile.
"""

from __future__ import annotations

import argparse
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
from benchmarks.timing import time_limit
from cuqwen import bench, launch, sizes
from cuqwen.bandwidth import read_bandwidth
from cuqwen.cache import KVCache
from cuqwen.model import Device, Qwen3
from cuqwen.sampling import Sampling
from cuqwen.sizes import SIZES

BF16 = ml_dtypes.bfloat16
TOKENS, FEW, REPEATS = 1000, 200, 3
SHORT = 128  # tokens of context
CONTEXTS = (20, SHORT, 1024, 4096, 8192, 32768)
MEASURED = ("0.6B", "1.7B", "4B", "8B")
COMPARE_SECONDS = 120.0


def random_model(size: str, layers: int | None = None) -> Qwen3:
    """A network of Qwen3's shape, or of the first few layers of it, with random weights made on the GPU."""
    return sizes.random_network(sizes.config_of(size, layers), Device.cuda(), BF16)


def fill(cache: KVCache, context: int) -> None:
    """Random keys and values for `context` tokens."""
    noise = launch.upload(np.random.default_rng(0).standard_normal(1 << 20, np.float32).astype(BF16))
    for array in (cache.keys, cache.values):
        for layer in array:
            flat = layer.reshape(-1)
            for first in range(0, flat.size, noise.size):
                part = flat[first : first + noise.size]
                part[...] = noise[: part.size]
    cache.length = context


def row(model: Qwen3, size: str, context: int, choice: str, portable: bool, bandwidth: float) -> dict[str, Any]:
    tokens, repeats = TOKENS if size == "0.6B" and context <= 1024 else FEW, REPEATS
    if size == "0.6B" and context < SHORT:
        tokens, repeats = SHORT - context, 10
    case = bench.Case(0, tokens, context, choice)
    cache = model.new_cache(context + tokens)
    fill(cache, context)
    with bench.portable_steps(portable):
        decoder, runs = bench.answers(model, cache, sizes.TOKENS, case, repeats)
    next(runs)
    speeds = [tokens / next(runs) for _ in range(repeats)]
    speed, moved = statistics.median(speeds), bench.bytes_per_token(model, case)
    return {
        "size": size, "context": context, "choice": choice, "tokens": tokens, "one_launch": decoder.obstacle is None,
        "why_not": decoder.obstacle, "tokens_per_second": [round(each, 1) for each in speeds], "median": round(speed, 1),
        "microseconds": round(1e6 / speed, 1), "floor_microseconds": round(moved / bandwidth * 1e6, 1),
        "terabytes_per_second": round(moved * speed / 1e12, 3), "percent_of_read": round(100 * moved * speed / bandwidth, 1),
    }  # fmt: skip


def rows(size: str, bandwidth: float) -> Iterator[dict[str, Any]]:
    model = random_model(size)
    plans = []
    for context in CONTEXTS if size == "0.6B" else CONTEXTS[:3]:
        plans.append((context, "greedy", False))
        if size == "0.6B" and context <= 1024:  # at once, as memory's place makes some percent
            plans.append((context, "sampled", False))
    if size == "0.6B":
        plans += [(128, "greedy", True), (128, "sampled", True)]
    for context, choice, portable in plans:
        yield row(model, size, context, choice, portable, bandwidth)


def end_to_end(folder: Path | None) -> Iterator[dict[str, Any]]:
    """The rate after the first 20 tokens of an answer to 128, with a checkpoint of 0.6B's shape."""
    sys.path.insert(0, str(ROOT / "tests"))
    from checkpoints import write_0_6b

    import cuqwen

    skipped = 20
    with tempfile.TemporaryDirectory() as scratch:
        folder = folder or write_0_6b(Path(scratch) / "model", k_gains="ordinary", seed=0)
        model = cuqwen.load(folder, device="cuda")
        prompt = np.random.default_rng(0).integers(0, 151643, 128).tolist()
        for name, sampling in (("greedy", Sampling()), ("sampled", bench.SAMPLED)):
            speeds = []
            for _ in range(REPEATS):
                times = [time.perf_counter() for _ in model.stream(prompt, max_tokens=TOKENS, **vars(sampling))]
                if len(times) > 2 * skipped:  # a random model may end early
                    speeds.append(round((len(times) - skipped) / (times[-1] - times[skipped - 1]), 1))
            yield {"context": 128, "choice": name, "tokens_per_second": speeds}


def compare() -> Iterator[dict[str, Any]]:
    """transformers at context 128; compiling may take a minute."""
    from cuqwen.commands import peers

    network = random_model("0.6B")
    model = peers.load(None, network)
    if model is None:
        yield {"engine": "transformers", "error": "not installed"}
        return
    for kind in ("eager", "static"):
        case = bench.Case(0, 128, 128)
        try:
            with time_limit(COMPARE_SECONDS):
                rates = peers.measure(model, kind, network, sizes.TOKENS, case, REPEATS).rates
        except Exception as error:
            yield {"engine": f"transformers {kind}", "error": f"{type(error).__name__}: {error}"[:200]}
        else:
            yield {"engine": f"transformers {kind}", "context": 128, "tokens_per_second": [round(r, 1) for r in rates]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default=",".join(MEASURED), help=f"of {', '.join(SIZES)}")
    parser.add_argument("--folder", type=Path, help="for end_to_end, instead of a random checkpoint of 0.6B's shape")
    parser.add_argument("--compare", action="store_true", help="transformers as well, if it is installed")
    parser.add_argument("--output", default="benchmarks/results/decode.json")
    options = parser.parse_args()
    bandwidth, results = read_bandwidth("cuda"), []
    print(f"read: {bandwidth / 1e12:.2f} TB/s", flush=True)
    for size in options.sizes.split(","):
        for result in rows(size, bandwidth):
            results.append(result)
            print("{size:5} {context:6} {choice:8} {median:8.1f} tok/s {microseconds:8.1f} us, floor {floor_microseconds:7.1f}, {percent_of_read:5.1f} % of read, one launch: {one_launch}".format(**result), flush=True)  # fmt: skip
        launch.release_memory()
    ends = list(end_to_end(options.folder))
    print(ends, flush=True)
    record = {"tokens": TOKENS, "sampling": vars(bench.SAMPLED), "read_bytes_per_second": bandwidth, "rows": results, "end_to_end": ends, "transformers": []}  # fmt: skip
    write_record(options.output, record)  # before what may take minutes
    if options.compare:
        for peer in compare():
            print(peer, flush=True)
            record["transformers"].append(peer)
            write_record(options.output, record)


if __name__ == "__main__":
    main()
