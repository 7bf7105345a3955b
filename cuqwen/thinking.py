"""Thinking blocks, and how Qwen's published recipe bounds them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence

from cuqwen.generate import Step
from cuqwen.tokenizer import Tokenizer

# Word for word from Qwen's documentation of thinking budgets.
ENOUGH = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the thinking directly now."
    "\n</think>\n\n"
)
Answer = Callable[[Sequence[int], int], Generator[Step, None, None]]


def opens_thinking(tokenizer: Tokenizer, ids: Sequence[int]) -> bool:
    """Whether a prompt itself opens the thinking block, as the templates of thinking-only models do."""
    return tokenizer.decode(ids[-8:], skip_special_tokens=False).rstrip().endswith("<think>")


def is_thinking(text: str) -> bool:
    """Whether `text`, the answer so far and what the template has written of it, is in the middle of a thinking block."""
    return text.lstrip().startswith("<think>") and "</think>" not in text


def bounded(
    first: Answer, second: Answer, tokenizer: Tokenizer, ids: Sequence[int], max_tokens: int, budget: int
) -> Generator[Step, None, None]:
    """The steps of `first(ids, max_tokens)`. If it is still thinking after `budget` tokens it is told to come to its end, and
    `second` goes on behind that; the tokens of that sentence are steps as well, and count."""
    sentence = tokenizer.encode(ENOUGH)
    opened = "<think>" if opens_thinking(tokenizer, ids) else ""
    taken, text, rest = list[int](), opened, max_tokens - budget - len(sentence)
    with contextlib.closing(first(ids, max_tokens)) as steps:
        for step in steps:
            yield step
            taken.append(step.token)
            text += step.text
            if len(taken) == budget and rest > 0 and step.finish_reason is None and is_thinking(text):
                break
        else:
            return
    decoder = tokenizer.stream()
    # what might have become a stop string has not been shown
    held = "".join(map(decoder.push, taken))[len(text) - len(opened) :]
    for token in sentence:
        yield Step(held + decoder.push(token), token)
        held = ""
    yield from second([*ids, *taken, *sentence], rest)
