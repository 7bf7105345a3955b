"""Small random checkpoints for the tests, the same on every machine, and the big one for the GPU runs.

`write(folder, spec)` needs NumPy and safetensors only. Its numbers come from PCG64's raw bits by integer sums and
single IEEE divisions, so they are the same bits under every NumPy and on every processor, and golden files made
from them stay valid. `save_with_transformers(folder, spec)` has transformers initialise and save the same architecture.
`write_0_6b` writes a random checkpoint of Qwen3-0.6B's shape.
"""

import hashlib
import importlib.util
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "cuqwen" / "demo"
HELD_OUT_TEXT = ROOT / "tests" / "data" / "heldout.txt"  # not seen in the training of the demo
REAL_TOKENIZER = ROOT.parent / "shared" / "data" / "qwen3-tokenizer"
LARGEST_K_GAIN = 96.5  # the largest K-norm gain of Qwen3-0.6B; exact in bf16 and f16
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


@dataclass(frozen=True)
class Spec:
    """One checkpoint: the architecture in config.json's own keys, then how it is stored."""

    name: str
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    model_type: str = "qwen3"
    num_hidden_layers: int = 2
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 512
    dtype: str = "bfloat16"
    k_gains: str = "heavy"
    old_spelling: bool = True  # rope_theta, rope_scaling and torch_dtype; otherwise rope_parameters and dtype
    shards: int = 1
    redundant_lm_head: bool = False
    model_prefix: bool = True


# H/K is 1, 2, 4, 5 and 8; H·D differs from C wherever head_dim is a key of its own (qwen2 has none, so there H·D = C)
SPECS = {
    spec.name: spec
    for spec in (
        Spec("tied_redundant_head", 4, 2, 16, 48, 100, 517, num_hidden_layers=3, redundant_lm_head=True),
        Spec(
            "untied_sharded_f32", 3, 3, 32, 64, 120, 301, tie_word_embeddings=False, shards=3, dtype="float32",
            old_spelling=False, rope_theta=5e6,
        ),
        Spec("no_prefix_f16", 8, 2, 8, 48, 104, 333, model_prefix=False, dtype="float16", rope_theta=1e4),
        Spec("eight_per_kv_head", 8, 1, 32, 72, 136, 389, tie_word_embeddings=False, rms_norm_eps=1e-5),
        Spec("head_64_large_eps", 2, 1, 64, 96, 200, 401, rms_norm_eps=1e-2, k_gains="ordinary", old_spelling=False),
        Spec("head_128", 4, 2, 128, 48, 100, 277, old_spelling=False),
        Spec("qwen2_bias", 5, 1, 16, 80, 160, 311, model_type="qwen2", num_hidden_layers=3),
        Spec(
            "qwen2_untied_sharded_f16", 4, 2, 16, 64, 128, 293, model_type="qwen2", tie_word_embeddings=False, shards=2,
            dtype="float16", old_spelling=False,
        ),
    )
}  # fmt: skip

SHAPE_0_6B = Spec(
    "qwen3_0_6b", 16, 8, 128, 1024, 3072, 151936, num_hidden_layers=28, max_position_embeddings=40960
)  # fmt: skip


# --- random numbers ------------------------------------------------------------------------------------------------


class Random:
    """Numbers that are the same bits everywhere: NumPy promises PCG64's raw stream, not `Generator`'s methods."""

    def __init__(self, seed):
        self.bits = np.random.PCG64(seed)

    def _uint16(self, n):
        return self.bits.random_raw(-(-n // 4)).astype("<u8").view("<u2")[:n]

    def normal(self, shape, std=1.0, mean=0.0):
        """Nearly normal: the sum of twelve uniform numbers has variance 1. Summed as integers, hence exact."""
        n = int(np.prod(shape))
        sums = self._uint16(12 * n).reshape(n, 12).astype(np.int64).sum(axis=1)
        return ((sums - 12 * 65535 // 2) / 65536 * std + mean).reshape(shape)

    def k_gains(self, n, kind):
        """Gains of a K norm: near 1, or with density ~ 1/g² up to 96.5 (median 2, every tenth above 9)."""
        if kind == "ordinary":
            return self.normal(n, 0.1, 1.0)
        gains = 1 / (self._uint16(n) / 65536 + 1 / LARGEST_K_GAIN)
        gains[int(self._uint16(1)[0]) % n] = LARGEST_K_GAIN
        return gains


# --- config and tensors --------------------------------------------------------------------------------------------


def config_json(spec):
    """config.json's content."""
    keys = (
        "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps",
        "tie_word_embeddings",
    )  # fmt: skip
    config = {key: getattr(spec, key) for key in keys}
    family = spec.model_type.capitalize()
    config |= {
        "architectures": [family + ("ForCausalLM" if spec.model_prefix else "Model")],
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": spec.num_hidden_layers,
        "bos_token_id": spec.vocab_size - 3,
        "eos_token_id": spec.vocab_size - 1,
        "use_cache": True,
    }
    if spec.model_type == "qwen2":
        assert spec.num_attention_heads * spec.head_dim == spec.hidden_size, "qwen2 has no head_dim key"
        del config["head_dim"]
    else:
        config["attention_bias"] = False
    if spec.old_spelling:
        return config | {"rope_theta": spec.rope_theta, "rope_scaling": None, "torch_dtype": spec.dtype}
    rope_parameters = {"rope_type": "default", "rope_theta": spec.rope_theta}
    return config | {"rope_parameters": rope_parameters, "dtype": spec.dtype}


def tensor_shapes(spec):
    """Name -> shape of every tensor of the architecture (lm_head only when untied), with the `model.` prefix."""
    c, f, d = spec.hidden_size, spec.intermediate_size, spec.head_dim
    q, kv = spec.num_attention_heads * d, spec.num_key_value_heads * d
    shapes = {"model.embed_tokens.weight": (spec.vocab_size, c)}
    for layer in range(spec.num_hidden_layers):
        own = {"input_layernorm.weight": (c,)}
        own |= {f"self_attn.{name}_proj.weight": (n, c) for name, n in (("q", q), ("k", kv), ("v", kv))}
        if spec.model_type == "qwen2":
            own |= {f"self_attn.{name}_proj.bias": (n,) for name, n in (("q", q), ("k", kv), ("v", kv))}
        else:
            own |= {"self_attn.q_norm.weight": (d,), "self_attn.k_norm.weight": (d,)}
        own |= {"self_attn.o_proj.weight": (c, q), "post_attention_layernorm.weight": (c,)}
        own |= {"mlp.gate_proj.weight": (f, c), "mlp.up_proj.weight": (f, c), "mlp.down_proj.weight": (c, f)}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in own.items()}
    shapes["model.norm.weight"] = (c,)
    if not spec.tie_word_embeddings:
        shapes["lm_head.weight"] = (spec.vocab_size, c)
    return shapes


def tensors(spec, seed=0):
    """Name -> array of the stored type, drawn so that every part of the network matters."""
    random = Random([seed, *spec.name.encode()])
    arrays = {}
    for name, shape in tensor_shapes(spec).items():
        if name.endswith("k_norm.weight"):
            values = random.k_gains(shape[0], spec.k_gains)
        elif name.endswith("norm.weight"):
            values = random.normal(shape, 0.2, 1.0)
        elif name.endswith("bias"):
            values = random.normal(shape, 2.0)  # Qwen2.5's biases are large beside its projections
        elif name in ("model.embed_tokens.weight", "lm_head.weight"):
            values = random.normal(shape, 0.5)
        else:
            values = random.normal(shape, 0.125)
        arrays[name] = values.astype(DTYPES[spec.dtype])
    return arrays


# --- inputs and measures -------------------------------------------------------------------------------------------


def token_sequences(vocab_size, n=4, length=64):
    """`n` sequences of random ids, the same on every machine: int64 [n, length]."""
    return (np.random.PCG64(vocab_size).random_raw(n * length) % vocab_size).astype(np.int64).reshape(n, length)


def demo_encode(text):
    """Token ids of `text` by the demo's own tokenizer."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(DEMO / "tokenizer.json")).encode(text, add_special_tokens=False).ids


def heldout_sequences(n=2, length=256):
    """The first ids of the held-out text, as the demo's tokenizer gives them: int64 [n, length]."""
    ids = demo_encode(HELD_OUT_TEXT.read_text(encoding="utf-8"))
    if len(ids) < n * length:
        raise ValueError(f"{HELD_OUT_TEXT} holds {len(ids)} tokens, {n} x {length} are wanted")
    return np.array(ids[: n * length]).reshape(n, length)


def demo_prompts():
    """Token ids of the prompts whose greedy continuations are compared."""
    return [demo_encode(text) for text in ("In the beginning", "And the king said", "1")]


def relative_error(arrays, truths):
    """||x - t|| / ||t|| over all arrays together. A norm, since the largest single difference is a matter of luck."""
    squares = [(np.sum((x - t) ** 2), np.sum(np.square(t))) for x, t in zip(arrays, truths, strict=True)]
    return float(np.sqrt(sum(s for s, _ in squares) / sum(s for _, s in squares)))


# --- writing -------------------------------------------------------------------------------------------------------


def write(folder, spec, seed=0):
    """Writes the checkpoint `spec` (config, weights, generation config, tokenizer) and returns its folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = tensors(spec, seed)
    if spec.redundant_lm_head:
        arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"].copy()
    if not spec.model_prefix:
        arrays = {name.removeprefix("model."): array for name, array in arrays.items()}
    _write_weights(folder, arrays, spec.shards)
    _write_json(folder / "config.json", config_json(spec))
    _write_json(folder / "generation_config.json", {"eos_token_id": [spec.vocab_size - 1], "do_sample": False})
    write_tokenizer(folder, spec.vocab_size)
    return folder


def _write_json(path, content):
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_weights(folder, arrays, shards):
    """One model.safetensors, or an index and `shards` files of about as many tensors each."""
    if shards == 1:
        save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(arrays)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        own = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        save_file({name: arrays[name] for name in own}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(own, file)
    total_size = sum(array.nbytes for array in arrays.values())
    _write_json(
        folder / "model.safetensors.index.json", {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    )


def fingerprint(folder):
    """sha256 over names, types, shapes and bytes of the weights: the same for the same checkpoint, however written."""
    arrays = {}
    for file in Path(folder).glob("*.safetensors"):
        arrays |= load_file(file)
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype.name} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8))
    return digest.hexdigest()


def byte_alphabet():
    """The 256 characters by which byte-level BPE writes bytes 0..255: printable ones stand for themselves."""
    itself = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in itself else chr(next(others)) for byte in range(256)]


def write_tokenizer(folder, n_ids):
    """A byte-level BPE tokenizer.json of `n_ids` ids: 256 bytes, made-up words that no text encodes to, 3 specials."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = [f"\u0120w{i}" for i in range(n_ids - 256 - len(specials))]
    vocab = {token: i for i, token in enumerate(byte_alphabet() + words)}
    added = [
        {
            "id": len(vocab) + i, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": True,
        }
        for i, token in enumerate(specials)
    ]  # fmt: skip
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "vocab": vocab, "merges": [],
        },
    }  # fmt: skip
    Path(folder, "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    _write_json(Path(folder, "tokenizer_config.json"), {"tokenizer_class": "Qwen2Tokenizer", "eos_token": specials[2]})


# --- by transformers -----------------------------------------------------------------------------------------------


def has_transformers():
    return all(importlib.util.find_spec(name) is not None for name in ("torch", "transformers"))


def _transformers_model(spec, seed, device="cpu", initializer_range=0.125):
    """A model as transformers initialises it, in the stored type, with the wanted K-norm gains (and biases)."""
    import torch
    import transformers

    config = config_json(spec)
    config |= {"rope_parameters": {"rope_type": "default", "rope_theta": spec.rope_theta}}
    config |= {"dtype": spec.dtype, "initializer_range": initializer_range}
    for key in ("model_type", "architectures", "rope_theta", "rope_scaling", "torch_dtype"):
        config.pop(key, None)
    family = spec.model_type.capitalize()
    model_class = getattr(transformers, family + "ForCausalLM")
    torch.manual_seed(seed)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, spec.dtype))
    try:
        with torch.device(device):
            model = model_class(getattr(transformers, family + "Config")(**config))
    finally:
        torch.set_default_dtype(previous)

    random = Random([seed, *spec.name.encode()])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("k_norm.weight"):
                parameter.copy_(torch.from_numpy(random.k_gains(len(parameter), spec.k_gains)))
            elif name.endswith("q_norm.weight"):
                parameter.copy_(torch.from_numpy(random.normal(len(parameter), 0.1, 1.0)))
            elif name.endswith("bias"):
                parameter.copy_(torch.from_numpy(random.normal(len(parameter), 2.0)))
    return model


def save_with_transformers(folder, spec, seed=0):
    """The architecture of `spec`, initialised and saved by transformers, in its own spelling; returns the folder."""
    folder = Path(folder)
    model = _transformers_model(spec, seed)
    # as Qwen3-Embedding was saved: the base model alone, whose tensors carry no prefix
    to_save = model if spec.model_prefix else model.base_model
    size = sum(p.numel() * p.element_size() for p in to_save.parameters())
    to_save.save_pretrained(folder, max_shard_size=f"{size // spec.shards // 1000 + 1}KB" if spec.shards > 1 else "5GB")
    write_tokenizer(folder, spec.vocab_size)
    return folder


def transformers_logits(folder, sequences, dtype):
    """Logits of transformers, loaded from disk in `dtype` ("float32", …): a float64 array [T, V] per sequence.

    Loaded in the wanted type because casting a loaded module also rounds its RoPE buffers. Even in float64,
    transformers computes norms and RoPE's angles in float32.
    """
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    with torch.no_grad():
        return [model(torch.tensor([list(ids)])).logits[0].double().numpy() for ids in sequences]


def transformers_greedy(folder, ids, max_tokens):
    """The ids that transformers appends greedily in float32, up to and including the first end id."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    eos_token_id = model.generation_config.eos_token_id
    model.generation_config = transformers.GenerationConfig(eos_token_id=eos_token_id, pad_token_id=0)  # not the file's
    prompt = torch.tensor([list(ids)])
    with torch.no_grad():
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=max_tokens, do_sample=False)
    return out[0, len(ids) :].tolist()


# --- Qwen3-0.6B's shape --------------------------------------------------------------------------------------------


def write_0_6b(folder, k_gains="ordinary", seed=0):
    """A random checkpoint of Qwen3-0.6B's full shape (1.2 GB of bf16), as transformers would initialise it.

    k_gains: "ordinary" (1 ± 0.1) or "heavy" (up to 96.5 in every layer). Initialised and saved by transformers where it
    is installed (on the GPU if there is one), by NumPy otherwise. With Qwen3's tokenizer if it is at hand,
    otherwise with a synthetic one of as many ids. Returns the folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    spec = Spec(**{**SHAPE_0_6B.__dict__, "k_gains": k_gains})
    if has_transformers():
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = _transformers_model(spec, seed, device, initializer_range=0.02)
        model.config.bos_token_id, model.config.eos_token_id = 151643, 151645
        model.generation_config.bos_token_id = 151643
        model.generation_config.eos_token_id = [151645, 151643]
        model.save_pretrained(folder)
    else:
        save_file(_initialised(spec, seed), folder / "model.safetensors", metadata={"format": "pt"})
        _write_json(folder / "config.json", config_json(spec) | {"bos_token_id": 151643, "eos_token_id": 151645})
        _write_json(folder / "generation_config.json", {"eos_token_id": [151645, 151643], "do_sample": False})
    if REAL_TOKENIZER.is_dir():
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(REAL_TOKENIZER / file, folder / file)
    else:
        write_tokenizer(folder, 151646)  # ids end where Qwen3's three specials of the same names stand
    return folder


def _initialised(spec, seed):
    """The tensors of `spec` with the initial values that transformers gives: std 0.02, norms at 1 but for Q and K."""
    generator = np.random.Generator(np.random.SFC64(seed))
    random = Random([seed, *spec.name.encode()])
    arrays = {}
    for name, shape in tensor_shapes(spec).items():
        if name.endswith("k_norm.weight"):
            values = random.k_gains(shape[0], spec.k_gains)
        elif name.endswith("q_norm.weight"):
            values = random.normal(shape, 0.1, 1.0)
        elif name.endswith("norm.weight"):
            values = np.ones(shape)
        else:
            values = generator.standard_normal(shape, dtype=np.float32) * np.float32(0.02)
        arrays[name] = values.astype(ml_dtypes.bfloat16)
    return arrays
