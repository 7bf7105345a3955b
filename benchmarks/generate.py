"""From the shell to text: a random checkpoint of Qwen3-0.6B's shape through `cuqwen generate` on the GPU.

    python -m benchmarks.generate [--output benchmarks/results/generate.json]

The checkpoint is saved to disk by transformers. Each row is one run of the command as a process of its own, with a clock on
its parts (benchmarks/spans.py): the first with an empty kernel cache, the others with a warm one. Beside it transformers, in
bf16, from its import to the first token and on. The file is in the page cache throughout, and Python's bytecode where a run
before has left it, as pip does where it is allowed to.
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
MODULES = "import cupy, safetensors, tokenizers, benchmarks.spans, cuqwen.api, cuqwen.commands.generate"
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


def with_bytecode(scratch: Path) -> dict[str, str]:
    """The environment of a process that keeps compiled Python in `scratch`."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return environment | {"PYTHONPYCACHEPREFIX": str(scratch / "bytecode")}


def run_cuqwen(folder: Path, scratch: Path, max_tokens: int) -> dict[str, Any]:
    """One run of the command: its own timings, the wall time of the process, and when its parts begin and end."""
    command = ["generate", PROMPT, "--model", str(folder), "--raw", "--json", "--device", "cuda"]
    command += ["--max-tokens", str(max_tokens), "--temperature", "0", "--quiet"]
    environment = with_bytecode(scratch) | {"CUPY_CACHE_DIR": str(scratch / "kernels")}
    begin = time.time()
    clocked = [sys.executable, "-m", "benchmarks.spans", repr(begin), str(scratch / "spans.json")]
    done = subprocess.run([*clocked, *command], check=True, capture_output=True, text=True, cwd=ROOT, env=environment)
    wall = time.time() - begin
    report = json.loads(done.stdout)
    spans = json.loads((scratch / "spans.json").read_text(encoding="utf-8"))
    return {"process_seconds": round(wall, 3), "tokens": len(report["tokens"]), **report["timings"], "spans": spans}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="benchmarks/results/generate.json")
    parser.add_argument("--folder", type=Path, help="an existing checkpoint instead of a random one")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    from checkpoints import write_0_6b

    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or write_0_6b(Path(scratch) / "model", k_gains="ordinary", seed=0)
        subprocess.run([sys.executable, "-c", MODULES], check=True, cwd=ROOT, env=with_bytecode(Path(scratch)))
        runs = [("cold", 1), *[("warm", 1)] * 5, *[("warm", 256)] * 2]
        rows = [{"kernel_cache": cache, **run_cuqwen(folder, Path(scratch), tokens)} for cache, tokens in runs]
        from tokenizers import Tokenizer

        ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(PROMPT).ids
        command = [sys.executable, "-c", TRANSFORMERS, str(folder), json.dumps(ids)]
        environment = with_bytecode(Path(scratch))
        for _ in range(2):  # the first one leaves bytecode
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        peer = json.loads(done.stdout.splitlines()[-1])
    for row in rows:
        print(row)
    print("transformers bf16:", peer)
    write_record(options.output, {"prompt_tokens": len(ids), "cuqwen": rows, "transformers_bf16": peer})


if __name__ == "__main__":
    main()
