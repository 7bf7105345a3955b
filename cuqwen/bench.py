"""Tokens a second of prompts and of single-token steps, as llama-bench measures them: no tokenizer, random token ids."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cuqwen import launch
from cuqwen.cache import KVCache
from cuqwen.decode import Choice, Decoder
from cuqwen.model import Qwen3
from cuqwen.prompt import ShortPrompts
from cuqwen.sampling import Sampling

SAMPLED = Sampling(temperature=0.6, top_k=20, top_p=0.95, seed=0)  # as Qwen3 recommends for thinking
WARM_UP = 32  # steps before the first that counts, at most
PORTABLE = "CUQWEN_PORTABLE"  # in the environment: no one-launch step


@dataclass(frozen=True)
class Case:
    """Read `n_prompt` tokens, or generate `n_gen`, with `depth` tokens in the cache before them."""

    n_prompt: int
    n_gen: int
    depth: int
    choice: str = "greedy"  # "greedy", "sampled", or "" for a prompt

    @property
    def name(self) -> str:
        """As llama-bench has it: pp512, tg128 @ d4096."""
        name = f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_gen}"
        return name + (" sampled" if self.choice == "sampled" else "") + (f" @ d{self.depth}" if self.depth else "")

    @property
    def tokens(self) -> int:
        return self.n_prompt or self.n_gen


def plan(prompts: Sequence[int], generated: Sequence[int], depths: Sequence[int], *, sampled: bool) -> list[Case]:
    """Depth by depth: all prompts, then all answers, greedy and, if `sampled`, sampled. A size of 0 is left out."""
    cases = []
    for depth in depths:
        cases += [Case(n, 0, depth, "") for n in prompts if n]
        for n in filter(None, generated):
            cases += [Case(0, n, depth), *([Case(0, n, depth, "sampled")] if sampled else [])]
    return cases


@dataclass(frozen=True)
class Figures:
    """Of one case: tokens a second of each repetition; bytes that a token has to read, weights and cache (a chunk of a prompt
    reads the weights once, all its tokens share them); how steps were made: "one launch", "portable" or "numpy"."""

    case: Case
    engine: str
    rates: tuple[float, ...]
    bytes_per_token: float

    @property
    def mean(self) -> float:
        return statistics.mean(self.rates)

    @property
    def deviation(self) -> float:
        """Of the repetitions from their mean; 0 for one."""
        return statistics.stdev(self.rates) if len(self.rates) > 1 else 0.0

    @property
    def bytes_per_second(self) -> float:
        return self.mean * self.bytes_per_token


def measure(network: Qwen3, n_ids: int, case: Case, repetitions: int) -> Figures:
    """Run a case `repetitions` times, after one that does not count, or two of a prompt. n_ids: ids from here on are never
    chosen.

    Raises what loading too long a context raises: MemoryError, or the allocator's own error.
    """
    rng = np.random.default_rng(0)
    cache = network.new_cache(case.depth + max(2, case.tokens))  # the first answer has two steps
    if case.depth:
        network.read(rng.integers(0, n_ids, case.depth).astype(np.int32), cache)
    if case.n_prompt:
        ids = rng.integers(0, n_ids, case.n_prompt).astype(np.int32)
        engine, runs = "cuda" if network.device.name == "cuda" else "numpy", _prompts(network, cache, ids)
    else:
        decoder, runs = answers(network, cache, n_ids, case, repetitions)
        engine = "one launch" if decoder.one_launch else "portable" if network.device.name == "cuda" else "numpy"
    for _ in range(2 if case.n_prompt else 1):
        next(runs)
    rates = tuple(case.tokens / next(runs) for _ in range(repetitions))
    return Figures(case, engine, rates, bytes_per_token(network, case))


def bytes_per_token(network: Qwen3, case: Case) -> float:
    """See `Figures`. A prompt's cache counts once a chunk, up to that chunk's last token."""
    if case.n_gen:
        return network.read_bytes_per_token(case.depth + case.n_gen // 2)
    ends = [*range(network.chunk, case.n_prompt, network.chunk), case.n_prompt]
    return sum(network.read_bytes_per_token(case.depth + end) for end in ends) / case.n_prompt


def _prompts(network: Qwen3, cache: KVCache, ids: np.ndarray) -> Iterator[float]:
    """Seconds that reading `ids` takes after what is in the cache, again and again, as an answer's prompt is read: a short
    one is recorded the second time."""
    depth = cache.length
    short = ShortPrompts(network, cache) if network.device.name == "cuda" else None
    while True:
        cache.length = depth
        start = time.perf_counter()
        logits = short.read(ids) if short else None
        wait(network.read(ids, cache) if logits is None else logits)
        yield time.perf_counter() - start


def answers(
    network: Qwen3, cache: KVCache, n_ids: int, case: Case, repetitions: int
) -> tuple[Decoder, Iterator[float]]:
    """What makes the steps, and the seconds that all of an answer take, as `generate` makes them: a GPU goes on while the
    host reads each token. The first answer is short, and there are at most `repetitions` more."""
    sampling, depth = SAMPLED if case.choice == "sampled" else Sampling(), cache.length
    choice = Choice(network, sampling, [0], n_ids, (case.n_gen + 1) * (repetitions + 1) + WARM_UP)
    decoder = Decoder(network, cache, choice)
    logits = network.read(np.zeros(1, np.int32), cache)

    def seconds(tokens: int) -> float:
        cache.length = depth
        wait(decoder.ids)
        with contextlib.closing(decoder.answer(logits, tokens + 1)) as answer:
            start = time.perf_counter()
            for _ in answer:  # the first is chosen by logits that are there
                pass
            return time.perf_counter() - start

    def runs() -> Iterator[float]:
        yield seconds(max(2, min(case.n_gen, WARM_UP)))  # the second one is recorded
        while True:
            yield seconds(case.n_gen)

    return decoder, runs()


def wait(array: Any) -> None:
    """Until the GPU has done what it was told to do; at once for an array on the host."""
    if launch.is_gpu_array(array):
        launch.cupy().cuda.get_current_stream().synchronize()


@contextlib.contextmanager
def portable_steps(wanted: bool) -> Iterator[None]:
    """Inside, new decoders make a step of many small kernels, if `wanted`."""
    before = os.environ.get(PORTABLE)
    if wanted:
        os.environ[PORTABLE] = "1"
    try:
        yield
    finally:
        if wanted:
            os.environ.pop(PORTABLE)
            if before is not None:
                os.environ[PORTABLE] = before
