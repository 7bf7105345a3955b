"""The truth of every test: Qwen3's and Qwen2's forward pass in float64, written from the published mathematics.

It shares no line with the package. It reads `config.json` and the safetensors files itself, keeps every number in
float64 (RoPE's frequencies and angles, norms, softmax), and goes in the published order, Q/K norm before RoPE:

    x = E[ids]
    per layer:  h = rmsnorm(x);  q, k, v = W h (+ b);  q, k = rope(norm(q)), rope(norm(k))
                x += W_o softmax(q kᵀ / sqrt(D) + causal mask) v
                h = rmsnorm(x);  x += W_down (silu(W_gate h) ⊙ W_up h)
    logits = W_head rmsnorm(x)

Letters: T tokens, L layers, C hidden size, H query heads, K key/value heads, D head size, F feed-forward size,
V vocabulary. `xp` is the array module: numpy, or cupy to run on a GPU, where one layer at a time is uploaded.
"""

import json
import math
from contextlib import ExitStack
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import safe_open


class Tensors:
    """The tensors of a checkpoint folder by name, widened to float64 where they will be used."""

    def __init__(self, folder, xp):
        self.xp = xp
        self.open_files = ExitStack()
        self.file_of = {}
        for path in sorted(Path(folder).glob("*.safetensors")):
            file = self.open_files.enter_context(safe_open(path, framework="np"))
            self.file_of.update(dict.fromkeys(file.keys(), file))

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.open_files.close()

    def _find(self, name):
        """The name as this checkpoint spells it: base-model checkpoints leave out `model.`; None if it is absent."""
        return next((n for n in (name, name.removeprefix("model.")) if n in self.file_of), None)

    def __contains__(self, name):
        return self._find(name) is not None

    def __getitem__(self, name):
        """Tensor `name` in float64. bf16 is moved as bits and widened at its destination: a quarter of the traffic."""
        stored_name = self._find(name)
        if stored_name is None:
            raise KeyError(f"{name} is in none of the checkpoint's files")
        array = self.file_of[stored_name].get_tensor(stored_name)
        if array.dtype == ml_dtypes.bfloat16:
            bits = self.xp.asarray(array.view(np.uint16)).astype(np.uint32)
            return (bits << 16).view(np.float32).astype(np.float64)
        return self.xp.asarray(array).astype(np.float64)


def rope_theta(config):
    """RoPE's base, in the old spelling (a key of its own) or the new one (inside `rope_parameters`)."""
    parameters = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or {}
    kinds = {d.get("rope_type", d.get("type", "default")) for d in (parameters, scaling)}
    if kinds != {"default"}:
        raise NotImplementedError(f"the truth knows no scaled RoPE, got {kinds}")
    return float(config["rope_theta"] if "rope_theta" in config else parameters["rope_theta"])


def rmsnorm(x, weight, eps, xp):
    """weight ⊙ x / sqrt(mean(x²) + eps) over the last axis."""
    return weight * (x / xp.sqrt((x * x).mean(axis=-1, keepdims=True) + eps))


def rope(x, cos, sin, xp):
    """Rotates the pairs (d, d + D/2) of x [T, heads, D] by the angles of cos, sin [T, D/2]."""
    first, second = xp.split(x, 2, axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return xp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def softmax(scores, xp):
    """Softmax over the last axis; -inf stands for a key that may not be seen."""
    e = xp.exp(scores - scores.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def attention(q, k, v, xp, matmul):
    """Causal attention: q [T, H, D], k and v [T, K, D] -> [T, H·D]. H/K query heads in a row share a key head."""
    n_tokens, n_heads, head_dim = q.shape
    n_kv_heads = k.shape[1]
    group = n_heads // n_kv_heads
    visible = xp.tri(n_tokens, dtype=bool)
    out = xp.empty((n_tokens, n_heads, head_dim), dtype=np.float64)
    for j in range(n_kv_heads):
        keys, values = k[:, j].copy(), v[:, j].copy()
        for h in range(j * group, (j + 1) * group):
            scores = matmul(q[:, h].copy(), keys.T) / math.sqrt(head_dim)
            out[:, h] = matmul(softmax(xp.where(visible, scores, -np.inf), xp), values)
    return out.reshape(n_tokens, n_heads * head_dim)


def truth_logits(folder, ids, xp=np, matmul=None):
    """Logits [T, V] in float64 (an array of `xp`) of the token ids [T] under the checkpoint in `folder`.

    `matmul` multiplies two float64 matrices; `xp.matmul` unless given (CuPy's own needs cuBLAS).
    """
    config = json.loads((Path(folder) / "config.json").read_text())
    if config["model_type"] not in ("qwen2", "qwen3"):
        raise NotImplementedError(f"the truth knows qwen2 and qwen3, got {config['model_type']}")
    matmul = matmul or xp.matmul
    ids = np.asarray(ids)
    n_heads, n_kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // n_heads
    eps = config["rms_norm_eps"]

    frequencies = rope_theta(config) ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    angles = np.arange(len(ids), dtype=np.float64)[:, None] * frequencies
    cos, sin = xp.asarray(np.cos(angles)), xp.asarray(np.sin(angles))

    with Tensors(folder, xp) as tensors:
        embed_tokens = tensors["model.embed_tokens.weight"]
        x = embed_tokens[xp.asarray(ids)]
        for layer in range(config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}."

            def project(x, name, heads, prefix=prefix):
                y = matmul(x, tensors[prefix + f"self_attn.{name}_proj.weight"].T)
                if prefix + f"self_attn.{name}_proj.bias" in tensors:
                    y = y + tensors[prefix + f"self_attn.{name}_proj.bias"]
                y = y.reshape(len(ids), heads, head_dim)
                if prefix + f"self_attn.{name}_norm.weight" in tensors:
                    y = rmsnorm(y, tensors[prefix + f"self_attn.{name}_norm.weight"], eps, xp)
                return y

            h = rmsnorm(x, tensors[prefix + "input_layernorm.weight"], eps, xp)
            q = rope(project(h, "q", n_heads), cos, sin, xp)
            k = rope(project(h, "k", n_kv_heads), cos, sin, xp)
            v = project(h, "v", n_kv_heads)
            x = x + matmul(attention(q, k, v, xp, matmul), tensors[prefix + "self_attn.o_proj.weight"].T)

            h = rmsnorm(x, tensors[prefix + "post_attention_layernorm.weight"], eps, xp)
            gate = matmul(h, tensors[prefix + "mlp.gate_proj.weight"].T)
            up = matmul(h, tensors[prefix + "mlp.up_proj.weight"].T)
            x = x + matmul(gate / (1 + xp.exp(-gate)) * up, tensors[prefix + "mlp.down_proj.weight"].T)

        x = rmsnorm(x, tensors["model.norm.weight"], eps, xp)
        lm_head = embed_tokens if config["tie_word_embeddings"] else tensors["lm_head.weight"]
        return matmul(x, lm_head.T)
