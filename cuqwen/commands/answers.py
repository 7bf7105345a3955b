"""From a prompt to its tokens, as the commands ask for them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cuqwen.api import Model

PROGRESS_FROM_TOKENS = 2048  # shorter prompts are read before a bar can be seen


def check_template(model: Model, options: argparse.Namespace) -> None:
    """Raises ValueError for options of the chat template where the checkpoint has none."""
    asked = options.system is not None or options.no_think or options.thinking_budget is not None
    if asked and not model.tokenizer.has_chat_template:
        raise ValueError(
            "--system, --no-think and --thinking-budget: wanted a chat template, the checkpoint has none; leave them out"
        )


def encode(prompt: str, model: Model, options: argparse.Namespace) -> list[int]:
    """Token ids of the prompt as it stands, or put through the chat template where the checkpoint has one."""
    check_template(model, options)
    tokenizer = model.tokenizer
    if not options.raw and tokenizer.has_chat_template:
        system = [] if options.system is None else [{"role": "system", "content": options.system}]
        messages = [*system, {"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, enable_thinking=False if options.no_think else None)
    return tokenizer.encode(prompt)
