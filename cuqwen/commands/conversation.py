"""A conversation as token ids that only grow, so that the model's cache serves each turn and only new tokens are computed.

The ids of earlier turns stay as they were generated; a new turn adds what the template writes after an answer. Qwen3's
template leaves thinking out of answers that are past. Here it stays, up to the point where the context gets short: then
the conversation is written anew by the template, without it.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cuqwen.tokenizer import Tokenizer

Message = dict[str, Any]
MARK = f"\ue000{uuid.uuid4().hex}\ue000"  # stands in for an answer; no text has it


class Conversation:
    """messages: the turns as text, role and content; the system message is not among them. ids: the tokens of them as they
    were read and generated, [] where the next turn writes all of it anew.

    Without a chat template (a base model) the text goes on from turn to turn, each turn on a new line.
    """

    def __init__(self, tokenizer: Tokenizer, end_ids: Sequence[int], system: str | None = None) -> None:
        self.tokenizer, self.end_ids, self.system = tokenizer, frozenset(end_ids), system
        self.enable_thinking: bool | None = None
        self.reset()

    def reset(self, messages: Sequence[Message] = ()) -> None:
        """Begin anew, or after `messages`."""
        self.messages, self.ids = [dict(message) for message in messages], list[int]()

    def ask(self, text: str) -> list[int]:
        """The token ids of the whole conversation up to the answer to `text`; nothing is kept of it before `answered`.

        Raises ValueError if the template refuses.
        """
        tokenizer = self.tokenizer
        if not tokenizer.has_chat_template:
            before = "" if self.ids else self._plain_text()
            return [*self.ids, *tokenizer.encode(before + ("\n" if self.ids or before else "") + text)]
        question = {"role": "user", "content": text}
        if self.ids:
            added = self._render([{"role": "user", "content": "…"}, {"role": "assistant", "content": MARK}, question])
            _, found, rest = added.partition(MARK)
            if found:
                return self._joined(tokenizer.encode(rest))
        return tokenizer.encode(self._render([*self.messages, question]))

    def answered(self, text: str, ids: Sequence[int], tokens: Sequence[int], answer: str) -> None:
        """Keep a turn: the question and its answer as text, and their tokens, `ids` being what `ask` gave."""
        self.ids = [*ids, *tokens]
        thinking, closed, content = answer.removeprefix("<think>").partition("</think>")
        message: Message = {"role": "assistant", "content": answer}
        if closed:
            message = {"role": "assistant", "reasoning_content": thinking.strip("\n"), "content": content.lstrip("\n")}
        elif answer.startswith("<think>"):  # it was stopped before it came to an answer
            message = {"role": "assistant", "reasoning_content": thinking.strip("\n"), "content": ""}
        self.messages += [{"role": "user", "content": text}, message]

    def forget_thinking(self) -> bool:
        """Let the next turn write the conversation anew, without the thinking of past answers; whether there was any."""
        has_any = bool(self.ids) and any("reasoning_content" in message for message in self.messages)
        if has_any:
            self.ids = []
        return has_any

    def _render(self, messages: list[Message]) -> str:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return self.tokenizer.apply_chat_template([*system, *messages], enable_thinking=self.enable_thinking)

    def _plain_text(self) -> str:
        pieces = [("\n" if message["role"] == "user" else "") + message["content"] for message in self.messages]
        return "".join(pieces).removeprefix("\n")

    def _joined(self, added: list[int]) -> list[int]:
        """The ids so far and what comes after an answer. The end token, which the template writes too, is there once."""
        before = self.ids[:-1] if self.ids[-1] in self.end_ids else self.ids
        return [*before, *added]
