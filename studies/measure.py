"""Who is measured, on what, and by which figures: everything of the study that needs torch, transformers and a GPU."""

from __future__ import annotations

import json
import shutil
import struct
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import checkpoints  # noqa: E402
import truth as float64  # noqa: E402

import cuqwen  # noqa: E402
from benchmarks.accuracy import ROWS, Machine, log_softmax  # noqa: E402
from studies.variants import (  # noqa: E402
    ATTENTION_INPUT,
    BOUNDARIES,
    CACHE,
    FUSED_ROUNDINGS,
    Fused,
    KeyRoundedUnrotated,
    NormAfterRope,
    Separate,
    forward,
)  # fmt: skip

transformers.utils.logging.disable_progress_bar()

Array = Any
Watch = Callable[[Array], None]
Contender = Callable[[Watch], Array]  # calls back with the residual stream after each layer, returns the logits

BLOCKS = 10  # runs of positions whose means give the standard error of the mean KL
CHECKPOINTS = ("demo", "ordinary", "heavy")
SWEEP = (2, 4, 6, 8)  # the q gains of `heavy` are divided by 2 to these
MAIN = ("transformers_bfloat16", "fused", "ours", "ours_float32_cache")  # who is measured where not all are
# Where the random checkpoints need not be large: a rehearsal on a CPU.
TINY = checkpoints.Spec("tiny", 4, 2, 32, 64, 160, 1000, num_hidden_layers=4)


# --- contenders -----------------------------------------------------------------------------------------------------


def ours(folder: Path, ids: np.ndarray, machine: Machine, rounded: frozenset[str], way: Any = Separate) -> Contender:
    """The forward pass of `variants`, with `way` to q, k and v."""

    def run(watch: Watch) -> Array:
        network = _network(folder, machine)
        prompt = network.device.upload(ids.astype(np.int32))
        return forward(network, prompt, way(network, len(ids)), rounded, watch)

    return run


_loaded: dict[Path, Any] = {}  # the last checkpoint that cuqwen loaded


def _model(folder: Path, machine: Machine) -> Any:
    if folder not in _loaded:
        forget()
        _loaded[folder] = cuqwen.load(folder, device=machine.device, kv_dtype="bfloat16")
    return _loaded[folder]


def _network(folder: Path, machine: Machine) -> Any:
    return _model(folder, machine).network


def forget() -> None:
    """Let go of the loaded model: it takes memory, or its files are about to change."""
    _loaded.clear()


def by_transformers(folder: Path, ids: np.ndarray, machine: Machine, dtype: torch.dtype) -> Contender:
    def run(watch: Watch) -> Array:
        # loaded from disk in the wanted type: casting a loaded module would round its RoPE frequencies too
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(machine.device).eval()
        for layer in model.model.layers:
            layer.register_forward_hook(
                lambda module, inputs, out: watch(machine.from_torch((out[0] if isinstance(out, tuple) else out)[0]))
            )
        with torch.no_grad():
            return machine.from_torch(model(torch.as_tensor(ids, device=machine.device)[None]).logits[0])

    # CuPy's float32 watch and torch share the default stream, so nothing has to wait
    return run


def contenders(folder: Path, ids: np.ndarray, machine: Machine) -> dict[str, Contender]:
    """Key in the record -> contender."""

    def mine(rounded: frozenset[str], way: Any = Separate) -> Contender:
        return ours(folder, ids, machine, rounded, way)

    def separate(*rounded: str) -> Contender:
        return mine(frozenset(rounded), lambda network, length: Separate(network, length, rounded))

    return {
        "transformers_bfloat16": by_transformers(folder, ids, machine, torch.bfloat16),
        "transformers_float32": by_transformers(folder, ids, machine, torch.float32),
        "fused": mine(CACHE, Fused),
        "fused_float32": mine(CACHE, lambda network, length: Fused(network, length, np.float32)),
        "fused_roundings": separate(*FUSED_ROUNDINGS),
        "ours": separate(*CACHE),
        "ours_float32_cache": separate(),
        **{f"bf16_{boundary}": separate(boundary) for boundary in BOUNDARIES},
        "bf16_k_unrotated": mine(frozenset(), KeyRoundedUnrotated),
        "bf16_attention_input": separate(*ATTENTION_INPUT),
        "bf16_all": separate(*BOUNDARIES),
        "norm_after_rope": mine(CACHE, NormAfterRope),
    }


# --- truth and figures ----------------------------------------------------------------------------------------------


def truth_of(folder: Path, ids: np.ndarray, machine: Machine) -> tuple[list[Array], Array]:
    """The residual stream after each layer, and the logits, in float64.

    The truth keeps no such states, but its norms see them: those over [T, C] come in the order attention, MLP of
    layer 0, attention, MLP of layer 1, ..., final.
    """
    seen, plain = [], float64.rmsnorm

    def watched(x: Array, *rest: Any) -> Array:
        if x.ndim == 2:
            seen.append(x)
        return plain(x, *rest)

    with mock.patch.object(float64, "rmsnorm", watched):
        logits = float64.truth_logits(folder, ids, machine.xp, machine.matmul)
    layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    if len(seen) != 2 * layers + 1:
        raise RuntimeError(f"truth: wanted {2 * layers + 1} norms of the residual stream, saw {len(seen)}")
    return seen[2::2], logits


def relative_error(x: Array, truth: Array, xp: Any) -> float:
    """||x - t|| / ||t|| over all elements."""
    return float(xp.sqrt(((x - truth) ** 2).sum() / (truth**2).sum()))


def figures_of(contender: Contender, truth: tuple[list[Array], Array], machine: Machine) -> dict[str, Any]:
    """Errors by layer and the figures of the logits."""
    states, wanted = truth
    xp, start, by_layer = machine.xp, time.perf_counter(), []

    def watch(x: Array) -> None:
        by_layer.append(relative_error(x.astype(np.float64), states[len(by_layer)], xp))

    logits = contender(watch)
    machine.synchronize()
    seconds = time.perf_counter() - start
    if logits.shape != wanted.shape or len(by_layer) != len(states):
        raise RuntimeError(
            f"wanted logits {wanted.shape} and {len(states)} layers, got {logits.shape}, {len(by_layer)}"
        )
    divergence, same, squares = np.zeros(len(wanted)), 0, np.zeros(2)
    for rows in (slice(first, first + ROWS) for first in range(0, len(wanted), ROWS)):
        t, x = wanted[rows], logits[rows].astype(np.float64)
        log_p = log_softmax(t, xp)
        kl = (xp.exp(log_p) * (log_p - log_softmax(x, xp))).sum(axis=-1)
        divergence[rows] = kl if xp is np else kl.get()
        same += int((t.argmax(axis=-1) == x.argmax(axis=-1)).sum())
        squares += [float(((x - t) ** 2).sum()), float((t * t).sum())]
    blocks = [block.mean() for block in np.array_split(divergence, BLOCKS)]
    return {
        "mean_kl": float(divergence.mean()),
        "kl_standard_error": float(np.std(blocks, ddof=1) / BLOCKS**0.5),
        "argmax_agreement": same / len(wanted),
        "relative_error": float(np.sqrt(squares[0] / squares[1])),
        "error_by_layer": by_layer,
        "seconds": round(seconds, 2),
    }


def check(folder: Path, ids: np.ndarray, machine: Machine) -> dict[str, Any]:
    """That the study's forward pass is the package's: its logits beside those of `model.logits`."""
    package = _model(folder, machine).logits(ids)
    own = contenders(folder, ids, machine)["ours"](lambda x: None)
    difference = relative_error(own.astype(np.float64), package.astype(np.float64), machine.xp)
    return {"same_bits_as_the_package": bool((own == package).all()), "relative_difference": difference}


# --- checkpoints ----------------------------------------------------------------------------------------------------


def prepare(name: str, tokens: int, scratch: Path, tiny: bool) -> tuple[Path, np.ndarray]:
    """The folder of a checkpoint, written to `scratch` if it is a random one, and the token ids [T] to run."""
    if name == "demo":
        return checkpoints.DEMO, checkpoints.heldout_sequences(1, tokens)[0]
    if tiny:
        folder, n_ids = checkpoints.write(scratch / name, replace(TINY, k_gains=name)), TINY.vocab_size
    else:
        folder = checkpoints.write_0_6b(scratch / name, k_gains=name, seed=0)
        n_ids = 151643  # of Qwen3's vocabulary, without special tokens and padding
    return folder, checkpoints.token_sequences(n_ids, 1, tokens)[0]


def tensors_in_place(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array that writes through to the file) of each bf16 tensor of a checkpoint."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            size = struct.unpack("<Q", file.read(8))[0]
            header = json.loads(file.read(size))
        for name, entry in header.items():
            if name != "__metadata__" and entry["dtype"] == "BF16":
                begin, end = entry["data_offsets"]
                bits = np.memmap(path, np.uint16, "r+", 8 + size + begin, ((end - begin) // 2,))
                yield name, bits.view(ml_dtypes.bfloat16).reshape(entry["shape"])
                bits.flush()


def divide_q_gains(folder: Path, divisor: float) -> None:
    """By a power of two, hence exactly."""
    forget()
    for name, gain in tensors_in_place(folder):
        if name.endswith("q_norm.weight"):
            gain[:] = (gain.astype(np.float32) / divisor).astype(gain.dtype)


def move_gains(folder: Path) -> tuple[float, float]:
    """Take every K gain below 2 and give what it loses to the Q gains; returns the largest K gain before and after.

    Elements d and d + D/2 of a head are rotated into each other, so they share one factor, a power of two. The scores
    q · k do not change, and neither does a single rounding on the way: the model is the same number for number.
    """
    largest, factors = [0.0, 0.0], {}
    for name, gain in tensors_in_place(folder):
        if name.endswith("k_norm.weight"):
            pairs = np.abs(gain.astype(np.float64)).reshape(2, -1).max(axis=0)
            factor = np.tile(2.0 ** np.floor(np.log2(np.maximum(pairs, 1))), 2)
            factors[name.replace("k_norm", "q_norm")] = factor
            largest[0] = max(largest[0], float(pairs.max()))
            gain[:] = (gain.astype(np.float64) / factor).astype(gain.dtype)
            largest[1] = max(largest[1], float(np.abs(gain.astype(np.float64)).max()))
    for name, gain in tensors_in_place(folder):
        if name in factors:
            gain[:] = (gain.astype(np.float64) * factors[name]).astype(gain.dtype)
    return largest[0], largest[1]


# --- experiments ----------------------------------------------------------------------------------------------------


def moved_gains(tokens: int, scratch: Path, machine: Machine) -> dict[str, Any]:
    """The demo beside the demo with its large K gains moved into the Q gains: are the logits the same bits?"""
    folder = scratch / "moved"
    shutil.copytree(checkpoints.DEMO, folder)
    before, after = move_gains(folder)
    ids = checkpoints.heldout_sequences(1, tokens)[0]
    same = {}
    for name in MAIN:
        original = contenders(checkpoints.DEMO, ids, machine)[name](lambda x: None)
        moved = contenders(folder, ids, machine)[name](lambda x: None)
        same[name] = bool((original == moved).all())
    return {"tokens": tokens, "largest_k_gain": [before, after], "same_bits": same}


def sweep(folder: Path, ids: np.ndarray, machine: Machine) -> list[dict[str, Any]]:
    """The heavy checkpoint with smaller and smaller Q gains, its K gains as they are. Changes its files."""
    points, done = [], 0
    for exponent in SWEEP:
        divide_q_gains(folder, 2.0 ** (exponent - done))
        done = exponent
        truth = truth_of(folder, ids, machine)
        field = contenders(folder, ids, machine)
        points.append({"q_gains_divided_by": 2**exponent, **{k: figures_of(field[k], truth, machine) for k in MAIN}})
        machine.free()
    return points
