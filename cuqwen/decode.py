"""Single-token steps of one sequence, the choice of the next token included: one kernel where the GPU allows it, otherwise
the operations, recorded once and repeated as a CUDA graph."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Generator, Sequence
from typing import Any

import numpy as np

from cuqwen import cuda, launch
from cuqwen.cache import KVCache
from cuqwen.decode_step import LOST, NO_CHOICE, NOT_YET, DecodeStep, can_sample, obstacle
from cuqwen.model import Qwen3
from cuqwen.sampling import Sampler, Sampling, no_choice

Array = Any

BATCH = 32  # tokens a launch: 16 ms with Qwen3-0.6B on an H100, and the next one waits behind it
PAUSE = 1e-4  # seconds between two looks at what the GPU has written


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

    def plan(self) -> cuda.SamplingPlan | None:
        """How kernels choose by the same rules and state; None: the arg-max."""
        if self.is_argmax:
            return None
        uniforms, step, history = map(self.state.get, ("uniforms", "step", "history"))
        return cuda.SamplingPlan.of(self.n_ids, **self.rules, uniforms=uniforms, step=step, history=history)

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
        token, status = state
        if status == LOST:
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

    On a GPU that has what kernels/decode_step.cu needs, many steps are one launch of that kernel; elsewhere (`obstacle` says
    why) a step is the operations, one after another the first time, which also compiles them, then recorded and repeated as a
    CUDA graph. What changes between steps, the id and its position, lies in device memory.
    """

    def __init__(self, model: Qwen3, cache: KVCache, choice: Choice | None = None) -> None:
        self.model, self.cache = model, cache
        self.choice: Choice | None = None
        self.eager_steps = 0
        self.recording: tuple[Callable[[], None], Array] | None = None  # of a step, and its logits
        self.next_position = -1  # what `position` on the device holds
        self.obstacle = why_portable(model)
        self.one_launch: DecodeStep | None = None
        if self.obstacle is None:
            self.one_launch = DecodeStep(model, cache, choice.n_ids if choice else model.config.vocab_size)
            self.state, self.position = self.one_launch.state, self.one_launch.position
        else:
            self.state, self.position = model.device.upload(np.zeros(2, np.int32)), model.device.empty((1,), np.int32)
        self.ids = self.state[:1]
        if choice is not None:
            self.follow(choice)

    def follow(self, choice: Choice) -> None:
        """Choose by `choice` from the next step on. What was recorded with another one is given up."""
        if choice is self.choice:
            return
        self.choice, self.recording, self.eager_steps = choice, None, 0
        try:
            if self.one_launch is not None and self.goes_on:
                self.one_launch.choose_by(choice.plan(), choice.state.get("uniforms"))
        except BaseException:  # an interrupt while the kernel is compiled: the next answer asks again
            self.choice = None
            raise

    @property
    def goes_on(self) -> bool:
        """Whether a launch also chooses the tokens by `choice`, so that it can make more steps by itself."""
        return (
            self.one_launch is not None
            and self.choice is not None
            and (self.choice.is_argmax or can_sample(self.model))
        )

    def answer(
        self, logits: Array, max_tokens: int, end_ids: Collection[int] = (), *, ahead: bool = True
    ) -> Generator[tuple[int, Array], None, None]:
        """The tokens of an answer, the first by `logits` [1, V], each with those that it was chosen by.

        Ends after a token of `end_ids` or after `max_tokens`. With `ahead` a GPU goes on while the caller looks at a token, so
        that logits are only good for saying what is wrong with them. However it ends (and it must be closed, if not by its own
        end), `cache` holds what the tokens follow from.

        Raises what `Choice.check` raises, ValueError without a choice.
        """
        choice = self.choice
        if choice is None:
            raise ValueError("answer: wanted a decoder with a choice, got none")
        choice.first(logits, self.ids)
        read = launch.read_later(self.state)
        if ahead and self.one_launch is not None and self.goes_on:
            yield from self._go_on(self.one_launch, choice, read, logits, max_tokens - 1, end_ids)
            return
        ahead = ahead and self.model.device.name != "cpu"
        for count in range(1, max_tokens + 1):
            read_this, more = read, count < max_tokens
            if ahead and more:
                logits, read = self.step(self.ids), launch.read_later(self.state)
            token = choice.check(read_this(), logits)
            yield token, logits
            if token in end_ids:
                return
            if not ahead and more:
                logits, read = self.step(self.ids), launch.read_later(self.state)

    def _go_on(
        self,
        step: DecodeStep,
        choice: Choice,
        read: Callable[[], list[int]],
        logits: Array,
        more: int,
        end_ids: Collection[int],
    ) -> Generator[tuple[int, Array], None, None]:
        """`answer` with `more` tokens after the first: while one launch runs, the next one waits behind it."""
        start, asked, arrived = self.cache.length, 0, 0
        coming = step.tokens[start + 1 : start + 1 + more]
        step.end_at(end_ids)
        step.expect(start + more)
        if step.halt[0] or self.next_position < 0:  # or an interrupt has left something running
            launch.wait()
            step.halt[0] = 0
        coming[...] = NOT_YET
        self._place()
        try:
            while True:
                while asked < more and asked < arrived + BATCH:
                    count = min(BATCH, more - asked)
                    asked += count  # first: an interrupt inside the call must find something to halt
                    step(count, fresh=asked == count, cached=start + asked - count)
                token = _wait_for(coming, arrived - 1, step, choice) if arrived else choice.check(read(), logits)
                yield token, step.logits if arrived else logits
                if arrived == more or token in end_ids:
                    return
                arrived += 1
        finally:
            if arrived < asked:
                step.halt[0] = 1
                launch.wait()
            made = np.flatnonzero(coming == NOT_YET)
            self.cache.length = self.next_position = start + (int(made[0]) if len(made) else more)

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
        if ids is not self.ids:
            launch.copy(self.ids, ids)
        self._place()
        if self.one_launch is None:
            if self.recording is None:
                # a recording has bare pointers to the tables, which a longer cache replaces
                self.tables = self.model.cos, self.model.sin
                self.recording = launch.record(self._record)
            run, logits = self.recording
            run()
        else:
            self.one_launch(cached=self.cache.length)
            logits = self.one_launch.logits
            if self.choice is not None and not self.goes_on:
                self.choice(logits, self.ids)
        self.cache.length += 1
        self.next_position = -1 if portable else self.cache.length
        return logits

    def _place(self) -> None:
        """Tells the device the position of the next token."""
        if self.cache.length != self.next_position:
            launch.copy(self.position, self.model.positions[self.cache.length :][:1])
        self.next_position = -1  # not known, if an interrupt comes now

    def _record(self) -> Array:
        logits = self.model.step(self.ids, self.position, self.cache)
        if self.choice is not None:
            self.choice(logits, self.ids)
        return logits


def _wait_for(tokens: np.ndarray, index: int, step: DecodeStep, choice: Choice) -> int:
    """tokens[index], once the GPU has put it there. Raises what `Choice.check` raises."""
    while tokens[index] == NOT_YET and not launch.is_idle():
        time.sleep(PAUSE)
    if tokens[index] >= 0:
        return int(tokens[index])
    choice.check(launch.read_later(step.state)(), step.logits)  # says why there is none
    raise launch.DeviceError("decode_step: wanted a token of each step, got none; load the model again")


def _rules(sampling: Sampling) -> dict[str, Any]:
    return {key: value for key, value in vars(sampling).items() if key != "seed"}


def why_portable(model: Qwen3) -> str | None:
    """Why single tokens of this model are not made in one launch here; None if they are."""
    if model.device.name == "cpu":
        return "it takes a GPU"
    if os.environ.get("CUQWEN_PORTABLE", "0") not in ("", "0"):
        return "CUQWEN_PORTABLE is set"
    return obstacle(model)
