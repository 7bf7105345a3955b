"""Qwen3's forward pass, in operation names. The CPU and the GPU take the same path: a device brings its operations along.

The operations are called behind the door of `ops`: shapes and types follow from the configuration, against which the
weights were checked when they were read. Checking every call took a seventh of demo's time on the CPU (profiled).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from cuqwen import cuda, launch, reference
from cuqwen.cache import KVCache
from cuqwen.config import CheckpointError, Config
from cuqwen.rope import rope_table
from cuqwen.weights import LayerWeights, Weights

Array = Any


@dataclass(frozen=True)
class Device:
    """Where a model lives: its name, its operations, how arrays are made there, and the type that activations have."""

    name: str
    operations: ModuleType
    empty: Callable[[tuple[int, ...], Any], Array]
    upload: Callable[[np.ndarray], Array]
    dtype: np.dtype

    @classmethod
    def cpu(cls, dtype: Any = np.float32) -> Device:
        return cls("cpu", reference, np.empty, lambda array: array, np.dtype(dtype))

    @classmethod
    def cuda(cls) -> Device:
        return cls("cuda", cuda, lambda *spec: launch.empty(*spec), lambda a: launch.upload(a), np.dtype(np.float32))

    def place_weight(self, weight: np.ndarray) -> Array:
        """A weight where and as the operations want it: matrices as stored on the GPU, where vectors become float32
        (exactly); everything in the computing type on the CPU."""
        if self.name == "cpu":
            return weight.astype(self.dtype, copy=False)
        return self.upload(weight if weight.ndim > 1 else weight.astype(np.float32))


class Qwen3:
    """The network: weights and rotary table on one device. A sequence's state is in its `KVCache`, passed to each call."""

    def __init__(self, config: Config, weights: Weights, device: Device, kv_dtype: Any) -> None:
        self.config, self.weights, self.device, self.kv_dtype = config, weights, device, np.dtype(kv_dtype)
        for index, layer in enumerate(weights.layers):
            dtypes = {str(projection.dtype) for projection in (layer.q_proj, layer.k_proj, layer.v_proj)}
            if len(dtypes) > 1:  # one kernel reads all three
                raise CheckpointError(
                    f"model.layers.{index}.self_attn: wanted q_proj, k_proj and v_proj of one dtype on the GPU, "
                    f'got {" and ".join(sorted(dtypes))}; convert the checkpoint to one dtype or use device="cpu"'
                )
        self._grow_tables(256)

    def _grow_tables(self, length: int) -> None:
        table = rope_table(self.config.head_dim, length, self.config.rope_theta, self.device.dtype)
        self.cos, self.sin = map(self.device.upload, table)
        self.positions = self.device.upload(np.arange(length, dtype=np.int32))

    def new_cache(self, capacity: int) -> KVCache:
        """An empty cache for `capacity` tokens."""
        if capacity > len(self.positions):
            self._grow_tables(capacity)
        return KVCache(self.config, capacity, self.kv_dtype, self.device.empty)

    def forward(self, ids: Array, cache: KVCache, *, rows: int = 1) -> Array:
        """Append tokens to the sequence in `cache` and return the logits of the last `rows` of them.

        ids [T], integers in 0..V-1 on the model's device; returns [rows, V] float32 (on the CPU the model's dtype): row t
        scores the token after ids[t]. `cache.length` grows by T when all is done, so that a call that raises leaves the
        sequence as it was. Raises ValueError if the cache cannot hold T more tokens.
        """
        start, stop = cache.length, cache.length + len(ids)
        if stop > cache.capacity:
            raise ValueError(f"forward: ids: wanted at most {cache.capacity - start} more tokens, got {len(ids)}")
        logits = self.step(ids, self.positions[start:stop], cache, rows)
        cache.length = stop
        return logits

    def step(self, ids: Array, positions: Array, cache: KVCache, rows: int = 1) -> Array:
        """What `forward` does, for tokens at `positions` [T] int32, given as an array on the device: nothing here depends
        on their values, so that the launches of one token can be recorded and repeated."""
        ops, weights, eps = self.device.operations, self.weights, self.config.rms_norm_eps
        x = ops.embed(ids, weights.embed_tokens)
        for index, layer in enumerate(weights.layers):
            keys, values = cache.layer(index)
            h = ops.rmsnorm(x, layer.input_layernorm, eps)
            q = self._append(h, layer, positions, keys, values)
            h = ops.attention(q, keys, values, positions, out=q)
            x = ops.matmul(h.reshape(len(ids), -1), layer.o_proj, residual=x, out=x)
            h = ops.rmsnorm(x, layer.post_attention_layernorm, eps)
            h = ops.swiglu(h, layer.gate_proj, layer.up_proj)
            x = ops.matmul(h, layer.down_proj, residual=x, out=x)
        x = ops.rmsnorm(x[len(ids) - rows :], weights.norm, eps)
        return ops.matmul(x, weights.lm_head)

    def _append(self, h: Array, layer: LayerWeights, positions: Array, keys: Array, values: Array) -> Array:
        """Write k and v of the new tokens into their rows of the cache; return q [T, H, D]."""
        ops = self.device.operations
        normed = layer.q_norm is not None  # then k stays float32 until its norm is done
        q, k, _, q_ms, k_ms = ops.qkv_rope(
            h, layer.q_proj, layer.k_proj, layer.v_proj, self.cos, self.sin, positions, rows=positions,
            q_bias=layer.q_bias, k_bias=layer.k_bias, v_bias=layer.v_bias, q_norm=layer.q_norm, k_norm=layer.k_norm,
            out=(None, None if normed else keys, values, None, None),
        )  # fmt: skip
        if normed:
            q, _ = ops.qk_norm(q, k, q_ms, k_ms, self.config.rms_norm_eps, rows=positions, out=(q, keys))
        return q

    def read_bytes_per_token(self, context: int) -> int:
        """Bytes that one decoding step must read: all weights but the embedding table's other rows, and the cache."""
        matrices = [self.weights.lm_head]
        for layer in self.weights.layers:
            matrices += [value for value in vars(layer).values() if value is not None]
        return sum(m.nbytes for m in matrices) + context * KVCache.bytes_per_token(self.config, self.kv_dtype)
