"""The benchmark of the operations, without a GPU: that its calls are calls, and what it says that they move."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

import cuqwen
from benchmarks import decode, load, ops, timing

SHAPE = ops.Shape(C=64, F=96, H=4, K=2, D=64, V=320)


@pytest.fixture
def small(emulated_gpu, monkeypatch):
    emulated_gpu.orders = ("ascending",)
    rng = np.random.default_rng(0)

    def make(shape, dtype, below=1):
        return (rng.integers(0, below, shape) if dtype == ops.I32 else rng.standard_normal(shape)).astype(dtype)

    monkeypatch.setattr(ops, "make", make)
    monkeypatch.setattr(ops, "CONTEXT", 40)


@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("operation", ops.OPERATIONS, ids=lambda operation: operation.__name__)
def test_every_row_is_a_call(small, operation, T):
    for work in operation(SHAPE, T):
        inputs = [ops.make(*spec, work.below) for spec in work.inputs]
        results = work.ours(*inputs)
        assert work.moved > 0 and work.ceiling in ("read", "copy") and work.torch_inputs != ()
        if operation in (ops.matmul, ops.swiglu, ops.silu_mul, ops.attention):  # all that they move is in these arrays
            new = 0 if any(array is results for array in inputs) and operation is not ops.matmul else results.nbytes
            assert work.moved == sum(array.nbytes for array in inputs) + new


def test_large_rows_are_calls(small, monkeypatch):
    monkeypatch.setattr(ops, "LARGE_ROWS", ((24, 64),))
    monkeypatch.setattr(ops, "LARGE_SIDE", 24)
    monkeypatch.setattr(ops, "LARGE_PROMPT", 24)
    monkeypatch.setitem(ops.SHAPES, "0.6B", SHAPE)
    options = SimpleNamespace(operations=None, tokens=[], large=True)
    rows = list(ops.works(options))
    assert [name for _, _, name, _ in rows] == ["rmsnorm", "rmsnorm", "attention", "matmul"]
    for tokens, size, _, work in rows:
        inputs = [ops.make(*spec) for spec in work.inputs]
        result = work.ours(*inputs)
        others = 0 if any(array is result for array in inputs) else result.nbytes
        assert tokens == 24 and size == "large" and work.moved == sum(array.nbytes for array in inputs) + others


def test_calls_of_a_graph_use_every_set_equally_often():
    assert timing.calls_for(1e-6, 64) == 256 and timing.calls_for(1.0, 5) == 5 and timing.calls_for(1e-5, 7) == 147


def test_sets_exceed_the_cache_or_are_64():
    def sets(nbytes, room):
        return len(timing.rotated(lambda: (np.zeros(nbytes, np.uint8),), np.copy, room))

    assert (sets(10, 100), sets(1, 100), sets(100, 100), sets(99, 100)) == (11, 64, 1, 2)


def test_a_row_of_decode(small, monkeypatch):
    monkeypatch.setattr(decode, "TOKENS", 4), monkeypatch.setattr(decode, "SHORT", 6)
    monkeypatch.setattr(decode.sizes, "TOKENS", 300)
    shape = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = dataclasses.replace(decode.sizes.config_of("0.6B"), vocab_size=320, head_dim=64, **shape)
    monkeypatch.setattr(decode.sizes, "config_of", lambda size, layers: config)
    model = decode.random_model("0.6B")
    row = decode.row(model, "0.6B", 6, "sampled", True, 2e9)
    assert not row["one_launch"] and row["why_not"] == "CUQWEN_PORTABLE is set" and row["tokens"] == 4
    assert len(row["tokens_per_second"]) == 3 and row["percent_of_read"] > 0
    assert row["floor_microseconds"] == round(model.read_bytes_per_token(8) / 2e3, 1)
    row = decode.row(model, "0.6B", 3, "greedy", True, 2e9)
    assert row["tokens"] == 3 and len(row["tokens_per_second"]) == 10  # each within the six


def test_a_checkpoint_to_be_loaded_is_one(tmp_path, monkeypatch):
    """Several files, each tensor's data cut out of the repeated block at its own place."""
    monkeypatch.setattr(load, "BLOCK", 5000)
    monkeypatch.setattr(load, "SHARD", 100_000)
    config = dataclasses.replace(
        load.config_of("0.6B", 2), hidden_size=64, intermediate_size=96, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, vocab_size=4100, tie_word_embeddings=False,
    )  # fmt: skip
    paths = load.write_checkpoint(tmp_path, config)
    assert len(paths) > 2
    block = np.random.default_rng(0).bytes(load.BLOCK)
    for path in paths:
        data = path.read_bytes()
        data = data[8 + int.from_bytes(data[:8], "little") :]
        assert data == (block * (len(data) // len(block) + 1))[: len(data)]
    model = cuqwen.load(tmp_path, device="cpu")
    assert model.config == dataclasses.replace(config, eos_token_id=model.config.eos_token_id)
