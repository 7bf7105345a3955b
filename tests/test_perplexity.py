"""`cuqwen perplexity`: the same number as transformers' documented computation, and as the definition."""

import json
import math
import re
import subprocess
from functools import partial

import checkpoints
import numpy as np
import pytest
from terminal import CUQWEN, ROOT, environment, in_terminal

import cuqwen
from cuqwen import cli
from cuqwen.commands import perplexity

TEXT = checkpoints.HELD_OUT_TEXT.read_text()[:2500]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def measured(capsys, file, *arguments):
    assert cli.main(["perplexity", "demo", str(file), "--device", "cpu", "--json", *map(str, arguments)]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(("context", "stride"), [(2048, 512), (128, 64), (128, 128), (100, 37), (2, 1), (300, 299)])
def test_definition(demo, capsys, file, context, stride):
    """Each token's probability from the logits of the whole window that it counts in, one window at a time."""
    text = TEXT[:300] if context == 2 else TEXT
    file.write_text(text)
    ids = demo.tokenizer.encode(text)
    total, counted, done = 0.0, 0, 1
    for begin in range(0, len(ids), stride):
        end = min(begin + context, len(ids))
        logits = demo.logits(ids[begin:end]).astype(np.float64)
        log_sums = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1)
        for token in range(max(done, begin + 1), end):
            total += log_sums[token - 1 - begin] - logits[token - 1 - begin, ids[token]]
            counted += 1
        done = end
        if end == len(ids):
            break
    result = measured(capsys, file, "--context", context, "--stride", stride)
    assert (result["tokens"], result["context"], result["stride"]) == (counted, context, stride)
    # a logit's relative error of a few eps times its size, about 20, in each token's log-probability
    assert result["perplexity"] == pytest.approx(math.exp(total / counted), rel=1e-5)


def test_equal_to_transformers_in_float32(capsys, file):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoints.DEMO, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoints.DEMO)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    max_length, stride = 256, 100
    # the loop of transformers' page on perplexity; the loss is a mean over the tokens that count
    total, counted, before = 0.0, 0, 0
    for begin in range(0, ids.size(1), stride):
        end = min(begin + max_length, ids.size(1))
        window = ids[:, begin:end]
        targets = window.clone()
        targets[:, : -(end - before)] = -100
        with torch.no_grad():
            loss = model(window, labels=targets).loss
        number = int((targets[:, 1:] != -100).sum())
        total, counted, before = total + float(loss) * number, counted + number, end
        if end == ids.size(1):
            break
    result = measured(capsys, file, "--context", max_length, "--stride", stride)
    assert result["tokens"] == counted == ids.size(1) - 1
    assert result["perplexity"] == pytest.approx(math.exp(total / counted), rel=1e-5)


def test_windows():
    for length, context, stride in [(1000, 100, 37), (7, 10, 3), (10, 10, 10), (11, 10, 10), (30, 10, 10), (12, 5, 1)]:
        seen = [t for begin, first, end in perplexity.windows(length, context, stride) for t in range(first, end)]
        skipped = set(range(stride, length, stride)) if stride == context else set()
        assert seen == [t for t in range(1, length) if t not in skipped]
        for begin, first, end in perplexity.windows(length, context, stride):
            assert begin < first and end - begin <= context and (end == length or end - begin == context)


def test_default_output_and_standard_input(capsys, file):
    run = partial(subprocess.run, capture_output=True, text=True, env=environment(), timeout=60)
    done = run([*CUQWEN, "perplexity", "demo", "-"], input=TEXT)
    assert done.returncode == 0 and done.stderr.count("\n") == 1 and "2,048" in done.stderr
    assert done.stdout == f"perplexity {measured(capsys, file)['perplexity']:.4f}\n"


def test_bar_in_a_terminal(file):
    command = [*CUQWEN, "perplexity", "demo", str(file), "--context", "128", "--stride", "64"]
    status, shown, _ = in_terminal(command, width=40)
    assert status == 0 and re.search(r"perplexity: +\d+%", shown) and re.search(r"^(.*\r)?perplexity \d", shown, re.M)
    status, shown, _ = in_terminal([*command, "--quiet"])
    assert status == 0 and re.fullmatch(r"perplexity [\d.]+\n", shown)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("demo", "FILE", "--stride", "0"), 2, "--stride"),
        (("demo", "FILE", "--context", "1"), 2, "--context"),
        (("demo", "FILE", "--context", "100", "--stride", "101"), 2, "--stride: wanted at most"),
        (("demo", "FILE", "--context", "5000"), 1, "--context: wanted at most"),
        (("demo", "/nowhere"), 1, "/nowhere: cannot be read"),
        (("demo", str(ROOT)), 1, "cannot be read"),
        (("./nowhere", "FILE"), 1, "nowhere"),
    ],
)
def test_what_can_be_wrong(arguments, status, message, file, capsys):
    arguments = [str(file) if argument == "FILE" else argument for argument in arguments]
    try:
        got = cli.main(["perplexity", *arguments, "--device", "cpu"])
    except SystemExit as stopped:
        got = stopped.code
    out, err = capsys.readouterr()
    assert got == status and message in err and out == ""


def test_text_of_one_token(capsys, file):
    file.write_text("a")
    assert cli.main(["perplexity", "demo", str(file), "--device", "cpu"]) == 1
    assert "at least 2 tokens" in capsys.readouterr().err
    assert cuqwen.load("demo", device="cpu").tokenizer.encode("a")
