"""The float64 truth is held to transformers, and the identity that the kernels rest on is proven.

With torch and transformers installed the comparison is live; without them it is with `golden/`, transformers' float32
logits on the same checkpoints (written by tools/make_golden.py).
"""

from pathlib import Path

import checkpoints
import numpy as np
import pytest
from checkpoints import SPECS, Random, relative_error, token_sequences, transformers_logits
from safetensors.numpy import load_file, save_file
from truth import rmsnorm, rope, truth_logits

GOLDEN = Path(__file__).parent / "golden"
MAKERS = {"numpy": checkpoints.write, "transformers": checkpoints.save_with_transformers}
needs_transformers = pytest.mark.skipif(
    not checkpoints.has_transformers(), reason="torch and transformers are not installed; the golden files stand in"
)
made_by = pytest.mark.parametrize("maker", MAKERS)
each_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
each_golden = pytest.mark.parametrize("name", [*SPECS, "demo"])


def golden_folder(name, scratch):
    """The folder of the checkpoint that golden/<name>.npz was made from."""
    return checkpoints.DEMO if name == "demo" else checkpoints.write(scratch, SPECS[name])


@pytest.fixture
def lifted_transformers(monkeypatch):
    """Transformers whose float32 islands, RMSNorm and RoPE's angles, compute in float64 like the rest of it."""
    import torch
    from transformers.models.qwen2 import modeling_qwen2
    from transformers.models.qwen3 import modeling_qwen3

    def norm(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    def rotary(self, x, position_ids):
        config = self.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
        angles = position_ids[..., None].double() / config.rope_parameters["rope_theta"] ** exponents
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()

    for module, family in ((modeling_qwen2, "Qwen2"), (modeling_qwen3, "Qwen3")):
        monkeypatch.setattr(getattr(module, family + "RMSNorm"), "forward", norm)
        monkeypatch.setattr(getattr(module, family + "RotaryEmbedding"), "forward", rotary)


@needs_transformers
@made_by
@each_spec
def test_the_truth_is_transformers_in_full_float64(tmp_path, lifted_transformers, maker, spec):
    folder = MAKERS[maker](tmp_path, spec)
    ids = token_sequences(spec.vocab_size)[0]
    truth = truth_logits(folder, ids)
    assert truth.dtype == np.float64
    assert truth.shape == (64, spec.vocab_size)
    # Two orders of float64 summation. The sensitivity measured below is up to 5e-6 for a change of 2^-24, hence 1e-14
    # for one of 2^-53; a hundred times that leaves room for the number of roundings.
    [logits] = transformers_logits(folder, [ids], "float64")
    assert relative_error([logits], [truth]) < 1e-12


@needs_transformers
def test_the_truth_is_transformers_in_full_float64_on_the_demo(lifted_transformers):
    ids = checkpoints.heldout_sequences(1)[0]
    [logits] = transformers_logits(checkpoints.DEMO, [ids], "float64")
    assert relative_error([logits], [truth_logits(checkpoints.DEMO, ids)]) < 1e-12


def sensitivity(folder, scratch, ids, truth):
    """How far the logits move, relatively, when each weight moves by at most 2^-24, float32's rounding: rms of 3."""
    (scratch / "config.json").write_bytes((folder / "config.json").read_bytes())
    rng = np.random.default_rng(0)
    moved = []
    for _ in range(3):
        for file in folder.glob("*.safetensors"):
            weights = {n: w.astype(np.float64) for n, w in load_file(file).items()}
            save_file(
                {n: w * (1 + 2**-24 * rng.uniform(-1, 1, w.shape)) for n, w in weights.items()}, scratch / file.name
            )
        moved.append(truth_logits(scratch, ids))
    return relative_error(moved, [truth] * 3)


@needs_transformers
@made_by
@each_spec
def test_transformers_float32_and_float64_err_by_what_float32_explains(tmp_path, maker, spec):
    folder, scratch = tmp_path / "checkpoint", tmp_path / "perturbed"
    folder.mkdir()
    scratch.mkdir()
    MAKERS[maker](folder, spec)
    ids = token_sequences(spec.vocab_size)[0]
    truth = truth_logits(folder, ids)
    # A float32 forward pass rounds about ten times a layer where the perturbation above rounds each weight once, and
    # its angles, up to 63 rad, by more: 2 to 7 times the sensitivity is what it makes. A wrong term makes 1e5 times.
    limit = 16 * sensitivity(folder, scratch, ids, truth)
    assert limit < 2e-4
    for dtype in ("float32", "float64"):
        [logits] = transformers_logits(folder, [ids], dtype)
        assert relative_error([logits], [truth]) < limit, dtype


@each_golden
def test_the_truth_is_as_far_from_the_golden_logits_as_when_they_were_made(tmp_path, name):
    golden = np.load(GOLDEN / f"{name}.npz")
    folder = golden_folder(name, tmp_path)
    assert checkpoints.fingerprint(folder) == str(golden["fingerprint"]), "this checkpoint changed: run make_golden.py"
    truth = truth_logits(folder, golden["ids"][0])[golden["rows"]]
    error = relative_error([golden["logits"].astype(np.float64)], [truth])
    # The golden logits carry transformers' float32 error, 1e-7 to 1e-5. Were the truth to change by a thousandth of
    # that, this distance would change too; float64's own rounding, below 1e-12, cannot move it by 1e-4.
    assert error == pytest.approx(float(golden["error_of_rows"]), rel=1e-3)
    assert error < 1e-4


@needs_transformers
@each_golden
def test_the_golden_logits_are_what_transformers_gives_today(tmp_path, name):
    golden = np.load(GOLDEN / f"{name}.npz")
    [today] = transformers_logits(golden_folder(name, tmp_path), golden["ids"][:1], "float32")
    # Both are float32 errors around one truth; another version or processor may sum in another order.
    assert relative_error([golden["logits"]], [today[golden["rows"]]]) < 8 * float(golden["error_float32"])


def test_a_later_token_changes_no_earlier_logit(tmp_path):
    spec = SPECS["tied_redundant_head"]
    folder = checkpoints.write(tmp_path, spec)
    ids = token_sequences(spec.vocab_size)[0]
    whole = truth_logits(folder, ids)
    np.testing.assert_allclose(truth_logits(folder, ids[:40]), whole[:40], rtol=0, atol=1e-11)
    assert np.abs(truth_logits(folder, np.roll(ids, 1))[10:] - whole[10:]).max() > 1


# --- the identity of qkv_rope and qk_norm --------------------------------------------------------------------------


@pytest.fixture(params=[16, 64, 128])
def head(request):
    """x [T, heads, D], heavy-tailed gains [D], cos and sin [T, D/2] of positions up to 40,000, all float64."""
    d = request.param
    random = Random(d)
    x = random.normal((50, 3, d)) * random.normal((50, 3, 1), 2.0)
    angles = np.linspace(0, 40_000, 50).round()[:, None] * 1e6 ** (-np.arange(0, d, 2) / d)
    return x, random.k_gains(d, "heavy"), np.cos(angles), np.sin(angles)


EPS = 1e-6


def mean_square(x):
    return (x * x).mean(axis=-1, keepdims=True)


def test_gain_before_the_rotation_and_scale_after_it_is_the_published_order(head):
    x, gain, cos, sin = head
    published = rope(rmsnorm(x, gain, EPS, np), cos, sin, np)
    split = rope(gain * x, cos, sin, np) / np.sqrt(mean_square(x) + EPS)
    # three roundings on each side, of numbers up to the head's largest, which is at most sqrt(D) · 96.5
    limit = 8 * np.finfo(np.float64).eps * np.abs(published).max(axis=-1, keepdims=True)
    assert np.all(np.abs(split - published) <= limit)


def test_rotation_keeps_the_mean_square(head):
    x, _, cos, sin = head
    np.testing.assert_allclose(mean_square(rope(x, cos, sin, np)), mean_square(x), rtol=1e-14)


def test_the_mean_square_of_the_gained_projection_is_another_number(head):
    x, gain, cos, sin = head
    gained = mean_square(rope(gain * x, cos, sin, np))
    assert np.median(gained / mean_square(x)) > 10


def test_the_norm_after_rope_is_wrong_by_about_its_own_size(head):
    x, gain, cos, sin = head
    published = rope(rmsnorm(x, gain, EPS, np), cos, sin, np)[1:]  # position 0 is not rotated
    swapped = rmsnorm(rope(x, cos, sin, np), gain, EPS, np)[1:]
    assert relative_error([swapped], [published]) > 0.3
    # with all gains equal the two orders agree, which is how the mistake stays hidden in a freshly initialised model
    ones = np.ones_like(gain)
    published = rope(rmsnorm(x, ones, EPS, np), cos, sin, np)
    np.testing.assert_allclose(rmsnorm(rope(x, cos, sin, np), ones, EPS, np), published, rtol=0, atol=1e-12)
