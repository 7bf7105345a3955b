"""Checkpoint files to arrays: every expected tensor is found, every found tensor is expected.

A checkpoint is `model.safetensors`, or `model.safetensors.index.json` with the shards it names; where both are there,
the single file counts, as in transformers. Names, shapes and dtypes of all tensors are compared with the
configuration from the files' headers, before any data is read. bfloat16, float16 and float32 are handed on as stored,
whatever `dtype` in config.json says.

Not errors: names without the leading `model.` (the Embedding checkpoints); rotary `inv_freq` buffers (old files hold
them, they follow from rope_theta); and `lm_head.weight` beside tied embeddings (0.6B and 1.7B store it twice), but only
as a copy of the embedding. Where the two differ, config.json and the weights contradict each other, and frameworks
disagree on which one to believe (transformers 4 the first, transformers 5 the second), so that is refused.

Host memory at the peak, besides what `place` keeps: the buffers of staging.py, and one tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cuqwen.checkpoint import DTYPES, Tensor, shortened, survey
from cuqwen.config import CheckpointError, Config
from cuqwen.staging import Filling

Array = Any  # a NumPy or a CuPy array: whatever `place` returns

_EXPONENTS = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F800000}  # all ones in NaN and infinity
_LAYER_NAMES = {  # field of LayerWeights: the name in the file, after "model.layers.{i}."
    "input_layernorm": "input_layernorm.weight",
    "q_proj": "self_attn.q_proj.weight",
    "k_proj": "self_attn.k_proj.weight",
    "v_proj": "self_attn.v_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "o_proj": "self_attn.o_proj.weight",
    "post_attention_layernorm": "post_attention_layernorm.weight",
    "gate_proj": "mlp.gate_proj.weight",
    "up_proj": "mlp.up_proj.weight",
    "down_proj": "mlp.down_proj.weight",
}


@dataclass
class LayerWeights:
    """One layer. Projections are [out, in], row-major, as in the file."""

    input_layernorm: Array  # [C]
    q_proj: Array  # [H*D, C]
    k_proj: Array  # [K*D, C]
    v_proj: Array  # [K*D, C]
    o_proj: Array  # [C, H*D]
    post_attention_layernorm: Array  # [C]
    gate_proj: Array  # [F, C]
    up_proj: Array  # [F, C]
    down_proj: Array  # [C, F]
    q_bias: Array | None = None  # [H*D], Qwen2 only
    k_bias: Array | None = None  # [K*D], Qwen2 only
    v_bias: Array | None = None  # [K*D], Qwen2 only
    q_norm: Array | None = None  # [D], Qwen3 only
    k_norm: Array | None = None  # [D], Qwen3 only


@dataclass
class Weights:
    """All weights of a model."""

    embed_tokens: Array  # [V, C]
    layers: list[LayerWeights]
    norm: Array  # [C]
    lm_head: Array  # [V, C], the very object embed_tokens when the two are tied


def expected_tensors(config: Config) -> dict[str, tuple[int, ...]]:
    """The checkpoint name and shape of each tensor which a model with this configuration has, in layer order."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "q_proj": (q_size, hidden),
        "k_proj": (kv_size, hidden),
        "v_proj": (kv_size, hidden),
    }
    if config.has_qkv_bias:
        layer |= {"q_bias": (q_size,), "k_bias": (kv_size,), "v_bias": (kv_size,)}
    if config.has_qk_norm:
        layer |= {"q_norm": (config.head_dim,), "k_norm": (config.head_dim,)}
    layer |= {"o_proj": (hidden, q_size), "post_attention_layernorm": (hidden,)}
    layer |= {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    names: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for i in range(config.num_hidden_layers):
        names |= {f"model.layers.{i}.{_LAYER_NAMES[field]}": shape for field, shape in layer.items()}
    names["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        names["lm_head.weight"] = (config.vocab_size, hidden)
    return names


def stored(folder: Path, config: Config) -> dict[str, tuple[tuple[int, ...], str]]:
    """(shape, "BF16", "F16" or "F32") of each tensor that `read` would hand on, by checkpoint name: from the headers alone.

    Raises CheckpointError as `read` does.
    """
    tensors = survey(Path(folder), expected_tensors(config))
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def read(
    folder: Path,
    config: Config,
    place: Callable[[np.ndarray], Array],
    *,
    reserve: Callable[[tuple[int, ...], np.dtype], Array | None] = lambda shape, dtype: None,
    progress: Callable[[int, int], None] | None = None,
) -> Weights:
    """Reads the checkpoint in `folder`.

    `reserve` is called once per tensor, shard by shard in file order, with its shape and ml_dtypes.bfloat16, float16 or
    float32. What it returns is memory on the current GPU, which is filled with the tensor; where it returns None, `place` is
    called with the tensor, C-contiguous, and what that returns stands in the result. `progress` is called with (bytes done,
    bytes in all). Raises CheckpointError if a file is missing or unreadable, or the tensors are not those of `config`.
    """
    tensors = survey(Path(folder), expected_tensors(config))
    copy = tensors.pop("lm_head.weight") if config.tie_word_embeddings and "lm_head.weight" in tensors else None
    if copy is not None:
        _check_copy(tensors["model.embed_tokens.weight"], copy)
    done, total = 0, sum(tensor.nbytes for tensor in tensors.values())

    def tell(more: int) -> None:
        nonlocal done
        done += more
        if progress is not None:
            progress(done, total)

    tell(0)
    placed = {}
    with Filling(total) as filling:
        for name, tensor in tensors.items():
            placed[name] = reserve(tensor.shape, DTYPES[tensor.dtype])
            if placed[name] is not None:
                filling.begin(tensor, placed[name])
        for name, tensor in tensors.items():
            if placed[name] is None:
                placed[name] = place(tensor.rows())  # no name for the array itself: it would outlive its turn
                tell(tensor.nbytes)
        for count in filling.counts():
            tell(count)
    return arrange(config, placed)


def arrange(config: Config, tensors: dict[str, Array]) -> Weights:
    """Tensors by checkpoint name as the fields of `Weights`."""
    layers = []
    for i in range(config.num_hidden_layers):
        names = {field: f"model.layers.{i}.{name}" for field, name in _LAYER_NAMES.items()}
        layers.append(LayerWeights(**{field: tensors[name] for field, name in names.items() if name in tensors}))
    embedding = tensors["model.embed_tokens.weight"]
    lm_head = embedding if config.tie_word_embeddings else tensors["lm_head.weight"]
    return Weights(embedding, layers, tensors["model.norm.weight"], lm_head)


def check_finite(folder: Path, config: Config) -> None:
    """Reads all weights once and raises CheckpointError, naming the tensors, if any holds NaN or infinity."""
    bad = []
    for name, tensor in survey(Path(folder), expected_tensors(config)).items():
        count, first = 0, None
        for start, stop in tensor.chunks():
            part = tensor.rows(start, stop)
            exponent = _EXPONENTS[part.dtype.name]
            wrong = (part.view(f"u{part.itemsize}") & exponent) == exponent
            if first is None and wrong.any():
                index = np.unravel_index(np.argmax(wrong), wrong.shape)
                first = f"first {part[index]} at {[int(index[0]) + start, *map(int, index[1:])]}"
            count += int(np.count_nonzero(wrong))
        if count:
            bad.append(f"{name}: {count} of {math.prod(tensor.shape)} ({first})")
    if bad:
        raise CheckpointError(
            f"{folder}: wanted finite weights, got NaN or infinity in {len(bad)} tensors: {shortened(bad, '; ')}. "
            f"Download the checkpoint again; if it stays so, the checkpoint itself is damaged"
        )


def _check_copy(embedding: Tensor, copy: Tensor) -> None:
    """With tied embeddings a stored lm_head.weight must equal the embedding; raises CheckpointError if it does not."""
    for start, stop in embedding.chunks():
        a, b = embedding.rows(start, stop), copy.rows(start, stop)
        if a.dtype == b.dtype:  # as bits, which is fast
            differ = a.view(f"u{a.itemsize}") != b.view(f"u{b.itemsize}")
        else:
            differ = a.astype(np.float32) != b.astype(np.float32)
        if differ.any():
            row = start + int(np.argmax(differ.any(axis=1)))
            raise CheckpointError(
                f"{copy.path}: lm_head.weight: wanted a copy of embed_tokens.weight, as config.json has "
                f"tie_word_embeddings = true, got other values from row {row} on. Set tie_word_embeddings to false if "
                f"the output head was trained on its own; otherwise remove lm_head.weight"
            )
