"""What a model will need of its device's memory, told from the checkpoint's headers before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cuqwen import launch, weights
from cuqwen.cache import KVCache
from cuqwen.config import Config
from cuqwen.model import CHUNK, Device, Workspace, activation_dtype

# Kernels, the decoder's tables, logits of a row or two and other small arrays: bytes on a GPU
FIXED_BYTES = 96 << 20
LEAST_CONTEXT, LEAST_CHUNK, CONTEXT_GRAIN = 256, 256, 256  # tokens
SPARE = 0.03  # of what is free, left alone where the context is chosen to fit
F32 = np.dtype(np.float32)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a model needs on its device when the context is full.

    weights: all tensors. bytes_per_token: keys, values and rotary tables, which grow as texts do. workspace: everything
    else, whatever the length of the prompt (on the CPU, an estimate of what NumPy needs for a chunk of a prompt).
    context: most tokens of prompt and answer together. chunk: prompt tokens that go through the layers together.
    free: bytes that were free when the plan was made; None where that is not known.
    """

    device: str  # "cuda" or "cpu"
    weights: int
    bytes_per_token: int
    workspace: int
    context: int
    chunk: int
    free: int | None

    @property
    def cache(self) -> int:
        """Bytes of the cache when the context is full."""
        return self.context * self.bytes_per_token

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.workspace

    def __str__(self) -> str:
        parts = f"weights {_gb(self.weights)} + cache {_gb(self.cache)} for {self.context:,} tokens"
        free = "" if self.free is None else f" of {self.place}"
        return f"{parts} + workspace {_gb(self.workspace)} = {_gb(self.total)}{free}"

    @property
    def place(self) -> str:
        """What is free, and where."""
        return f"{_gb(self.free or 0)} free {'on the GPU' if self.device == 'cuda' else 'in main memory'}"


def plan(
    folder: Path, config: Config, device: Device, kv_dtype: Any, max_context: int | None = None, *, exact: bool = False
) -> MemoryPlan:
    """What the checkpoint in `folder` needs with a context of `max_context` tokens; None: with the longest that fits, up to
    the model's own.

    Raises CheckpointError for files that `weights.read` would refuse, MemoryError with the numbers if that does not fit
    into what is free.
    """
    stored = weights.stored(folder, config)
    needed, free = _weight_bytes(stored.values(), device), free_bytes(device)
    matrices = {
        weights.DTYPES[kind] for name, (shape, kind) in stored.items() if ".layers." in name and len(shape) == 2
    }
    dtype = activation_dtype(device.name, device.dtype, exact, matrices)
    itemsize = device.dtype.itemsize
    row = KVCache.bytes_per_token(config, kv_dtype) + config.head_dim * itemsize + 4  # cosines, sines, the position
    wide = 0  # by which the workspace grows with a token of the context
    if device.name == "cpu":  # keys, values, scores of 256 queries in a layer, with copies (see reference.attention)
        wide = (4 * config.num_key_value_heads * config.head_dim + 2 * 256 * config.num_attention_heads) * itemsize
    budget = math.inf if free is None else free if max_context else (1 - SPARE) * free
    chunk = CHUNK[device.name]

    def make(context: int) -> MemoryPlan:
        workspace = _workspace_bytes(config, min(chunk, context), device, dtype, kv_dtype, matrices) + wide * context
        return MemoryPlan(device.name, needed, row, workspace, context, min(chunk, context), free)

    wanted = make(max_context or config.context_length)
    while chunk > LEAST_CHUNK and 16 * (wanted.workspace - wide * wanted.context) > budget - needed:
        chunk //= 2
        wanted = make(wanted.context)
    if wanted.total <= budget:
        return wanted
    rest = budget - needed - wanted.workspace + wide * wanted.context
    fitting = math.floor(rest / (row + wide) / CONTEXT_GRAIN) * CONTEXT_GRAIN
    least = min(wanted.context, LEAST_CONTEXT)
    if max_context is None:
        if fitting >= least:
            return make(fitting)
        wanted = make(least)
    remedy = f"use max_context={fitting} (--max-context {fitting})" if fitting >= least else "use a smaller model"
    needs = str(wanted).partition(" = ")[0]
    raise MemoryError(f"load: {folder}: wanted {_gb(wanted.total)} ({needs}), got {wanted.place}; {remedy}")


def free_bytes(device: Device) -> int | None:
    """Memory that can be allocated on `device`; None where that is not known."""
    if device.name == "cuda":
        return launch.free_bytes()
    limits = [_available(Path("/proc/meminfo")), _cgroup(Path("/sys/fs/cgroup"))]
    known = [limit for limit in limits if limit is not None]
    return min(known, default=None)


def _available(path: Path) -> int | None:
    """What Linux says can be had without swapping."""
    try:
        lines = dict(line.split(":", 1) for line in path.read_text(encoding="ascii").splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, LookupError):
        return None


def _cgroup(folder: Path) -> int | None:
    """What the container has left, if it has a limit. Pages of files count as used but make room when they must."""
    try:
        limit, used = (int((folder / name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current"))
        pages = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
        return max(0, limit - used + int(pages["inactive_file"]))
    except (OSError, ValueError, LookupError):  # "max": no limit
        return None


def _weight_bytes(stored: Iterable[tuple[tuple[int, ...], str]], device: Device) -> int:
    """As `Device.place_weight` puts them: float32 for vectors on a GPU, the computing type for all on the CPU."""
    return sum(
        math.prod(shape) * (device.dtype if device.name == "cpu" or len(shape) == 1 else weights.DTYPES[kind]).itemsize
        for shape, kind in stored
    )


def _workspace_bytes(
    c: Config, tokens: int, device: Device, dtype: np.dtype, kv_dtype: Any, matrices: set[np.dtype]
) -> int:
    shapes = Workspace.shapes(c, tokens, dtype, kv_dtype)
    arrays = sum(math.prod(shape) * kind.itemsize for shape, kind in shapes.values())
    wide = tokens * c.intermediate_size * device.dtype.itemsize
    if device.name == "cpu":
        return 2 * arrays + 3 * wide
    on_tensor_cores = matrices == {weights.DTYPES["BF16"]} and c.hidden_size % 8 == 0
    if not on_tensor_cores:
        arrays += 2 * wide  # `swiglu` in two products
    if not (on_tensor_cores and c.head_dim in (64, 128)):  # q and k, which wait in float32 for their norm
        arrays += tokens * (c.num_attention_heads + c.num_key_value_heads) * c.head_dim * F32.itemsize
    return arrays + FIXED_BYTES


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
