"""Text to ids and back, the checkpoint's own chat template, and streamed text without half characters.

The ids are those of the `tokenizers` library. Chat templates are programs that come with a checkpoint, so they run in
jinja2's sandbox; what they print equals transformers' `apply_chat_template`.
"""

import codecs
import functools
import json
import operator
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cuqwen.config import CheckpointError, Config

if TYPE_CHECKING:
    import jinja2
    import tokenizers

_SPECIAL_TOKEN_KEYS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
_RAW = "give the prompt as text to go without a template"
_TOGETHER = "take all files of the folder from one published checkpoint"


class Tokenizer:
    """The tokenizer of one checkpoint; made by `from_folder`.

    n_ids              every id that the tokenizer knows is below it. An embedding may have more rows (Qwen3: 151,669
                       ids, 151,936 rows); the ids of those rows mean nothing and are never sampled.
    has_chat_template  whether `apply_chat_template` can work
    """

    def __init__(
        self, backend: "tokenizers.Tokenizer", templates: dict[str, str], special_tokens: dict[str, str], where: str
    ) -> None:
        """templates: name to source. special_tokens: key of tokenizer_config.json to token. where: for messages."""
        added = backend.get_added_tokens_decoder()
        # The ids of the model proper are taken to be 0, 1, 2, …: asking for each would make loading a fifth longer.
        # `encode` checks what it returns, so that a tokenizer with gaps cannot index outside the embedding.
        self.n_ids = max([backend.get_vocab_size(with_added_tokens=False), *(id + 1 for id in added)])
        self.has_chat_template = bool(templates)
        self._backend = backend
        self._special_ids = frozenset(id for id, token in added.items() if token.special)
        self._bytes: dict[int, bytes] = {}
        self._templates = templates
        self._special_tokens = special_tokens
        self._where = where

    @classmethod
    def from_folder(cls, folder: Path, config: Config) -> "Tokenizer":
        """Reads tokenizer.json, tokenizer_config.json and chat_template.jinja; only the first one must be there.

        Raises CheckpointError for files that are missing, broken, unsupported or do not fit `config.vocab_size`.
        """
        import tokenizers

        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{path}: wanted the tokenizer, found no such file; {_TOGETHER}")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{path}: not a readable tokenizer ({reason}); download it again") from error
        if not isinstance(backend.decoder, tokenizers.decoders.ByteLevel):
            raise CheckpointError(
                f"{path}: wanted a byte-level tokenizer (decoder ByteLevel), got decoder {backend.decoder}; "
                "use the tokenizer.json that was published with the model"
            )
        # Settings of a training run that the file may carry: a prompt must be neither cut nor padded.
        backend.no_truncation()
        backend.no_padding()
        templates, special_tokens, where = _read_templates(folder)
        tokenizer = cls(backend, templates, special_tokens, where)
        if tokenizer.n_ids > config.vocab_size:
            raise CheckpointError(
                f"{path}: wanted ids below {config.vocab_size} (vocab_size of config.json, the rows of the embedding), "
                f"got ids up to {tokenizer.n_ids - 1}; {_TOGETHER}"
            )
        return tokenizer

    def encode(self, text: str) -> list[int]:
        """The ids of `text`. Special tokens in it are recognised, nothing is added."""
        if not isinstance(text, str):
            raise TypeError(f"text: wanted str, got {type(text).__name__}")
        try:
            ids = self._backend.encode(text, add_special_tokens=False).ids
        except TypeError as error:  # that it is a str is known, so it cannot be written as UTF-8
            at = next(i for i, character in enumerate(text) if "\ud800" <= character <= "\udfff")
            raise ValueError(
                f"text: wanted Unicode characters, got half of a surrogate pair (U+{ord(text[at]):04X}) at {at}; "
                "decode the input as UTF-8 with errors='replace'"
            ) from error
        if max(ids, default=0) >= self.n_ids:
            raise CheckpointError(f"tokenizer.json: wanted ids without gaps, got id {max(ids)} of {self.n_ids}")
        return ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD. ValueError for ids the tokenizer does not have."""
        return self._backend.decode([self._known(id) for id in ids], skip_special_tokens=skip_special_tokens)

    def stream(self) -> "TextStream":
        """A decoder for ids that arrive one at a time."""
        return TextStream(self._token_bytes)

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        enable_thinking: bool | None = None,
        tools: list[dict[str, Any]] | None = None,
    ) -> str:
        """The prompt of a conversation, as the checkpoint's template writes it.

        messages               [{"role": "user", "content": "…"}, …]; also "reasoning_content", "tool_calls", …, as far
                               as the template knows them. All plain JSON values.
        add_generation_prompt  end with the opening of the assistant's next message
        enable_thinking        None leaves it to the template (Qwen3: it thinks)
        tools                  JSON descriptions of the functions the model may call

        Raises ValueError (TypeError for wrong types) where there is no template, where it refuses the messages or
        fails, and CheckpointError where it is no jinja template.
        """
        if not isinstance(enable_thinking, (bool, type(None))):
            raise TypeError(f"enable_thinking: wanted True, False or None, got {type(enable_thinking).__name__}")
        if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
            raise TypeError("tools: wanted a list of dicts, one JSON description for each function")
        variables: dict[str, Any] = {
            **self._special_tokens,
            "messages": _plain_messages(messages),
            "tools": _plain(tools, "tools"),
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        if enable_thinking is not None:
            variables["enable_thinking"] = enable_thinking
        template = self._template("tool_use" if tools is not None and "tool_use" in self._templates else "default")
        try:
            return template.render(variables)
        except Exception as error:  # the template is a program of someone else's: it may raise anything
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(
                f"{self._where}: the chat template cannot write these messages ({reason}); check their roles, order "
                f"and contents, or {_RAW}"
            ) from error

    def _template(self, name: str) -> "jinja2.Template":
        if name not in self._templates:
            has = f"only {sorted(self._templates)}" if self._templates else "none"
            raise ValueError(f"{self._where}: wanted a chat template, the checkpoint has {has}; {_RAW}")
        try:
            return _compiled(self._templates[name])
        except Exception as error:  # TemplateSyntaxError, or RecursionError for one that is nested without end
            line = getattr(error, "lineno", "?")
            raise CheckpointError(f"{self._where}: broken chat template, line {line}: {error}; {_RAW}") from error

    def _known(self, id: int) -> int:
        id = operator.index(id)
        if not 0 <= id < self.n_ids:
            raise ValueError(f"id {id}: wanted an id of the tokenizer, 0 to {self.n_ids - 1}")
        return id

    def _token_bytes(self, id: int) -> bytes:
        """The bytes that token `id` stands for; none for a special one."""
        known = self._bytes.get(id)
        if known is None:
            token = self._backend.id_to_token(self._known(id)) if id not in self._special_ids else None
            known = self._bytes[id] = b"" if token is None else _byte_level(token)
        return known


class TextStream:
    """Ids in, complete characters out.

    "".join(push(id) for id in ids) + finish() == tokenizer.decode(ids), and no piece ends within a character. A token
    is looked up once and its bytes decoded once, whatever the length of the text.
    """

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        # replaces malformed bytes as tokenizers' decoder does: one U+FFFD for each longest beginning of a character
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id: int) -> str:
        """The text that `id` completes; "" while a character is incomplete, and for special tokens."""
        return self._decoder.decode(self._token_bytes(id))

    def finish(self) -> str:
        """The rest: U+FFFD for a character that stayed incomplete, else ""."""
        return self._decoder.decode(b"", final=True)


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """The alphabet of byte-level BPE, inverted: printable Latin-1 stands for itself, the other bytes for U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _byte_level(token: str) -> bytes:
    """What the ByteLevel decoder makes of a token: its letters as bytes, or if one is outside the alphabet, UTF-8."""
    try:
        return bytes(map(_byte_of_character().__getitem__, token))
    except KeyError:
        return token.encode()


def _read_templates(folder: Path) -> tuple[dict[str, str], dict[str, str], str]:
    """The chat templates by name, the special tokens they may print, and where the templates stand."""
    config_path, template_path = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    config: dict[str, Any] = {}
    if config_path.is_file():
        try:
            config = json.loads(config_path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{config_path}: not readable as JSON ({error}); download it again") from error
        if not isinstance(config, dict):
            raise CheckpointError(f"{config_path}: wanted a JSON object, got {type(config).__name__}")
    special_tokens = {}
    for key in _SPECIAL_TOKEN_KEYS:
        token = config.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            special_tokens[key] = token
    if template_path.is_file():
        try:
            return {"default": template_path.read_text(encoding="utf-8")}, special_tokens, str(template_path)
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{template_path}: not UTF-8 ({error}); download it again") from error
    return _templates_of_config(config.get("chat_template"), config_path), special_tokens, str(config_path)


def _templates_of_config(value: Any, path: Path) -> dict[str, str]:
    """`chat_template` of tokenizer_config.json: a template, a list of named ones, or nothing."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    try:
        templates = {entry["name"]: entry["template"] for entry in value}
        if all(isinstance(text, str) for pair in templates.items() for text in pair):
            return templates
    except (TypeError, LookupError):
        pass
    raise CheckpointError(f"{path}: chat_template: wanted a text or a list of objects with name and template")


def _plain_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A checked copy of `messages` in plain types, with the two conveniences that transformers grants.

    A key whose value is None counts as absent, and reasoning is found under each name in use.
    """
    if not isinstance(messages, (list, tuple)):
        raise TypeError(f"messages: wanted a list of objects with role and content, got {type(messages).__name__}")
    if not messages:
        raise ValueError("messages: wanted at least one message, got none")
    plain = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise TypeError(f"messages[{i}]: wanted a dict with role and content, got {type(message).__name__}")
        message = {key: value for key, value in _plain(message, f"messages[{i}]").items() if value is not None}
        # a message that only calls tools needs no content
        for key in ("role", "content") if "content" in message or not message.get("tool_calls") else ("role",):
            if not isinstance(message.get(key), str):
                raise TypeError(f"messages[{i}]: wanted a text as {key!r}, got {type(message.get(key)).__name__}")
        reasoning = next((message[key] for key in _REASONING_KEYS if key in message), None)
        plain.append(message if reasoning is None else {**message, "reasoning_content": reasoning})
    return plain


def _plain(value: Any, name: str) -> Any:
    """A copy made of JSON's types only: objects with methods of their own could open the sandbox. TypeError if not."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"{name}: wanted plain JSON values ({error})") from error


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> "jinja2.Template":
    """The template, in the environment that transformers documents for chat templates, sandboxed."""
    import jinja2
    from jinja2 import ext, nodes, parser, sandbox, utils

    class Generation(ext.Extension):
        """`{% generation %}…{% endgeneration %}` marks the assistant's text for training; here it prints as it is."""

        tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as this)

        def parse(self, parser: parser.Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    class Namespace(utils.Namespace):
        """Refuses names such as __call__, by which a template would reach into jinja2's own look-ups."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            utils.Namespace.__init__(self)
            for name, value in dict(*args, **kwargs).items():
                self[name] = value

        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise sandbox.SecurityError(f"the namespace may not hold {name!r}")
            utils.Namespace.__setitem__(self, name, value)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    # jinja2's own tojson would escape <, > and & for HTML
    environment.filters["tojson"] = lambda value, ensure_ascii=False, indent=None, separators=None, sort_keys=False: (
        json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    )
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.globals["namespace"] = Namespace
    return environment.from_string(source)
