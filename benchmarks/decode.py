"""Tokens a second of single-token steps at several contexts, greedy and sampled, random weights of Qwen3-0.6B's shape.

    python -m benchmarks.decode [--output benchmarks/results/decode.json]

Wall-clock time of `model.stream` between its 20th and its last token, so everything a user waits for is in it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import ROOT, write_record

TOKENS, SKIPPED = 300, 20
SAMPLED = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "seed": 1}


def tokens_per_second(model: Any, context: int, **sampling: Any) -> float:
    """Over `TOKENS` tokens after a prompt of `context` random ids."""
    prompt = np.random.default_rng(0).integers(0, 151643, context).tolist()
    times = [time.perf_counter() for _ in model.stream(prompt, max_tokens=TOKENS, **sampling)]
    return (len(times) - SKIPPED) / (times[-1] - times[SKIPPED - 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="benchmarks/results/decode.json")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    from checkpoints import write_0_6b

    import cuqwen

    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        model = cuqwen.load(write_0_6b(Path(scratch) / "model", k_gains="ordinary", seed=0), device="cuda")
        for context in (20, 128, 1024, 4096, 8192, 32768):
            for name, sampling in (("greedy", {"temperature": 0.0}), ("sampled", SAMPLED)):
                runs = [tokens_per_second(model, context, **sampling) for _ in range(3)]
                bandwidth = max(runs) * model.network.read_bytes_per_token(context + TOKENS // 2)
                rows.append({"context": context, "choice": name, "tokens_per_second": [round(r, 1) for r in runs]})
                print(rows[-1], f"{bandwidth / 1e12:.2f} TB/s", flush=True)
    write_record(options.output, {"tokens": TOKENS, "sampling": SAMPLED, "rows": rows})


if __name__ == "__main__":
    main()
