"""Reading prompts: tokens a second by length, the time to the first token in a loaded model, memory against its plan.

    python -m benchmarks.prefill [--sizes 0.6B,8B] [--chunk 2048] [--output benchmarks/results/prefill.json]

Random weights of Qwen3's shapes. A row is wall-clock time from the call to the logits' arrival, median of `REPEATS`, for each
mode: as loaded by default, exact (float32 activations), and transformers in bf16 where it is installed. `host` is the time
until everything is on its way. The first token is that of `generate_steps`, without the tokenizer, and includes ending the answer
there, which waits for the token that the GPU is at. The memory is what the
driver counts, before loading and after a prompt and an answer that fill the context.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import cuqwen
from benchmarks.decode import SIZES, random_model
from benchmarks.record import ROOT, write_record
from cuqwen import launch
from cuqwen.generate import Sequence, generate_steps
from cuqwen.model import CHUNK, Qwen3
from cuqwen.sampling import Sampling

REPEATS, WARM_UP = 5, 2
LENGTHS, FIRST_TOKEN_LENGTHS = (512, 2048, 8192), (20, 512)
N_IDS = 151669


class NoText:
    """Stands in for the tokenizer: tokens have no text."""

    n_ids = N_IDS

    def stream(self) -> NoText:
        return self

    def push(self, token: int) -> str:
        return ""

    def finish(self) -> str:
        return ""


def milliseconds(work: Callable[[], Any]) -> list[float]:
    """Of each of the runs that count."""
    times = []
    for _ in range(WARM_UP + REPEATS):
        launch.cupy().cuda.Device().synchronize()
        started = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - started))
    return times[WARM_UP:]


def row(size: str, what: str, tokens: int, mode: str, times: list[float], **more: Any) -> dict[str, Any]:
    median = statistics.median(times)
    return {
        "size": size, "what": what, "tokens": tokens, "mode": mode, "milliseconds": [round(t, 3) for t in times],
        "median": round(median, 3), "tokens_per_second": round(1e3 * tokens / median), **more,
    }  # fmt: skip


def ids_of(tokens: int) -> np.ndarray:
    return np.random.default_rng(tokens).integers(0, 151643, tokens).astype(np.int32)


def ours(size: str, model: Qwen3, mode: str) -> Iterator[dict[str, Any]]:
    sequence = Sequence(model, 2 * max(LENGTHS))
    sequence.begin([0] * max(LENGTHS), 1)
    for tokens in LENGTHS:
        prompt, host = ids_of(tokens).tolist(), []

        def read(prompt: list[int] = prompt, host: list[float] = host) -> None:
            started = time.perf_counter()
            sequence.ids = []  # nothing of the last prompt counts
            logits = sequence.read(prompt, sequence.begin(prompt, 1), None)
            host.append(1e3 * (time.perf_counter() - started))
            float(logits[0, 0])

        yield row(size, "prefill", tokens, mode, milliseconds(read), host=round(statistics.median(host), 3))
    for tokens in FIRST_TOKEN_LENGTHS:
        prompt = ids_of(tokens).tolist()

        def first(prompt: list[int] = prompt) -> None:
            sequence.ids = []
            steps = generate_steps(
                sequence, NoText(), prompt, sampling=Sampling(), max_tokens=64, stop=(), end_ids=()
            )  # fmt: skip
            next(steps)

        yield row(size, "first token", tokens, mode, milliseconds(first))


def transformers(size: str) -> Iterator[dict[str, Any]]:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    layers, hidden, heads, ffn, _ = SIZES[size]
    config = Qwen3Config(
        hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=8,
        head_dim=128, vocab_size=151936, max_position_embeddings=40960, tie_word_embeddings=size != "8B",
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = Qwen3ForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    for what, lengths in (("prefill", LENGTHS), ("first token", FIRST_TOKEN_LENGTHS)):
        for tokens in lengths:
            ids = torch.tensor(ids_of(tokens)[None].astype(np.int64), device="cuda")

            def read(ids: Any = ids) -> None:
                with torch.no_grad():
                    int(model(ids, use_cache=True, logits_to_keep=1).logits[0, -1].argmax())

            yield row(size, what, tokens, "transformers bf16", milliseconds(read))
    torch.cuda.empty_cache()


def memory(tokens: int = 8192, answer: int = 256) -> dict[str, Any]:
    """The process's memory after a context of 0.6B is full, beside the plan. All weights are zero: files with a hole."""
    sys.path.insert(0, str(ROOT / "tests"))
    import checkpoints

    device = launch.cupy().cuda.Device()
    with tempfile.TemporaryDirectory() as scratch:
        folder, header, at = Path(scratch), {}, 0
        (folder / "config.json").write_text(json.dumps(checkpoints.config_json(checkpoints.SHAPE_0_6B)))
        checkpoints.write_tokenizer(folder, 151646)
        for name, shape in checkpoints.tensor_shapes(checkpoints.SHAPE_0_6B).items():
            size = 2 * int(np.prod(shape))
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
            at += size
        text = json.dumps(header).encode()
        with open(folder / "model.safetensors", "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + at)
        launch.release_memory()
        before = device.mem_info[0]
        with cuqwen.load(folder, device="cuda", max_context=tokens + answer) as model:
            loaded = device.mem_info[0]
            for step in model.stream(ids_of(tokens), max_tokens=answer, temperature=0.0):
                last = step
            model.logits(ids_of(16))
            used, plan = before - device.mem_info[0], model.memory_plan
        launch.release_memory()
        return {
            "plan": str(plan), "planned_bytes": plan.total, "weights_bytes": before - loaded, "used_bytes": used,
            "finish_reason": last.finish_reason, "percent_of_plan": round(100 * used / plan.total, 1),
            "left_after_close": before - device.mem_info[0],
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="0.6B,8B")
    parser.add_argument("--chunk", type=int, default=CHUNK["cuda"])
    parser.add_argument("--output", default="benchmarks/results/prefill.json")
    options = parser.parse_args()
    used, rows = memory(), []
    print(used, flush=True)
    for size in options.sizes.split(","):
        model = random_model(size)
        results = []
        for mode, exact in (("default", False), ("exact", True)):
            kv_dtype = np.float32 if exact else model.kv_dtype  # as `load` has it
            network = Qwen3(model.config, model.weights, model.device, kv_dtype, exact=exact, chunk=options.chunk)
            results.append(ours(size, network, mode))
        if importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
            results.append(transformers(size))
        for result in results:
            for line in result:
                rows.append(line)
                print("{size:5} {what:12} {tokens:6} {mode:18} {median:9.3f} ms {tokens_per_second:9,} tok/s, host {}".format(line.get("host"), **line), flush=True)  # fmt: skip
        del model, network, results, result
        gc.collect()
        launch.release_memory()
    write_record(options.output, {"chunk": options.chunk, "repeats": REPEATS, "memory": used, "rows": rows})


if __name__ == "__main__":
    main()
