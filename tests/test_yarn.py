"""Long contexts: YaRN's table and logits against the paper's formula and transformers, and angles at distant positions."""

import dataclasses
import json
import math

import checkpoints
import numpy as np
import pytest
from checkpoints import Spec, relative_error, write

import cuqwen
from cuqwen import rope_table
from cuqwen.config import Config, Yarn

QWEN3 = Yarn(4.0, 32768, 0.1 * math.log(4) + 1, 32.0, 1.0, True)
YARNS = {
    "qwen3": (128, 1e6, QWEN3),
    "qwen2.5_of_64": (64, 1e6, dataclasses.replace(QWEN3, factor=2.0, attention_factor=1.0)),
    "not_truncated": (128, 1e4, dataclasses.replace(QWEN3, factor=40.0, beta_fast=16.0, beta_slow=2.5, truncate=False)),
    "one_step": (16, 1e4, Yarn(3.0, 64, 0.7, 1.0, 1.0, False)),
    "all_fast": (32, 500.0, Yarn(8.0, 1 << 20, 1.2, 32.0, 1.0, True)),
}
HAS_TRANSFORMERS = checkpoints.has_transformers()


def frequencies(dim, theta, yarn):
    """The paper's piecewise frequencies, pair by pair, with the bounds of the ramp as published code has them."""
    result = []
    for i in range(dim // 2):
        own = theta ** (-2 * i / dim)
        bounds = []
        for turns in (yarn.beta_fast, yarn.beta_slow):
            # the pair whose wave length 2 pi theta**(2 i / dim) goes `turns` times into the original context
            bounds.append(
                dim / 2 * math.log(yarn.original_max_position_embeddings / (2 * math.pi * turns)) / math.log(theta)
            )
        low, high = (math.floor(bounds[0]), math.ceil(bounds[1])) if yarn.truncate else bounds
        low, high = max(low, 0), min(high, dim - 1)
        high += 0.001 * (low == high)
        stretched = min(max((i - low) / (high - low), 0.0), 1.0)
        result.append((1 - stretched) * own + stretched * own / yarn.factor)
    return np.array(result)


@pytest.mark.parametrize("name", YARNS)
def test_yarn_table(name):
    """Up to 2**18 positions: the float32 table is the float64 one, rounded once."""
    dim, theta, yarn = YARNS[name]
    cos, sin = rope_table(dim, 1 << 18, theta, scaling=yarn)
    wide = rope_table(dim, (1 << 14) + 40, theta, np.float64, scaling=yarn)
    at = np.array([0, 1, 2, 1000, (1 << 14) - 1, 1 << 14, (1 << 15) + 1, 131071, (1 << 18) - 1])
    angles = at[:, None] * frequencies(dim, theta, yarn)
    for table, far, truth in zip((cos, sin), wide, (np.cos(angles), np.sin(angles)), strict=True):
        truth = truth * yarn.attention_factor
        assert table.shape == (1 << 18, dim // 2) and table.dtype == np.float32
        # half an ulp of float32, and what two orders of float64 products differ by at the last position
        assert np.abs(table[at] - truth).max() <= yarn.attention_factor * (2.0**-24 + 2.0**18 * 2.0**-51)
        assert np.array_equal(table[: len(far)], far.astype(np.float32))  # also across the blocks that it is made in


def test_float32_angles_would_fail_there():
    """The bound above can tell: angles rounded to float32 are off by more than a thousand times as much."""
    angles = np.array([131071.0])[:, None] * frequencies(128, 1e6, QWEN3)
    assert np.abs(np.cos(angles.astype(np.float32)) - np.cos(angles)).max() > 1000 * 2.0**-24


def test_factor_one_changes_nothing():
    plain, same = rope_table(64, 300, 1e6), rope_table(64, 300, 1e6, scaling=dataclasses.replace(QWEN3, factor=1.0, attention_factor=1.0))  # fmt: skip
    assert np.abs(np.array(plain) - np.array(same)).max() <= 2.0**-23


@pytest.mark.skipif(not HAS_TRANSFORMERS, reason="torch and transformers are not installed")
@pytest.mark.parametrize("name", YARNS)
def test_yarn_of_transformers(name):
    """Its frequencies are made in float32. The power has the rounding of its exponent times ln(theta); the share of the ramp
    is known to some 2**-24 of 1, and stands before a frequency up to `factor` times as high as the result."""
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    dim, theta, yarn = YARNS[name]
    parameters = {"rope_type": "yarn", "rope_theta": theta, **dataclasses.asdict(yarn)}
    length = int(yarn.factor * yarn.original_max_position_embeddings)
    config = transformers.Qwen3Config(head_dim=dim, max_position_embeddings=length, rope_parameters=parameters)
    theirs, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](config, None)
    theirs = theirs.double().numpy()
    cos, sin = rope_table(dim, 2, theta, np.float64, scaling=yarn)
    assert np.allclose(np.hypot(cos, sin), attention_factor, rtol=1e-12)
    slack = (math.log(theta) + 3 * yarn.factor + 5) * 2.0**-24
    assert np.all(np.abs(np.arctan2(sin[1], cos[1]) - theirs) <= slack * theirs)


YARN_SPEC = Spec("yarn", 4, 2, 32, 64, 96, 300, max_position_embeddings=64)
YARN_KEYS = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def with_yarn(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config["rope_scaling"] = {**YARN_KEYS, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.skipif(not HAS_TRANSFORMERS, reason="torch and transformers are not installed")
@pytest.mark.parametrize(
    "changes", [{}, {"factor": 2.5, "beta_fast": 8.0, "beta_slow": 0.5, "truncate": False}], ids=str
)
def test_yarn_logits_of_transformers(tmp_path, changes):
    """Beyond the original context. As without YaRN: transformers' float32 and ours err alike against float64."""
    folder = with_yarn(write(tmp_path, YARN_SPEC), **changes)
    ids = checkpoints.token_sequences(300, 1, 150)[0]
    exact = cuqwen.load(folder, device="cpu", dtype="float64").logits(ids)
    own = relative_error([cuqwen.load(folder, device="cpu").logits(ids)], [exact])
    [theirs] = checkpoints.transformers_logits(folder, [ids], "float32")
    assert own < 1e-5 and relative_error([theirs], [exact]) <= 8 * own
    (folder / "config.json").write_text(
        json.dumps(checkpoints.config_json(YARN_SPEC) | {"max_position_embeddings": 256})
    )
    plain = cuqwen.load(folder, device="cpu", dtype="float64").logits(ids)
    assert relative_error([plain], [exact]) > 1e-2  # YaRN matters here


def test_context_limits(tmp_path):
    folder = write(tmp_path, YARN_SPEC)
    assert cuqwen.load(folder, device="cpu").max_context == 64
    with pytest.raises(
        ValueError, match=r"max_context: wanted 1\.\.64, .*max_position_embeddings, got 200; .*YaRN"
    ) as caught:
        cuqwen.load(folder, device="cpu", max_context=200)
    advice = json.loads("{" + str(caught.value).partition('"rope_scaling": {')[2])  # can be pasted as it stands
    assert advice == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    model = cuqwen.load(with_yarn(folder), device="cpu", max_context=200)
    assert model.max_context == 200 and model.config.context_length == 256
    assert cuqwen.load(folder, device="cpu").max_context == 256
    assert model.logits(np.arange(200)).shape == (200, 300)
    with pytest.raises(ValueError, match=r"max_context: wanted 1\.\.256, .*original_max_position_embeddings, got 257$"):
        cuqwen.load(folder, device="cpu", max_context=257)


def test_config_of_the_network_reaches_the_table(tmp_path):
    folder = with_yarn(write(tmp_path, YARN_SPEC))
    config = Config.from_folder(folder)
    network = cuqwen.load(folder, device="cpu", dtype="float64").network
    network.new_cache(256)
    wanted = rope_table(32, 256, config.rope_theta, np.float64, scaling=config.rope_scaling)
    assert np.array_equal(network.cos, wanted[0]) and np.array_equal(network.sin, wanted[1])
