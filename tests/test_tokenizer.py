"""Tokenizer, chat template and TextStream, on a tiny byte-level BPE and on Qwen3's published tokenizer.

Chat prompts must equal what transformers writes: golden/tokenizer_qwen3.json holds its results, and where transformers
is installed they are compared with it again. `python tests/test_tokenizer.py` writes the golden file.
"""

import functools
import itertools
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from cuqwen.config import CheckpointError
from cuqwen.tokenizer import Tokenizer

QWEN3 = Path(__file__).resolve().parents[2] / "shared" / "data" / "qwen3-tokenizer"
GOLDEN = Path(__file__).with_name("golden") / "tokenizer_qwen3.json"
QWEN3_ROWS = 151_936

USER = {"role": "user", "content": "Who was Noah's great-grandfather?"}
SYSTEM = {"role": "system", "content": "Answer in one word. <b>&\"'</b>"}
THOUGHT = {"role": "assistant", "content": "<think>\nEnoch begat Methuselah.\n</think>\n\nEnoch."}
ANSWER = {"role": "assistant", "content": "Enoch."}
REASONED = {"role": "assistant", "content": "Enoch.", "reasoning_content": "\nMethuselah's father…\n"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Wetter für <einen> Ort & 天気 🌦",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}, "days": {"type": "integer"}}},
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"place": "Köln <1>", "days": 2}}}
CALL_TEXT = {"name": "clock", "arguments": '{"zone": "UTC"}'}
RESULT = {"role": "tool", "content": '{"sky": "grün & blau"}'}
# name -> (messages, arguments of apply_chat_template)
CASES = {
    "plain": ([USER], {}),
    "no_generation_prompt": ([USER], {"add_generation_prompt": False}),
    "system": ([SYSTEM, USER], {}),
    "system_only": ([SYSTEM], {}),
    "system_later": ([USER, SYSTEM, USER], {}),
    "thinking_on": ([USER], {"enable_thinking": True}),
    "thinking_off": ([SYSTEM, USER], {"enable_thinking": False}),
    "multi_turn": ([USER, ANSWER, {"role": "user", "content": "Sure?"}], {}),
    "past_thinking_is_stripped": ([USER, THOUGHT, {"role": "user", "content": "Sure?"}], {}),
    "thinking_of_last_message_stays": ([USER, THOUGHT], {"add_generation_prompt": False}),
    "reasoning_content": ([USER, REASONED], {"add_generation_prompt": False}),
    "past_reasoning_content": ([USER, REASONED, {"role": "user", "content": "Sure?"}], {"enable_thinking": False}),
    "reasoning": ([USER, {"role": "assistant", "content": "Enoch.", "reasoning": "Hm."}], {}),
    "none_is_absent": ([USER, {**ANSWER, "reasoning_content": None, "tool_calls": None, "name": None}], {}),
    "tools": ([USER], {"tools": [WEATHER, CLOCK]}),
    "tools_and_system": ([SYSTEM, USER], {"tools": [WEATHER], "enable_thinking": False}),
    "no_tools": ([USER], {"tools": []}),
    "tool_call": ([USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}], {"tools": [WEATHER]}),
    "tool_calls_and_text": ([USER, {**ANSWER, "tool_calls": [CALL, CALL_TEXT]}], {"tools": [WEATHER, CLOCK]}),
    "tool_results": (
        [SYSTEM, USER, {**THOUGHT, "tool_calls": [CALL, CALL]}, RESULT, RESULT],
        {"tools": [WEATHER]},
    ),
    "after_tool_results": (
        [
            USER,
            {**REASONED, "tool_calls": [CALL]},
            RESULT,
            {**REASONED, "tool_calls": [CALL_TEXT]},
            RESULT,
            ANSWER,
            USER,
        ],
        {"tools": [WEATHER, CLOCK], "enable_thinking": True},
    ),
    "special_tokens_in_content": ([{"role": "user", "content": "<|im_end|>\n<|im_start|>system\n"}], {}),
    "unicode": ([{"role": "user", "content": "  e\u0301 ﬁ Ω 汉字 👩‍👩‍👧 \r\n\t\u202e\ufffd "}], {}),
    "empty_content": ([{"role": "user", "content": ""}], {}),
}
# What streams must cut anywhere: 1 to 4 bytes, joined emoji, combining marks, a real U+FFFD, controls, noncharacters
TEXTS = [
    "In the beginning God created the heaven and the earth.",
    "naïve café, Ärger, e\u0301\u0323, ﬁ, \u1100\u1161\u11a8",
    "汉字漢字かなカナ한국어 ไทย हिन्दी עברית العربية",
    "👩‍👩‍👧‍👦👍🏽🇩🇪🏴󠁧󠁢󠁥󠁮󠁧󠁿🫠𓀀𝕏",
    "real \ufffd and \ufffd\ufffd, \ufeffBOM, \x00\x07\x1b, \ud7ff\ue000\uffff\U0010ffff",
    "<|im_start|>user\n汉<|im_end|>é<think>\n\n</think>\n\n<tool_call>",
    " \t\n\r\n   x\u00a0\u3000y  ",
]


class Rows:
    """As much of a Config as the tokenizer asks for."""

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size


@pytest.fixture(scope="module")
def qwen3():
    if not QWEN3.is_dir():
        pytest.skip("the published Qwen3 tokenizer is not beside this checkout (../shared/data/qwen3-tokenizer)")
    return Tokenizer.from_folder(QWEN3, Rows(QWEN3_ROWS))


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    """A byte-level BPE of 256 bytes and a few merges; added tokens whose letters are in its alphabet and are not."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    backend.add_special_tokens(["<|end|>", "<|pad me|>"])
    backend.add_tokens([AddedToken("<note>"), AddedToken("two words"), AddedToken("汉-Ġ"), AddedToken("Ġà")])
    folder = tmp_path_factory.mktemp("tiny")
    backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def tiny(tiny_folder):
    return Tokenizer.from_folder(tiny_folder, Rows(1000))


@pytest.fixture(params=["tiny", "qwen3"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def streamed(tokenizer, ids):
    """The text of a stream, checked piece by piece against nothing but itself."""
    stream = tokenizer.stream()
    pieces = [stream.push(id) for id in ids]
    return "".join(pieces) + stream.finish()


# ids


def test_ids_of_qwen3(qwen3):
    assert qwen3.n_ids == 151_669
    assert qwen3.encode("<|im_start|>user\nHello<|im_end|>") == [151644, 872, 198, 9707, 151645]
    assert qwen3.encode("") == []
    assert qwen3.decode([151644, 872, 198, 9707, 151645]) == "user\nHello"
    assert qwen3.decode([151644, 872, 151667], skip_special_tokens=False) == "<|im_start|>user<think>"


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tokenizer, text):
    import unicodedata

    ids = tokenizer.encode(text)
    assert all(0 <= id < tokenizer.n_ids for id in ids)
    back = tokenizer.decode(ids, skip_special_tokens=False)
    assert unicodedata.normalize("NFC", back) == unicodedata.normalize("NFC", text)


def test_truncation_and_padding_in_the_file_are_ignored(tiny, tiny_folder, tmp_path):
    backend = tokenizers.Tokenizer.from_file(str(tiny_folder / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_folder(tmp_path, Rows(1000)).encode(TEXTS[0]) == tiny.encode(TEXTS[0])


def test_nothing_is_added(tiny, tiny_folder, tmp_path):
    backend = tokenizers.Tokenizer.from_file(str(tiny_folder / "tokenizer.json"))
    end = backend.token_to_id("<|end|>")
    backend.post_processor = tokenizers.processors.TemplateProcessing("$A <|end|>", special_tokens=[("<|end|>", end)])
    backend.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_folder(tmp_path, Rows(1000)).encode(TEXTS[0]) == tiny.encode(TEXTS[0])


def test_arguments_of_encode_and_decode(tokenizer):
    with pytest.raises(ValueError, match=r"half of a surrogate pair \(U\+D83D\) at 2;") as caught:
        tokenizer.encode("ab\ud83d")
    assert not isinstance(caught.value, UnicodeError)
    for text in (None, b"bytes", ["list"]):
        with pytest.raises(TypeError, match="text: wanted str"):
            tokenizer.encode(text)
    for id in (-1, tokenizer.n_ids, 10**12):
        with pytest.raises(ValueError, match=f"id {id}: wanted .* 0 to {tokenizer.n_ids - 1}"):
            tokenizer.decode([id])
        with pytest.raises(ValueError, match=f"id {id}: wanted"):
            tokenizer.stream().push(id)
    with pytest.raises(TypeError):
        tokenizer.decode([1.5])
    import numpy as np

    assert tokenizer.decode(np.array([65, 66])) == tokenizer.decode([65, 66])


# streams


@pytest.mark.parametrize("text", TEXTS)
def test_stream_prints_whole_characters(tokenizer, text):
    """Each prefix of the pieces is a prefix of the text, and lags it by less than one character."""
    ids = tokenizer.encode(text)
    whole, stream, printed = tokenizer.decode(ids), tokenizer.stream(), ""
    for i, id in enumerate(ids):
        printed += stream.push(id)
        assert whole.startswith(printed)
        sure = tokenizer.decode(ids[: i + 1]).rstrip("\ufffd")
        assert printed.startswith(sure)  # nothing that is known is held back
    assert printed + stream.finish() == whole


@pytest.mark.parametrize("text", TEXTS)
def test_stream_of_single_bytes_split_in_every_way(tiny, text):
    """Byte by byte, and cut short at every byte."""
    data = text.encode()
    bytes_ids = [tiny._backend.token_to_id(pre) for pre in _letters(data)]
    assert streamed(tiny, bytes_ids) == tiny.decode(bytes_ids) == text
    for end in range(len(data)):
        assert streamed(tiny, bytes_ids[:end]) == tiny.decode(bytes_ids[:end])


def test_stream_of_malformed_bytes_is_exhaustive(tiny):
    """Every sequence of up to 4 bytes from each side of UTF-8's boundaries, and longer ones by chance."""
    edges = [0x41, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC1, 0xC2, 0xE0, 0xED, 0xEE, 0xF0, 0xF4, 0xF5, 0xFF]
    ids = {byte: tiny._backend.token_to_id(letter) for byte, letter in zip(edges, _letters(bytes(edges)), strict=True)}
    for length in range(1, 5):
        for sequence in itertools.product(edges, repeat=length):
            sequence = [ids[byte] for byte in sequence]
            assert streamed(tiny, sequence) == tiny.decode(sequence)
    random.seed(0)
    for _ in range(5000):
        sequence = [ids[random.choice(edges)] for _ in range(random.randint(4, 12))]
        assert streamed(tiny, sequence) == tiny.decode(sequence)


def test_stream_of_random_ids(tokenizer):
    """Any ids whatever: halves of characters, special and added tokens in between."""
    random.seed(1)
    rare = [*range(tokenizer.n_ids - 30, tokenizer.n_ids), *range(128, 260)]  # added tokens, single bytes
    for _ in range(1000):
        ids = random.choices(range(tokenizer.n_ids), k=10) + random.choices(rare, k=20)
        random.shuffle(ids)
        assert streamed(tokenizer, ids) == tokenizer.decode(ids)


def test_stream_knows_every_token(tokenizer):
    """Each id alone, and between the halves of a character, which a special token does not part."""
    first, last = (tokenizer._backend.token_to_id(letter) for letter in _letters("é".encode()))
    step = 1 if tokenizer.n_ids < 1000 else 37
    for id in [*range(0, tokenizer.n_ids, step), *range(tokenizer.n_ids - 30, tokenizer.n_ids)]:
        for ids in ([id], [first, id, last]):
            assert streamed(tokenizer, ids) == tokenizer.decode(ids)
    special = tokenizer.encode("<|end|><|im_end|>")  # each tokenizer has one of them
    assert "é" in streamed(tokenizer, [first, *special[:1], last]) or "é" in streamed(
        tokenizer, [first, *special[-1:], last]
    )


def test_streams_are_independent(tokenizer):
    first, last = (tokenizer._backend.token_to_id(letter) for letter in _letters("é".encode()))
    one, other = tokenizer.stream(), tokenizer.stream()
    assert (one.push(first), other.push(first), one.push(last), other.finish(), one.finish()) == (
        "",
        "",
        "é",
        "\ufffd",
        "",
    )


def test_stream_costs_the_same_at_any_length(tokenizer):
    """60,000 tokens without a break: a stream that decoded its text again for each would take minutes."""
    ids = [tokenizer._backend.token_to_id(letter) for letter in _letters("汉".encode())] * 20_000
    start = time.perf_counter()
    assert streamed(tokenizer, ids) == "汉" * 20_000
    assert time.perf_counter() - start < 2


@functools.cache
def _alphabet():
    """Byte to letter of byte-level BPE, as the tokenizers library writes it: read off characters that have the byte."""
    characters = [chr(code) for code in [*range(0xC0), *range(0xC0, 0x110000, 0x40)] if not 0xD800 <= code < 0xE000]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = {}
    for character in characters:
        alphabet.update(zip(character.encode(), byte_level.pre_tokenize_str(character)[0][0], strict=True))
    # 13 bytes occur in no UTF-8; like all printable Latin-1 they are their own letters
    return alphabet | {byte: chr(byte) for byte in (0xC0, 0xC1, *range(0xF5, 0x100))}


def _letters(data):
    return [_alphabet()[byte] for byte in data]


# files


def test_missing_and_broken_tokenizer(tmp_path):
    with pytest.raises(CheckpointError, match="found no such file"):
        Tokenizer.from_folder(tmp_path, Rows(1000))
    for text in (
        b"",
        b"{",
        b"{}",
        b"[]",
        b"null",
        b'{"model": {"type": "Foo"}}',
        b"\xff\xfe",
        b"version https://git-lfs",
    ):
        (tmp_path / "tokenizer.json").write_bytes(text)
        with pytest.raises(
            CheckpointError, match=r"tokenizer\.json: not a readable tokenizer \(.+\); download"
        ) as caught:
            Tokenizer.from_folder(tmp_path, Rows(1000))
        assert "\n" not in str(caught.value)


def test_truncated_tokenizer(tiny_folder, tmp_path):
    data = (tiny_folder / "tokenizer.json").read_bytes()
    for end in (100, len(data) // 2, len(data) - 2):
        (tmp_path / "tokenizer.json").write_bytes(data[:end])
        with pytest.raises(CheckpointError, match="not a readable tokenizer"):
            Tokenizer.from_folder(tmp_path, Rows(1000))


@pytest.mark.parametrize("decoder", [None, decoders.WordPiece(), decoders.Metaspace(), decoders.ByteFallback()])
def test_other_decoders_are_refused(tiny_folder, tmp_path, decoder):
    tree = json.loads((tiny_folder / "tokenizer.json").read_text())
    tree["decoder"] = json.loads(decoder.__getstate__()) if decoder else None
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(CheckpointError, match="wanted a byte-level tokenizer"):
        Tokenizer.from_folder(tmp_path, Rows(1000))


def test_tokenizer_must_fit_the_embedding(tiny, tiny_folder):
    assert Tokenizer.from_folder(tiny_folder, Rows(tiny.n_ids)).n_ids == tiny.n_ids == 326
    with pytest.raises(CheckpointError, match=r"wanted ids below 325 .* got ids up to 325"):
        Tokenizer.from_folder(tiny_folder, Rows(tiny.n_ids - 1))


def test_ids_with_gaps(tiny_folder, tmp_path):
    tree = json.loads((tiny_folder / "tokenizer.json").read_text())
    tree["model"]["vocab"]["Q"] = 700
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    gap = Tokenizer.from_folder(tmp_path, Rows(1000))
    assert gap.encode("A")
    with pytest.raises(CheckpointError, match="got id 700"):
        gap.encode("AQ")


# chat templates of one's own


def chat(tiny_folder, tmp_path, template=None, **config):
    """The tiny tokenizer with this chat_template.jinja and this tokenizer_config.json."""
    (tmp_path / "tokenizer.json").write_bytes((tiny_folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
    return Tokenizer.from_folder(tmp_path, Rows(1000))


def test_template_sources(tiny, tiny_folder, tmp_path):
    assert not tiny.has_chat_template
    with pytest.raises(ValueError, match=r"wanted a chat template, the checkpoint has none; give the prompt as text"):
        tiny.apply_chat_template([USER])
    only = chat(tiny_folder, tmp_path, chat_template="config {{ messages[0].role }}")
    assert only.has_chat_template and only.apply_chat_template([USER]) == "config user"
    both = chat(tiny_folder, tmp_path, "file é", chat_template="config")
    assert both.apply_chat_template([USER]) == "file é"


def test_named_templates(tiny_folder, tmp_path):
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]
    tokenizer = chat(tiny_folder, tmp_path, chat_template=named)
    assert tokenizer.apply_chat_template([USER]) == "plain"
    assert tokenizer.apply_chat_template([USER], tools=[CLOCK]) == "with tools"
    tokenizer = chat(tiny_folder, tmp_path, chat_template=named[1:])
    with pytest.raises(ValueError, match=r"only \['tool_use'\]"):
        tokenizer.apply_chat_template([USER])


@pytest.mark.parametrize(
    "value", [3, ["text"], [{"name": "default"}], [{"name": "default", "template": None}], {"a": 1}]
)
def test_broken_template_entry(tiny_folder, tmp_path, value):
    with pytest.raises(CheckpointError, match="chat_template: wanted"):
        chat(tiny_folder, tmp_path, chat_template=value)


def test_broken_tokenizer_config(tiny_folder, tmp_path):
    chat(tiny_folder, tmp_path)
    for data in (b"", b"{", b"[1]", b"\xff", b"[" * 100_000):
        (tmp_path / "tokenizer_config.json").write_bytes(data)
        with pytest.raises(CheckpointError, match=r"tokenizer_config\.json") as caught:
            Tokenizer.from_folder(tmp_path, Rows(1000))
        assert "\n" not in str(caught.value)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: not UTF-8"):
        Tokenizer.from_folder(tmp_path, Rows(1000))


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("  {% if true %}\nx\n  {% endif %}\n", "x\n"),  # trim_blocks, lstrip_blocks
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),  # loopcontrols
        ('{{ {"b": "<é&>", "a": [1.5, true, none]} | tojson }}', '{"b": "<é&>", "a": [1.5, true, null]}'),
        ('{{ {"b": 1, "a": 2} | tojson(indent=1, sort_keys=true) }}', '{\n "a": 2,\n "b": 1\n}'),
        ("{{ bos_token is defined }} {{ eos_token }} {{ pad_token }}", "False <e> <p>"),
        ("{{ enable_thinking is defined }}", "False"),
        ("{{ tools is none }} {{ documents is none }} {{ add_generation_prompt }}", "True True True"),
        ("{% generation %}\na{{ messages[0].content[:3] }}{% endgeneration %}\n", "aWho"),
        ("{% set ns = namespace(a=1) %}{% set ns.a = ns.a + 1 %}{{ ns.a }}", "2"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ absent }}|{{ messages[0].absent }}", "|"),
    ],
)
def test_template_language(tiny_folder, tmp_path, template, text):
    special = {"bos_token": None, "eos_token": "<e>", "pad_token": {"content": "<p>", "lstrip": False}}
    assert chat(tiny_folder, tmp_path, template, **special).apply_chat_template([USER]) == text


def test_thinking_variable(tiny_folder, tmp_path):
    tokenizer = chat(tiny_folder, tmp_path, "{{ enable_thinking }}")
    assert [tokenizer.apply_chat_template([USER], enable_thinking=x) for x in (True, False)] == ["True", "False"]
    with pytest.raises(TypeError, match="enable_thinking"):
        tokenizer.apply_chat_template([USER], enable_thinking="no")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must\nalternate') }}", "roles must alternate"),
        ("{{ absent.attribute }}", "'absent' is undefined"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "OverflowError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{% include 'x' %}", "TypeError"),
        # the sandbox
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.__class__.__base__.__subclasses__() }}", "unsafe"),
        ("{{ (messages | attr('__class__')).__mro__ }}", "unsafe|undefined"),
        ("{{ '{0.__class__.__mro__}'.format(messages) }}", "unsafe"),
        ("{{ ('{0.__class__.__mro__}' | attr('format'))(messages) }}", "unsafe"),
        ("{{ raise_exception.__globals__ }}{{ raise_exception.__globals__.x }}", "unsafe"),
        ("{{ strftime_now.__code__.co_consts.x }}", "unsafe"),
        ("{{ lipsum.__globals__['os'].getcwd() }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely"),
        ("{{ messages[0].update({'role': 'x'}) }}", "unsafe|not safely"),
        ("{% set ns = namespace() %}{% set ns.__call__ = messages %}", "namespace"),
        ("{{ namespace(**{'__html__': messages}) }}", "namespace"),
    ],
)
def test_template_that_fails_or_attacks(tiny_folder, tmp_path, template, reason):
    tokenizer = chat(tiny_folder, tmp_path, template)
    with pytest.raises(ValueError, match=reason) as caught:
        tokenizer.apply_chat_template([USER])
    assert not isinstance(caught.value, CheckpointError)
    assert str(caught.value).startswith(str(tmp_path / "chat_template.jinja"))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("template", ["{% if %}", "{{ x", "{% endfor %}", "\n{% nothing %}", "{{ a | nofilter }}"])
def test_template_with_a_syntax_error(tiny_folder, tmp_path, template):
    tokenizer = chat(tiny_folder, tmp_path, template)
    with pytest.raises(CheckpointError, match=r"broken chat template, line \d") as caught:
        tokenizer.apply_chat_template([USER])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("messages", "error", "reason"),
    [
        ("Hello", TypeError, "messages: wanted a list"),
        (USER, TypeError, "messages: wanted a list"),
        ([], ValueError, "at least one message"),
        (["Hello"], TypeError, r"messages\[0\]: wanted a dict"),
        ([USER, {"content": "x"}], TypeError, r"messages\[1\]: wanted a text as 'role', got NoneType"),
        ([{"role": 1, "content": "x"}], TypeError, "'role', got int"),
        ([{"role": "user"}], TypeError, "'content', got NoneType"),
        ([{"role": "user", "content": None}], TypeError, "'content', got NoneType"),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], TypeError, "'content', got list"),
        ([{"content": "x", "tool_calls": [CALL]}], TypeError, "'role', got NoneType"),
        ([{"role": "user", "content": "x", "image": object()}], TypeError, r"messages\[0\]: wanted plain JSON values"),
    ],
)
def test_messages_are_checked(tiny_folder, tmp_path, messages, error, reason):
    with pytest.raises(error, match=reason):
        chat(tiny_folder, tmp_path, "x").apply_chat_template(messages)


def test_tools_are_checked(tiny_folder, tmp_path):
    tokenizer = chat(tiny_folder, tmp_path, "x")
    for tools in ("weather", CLOCK, [print], [{"f": print}]):
        with pytest.raises(TypeError, match="tools: wanted"):
            tokenizer.apply_chat_template([USER], tools=tools)


def test_messages_are_left_alone(tiny_folder, tmp_path):
    messages = [dict(USER), {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning": "r"}]
    before = json.dumps(messages)
    text = chat(tiny_folder, tmp_path, "{{ messages[1].reasoning_content }}").apply_chat_template(messages)
    assert text == "r" and json.dumps(messages) == before


# Qwen3's own template, against transformers


@pytest.fixture(scope="module")
def golden():
    return json.loads(GOLDEN.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", CASES)
def test_chat_equals_golden(qwen3, golden, name):
    messages, options = CASES[name]
    text = qwen3.apply_chat_template(messages, **options)
    assert text == golden[name]["text"]
    assert qwen3.encode(text) == golden[name]["ids"]


def test_golden_has_each_case(golden):
    assert sorted(golden) == sorted(CASES)


@pytest.mark.parametrize("name", CASES)
def test_chat_equals_transformers(qwen3, transformers_qwen3, name):
    messages, options = CASES[name]
    assert qwen3.apply_chat_template(messages, **options) == in_transformers(transformers_qwen3, messages, options)[0]


@pytest.mark.parametrize("text", TEXTS)
def test_text_equals_transformers(qwen3, transformers_qwen3, text):
    ids = transformers_qwen3(text, add_special_tokens=False)["input_ids"]
    assert qwen3.encode(text) == ids
    assert qwen3.decode(ids) == transformers_qwen3.decode(ids, skip_special_tokens=True)
    assert qwen3.decode(ids, skip_special_tokens=False) == transformers_qwen3.decode(ids)


@pytest.fixture(scope="module")
def transformers_qwen3():
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(QWEN3)


def in_transformers(tokenizer, messages, options):
    options = {"add_generation_prompt": True, **options}
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    return text, tokenizer(text, add_special_tokens=False)["input_ids"]


# cost


def test_import_is_light():
    code = """
import sys, cuqwen.tokenizer
sys.exit(bool({'tokenizers', 'jinja2', 'huggingface_hub'} & set(sys.modules)))
"""
    root = str(Path(__file__).resolve().parents[1])
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": root})


def test_loading_adds_little_to_the_library(qwen3):
    def seconds(load):
        start = time.perf_counter()
        load()
        return time.perf_counter() - start

    def library():
        tokenizers.Tokenizer.from_file(str(QWEN3 / "tokenizer.json"))

    def ours():
        Tokenizer.from_folder(QWEN3, Rows(QWEN3_ROWS))

    times = [(seconds(library), seconds(ours)) for _ in range(3)]
    assert min(both[1] for both in times) < 1.5 * min(both[0] for both in times)


if __name__ == "__main__":
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(QWEN3)
    results = {}
    for name, (messages, options) in CASES.items():
        text, ids = in_transformers(theirs, messages, options)
        results[name] = {"text": text, "ids": ids}
    lines = [f"{json.dumps(name)}: {json.dumps(result, ensure_ascii=False)}" for name, result in results.items()]
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
