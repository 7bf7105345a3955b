"""Which kernels a model will launch, told from its headers, so that they are compiled while its weights are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cuqwen import launch, weights
from cuqwen.cache import KVCache
from cuqwen.config import Config
from cuqwen.decode import why_portable
from cuqwen.decode_step import can_sample, defines
from cuqwen.memory import MemoryPlan
from cuqwen.model import Device, Qwen3
from cuqwen.prompt import ShortPrompts


def kernels(
    folder: Path, config: Config, device: Device, kv_dtype: Any, plan: MemoryPlan, *, exact: bool
) -> Iterator[launch.Request]:
    """Entry points for single tokens and for prompts of all lengths, those that take longest to compile first.

    Left out is what only prompts of two to four tokens need, and layers whose weights have other types than the first one's.
    """
    with launch.noting() as noted:
        dry = dataclasses.replace(device, upload=lambda array: array, copy=lambda target, source: None)
        tensors = {name: _weight(dry, shape, kind) for name, (shape, kind) in weights.stored(folder, config).items()}
        model = Qwen3(config, weights.arrange(config, tensors), dry, kv_dtype, exact=exact, chunk=plan.chunk)
        cache = KVCache(config, plan.context, kv_dtype, dry.empty)
        is_portable = why_portable(model) is not None
        logits = dry.empty((1, config.vocab_size), np.float32)
        dry.operations.sample(logits[0])
        dry.operations.argmax(logits)
        if not is_portable and can_sample(model):
            launch.load_function("decode_step", "decode_step", defines(config, model.kv_dtype, sampled=True))
        del model.weights.layers[1:-1]  # two show what all launch
        for tokens in (*([1] if is_portable else []), *ShortPrompts(model, cache).widths, plan.chunk):
            ids = dry.empty((tokens,), np.int32)
            model.step(ids, ids, cache)
    yield from noted


def _weight(device: Device, shape: tuple[int, ...], kind: str) -> Any:
    return device.empty(shape, weights.DTYPES[kind] if len(shape) > 1 else np.float32)
