"""The published dense Qwen3 models as random networks of the same shapes: what speed depends on, without a download."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from cuqwen.config import Config
from cuqwen.model import Device, Qwen3
from cuqwen.weights import LayerWeights, Weights

SIZES = {  # layers, hidden, query heads, feed-forward, whether the head is the embedding
    "0.6B": (28, 1024, 16, 3072, True),
    "1.7B": (28, 2048, 16, 6144, True),
    "4B": (36, 2560, 32, 9728, True),
    "8B": (36, 4096, 32, 12288, False),
    "14B": (40, 5120, 40, 17408, False),
    "32B": (64, 5120, 64, 25600, False),
}
TOKENS = 151669  # ids that Qwen3's tokenizer has, of 151,936 rows
NOISE = 1 << 24  # numbers, of which all weights are made


def config_of(size: str, layers: int | None = None) -> Config:
    """`size`: a key of SIZES. layers: so many instead of all."""
    all_layers, hidden, heads, ffn, tied = SIZES[size]
    return Config(
        model_type="qwen3", hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers or all_layers,
        num_attention_heads=heads, num_key_value_heads=8, head_dim=128, vocab_size=151936, max_position_embeddings=40960,
        rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=tied, dtype="bfloat16", eos_token_id=(),
    )  # fmt: skip


def random_network(config: Config, device: Device, kv_dtype: Any, *, seed: int = 0, **options: Any) -> Qwen3:
    """A network of that shape with normally distributed weights, made on its device: bf16 matrices on a GPU, the computing
    type on the CPU. options: of `Qwen3`.

    Each matrix consists of pieces of one array of random numbers, so that a GPU needs no library for them.
    """
    rng = np.random.default_rng(seed)
    noise = device.upload(rng.standard_normal(NOISE, np.float32))
    dtype = device.dtype if device.name == "cpu" else np.dtype(ml_dtypes.bfloat16)

    def matrix(rows: int, columns: int) -> Any:
        result = device.empty((rows, columns), dtype)
        flat, scale = result.reshape(-1), np.float32(columns**-0.5)
        for first in range(0, flat.size, NOISE // 2):
            part = flat[first : first + NOISE // 2]
            start = int(rng.integers(NOISE - len(part)))
            part[...] = (noise[start : start + len(part)] * scale).astype(dtype)
        return result

    def gain(width: int) -> Any:
        return device.upload((1 + 0.1 * rng.standard_normal(width)).astype(device.dtype))

    c = config
    width, kv_width = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    layers = [
        LayerWeights(
            input_layernorm=gain(c.hidden_size), q_proj=matrix(width, c.hidden_size),
            k_proj=matrix(kv_width, c.hidden_size), v_proj=matrix(kv_width, c.hidden_size), q_bias=None, k_bias=None,
            v_bias=None, q_norm=gain(c.head_dim), k_norm=gain(c.head_dim), o_proj=matrix(c.hidden_size, width),
            post_attention_layernorm=gain(c.hidden_size), gate_proj=matrix(c.intermediate_size, c.hidden_size),
            up_proj=matrix(c.intermediate_size, c.hidden_size), down_proj=matrix(c.hidden_size, c.intermediate_size),
        )
        for _ in range(c.num_hidden_layers)
    ]  # fmt: skip
    table = matrix(c.vocab_size, c.hidden_size)
    head = table if c.tie_word_embeddings else matrix(c.vocab_size, c.hidden_size)
    return Qwen3(config, Weights(table, layers, gain(c.hidden_size), head), device, kv_dtype, **options)
