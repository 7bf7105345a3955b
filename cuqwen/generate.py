"""Token ids in, an iterator of small records out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from cuqwen import launch
from cuqwen.decode import Decoder
from cuqwen.model import Qwen3
from cuqwen.sampling import Sampler, Sampling
from cuqwen.tokenizer import Tokenizer

# Prompt tokens that go through the model together: bounds the workspace, and an interrupt takes effect between two.
PROMPT_CHUNK = 1024


@dataclass(frozen=True)
class Step:
    """One generated token.

    text: what can be shown now, complete characters only; "" while a character or a possible stop string is incomplete.
    token: its id. finish_reason: None while more follows; "stop" after an end token or a stop string (neither is part of
    the text); "length" when `max_tokens` is reached.
    """

    text: str
    token: int
    finish_reason: Literal["stop", "length"] | None = None


class StopStrings:
    """Finds stop strings in text that arrives in pieces, and holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.pending = ""

    def push(self, text: str) -> tuple[str, bool]:
        """(text that is safe to show, whether a stop string was met); a stop string and what follows is not shown."""
        self.pending += text
        found = [at for at in (self.pending.find(stop) for stop in self.stops) if at >= 0]
        if found:
            shown, self.pending = self.pending[: min(found)], ""
            return shown, True
        held = max((_overlap(self.pending, stop) for stop in self.stops), default=0)
        shown = self.pending[: len(self.pending) - held]
        self.pending = self.pending[len(shown) :]
        return shown, False

    def finish(self) -> str:
        """What was held back, when no more text follows."""
        rest, self.pending = self.pending, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def generate_steps(
    model: Qwen3,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    *,
    sampling: Sampling,
    max_tokens: int,
    stop: Sequence[str],
    end_ids: Sequence[int],
) -> Iterator[Step]:
    """Continue `prompt` (token ids, at least one) by up to `max_tokens` tokens.

    Ends after a token of `end_ids`, after a string of `stop`, or at `max_tokens`. The caller has checked the arguments.
    """
    cache = model.new_cache(len(prompt) + max_tokens)
    sampler = Sampler(sampling, prompt, tokenizer.n_ids)
    stream, stops, decoder = tokenizer.stream(), StopStrings(stop), Decoder(model, cache)
    logits = _read_prompt(model, prompt, cache)
    for count in range(1, max_tokens + 1):
        token, ids = _choose(model, logits, sampler, tokenizer.n_ids, first=count == 1)
        last = count == max_tokens
        ended = token in end_ids
        text, stopped = stops.push("" if ended else stream.push(token))
        if (ended or last) and not stopped:
            tail, stopped = stops.push(stream.finish())
            text += tail if stopped else tail + stops.finish()
        if ended or stopped or last:
            yield Step(text, token, "stop" if ended or stopped else "length")
            return
        yield Step(text, token)
        logits = decoder.step(ids)


def _read_prompt(model: Qwen3, prompt: Sequence[int], cache: Any) -> Any:
    """Run the prompt through the model and return the logits of its last token, [1, V]."""
    ids = model.device.upload(np.asarray(prompt, np.int32))
    for first in range(0, len(prompt), PROMPT_CHUNK):
        chunk = ids[first : first + PROMPT_CHUNK]
        logits = model.forward(chunk, cache, rows=int(first + len(chunk) == len(prompt)))
    return logits


def _choose(model: Qwen3, logits: Any, sampler: Sampler, n_ids: int, *, first: bool) -> tuple[int, Any]:
    """The next token, for the host and as ids [1] on the device. The read of it is the step's only wait for the GPU.

    The first one always goes through the sampler, which raises ValueError for logits that are not finite: broken weights
    must not come out as plausible tokens.
    """
    if sampler.sampling.is_argmax and not first:
        ids = model.device.operations.argmax(logits[0, :n_ids].reshape(1, -1))
        return int(ids[0]), ids
    row = logits[0].get() if launch.is_gpu_array(logits) else logits[0]
    token = sampler.sample(row)
    return token, model.device.upload(np.array([token], np.int32))
