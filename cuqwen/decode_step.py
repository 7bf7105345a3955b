"""One token in one launch: kernels/decode_step.cu, its tables and its place on the GPU. Hopper and later."""

from __future__ import annotations

from typing import Any

import numpy as np

from cuqwen import cuda, launch
from cuqwen.cache import KVCache
from cuqwen.model import Qwen3

Array = Any

# Of each layer, in the order of `enum Array` in the kernel.
ARRAYS = (
    "input_layernorm", "q_proj", "k_proj", "v_proj", "q_bias", "k_bias", "v_bias", "q_norm", "k_norm", "o_proj",
    "post_attention_layernorm", "gate_proj", "up_proj", "down_proj",
)  # fmt: skip
THREADS = 288  # eight consumer warps and the producer's
SLOT_BYTES = 16 << 10
MAX_SPLITS = 16
MAX_UNIT_HEADS = 4  # more query heads at a time take too many registers


def defines(model: Qwen3) -> launch.Defines:
    """The constants that the kernel is compiled with."""
    c = model.config
    group = c.num_attention_heads // c.num_key_value_heads
    sizes = {
        "LAYERS": c.num_hidden_layers, "HIDDEN": c.hidden_size, "HEADS": c.num_attention_heads,
        "KV_HEADS": c.num_key_value_heads, "HEAD_DIM": c.head_dim, "FFN": c.intermediate_size,
        "QK_NORM": int(c.has_qk_norm), "QKV_BIAS": int(c.has_qkv_bias), "UNIT_HEADS": _unit_heads(group),
        "SLOTS": _slots(c), "IN_FLIGHT": 1, "HEAD_IN_FLIGHT": 4,
    }  # fmt: skip
    types = {"W_TYPE": "bf16", "KV_TYPE": cuda.STORAGE[model.kv_dtype]}
    return (*((name, str(value)) for name, value in sizes.items()), *types.items())


def _unit_heads(group: int) -> int:
    """Query heads of a key head that one block computes together: the largest divisor of the group up to four."""
    return max(n for n in range(1, MAX_UNIT_HEADS + 1) if group % n == 0)


def _slots(config: Any) -> int:
    return 12 if config.head_dim * _unit_heads(config.num_attention_heads // config.num_key_value_heads) <= 256 else 11


def shared_bytes(config: Any) -> int:
    """Dynamic shared memory of a block: the ring and what struct Shared holds, with room for its alignment."""
    heads, dim = _unit_heads(config.num_attention_heads // config.num_key_value_heads), config.head_dim
    own = 2 * 64 * 12 * 4 + 2 * 8 * 4 + 8 * 96 * 4 + 8 * config.num_hidden_layers * len(ARRAYS) + 4 * dim * (heads + 3) + 8 * heads * dim * 4 + 2 * heads * 8 * 4 + 8 * 8
    return _slots(config) * SLOT_BYTES + 16 * _slots(config) + own + 64


def obstacle(model: Qwen3) -> str | None:
    """Why the kernel cannot run this model here; None if it can."""
    c = model.config
    matrices = [model.weights.embed_tokens, model.weights.lm_head]
    for layer in model.weights.layers:
        matrices += [array for array in vars(layer).values() if array is not None and array.ndim == 2]
    if any(cuda.STORAGE.get(m.dtype) != "bf16" for m in matrices):
        return "it takes bf16 weights"
    widths = (c.hidden_size, c.num_attention_heads * c.head_dim, c.intermediate_size)
    if any(width % 64 for width in widths) or c.vocab_size % 8 or c.head_dim not in (64, 128):
        return "it takes sizes that are multiples of 64, heads of 64 or 128 and a vocabulary that is a multiple of 8"
    return None


class DecodeStep:
    """The step of one sequence: `ids` [1] and `position` [1], int32 on the device, go in; `logits` [1, V] float32 come out,
    and `ids` and `position` are those of the next greedy step.
    """

    def __init__(self, model: Qwen3, cache: KVCache, n_ids: int, blocks: int) -> None:
        c, upload = model.config, model.device.upload
        self.model, self.cache = model, cache
        self.ids, self.position = (model.device.empty((1,), np.int32) for _ in range(2))
        self.logits = model.device.empty((1, c.vocab_size), np.float32)
        addresses = [
            [0 if (array := getattr(layer, name)) is None else launch.address(array) for name in ARRAYS]
            for layer in model.weights.layers
        ]
        self.table = upload(np.array(addresses, np.uint64))
        group = _unit_heads(c.num_attention_heads // c.num_key_value_heads)
        heads, width = c.num_attention_heads, c.num_attention_heads * c.head_dim
        rows = width + 2 * c.num_key_value_heads * c.head_dim
        shares = heads // group * MAX_SPLITS * (group * c.head_dim + 2 * group)
        self.words = upload(np.zeros(2 * c.hidden_size + rows + width + c.intermediate_size + shares + 2 * blocks, np.uint64))
        self.epoch = upload(np.ones(1, np.uint32))
        self.blocks = blocks
        self.tables = model.cos, model.sin
        self.args = (
            self.logits, self.ids, self.position, self.table, model.weights.embed_tokens, model.weights.lm_head,
            model.weights.norm, model.cos, model.sin, cache.keys, cache.values, self.words, self.epoch,
            np.int32(c.vocab_size), np.int32(n_ids), np.int32(cache.capacity), np.float32(c.rms_norm_eps),
        )  # fmt: skip
        self.function = launch.load_function("decode_step", "decode_step", defines(model))

    def __call__(self) -> None:
        """Launch the step on the current stream."""
        self.function((self.blocks,), (THREADS,), self.args, shared_bytes(self.model.config))
