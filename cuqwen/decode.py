"""Single-token steps of one sequence: on the GPU all launches of a step are recorded once and repeated as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cuqwen import launch
from cuqwen.cache import KVCache
from cuqwen.model import Qwen3

Array = Any


class Decoder:
    """Continues the sequence in `cache` token by token.

    The first step runs operation by operation, which also compiles what is not compiled yet; the second is recorded, and
    from then on a step is one launch. What changes between steps, the id and its position, lies in device memory.
    """

    def __init__(self, model: Qwen3, cache: KVCache) -> None:
        self.model, self.cache = model, cache
        self.eager_steps = 0
        self.launch: Callable[[], None] | None = None

    def step(self, ids: Array) -> Array:
        """Append one token, ids [1] int32 on the model's device; return its logits [1, V], which the next step overwrites.

        Raises ValueError if the cache is full.
        """
        if self.model.device.name == "cpu" or self.eager_steps == 0 or self.cache.length == self.cache.capacity:
            self.eager_steps += 1
            return self.model.forward(ids, self.cache)
        if self.launch is None:
            self.ids, self.position = (self.model.device.empty((1,), np.int32) for _ in range(2))
            self.tables = (
                self.model.cos,
                self.model.sin,
            )  # the recording has bare pointers to what a longer cache replaces
            self.launch, self.logits = launch.record(lambda: self.model.step(self.ids, self.position, self.cache))
        launch.copy(self.ids, ids)
        launch.copy(self.position, self.model.positions[self.cache.length :][:1])
        self.launch()
        self.cache.length += 1
        return self.logits
