"""Single-token steps of one sequence: on the GPU all launches of a step, the choice of the next token among them, are
recorded once and repeated as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cuqwen import launch
from cuqwen.cache import KVCache
from cuqwen.model import Qwen3
from cuqwen.sampling import Sampler, Sampling, no_choice

Array = Any


class Choice:
    """Chooses the tokens of one answer on the model's device, with the random numbers and by the rules of `Sampler`.

    All that changes from token to token lies in arrays there, so that a call can be recorded; none waits for the GPU.
    """

    def __init__(self, model: Qwen3, sampling: Sampling, prompt: Sequence[int], n_ids: int, max_tokens: int) -> None:
        self.model, self.n_ids = model, n_ids
        self.settings = {key: value for key, value in vars(sampling).items() if key != "seed"}
        sampler, upload = Sampler(sampling, prompt, n_ids), model.device.upload
        if sampling.temperature > 0:
            self.settings["uniforms"] = upload(sampler.uniforms(max_tokens))
            self.settings["step"] = upload(np.zeros(1, np.int32))
        if sampling.has_penalties:
            self.settings["history"] = upload(sampler.history())

    def __call__(self, logits: Array, ids: Array) -> None:
        """Choose by `logits` [1, V]; the token's id goes to ids [1] int32."""
        self.model.device.operations.sample(logits[0, : self.n_ids], **self.settings, out=ids)

    def read(self, logits: Array, ids: Array) -> int:
        """The id that a call put there: the step's only wait for the GPU.

        Raises ValueError for logits that left no choice: broken weights must not come out as plausible tokens.
        """
        token = int(ids[0])
        if token < 0:
            row = logits[0, : self.n_ids]
            raise no_choice(row.get() if launch.is_gpu_array(row) else row)
        return token


class Decoder:
    """Continues the sequence in `cache` token by token.

    The first step runs operation by operation, which also compiles what is not compiled yet; the second is recorded, and
    from then on a step is one launch. What changes between steps, the id and its position, lies in device memory.
    """

    def __init__(self, model: Qwen3, cache: KVCache, choice: Choice | None = None) -> None:
        self.model, self.cache, self.choice = model, cache, choice
        self.ids = model.device.empty((1,), np.int32)
        self.eager_steps = 0
        self.launch: Callable[[], None] | None = None

    def step(self, ids: Array) -> Array:
        """Append one token, ids [1] int32 on the model's device; return its logits [1, V], which the next step overwrites.

        With a `choice`, what it has chosen by them is in `self.ids`, where the next step may take it from. Raises
        ValueError if the cache is full.
        """
        if self.model.device.name == "cpu" or self.eager_steps == 0 or self.cache.length == self.cache.capacity:
            self.eager_steps += 1
            logits = self.model.forward(ids, self.cache)
            if self.choice is not None:
                self.choice(logits, self.ids)
            return logits
        if self.launch is None:
            self.position = self.model.device.empty((1,), np.int32)
            self.tables = (
                self.model.cos,
                self.model.sin,
            )  # the recording has bare pointers to what a longer cache replaces
            self.launch, self.logits = launch.record(self._record)
        if ids is not self.ids:
            launch.copy(self.ids, ids)
        launch.copy(self.position, self.model.positions[self.cache.length :][:1])
        self.launch()
        self.cache.length += 1
        return self.logits

    def _record(self) -> Array:
        logits = self.model.step(self.ids, self.position, self.cache)
        if self.choice is not None:
            self.choice(logits, self.ids)
        return logits
