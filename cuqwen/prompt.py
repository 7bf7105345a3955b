"""Short prompts as recordings: what the host needs for the launches of all layers is longer than the GPU works on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cuqwen import cuda, launch
from cuqwen.cache import KVCache
from cuqwen.model import Qwen3

Array = Any

WIDTHS = (32, 64, *range(128, 2049, 128))  # tokens
# Multiplications with weights in a recording at most: with more the GPU is the slower one, and padding costs.
MOST_PRODUCTS = 1e12
MOST_RECORDINGS = 6  # of the last widths; each has some megabytes of its own


class ShortPrompts:
    """Reads prompts of few tokens into one cache, each as the next longer one of `WIDTHS`: the rows before its first token
    have a position that does not exist, which no operation reads or writes anything for.

    A width is computed operation by operation the first time, which also compiles them, and recorded the second time. (First
    token of 20 and of 512 with Qwen3-0.6B, H100: 4.8 and 5.1 ms, recorded 1.7 and 3.3.)
    """

    def __init__(self, model: Qwen3, cache: KVCache) -> None:
        self.model, self.cache = model, cache
        products = sum(
            array.size for layer in model.weights.layers for array in vars(layer).values() if array is not None
        )
        self.widths = [w for w in WIDTHS if w * products <= MOST_PRODUCTS and w <= min(model.chunk, cache.capacity)]
        self.inputs: dict[int, Array] = {}  # by width: [2, width] int32, ids and positions
        self.recordings: dict[int, tuple[Callable[[], None], Array, Any]] = {}

    def read(self, ids: np.ndarray) -> Array | None:
        """Append ids [T] int32 and return the logits of the last one [1, V], which the next prompt of this width may
        overwrite; None where this is no prompt for a recording."""
        width = next((w for w in self.widths if w >= len(ids)), None)
        if width is None or len(ids) <= cuda.FEW_ROWS:
            return None
        start, stop = self.cache.length, self.cache.length + len(ids)
        if stop > self.cache.capacity:
            raise ValueError(f"read: ids: wanted at most {self.cache.capacity - start} more tokens, got {len(ids)}")
        inputs = np.zeros((2, width), np.int32)
        inputs[1] = -1
        inputs[:, width - len(ids) :] = ids, np.arange(start, stop)
        if width not in self.inputs:
            uploaded = self.model.device.upload(inputs)
            logits = self._step(uploaded)
            self.inputs[width] = uploaded
        else:
            if width not in self.recordings:
                if len(self.recordings) == MOST_RECORDINGS:
                    del self.recordings[next(iter(self.recordings))]
                keep = self.model.cos, self.model.sin, self.model.workspace  # a recording has bare addresses
                self.recordings[width] = (*launch.record(lambda: self._step(self.inputs[width])), keep)
            launch.copy(self.inputs[width], launch.upload(inputs))
            launch_recording, logits, _ = self.recordings[width]
            launch_recording()
        self.cache.length = stop
        return logits

    def _step(self, inputs: Array) -> Array:
        ids, positions = inputs
        return self.model.step(ids, positions, self.cache)
