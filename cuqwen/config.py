"""What a checkpoint says about its model: `config.json` and `generation_config.json`, read strictly.

The rule, so that nothing which changes the mathematics is ever guessed:

1. `model_type` names the mathematics: what transformers' `Qwen3ForCausalLM` or `Qwen2ForCausalLM` computes. Every key
   which these classes read is read or checked here, in its old and its new spelling.
2. Such a key must be present. The exceptions are the five keys whose published class default is None, which
   transformers leaves out when it saves (checked with releases 4.37, 4.51, 4.57 and 5.23). None means:
     eos_token_id        the model names no end token
     dtype/torch_dtype   float32, the framework's own default; only a label here, as each tensor is read as stored
     rope_scaling        no scaling of the rotary angles (the original Qwen2 files predate the key); of its own keys,
                         those of YaRN that transformers makes optional may be absent or null as well
     layer_types         full attention, unless the sliding-window keys say otherwise (older files lack it)
     head_dim            hidden_size / num_attention_heads; for qwen2 only, whose class has no such field. qwen3 always
                         writes it, and the quotient would be wrong for 0.6B, 4B and 32B
3. A key which these classes do not read cannot change what they compute and is ignored (`initializer_range`,
   `transformers_version`, `use_cache`, …), but for a short list, `_MARKS`: keys by which other tools mark a checkpoint
   whose weights or layers are not those of the plain class although `model_type` still says so.
"""

import json
import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cuqwen.strict_json import DAMAGED, LARGEST_SIZE, PLAIN, CheckpointError, Keys, read_json, short
from cuqwen.yarn import Yarn, read_rope

_DTYPES = ("bfloat16", "float16", "float32")
_MOST_LAYERS = 10_000  # 64 is the most published; a bound keeps a broken file from asking for 1e12 tensor names
_UNQUANTISED = "Use the unquantised checkpoint (bfloat16, float16 or float32)"


# key -> (values which mean nothing special, what would work). See rule 3 above.
_MARKS: dict[str, tuple[tuple[Any, ...], str]] = {
    "quantization_config": ((None, {}), _UNQUANTISED),
    "quantization": ((None, {}), _UNQUANTISED),  # mlx-lm's spelling
    "compression_config": ((None, {}), _UNQUANTISED),
    "num_experts": ((None, 0), PLAIN),
    "num_local_experts": ((None, 0), PLAIN),
    "num_experts_per_tok": ((None, 0), PLAIN),
    "moe_intermediate_size": ((None, 0), PLAIN),
    "partial_rotary_factor": ((None, 1, 1.0), PLAIN),
    "use_mrope": ((None, False), PLAIN),
    "is_causal": ((None, True), PLAIN),  # transformers' attention masks do read this one
    "per_layer_config": ((None, {}), PLAIN),
    "pruned_heads": ((None, {}), PLAIN),
    "is_encoder_decoder": ((None, False), PLAIN),
    "add_cross_attention": ((None, False), PLAIN),
    "auto_map": ((None, {}), "Its mathematics is code of its own. " + PLAIN),
}


@dataclass(frozen=True)
class Config:
    """A dense Qwen3 or Qwen2/Qwen2.5 model. The fields are `config.json`'s keys; sizes are counts of elements."""

    model_type: str  # "qwen3" or "qwen2"
    hidden_size: int  # C
    intermediate_size: int  # F
    num_hidden_layers: int  # L
    num_attention_heads: int  # H
    num_key_value_heads: int  # K, divides H
    head_dim: int  # D, even
    vocab_size: int  # V, the rows of the embedding; the tokenizer may know fewer ids
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    dtype: str  # "bfloat16", "float16" or "float32": what the file declares; each tensor is read as stored
    eos_token_id: tuple[int, ...]  # may be empty
    rope_scaling: Yarn | None = None

    @property
    def context_length(self) -> int:
        """Most tokens that the model can have before it: max_position_embeddings, or what YaRN stretches the context to."""
        if self.rope_scaling is None:
            return self.max_position_embeddings
        return int(self.rope_scaling.factor * self.rope_scaling.original_max_position_embeddings)

    @property
    def has_qk_norm(self) -> bool:
        """Whether every head of q and k is RMS-normalised before the rotation (Qwen3)."""
        return self.model_type == "qwen3"

    @property
    def has_qkv_bias(self) -> bool:
        """Whether the q, k and v projections have a bias (Qwen2, Qwen2.5)."""
        return self.model_type == "qwen2"

    @classmethod
    def from_folder(cls, folder: Path) -> "Config":
        """Reads `folder`/config.json. Raises CheckpointError for anything which cannot be read or computed exactly."""
        folder = Path(folder)
        path = folder / "config.json"
        try:
            if folder.is_file():
                raise CheckpointError(f"{folder} is a file; wanted the checkpoint's folder. Pass {folder.parent}")
            if not folder.is_dir():
                raise CheckpointError(f"{folder}: no such folder; wanted a checkpoint's folder. Check the path")
            if not path.is_file():
                raise CheckpointError(f"{folder}: no config.json in this folder{describe_folder(folder)}")
        except OSError as error:
            raise CheckpointError(f"{folder}: cannot be read ({error.strerror}). Check its permissions") from error
        return cls.from_dict(read_json(path), str(path))

    @classmethod
    def from_dict(cls, d: dict[str, Any], where: str) -> "Config":
        """Checks the parsed config.json `d`; `where` is its path, for messages. Raises CheckpointError."""
        keys = Keys(d, where)
        model_type = keys.choice("model_type", ("qwen3", "qwen2"), PLAIN)
        for key, (harmless, remedy) in _MARKS.items():
            if key in d and not any(_same(d[key], value) for value in harmless):
                wanted = "no such key, " + " or ".join(json.dumps(value) for value in harmless)
                keys.fail(key, wanted, d[key], f"This is not computed here. {remedy}")
        keys.choice("hidden_act", ("silu",), PLAIN)
        if model_type == "qwen3" and keys.boolean("attention_bias"):  # the qwen2 class has no such field
            keys.fail("attention_bias", "false (Qwen3's projections have no bias)", True, PLAIN)
        layers = keys.integer("num_hidden_layers", at_most=_MOST_LAYERS)
        _refuse_sliding_window(keys, layers)
        hidden, heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
        kv_heads = keys.integer("num_key_value_heads")
        if heads % kv_heads:
            keys.fail("num_key_value_heads", f"a divisor of num_attention_heads = {heads}", kv_heads, DAMAGED)
        vocab_size = keys.integer("vocab_size")
        rope_theta, rope_scaling = read_rope(keys)
        return cls(
            model_type=model_type,
            hidden_size=hidden,
            intermediate_size=keys.integer("intermediate_size"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=_read_head_dim(keys, model_type, hidden, heads),
            vocab_size=vocab_size,
            max_position_embeddings=keys.integer("max_position_embeddings"),
            rms_norm_eps=keys.positive("rms_norm_eps"),
            rope_theta=rope_theta,
            tie_word_embeddings=keys.boolean("tie_word_embeddings"),
            dtype=_read_dtype(keys),
            eos_token_id=keys.token_ids("eos_token_id", vocab_size),
            rope_scaling=rope_scaling,
        )


@dataclass(frozen=True)
class GenerationConfig:
    """The sampling which a checkpoint recommends, and its end tokens. None: the file says nothing.

    Only these keys of `generation_config.json` are read; they are recommendations, so nothing of the model's
    mathematics depends on the others. `eos_token_id` and `repetition_penalty` always count, the others where `do_sample`
    is true.
    """

    eos_token_id: tuple[int, ...]
    do_sample: bool
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None

    @classmethod
    def from_folder(cls, folder: Path, config: Config) -> "GenerationConfig":
        """Reads `folder`/generation_config.json; without that file or its eos_token_id, the end tokens are config's.

        Raises CheckpointError, naming file and key, for broken JSON, wrong types and values out of range.
        """
        path = Path(folder) / "generation_config.json"
        keys = Keys(read_json(path) if path.exists() else {}, str(path))
        has_end = keys.values.get("eos_token_id") is not None
        return cls(
            eos_token_id=keys.token_ids("eos_token_id", config.vocab_size) if has_end else config.eos_token_id,
            # transformers' class default is false, and it leaves the key out when saving that
            do_sample=keys.values.get("do_sample") is not None and keys.boolean("do_sample"),
            temperature=_sampling_value(keys, "temperature"),
            top_k=_sampling_value(keys, "top_k"),
            top_p=_sampling_value(keys, "top_p"),
            min_p=_sampling_value(keys, "min_p"),
            repetition_penalty=_sampling_value(keys, "repetition_penalty"),
        )


# name -> (what is wanted, the test of a finite number). Shared by generation_config.json and by `Sampling`.
# top_p = 0 is refused, since peers disagree on it: some keep one token, some keep all.
SAMPLING_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "temperature": ("a number >= 0 (0 takes the most likely token)", lambda x: x >= 0),
    "top_k": ("an integer >= 0 (0 keeps all tokens)", lambda x: 0 <= x <= LARGEST_SIZE),
    "top_p": ("a number > 0 and <= 1 (1 keeps all tokens)", lambda x: 0 < x <= 1),
    "min_p": ("a number >= 0 and <= 1 (0 keeps all tokens)", lambda x: 0 <= x <= 1),
    "repetition_penalty": ("a number > 0 (1 changes nothing)", lambda x: x > 0),
    "presence_penalty": ("a number from -2 to 2 (0 changes nothing)", lambda x: -2 <= x <= 2),
    "frequency_penalty": ("a number from -2 to 2 (0 changes nothing)", lambda x: -2 <= x <= 2),
    "seed": ("an integer from 0 to 2^64 - 1", lambda x: 0 <= x < 2**64),
}


def check_sampling_value(name: str, value: Any) -> Any:
    """Returns `value` as a Python int (top_k, seed) or float (the others).

    Raises TypeError for something that is not a number (a bool is not), ValueError for one out of range or not finite.
    """
    wanted, in_range = SAMPLING_RANGES[name]
    whole = name in ("top_k", "seed")
    kind: Any = numbers.Integral if whole else numbers.Real  # NumPy's scalars count, its bool does not
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{name}: wanted {wanted}, got {short(value)} of type {type(value).__name__}")
    try:
        result = int(value) if whole else float(value)
    except OverflowError:  # an integer beyond float64
        result = math.inf
    if not abs(result) < math.inf or not in_range(result):  # the first is true for NaN
        raise ValueError(f"{name}: wanted {wanted}, got {short(value)}")
    return result


def describe_folder(folder: Path) -> str:
    """The end of a message about a folder which lacks something: what it is instead, and what would work."""
    names = sorted(entry.name for entry in folder.iterdir())
    if any(name.endswith(".gguf") for name in names):
        return ", but GGUF files (llama.cpp's format). Use the original checkpoint, with config.json and *.safetensors"
    if "adapter_config.json" in names:
        return ", but a LoRA adapter. Merge it into its base model and save that as safetensors"
    if any(name.endswith((".bin", ".pt", ".pth")) for name in names):
        return (
            ", but PyTorch pickle files. Convert them: load the folder with transformers' from_pretrained, "
            "then call save_pretrained on a new folder"
        )
    if "snapshots" in names:
        return ", but a hub cache entry. Pass the model's id, or one of the folders under snapshots/"
    if any(name.endswith(".safetensors") for name in names):
        return ", though it holds *.safetensors. Download config.json of the same checkpoint into it"
    got = f"it holds {_listed(names)}" if names else "it is empty"
    return f"; {got}. Wanted a checkpoint as the hub serves it: config.json, tokenizer.json and *.safetensors"


def _sampling_value(keys: Keys, key: str) -> Any:
    value = keys.values.get(key)
    try:
        return None if value is None else check_sampling_value(key, value)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{keys.where}: {error}. Correct this key, or remove it") from error


def _read_head_dim(keys: Keys, model_type: str, hidden: int, heads: int) -> int:
    if model_type == "qwen2" and keys.values.get("head_dim") is None:
        if hidden % heads:
            keys.fail("num_attention_heads", f"a divisor of hidden_size = {hidden}, as head_dim is not given", heads)
        head_dim, key = hidden // heads, "hidden_size / num_attention_heads, in place of head_dim"
    else:
        head_dim, key = keys.integer("head_dim"), "head_dim"
    if head_dim % 2:
        keys.fail(key, "an even number, since RoPE turns pairs", head_dim)
    return head_dim


def _read_dtype(keys: Keys) -> str:
    given = {key: keys.values[key] for key in ("dtype", "torch_dtype") if keys.values.get(key) is not None}
    for key in given:
        keys.choice(key, _DTYPES, _UNQUANTISED)
    if len(set(given.values())) > 1:
        keys.fail("torch_dtype", f"the same as dtype = {given['dtype']!r}", given["torch_dtype"])
    return next(iter(given.values()), "float32")


def _refuse_sliding_window(keys: Keys, layers: int) -> None:
    """A window is in use from layer max_window_layers on, where use_sliding_window is true and a window is given."""
    remedy = "Sliding-window attention is not computed here. Use a checkpoint with full attention in every layer"
    if keys.boolean("use_sliding_window") and keys.values.get("sliding_window") is not None:
        window, first = keys.integer("sliding_window"), keys.required("max_window_layers", "an integer >= 0")
        if type(first) is not int or first < 0:
            keys.fail("max_window_layers", "an integer >= 0", first)
        if first < layers:
            got = f"true, with sliding_window = {window} from layer {first} of {layers} on"
            raise CheckpointError(f"{keys.where}: use_sliding_window: wanted false, got {got}. {remedy}")
    types = keys.values.get("layer_types")
    if types is None:
        return
    if not isinstance(types, list) or len(types) != layers:
        got = f"a list of {len(types)}" if isinstance(types, list) else short(types)
        wanted = f"a list of num_hidden_layers = {layers} names"
        raise CheckpointError(f"{keys.where}: layer_types: wanted {wanted}, got {got}. {DAMAGED}")
    for i, name in enumerate(types):
        if name != "full_attention":
            keys.fail(f"layer_types[{i}]", '"full_attention"', name, remedy)


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and a == b  # so that 1 is not true and 0 is not false


def _listed(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
