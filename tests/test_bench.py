"""`cuqwen bench`, and what it is made of, without a GPU."""

import csv
import dataclasses
import importlib.util
import io
import json
import os
import re

import ml_dtypes
import numpy as np
import pytest

from cuqwen import bandwidth, bench, cli, launch, sizes
from cuqwen.bench import Case, Figures, measure, plan
from cuqwen.model import Device

SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "vocab_size": 320,
}  # fmt: skip
DEMO = ("bench", "--model", "demo", "--device", "cpu", "-r", "2")


@pytest.fixture(scope="module")
def network():
    config = dataclasses.replace(sizes.config_of("0.6B"), **SMALL)
    return sizes.random_network(config, Device.cpu(), np.float32)


@pytest.fixture
def run(capsys, monkeypatch):
    monkeypatch.setattr(bandwidth, "read_bandwidth", lambda device: 2e9 if device == "cpu" else None)

    def call(*arguments):
        status = cli.main([*DEMO, *arguments])
        return status, *capsys.readouterr()

    return call


def test_rows_are_those_asked_for_and_formats_agree(run):
    asked = ("-p", "3,0", "-n", "4", "-d", "0,5", "--sample")
    status, text, errors = run(*asked, "-o", "json")
    rows = json.loads(text)
    assert status == 0 and errors == ""
    names = ["pp3", "tg4", "tg4 sampled", "pp3 @ d5", "tg4 @ d5", "tg4 sampled @ d5"]
    assert [row["test"] for row in rows] == names
    for row in rows:
        assert (row["model"], row["device"], row["engine"], row["repetitions"]) == ("demo", "cpu", "numpy", 2)
        assert row["tokens_per_second"] > 0 and row["deviation"] >= 0 and row["read_gb_per_second"] == 2
        assert row["percent_of_read"] == pytest.approx(50 * row["gb_per_second"], abs=0.06)
        assert (row["n_prompt"], row["n_gen"]) == ((3, 0) if row["test"].startswith("pp") else (0, 4))
        assert row["depth"] == (5 if "@ d5" in row["test"] else 0)
        assert row["choice"] == ("" if row["n_prompt"] else "sampled" if "sampled" in row["test"] else "greedy")
    parsed = list(csv.DictReader(io.StringIO(run(*asked, "-o", "csv")[1])))
    assert [list(row) for row in parsed] == [list(row) for row in rows]
    assert [row["test"] for row in parsed] == names and all(float(row["gb_per_second"]) > 0 for row in parsed)
    table = run(*asked)[1].splitlines()
    assert [re.split(r" *\| *", line)[4] for line in table[2:8]] == names
    assert len({len(line) for line in table[:8]}) == 1 and table[-1] == "read: 2.0 GB/s"
    assert all(re.search(r"\| +[\d,.]+ ± [\d,.]+ \| +[\d.]+ \| +[\d.]+ \|$", line) for line in table[2:8])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-p", "x"), "-p/--n-prompt: wanted integers with commas between them, got 'x'"),
        (("-n", "4,-1"), "-n/--n-gen: wanted integers from 0, got -1"),
        (("-d", ""), "-d/--n-depth: wanted integers"),
        (("-p", "0", "-n", "0"), "wanted at least one size above 0"),
        (("-r", "0"), "--repetitions: wanted at least 1, got 0"),
        (("-o", "xml"), "-o/--output: invalid choice"),
        (("--random", "0.6B"), "--random: not allowed with argument --model"),
    ],
    ids=str,
)
def test_wrong_usage(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        cli.main([*DEMO, *arguments])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("option", [("--revision", "main"), ("--check-weights",)])
def test_random_weights_have_no_checkpoint(capsys, option):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", "--random", "0.6B", *option])
    assert stopped.value.code == 2 and f"{option[0]}" in capsys.readouterr().err


def test_one_repetition_has_no_deviation(run):
    line = run("-p", "0", "-n", "2", "-r", "1")[1].splitlines()[2]
    assert re.search(r"\| tg2  \| +[\d,.]+ \|", line) and "±" not in line


def test_a_context_too_long_is_refused_before_anything_is_measured(run, monkeypatch):
    monkeypatch.setattr(bench, "measure", None)
    status, text, errors = run("-d", "1000000")
    assert (status, text) == (1, "") and re.search(
        r"wanted at most the context of \d+ tokens, got 1000512; use less", errors
    )


def test_compare_without_transformers_says_how_to_get_it(run, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "transformers" else found(name, *rest)
    )
    status, text, errors = run("-p", "2", "-n", "0", "--compare", "-o", "json")
    assert status == 0 and len(json.loads(text)) == 1 and "pip install torch transformers" in errors


def test_compare_with_transformers(run):
    pytest.importorskip("transformers")
    rows = json.loads(run("-p", "3", "-n", "3", "-d", "0,4", "--sample", "--compare", "-o", "json")[1])
    ours, theirs = rows[:6], rows[6:]
    assert [row["test"] for row in ours] == [row["test"] for row in theirs]
    assert {row["engine"] for row in theirs} == {"transformers eager"} and all(
        r["tokens_per_second"] > 0 for r in theirs
    )


class Cache:
    """Notes where the tokens of each call go."""

    def __init__(self, network, monkeypatch):
        self.calls = []
        forward = network.forward

        def noted(ids, cache, **named):
            self.calls.append((cache.length, len(ids)))
            return forward(ids, cache, **named)

        monkeypatch.setattr(network, "forward", noted)


def test_prompts_come_after_the_depth_each_time(network, monkeypatch):
    cache = Cache(network, monkeypatch)
    figures = measure(network, 300, Case(7, 0, 11, ""), 3)
    assert cache.calls == [(0, 11)] + 5 * [(11, 7)] and len(figures.rates) == 3
    assert figures.engine == "numpy" and figures.bytes_per_token == network.read_bytes_per_token(18) / 7


@pytest.mark.parametrize("choice", ["greedy", "sampled"])
def test_tokens_come_after_the_depth_each_time(network, monkeypatch, choice):
    cache = Cache(network, monkeypatch)
    monkeypatch.setattr(bench, "WARM_UP", 2)
    figures = measure(network, 300, Case(0, 5, 11, choice), 2)
    assert cache.calls == [(0, 11), (11, 1), (11, 1), (12, 1)] + 2 * [(11 + i, 1) for i in range(5)]
    assert figures.bytes_per_token == network.read_bytes_per_token(13)


def test_a_prompt_in_chunks_reads_the_weights_once_for_each(network, monkeypatch):
    monkeypatch.setattr(network, "chunk", 4)
    expected = sum(network.read_bytes_per_token(3 + end) for end in (4, 8, 10)) / 10
    assert bench.bytes_per_token(network, Case(10, 0, 3, "")) == expected


def test_mean_and_deviation():
    figures = Figures(Case(0, 1, 0), "numpy", (1.0, 2.0, 6.0), 10.0)
    assert figures.mean == 3 and figures.deviation == pytest.approx(7**0.5) and figures.bytes_per_second == 30
    assert dataclasses.replace(figures, rates=(2.0,)).deviation == 0


def test_plan_leaves_zeros_out():
    assert plan([0, 2], [3, 0], [1, 0], sampled=False) == [
        Case(2, 0, 1, ""),
        Case(0, 3, 1),
        Case(2, 0, 0, ""),
        Case(0, 3, 0),
    ]


@pytest.mark.parametrize("before", [None, "0"])
def test_portable_steps_last_as_long_as_the_block(monkeypatch, before):
    monkeypatch.delenv(bench.PORTABLE, raising=False)
    if before is not None:
        monkeypatch.setenv(bench.PORTABLE, before)
    with bench.portable_steps(False):
        assert os.environ.get(bench.PORTABLE) == before
    with pytest.raises(KeyError), bench.portable_steps(True):
        assert os.environ[bench.PORTABLE] == "1"
        raise KeyError
    assert os.environ.get(bench.PORTABLE) == before


def test_portable_steps_on_the_kernels(emulated_gpu, monkeypatch):
    """Eager, recorded and repeated, with the lengths that they should have."""
    emulated_gpu.orders = ("ascending",)
    config = dataclasses.replace(sizes.config_of("0.6B"), **SMALL)
    network = sizes.random_network(config, Device.cuda(), ml_dtypes.bfloat16)
    with bench.portable_steps(True):
        figures = measure(network, 300, Case(0, 3, 2), 2)
    assert figures.engine == "portable" and len(figures.rates) == 2 and min(figures.rates) > 0


def test_random_networks_have_the_published_shapes_and_scales(network):
    parameters = {"0.6B": 0.596, "1.7B": 1.72, "4B": 4.02, "8B": 8.19, "14B": 14.77, "32B": 32.76}
    for size, billions in parameters.items():
        c = sizes.config_of(size)
        layer = (
            c.hidden_size * c.head_dim * 2 * (c.num_attention_heads + c.num_key_value_heads)
            + 3 * c.hidden_size * c.intermediate_size
        )
        tables = c.vocab_size * c.hidden_size * (1 if c.tie_word_embeddings else 2)
        assert (layer * c.num_hidden_layers + tables) / 1e9 == pytest.approx(billions, rel=0.003)
    layer, table = network.weights.layers[1], network.weights.embed_tokens
    assert network.weights.lm_head is table and table.shape == (320, 64) and layer.down_proj.shape == (64, 96)
    for matrix in (table, layer.q_proj, layer.down_proj):
        assert matrix.std() == pytest.approx(matrix.shape[1] ** -0.5, rel=0.1)
    assert not np.array_equal(layer.q_proj, network.weights.layers[0].q_proj)


@pytest.mark.parametrize(
    ("words", "at"), [(0, 0), (1, 0), (700, 699), (9000, 4000), (9000, 8191), (9000, 8192), (9000, 8999)]
)
def test_read_all_reads_all(emulated_gpu, words, at):
    """It tells of one number, which is in one place here."""
    source, out = np.zeros((words, 4), np.uint32), np.zeros(1, np.uint32)
    source[at : at + 1, 2] = 0x12345678
    kernel = launch.load_function("read", "read_all", ())
    kernel((2,), (512,), (launch.upload(source), np.int64(words), out))
    assert out[0] == (0x12345678 if words else 0)


def test_read_bandwidth_of_a_cpu():
    assert 1e8 < bandwidth.read_bandwidth("cpu", 1 << 24) < 1e13
