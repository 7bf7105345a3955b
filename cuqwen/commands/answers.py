"""From a prompt to the tokens of an answer, as the commands ask for them."""

from __future__ import annotations

import argparse
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cuqwen.api import Model
    from cuqwen.generate import Step

PROGRESS_FROM_TOKENS = 2048  # shorter prompts are read before a bar can be seen
# Word for word from Qwen's documentation of thinking budgets.
ENOUGH = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the thinking directly now."
    "\n</think>\n\n"
)


def encode(prompt: str, model: Model, options: argparse.Namespace) -> list[int]:
    """Token ids of the prompt as it stands, or put through the chat template where the checkpoint has one."""
    tokenizer = model.tokenizer
    if not tokenizer.has_chat_template and (options.system is not None or options.no_think):
        raise ValueError("--system and --no-think: wanted a chat template, the checkpoint has none; leave them out")
    if not options.raw and tokenizer.has_chat_template:
        system = [] if options.system is None else [{"role": "system", "content": options.system}]
        messages = [*system, {"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, enable_thinking=False if options.no_think else None)
    return tokenizer.encode(prompt)


def is_thinking(text: str) -> bool:
    """Whether `text`, the answer so far and what the template has written of it, is in the middle of a thinking block."""
    return text.lstrip().startswith("<think>") and "</think>" not in text


def opens_thinking(model: Model, ids: Sequence[int]) -> bool:
    """Whether the prompt itself opens the thinking block, as the templates of thinking-only models do."""
    return model.tokenizer.decode(ids[-8:], skip_special_tokens=False).rstrip().endswith("<think>")


def stream(
    model: Model, ids: Sequence[int], *, max_tokens: int, thinking_budget: int | None = None, **arguments: Any
) -> Generator[Step, None, None]:
    """The steps of `model.stream`. An answer that is still thinking after `thinking_budget` tokens is told to come to its
    end; the tokens of that sentence are steps as well, and count. What follows it draws numbers of its own from the seed, and
    its presence and frequency penalties count anew."""
    if thinking_budget is None:
        yield from model.stream(ids, max_tokens=max_tokens, **arguments)
        return
    from cuqwen.generate import Step

    sentence = model.tokenizer.encode(ENOUGH)
    taken: list[int] = []
    opened = "<think>" if opens_thinking(model, ids) else ""
    text = opened
    rest = max_tokens - thinking_budget - len(sentence)
    steps: Any = model.stream(ids, max_tokens=max_tokens, **arguments)
    for step in steps:
        yield step
        taken.append(step.token)
        text += step.text
        if len(taken) == thinking_budget and rest > 0 and step.finish_reason is None and is_thinking(text):
            break
    else:
        return
    steps.close()
    decoder = model.tokenizer.stream()
    # what might have become a stop string has not been shown
    held = "".join(map(decoder.push, taken))[len(text) - len(opened) :]
    for token in sentence:
        yield Step(held + decoder.push(token), token)
        held = ""
    if arguments.get("seed") is not None:
        arguments["seed"] = (arguments["seed"] + 2**63) % 2**64
    yield from model.stream([*ids, *taken, *sentence], max_tokens=rest, **arguments)
