"""The package, through its public face on the CPU, against the float64 truth and against transformers.

Checkpoints: those of checkpoints.py written by NumPy, the same architectures initialised and saved by transformers, and
the demo. Without torch and transformers the first and the last remain, with the figures that `golden/` recorded.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import checkpoints
import numpy as np
import pytest
from checkpoints import SPECS, relative_error, token_sequences, transformers_greedy, transformers_logits
from truth import truth_logits

import cuqwen

GOLDEN = Path(__file__).parent / "golden"
HAS_TRANSFORMERS = checkpoints.has_transformers()
CASES = [f"numpy-{name}" for name in SPECS] + [f"transformers-{name}" for name in SPECS] + ["demo"]


@dataclass
class Case:
    """One checkpoint with what is compared on it, computed once."""

    folder: Path
    sequences: np.ndarray
    golden: dict | None

    @cached_property
    def truths(self):
        return [truth_logits(self.folder, ids) for ids in self.sequences]

    @cached_property
    def error_float32(self):
        """The relative error of transformers in float32: measured now, or as recorded."""
        if HAS_TRANSFORMERS:
            return relative_error(transformers_logits(self.folder, self.sequences, "float32"), self.truths)
        return float(self.golden["error_float32"])

    @cached_property
    def float32(self):
        return cuqwen.load(self.folder, device="cpu")

    @cached_property
    def float64(self):
        return cuqwen.load(self.folder, device="cpu", dtype="float64")


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    maker, _, name = request.param.partition("-")
    golden = GOLDEN / f"{name or maker}.npz"
    if maker == "demo":
        return Case(checkpoints.DEMO, checkpoints.heldout_sequences(), np.load(golden))
    folder, sequences = tmp_path_factory.mktemp(name), token_sequences(SPECS[name].vocab_size)
    if maker == "numpy":
        return Case(checkpoints.write(folder, SPECS[name]), sequences, np.load(golden))
    if not HAS_TRANSFORMERS:
        pytest.skip("torch and transformers are not installed; the checkpoints written by NumPy stand in")
    return Case(checkpoints.save_with_transformers(folder, SPECS[name]), sequences, None)


def tokens(model, prompt, max_tokens):
    """The greedy continuation of the token ids `prompt`, up to and including an end token."""
    steps = list(model.stream([int(i) for i in prompt], max_tokens=max_tokens, temperature=0.0))
    assert [step.finish_reason for step in steps[:-1]] == [None] * (len(steps) - 1)
    assert steps[-1].finish_reason == ("length" if len(steps) == max_tokens else "stop")
    return [step.token for step in steps]


# --- logits --------------------------------------------------------------------------------------------------------


def test_float64_is_the_truth(case):
    for ids, truth in zip(case.sequences, case.truths, strict=True):
        logits = case.float64.logits(ids)
        assert logits.dtype == np.float64
        assert logits.shape == truth.shape
        assert np.abs(logits - truth).max() <= 1e-9 * np.abs(truth).max()


def test_float32_errs_at_most_four_times_as_much_as_transformers(case):
    logits = [case.float32.logits(ids) for ids in case.sequences]
    assert all(x.dtype == np.float32 for x in logits)
    error = relative_error(logits, case.truths)
    assert error <= 4 * case.error_float32
    assert error > 1e-9, "float32 without float32's error: something was computed in float64"


def test_a_list_of_ids_does_as_well_as_an_array(case):
    ids = case.sequences[0][:5]
    np.testing.assert_array_equal(case.float32.logits(ids.tolist()), case.float32.logits(ids.astype(np.int32)))


# --- a prompt whole, in parts, one token at a time -----------------------------------------------------------------


def close_in_float64(x, y):
    assert np.abs(x - y).max() <= 2e-9 * np.abs(y).max()  # each is within 1e-9 of the truth, as tested above


def close_in_float32(case):
    """Each of the two may err by four times transformers' float32 error, as tested above."""

    def check(x, y):
        assert relative_error([x.astype(np.float64)], [y.astype(np.float64)]) <= 8 * case.error_float32

    return check


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_prompt_cut_short_has_the_same_logits(case, dtype):
    model = getattr(case, dtype)
    close = close_in_float64 if dtype == "float64" else close_in_float32(case)
    ids = case.sequences[1]
    cuts = [1, 2, 3, 31, 32, 33, len(ids) - 1]
    close(np.stack([model.logits(ids[:cut])[-1] for cut in cuts]), model.logits(ids)[[cut - 1 for cut in cuts]])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("parts", [[1] * 64, [40] + [1] * 24, [7, 25, 32]], ids=["ones", "prompt_then_ones", "parts"])
def test_a_prompt_fed_in_parts_has_the_same_logits(case, dtype, parts):
    # Below the public face, since above it only the model's own choices can follow a prompt one at a time.
    model = getattr(case, dtype)
    close = close_in_float64 if dtype == "float64" else close_in_float32(case)
    ids = case.sequences[0][:64].astype(np.int32)
    network, rows = model.network, []
    cache = network.new_cache(len(ids))
    for part in np.split(ids, np.cumsum(parts)[:-1]):
        rows.append(network.forward(network.device.upload(part), cache, rows=len(part)).copy())
    close(np.concatenate(rows), model.logits(ids))


def test_generated_tokens_are_the_most_likely_of_the_whole_text(case):
    # Every generated token came out of a step of one token; the same text in one piece must choose the same.
    prompt = case.sequences[2 % len(case.sequences)][:20].tolist()
    for model, error in ((case.float64, 1e-9), (case.float32, 4 * case.error_float32)):
        generated = tokens(model, prompt, 64)
        logits = model.logits(prompt + generated)[len(prompt) - 1 : -1, : model.tokenizer.n_ids]
        assert_most_likely(generated, logits, 2 * error)


def assert_most_likely(chosen, logits, error):
    """Each row's chosen token is its argmax, or so near that logits with this relative error may exchange the two."""
    behind = logits.max(axis=1) - logits[np.arange(len(chosen)), chosen]
    assert np.all(behind <= error * np.linalg.norm(logits, axis=1)), behind.max()
    assert np.mean(behind == 0) > 0.9  # the exceptions are ties


def test_a_continuation_continued_is_the_same_continuation(case):
    prompt = case.sequences[0][:9].tolist()
    generated = tokens(case.float64, prompt, 48)
    for split in (1, 2, 17, len(generated) - 1):
        if 0 < split < len(generated):
            assert tokens(case.float64, prompt + generated[:split], 48 - split) == generated[split:]


# --- greedy text ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not HAS_TRANSFORMERS, reason="torch and transformers are not installed")
def test_greedy_tokens_are_those_of_transformers(case):
    # Random networks have no opinions; where two tokens tie within float32's error, the two texts may part.
    for ids in case.sequences[:2]:
        prompt = ids[:16].tolist()
        ours, theirs = tokens(case.float32, prompt, 64), transformers_greedy(case.folder, prompt, 64)
        same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(ours))
        if ours != theirs:
            last = truth_logits(case.folder, prompt + ours[:same])[-1:]
            for choice in (ours[same], theirs[same]):
                behind = last.max() - last[0, choice]
                assert behind <= 8 * case.error_float32 * np.linalg.norm(last), f"the texts part at token {same}"


@pytest.mark.skipif(not HAS_TRANSFORMERS, reason="torch and transformers are not installed; the golden ids stand in")
@pytest.mark.parametrize("prompt", range(3))
def test_256_greedy_tokens_of_the_demo_are_those_of_transformers(demo, prompt):
    ids = checkpoints.demo_prompts()[prompt]
    assert tokens(demo, ids, 256) == transformers_greedy(checkpoints.DEMO, ids, 256)


@pytest.mark.parametrize("prompt", range(3))
def test_256_greedy_tokens_of_the_demo_are_the_golden_ones(demo, prompt):
    golden = np.load(GOLDEN / "demo.npz")
    assert checkpoints.fingerprint(checkpoints.DEMO) == str(golden["fingerprint"]), "demo changed: run make_golden.py"
    assert tokens(demo, golden[f"prompt_{prompt}"], 256) == golden[f"continuation_{prompt}"].tolist()


def test_a_golden_continuation_has_all_256_tokens():
    golden = np.load(GOLDEN / "demo.npz")
    assert max(len(golden[f"continuation_{i}"]) for i in range(3)) == 256


@pytest.mark.skipif(not HAS_TRANSFORMERS, reason="torch and transformers are not installed")
def test_a_long_prompt_continues_as_by_transformers(demo):
    # longer than the pieces in which a prompt is read
    [ids] = checkpoints.heldout_sequences(1, 1500)
    assert tokens(demo, ids, 16) == transformers_greedy(checkpoints.DEMO, ids, 16)


def test_generate_is_the_text_of_the_stream(demo):
    golden = np.load(GOLDEN / "demo.npz")
    ids, continuation = golden["prompt_0"].tolist(), golden["continuation_0"].tolist()
    text = demo.generate(ids, max_tokens=256, temperature=0.0)
    assert text == demo.tokenizer.decode(continuation, skip_special_tokens=True)
