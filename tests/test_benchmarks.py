"""The benchmark of the operations, without a GPU: that its calls are calls, and what it says that they move."""

import dataclasses

import numpy as np
import pytest

from benchmarks import decode, ops, timing

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
            assert work.moved == sum(array.nbytes for array in inputs) + results.nbytes


def test_large_rows_are_calls(small, monkeypatch):
    monkeypatch.setattr(ops, "LARGE_ROWS", ((3, 64),))
    for size, rows, work in ops.large_rmsnorm():
        inputs = [ops.make(*spec) for spec in work.inputs]
        assert work.ours(*inputs) is inputs[1] and size == "C 64" and rows == 3
        assert work.moved == sum(array.nbytes for array in inputs)


def test_calls_of_a_graph_use_every_set_equally_often():
    assert timing.calls_for(1e-6, 64) == 256 and timing.calls_for(1.0, 5) == 5 and timing.calls_for(1e-5, 7) == 147


def test_sets_exceed_the_cache_or_are_64():
    def sets(nbytes, room):
        return len(timing.rotated(lambda: (np.zeros(nbytes, np.uint8),), np.copy, room))

    assert (sets(10, 100), sets(1, 100), sets(100, 100), sets(99, 100)) == (11, 64, 1, 2)


def test_a_row_of_decode(small, monkeypatch):
    monkeypatch.setattr(decode, "TOKENS", 4)
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
