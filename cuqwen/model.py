"""Qwen3's forward pass, in operation names. The CPU and the GPU take the same path: a device brings its operations along.

The operations are called behind the door of `ops`: shapes and types follow from the configuration, against which the
weights were checked when they were read. Checking every call took a seventh of demo's time on the CPU (profiled).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from cuqwen import cuda, launch, reference
from cuqwen.cache import KVCache
from cuqwen.config import CheckpointError, Config
from cuqwen.rope import rope_table
from cuqwen.weights import LayerWeights, Weights

Array = Any
Progress = Callable[[int, int], None]

F32, BF16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)
# Most prompt tokens that go through the layers together, by device: bounds the workspace, and an interrupt takes effect
# between two chunks.
CHUNK = {"cpu": 1024, "cuda": 8192}


@dataclass(frozen=True)
class Device:
    """Where a model lives: its name, its operations, how arrays are made and copied there, and the type that results have."""

    name: str
    operations: ModuleType
    empty: Callable[[tuple[int, ...], Any], Array]
    upload: Callable[[np.ndarray], Array]
    copy: Callable[[Array, Array], None]
    dtype: np.dtype

    @classmethod
    def cpu(cls, dtype: Any = np.float32) -> Device:
        return cls("cpu", reference, np.empty, lambda array: array, np.copyto, np.dtype(dtype))

    @classmethod
    def cuda(cls) -> Device:
        return cls(
            "cuda", cuda, lambda *spec: launch.empty(*spec), lambda a: launch.upload(a), lambda *pair: launch.copy(*pair), F32
        )  # fmt: skip

    def reserve_weight(self, shape: tuple[int, ...], dtype: np.dtype) -> Array | None:
        """Memory for a weight that stays as stored; None for one that is to be given to `place_weight`."""
        return self.empty(shape, dtype) if self.name == "cuda" and len(shape) > 1 else None

    def place_weight(self, weight: np.ndarray) -> Array:
        """A weight where and as the operations want it: matrices as stored on the GPU, where vectors become float32
        (exactly); everything in the computing type on the CPU."""
        if self.name == "cpu":
            return weight.astype(self.dtype, copy=False)
        return self.upload(weight if weight.ndim > 1 else weight.astype(np.float32))


def activation_dtype(device: str, dtype: Any, exact: bool, matrices: set[np.dtype]) -> np.dtype:
    """The type in which prompts go from operation to operation, for layers with `matrices` of these types."""
    return BF16 if device == "cuda" and not exact and matrices == {BF16} else np.dtype(dtype)


class Workspace(NamedTuple):
    """Where the activations of a chunk of T prompt tokens go: the same arrays for all layers and chunks. None: a new array."""

    x: Array = None  # [T, C] float32: the residual stream
    h: Array = None  # [T, C]: x normalised
    q: Array = None  # [T, H, D]: q, then what attention makes of it
    q_ms: Array = None  # [T, H] float32
    k_ms: Array = None  # [T, K] float32
    inner: Array = None  # [T, F]: gated

    @staticmethod
    def shapes(c: Config, tokens: int, dtype: Any, kv_dtype: Any) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """(shape, type) of the arrays, where the products read activations of `dtype` and the cache has `kv_dtype`."""
        dtype, q, k_ms = np.dtype(dtype), (tokens, c.num_attention_heads, c.head_dim), (tokens, c.num_key_value_heads)
        short = dtype == kv_dtype == BF16 and c.head_dim in (64, 128)  # what attention has tensor cores for
        return {
            "x": ((tokens, c.hidden_size), F32), "h": ((tokens, c.hidden_size), dtype), "q": (q, BF16 if short else F32),
            "q_ms": (q[:2], F32), "k_ms": (k_ms, F32), "inner": ((tokens, c.intermediate_size), dtype),
        }  # fmt: skip

    def rows(self, first: int, last: int) -> Workspace:
        """The same for the tokens first..last."""
        return Workspace(*(None if array is None else array[first:last] for array in self))


class Qwen3:
    """The network: weights and rotary table on one device. A sequence's state is in its `KVCache`, passed to each call.

    exact: keep float32 activations throughout. Otherwise chunks of more than cuda.FEW_ROWS tokens hand bf16 from operation
    to operation on a GPU, if the weights are bf16, each value rounded once; the residual stream stays float32.
    chunk: most tokens that `read` takes through the layers together.
    """

    def __init__(
        self, config: Config, weights: Weights, device: Device, kv_dtype: Any, *, exact: bool = False, chunk: int = 0
    ) -> None:
        self.config, self.weights, self.device, self.kv_dtype = config, weights, device, np.dtype(kv_dtype)
        for index, layer in enumerate(weights.layers):
            dtypes = {str(projection.dtype) for projection in (layer.q_proj, layer.k_proj, layer.v_proj)}
            if len(dtypes) > 1:  # one kernel reads all three
                raise CheckpointError(
                    f"model.layers.{index}.self_attn: wanted q_proj, k_proj and v_proj of one dtype on the GPU, "
                    f'got {" and ".join(sorted(dtypes))}; convert the checkpoint to one dtype or use device="cpu"'
                )
        matrices = (array for layer in weights.layers for array in vars(layer).values() if np.ndim(array) == 2)
        self.dtype = activation_dtype(device.name, device.dtype, exact, {np.dtype(array.dtype) for array in matrices})
        self.chunk = chunk or CHUNK[device.name]
        self.workspace = self._rows = Workspace()
        self._grow_tables(256)

    def _grow_tables(self, length: int) -> None:
        c = self.config
        table = rope_table(c.head_dim, length, c.rope_theta, self.device.dtype, scaling=c.rope_scaling)
        self.cos, self.sin = map(self.device.upload, table)
        self.positions = self.device.upload(np.arange(length, dtype=np.int32))

    def new_cache(self, capacity: int) -> KVCache:
        """An empty cache for `capacity` tokens."""
        if capacity > len(self.positions):
            self._grow_tables(capacity)
        return KVCache(self.config, capacity, self.kv_dtype, self.device.empty)

    def read(
        self, ids: np.ndarray, cache: KVCache, *, every_row: bool = False, progress: Progress | None = None
    ) -> Array:
        """Append a prompt of any length, chunk by chunk; return the logits of its last token [1, V], or of all [T, V].

        ids [T] int32 on the host. progress: called after each chunk with (tokens in the cache, tokens when all are read);
        what it raises ends the reading, and `cache.length` tells how far it came.
        """
        total, start = len(ids), cache.length
        bounds = [*range(0, total, self.chunk), total]
        if len(bounds) > 2 and bounds[-1] - bounds[-2] < self.chunk // 4:
            bounds[-2] -= self.chunk // 4  # a few tokens take as long as some hundred
        ids = self.device.upload(ids)
        result: Array = None
        if every_row:
            result = self.device.empty((total, self.config.vocab_size), self.device.dtype)
        under_way: Callable[[], Any] | None = None
        for first, last in itertools.pairwise(bounds):
            rows, out = (last - first, result[first:last]) if every_row else (int(last == total), None)
            logits = self.forward(ids[first:last], cache, rows=rows, out=out)
            before, under_way = under_way, launch.read_later(ids[first : first + 1])
            if before is not None:
                before()  # one chunk is enough for a GPU to have before it, and lets an interrupt through
                if progress is not None:
                    progress(start + first, start + total)
        if progress is not None and under_way is not None:
            under_way()
            progress(start + total, start + total)
        return result if every_row else logits

    def forward(self, ids: Array, cache: KVCache, *, rows: int = 1, out: Array | None = None) -> Array:
        """Append tokens to the sequence in `cache` and return the logits of the last `rows` of them.

        ids [T], integers in 0..V-1 on the model's device, T at most `chunk` on a GPU; returns [rows, V] float32 (on the CPU
        the model's dtype), or `out`: row t scores the token after ids[t]. `cache.length` grows by T when all is done, so that
        a call that raises leaves the sequence as it was. Raises ValueError if the cache cannot hold T more tokens.
        """
        start, stop = cache.length, cache.length + len(ids)
        if stop > cache.capacity:
            raise ValueError(f"forward: ids: wanted at most {cache.capacity - start} more tokens, got {len(ids)}")
        logits = self.step(ids, self.positions[start:stop], cache, rows, out)
        cache.length = stop
        return logits

    def step(self, ids: Array, positions: Array, cache: KVCache, rows: int = 1, out: Array | None = None) -> Array:
        """What `forward` does, for tokens at `positions` [T] int32, given as an array on the device: nothing here depends
        on their values, so that the launches of one token can be recorded and repeated."""
        ops, weights, eps = self.device.operations, self.weights, self.config.rms_norm_eps
        space = self._space(len(ids))
        x = ops.embed(ids, weights.embed_tokens, out=space.x)
        for index, layer in enumerate(weights.layers):
            keys, values = cache.layer(index)
            h = ops.rmsnorm(x, layer.input_layernorm, eps, out=space.h)
            q = self._append(h, layer, positions, keys, values, space)
            is_last = layer is weights.layers[-1]
            if is_last and rows == 0:
                return self.device.empty((0, self.config.vocab_size), self.device.dtype)
            h = ops.attention(q, keys, values, positions, out=q)
            if is_last and rows < len(ids):  # of the others no more than k and v is wanted
                first = len(ids) - rows
                x, h, space = x[first:], h[first:], space.rows(first, len(ids))
            x = ops.matmul(h.reshape(len(x), -1), layer.o_proj, residual=x, out=x)
            h = ops.rmsnorm(x, layer.post_attention_layernorm, eps, out=space.h)
            h = ops.swiglu(h, layer.gate_proj, layer.up_proj, out=space.inner)
            x = ops.matmul(h, layer.down_proj, residual=x, out=x)
        return ops.matmul(ops.rmsnorm(x, weights.norm, eps), weights.lm_head, out=out)

    def _space(self, tokens: int) -> Workspace:
        """The arrays for a chunk. None for few tokens: they are small, and recordings want their own."""
        if self.device.name == "cpu" or tokens <= cuda.FEW_ROWS:
            return Workspace()
        if self.workspace.x is None or len(self.workspace.x) < tokens:
            self.workspace = self._rows = Workspace()  # not two of them at once
            specs = Workspace.shapes(self.config, max(tokens, self.chunk), self.dtype, self.kv_dtype)
            self.workspace = Workspace(**{name: self.device.empty(*spec) for name, spec in specs.items()})
        if self._rows.x is None or len(self._rows.x) != tokens:
            self._rows = self.workspace.rows(0, tokens)
        return self._rows

    def _append(
        self, h: Array, layer: LayerWeights, positions: Array, keys: Array, values: Array, space: Workspace
    ) -> Array:
        """Write k and v of the new tokens into their rows of the cache; return q [T, H, D]."""
        q, *_ = self.device.operations.qkv_rope(
            h, layer.q_proj, layer.k_proj, layer.v_proj, self.cos, self.sin, positions, rows=positions,
            q_bias=layer.q_bias, k_bias=layer.k_bias, v_bias=layer.v_bias, q_norm=layer.q_norm, k_norm=layer.k_norm,
            eps=None if layer.q_norm is None else self.config.rms_norm_eps, out=(space.q, keys, values, space.q_ms, space.k_ms),
        )  # fmt: skip
        return q

    def read_bytes_per_token(self, context: int) -> int:
        """Bytes that one decoding step must read: all weights but the embedding table's other rows, and the cache."""
        matrices = [self.weights.lm_head]
        for layer in self.weights.layers:
            matrices += [value for value in vars(layer).values() if value is not None]
        return sum(m.nbytes for m in matrices) + context * KVCache.bytes_per_token(self.config, self.kv_dtype)
