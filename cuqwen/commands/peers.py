"""The same tests with transformers, where it is installed: the only place that imports PyTorch, and only when asked to."""

from __future__ import annotations

import importlib.util
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cuqwen.bench import SAMPLED, Case, Figures, bytes_per_token
from cuqwen.model import Qwen3


def load(folder: Path | None, network: Qwen3) -> Any:
    """transformers' model of a checkpoint, or one with random weights in the network's shape, where the network is: bf16 on
    a GPU, float32 on a CPU. None if PyTorch or transformers is missing."""
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        return None
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    place, dtype = ("cuda", torch.bfloat16) if network.device.name == "cuda" else ("cpu", torch.float32)
    if folder is not None:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        return model.to(place).eval()
    c = network.config
    config = transformers.Qwen3Config(
        hidden_size=c.hidden_size, intermediate_size=c.intermediate_size, num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads, num_key_value_heads=c.num_key_value_heads, head_dim=c.head_dim,
        vocab_size=c.vocab_size, max_position_embeddings=c.max_position_embeddings,
        tie_word_embeddings=c.tie_word_embeddings,
    )  # fmt: skip
    with torch.device(place):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def measure(model: Any, kind: str, network: Qwen3, n_ids: int, case: Case, repetitions: int) -> Figures:
    """kind: "eager", or "static" for `generate` with a static cache, which compiles the step with torch.compile (up to a
    minute, not counted; prompts are eager there too). Bytes as of `network`, cache and weights in the same types."""
    import torch

    rng = np.random.default_rng(0)
    ids = torch.tensor(rng.integers(0, n_ids, (1, max(1, case.depth) + case.n_prompt)), device=model.device)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice on settings that change what is computed
        runs = _prompts(model, ids, case) if case.n_prompt else _answers(model, ids, kind, case)
        next(runs)
        rates = tuple(next(runs) for _ in range(repetitions))
    return Figures(case, f"transformers {kind}", rates, bytes_per_token(network, case))


def _prompts(model: Any, ids: Any, case: Case) -> Iterator[float]:
    """Tokens a second of the last `n_prompt` ids; those before them are in the cache."""
    import transformers

    cache = transformers.DynamicCache(config=model.config)
    if case.depth:
        model(ids[:, : case.depth], past_key_values=cache, use_cache=True, logits_to_keep=1)
    while True:
        if cache.get_seq_length() > case.depth:
            cache.crop(-case.n_prompt)
        yield case.n_prompt / _seconds(
            model, lambda: model(ids[:, -case.n_prompt :], past_key_values=cache, use_cache=True, logits_to_keep=1)
        )


def _answers(model: Any, ids: Any, kind: str, case: Case) -> Iterator[float]:
    """Tokens a second of an answer, the time to its first token taken off."""
    settings: dict[str, Any] = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    if case.choice == "sampled":
        settings = {
            "do_sample": True,
            "temperature": SAMPLED.temperature,
            "top_k": SAMPLED.top_k,
            "top_p": SAMPLED.top_p,
        }
    if kind == "static":
        settings["cache_implementation"] = "static"

    def seconds(tokens: int) -> float:
        return _seconds(model, lambda: model.generate(
            input_ids=ids, attention_mask=ids.new_ones(ids.shape), max_new_tokens=tokens, min_new_tokens=tokens,
            pad_token_id=0, **settings,
        ))  # fmt: skip

    tokens = max(2, case.n_gen)
    while True:
        yield (tokens - 1) / max(seconds(tokens) - seconds(1), 1e-9)


def _seconds(model: Any, work: Callable[[], object]) -> float:
    import torch

    wait = torch.cuda.synchronize if model.device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start
