"""`cuqwen chat`: its conversations token by token, and the command in a terminal and in a pipe."""

import argparse
import io
import json
import re
import subprocess
import sys

import checkpoints
import pytest
from terminal import CUQWEN, ESCAPES, Terminal, environment, interrupted_at_import

import cuqwen
from cuqwen import cli, thinking
from cuqwen.api import Model
from cuqwen.commands import chat
from cuqwen.commands.conversation import MARK, Conversation
from cuqwen.model import Qwen3
from cuqwen.tokenizer import Tokenizer

# What Qwen3's template does, in short: thinking of past answers is left out, and enable_thinking = false closes it at once
TEMPLATE = """\
{%- for m in messages %}{% set content = m.content %}
{%- if m.role == 'assistant' %}{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}
{{- '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"""
THINKS = TEMPLATE.replace("'<|im_start|>assistant\\n'", "'<|im_start|>assistant\\n<think>\\n'")  # as the 2507 models do
GREEDY = ("--temperature", "0", "--max-tokens", "12")
TURNS = ["In the beginning", "And he said", "Blessed are"]


def folder_with(tmp_path_factory, template):
    """The demo with a chat template, and with an end token that it does not write."""
    folder = tmp_path_factory.mktemp("model")
    for file in checkpoints.DEMO.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").write_text('{"eos_token_id": 4094, "do_sample": false}')
    (folder / "chat_template.jinja").write_text(template)
    return str(folder)


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    return folder_with(tmp_path_factory, TEMPLATE)


@pytest.fixture(scope="module")
def thinker(tmp_path_factory):
    return folder_with(tmp_path_factory, THINKS)


def through_pipe(monkeypatch, capsys, lines, *arguments):
    """(status, stdout, stderr) of a chat in this process whose standard input is a pipe."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    status = cli.main(["chat", *arguments, "--device", "cpu"])
    return status, *capsys.readouterr()


@pytest.fixture
def streams(monkeypatch):
    """All prompts that models are given, each with the tokens of its answer and how many tokens of it were computed."""
    seen = []
    stream, read = Model.stream, Qwen3.read

    def spying_stream(self, ids, **arguments):
        seen.append({"ids": list(ids), "tokens": [], "read": 0, "arguments": arguments})
        for step in stream(self, ids, **arguments):
            seen[-1]["tokens"].append(step.token)
            yield step

    def spying_read(self, ids, cache, **arguments):
        seen[-1]["read"] += len(ids)
        return read(self, ids, cache, **arguments)

    monkeypatch.setattr(Model, "stream", spying_stream)
    monkeypatch.setattr(Qwen3, "read", spying_read)
    return seen


# --- conversations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_template", [False, True], ids=["plain", "template"])
def test_three_turns_are_what_they_are_from_scratch(monkeypatch, capsys, streams, chatty, has_template):
    model = chatty if has_template else "demo"
    status, out, err = through_pipe(monkeypatch, capsys, TURNS, "--model", model, *GREEDY)
    assert (status, err, len(streams)) == (0, "", 3)
    for before, turn in zip([None, *streams], streams, strict=False):
        known = before["ids"] + before["tokens"] if before else []
        assert turn["ids"][: len(known)] == known  # a longer conversation extends the cache
        # only what is new is computed; of the answer's last token the cache has no keys and values yet
        assert turn["read"] <= len(turn["ids"]) - len(known) + 1
    monkeypatch.undo()
    texts = []
    for turn in streams:
        fresh = cuqwen.load(model, device="cpu")
        steps = list(fresh.stream(turn["ids"], max_tokens=12, temperature=0))
        assert [step.token for step in steps] == turn["tokens"]
        texts.append("".join(step.text for step in steps))
    assert out == "".join(text + "\n" * (not text.endswith("\n")) for text in texts)


def test_tokens_of_a_conversation_are_those_of_the_template(tmp_path_factory):
    """Where no answer has thought, the ids that grew turn by turn are the template's own of the whole conversation."""
    folder = folder_with(tmp_path_factory, TEMPLATE.replace("<|im_end|>", "<|endoftext|>"))
    check_against_the_template(cuqwen.load(folder, device="cpu").tokenizer, end=4095, other=4094)


def test_tokens_of_a_conversation_are_those_of_qwens_template():
    if not checkpoints.REAL_TOKENIZER.is_dir():
        pytest.skip("Qwen3's tokenizer is not on this machine")
    config = cuqwen.config.Config.from_dict(checkpoints.config_json(checkpoints.SPECS["tied_redundant_head"]), "here")
    object.__setattr__(config, "vocab_size", 151936)
    tokenizer = Tokenizer.from_folder(checkpoints.REAL_TOKENIZER, config)
    check_against_the_template(tokenizer, end=151645, other=151643)


def check_against_the_template(tokenizer, end, other):
    for system in (None, "Be brief."):
        conversation = Conversation(tokenizer, [end, other], system)
        for turn, (question, answer) in enumerate(
            [("Hi!", "Hello."), ("<b>2+2?</b>\n", "4"), ("Sure?", "Yes.\n\nI am.")]
        ):
            ids = conversation.ask(question)
            messages = [{"role": "system", "content": system}] * (system is not None) + conversation.messages
            text = tokenizer.apply_chat_template([*messages, {"role": "user", "content": question}])
            assert ids == tokenizer.encode(text), turn
            tokens = tokenizer.encode(answer)
            # one answer is cut short, the others end with the model's end token, or with another one
            conversation.answered(question, ids, tokens + [[end], [], [other]][turn], answer)
        assert [message["content"] for message in conversation.messages[1::2]] == ["Hello.", "4", "Yes.\n\nI am."]


def test_thinking_of_past_answers_stays_until_the_context_is_short(chatty):
    tokenizer = cuqwen.load(chatty, device="cpu").tokenizer
    conversation = Conversation(tokenizer, [4094])
    ids, answer = conversation.ask("Why?"), "<think>\nHm.\n</think>\n\nBecause."
    conversation.answered("Why?", ids, tokenizer.encode(answer), answer)
    assert conversation.messages[1] == {"role": "assistant", "reasoning_content": "Hm.", "content": "Because."}
    kept = conversation.ask("Sure?")
    assert kept[: len(conversation.ids)] == conversation.ids and "Hm." in tokenizer.decode(kept)
    assert conversation.forget_thinking() and not conversation.forget_thinking()
    anew = tokenizer.decode(conversation.ask("Sure?"))
    assert "Hm." not in anew and anew.index("Because.") < anew.index("Sure?")


def test_a_full_context_is_told(monkeypatch, capsys):
    lines = ["In the beginning"] * 4
    status, out, err = through_pipe(monkeypatch, capsys, lines, "--model", "demo", *GREEDY, "--max-context", "40")
    assert status == 1 and out.count("\n") >= 2
    assert re.fullmatch(r"cuqwen: error: conversation of \d+ tokens: wanted fewer than the context of 40; .*\n", err)


def test_save_reset_load(monkeypatch, capsys, streams, chatty, tmp_path):
    file = tmp_path / "a b.json"
    lines = ["/system Be brief.", *TURNS[:2], f"/save {file}", "/reset", "Amen", f"/load {file}", TURNS[2]]
    status, _, err = through_pipe(monkeypatch, capsys, lines, "--model", chatty, *GREEDY)
    assert status == 0 and err == f"4 messages are in {file}\n4 messages from {file}\n"
    saved = json.loads(file.read_text())
    assert [m["role"] for m in saved["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    assert saved["messages"][1]["content"] == TURNS[0] and saved["model"] == chatty
    tokenizer = cuqwen.load(chatty, device="cpu").tokenizer
    text = tokenizer.apply_chat_template([*saved["messages"], {"role": "user", "content": TURNS[2]}])
    assert streams[-1]["ids"] == tokenizer.encode(text)
    assert tokenizer.decode(streams[2]["ids"]).count("im_start") == 3  # system, user, assistant: the reset was one


def test_without_a_template_a_loaded_conversation_goes_on_as_text(monkeypatch, capsys, streams, tmp_path):
    file = tmp_path / "c.json"
    lines = [*TURNS[:2], f"/save {file}", f"/load {file}", TURNS[2]]
    assert through_pipe(monkeypatch, capsys, lines, "--model", "demo", *GREEDY)[0] == 0
    tokenizer = cuqwen.load("demo", device="cpu").tokenizer
    assert tokenizer.decode(streams[2]["ids"]) == tokenizer.decode(
        [*streams[1]["ids"], *streams[1]["tokens"], *tokenizer.encode("\n" + TURNS[2])]
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/nope", "/nope: wanted a command"),
        ("/save", "/save: wanted a file"),
        ("/save /nowhere/x", "/save: /nowhere/x cannot be written"),
        ("/load /nowhere/x", "/load: /nowhere/x cannot be read"),
        (f"/load {__file__}", "wanted a conversation as /save writes it"),
        ("/think hard", "wanted on, off, show or hide"),
        ("/system Be brief.", "wanted a chat template"),
    ],
)
def test_wrong_commands(monkeypatch, capsys, line, message):
    status, out, err = through_pipe(monkeypatch, capsys, [line], "--model", "demo")
    assert (status, out, err.count("\n")) == (1, "", 1) and message in err


@pytest.mark.parametrize(
    "option", [("--max-tokens", "0"), ("--thinking-budget", "0"), ("--temperature", "-1"), ("--stats", "--quiet")]
)
def test_wrong_usage(option, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["chat", "--model", "./nowhere", *option])
    assert stopped.value.code == 2 and option[0] in capsys.readouterr().err


def test_lines_that_belong_together(monkeypatch):
    lines = 'one \\\ntwo\n"""\nthree\n\nfour\n"""\n"""five"""\n"""six\nseven"""\n\neight\\'
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    reader = chat.Reader(interactive=False)
    found = []
    while (message := reader.message()) is not None:
        found.append(message)
    assert found == ["one \ntwo", "three\n\nfour", "five", "six\nseven", "", "eight\\"]


def test_switching_thinking_off_and_on(monkeypatch, capsys, streams, chatty):
    lines = ["one", "/think off", "two", "/think on", "three"]
    assert through_pipe(monkeypatch, capsys, lines, "--model", chatty, *GREEDY)[0] == 0
    decode = cuqwen.load(chatty, device="cpu").tokenizer.decode
    ends = [decode(turn["ids"]).rpartition("assistant\n")[2] for turn in streams]
    assert ends == ["", "<think>\n\n</think>\n\n", ""]


def test_thinking_budget(monkeypatch, capsys, streams, thinker):
    """After so many tokens of thinking comes Qwen's sentence, and then an answer, as from scratch."""
    arguments = ("--model", thinker, "--temperature", "0", "--max-tokens", "80", "--thinking-budget", "10")
    status, out, _ = through_pipe(monkeypatch, capsys, ["Why?"], *arguments)
    model = cuqwen.load(thinker, device="cpu")
    monkeypatch.undo()
    [turn] = streams
    sentence = model.tokenizer.encode(thinking.ENOUGH)
    thought = [step.token for step in model.stream(turn["ids"], max_tokens=10, temperature=0)]
    rest = [*turn["ids"], *thought, *sentence], 70 - len(sentence)
    answer = [step.token for step in model.stream(rest[0], max_tokens=rest[1], temperature=0)]
    assert status == 0 and turn["tokens"] == [*thought, *sentence, *answer]
    text = model.generate(rest[0], max_tokens=rest[1], temperature=0)
    assert out == text.lstrip("\n") + "\n" * (not text.endswith("\n"))  # a pipe has no thinking
    assert cli.main(["generate", "Why?", "--quiet", "--device", "cpu", *arguments]) == 0
    assert thinking.ENOUGH + text in capsys.readouterr().out
    messages = [{"role": "user", "content": "Why?"}]
    given = {"max_tokens": 80, "temperature": 0, "thinking_budget": 10}
    assert [step.token for step in model.stream(messages, **given)] == turn["tokens"]
    assert [step.token for step in model.stream(messages, **given | {"thinking_budget": 79})] != turn["tokens"]
    for bad, error in ((0, ValueError), (-1, ValueError), (True, TypeError), (1.5, TypeError)):
        with pytest.raises(error, match="stream: thinking_budget: wanted"):
            model.stream(messages, thinking_budget=bad)


def test_nothing_is_lost_where_thinking_is_cut_and_no_number_is_drawn_twice(demo, monkeypatch):
    monkeypatch.setattr(thinking, "opens_thinking", lambda tokenizer, ids: True)
    ids, samplings, run = demo.tokenizer.encode("In the beginning"), [], Model._run

    def noted(self, prompt, max_tokens, sampling, *rest):
        samplings.append(sampling)
        return run(self, prompt, max_tokens, sampling, *rest)

    first = next(iter(demo.stream(ids, max_tokens=1, temperature=0.0)))
    monkeypatch.setattr(Model, "_run", noted)
    for seed in (7, 2**64 - 1, None):
        del samplings[:]
        settings = {"max_tokens": 60, "thinking_budget": 1, "temperature": 0.0, "stop": (first.text + "NEVER",)}
        steps = list(demo.stream(ids, seed=seed, **settings))
        text = "".join(step.text for step in steps)
        assert text == demo.tokenizer.decode(step.token for step in steps)
        assert text.startswith(first.text + thinking.ENOUGH) and len(samplings) == 2
        assert (samplings[0].seed != samplings[1].seed) == (seed is not None)


# --- what is shown -------------------------------------------------------------------------------------------------


class Screen(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize("opened", [False, True])
def test_thinking_is_shown_dimmed_or_tagged_or_not(monkeypatch, size, opened):
    text = (
        "Hm.\n2 < 3</thin\n</think>\n\nYes <think> no"
        if opened
        else "<think>\nHm.\n2 < 3</thin\n</think>\n\nYes <think> no"
    )
    thought = "Hm.\n2 < 3</thin\n"
    shown = {}
    for mode, show, term in (("dim", True, "xterm"), ("plain", True, "dumb"), ("hidden", False, "xterm")):
        screen, other = Screen(), Screen()
        monkeypatch.setattr(sys, "stdout", screen)
        monkeypatch.setattr(sys, "stderr", other)
        monkeypatch.setenv("TERM", term)
        monkeypatch.delenv("NO_COLOR", raising=False)
        display = chat.Shown(show, opened)
        for at in range(0, len(text), size):
            display.push(text[at : at + size])
        display.finish()
        shown[mode] = screen.getvalue()
        if mode == "hidden":  # a word while it waits, which is gone in the end
            assert other.getvalue() == "\x1b[2mthinking …\x1b[0m\r\x1b[K"
    assert ESCAPES.sub("", shown["dim"]) == f"{thought}\nYes <think> no\n"
    dimmed = "".join(re.findall(r"\x1b\[2m(.*?)\x1b\[0m", shown["dim"], re.S))
    assert dimmed == thought
    assert shown["plain"] == f"<think>\n{thought}</think>\n\nYes <think> no\n"
    assert shown["hidden"] == "Yes <think> no\n"


@pytest.mark.parametrize("text", ["", "<thi", " \n", "plain", "<think>\nstopped", "<think>a</think>"])
def test_whatever_an_answer_is_nothing_is_lost_and_its_line_ends(monkeypatch, text):
    monkeypatch.setattr(sys, "stdout", screen := Screen())
    monkeypatch.setenv("TERM", "dumb")
    display = chat.Shown(True, False)
    for character in text:
        display.push(character)
    display.finish()
    result = screen.getvalue()
    assert result == "" or result.endswith("\n")
    assert re.sub(r"\s", "", result).startswith(re.sub(r"\s", "", text))


# --- in a terminal -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def first_answer():
    return cuqwen.load("demo", device="cpu").generate(TURNS[0], max_tokens=12, temperature=0)


@pytest.mark.parametrize("width", [40, 200])
def test_conversation_in_a_terminal(width, first_answer):
    with Terminal([*CUQWEN, "chat", "--model", "demo", *GREEDY], width=width) as t:
        t.until("> ")
        t.type(TURNS[0] + "\r")
        t.until("> ", 2)
        t.type("\x1b[A\r")  # the line before
        t.until("> ", 3)
        t.type("\x1b[200~pasted\nlines\x1b[201~\r")
        t.until("> ", 4)
        t.type("/stats\r")
        t.until("last answer: prompt")
        t.until("> ", 5)
        t.type("\x04")  # Ctrl-D
        assert t.end() == 0 and t.settings_are_as_before()
        assert first_answer.strip() in t.text and "3 turns, " in t.text and t.text.endswith("\n")
        assert t.shown.rfind("\x1b[?2004l") > t.shown.rfind("\x1b[?2004h")  # pasting is as before


@pytest.mark.parametrize("width", [40, 200])
def test_a_bar_while_a_long_prompt_is_read_leaves_the_answer_alone(width):
    code = """
import sys
from cuqwen import model
from cuqwen.cli import main
from cuqwen.commands import answers
model.CHUNK["cpu"], answers.PROGRESS_FROM_TOKENS = 8, 50
sys.exit(main(sys.argv[1:]))
"""
    question = "and it came to pass " * 16
    answer = cuqwen.load("demo", device="cpu").generate(question, max_tokens=12, temperature=0)
    with Terminal([sys.executable, "-c", code, "chat", "--model", "demo", *GREEDY], width=width) as t:
        t.until("> ")
        t.type(question + "\r")
        t.until("(cut at")
        t.type("/exit\r")
        assert t.end() == 0
        assert len(re.findall(r"prompt: +\d+%", t.text)) >= 1
        before, _, shown = t.text.rpartition("\n(cut at")[0].rpartition(
            "\r"
        )  # the bar goes by a blank line and a return
        assert shown == answer.rstrip("\n") and before.rpartition("\r")[2].strip() == "", t.shown


@pytest.mark.parametrize("setting", [{"NO_COLOR": "1"}, {"TERM": "dumb"}], ids=["NO_COLOR", "dumb"])
def test_no_colours(setting, thinker):
    with Terminal([*CUQWEN, "chat", "--model", thinker, *GREEDY], **setting) as t:
        t.until("> ")
        t.type("Why?\r")
        t.until("(cut at 12 tokens, still thinking)")
        t.type("/exit\r")
        assert t.end() == 0 and "</think>" in t.text
        assert "\x1b[2m" not in t.shown and ("TERM" not in setting or "\x1b" not in t.shown)


def test_without_readline():
    code = "import sys; sys.modules['readline'] = None; from cuqwen.cli import main; sys.exit(main(sys.argv[1:]))"
    with Terminal([sys.executable, "-c", code, "chat", "--model", "demo", *GREEDY]) as t:
        t.until("> ")
        t.type(TURNS[0] + "\r")
        t.until("> ", 2)
        t.type("\x04")
        assert t.end() == 0


def test_interrupt_at_the_prompt_asks_for_another_one():
    """One that comes too late for an answer must not cost the conversation; what was typed so far is dropped."""
    with Terminal([*CUQWEN, "chat", "--model", "demo", *GREEDY]) as t:
        t.until("> ")
        t.type('"""\rhalf a text')
        t.until("half a text")
        t.interrupt_until("(Ctrl-C again ends, and so does /exit)")
        t.until("> ", 2)
        t.type("/stats\r")
        t.until("0 turns, 0 of 2,048 tokens")
        t.until("> ", 3)
        assert t.process.poll() is None
        assert t.end_by_interrupt() == 130 and t.settings_are_as_before() and "Traceback" not in t.text
        assert t.text.count("again ends") == 2  # /stats was between


def test_interrupt_stops_the_answer_and_a_second_one_the_program(chatty):
    with Terminal([*CUQWEN, "chat", "--model", chatty, "--max-tokens", "1900"]) as t:
        t.until("> ")
        t.type(TURNS[0] + "\r")
        t.until("the", 2)
        t.interrupt()
        t.until("(stopped)")
        t.until("> ", 2)
        t.type("/stats\r")
        t.until("1 turn, ")
        t.until("> ", 3)
        t.type(TURNS[1] + "\r")
        seen = t.text.count("the")
        t.until("the", seen + 2)
        t.interrupt()
        t.until("> ", 4)
        assert t.end_by_interrupt() == 130 and t.settings_are_as_before() and "Traceback" not in t.text


def test_interrupt_while_a_prompt_is_read():
    """The signal comes within the second of many chunks. The conversation goes on as if nothing had been said."""
    code = """
import os, signal, sys
from cuqwen import model
from cuqwen.cli import main
model.CHUNK["cpu"], forward, calls = 4, model.Qwen3.forward, []
def interrupted(*args, **keywords):
    calls.append(1)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGINT)
    return forward(*args, **keywords)
model.Qwen3.forward = interrupted
sys.exit(main(sys.argv[1:]))
"""
    with Terminal([sys.executable, "-c", code, "chat", "--model", "demo", *GREEDY]) as t:
        t.until("> ")
        t.type("and it came to pass " * 4 + "\r")
        t.until("(stopped)")
        t.until("> ", 2)
        t.type(TURNS[0] + "\r")
        t.until("(cut at 12 tokens)")
        t.type("/stats\r")
        t.until("1 turn, ")
        t.type("/exit\r")
        assert t.end() == 0 and t.settings_are_as_before()


@pytest.mark.parametrize("module", ["numpy", "tokenizers"])
def test_interrupt_while_loading(module):
    done = interrupted_at_import(module, "chat", "--model", "demo")
    assert (done.returncode, done.stdout) == (130, b"") and b"Traceback" not in done.stderr


def test_a_pipe_has_the_answers_only(first_answer):
    """And no bar, no prompt, no colour on either stream; an answer is there before the next line is asked for."""
    with subprocess.Popen(
        [*CUQWEN, "chat", "--model", "demo", *GREEDY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=environment(TERM="xterm"),
    ) as process:  # fmt: skip
        process.stdin.write(TURNS[0].encode() + b"\n")
        process.stdin.flush()
        assert process.stdout.readline().decode().strip() == first_answer.strip()
        process.stdin.write("é王\n/exit\nnever\n".encode())
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and err == b"" and len(out.decode().strip()) > 0 and b"\x1b" not in out


def test_what_is_not_utf8_is_told():
    done = subprocess.run(
        [*CUQWEN, "chat", "--model", "demo"], input=b"\xff\n", capture_output=True, env=environment(), timeout=60
    )
    assert (done.returncode, done.stdout) == (1, b"") and b"UTF-8" in done.stderr and b"Traceback" not in done.stderr


def test_help_in_the_chat_names_every_command(demo):
    given = argparse.Namespace(system=None, no_think=False, hide_thinking=False)
    commands = chat.Chat(demo, {}, given).commands
    assert set(re.findall(r"^/(\w+)", chat.HELP, re.M)) == {*commands, "exit"} - {"help"}


def test_save_overwrites_conversations_only_and_as_a_whole(demo, tmp_path, monkeypatch):
    given = argparse.Namespace(
        system=None, no_think=False, hide_thinking=False, quiet=True, model="demo", max_tokens=2, stats=False,
        thinking_budget=None,
    )  # fmt: skip
    talk = chat.Chat(demo, {"temperature": 0.0}, given)
    other, kept = tmp_path / "notes.txt", tmp_path / "kept.json"
    other.write_text("precious")
    with pytest.raises(ValueError, match="is there and no conversation"):
        talk._command("save", str(other))
    assert other.read_text() == "precious"
    talk._command("save", str(kept))
    talk.conversation.reset([{"role": "user", "content": "half a pair: \ud800"}])
    with pytest.raises(ValueError):
        talk._command("save", str(kept))
    assert json.loads(kept.read_text())["messages"] == [] and list(tmp_path.glob("*.part")) == []


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": None}], [{"role": "user", "content": ["a"]}], [{"content": "x"}], ["x"], 3, {"a": 1},
        [{"role": "tool", "content": "x"}], [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}],
        [{"role": "user", "content": "\ud800"}],
    ],
)  # fmt: skip
def test_load_refuses_what_is_no_conversation(messages, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(messages))
    with pytest.raises(ValueError):
        chat._read_messages(path)
    path.write_text("[" * 200_000)
    with pytest.raises(ValueError):
        chat._read_messages(path)


def test_a_text_that_looks_like_the_mark_changes_nothing():
    """What the template adds is found behind a mark that no text has."""

    assert len(MARK) > 30 and not MARK.isascii()
