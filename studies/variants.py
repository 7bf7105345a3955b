"""The forward pass of `cuqwen.model` again, with every boundary at which a number may be handed on in bf16.

`forward` calls the operations of `cuqwen.ops` in the model's order. What is rounded is a set of names from `BOUNDARIES`;
how q, k and v come about is one of four ways:

    Separate             rmsnorm, qkv_rope, qk_norm, as the model has it
    NormAfterRope        the literal reading of "norm after RoPE": the gain multiplies what is already rotated
    KeyRoundedUnrotated  k in bf16 before instead of after its rotation
    Fused                studies/fused_norm_qkv.cu, the attempt of one kernel
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from cuqwen import launch, ops
from cuqwen.model import Qwen3
from cuqwen.weights import LayerWeights

Array = Any
AttentionInput = Callable[[Array, LayerWeights], tuple[Array, Array, Array]]  # x [T, C], a layer -> q, k, v

BF16 = ml_dtypes.bfloat16
FUSED_KERNEL = Path(__file__).with_name("fused_norm_qkv.cu")

# In the order of the forward pass. Each is "this number is rounded to bf16 where one operation hands it to the next".
ATTENTION_INPUT = {
    "h": "normalised input h",
    "projections": "projections of q, k, before the gain",
    "rotated": "q, k gained and rotated, before the norm's scalar",
    "cos_sin": "cos/sin table",
    "q": "q after its norm",
    "k": "k after its norm (the cache)",
    "v": "v (the cache)",
}
ELSEWHERE = {
    "attention": "attention output",
    "residual": "residual stream",
    "mlp_input": "normalised input of the MLP",
    "gate_up": "gate and up",
    "activation": "silu(gate) · up",
    "final_norm": "final norm",
    "logits": "logits",
}
BOUNDARIES = {**ATTENTION_INPUT, **ELSEWHERE}
CACHE = frozenset({"k", "v"})  # what the package rounds by default
FUSED_ROUNDINGS = frozenset({"h", "projections", "q", "k", "v"})  # those of the fused kernel in bf16


def to_bf16(x: Array) -> Array:
    """Rounded to bf16 once, to nearest even; float32 again."""
    return x.astype(BF16).astype(np.float32)


def forward(
    network: Qwen3,
    ids: Array,
    attention_input: AttentionInput,
    rounded: Collection[str] = (),
    watch: Callable[[Array], None] = lambda x: None,
) -> Array:
    """Logits [T, V] float32 of `ids` [T], int32 on the network's device.

    rounded: names of BOUNDARIES; those of ATTENTION_INPUT but for q, k and v are `attention_input`'s own affair.
    watch: called with the residual stream [T, C] after each layer.
    """

    def at(boundary: str, x: Array) -> Array:
        return to_bf16(x) if boundary in rounded else x

    weights, eps = network.weights, network.config.rms_norm_eps
    positions = network.positions[: len(ids)]
    x = ops.embed(ids, weights.embed_tokens)
    for layer in weights.layers:
        q, k, v = attention_input(x, layer)
        q, k, v = at("q", q), at("k", k), at("v", v)
        if set(rounded) >= CACHE:  # then exactly as the package stores it
            k, v = k.astype(BF16), v.astype(BF16)
        h = at("attention", ops.attention(q, k, v, positions))
        x = at("residual", ops.matmul(h.reshape(len(ids), -1), layer.o_proj, residual=x))
        h = at("mlp_input", ops.rmsnorm(x, layer.post_attention_layernorm, eps))
        gate, up = at("gate_up", ops.matmul(h, layer.gate_proj)), at("gate_up", ops.matmul(h, layer.up_proj))
        x = at("residual", ops.matmul(at("activation", ops.silu_mul(gate, up)), layer.down_proj, residual=x))
        watch(x)
    x = at("final_norm", ops.rmsnorm(x, weights.norm, eps))
    return at("logits", ops.matmul(x, weights.lm_head))


class Separate:
    """rmsnorm, qkv_rope and qk_norm, with those boundaries of ATTENTION_INPUT rounded that are named."""

    def __init__(self, network: Qwen3, length: int, rounded: Collection[str] = ()) -> None:
        network.new_cache(length)  # grows the rotary table
        self.rounded, self.eps = rounded, network.config.rms_norm_eps
        self.positions = network.positions[:length]
        self.cos, self.sin = self._at("cos_sin", network.cos[:length]), self._at("cos_sin", network.sin[:length])

    def _at(self, boundary: str, x: Array) -> Array:
        return to_bf16(x) if boundary in self.rounded else x

    def __call__(self, x: Array, layer: LayerWeights) -> tuple[Array, Array, Array]:
        h = self._at("h", ops.rmsnorm(x, layer.input_layernorm, self.eps))
        q, k, v, q_ms, k_ms = self.project(h, layer)
        q, k = ops.qk_norm(self._at("rotated", q), self._at("rotated", k), q_ms, k_ms, self.eps)
        return q, k, v

    def project(self, h: Array, layer: LayerWeights) -> tuple[Array, Array, Array, Array, Array]:
        """q, k, v and the mean squares, as `ops.qkv_rope` returns them."""
        projections = layer.q_proj, layer.k_proj, layer.v_proj
        if "projections" not in self.rounded:
            gains = {"q_norm": layer.q_norm, "k_norm": layer.k_norm}
            return ops.qkv_rope(h, *projections, self.cos, self.sin, self.positions, **gains)
        # the same in steps: a rotation by nothing, the rounding, then statistics, gain and rotation of what is left
        q, k, v, _, _ = ops.qkv_rope(h, *projections, *self._no_rotation(), self.positions)
        q, k = to_bf16(q), to_bf16(k)
        q_ms, k_ms = (q * q).mean(axis=-1), (k * k).mean(axis=-1)
        return self._rotated(q * layer.q_norm), self._rotated(k * layer.k_norm), v, q_ms, k_ms

    def _no_rotation(self) -> tuple[Array, Array]:
        """A table of cosines and sines that leaves everything where it is."""
        cos, sin = self.cos.copy(), self.sin.copy()
        cos[:], sin[:] = 1, 0
        return cos, sin

    def _rotated(self, x: Array) -> Array:
        out, half = x.copy(), x.shape[-1] // 2
        cos, sin = self.cos[:, None, :], self.sin[:, None, :]
        out[..., :half] = x[..., :half] * cos - x[..., half:] * sin
        out[..., half:] = x[..., half:] * cos + x[..., :half] * sin
        return out


class NormAfterRope(Separate):
    """The norm, gain and all, after the rotation: what a drawing with the boxes in that order says when it is obeyed."""

    def project(self, h: Array, layer: LayerWeights) -> tuple[Array, Array, Array, Array, Array]:
        projections = layer.q_proj, layer.k_proj, layer.v_proj
        q, k, v, q_ms, k_ms = ops.qkv_rope(h, *projections, self.cos, self.sin, self.positions)
        return q * layer.q_norm, k * layer.k_norm, v, q_ms, k_ms


class KeyRoundedUnrotated(Separate):
    """k rounded to bf16 after its norm but before its rotation, as if a cache stored it so; nothing else rounded."""

    def __call__(self, x: Array, layer: LayerWeights) -> tuple[Array, Array, Array]:
        q, _, v = super().__call__(x, layer)
        rotary, (self.cos, self.sin) = (self.cos, self.sin), self._no_rotation()
        _, k, _ = super().__call__(x, layer)
        self.cos, self.sin = rotary
        return q, self._rotated(to_bf16(k)), v


class Fused:
    """studies/fused_norm_qkv.cu with `dtype` at each of its boundaries: bf16 is the earlier attempt."""

    def __init__(self, network: Qwen3, length: int, dtype: Any = BF16) -> None:
        network.new_cache(length)
        self.network, self.dtype, self.positions = network, np.dtype(dtype), network.positions[:length]

    def __call__(self, x: Array, layer: LayerWeights) -> tuple[Array, Array, Array]:
        network, config, (tokens, width) = self.network, self.network.config, x.shape
        heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        shapes = [(tokens, n, dim) for n in (heads, kv_heads, kv_heads)]
        q, k, v = (network.device.empty(shape, self.dtype) for shape in shapes)
        weights = layer.q_proj, layer.k_proj, layer.v_proj, layer.q_norm, layer.k_norm
        sizes = np.int32(heads), np.int32(kv_heads), np.float32(config.rms_norm_eps)
        run = self._load(launch.is_gpu_array(x), layer.q_proj.dtype, width, dim)
        table = network.cos, network.sin, self.positions
        run((tokens, heads + 2 * kv_heads), (256,), (q, k, v, x, layer.input_layernorm, *weights, *table, *sizes))
        return q.astype(np.float32), k.astype(np.float32), v.astype(np.float32)

    def _load(self, on_gpu: bool, weight_dtype: Any, width: int, dim: int) -> Callable[..., None]:
        """Compiled for the GPU, or for this CPU by tests/emulator.py."""
        names = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
        own = names[self.dtype.name]
        defines = (
            ("W_TYPE", names[np.dtype(weight_dtype).name]),
            *((name, own) for name in ("H_TYPE", "A_TYPE", "OUT_TYPE")),
            ("HIDDEN", str(width)),
            ("HEAD_DIM", str(dim)),
        )
        if on_gpu:
            load = launch.load_function
        else:
            from emulator import load_function as load
        return load(str(FUSED_KERNEL.with_suffix("")), "fused_norm_qkv_row", defines)
