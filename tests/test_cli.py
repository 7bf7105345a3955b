"""`cuqwen generate` as a user meets it: a process of its own, its two output streams and its exit status.

The processes see no GPU, so that all machines run the same thing (`test_gpu.py` and its like run the command line there).
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import checkpoints
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from terminal import CUQWEN, ROOT, environment, in_terminal, interrupted_at_import

from cuqwen import __version__, cli, launch
from cuqwen.commands import figures

PROMPT = "In the beginning"
GREEDY = (PROMPT, "--model", "demo", "--temperature", "0", "--max-tokens", "24")
NUMBER = r"\d[\d,.]*"


@dataclass
class Result:
    status: int
    out: str
    err: str
    seconds: float


def run(*command, stdin=b"", env=None, cwd=None):
    """Run a command to its end; standard output must be UTF-8, and a traceback is an error whatever the status."""
    started = time.perf_counter()
    done = subprocess.run(command, input=stdin, capture_output=True, env=env or environment(), cwd=cwd, timeout=120)
    seconds = time.perf_counter() - started
    result = Result(done.returncode, done.stdout.decode("utf-8"), done.stderr.decode("utf-8", "replace"), seconds)
    assert "Traceback" not in result.err and "Exception ignored" not in result.err, result.err
    return result


def generate(*arguments, **kwargs):
    return run(sys.executable, "-m", "cuqwen", "generate", *arguments, **kwargs)


def text_of(*arguments, **kwargs):
    """What a run that must succeed silently prints."""
    result = generate("--quiet", *arguments, **kwargs)
    assert (result.status, result.err) == (0, "")
    return result.out


def failure(*arguments, **kwargs):
    """The one line of a run that must fail with status 1."""
    result = generate(*arguments, **kwargs)
    return failure_line(result)


def failure_line(result):
    assert (result.status, result.out) == (1, ""), result
    assert re.fullmatch(r"cuqwen: error: [^\n]{20,}\n", result.err), result.err
    return result.err


def usage_line(result):
    """The complaint of a run that was called wrongly: what is wrong in one line, where help is in another."""
    assert (result.status, result.out) == (2, ""), result
    found = re.fullmatch(r"(cuqwen(?: \w+)?)(: error: [^\n]{10,})\n\1 --help tells what it takes\n", result.err)
    assert found, result.err
    return found[1] + found[2]


@pytest.fixture(scope="module")
def greedy():
    """What the demo writes after the prompt, as printed."""
    return text_of(*GREEDY)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random checkpoint of a few hundred kB whose tokens are mostly single bytes. Tests must not change it."""
    return checkpoints.write(tmp_path_factory.mktemp("tiny"), checkpoints.SPECS["tied_redundant_head"])


@pytest.fixture
def copy(tiny, tmp_path):
    """A copy of `tiny` to damage."""
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """The demo with an end token that it does not write, so that it goes on to --max-tokens."""
    folder = tmp_path_factory.mktemp("endless")
    for file in checkpoints.DEMO.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").write_text('{"eos_token_id": 4094, "do_sample": false}')
    return folder


def long_run(endless, *arguments):
    """Arguments of a run of several seconds."""
    options = ("--model", str(endless), "--temperature", "0", "--max-tokens", "1900")
    return [sys.executable, "-m", "cuqwen", "generate", PROMPT, *options, *arguments]


# --- text out ------------------------------------------------------------------------------------------------------


def test_text_on_stdout_statistics_on_stderr(greedy, demo):
    result = generate(*GREEDY)
    assert result.status == 0
    expected = demo.generate(PROMPT, max_tokens=24, temperature=0)
    assert result.out == greedy == expected + "\n" * (not expected.endswith("\n"))
    assert len(greedy.split()) > 5
    assert result.err.count("\n") == 1, result.err
    assert re.search(rf"{NUMBER} tok/s", result.err) and re.search(rf"{NUMBER} GB/s", result.err)


@pytest.mark.parametrize("arguments", [("-",), ()])
def test_prompt_from_standard_input(greedy, arguments):
    options = GREEDY[1:]
    assert text_of(*arguments, *options, stdin=PROMPT.encode()) == greedy


def test_the_newline_that_echo_adds_is_not_part_of_the_prompt(greedy):
    assert text_of("-", *GREEDY[1:], stdin=PROMPT.encode() + b"\n") == greedy


def test_prompt_of_more_than_ascii_and_leading_dash(demo):
    for prompt in ("Größe – 王 🜁", "-1"):
        expected = demo.generate(prompt, max_tokens=4, temperature=0)
        options = ("--model", "demo", "--temperature", "0", "--max-tokens", "4")
        assert text_of(*options, "--", prompt).removesuffix("\n") == expected.removesuffix("\n")


def test_json_is_one_object_that_says_the_same(greedy, demo):
    result = generate(*GREEDY, "--json")
    assert result.status == 0 and result.out.count("\n") == 1 and result.out.endswith("\n")
    report = json.loads(result.out, parse_constant=pytest.fail)  # NaN and Infinity are not JSON
    assert report["text"].removesuffix("\n") == greedy.removesuffix("\n")
    assert report["finish_reason"] == "length" and len(report["tokens"]) == 24
    assert all(type(token) is int for token in report["tokens"])
    assert demo.tokenizer.decode(report["tokens"]) == report["text"]
    assert report["timings"] and all(isinstance(x, (int, float)) and x >= 0 for x in report["timings"].values())
    assert sum(x for key, x in report["timings"].items() if key.endswith("seconds")) < result.seconds
    assert generate(*GREEDY, "--json", "--quiet").err == ""


@pytest.mark.parametrize("count", [1, 2])
def test_few_tokens(greedy, count):
    result = generate(*GREEDY[:-1], str(count), "--json")
    report = json.loads(result.out, parse_constant=pytest.fail)
    assert result.status == 0 and len(report["tokens"]) == count and greedy.startswith(report["text"])


def test_closing_line():
    """As the README shows it, for a model on a GPU of 3.35 TB/s."""

    class Network:
        def read_bytes_per_token(self, context):
            assert context == 20 + 128
            return 1_192_099_840

    model = SimpleNamespace(device="cuda", network=Network())
    answer = figures.Answer(model, 20, 20, started=1.0)
    answer.steps = [None] * 256
    answer.times = [1.0042 + i / 2013 for i in range(256)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "peak_bandwidth", lambda: 3.35e12)
        patch.setattr(figures, "memory_bytes", lambda model: 1_610_000_000)
        assert answer.line() == "prompt 20 tok · 4 ms | 256 tok · 2,013 tok/s · 2.40 TB/s · 72 % of this GPU | 1.6 GB"
        patch.setattr(launch, "peak_bandwidth", lambda: 0.0)
        patch.setattr(figures, "memory_bytes", lambda model: 0)
        assert answer.line() == "prompt 20 tok · 4 ms | 256 tok · 2,013 tok/s · 2.40 TB/s"
        answer.steps, answer.times = answer.steps[:1], answer.times[:1]
        assert answer.line() == "prompt 20 tok · 4 ms"


def test_closing_line_on_the_cpu():
    result = generate(*GREEDY)
    line = r"prompt 3 tok · [\d,]+ ms \| 24 tok · [\d,]+ tok/s · \d+\.\d\d [GM]B/s \| \d+\.\d [GM]B\n"
    assert result.status == 0 and re.fullmatch(line, result.err), result.err


def test_stats_are_a_table(greedy):
    result = generate(*GREEDY, "--stats")
    assert (result.status, result.out) == (0, greedy)
    rows = dict(re.findall(r"^(\w+) +(.+)$", result.err, re.M))
    assert [*rows] == ["load", "prompt", "answer", "each", "reads", "memory"]
    assert rows["prompt"].startswith("3 tokens, ") and rows["answer"].startswith("24 tokens, ")


def test_prompt_file(greedy, tmp_path):
    file = tmp_path / "a prompt.txt"
    file.write_bytes(PROMPT.encode() + b"\r\n")
    assert text_of("--prompt-file", str(file), *GREEDY[1:]) == greedy
    assert "cannot be read" in failure("--prompt-file", str(tmp_path / "none"), *GREEDY[1:])
    file.write_bytes(b"\xff")
    assert "UTF-8" in failure("--prompt-file", str(file), *GREEDY[1:])


def test_several_answers(capsys):
    """In this process, since they are many runs."""

    def text(*arguments):
        hot = ("--model", "demo", "--temperature", "1.5", "--max-tokens", "8", "--device", "cpu", "--quiet", "--seed")
        assert cli.main(["generate", PROMPT, *hot, *arguments]) == 0
        return capsys.readouterr().out

    three = [text(str(seed)) for seed in (7, 8, 9)]
    assert text("7", "--n", "3") == "---\n".join(three)
    report = json.loads(text("7", "--n", "3", "--json"))
    assert [answer["text"].removesuffix("\n") + "\n" for answer in report["answers"]] == three
    assert report["text"] == report["answers"][0]["text"]
    assert text(str(2**64 - 1), "--n", "2").endswith("---\n" + text("0"))


def test_several_answers_read_the_prompt_once(capsys):
    arguments = ("generate", *GREEDY, "--device", "cpu", "--n", "3")
    assert cli.main([*arguments]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" · ")[0] for line in lines] == ["prompt 3 tok", "prompt cached", "prompt cached"]
    assert cli.main([*arguments, "--stats"]) == 0
    assert re.findall(r"^prompt +(.*?),", capsys.readouterr().err, re.M) == ["3 tokens", "cached", "cached"]
    assert cli.main([*arguments, "--json", "--quiet"]) == 0
    assert [answer["prompt_tokens"] for answer in json.loads(capsys.readouterr().out)["answers"]] == [3, 3, 3]


def test_logprobs(demo, capsys):
    assert cli.main(["generate", *GREEDY, "--json", "--quiet", "--device", "cpu", "--logprobs", "3"]) == 0
    report = json.loads(capsys.readouterr().out)
    ids = demo.tokenizer.encode(PROMPT)
    logits = demo.logits(ids + report["tokens"])[len(ids) - 1 : -1].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert len(report["logprobs"]) == 24
    for row, token, said in zip(expected, report["tokens"], report["logprobs"], strict=True):
        assert (said["token"], said["text"]) == (token, demo.tokenizer.decode([token]))
        assert said["logprob"] == pytest.approx(row[token], abs=1e-4)  # of logits up to 20 in float32
        assert [top["token"] for top in said["top"]] == np.argsort(-row)[:3].tolist() and said["top"][0][
            "token"
        ] == token


def test_raw_continues_as_it_stands(greedy):
    assert text_of(*GREEDY, "--raw") == greedy  # the demo has no chat template


def test_stop_ends_the_text_before_it(greedy):
    at = greedy.index(" ", len(greedy) // 2)
    stop = greedy[at - 2 : at + 2]  # ends one word and begins another, so it spans tokens
    expected = greedy[: greedy.index(stop)]
    assert text_of(*GREEDY, "--stop", stop).removesuffix("\n") == expected.removesuffix("\n")
    report = json.loads(generate(*GREEDY, "--json", "--stop", "\x01 never", "--stop", stop).out)
    assert (report["text"], report["finish_reason"]) == (expected, "stop")


def test_end_token_is_told_as_stop(greedy, tmp_path):
    tokens = json.loads(generate(*GREEDY, "--json").out)["tokens"]
    end = next(i for i, token in enumerate(tokens) if i >= 3 and token not in tokens[:i])
    folder = shutil.copytree(checkpoints.DEMO, tmp_path / "demo")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [4095, tokens[end]]}))
    report = json.loads(generate(PROMPT, "--model", str(folder), "--temperature", "0", "--json").out)
    assert (report["finish_reason"], report["tokens"]) == ("stop", tokens[: end + 1])
    assert greedy.startswith(report["text"]) and len(report["text"]) < len(greedy)


def test_text_is_printed_as_it_comes(endless):
    process = subprocess.Popen(
        long_run(endless, "--max-tokens", "200"), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=environment(),
    )  # fmt: skip
    first = os.read(process.stdout.fileno(), 1 << 16)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and 0 < len(first) < 50 < 300 < len(rest)


# --- sampling ------------------------------------------------------------------------------------------------------


def test_seed_reproduces_and_matters():
    hot = (PROMPT, "--model", "demo", "--temperature", "1.5", "--max-tokens", "24", "--seed")
    first = text_of(*hot, "7")
    assert text_of(*hot, "7") == first
    assert text_of(*hot, "8") != first


@pytest.mark.parametrize("option", [("--top-k", "1"), ("--top-p", "1e-9"), ("--min-p", "1")])
def test_each_filter_reaches_the_sampler(greedy, option):
    hot = (PROMPT, "--model", "demo", "--temperature", "5", "--max-tokens", "24", "--seed", "1")
    assert text_of(*hot, *option) == greedy  # the filter leaves only the most likely token


def test_sampling_defaults_are_the_checkpoints(copy):
    (copy / "generation_config.json").write_text('{"do_sample": true, "temperature": 9.0, "eos_token_id": 516}')
    options = ("a", "--model", str(copy), "--max-tokens", "16", "--json", "--seed")
    drawn = [json.loads(generate(*options, seed).out)["tokens"] for seed in ("1", "2")]
    assert drawn[0] != drawn[1]
    greedy = [json.loads(generate(*options, seed, "--temperature", "0").out)["tokens"] for seed in ("1", "2")]
    assert greedy[0] == greedy[1]


IMPOSSIBLE = [
    ("--temperature", "-0.1"), ("--temperature", "nan"), ("--temperature", "inf"), ("--temperature", "warm"),
    ("--top-k", "-1"), ("--top-k", "1.5"), ("--top-p", "0"), ("--top-p", "1.01"), ("--top-p", "nan"),
    ("--min-p", "-0.1"), ("--min-p", "1.1"), ("--min-p", "nan"), ("--seed", "-1"), ("--seed", "x"),
    ("--max-tokens", "0"), ("--max-tokens", "-3"), ("--max-tokens", "many"), ("--stop", ""), ("--device", "tpu"),
]  # fmt: skip


@pytest.mark.parametrize("option", IMPOSSIBLE, ids="=".join)
def test_impossible_values_are_wrong_usage(option, capsys):
    """In this process, since they are many; before anything is loaded, hence the model that does not exist."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(["generate", "x", "--model", "./nowhere", "=".join(option)])
    out, err = capsys.readouterr()
    line = usage_line(Result(stopped.value.code, out, err, 0))
    name = option[0].removeprefix("--")
    assert name in line or name.replace("-", "_") in line


WRONG_USAGE = [
    (),
    ("--no-such-option",),
    ("generate",),
    ("generate", "x"),
    ("generate", "x", "--model"),
    ("generate", "x", "y", "--model", "demo"),
    ("generate", "x", "--model", "demo", "--no-such-option"),
    ("invent", "x"),
    ("chat",),
    ("chat", "--model", "demo", "--max-tokens", "0"),
    ("info",),
    ("perplexity", "demo"),
    ("perplexity", "demo", "x", "--stride", "0"),
    ("doctor", "--device", "tpu"),
    ("bench",),
    ("generate", "x", "--model", "demo", "--prompt-file", "y"),
    ("generate", "x", "--model", "demo", "--stats", "--quiet"),
    ("generate", "x", "--model", "demo", "--n", "0"),
    ("generate", "x", "--model", "demo", "--logprobs", "2"),
    ("generate", "x", "--model", "demo", "--json", "--logprobs", "0"),
    ("generate", "x", "--model", "demo", "--raw", "--thinking-budget", "5"),
    ("generate", "x", "--model", "demo", "--no-think", "--thinking-budget", "5"),
    ("generate", "x", "--model", "demo", "--max-tokens", "0"),
    ("generate", "x", "--model", "demo", "--temperature=-1"),
    ("generate", "x", "--model", "demo", "--raw", "--system", "Be brief."),
]


def imported_modules(*arguments):
    """(the result, all modules that a run of the command line imports)."""
    result = run(sys.executable, "-X", "importtime", "-m", "cuqwen", *arguments)
    lines = result.err.splitlines(keepends=True)
    timings = [line for line in lines if line.startswith("import time:")]
    result.err = "".join(line for line in lines if not line.startswith("import time:"))
    return result, {line.split("|")[-1].strip() for line in timings}


HEAVY = {"numpy", "cupy", "tokenizers", "safetensors", "huggingface_hub", "jinja2", "tqdm", "ml_dtypes"}


@pytest.mark.parametrize("arguments", WRONG_USAGE, ids=lambda arguments: " ".join(arguments) or "nothing")
def test_wrong_usage_is_told_at_once(arguments):
    result, modules = imported_modules(*arguments)
    usage_line(result)
    assert "cuqwen.cli" in modules and not modules & HEAVY


def test_without_a_command_they_are_named():
    told = f"cuqwen: error: wanted a command: {', '.join(cli.COMMANDS)}"
    assert usage_line(run(*CUQWEN)) == told and usage_line(run(*CUQWEN, "invent", "x")) == f"{told}; got 'invent'"


def test_quotes_are_advised_where_there_is_a_text():
    assert usage_line(run(*CUQWEN, "generate", "x", "y", "--model", "demo")).endswith(
        ": y; put a text of several words in quotes"
    )
    assert usage_line(run(*CUQWEN, "info", "demo", "y")).endswith(": y")


def test_help_and_version_are_told_at_once():
    for arguments in (("--help",), *((name, "--help") for name in cli.COMMANDS), ("--version",)):
        result, modules = imported_modules(*arguments)
        assert (result.status, result.err) == (0, "") and not modules & HEAVY
    assert result.out == f"cuqwen {__version__}\n"


def test_help_names_every_option():
    text = run(sys.executable, "-m", "cuqwen", "generate", "--help").out
    for option in (
        "model", "max-tokens", "temperature", "top-k", "top-p", "min-p", "seed", "stop", "system", "raw", "no-think",
        "device", "json", "quiet", "revision", "check-weights", "prompt-file", "n", "stats", "thinking-budget", "exact", "logprobs",
    ):  # fmt: skip
        assert f"--{option} " in text.replace("\n", " ").replace(",", " "), option


@pytest.mark.parametrize("width", [40, 200])
@pytest.mark.parametrize("command", ["", *cli.COMMANDS])
def test_help_in_narrow_and_wide_terminals(command, width):
    status, shown, _ = in_terminal([*CUQWEN, *filter(None, [command]), "--help"], width=width)
    assert status == 0 and shown.startswith("usage: cuqwen")
    usage, _, rest = shown.partition("\n\n")
    room = max(width, 80) if command == "bench" else width  # which keeps its own lines
    assert max(map(len, rest.splitlines())) <= room
    assert all(len(line) <= width or len(line.strip().split(" [")) == 1 for line in usage.splitlines()), usage
    flat = " ".join(shown.split())
    assert "Qwen3 on one" in flat if not command else all(f"{option} " in flat for option in ("--help", "--device")), (
        flat
    )


# --- what the user can get wrong -----------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere/at/all", "nobody/nothing", "", "a b", "https://x.y/z", "\n"])
def test_unknown_model(model):
    line = failure(PROMPT, "--model", model)
    assert model.strip() in line


def test_model_that_is_no_checkpoint(tmp_path):
    assert "config.json" in failure(PROMPT, "--model", str(tmp_path))
    assert "setup.cfg" in failure(PROMPT, "--model", str(ROOT / "setup.cfg"))


@pytest.mark.parametrize(("arguments", "stdin"), [(("",), b""), (("-",), b""), ((), b"\n")], ids=["text", "-", "stdin"])
def test_empty_prompt(arguments, stdin):
    assert "prompt" in failure(*arguments, "--model", "demo", stdin=stdin).lower()


def test_prompt_longer_than_the_context():
    line = failure("-", "--model", "demo", stdin=b"and " * 3000)
    assert "2048" in line and "prompt" in line


def test_prompt_and_max_tokens_longer_than_the_context():
    assert "2048" in failure(PROMPT, "--model", "demo", "--max-tokens", "2048")
    line = failure(PROMPT, "--model", "demo", "--max-context", "20", "--max-tokens", "20")
    assert "prompt of 3 tok and --max-tokens 20: wanted at most 20 together" in line and "up to 17" in line
    assert "shorten the prompt" in failure(PROMPT, "--model", "demo", "--max-context", "2", "--max-tokens", "1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--max-context", "4096"), "--max-context: wanted 1..2048, the model's"),
        (("--json", "--logprobs", "4097"), "--logprobs: wanted 1..4096, the tokens that there are, got 4097"),
    ],
)
def test_what_only_the_model_knows_is_told_in_the_flags_words(options, message):
    line = failure(PROMPT, "--model", "demo", *options)
    assert line.startswith(f"cuqwen: error: {message}") and not re.search("load:|stream:|max_context", line)


def test_a_model_that_does_not_fit_is_told_in_the_flags_words(monkeypatch, capsys):
    monkeypatch.setattr("cuqwen.memory.free_bytes", lambda _: 64_000_000)
    assert cli.main(["generate", "x", "--model", "demo", "--device", "cpu", "--max-context", "2048"]) == 1
    error = capsys.readouterr().err
    assert re.search(r"error: \S+demo: wanted 0\.0\d GB .*; use --max-context \d+\n", error) and "max_" not in error


@pytest.mark.parametrize("bad", [b"\xff", b"In the \xc3", b"\xed\xa0\x80", "Größe".encode("latin-1")])
def test_invalid_utf8_on_stdin(bad):
    line = failure("-", "--model", "demo", stdin=bad)
    assert "UTF-8" in line and "input" in line


def test_invalid_utf8_in_an_argument():
    assert "prompt" in failure(b"In the \xff", "--model", "demo")
    failure(PROMPT, "--model", b"\xff\xfe")


def test_cuda_without_a_gpu():
    assert "cpu" in failure(PROMPT, "--model", "demo", "--device", "cuda")


def test_without_cupy(greedy):
    """As on a machine where no GPU extra is installed: the CPU by itself, and a remedy where the GPU is asked for."""
    code = "import sys; sys.modules['cupy'] = None; from cuqwen.cli import main; sys.exit(main(sys.argv[1:]))"
    result = run(sys.executable, "-c", code, "generate", *GREEDY, "--quiet")
    assert (result.status, result.out, result.err) == (0, greedy, "")
    line = failure_line(run(sys.executable, "-c", code, "generate", *GREEDY, "--device", "cuda"))
    assert "cuqwen[cuda" in line and "cpu" in line


def _truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    return "model.safetensors"


def _empty(folder):
    (folder / "model.safetensors").write_bytes(b"")
    return "model.safetensors"


def _noise(folder):
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    return "model.safetensors"


def _no_weights(folder):
    (folder / "model.safetensors").unlink()
    return "model.safetensors"


def _broken_config(folder):
    (folder / "config.json").write_text('{"model_type": "qwen3",')
    return "config.json"


def _other_shape(folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 101}))
    return "gate_proj"


def _broken_generation_config(folder):
    (folder / "generation_config.json").write_text("[]")
    return "generation_config.json"


def _broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")
    return "tokenizer.json"


def _tokenizer_of_another_model(folder):
    checkpoints.write_tokenizer(folder, 600)
    return "tokenizer.json"


def _broken_template(folder):
    (folder / "chat_template.jinja").write_text("{% if %}")
    return "chat_template.jinja"


def _template_that_refuses(folder):
    (folder / "chat_template.jinja").write_text("{{ raise_exception('only in verse') }}")
    return "only in verse"


def _template_that_fails(folder):
    (folder / "chat_template.jinja").write_text("{{ messages[5].content + 1 }}")
    return "chat_template.jinja"


DAMAGES = [
    _truncate, _empty, _noise, _no_weights, _broken_config, _other_shape, _broken_generation_config, _broken_tokenizer,
    _tokenizer_of_another_model, _broken_template, _template_that_refuses, _template_that_fails,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__.strip("_"))
def test_damaged_checkpoint(damage, copy):
    culprit = damage(copy)
    assert culprit in failure("a", "--model", str(copy), "--max-tokens", "2")


def test_nan_is_found_by_check_weights_only(tmp_path):
    folder = checkpoints.write(tmp_path / "untied", checkpoints.SPECS["eight_per_kv_head"])
    options = ("a", "--model", str(folder), "--temperature", "0", "--max-tokens", "1", "--json")
    sound = json.loads(generate(*options, "--check-weights").out)["tokens"]
    arrays = load_file(folder / "model.safetensors")
    row = next(i for i in range(300) if i not in (*sound, ord("a")))
    arrays["model.embed_tokens.weight"][row, 3] = np.nan  # of a token that does not occur here
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    assert json.loads(generate(*options).out)["tokens"] == sound
    line = failure(*options, "--check-weights")
    assert "embed_tokens" in line and "NaN" in line and f"{row}, 3" in line


# --- chat template -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", [("--system", "Be brief."), ("--no-think",), ("--thinking-budget", "9")])
def test_chat_options_need_a_template(option):
    assert "template" in failure(PROMPT, "--model", "demo", *option)


def test_chat_template_of_the_checkpoint(copy):
    (copy / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role[0] }}({{ m.content }}){% endfor %}"
        "{% if add_generation_prompt %}>{% endif %}{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}"
    )
    common = ("--model", str(copy), "--temperature", "0", "--max-tokens", "12")
    raw = {}
    for arguments, prompt in {
        ("é",): "u(é)>",
        ("é", "--system", "be"): "s(be)u(é)>",
        ("é", "--no-think"): "u(é)>False",
        ("é", "--raw"): "é",
    }.items():
        raw[prompt] = text_of(prompt, "--raw", *common)
        assert text_of(*arguments, *common) == raw[prompt]
    assert len(set(raw.values())) == len(raw)  # the prompt matters, else this would show nothing


@pytest.mark.skipif(not checkpoints.REAL_TOKENIZER.is_dir(), reason="Qwen3's tokenizer is not at hand (../shared/data)")
def test_chat_with_qwen3s_own_tokenizer_and_template(tmp_path):
    spec = checkpoints.Spec("chat", 2, 1, 16, 16, 32, 151936)
    folder = checkpoints.write(tmp_path / "chat", spec)
    for file in checkpoints.REAL_TOKENIZER.iterdir():
        shutil.copyfile(file, folder / file.name)
    common = ("--model", str(folder), "--temperature", "0", "--max-tokens", "12", "--json", "--quiet")
    answer = json.loads(generate("Hi", "--system", "Be brief.", "--no-think", *common).out)
    turns = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    same = json.loads(generate(turns + "<think>\n\n</think>\n\n", "--raw", *common).out)
    other = json.loads(generate(turns, "--raw", *common).out)
    assert answer["tokens"] == same["tokens"] != other["tokens"]
    assert max(answer["tokens"] + other["tokens"]) < 151669  # rows beyond the tokenizer's ids are padding


# --- locale, streams, signals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "locale",
    [
        {"LC_ALL": "C"},
        {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"LC_ALL": "C", "PYTHONIOENCODING": "latin-1"},
    ],
    ids=["C", "no UTF-8 mode", "latin-1"],
)
def test_output_is_utf8_in_any_locale(tiny, locale):
    options = ("-", "--model", str(tiny), "--temperature", "0", "--max-tokens", "40")
    expected = text_of(*options, stdin="é王".encode())
    assert not expected.isascii()  # single bytes, so there are broken characters, shown as U+FFFD
    assert text_of(*options, stdin="é王".encode(), env=environment(**locale)) == expected
    report = json.loads(text_of(*options, "--json", stdin="é王".encode(), env=environment(**locale)))
    assert report["text"].removesuffix("\n") == expected.removesuffix("\n")


def test_folder_whose_name_is_not_utf8(tiny, tmp_path):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    try:
        shutil.copytree(os.fsencode(tiny), folder)
    except OSError as error:
        pytest.skip(f"this file system takes no such name: {error}")
    common = ("--temperature", "0", "--max-tokens", "5", "--quiet")
    result = generate("a", "--model", folder, *common, "--json")
    if result.status:  # the tokenizers library opens no such file
        failure_line(result)
        return
    assert (
        json.loads(result.out)["tokens"]
        == json.loads(generate("a", "--model", str(tiny), *common, "--json").out)["tokens"]
    )


@pytest.mark.parametrize("reader", ["head -c 20", "head -1", "true"])
def test_stdout_closed_early(endless, reader):
    command = '"$@" | ' + reader + '; exit "${PIPESTATUS[0]}"'
    # head -1 goes on until there is a newline, and there may be none
    result = run("bash", "-c", command, "bash", *long_run(endless, *["--max-tokens", "60"] * (reader == "head -1")))
    assert result.seconds < 10 or reader == "head -1", "it went on although nobody was reading"
    assert result.status in (0, 128 + signal.SIGPIPE)  # not a failure
    assert result.err.count("\n") <= 1 and "rror" not in result.err, result.err
    assert len(result.out.splitlines()) <= 1


def test_stdout_closed_early_with_json(endless):
    result = run(
        "bash", "-c", '"$@" | true; exit "${PIPESTATUS[0]}"', "bash", *long_run(endless, "--max-tokens", "9", "--json")
    )
    assert result.status in (0, 128 + signal.SIGPIPE) and result.err.count("\n") <= 1


@pytest.mark.parametrize("extra", [(), ("--json",)])
def test_full_disk(extra):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    result = run("bash", "-c", '"$@" > /dev/full', "bash", sys.executable, "-m", "cuqwen", "generate", *GREEDY, *extra)
    failure_line(result)


@pytest.mark.parametrize(("closing", "prompt"), [("<&-", PROMPT), ("2>&-", PROMPT), (">&-", PROMPT), ("<&-", "-")])
def test_stream_that_was_never_open(greedy, closing, prompt):
    """As under some schedulers and daemons. Text must not land where it does not belong, and nothing may crash."""
    command = [sys.executable, "-m", "cuqwen", "generate", prompt, *GREEDY[1:]]
    result = run("bash", "-c", f'"$@" {closing}', "bash", *command)
    if prompt == "-":
        failure_line(result)
    elif closing == ">&-":
        assert result.out == "" and result.status in (0, 1)
    else:
        assert (result.status, result.out) == (0, greedy)


def test_interrupt_while_generating(endless, greedy):
    process = subprocess.Popen(
        long_run(endless), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    )
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert b"Traceback" not in err and err.count(b"\n") <= 2
    text = (first + rest).decode("utf-8").removesuffix("\n")
    assert text.startswith(greedy.rstrip("\n")) or greedy.startswith(text)


def test_interrupt_while_reading_standard_input():
    process = subprocess.Popen(
        [sys.executable, "-m", "cuqwen", "generate", "-", "--model", "demo"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(),
    )  # fmt: skip
    process.stdin.write(b"x" * 300_000)  # more than a pipe holds: when it is written, the other side is reading
    process.stdin.flush()
    time.sleep(0.3)  # a signal between two reads is noticed with the next byte only, which is Python's own doing
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert b"Traceback" not in process.stderr.read() and process.stdout.read() == b""
    for stream in (process.stdout, process.stderr, process.stdin):
        stream.close()


@pytest.mark.parametrize("module", ["numpy", "safetensors", "tokenizers"])
def test_interrupt_while_loading(module):
    """The signal comes at the import of a module that is needed for loading: always at the same place."""
    done = interrupted_at_import(module, "generate", "x", "--model", "demo")
    assert (done.returncode, done.stdout) == (130, b"") and done.stderr.count(b"\n") <= 2


@pytest.mark.parametrize("command", [("bench", "--random", "0.6B"), ("perplexity", "demo", __file__), ("info", "demo")])
def test_interrupt_while_numpy_is_imported(command):
    """Also where another extension imports it, and would turn the interrupt into an ImportError."""
    done = interrupted_at_import("numpy", *command)
    assert done.returncode == 130 and done.stderr == b"\ncuqwen: interrupted\n"


def test_interrupt_in_a_terminal_leaves_it_clean(endless, greedy):
    start = greedy[: len(greedy) // 2]
    status, shown, same_settings = in_terminal(long_run(endless), "\x03", after=start.split("\n")[0])
    assert status == 130 and same_settings
    assert "Traceback" not in shown and shown.endswith("\n")  # the shell's prompt starts on a new line
    assert "\x1b[?25l" not in shown or shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")  # the cursor is there


def test_text_in_a_terminal(greedy):
    status, shown, _ = in_terminal([sys.executable, "-m", "cuqwen", "generate", *GREEDY])
    assert status == 0 and shown.startswith(greedy.rstrip("\n")) and "tok/s" in shown.splitlines()[-1]


def test_no_prompt_in_a_terminal_does_not_wait():
    status, shown, _ = in_terminal([sys.executable, "-m", "cuqwen", "generate", "--model", "demo"])
    assert status == 2 and "PROMPT" in shown.splitlines()[0] and shown.count("\n") == 2


def test_prompt_typed_in_a_terminal(greedy):
    command = [sys.executable, "-m", "cuqwen", "generate", "-", *GREEDY[1:]]
    status, shown, _ = in_terminal(command, PROMPT + "\n\x04")
    assert status == 0 and greedy.rstrip("\n") in shown


def test_progress_bar_for_a_person_only(greedy):
    """A bar in a terminal for large files (here: all), none with --quiet and none in a pipe."""
    code = "import sys; from cuqwen import cli; from cuqwen.commands import loading; loading.PROGRESS_FROM_BYTES = 1; sys.exit(cli.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "generate", *GREEDY]
    status, shown, _ = in_terminal(command)
    assert status == 0 and re.search(r"load.*\d+%", shown)
    status, shown, _ = in_terminal([*command, "--quiet"])
    assert (status, shown) == (0, greedy)
    piped = run(*command)
    assert piped.out == greedy and piped.err.count("\n") == 1 and "%|" not in piped.err


def test_answers_within_three_seconds():
    """As anyone runs it: default length, default threads. The best of a few runs."""
    load, processors = os.getloadavg()[0], len(os.sched_getaffinity(0))
    env = environment()
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        del env[name]
    seconds = []
    while len(seconds) < 4 and min(seconds, default=9) >= 3:
        result = generate(PROMPT, "--model", "demo", env=env)
        assert result.status == 0
        seconds.append(result.seconds)
    if min(seconds) >= 3 and load > 0.75 * processors:  # this test suite alone makes a load of about 1
        pytest.skip(f"{min(seconds):.1f} s, but others use this machine (load {load:.1f} on {processors} processors)")
    assert min(seconds) < 3


def test_page_of_the_commands_is_up_to_date():
    sys.path.insert(0, str(ROOT))
    from tools import commands_page

    text = commands_page.PAGE.read_text(encoding="utf-8")
    assert commands_page.render(text) == text, "run python -m tools.commands_page"
    assert re.findall(r"<!-- options of (\w+) -->", text) == list(cli.COMMANDS)


def test_a_fallback_is_told_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr("cuqwen.api.Model.fallback", property(lambda model: "it takes another GPU"))
    arguments = ["generate", "In the", "--model", "demo", "--device", "cpu", "--max-tokens", "1"]
    assert cli.main(arguments) == 0
    line = "cuqwen: each token takes many small kernels instead of one launch: it takes another GPU\n"
    assert line in capsys.readouterr().err
    assert cli.main([*arguments, "--quiet"]) == 0 and capsys.readouterr().err == ""
