"""Whole steps in one launch: kernels/decode_step.cu, its tables and its place on the GPU. Hopper and later."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import ml_dtypes
import numpy as np

from cuqwen import cuda, launch
from cuqwen.cache import KVCache
from cuqwen.config import Config
from cuqwen.model import Qwen3

Array = Any

F32, BF16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)

# Of each layer, in the order of `enum Array` in the kernel.
ARRAYS = (
    "input_layernorm", "q_proj", "k_proj", "v_proj", "q_bias", "k_bias", "v_bias", "q_norm", "k_norm", "o_proj",
    "post_attention_layernorm", "gate_proj", "up_proj", "down_proj",
)  # fmt: skip
WARPS = 8  # consumers of a block; one more produces
THREADS = 32 * (WARPS + 1)
KEY_FRAME_BYTES, SLOTS = 16 << 10, 13
COPIES = 4  # of the vectors that all blocks read
MAX_SPLITS = 16
HOPPER_SHARED_BYTES = 227 << 10
NO_CHOICE = -1  # in `ids`, where the logits leave no token
LOST, ENDED = 1, 2  # in `state`: a block gave up waiting; nothing follows
NOT_YET = -2  # in `tokens`
MAX_ENDS = 32
MAX_BLOCKS, MAX_LOTS, CHOSEN_PITCH = 1024, 8192, 16
MANY_KEYS = 2560  # cached tokens from which the two query heads of a key head are computed together


def variants() -> Iterator[tuple[str, launch.Defines]]:
    """(file, -D constants) for the shapes of Qwen3-0.6B, standing for all.

    Some larger ones spill registers (with the arg-max 8B 28 bytes, 4B 144, 14B 688, 32B 1,328), which their longer streams
    hide.
    """
    for kv_dtype, sampled, many_keys in (
        (BF16, False, False),
        (F32, False, False),
        (BF16, True, False),
        (BF16, False, True),
    ):
        config = Config(
            model_type="qwen3", hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
            num_key_value_heads=8, head_dim=128, vocab_size=151936, max_position_embeddings=40960, rms_norm_eps=1e-6,
            rope_theta=1e6, tie_word_embeddings=True, dtype="bfloat16", eos_token_id=(),
        )  # fmt: skip
        yield "decode_step", defines(config, kv_dtype, sampled, many_keys)


def defines(c: Config, kv_dtype: np.dtype, sampled: bool = False, many_keys: bool = False) -> launch.Defines:
    """The constants that the kernel is compiled with. sampled: it chooses as `sample` does, not the arg-max; many_keys: for
    `MANY_KEYS` cached tokens or more."""
    sizes = {
        "LAYERS": c.num_hidden_layers, "HIDDEN": c.hidden_size, "HEADS": c.num_attention_heads,
        "KV_HEADS": c.num_key_value_heads, "HEAD_DIM": c.head_dim, "FFN": c.intermediate_size,
        "QK_NORM": int(c.has_qk_norm), "QKV_BIAS": int(c.has_qkv_bias), "UNIT_HEADS": _unit_heads(c, many_keys),
        "SEGMENT": _segment(c), "SLOTS": _slots(c, many_keys), "SAMPLED": int(sampled),
    }  # fmt: skip
    types = {"W_TYPE": "bf16", "KV_TYPE": cuda.STORAGE[kv_dtype]}
    return (*((name, str(value)) for name, value in sizes.items()), *types.items())


def _unit_heads(c: Config, many_keys: bool = False) -> int:
    """Query heads that one block computes together, as each reads the keys. The two of a key head apart, which is more blocks,
    where keys are few: Qwen3-0.6B on an H100, a token of 128, 1,024, 4,096 cached ones: apart 456, 490, 640 us, together 466,
    505, 608."""
    group = c.num_attention_heads // c.num_key_value_heads
    return 2 if group % 2 == 0 and (group > 2 or many_keys) else 1


def _segment(c: Config) -> int:
    """Columns of a frame: 1,024 of eight rows, or more of four."""
    return 2560 if c.hidden_size % 2560 == 0 else 1024


def slot_bytes(c: Config) -> int:
    """Of a frame in the ring."""
    segment = _segment(c)
    return (4 if segment > 1024 else 8) * segment * 2


def _slots(c: Config, many_keys: bool = False) -> int:
    """Frames in the ring: thirteen, or what fits beside the rest into the 227 KB that a block can have."""
    return min(SLOTS, (HOPPER_SHARED_BYTES - _own_bytes(c, many_keys)) // (slot_bytes(c) + 16))


def _own_bytes(c: Config, many_keys: bool) -> int:
    """Upper bound of the bytes of struct Shared but for the ring's barriers."""
    heads, dim = _unit_heads(c, many_keys), c.head_dim
    floats = (
        32
        + 2 * 64 * WARPS
        + 2 * WARPS
        + WARPS * 96
        + dim * (heads + 3)
        + 3 * heads * (dim // 2 + 16)
        + WARPS * heads * dim
        + 2 * heads * WARPS
    )
    return 4 * floats + 8 * c.num_hidden_layers * len(ARRAYS) + 16 * WARPS + 192


def shared_bytes(c: Config, many_keys: bool = False) -> int:
    """Dynamic shared memory of a block: the ring, its barriers, and struct Shared."""
    return _slots(c, many_keys) * (slot_bytes(c) + 16) + _own_bytes(c, many_keys)


def obstacle(model: Qwen3) -> str | None:
    """Why the kernel cannot run this model on this GPU; None if it can."""
    c = model.config
    matrices = [model.weights.embed_tokens, model.weights.lm_head]
    for layer in model.weights.layers:
        matrices += [array for array in vars(layer).values() if array is not None and array.ndim == 2]
    if any(cuda.STORAGE.get(m.dtype) != "bf16" for m in matrices):
        return "it takes bf16 weights"
    widths = (c.hidden_size, c.num_attention_heads * c.head_dim, c.intermediate_size)
    if any(width % 64 for width in widths) or c.vocab_size % 8 or c.head_dim not in (64, 128):
        return "it takes widths that are multiples of 64, heads of 64 or 128 and a vocabulary that is a multiple of 8"
    if min(_slots(c), _slots(c, many_keys=True)) < 4:
        return f"{c.num_hidden_layers} layers leave too little shared memory for the ring"
    if blocks(model) < _least_blocks(c):
        needed = f"{_least_blocks(c)} blocks with {shared_bytes(c) >> 10} KB of shared memory"
        return f"it takes a GPU of compute capability 9.0 or newer that runs {needed} at once"
    return None


def can_sample(model: Qwen3) -> bool:
    """Whether the kernel can also choose as `sample` does, in the ring's memory."""
    return _slots(model.config, many_keys=True) * slot_bytes(model.config) >= cuda.SAMPLE_SHARED_BYTES


def _least_blocks(c: Config) -> int:
    """For the layers; and one that chooses beside one that does not."""
    return max(2, c.num_attention_heads // _unit_heads(c), -(-c.hidden_size // 64))


def blocks(model: Qwen3) -> int:
    """Blocks that the step is launched with: all that the GPU runs at once, as long as each has rows of every matrix
    (the one that samples has none of the first layer's projections)."""
    c = model.config
    resident = launch.resident_blocks(
        "decode_step", "decode_step", defines(c, model.kv_dtype), THREADS, shared_bytes(c)
    )
    heads = c.num_attention_heads + 2 * c.num_key_value_heads
    return min(resident, MAX_BLOCKS, c.hidden_size // 4, c.intermediate_size // 4, heads * c.head_dim // 8)


class DecodeStep:
    """The steps of the sequence in `cache`: `ids` [1] and `position` [1], int32 on the device, go in; `logits` [1, V] float32
    of the last one come out, and `ids` and `position` are then those of the next one. Tokens are chosen below `n_ids`: the
    most likely ones, or as `choose_by` says.

    `state` [2] is `ids`, NO_CHOICE where the logits leave no token, and 0, ENDED, or LOST from when a block gave up waiting for
    another, which nothing takes back. `tokens` [capacity + 1] is memory of the host, where the token for each position
    appears while a launch goes on, in the place of NOT_YET if the caller has put that there; `halt` [1] as well: anything but
    0 there ends a launch within two tokens.

    Raises ValueError if there is an `obstacle`.
    """

    def __init__(self, model: Qwen3, cache: KVCache, n_ids: int) -> None:
        if reason := obstacle(model):
            raise ValueError(f"decode_step: {reason}")
        c, device = model.config, model.device
        self.grid = (blocks(model),)
        self.config, self.kv_dtype = c, model.kv_dtype
        self.state, self.position = device.upload(np.zeros(2, np.int32)), device.empty((1,), np.int32)
        self.ids = self.state[:1]
        self.logits = device.empty((1, c.vocab_size), np.float32)
        self.tokens, tokens = launch.host_array(cache.capacity + 1, np.int32)
        self.halt, halt = launch.host_array(1, np.int32)
        self.ends = device.empty((MAX_ENDS,), np.int32)
        self.end_ids: tuple[int, ...] = ()
        self.keep = model.weights, model.cos, model.sin, cache  # the kernel has bare addresses
        addresses = [
            [0 if (array := getattr(layer, name)) is None else launch.address(array) for name in ARRAYS]
            for layer in model.weights.layers
        ]
        boxes = [self._boxes(array) for array in (cache.keys, cache.values)]
        words = device.upload(np.zeros(exchange_words(c), np.uint64))
        self.args = (
            self.logits, self.state, self.position, tokens, halt, self.ends, device.upload(np.array(addresses, np.uint64)),
            model.weights.embed_tokens, model.weights.lm_head, model.weights.norm, model.cos, model.sin, cache.keys,
            cache.values, *boxes, words, device.upload(np.ones(1, np.uint32)), np.int32(c.vocab_size), np.int32(n_ids),
            np.int32(cache.capacity), np.float32(c.rms_norm_eps),
        )  # fmt: skip
        self.choose_by(None)

    def choose_by(self, plan: cuda.SamplingPlan | None, uniforms: Array | None = None) -> None:
        """Choose as `sample` does, by a plan for `n_ids` logits; None: the most likely token."""
        self._builds: dict[bool, tuple[Any, int]] = {}  # first: an interrupt may come between any two of these lines
        nothing = (None,) * 6, (np.int32(0),) * 4 + (np.float64(0),) * 7
        arrays, numbers = nothing if plan is None else (plan.arrays, plan.numbers)
        self.choice = (*arrays, uniforms, *numbers)
        self.sampled = plan is not None
        self._build(many_keys=False)

    def _build(self, many_keys: bool) -> tuple[Any, int]:
        """The kernel and its bytes of shared memory."""
        if many_keys not in self._builds:
            constants = defines(self.config, self.kv_dtype, self.sampled, many_keys)
            function = launch.load_function("decode_step", "decode_step", constants)
            self._builds[many_keys] = function, shared_bytes(self.config, many_keys)
        return self._builds[many_keys]

    def end_at(self, end_ids: Collection[int]) -> None:
        """After which tokens nothing follows; the first MAX_ENDS of them."""
        ends = tuple(end_ids)[:MAX_ENDS]
        if ends != self.end_ids:
            launch.copy(self.ends, launch.upload(np.array(ends + (NO_CHOICE,) * (MAX_ENDS - len(ends)), np.int32)))
            self.end_ids = ends

    @staticmethod
    def _boxes(array: Array) -> np.ndarray:
        """The map by which the kernel's producer copies keys or values, [L, S, K, D]."""
        layers, rows, _, dim = array.shape
        frame_keys = KEY_FRAME_BYTES // 2 // (dim * array.dtype.itemsize)
        return launch.tensor_map(array.view(np.uint16).reshape(layers * rows, -1), frame_keys)

    def expect(self, cached: int) -> None:
        """Load the kernel for steps with so many cached tokens: seconds, once on a machine."""
        if cached >= MANY_KEYS:
            self._build(many_keys=True)

    def __call__(self, count: int = 1, fresh: bool = True, cached: int = 0) -> None:
        """Launch up to `count` steps, the first with so many `cached` tokens, on the current stream; with `fresh` also if the
        launch before has ENDED."""
        few = min(count, max(0, MANY_KEYS - cached))
        if few:
            self._launch(False, few, fresh)
        if few < count:
            self._launch(True, count - few, fresh and not few)

    def _launch(self, many_keys: bool, count: int, fresh: bool) -> None:
        function, shared_bytes = self._build(many_keys)
        numbers = np.int32(len(self.end_ids)), np.int32(count), np.int32(fresh)
        function(self.grid, (THREADS,), (*self.args, *numbers, *self.choice), shared_bytes)


def exchange_words(c: Config) -> int:
    """Words through which blocks exchange values, as the kernel lays them out."""
    width = c.num_attention_heads * c.head_dim
    shares = c.num_attention_heads * MAX_SPLITS * (c.head_dim + 2)
    projected = width + 2 * c.num_key_value_heads * c.head_dim
    choice = (CHOSEN_PITCH + 2) * MAX_BLOCKS + 4 * MAX_LOTS + c.vocab_size
    return COPIES * (2 * c.hidden_size + projected + width + c.intermediate_size) + shares + choice
