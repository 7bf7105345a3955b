"""Single-token steps of one sequence, the choice of the next token included: one kernel where the GPU allows it, otherwise
the operations, recorded once and repeated as a CUDA graph."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cuqwen import launch
from cuqwen.cache import KVCache
from cuqwen.decode_step import NO_CHOICE, DecodeStep, obstacle
from cuqwen.model import Qwen3
from cuqwen.sampling import Sampler, Sampling, no_choice

Array = Any


class Choice:
    """Chooses the tokens of one answer on the model's device, with the random numbers and by the rules of `Sampler`.

    All that changes from token to token lies in arrays there, so that a call can be recorded; none waits for the GPU.
    """

    def __init__(self, model: Qwen3, sampling: Sampling, prompt: Sequence[int], n_ids: int, max_tokens: int) -> None:
        self.model, self.n_ids, self.is_argmax = model, n_ids, sampling.is_argmax
        self.room = max(256, 1 << (max_tokens - 1).bit_length())  # tokens
        self.rules = _rules(sampling)
        self.state = {name: model.device.upload(array) for name, array in self._start(sampling, prompt).items()}

    def _start(self, sampling: Sampling, prompt: Sequence[int]) -> dict[str, np.ndarray]:
        """What changes from token to token, as it is before the first."""
        if sampling.is_argmax:
            return {}
        state: dict[str, np.ndarray] = {}
        # without penalties no id counts, and counters of 151,669 take a millisecond
        sampler = Sampler(sampling, prompt, self.n_ids) if sampling.has_penalties else Sampler(sampling, (), 1)
        if sampling.temperature > 0:
            state |= {"uniforms": sampler.uniforms(self.room), "step": np.zeros(1, np.int32)}
        if sampling.has_penalties:
            state["history"] = sampler.history()
        return state

    def restart(self, sampling: Sampling, prompt: Sequence[int], max_tokens: int) -> bool:
        """Begin another answer, in the same memory, so that recordings stay valid. False where that cannot be: for other
        settings, or more tokens."""
        if _rules(sampling) != self.rules or max_tokens > self.room:
            return False
        for name, array in self._start(sampling, prompt).items():
            self.model.device.copy(self.state[name], self.model.device.upload(array))
        return True

    def __call__(self, logits: Array, ids: Array) -> None:
        """Choose by `logits` [1, V]; the token's id goes to ids [1] int32."""
        self.model.device.operations.sample(logits[0, : self.n_ids], **self.rules, **self.state, out=ids)

    def first(self, logits: Array, ids: Array) -> None:
        """The same for the first token. A greedy one on a GPU needs no `sample`, which takes seconds to compile once on a
        machine; the host looks at its logit instead. Raises ValueError as `check` does."""
        if not self.is_argmax or self.model.device.name == "cpu":
            return self(logits, ids)
        row = logits[0, : self.n_ids]
        self.model.device.operations.argmax(row.reshape(1, -1), out=ids)
        if not np.isfinite(float(row[int(ids[0])])):
            self.check([NO_CHOICE, 0], logits)

    def check(self, state: Sequence[int], logits: Array) -> int:
        """The token in a decoder's `state` [2]. `logits`: those that it was chosen by, or of a later step.

        Raises ValueError for logits that left no choice: broken weights must not come out as plausible tokens. Raises
        DeviceError if blocks of the one-launch step waited in vain for each other.
        """
        token, lost = state
        if lost:
            raise launch.DeviceError(
                "decode_step: a block waited two seconds for another one; wanted the GPU, or a fixed part of it, for this "
                "process; see nvidia-smi for others, and set CUQWEN_PORTABLE=1 to run a step as many small kernels"
            )
        if token < 0:
            row = logits[0, : self.n_ids]
            raise no_choice(row.get() if launch.is_gpu_array(row) else row)
        return token


class Decoder:
    """Continues the sequence in `cache` token by token.

    On a GPU that has what kernels/decode_step.cu needs, a step is that kernel; elsewhere (`obstacle` says why) it is the
    operations, one after another the first time, which also compiles them, then recorded and repeated as a CUDA graph. What
    changes between steps, the id and its position, lies in device memory.
    """

    def __init__(self, model: Qwen3, cache: KVCache, choice: Choice | None = None) -> None:
        self.model, self.cache, self.choice = model, cache, choice
        self.eager_steps = 0
        self.launch: Callable[[], None] | None = None
        self.next_position = -1  # what `position` on the device holds
        self.obstacle = why_portable(model)
        self.one_launch: DecodeStep | None = None
        if self.obstacle is None:
            self.one_launch = DecodeStep(model, cache, choice.n_ids if choice else model.config.vocab_size)
            self.state, self.position = self.one_launch.state, self.one_launch.position
        else:
            self.state, self.position = model.device.upload(np.zeros(2, np.int32)), model.device.empty((1,), np.int32)
        self.ids = self.state[:1]

    def follow(self, choice: Choice) -> None:
        """Choose by `choice` from the next step on. What was recorded with another one is given up."""
        if choice is not self.choice:
            self.choice, self.launch, self.eager_steps = choice, None, 0

    def step(self, ids: Array) -> Array:
        """Append one token, ids [1] int32 on the model's device; return its logits [1, V], which the next step overwrites.

        With a `choice`, what it has chosen by them is in `self.ids`, where the next step may take it from. Raises
        ValueError if the cache is full.
        """
        portable = self.one_launch is None
        if (
            self.model.device.name == "cpu"
            or (portable and self.eager_steps == 0)
            or self.cache.length == self.cache.capacity
        ):
            logits = self.model.forward(ids, self.cache)
            if self.choice is not None:
                self.choice(logits, self.ids)
            self.eager_steps += 1  # now the kernels are compiled
            return logits
        if self.launch is None:
            # a recording has bare pointers to the tables, which a longer cache replaces
            self.tables = self.model.cos, self.model.sin
            self.launch, self.logits = launch.record(self._record)
        if ids is not self.ids:
            launch.copy(self.ids, ids)
        if self.cache.length != self.next_position:
            launch.copy(self.position, self.model.positions[self.cache.length :][:1])
        self.next_position = -1  # not known, if an interrupt comes now
        self.launch()
        self.cache.length += 1
        if self.one_launch:
            self.next_position = self.cache.length
        return self.logits

    def _record(self) -> Array:
        if self.one_launch is None:
            logits = self.model.step(self.ids, self.position, self.cache)
        else:
            self.one_launch()
            logits = self.one_launch.logits
        if self.choice is not None and not (
            self.one_launch and self.choice.is_argmax
        ):  # that kernel takes the arg-max itself
            self.choice(logits, self.ids)
        return logits


def _rules(sampling: Sampling) -> dict[str, Any]:
    return {key: value for key, value in vars(sampling).items() if key != "seed"}


def why_portable(model: Qwen3) -> str | None:
    """Why single tokens of this model are not made in one launch here; None if they are."""
    if model.device.name == "cpu":
        return "it takes a GPU"
    if os.environ.get("CUQWEN_PORTABLE", "0") not in ("", "0"):
        return "CUQWEN_PORTABLE is set"
    return obstacle(model)
