"""Which kernels a model will launch, told from its headers, and compiling them while its weights are read."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
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

PATIENCE = 0.5  # seconds that pass before people are told what they wait for
# Seconds in which a kernel that was compiled before is there. One after another they come sooner than from threads, which wait
# for each other's Python: 24 in 0.1 s instead of 0.55.
QUICK = 0.01


def kernels(
    folder: Path, config: Config, device: Device, kv_dtype: Any, plan: MemoryPlan, *, exact: bool
) -> Iterator[launch.Request]:
    """Entry points for single tokens and for prompts of all lengths, those that take longest to compile first.

    Left out is what only prompts of 2 to 4 tokens, some lengths beyond 2,048 or `decode_step.MANY_KEYS` cached tokens need,
    and layers whose weights have other types than the first one's.
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
        steps, prompts = [1] if is_portable else [], ShortPrompts(model, cache).widths
        for tokens in (*steps, *prompts, min(5120, plan.chunk), plan.chunk):
            ids = dry.empty((tokens,), np.int32)
            model.step(ids, ids, cache)
    yield from noted


def _weight(device: Device, shape: tuple[int, ...], kind: str) -> Any:
    return device.empty(shape, weights.DTYPES[kind] if len(shape) > 1 else np.float32)


@contextlib.contextmanager
def compiling(requests: Iterable[launch.Request], progress: Callable[[int, int], None] | None = None) -> Iterator[None]:
    """While the block runs, and until all is there, threads load what `load_function` will be asked for, and compile what this
    machine has not compiled before. What cannot be compiled is told by `load_function`.

    progress: called with (entry points that are there, all) after the block, when some are missing `PATIENCE` seconds later.
    However the block ends, no thread is left when it has; if it fails, what has not been begun is left out.
    """
    device = launch.cupy().cuda.Device().id
    threads = min(16, os.cpu_count() or 4)
    pool = futures.ThreadPoolExecutor(1 + threads, "cuqwen-compile", lambda: launch.cupy().cuda.Device(device).use())
    compiled: list[futures.Future[Any]] = []

    def begin() -> None:
        for request in requests:
            compiled.append(pool.submit(launch.compile_function, *request))
            futures.wait(compiled[-1:], QUICK)

    try:
        begun = pool.submit(begin)
        yield
        begun.result()
        missing = futures.wait(compiled, PATIENCE).not_done
        for _ in futures.as_completed(missing):
            if progress is not None:
                progress(sum(one.done() for one in compiled), len(compiled))
    finally:
        pool.shutdown(cancel_futures=True)
