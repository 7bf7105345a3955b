"""Token ids in, an iterator of small records out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from cuqwen import launch
from cuqwen.decode import Choice, Decoder
from cuqwen.model import Qwen3
from cuqwen.sampling import Sampling
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
    choice = Choice(model, sampling, prompt, tokenizer.n_ids, max_tokens)
    stream, stops, decoder = tokenizer.stream(), StopStrings(stop), Decoder(model, cache, choice)
    # On a GPU the next step is on its way before this one's token is looked at, so that it need not wait for the host; after
    # the last token of an answer one step too many has been made.
    ahead = model.device.name != "cpu"
    logits = _read_prompt(model, prompt, cache)
    choice.first(logits, decoder.ids)
    read = launch.read_later(decoder.state)
    for count in range(1, max_tokens + 1):
        last = count == max_tokens
        if ahead and not last:
            logits, read, read_this = decoder.step(decoder.ids), launch.read_later(decoder.state), read
        else:
            read_this = read
        token = choice.check(read_this(), logits)
        ended = token in end_ids
        text, stopped = stops.push("" if ended else stream.push(token))
        if (ended or last) and not stopped:
            tail, stopped = stops.push(stream.finish())
            text += tail if stopped else tail + stops.finish()
        if ended or stopped or last:
            yield Step(text, token, "stop" if ended or stopped else "length")
            return
        yield Step(text, token)
        if not ahead:
            logits, read = decoder.step(decoder.ids), launch.read_later(decoder.state)


def _read_prompt(model: Qwen3, prompt: Sequence[int], cache: Any) -> Any:
    """Run the prompt through the model and return the logits of its last token, [1, V]."""
    ids = model.device.upload(np.asarray(prompt, np.int32))
    for first in range(0, len(prompt), PROMPT_CHUNK):
        chunk = ids[first : first + PROMPT_CHUNK]
        logits = model.forward(chunk, cache, rows=int(first + len(chunk) == len(prompt)))
    return logits
