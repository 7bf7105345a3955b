"""From the shell to text: a random checkpoint of Qwen3-0.6B's shape through `cuqwen generate` on the GPU.

    python -m benchmarks.generate [--output benchmarks/results/generate.json]

The checkpoint is saved to disk by transformers. Each row is one run of the command as a process of its own: the first
with an empty kernel cache, the others with a warm one. Beside it transformers, in bf16, from its import to the first
token and on. The file is in the page cache throughout.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.record import ROOT, write_record

PROMPT = "In the beginning God created the heaven and the earth. And the earth was without form, and void;"
TRANSFORMERS = """
import json, sys, time
started = time.perf_counter()
import torch
from transformers import AutoModelForCausalLM
imported = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).to("cuda").eval()
torch.cuda.synchronize()
loaded = time.perf_counter()
ids = torch.tensor([json.loads(sys.argv[2])], device="cuda")
times = []
for tokens in (1, 1, 65):
    begin = time.perf_counter()
    model.generate(input_ids=ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
    torch.cuda.synchronize()
    times.append(time.perf_counter() - begin)
print(json.dumps(dict(import_seconds=imported - started, load_seconds=loaded - imported, first_token_seconds=times[0],
                      tokens_per_second=64 / (times[2] - times[1]))))
"""


def run_cuqwen(folder: Path, cache: Path, max_tokens: int) -> dict[str, Any]:
    """One run of the command; its own timings, and the wall time of the process."""
    command = [sys.executable, "-m", "cuqwen", "generate", PROMPT, "--model", str(folder), "--raw", "--json"]
    command += ["--device", "cuda", "--max-tokens", str(max_tokens), "--temperature", "0", "--quiet"]
    started = time.perf_counter()
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, "CUPY_CACHE_DIR": str(cache)}
    )
    wall = time.perf_counter() - started
    report = json.loads(done.stdout)
    return {"process_seconds": round(wall, 3), "tokens": len(report["tokens"]), **report["timings"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="benchmarks/results/generate.json")
    parser.add_argument("--folder", type=Path, help="an existing checkpoint instead of a random one")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    from checkpoints import write_0_6b

    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or write_0_6b(Path(scratch) / "model", k_gains="ordinary", seed=0)
        cache = Path(scratch) / "kernels"
        rows = [{"kernel_cache": "cold", **run_cuqwen(folder, cache, 1)}]
        rows += [{"kernel_cache": "warm", **run_cuqwen(folder, cache, 1)} for _ in range(3)]
        rows += [{"kernel_cache": "warm", **run_cuqwen(folder, cache, 256)} for _ in range(2)]
        from tokenizers import Tokenizer

        ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(PROMPT).ids
        command = [sys.executable, "-c", TRANSFORMERS, str(folder), json.dumps(ids)]
        peer = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    for row in rows:
        print(row)
    print("transformers bf16:", peer)
    write_record(options.output, {"prompt_tokens": len(ids), "cuqwen": rows, "transformers_bf16": peer})


if __name__ == "__main__":
    main()
