"""`cuqwen chat`: a conversation in a terminal, or line by line through a pipe."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cuqwen.commands import answers, figures, loading, options, terminal
from cuqwen.commands.conversation import Conversation

if TYPE_CHECKING:
    from cuqwen.api import Model

MAX_TOKENS = 4096
HELP = """\
/reset           a new conversation
/system [TEXT]   a new conversation with this system message, or without one
/think on|off    let the model think before it answers, or not
/think show|hide show what it thinks, or not
/save FILE       write the conversation to a JSON file
/load FILE       go on with the conversation in a file
/stats           how long the conversation is, and how fast the last answer was
/exit            end (also Ctrl-D)
A line that ends with \\ goes on with the next one; \"\"\" begins a text of
several lines and ends it; what is pasted stays together. A space before /
sends the line as it is. Ctrl-C stops an answer; twice at the prompt it ends
the program."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = """Talk with a model. In a terminal /help lists what can be said beside text. Through a pipe each
    line is a turn, and standard output has the answers only. Sampling settings that are not given come from the
    checkpoint's generation_config.json."""
    options.add_model(parser)
    options.add_loading(parser)
    text = parser.add_argument_group("text")
    options.add_thinking(text)
    text.add_argument("--hide-thinking", action="store_true", help="do not show what the model thinks")
    text.add_argument(
        "--max-tokens",
        type=int,
        default=MAX_TOKENS,
        metavar="N",
        help=f"most tokens of an answer (default {MAX_TOKENS})",
    )
    options.add_sampling(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--stats", action="store_true", help="a line of figures after each answer")
    output.add_argument("--quiet", action="store_true", help="no progress, no greeting")


def run(given: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    settings = options.sampling(given, parser)
    options.at_least(given, parser, 1, "max_tokens", "max_context", "thinking_budget")
    if given.stats and given.quiet:
        parser.error("--stats: --quiet wants none")
    terminal.use_utf8()
    model = loading.load(given)
    answers.check_template(model, given)
    Chat(model, settings, given).run()


class Chat:
    """The loop: read a message, do what it says or answer it."""

    def __init__(self, model: Model, settings: dict[str, Any], given: argparse.Namespace) -> None:
        self.model, self.settings, self.given = model, settings, given
        self.conversation = Conversation(model.tokenizer, model.generation_config.eos_token_id, given.system)
        self.conversation.enable_thinking = False if given.no_think else None
        self.interactive = sys.stdin.isatty()
        self.shows_thinking = sys.stdout.isatty() and not given.hide_thinking
        self.last: figures.Answer | None = None
        self.commands: dict[str, Callable[[str], None]] = {
            "help": lambda rest: terminal.note(HELP),
            "reset": self._reset,
            "system": self._system,
            "think": self._think,
            "save": self._save,
            "load": self._load,
            "stats": self._stats,
        }

    def run(self) -> None:
        if self.interactive and not self.given.quiet:
            kind = "" if self.model.tokenizer.has_chat_template else " has no chat template: it goes on with your text"
            terminal.note(f"{self.given.model}{kind or ' on ' + self.model.device}. /help for help, /exit to end.")
        reader, ends = Reader(self.interactive), False
        while True:
            try:
                message = reader.message()
            except KeyboardInterrupt:  # perhaps meant for an answer that was just done
                if ends or not self.interactive:
                    raise
                terminal.note("\n(Ctrl-C again ends, and so does /exit)")
                ends = True
                continue
            if message is None:
                return
            ends = False
            name, _, rest = message[1:].partition(" ") if message.startswith("/") else ("", "", "")
            if name in ("exit", "quit"):
                return
            try:
                if message.startswith("/"):
                    self._command(name, rest.strip())
                elif message.strip():
                    self._answer(message.removeprefix(" ") if message.startswith(" /") else message)
            except (ValueError, OSError, MemoryError, RuntimeError) as error:
                if not self.interactive or isinstance(error, BrokenPipeError):
                    raise
                terminal.note(f"error: {' '.join(str(error).split())}")

    def _command(self, name: str, rest: str) -> None:
        if name not in self.commands:
            raise ValueError(f"/{name}: wanted a command, /help lists them; a space before / sends the line as it is")
        self.commands[name](rest)

    def _answer(self, message: str) -> None:
        """Answer a message. Ctrl-C stops the answer; what there is of it stays part of the conversation."""
        from cuqwen.thinking import opens_thinking

        answer: figures.Answer | None = None
        shown: Shown | None = None
        try:
            ids, read, room = self._prompt(message)
            answer = figures.Answer(self.model, read, len(ids))
            opened = opens_thinking(self.model.tokenizer, ids)
            shown = Shown(self.shows_thinking, opened)
            settings = self.settings | {"max_tokens": min(self.given.max_tokens, room)}
            show = terminal.for_a_person(self.given.quiet)
            with terminal.bar("prompt", "tok", show=show, least=answers.PROGRESS_FROM_TOKENS) as progress:
                steps: Any = self.model.stream(
                    ids, thinking_budget=self.given.thinking_budget, progress=progress, **settings
                )
                with contextlib.closing(steps):
                    for step in answer.watch(steps):
                        shown.push(step.text)
            ending = ""
            if answer.steps[-1].finish_reason == "length":
                ending = f"cut at {len(answer.steps):,} tokens" + ", still thinking" * shown.is_thinking
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            ending = "stopped"
        if shown is not None:
            shown.finish()
        if answer is not None and answer.steps:
            self.conversation.answered(message, ids, answer.tokens, "<think>" * opened + answer.text)
            self.last = answer
        if ending and self.interactive:
            terminal.note(f"({ending})")
        if self.given.stats and answer is not None:
            terminal.note(answer.line())

    def _prompt(self, message: str) -> tuple[list[int], int, int]:
        """(the tokens of the conversation up to the next answer, how many of them are new, for how many more the context
        has room)"""
        ids = self.conversation.ask(message)
        if len(ids) + self.given.max_tokens > self.model.max_context and self.conversation.forget_thinking():
            ids = self.conversation.ask(message)
        room = self.model.max_context - len(ids)
        if room < 1:
            raise ValueError(
                f"conversation of {len(ids):,} tokens: wanted fewer than the context of {self.model.max_context:,}; "
                "/reset begins a new one"
            )
        return ids, len(ids) - len(self.conversation.ids), room

    def _reset(self, rest: str) -> None:
        self.conversation.reset()
        self.last = None
        if self.interactive:
            terminal.note("(a new conversation)")

    def _system(self, rest: str) -> None:
        if rest and not self.model.tokenizer.has_chat_template:
            raise ValueError("/system: wanted a chat template, the checkpoint has none; say it in the text")
        self.conversation.system = rest or None
        self._reset("")

    def _think(self, rest: str) -> None:
        if rest in ("on", "off"):
            self.conversation.enable_thinking = rest == "on"
        elif rest in ("show", "hide"):
            self.shows_thinking = rest == "show"
        else:
            raise ValueError(f"/think: wanted on, off, show or hide, got {rest!r}")

    def _save(self, rest: str) -> None:
        path = _path(rest, "save")
        system = [] if self.conversation.system is None else [{"role": "system", "content": self.conversation.system}]
        saved = {"model": self.given.model, "messages": [*system, *self.conversation.messages]}
        data = (json.dumps(saved, ensure_ascii=False, indent=1) + "\n").encode("utf-8")
        part = path.with_name(path.name + ".part")
        try:
            if path.exists():
                try:
                    _read_messages(path)
                except ValueError:
                    raise ValueError(f"/save: {path} is there and no conversation; give another file") from None
            part.write_bytes(data)
            part.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            raise OSError(f"/save: {path} cannot be written ({error.strerror}); give another file") from None
        terminal.note(f"{len(self.conversation.messages)} messages are in {path}")

    def _load(self, rest: str) -> None:
        path = _path(rest, "load")
        try:
            messages = _read_messages(path)
        except OSError as error:
            raise OSError(f"/load: {path} cannot be read ({error.strerror}); give another file") from None
        except ValueError as error:
            raise ValueError(f"/load: {path}: wanted a conversation as /save writes it ({error})") from None
        has_system = bool(messages) and messages[0]["role"] == "system"
        self.conversation.system = messages[0]["content"] if has_system else None
        self.conversation.reset(messages[has_system:])
        self.last = None
        terminal.note(f"{len(self.conversation.messages)} messages from {path}")

    def _stats(self, rest: str) -> None:
        used, context = len(self.conversation.ids), self.model.max_context
        turns = sum(message["role"] == "user" for message in self.conversation.messages)
        length = f"{used:,} of {context:,} tokens" if used or not turns else "read with the next one"
        terminal.note(f"{turns} turn{'s' * (turns != 1)}, {length}")
        if self.last is not None:
            terminal.note(f"last answer: {self.last.line()}")


def _read_messages(path: Path) -> list[dict[str, str]]:
    """The messages of a saved conversation. Raises ValueError for another file, OSError."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        found = saved["messages"] if isinstance(saved, dict) else saved
        messages = [
            {key: message[key] for key in ("role", "reasoning_content", "content") if message.get(key) is not None}
            for message in found
        ]
    except (LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    for number, message in enumerate(messages):
        if not {"role", "content"} <= message.keys() or not all(isinstance(text, str) for text in message.values()):
            raise ValueError("a message lacks role or content as text")
        if message["role"] not in ("user", "assistant", "system")[: 2 + (number == 0)]:
            raise ValueError(f"a message of {message['role']}")
        message["content"].encode("utf-8")  # no half of a surrogate pair, which no template and no file can take
    return messages


def _path(text: str, command: str) -> Path:
    if not text:
        raise ValueError(f"/{command}: wanted a file's name, got none")
    return Path(text).expanduser()


class Reader:
    """Messages from standard input. In a terminal with line editing and history, where Python has readline."""

    def __init__(self, interactive: bool) -> None:
        self.interactive = interactive
        self.edits = interactive and sys.stdout.isatty()
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(encoding="utf-8", errors="replace" if interactive else "strict")
        if self.edits:
            with contextlib.suppress(ImportError):  # Windows, whose own console edits lines
                import readline

                if os.environ.get("TERM") != "dumb" and "libedit" not in (readline.__doc__ or ""):
                    readline.parse_and_bind("set enable-bracketed-paste on")  # what is pasted comes as one text

    def message(self) -> str | None:
        """The next message; None at the end of the input."""
        line = self._line("> ")
        if line is None:
            return None
        if line.lstrip().startswith('"""'):
            return self._block(line.lstrip()[3:])
        while line.endswith("\\") and (more := self._line(". ")) is not None:
            line = line[:-1] + "\n" + more
        return line

    def _block(self, line: str) -> str:
        lines = [line]
        while not lines[-1].rstrip().endswith('"""') and (more := self._line(". ")) is not None:
            lines.append(more)
        return "\n".join([*lines[:-1], lines[-1].rstrip().removesuffix('"""')]).strip("\n")

    def _line(self, prompt: str) -> str | None:
        try:
            if self.edits:
                return input(prompt)
            if self.interactive:
                print(prompt, end="", file=sys.stderr, flush=True)
            line = sys.stdin.readline()
        except EOFError:
            terminal.note("")  # the shell's prompt begins on a new line
            return None
        except UnicodeDecodeError as error:
            raise ValueError(
                f"standard input: wanted UTF-8 text, got byte 0x{error.object[error.start]:02x}; "
                "convert it, for instance with iconv"
            ) from None
        return line.removesuffix("\n").removesuffix("\r") if line else None


class Shown:
    """Prints an answer that arrives in pieces, and its thinking dimmed, or between its tags where nothing can be dimmed, or
    not at all."""

    def __init__(self, shows_thinking: bool, opened: bool) -> None:
        self.shows_thinking, self.dims = shows_thinking, terminal.has_colours(sys.stdout)
        self.state = "begins"  # then "opens" (behind a tag), "thinks", "ends" (behind the closing tag), "answers"
        self.pending = "<think>\n" if opened else ""  # what may be part of a tag
        self.ends_line = True
        self.waits = False  # a word on standard error stands for hidden thinking
        self.push("")

    @property
    def is_thinking(self) -> bool:
        return self.state in ("opens", "thinks")

    def push(self, text: str) -> None:
        self.pending += text
        if self.state == "begins":
            start = self.pending.lstrip()
            if start.startswith("<think>"):
                self.state, self.pending = "opens", start.removeprefix("<think>")
                self._begin_thinking()
            elif not "<think>".startswith(start):
                self.state = "answers"
        if self.state == "opens":
            self.pending = self.pending.lstrip("\n")
            self.state = "thinks" if self.pending else "opens"
        if self.state == "thinks":
            thought, closed, rest = self.pending.partition("</think>")
            held = 0 if closed else _overlap(self.pending, "</think>")
            self._print_thought(thought[: len(thought) - held] if held else thought)
            self.pending = rest if closed else self.pending[len(self.pending) - held :]
            if closed:
                self._end_thinking()
                self.state = "ends"
        if self.state == "ends":
            self.pending = self.pending.lstrip("\n")
            self.state = "answers" if self.pending else "ends"
        if self.state == "answers":
            self._print(self.pending)
            self.pending = ""

    def finish(self) -> None:
        """Print what was held back, and end the line."""
        if self.is_thinking:
            self._print_thought(self.pending)
            self._end_thinking()
        else:
            self._print(self.pending)
        self.pending = ""
        if not self.ends_line:
            self._print("\n")

    def _begin_thinking(self) -> None:
        if self.shows_thinking and not self.dims:
            self._print("<think>\n")
        elif not self.shows_thinking and sys.stdout.isatty() and terminal.has_colours(sys.stderr):
            print(f"{terminal.DIM}thinking …{terminal.PLAIN}", end="", file=sys.stderr, flush=True)
            self.waits = True

    def _print_thought(self, text: str) -> None:
        if self.shows_thinking and text:
            self._print(f"{terminal.DIM}{text}{terminal.PLAIN}" if self.dims else text)
            self.ends_line = text.endswith("\n")

    def _end_thinking(self) -> None:
        if self.waits:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self.waits = False
        if self.shows_thinking:
            self._print("\n" * (not self.ends_line))
            self._print("\n" if self.dims else "</think>\n\n")

    def _print(self, text: str) -> None:
        if text:
            terminal.write(text)
            self.ends_line = text.endswith("\n")


def _overlap(text: str, tag: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `tag`."""
    return next((n for n in range(min(len(text), len(tag) - 1), 0, -1) if text.endswith(tag[:n])), 0)
