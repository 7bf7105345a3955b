"""Token ids in, an iterator of small records out."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from cuqwen import cuda, launch
from cuqwen.cache import KVCache
from cuqwen.decode import Choice, Decoder
from cuqwen.model import Progress, Qwen3
from cuqwen.prompt import ShortPrompts
from cuqwen.sampling import Sampling
from cuqwen.tokenizer import Tokenizer

Array = Any

CACHE_GRAIN = 256  # rows: caches are multiples of it


@dataclass(frozen=True)
class Step:
    """One generated token.

    text: what can be shown now, complete characters only; "" while a character or a possible stop string is incomplete.
    token: its id. finish_reason: None while more follows; "stop" after an end token or a stop string (neither is part of
    the text); "length" when `max_tokens` is reached. logprob: the natural logarithm of its probability by the raw logits,
    before penalties, temperature and filters; top_logprobs: (id, logprob) of the most likely tokens, descending. Both None
    unless asked for.
    """

    text: str
    token: int
    finish_reason: Literal["stop", "length"] | None = None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] | None = None


class StopStrings:
    """Finds stop strings in text that arrives in pieces, and holds back what may be the beginning of one."""

    def __init__(self, stops: Iterable[str]) -> None:
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


class Sequence:
    """One text on the device, kept from answer to answer: the ids read and written so far, their cache and their decoder.

    A prompt that begins as that text does is read from where the two part. The result is the same but for roundings: keys
    and values of an earlier answer's tokens were computed one token at a time, those of a prompt many at a time.

    limit: rows that all caches of this text together may have, at most.
    """

    def __init__(self, model: Qwen3, limit: int) -> None:
        self.model, self.limit = model, limit
        self.drop()

    def drop(self) -> None:
        """Forget the text and free its memory."""
        self.ids: list[int] = []  # those in the cache, and what is to follow
        self.cache: KVCache | None = None
        self.short_prompts: ShortPrompts | None = None
        self.decoder: Decoder | None = None
        self.choice: Choice | None = None

    def begin(self, prompt: list[int], max_tokens: int) -> KVCache:
        """The cache for `prompt` and `max_tokens` more, with as many rows in use as need not be computed again.

        The last tokens of a prompt are always read, for their logits: one on the CPU, on a GPU as many as make a prompt
        that takes the way of longer ones, whose kernels are compiled by then. A cache that is too small gives way to one
        twice as large, with its rows if both fit into `limit`; otherwise they are computed again.
        """
        least = 1 if self.model.device.name == "cpu" else cuda.FEW_ROWS + 1
        shared = max(0, min(self._shared(prompt), len(prompt) - least))
        needed, cache = len(prompt) + max_tokens, self.cache
        if cache is None or cache.capacity < needed:
            old, self.decoder, self.short_prompts = cache, None, None  # these have the addresses of the old one
            capacity = min(self.limit, max(_round_up(needed), 0 if old is None else 2 * old.capacity))
            if old is None or shared == 0 or old.capacity + capacity > self.limit:
                self.cache = cache = old = None
                shared = 0
                if self.model.device.name != "cpu":
                    launch.release_memory()  # the pool would keep the old one for something of its size
            else:
                old.length = shared
            cache = self.model.new_cache(capacity)
            if old is not None:
                cache.take(old, self.model.device.copy)
            self.cache = cache
        cache.length, self.ids = shared, list(prompt)
        return cache

    def read(self, prompt: list[int], cache: KVCache, progress: Progress | None) -> Array:
        """Read what of `prompt` is not in `cache` yet; the logits of its last token [1, V]."""
        ids = np.asarray(prompt[cache.length :], np.int32)
        if self.model.device.name != "cpu":
            if self.short_prompts is None:
                self.short_prompts = ShortPrompts(self.model, cache)
            logits = self.short_prompts.read(ids)
            if logits is not None:
                if progress is not None:
                    progress(len(prompt), len(prompt))
                return logits
        return self.model.read(ids, cache, progress=progress)

    def _shared(self, prompt: list[int]) -> int:
        """How many ids at the beginning of `prompt` are those in the cache."""
        count = 0 if self.cache is None else min(self.cache.length, len(self.ids), len(prompt))
        if self.ids[:count] == prompt[:count]:
            return count
        return next(i for i in range(count) if self.ids[i] != prompt[i])

    def decode(self, cache: KVCache, sampling: Sampling, prompt: list[int], n_ids: int, max_tokens: int) -> Decoder:
        """What continues the text in `cache`, as `begin` gave it. It is kept, and with it what was recorded, as long as the
        cache and the settings stay."""
        if self.choice is None or not self.choice.restart(sampling, prompt, max_tokens):
            self.choice = Choice(self.model, sampling, prompt, n_ids, max_tokens)
        if self.decoder is None:
            self.decoder = Decoder(self.model, cache, self.choice)
        self.decoder.follow(self.choice)
        return self.decoder


def _round_up(rows: int) -> int:
    return -(-rows // CACHE_GRAIN) * CACHE_GRAIN


def generate_steps(
    sequence: Sequence,
    tokenizer: Tokenizer,
    prompt: list[int],
    *,
    sampling: Sampling,
    max_tokens: int,
    stop: Iterable[str],
    end_ids: Collection[int],
    progress: Progress | None = None,
    logprobs: int = 0,
) -> Iterator[Step]:
    """Continue `prompt` (token ids, at least one) by up to `max_tokens` tokens.

    Ends after a token of `end_ids`, after a string of `stop`, or at `max_tokens`. The caller has checked the arguments.
    However it ends, `sequence` can be used again.
    """
    cache = sequence.begin(prompt, max_tokens)
    logits = sequence.read(prompt, cache, progress)
    # made while a GPU reads the prompt
    decoder = sequence.decode(cache, sampling, prompt, tokenizer.n_ids, max_tokens)
    stream, stops = tokenizer.stream(), StopStrings(stop)
    # with log-probabilities each token's logits are wanted, which the next step overwrites
    with contextlib.closing(decoder.answer(logits, max_tokens, end_ids, ahead=not logprobs)) as tokens:
        for count, (token, logits) in enumerate(tokens, 1):
            last, ended = count == max_tokens, token in end_ids
            sequence.ids.append(token)
            scores = _logprobs(logits, token, tokenizer.n_ids, logprobs) if logprobs else ()
            text, stopped = stops.push("" if ended else stream.push(token))
            if (ended or last) and not stopped:
                tail, stopped = stops.push(stream.finish())
                text += tail if stopped else tail + stops.finish()
            if ended or stopped or last:
                yield Step(text, token, "stop" if ended or stopped else "length", *scores)
                return
            yield Step(text, token, None, *scores)


def _logprobs(logits: Array, token: int, n_ids: int, count: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Of `token` and of the `count` most likely ones among the first n_ids, by logits [1, V]."""
    row = (logits.get() if launch.is_gpu_array(logits) else logits)[0, :n_ids].astype(np.float64)
    top = row.max()
    row -= top + np.log(np.exp(row - top).sum())
    best = np.argpartition(-row, min(count, n_ids) - 1)[:count]
    best = best[np.lexsort((best, -row[best]))]
    return float(row[token]), tuple((int(i), float(row[i])) for i in best)
