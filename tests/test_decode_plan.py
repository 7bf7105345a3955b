"""Which block of decode_step computes which rows and reads which keys: every one exactly once, and evenly."""

import emulator
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cuqwen import decode_step, sizes, sources

pytestmark = emulator.needs_emulator
PLAN = """
extern "C" __global__ void plan(int* out, int rows, int turn, int unit, int blocks, int cached) {
    const Deal deal(rows, turn, unit, blocks);
    const Share share(cached);
    const int mine[7] = {deal.first, deal.last, share.exists(), share.unit, share.first, share.last, share.kv()};
    for (int i = 0; i < 7; i++) out[7 * blockIdx.x + i] = mine[i];
}
"""


@pytest.fixture(scope="module")
def plan():
    """plan(size, many_keys, grid, rows, turn, unit, blocks, cached): int32 [grid, 7], what the kernel above writes."""
    text_of = sources.source

    def source(file, *entry):
        return text_of(file, *entry).split('extern "C"')[0] + PLAN

    def call(size, many_keys, grid, *numbers):
        defines = decode_step.defines(sizes.config_of(size), np.dtype(ml_dtypes.bfloat16), many_keys=many_keys)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sources, "source", source)
            kernel = emulator.load_function("decode_step", "plan", (*defines, ("PLAN", "1")))
        out = np.full((grid, 7), -1, np.int32)
        with emulator.orders("ascending"):
            kernel((grid,), (1,), (out, *map(np.int32, numbers)))
        return out

    return call


def matrices(size):
    """(rows, unit) of every matrix: projections and head in tiles of eight, the others in fours."""
    c = sizes.config_of(size)
    heads = c.num_attention_heads + 2 * c.num_key_value_heads
    return [(heads * c.head_dim, 8), (c.hidden_size, 4), (c.intermediate_size, 4), (c.vocab_size, 8)]


@settings(max_examples=100, deadline=None)
@given(
    matrix=st.sampled_from([each for size in sizes.SIZES for each in matrices(size)]),
    grid=st.integers(2, 264),
    turn=st.integers(0, 100),
    rests=st.booleans(),
)
def test_every_row_is_dealt_to_one_block(plan, matrix, grid, turn, rests):
    rows, unit = matrix
    first, last = plan("0.6B", False, grid, rows, turn, unit, grid - rests, 0)[:, :2].T
    assert not rests or first[-1] == last[-1]  # the block that chooses has none
    counts = np.zeros(rows, np.int32)
    for a, b in zip(first, last, strict=True):
        counts[a:b] += 1
    assert (counts == 1).all()
    of_blocks = (last - first)[: grid - rests]
    assert of_blocks.max() - of_blocks.min() <= 2 * unit - 1 and (first[first < rows] % unit == 0).all()


@settings(max_examples=60, deadline=None)
@given(
    case=st.sampled_from([("0.6B", False), ("0.6B", True), ("14B", False)]),
    grid=st.integers(40, 264),
    cached=st.integers(0, 5000),
)
def test_every_key_is_in_one_share_of_each_unit(plan, case, grid, cached):
    size, many_keys = case
    c = sizes.config_of(size)
    together = decode_step._unit_heads(c, many_keys)
    units = c.num_attention_heads // together
    counts, shares = np.zeros((units, cached), np.int32), np.zeros(units, np.int32)
    for exists, unit, first, last, kv in plan(size, many_keys, grid, 8, 0, 8, grid, cached)[:, 2:]:
        if not exists:
            continue
        assert kv == unit * together // (c.num_attention_heads // c.num_key_value_heads)
        shares[unit] += 1
        counts[unit, first:last] += 1
    assert (counts == 1).all() and (shares == shares[0]).all()
    assert shares[0] in (1, 2, 4, 8, 16) and (shares[0] == 1 or cached > 96 * shares[0])
