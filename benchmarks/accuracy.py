"""How right the logits are: cuqwen and transformers against the float64 truth, on one GPU.

    python -m benchmarks.accuracy [--output FILE] [--only demo ordinary heavy] [--tokens 2000]

Teacher-forced, over held-out text for `demo` and over random ids for two random checkpoints of Qwen3-0.6B's shape, with
ordinary K-norm gains and with heavy ones (up to 96.5 in every layer). For each it prints and records

    KL      mean over positions of sum p log(p / p_x), p the truth's softmax, in nats, computed in float64
    argmax  share of positions where the most likely token is the truth's
    error   ||x - t|| / ||t|| over all logits

and ends with status 1 if a gate fails. The gates, for demo and ordinary: cuqwen has at most half of the KL that transformers
has in bf16, token by token as in an answer at most a tenth, with exact=True a twentieth, and agrees in the argmax at least as
often; for all three: with exact=True its error is at most four times that of transformers in float32. Needs torch, transformers, tokenizers, CuPy and cuqwen, and no network. `--device cpu` is a rehearsal without a
GPU; its cache is float32 and its gates mean little.
"""

import argparse
import gc
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import checkpoints  # noqa: E402
from truth import truth_logits  # noqa: E402

import cuqwen  # noqa: E402
from benchmarks.record import write_record  # noqa: E402
from cuqwen.decode import Decoder  # noqa: E402

CHECKPOINTS = ("demo", "ordinary", "heavy")
DEMO_WINDOWS = 4
ROWS = 128  # positions that are compared at a time: 128 · V · 8 bytes is 156 MB for Qwen3's vocabulary


@dataclass
class Figures:
    """What one contender makes of one checkpoint."""

    mean_kl: float
    argmax_agreement: float
    relative_error: float
    seconds: float  # loading and all forward passes


class Machine:
    """Where everything runs: the array module, torch's device, and how float64 matrices are multiplied."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.xp, self.matmul = np, None
        if device == "cuda":
            import cupy

            self.xp, self.matmul = cupy, self._matmul_by_torch

    def _matmul_by_torch(self, a: Any, b: Any) -> Any:
        """torch brings the cuBLAS that CuPy may lack."""
        return self.xp.from_dlpack(torch.matmul(torch.from_dlpack(a), torch.from_dlpack(b)))

    def from_torch(self, tensor: torch.Tensor) -> Any:
        """A tensor as an array of `xp`; bf16 is widened, which is exact."""
        return self.xp.from_dlpack(tensor.detach().float().contiguous())

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def free(self) -> None:
        """Give back what deleted models held."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
            self.xp.get_default_memory_pool().free_all_blocks()


# --- contenders: (folder, windows, machine) -> logits [T, V] per window ----------------------------------------------


def by_transformers(dtype: torch.dtype) -> Callable[..., Iterator[Any]]:
    def run(folder: Path, windows: Iterable[np.ndarray], machine: Machine) -> Iterator[Any]:
        # loaded from disk in the wanted type: casting a loaded module would round its RoPE frequencies too
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(machine.device).eval()
        for ids in windows:
            with torch.no_grad():
                yield machine.from_torch(model(torch.as_tensor(ids, device=machine.device)[None]).logits[0])

    return run


def by_cuqwen(**arguments: Any) -> Callable[..., Iterator[Any]]:
    def run(folder: Path, windows: Iterable[np.ndarray], machine: Machine) -> Iterator[Any]:
        model = cuqwen.load(folder, device=machine.device, **arguments)
        for ids in windows:
            yield model.logits(ids)

    return run


def by_cuqwen_token_by_token(folder: Path, windows: Iterable[np.ndarray], machine: Machine) -> Iterator[Any]:
    network = cuqwen.load(folder, device=machine.device).network
    for ids in windows:
        decoder = Decoder(network, network.new_cache(len(ids)))
        rows = [
            decoder.step(network.device.upload(ids[at : at + 1].astype(np.int32)))[0].copy() for at in range(len(ids))
        ]
        yield machine.xp.stack(rows)


CONTENDERS = {
    "transformers bfloat16": by_transformers(torch.bfloat16),
    "transformers float32": by_transformers(torch.float32),
    "cuqwen": by_cuqwen(),
    "cuqwen exact": by_cuqwen(exact=True),
    "cuqwen token by token": by_cuqwen_token_by_token,
    "cuqwen exact kv bfloat16": by_cuqwen(exact=True, kv_dtype="bfloat16"),
}


# --- measuring -----------------------------------------------------------------------------------------------------


def log_softmax(x: Any, xp: Any) -> Any:
    x = x - x.max(axis=-1, keepdims=True)
    return x - xp.log(xp.exp(x).sum(axis=-1, keepdims=True))


def compare(truth: Any, logits: Any, xp: Any) -> np.ndarray:
    """[sum of KL, positions with the same argmax, ||x - t||², ||t||², positions] of one window, summed in float64."""
    if logits.shape != truth.shape:
        raise ValueError(f"wanted logits of shape {truth.shape}, got {logits.shape}")
    sums = np.zeros(5)
    for first in range(0, len(truth), ROWS):
        t = truth[first : first + ROWS]
        x = logits[first : first + ROWS].astype(np.float64)
        log_p = log_softmax(t, xp)
        kl = (xp.exp(log_p) * (log_p - log_softmax(x, xp))).sum()
        same = (t.argmax(axis=-1) == x.argmax(axis=-1)).sum()
        sums += [float(kl), float(same), float(((x - t) ** 2).sum()), float((t * t).sum()), len(t)]
    return sums


def measure(folder: Path, windows: list[np.ndarray], machine: Machine) -> dict[str, Figures]:
    """Every contender against the truth on one checkpoint."""
    start = time.perf_counter()
    truths = [truth_logits(folder, ids, machine.xp, machine.matmul) for ids in windows]
    machine.synchronize()
    print(f"  truth: {time.perf_counter() - start:.1f} s", flush=True)
    results = {}
    for name, contender in CONTENDERS.items():
        machine.free()
        sums, seconds, start = np.zeros(5), 0.0, time.perf_counter()
        for truth, logits in zip(truths, contender(folder, windows, machine), strict=True):
            machine.synchronize()
            seconds += time.perf_counter() - start
            sums += compare(truth, logits, machine.xp)
            start = time.perf_counter()
        kl, same, error, size, positions = sums.tolist()
        f = results[name] = Figures(kl / positions, same / positions, math.sqrt(error / size), seconds)
        print(
            f"  {name:22s}  KL {f.mean_kl:10.3e}   argmax {f.argmax_agreement:8.4%}   error {f.relative_error:10.3e}"
            f"   {f.seconds:6.1f} s",
            flush=True,
        )
    machine.free()
    return results


def gates(results: dict[str, dict[str, Figures]]) -> list[dict[str, Any]]:
    """What is promised, with the figures that decide it."""
    checks = []
    for checkpoint, figures in results.items():
        bf16, f32 = figures["transformers bfloat16"], figures["transformers float32"]
        for mode, share in (("cuqwen", 2), ("cuqwen token by token", 10), ("cuqwen exact", 20)):
            if checkpoint != "heavy":
                ours, name = figures[mode], f"{mode}: KL <= transformers bfloat16 / {share}"
                checks.append((checkpoint, name, ours.mean_kl, "<=", bf16.mean_kl / share))
                name, wanted = f"{mode}: argmax >= transformers bfloat16", bf16.argmax_agreement
                checks.append((checkpoint, name, ours.argmax_agreement, ">=", wanted))
        error = figures["cuqwen exact"].relative_error
        name, limit = "cuqwen exact: error <= 4 transformers float32", 4 * f32.relative_error
        checks.append((checkpoint, name, error, "<=", limit))
    keys = ("checkpoint", "gate", "got", "relation", "limit", "passed")
    # a NaN on either side passes nothing
    return [dict(zip(keys, (*c, c[2] <= c[4] if c[3] == "<=" else c[2] >= c[4]), strict=True)) for c in checks]


# --- checkpoints and the record --------------------------------------------------------------------------------------


def prepare(name: str, n_tokens: int, scratch: Path) -> tuple[Path, list[np.ndarray]]:
    """The folder of a checkpoint, written to `scratch` if it is a random one, and the windows of token ids to run."""
    if name == "demo":
        return checkpoints.DEMO, list(checkpoints.heldout_sequences(DEMO_WINDOWS, n_tokens))
    folder = checkpoints.write_0_6b(scratch / name, k_gains=name, seed=0)
    n_text_ids = 151643  # of Qwen3's vocabulary, without special tokens and padding
    return folder, list(checkpoints.token_sequences(n_text_ids, 1, n_tokens))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Accuracy of cuqwen and transformers against a float64 truth.")
    parser.add_argument("--output", default="benchmarks/results/accuracy.json")
    parser.add_argument("--only", nargs="+", choices=CHECKPOINTS, default=CHECKPOINTS, help="checkpoints to run")
    parser.add_argument("--tokens", type=int, default=2000, help="tokens in a window (default 2000)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    machine = Machine(arguments.device)
    recorded: dict[str, Any] = {}
    results = {}
    with tempfile.TemporaryDirectory(prefix="cuqwen-accuracy-") as scratch:
        for name in arguments.only:
            start = time.perf_counter()
            folder, windows = prepare(name, arguments.tokens, Path(scratch))
            n_tokens = sum(map(len, windows))
            print(f"{name}: {n_tokens} tokens, made ready in {time.perf_counter() - start:.1f} s", flush=True)
            results[name] = measure(folder, windows, machine)
            figures = {contender: asdict(f) for contender, f in results[name].items()}
            recorded[name] = {"tokens": n_tokens, "window": arguments.tokens, "figures": figures}

    checked = gates(results)
    for gate in checked:
        verdict = "passed" if gate["passed"] else "FAILED"
        figures = f"{gate['got']:.4g} {gate['relation']} {gate['limit']:.4g}"
        print(f"{verdict}  {gate['checkpoint']:9s} {gate['gate']}: {figures}")
    write_record(arguments.output, {"results": recorded, "gates": checked})
    return 0 if all(gate["passed"] for gate in checked) else 1


if __name__ == "__main__":
    sys.exit(main())
