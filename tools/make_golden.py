"""Writes tests/golden/*.npz: what transformers computes in float32, for machines without torch and transformers.

    python tools/make_golden.py        # needs torch, transformers, safetensors, ml_dtypes, tokenizers

One file per checkpoint of tests/checkpoints.py: `ids` [4, 64]; `rows`, some positions of the first sequence, and their
float32 `logits`; `error_of_rows` and `error_float32`, the relative error of those rows and of all four sequences
against the float64 truth; `fingerprint` of the weights; `versions`. And demo.npz: the same over held-out text, and for
each of PROMPTS its `prompt_i` ids and the greedy `continuation_i`.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import checkpoints  # noqa: E402
from truth import truth_logits  # noqa: E402

GOLDEN = ROOT / "tests" / "golden"
N_GREEDY = 256


def golden(folder: Path, sequences: np.ndarray, rows: np.ndarray) -> dict[str, Any]:
    """The arrays of one golden file."""
    import torch
    import transformers

    logits = checkpoints.transformers_logits(folder, sequences, "float32")
    truths = [truth_logits(folder, ids) for ids in sequences]
    return {
        "ids": sequences,
        "rows": rows,
        "logits": logits[0][rows].astype(np.float32),
        "error_of_rows": checkpoints.relative_error([logits[0][rows]], [truths[0][rows]]),
        "error_float32": checkpoints.relative_error(logits, truths),
        "fingerprint": checkpoints.fingerprint(folder),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }


def save(name: str, arrays: dict[str, Any]) -> None:
    """Writes one golden file and says what its float32 error is."""
    path = GOLDEN / f"{name}.npz"
    np.savez_compressed(path, **arrays)
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size:,} bytes, float32 error {arrays['error_float32']:.3g}")


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for spec in checkpoints.SPECS.values():
        with tempfile.TemporaryDirectory() as folder:
            checkpoints.write(folder, spec)
            sequences = checkpoints.token_sequences(spec.vocab_size)
            save(spec.name, golden(Path(folder), sequences, np.arange(3, 64, 4)))

    demo = checkpoints.DEMO
    if not (demo / "model.safetensors").exists():
        print(f"{demo} holds no checkpoint yet: demo.npz is not written")
        return
    arrays = golden(demo, checkpoints.heldout_sequences(), np.array([7, 63, 127, 255]))
    for i, prompt in enumerate(checkpoints.demo_prompts()):
        arrays[f"prompt_{i}"] = np.array(prompt)
        arrays[f"continuation_{i}"] = np.array(checkpoints.transformers_greedy(demo, prompt, N_GREEDY))
        print(f"prompt {i}: {len(prompt)} ids, {len(arrays[f'continuation_{i}'])} ids follow")
    save("demo", arrays)


if __name__ == "__main__":
    main()
