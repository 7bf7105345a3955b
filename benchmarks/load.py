"""How fast weights get from files to the GPU: a random checkpoint of Qwen3-8B's shape, 16 GB in several files.

    python -m benchmarks.load [--size 8B] [--folder FOLDER] [--output benchmarks/results/load.json]

The files are written first, so they are in the page cache. Beside it, in the same run: reading them into page-locked buffers
by one and by several threads, copying such a buffer to the GPU, and safetensors' own loader for PyTorch. Takes twice the
files' size of main memory or disk, and their size on the GPU.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

import cuqwen
from benchmarks.record import write_record
from cuqwen import launch
from cuqwen.config import Config
from cuqwen.hub import DEMO_FOLDER
from cuqwen.sizes import config_of
from cuqwen.weights import expected_tensors

BLOCK = 256 << 20  # random bytes, which all files repeat
SHARD = 4 << 30
PIECE = 8 << 20
READERS = (1, 2, 4, 8, 16)
REPEATS = 5


def write_checkpoint(folder: Path, config: Config) -> list[Path]:
    """A checkpoint of this shape, its data random bytes. Returns the weight files."""
    shards: list[dict[str, Any]] = [{}]
    ends, index = [0], {}
    for name, shape in expected_tensors(config).items():
        size = 2 * math.prod(shape)
        if ends[-1] + size > SHARD:
            shards.append({})
            ends.append(0)
        shards[-1][name] = {"dtype": "BF16", "shape": shape, "data_offsets": [ends[-1], ends[-1] + size]}
        ends[-1] += size
        index[name] = len(shards) - 1
    paths = [folder / f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    block = np.random.default_rng(0).bytes(BLOCK)

    def write(path: Path, header: bytes, size: int) -> None:
        with open(path, "wb", buffering=0) as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for start in range(0, size, BLOCK):
                file.write(memoryview(block)[: size - start])

    with ThreadPoolExecutor(len(shards)) as pool:
        list(pool.map(write, paths, (json.dumps(shard).encode() for shard in shards), ends))
    weight_map = {name: paths[shard].name for name, shard in index.items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    document = {**asdict(config), "hidden_act": "silu", "attention_bias": False, "use_sliding_window": False}
    (folder / "config.json").write_text(json.dumps(document), encoding="utf-8")
    shutil.copyfile(DEMO_FOLDER / "tokenizer.json", folder / "tokenizer.json")
    return paths


def read_rate(paths: list[Path], threads: int, most: int) -> float:
    """Bytes a second at which threads read the first `most` bytes of the files into a page-locked buffer each."""
    pieces = iter(
        [(path, at) for path in paths for at in range(0, path.stat().st_size - PIECE, PIECE)][: most // PIECE]
    )
    lock, done = threading.Lock(), [0] * threads
    buffers = [launch.cupy().cuda.alloc_pinned_memory(PIECE) for _ in range(threads)]

    def take() -> Iterator[tuple[Path, int]]:
        while True:
            with lock:
                piece = next(pieces, None)
            if piece is None:
                return
            yield piece

    def work(number: int) -> None:
        memory = memoryview(buffers[number]).cast("B")[:PIECE]
        for path, at in take():
            with open(path, "rb", buffering=0) as file:
                file.seek(at)
                done[number] += file.readinto(memory)

    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))
    return sum(done) / (time.perf_counter() - started)


def copy_rate() -> float:
    """Bytes a second from a page-locked buffer to the GPU."""
    cuda = launch.cupy().cuda
    source, target = cuda.alloc_pinned_memory(BLOCK), launch.empty((BLOCK,), np.uint8)
    np.frombuffer(source, np.uint8)[...] = 1
    times = []
    with cuda.Stream(non_blocking=True) as stream:
        for _ in range(REPEATS):
            started = time.perf_counter()
            for _ in range(8):
                target.data.copy_from_host_async(ctypes.c_void_p(source.ptr), BLOCK, stream)
            stream.synchronize()
            times.append(time.perf_counter() - started)
    return 8 * BLOCK / min(times)


def load_seconds(folder: Path) -> float:
    started = time.perf_counter()
    model = cuqwen.load(folder, device="cuda", max_context=1024)
    seconds = time.perf_counter() - started
    model.close()
    del model
    gc.collect()
    launch.release_memory()
    return seconds


def safetensors_seconds(paths: list[Path]) -> float | None:
    """PyTorch's tensors on the GPU by the format's own library; None where that is not installed."""
    try:
        import torch
        from safetensors.torch import load_file
    except ImportError:
        return None
    torch.zeros(1, device="cuda")
    started = time.perf_counter()
    tensors = [load_file(path, device="cuda") for path in paths]
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    del tensors
    gc.collect()
    torch.cuda.empty_cache()
    return seconds


def measure(folder: Path, size: str) -> dict[str, Any]:
    started = time.perf_counter()
    paths = write_checkpoint(folder, config_of(size))
    total = sum(path.stat().st_size for path in paths)
    print(f"{total / 1e9:.1f} GB in {len(paths)} files written in {time.perf_counter() - started:.1f} s", flush=True)
    launch.cupy().zeros(1)
    copy = copy_rate()
    reads = {threads: read_rate(paths, threads, total if threads > 2 else 2 << 30) for threads in READERS}
    seconds = [load_seconds(folder) for _ in range(REPEATS + 1)]  # the first one compiles
    rate = total / statistics.median(seconds[1:])
    return {
        "size": size, "bytes": total, "files": len(paths), "copy": copy, "reads": reads, "first_load_seconds": seconds[0],
        "load_seconds": seconds[1:], "rate": rate, "percent_of_slower": 100 * rate / min(copy, max(reads.values())),
        "safetensors_torch_seconds": safetensors_seconds(paths),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="benchmarks/results/load.json")
    parser.add_argument("--size", default="8B", help="of Qwen3, as in cuqwen/sizes.py (default 8B)")
    parser.add_argument(
        "--folder", type=Path, help="where the files go, and are removed from (default: a temporary folder)"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        figures = measure(Path(scratch), options.size)
    for name, figure in figures.items():
        print(f"{name:28}{figure}")
    write_record(options.output, figures)


if __name__ == "__main__":
    sys.exit(main())
