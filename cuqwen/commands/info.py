"""`cuqwen info`: what a checkpoint is and what it needs, from config.json and the headers of its weight files."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING, Any

from cuqwen.commands import loading, terminal
from cuqwen.commands.figures import in_units

if TYPE_CHECKING:
    from cuqwen.config import Config
    from cuqwen.hub import Headers

PARTS = ("embedding", "attention", "feed-forward", "norms", "head")
CONTEXTS = (1024, 4096, 16384, 65536)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = """What a checkpoint is, how large its parts are, what memory it takes, and how fast this GPU can
    be with it at most. Only headers are read; of a hub id no weights are downloaded."""
    parser.add_argument(
        "model", metavar="ID|DIR|demo", help="a hub id, a checkpoint's folder, or the model in the package"
    )
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub id")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="cpu: measure no GPU")
    parser.add_argument(
        "--exact", action="store_true", help="tell of a cache in float32, as --exact keeps it elsewhere"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(given: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    from cuqwen import hub
    from cuqwen.config import Config

    folder, headers = hub.read_headers(given.model, revision=given.revision)
    config = Config.from_folder(folder)
    facts = describe(given.model, config, headers, exact=given.exact)
    if not given.json:
        terminal.use_utf8()
        terminal.write(_text(facts))
    speed = None if given.device == "cpu" else _speed(facts, required=given.device == "cuda")
    if given.json:
        terminal.write(json.dumps({**facts, "gpu": speed}, ensure_ascii=False) + "\n")
    elif speed:
        terminal.write(_speed_text(speed))


def describe(model: str, config: Config, headers: dict[str, Headers], *, exact: bool = False) -> dict[str, Any]:
    """All that headers tell, with the cache of `exact` or without. Raises CheckpointError where the tensors are not those
    that config.json asks for."""
    from cuqwen.cache import KVCache

    tensors = _checked(model, config, headers)
    parts = {part: {"parameters": 0, "bytes": 0} for part in PARTS}
    copies = 0
    for name, (_, shape, size) in tensors.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            copies = size  # 0.6B and 1.7B store the embedding twice
            continue
        part = parts[_part(name)]
        part["parameters"] += _product(shape)
        part["bytes"] += size
    weights = sum(part["bytes"] for part in parts.values())
    # a token reads all but the embedding, of which it needs one row, unless that is the head as well
    read = weights - (0 if config.tie_word_embeddings else parts["embedding"]["bytes"])
    per_token = KVCache.bytes_per_token(config, "float32" if exact else "float16")  # bfloat16 is as wide
    longest = config.context_length
    contexts = [context for context in CONTEXTS if context < longest] + [longest]
    return {
        "model": model,
        "architecture": dataclasses.asdict(config),
        "context": longest,
        "dtypes": sorted({dtype for dtype, _, _ in tensors.values()}),
        "files": len(headers),
        "parameters": sum(part["parameters"] for part in parts.values()),
        "parts": parts,
        "weight_bytes": weights,
        "duplicate_bytes": copies,
        "read_bytes_per_token": read,
        "cache_dtype": "float32" if exact else "bfloat16",
        "cache_bytes_per_token": per_token,
        "memory": [{"context": n, "cache_bytes": n * per_token, "bytes": weights + n * per_token} for n in contexts],
    }


def _checked(model: str, config: Config, headers: dict[str, Headers]) -> Headers:
    """The tensors by their full names, compared with those that the configuration has."""
    from cuqwen.config import CheckpointError
    from cuqwen.weights import expected_tensors

    expected = expected_tensors(config)
    tensors: Headers = {}
    for found in headers.values():
        for name, value in found.items():
            if not name.endswith("rotary_emb.inv_freq"):
                bare = name.startswith(("embed_tokens.", "layers.", "norm."))  # the Embedding checkpoints
                tensors[f"model.{name}" if bare else name] = value
    wrong = [f"{name} is missing" for name in expected if name not in tensors]
    wrong += [
        f"{name} is {list(tensors[name][1])}, wanted {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name][1] != shape
    ]
    wrong += [f"{name} is unexpected" for name in tensors if name not in expected and name != "lm_head.weight"]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(
            f"{model}: wanted the {len(expected)} tensors that config.json asks for, got others: {', '.join(wrong[:3])}{more}; "
            "download config.json and all *.safetensors of one dense Qwen checkpoint again"
        )
    return tensors


def _part(name: str) -> str:
    if name == "lm_head.weight":
        return "head"
    if "norm" in name:
        return "norms"
    return "embedding" if "embed_tokens" in name else "attention" if "self_attn" in name else "feed-forward"


def _product(shape: tuple[int, ...]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


def _speed(facts: dict[str, Any], *, required: bool) -> dict[str, Any] | None:
    """What this GPU's memory allows at each context; None without a GPU."""
    from cuqwen import launch
    from cuqwen.bandwidth import read_bandwidth

    with loading.hold_interrupts():
        if not required and not launch.has_gpu():
            return None
    device = launch.cupy().cuda.runtime.getDeviceProperties(launch.cupy().cuda.Device().id)
    bandwidth = read_bandwidth("cuda")
    free = launch.free_bytes()
    rates = [
        {
            "context": row["context"],
            "tokens_per_second": bandwidth / (facts["read_bytes_per_token"] + row["cache_bytes"]),
        }
        for row in facts["memory"]
        if row["bytes"] < free
    ]
    return {"name": device["name"].decode(), "read_bandwidth": bandwidth, "free_bytes": free, "at_most": rates}


def _text(facts: dict[str, Any]) -> str:
    a = facts["architecture"]
    copy = (
        f" ({in_units(facts['duplicate_bytes'])} more in the file: the head again)" if facts["duplicate_bytes"] else ""
    )
    tied = ", the embedding is the head" if a["tie_word_embeddings"] else ""
    yarn = f", stretched {a['rope_scaling']['factor']:g} times (YaRN)" if a["rope_scaling"] else ""
    lines = [
        f"{facts['model']}: {a['model_type']}, {facts['parameters']:,} parameters, {'/'.join(facts['dtypes'])}, "
        f"{in_units(facts['weight_bytes'])}{copy}",
        f"  layers        {a['num_hidden_layers']} of width {a['hidden_size']:,}, feed-forward {a['intermediate_size']:,}",
        f"  heads         {a['num_attention_heads']} for queries, {a['num_key_value_heads']} for keys and values, "
        f"{a['head_dim']} wide",
        f"  vocabulary    {a['vocab_size']:,}{tied}",
        f"  context       {facts['context']:,} tokens, rope_theta {a['rope_theta']:,.0f}{yarn}",
        "",
        f"  {'':14}{'parameters':>16}{'bytes':>12}",
    ]
    for part in PARTS:
        value = facts["parts"][part]
        size = in_units(value["bytes"]) if value["bytes"] else "-"
        lines.append(f"  {part:14}{value['parameters']:16,}{size:>12}")
    cache = f"cache ({facts['cache_dtype']})"
    lines += ["", f"  {'context':14}{cache:>16}{'with weights':>14}"]
    for row in facts["memory"]:
        lines.append(f"  {row['context']:<14,}{in_units(row['cache_bytes']):>16}{in_units(row['bytes']):>14}")
    lines += ["", f"  a token reads {in_units(facts['read_bytes_per_token'])} and the cache"]
    return "\n".join(lines) + "\n"


def _speed_text(speed: dict[str, Any]) -> str:
    head = f"  {speed['name']}: reads {in_units(speed['read_bandwidth'])}/s, {in_units(speed['free_bytes'])} free"
    lines = [f"{head}; so at most"]
    lines += [f"  {row['context']:<14,}{row['tokens_per_second']:10,.0f} tok/s" for row in speed["at_most"]]
    if not speed["at_most"]:
        lines.append("  nothing: the model does not fit into its memory")
    return "\n".join(lines) + "\n"
