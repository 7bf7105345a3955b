"""Plants faults one at a time and says which test notices each: proof that the tests can fail.

    python tools/mutation_check.py                      # all, one after another
    python tools/mutation_check.py --jobs 2             # two at a time
    python tools/mutation_check.py --list               # names, files and tests
    python tools/mutation_check.py --only rope-base attention-scale

A fault is a mistake that someone could make, written as an exact replacement of text in one file of a copy of this
checkout in a temporary folder; the checkout itself is not touched. The tests named with it must pass on the unchanged copy
and one of them must fail on the changed one. No GPU is needed: kernels run on the CPU, which takes a C++ compiler.

Exit status: 0 if every fault was noticed; 1 if one survived or its tests were skipped; 2 if the check itself is wrong: a
text that is not found exactly once, a test that fails without the fault, a fault that does not compile.
"""

from __future__ import annotations

import argparse
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = (".git", "build", "dist", "venv", ".venv", "__pycache__", ".*_cache", ".hypothesis", "*.egg-info", "results")
TIME_LIMIT = 600  # seconds for the tests of one fault
# What a fault that is no plausible bug, but a mistake in the table below, makes a test say
NO_FAULT = re.compile(r"SyntaxError|IndentationError|NameError|UnboundLocalError|RuntimeError: \S*(g\+\+|clang|zig)")


class ToolError(Exception):
    """The check cannot be trusted as it stands."""


@dataclass(frozen=True)
class Fault:
    """One mistake: in `file` each text of `edits` is replaced; one of `tests` (pytest's node ids) must notice."""

    name: str
    file: str
    edits: tuple[tuple[str, str], ...]
    tests: tuple[str, ...]


@dataclass(frozen=True)
class Result:
    fault: Fault
    noticed: bool
    by: str  # the test that failed, or why none did
    seconds: float


FAULTS: list[Fault] = []


def fault(name: str, file: str, old: str, new: str, *tests: str, also: Sequence[tuple[str, str]] = ()) -> None:
    """Adds to the table. A test is written `file::test` without `tests/test_` and `test_`."""
    nodes = tuple("tests/test_" + test.replace("::", ".py::test_", 1) for test in tests)
    FAULTS.append(Fault(name, file, ((old, new), *also), nodes))


def bf16(value: str) -> str:
    """CUDA for `value` rounded to bf16 and back."""
    return f"__bfloat162float(__float2bfloat16_rn({value}))"


# fmt: off
# --- kernels: statistics, sums, stores -----------------------------------------------------------------------------

RMSNORM, COMMON, DOT = "kernels/rmsnorm.cu", "kernels/common.cuh", "kernels/dot.cuh"
SCALES, ZERO_ROWS = "ops::rmsnorm_extreme_scales_and_gains", "ops::rmsnorm_constant_and_zero_rows"
ROOT_MEAN = "sqrtf(block_sum(sum, scratch) / C + eps)"

fault("kernel-eps-outside-root", RMSNORM, ROOT_MEAN, "(sqrtf(block_sum(sum, scratch) / C) + eps)", SCALES)
fault("kernel-eps-dropped", RMSNORM, ROOT_MEAN, "sqrtf(block_sum(sum, scratch) / C)", ZERO_ROWS)
fault("kernel-eps-1e-5", RMSNORM, ROOT_MEAN, "sqrtf(block_sum(sum, scratch) / C + 1e-5f)", SCALES)
fault("kernel-gain-plus-one", RMSNORM, "* to_float(weight[c])", "* (1.0f + to_float(weight[c]))", "ops::rmsnorm")
fault(
    "kernel-rounded-before-gain", RMSNORM, "store(out + c, to_float(x[c]) * scale * to_float(weight[c]));",
    "{ OUT_TYPE r; store(&r, to_float(x[c]) * scale); store(out + c, to_float(r) * to_float(weight[c])); }",
    "ops::rmsnorm_types",
)
fault("rmsnorm-bf16-sum", RMSNORM, "sum = fmaf(a, a, sum);", f"sum = {bf16('fmaf(a, a, sum)')};", "ops::rmsnorm")
fault(
    "store-truncates-bf16", COMMON, "__float2bfloat16_rn(x);",
    "__float2bfloat16_rn(__uint_as_float(__float_as_uint(x) & 0xffff0000u));", "ops::rmsnorm_types",
)
fault(
    "store-truncates-f16", COMMON, "__float2half_rn(x);",
    "__float2half_rn(__uint_as_float(__float_as_uint(x) & 0xffffe000u));", "ops::rmsnorm_types",
)
fault(
    "load8-halves-swapped", COMMON, "v[2 * i] = __uint", "v[2 * i + 1] = __uint", "ops::matmul",
    also=[("v[2 * i + 1] = __uint_as_float(pairs[i] & 0xf", "v[2 * i] = __uint_as_float(pairs[i] & 0xf")],
)
fault(
    "warp-sum-half-a-warp", COMMON, "int offset = 16; offset; offset >>= 1) x +=",
    "int offset = 8; offset; offset >>= 1) x +=", "ops::rmsnorm",
)
fault("block-sum-last-warp", COMMON, "lane < warps ?", "lane < warps - 1 ?", "ops::rmsnorm")
fault("block-sum-barrier", COMMON, "scratch[warp] = x;\n    __syncthreads();", "scratch[warp] = x;", "ops::rmsnorm")

fault("dot-bf16-sum", DOT, "sum = fmaf(a[i], b[i], sum);", f"sum = {bf16('fmaf(a[i], b[i], sum)')};", "ops::matmul")
fault("dot-last-chunk", DOT, "c < C; c += 256", "c < C / 256 * 256; c += 256", "ops::matmul")
fault("dot-tail", DOT, "c < C; c += 32", "c < C / 32 * 32; c += 32", "ops::matmul")
fault("dot-parts-overlap", DOT, "int c = 8 * lane + 256 * part;", "int c = 8 * lane;", "ops::matmul")
fault("tile-tail", DOT, "c0 < C; c0 += DEPTH", "c0 + DEPTH <= C; c0 += DEPTH", "ops::matmul")
fault(
    "tile-bf16-sum", DOT, "acc[i][j] = fmaf(a[i], b[j], acc[i][j]);",
    f"acc[i][j] = {bf16('fmaf(a[i], b[j], acc[i][j])')};", "ops::matmul",
)
fault("tile-bf16-activations", DOT, "x[(size_t)row * C + c] :", f"{bf16('x[(size_t)row * C + c]')} :", "ops::matmul")
fault("tile-barrier-before-use", DOT, "        __syncthreads();\n#pragma unroll 8", "#pragma unroll 8", "ops::matmul")
fault(
    "tile-barrier-after-use", DOT, "        }\n        __syncthreads();\n    }\n}", "        }\n    }\n}",
    "ops::matmul",
)
fault(
    "tile-reads-past-the-last-row", DOT, "row < T && c < C ?", "c < C ?",
    "emulator::all_operations_under_the_sanitizers",
)

MATMUL, RESIDUAL = "kernels/matmul.cu", "ops::matmul_residual_in_place"
fault("matmul-residual-dropped", MATMUL, "residual ? sum + residual[at] : sum;", "sum;", RESIDUAL)
fault("matmul-residual-twice", MATMUL, "? acc[i][j] + residual[at]", "? acc[i][j] + 2.0f * residual[at]", RESIDUAL)
fault("matmul-last-part", MATMUL, "part < parts; part++", "part < parts - 1; part++", "ops::matmul")
fault("matmul-barrier", MATMUL, "    __syncthreads();\n    const int mine", "    const int mine", "ops::matmul")
fault("matmul-one-output-too-many", MATMUL, "|| mine >= N)", "|| mine > N)", "ops::matmul")
fault("matmul-tile-edge", MATMUL, "if (t >= T || n >= N)", "if (t >= T)", "ops::matmul")
fault(
    "matmul-alignment-unchecked", MATMUL, "C % 8 == 0 && ((size_t)x | (size_t)weight) % 16 == 0", "C % 8 == 0",
    "ops::arrays_that_start_anywhere",
)

# --- kernels: projections, rotation, per-head norm -----------------------------------------------------------------

QKV, QKV_TEST, ORDER = "kernels/qkv_rope.cu", "ops::qkv_rope", "ops::the_two_steps_equal_the_published_order"
ROW_GAIN = "    if (head.gain) low *= head.gain[d], high *= head.gain[d + D / 2];\n"
TILE_GAIN = "                if (head.gain) acc[i][j] *= head.gain[d], acc[i][j + 2] *= head.gain[d + D / 2];\n"
TILE_ROTATE = "                rotate(acc[i][j], acc[i][j + 2], d, positions[t], cos, sin, P);\n"
IN_CACHE = "ops::qkv_rope_writes_rows_of_a_cache"
SQUARES = "block_sum(d < D ? a[d] * a[d] : 0.0f, scratch)"
GAINED_SQUARES = "block_sum(d < D ? a[d] * a[d] * (head.gain ? head.gain[d] * head.gain[d] : 1.0f) : 0.0f, scratch)"

fault(
    "kernel-alignment-unchecked", QKV, "C % 8 == 0 && ((size_t)x | (size_t)head.proj) % 16 == 0", "C % 8 == 0",
    "ops::arrays_that_start_anywhere",
)
fault(
    "kernel-rotation-sign", QKV, "low = a * c - b * s;", "low = a * c + b * s;", QKV_TEST,
    also=[("high = b * c + a * s;", "high = b * c - a * s;")],
)
fault(
    "kernel-pairs-interleaved", QKV, "float low = a[d], high = a[d + D / 2];",
    "float low = a[2 * d], high = a[2 * d + 1];", QKV_TEST,
    also=[
        (ROW_GAIN, "    if (head.gain) low *= head.gain[2 * d], high *= head.gain[2 * d + 1];\n"),
        ("STORE(t, d, low);", "STORE(t, 2 * d, low);"),
        ("STORE(t, d + D / 2, high);", "STORE(t, 2 * d + 1, high);"),
    ],
)
fault(
    "kernel-gain-after-rope", QKV, ROW_GAIN, "", QKV_TEST, ORDER,
    also=[("    STORE(t, d, low);\n", ROW_GAIN + "    STORE(t, d, low);\n")],
)
fault("kernel-gain-after-rope-tile", QKV, TILE_GAIN + TILE_ROTATE, TILE_ROTATE + TILE_GAIN, QKV_TEST, ORDER)
fault("kernel-k-gain-dropped", QKV, "k_bias, k_norm, k_rows", "k_bias, nullptr, k_rows", QKV_TEST)
fault("kernel-mean-square-of-gained", QKV, SQUARES, GAINED_SQUARES, QKV_TEST, ORDER)
fault(
    "kernel-mean-square-barrier", QKV, "        __syncthreads();\n        for (int row", "        for (int row",
    QKV_TEST,
)
fault("kernel-head-barrier", QKV, "    }\n    __syncthreads();\n    const int d", "    }\n    const int d", QKV_TEST)
fault("kernel-position-of-the-call", QKV, "rotate(low, high, d, positions[t],", "rotate(low, high, d, t,", QKV_TEST)
fault(
    "kernel-position-plus-one", QKV, "acc[i][j + 2], d, positions[t],", "acc[i][j + 2], d, positions[t] + 1,", QKV_TEST,
)
fault("kernel-bias-of-k-for-v", QKV, "{v_proj, v_bias,", "{v_proj, k_bias,", QKV_TEST)
fault("kernel-k-rounded-before-norm", QKV, "store(k + at, (value));", f"store(k + at, {bf16('value')});", QKV_TEST)
fault(
    "kernel-row-beyond-the-cache", QKV, "(row < 0 || row >= S)) break;", "row < 0) break;",
    "ops::rows_beyond_the_cache",
)
fault(
    "kernel-k-in-the-wrong-row", QKV, "head.rows ? head.rows[t] : (t);", "(t);",
    "model::kernels_compute_what_the_reference_computes[emulated-qwen2_bias]",
)

QK_NORM, MODEL_KERNELS = "kernels/qk_norm.cu", "model::kernels_compute_what_the_reference_computes[emulated-head_128]"
HEAD_ROOT = "sqrtf((is_q ? q_ms : k_ms)[head] + eps)"
fault("head-eps-outside-root", QK_NORM, HEAD_ROOT, "(sqrtf((is_q ? q_ms : k_ms)[head]) + eps)", "ops::qk_norm")
fault("head-eps-dropped", QK_NORM, HEAD_ROOT, "sqrtf((is_q ? q_ms : k_ms)[head])", "ops::qk_norm")
fault("head-mean-square-of-q", QK_NORM, "(is_q ? q_ms : k_ms)[head]", "q_ms[head]", "ops::qk_norm")
fault("head-one-too-many", QK_NORM, "is_q = h < H;", "is_q = h <= H;", MODEL_KERNELS)
fault("head-row-beyond-the-cache", QK_NORM, "(row < 0 || row >= S)", "row < 0", "ops::rows_beyond_the_cache")
fault("head-k-in-the-wrong-row", QK_NORM, "rows ? rows[t] : t;", "t;", MODEL_KERNELS)

# --- kernels: attention, activation, argmax, embedding, launches ---------------------------------------------------

ATTENTION, SCORES, ATTENTION_TEST = "kernels/attention.cu", "ops::attention_extreme_scores", "ops::attention"
fault("attention-sees-the-future", ATTENTION, "seen = j <= last;", "seen = j <= last + 1;", ATTENTION_TEST)
fault("attention-misses-itself", ATTENTION, "seen = j <= last;", "seen = j < last || last == 0;", ATTENTION_TEST)
fault(
    "attention-group-mapping", ATTENTION, "keys += (size_t)(h / (H / K))", "keys += (size_t)(h % K)", ATTENTION_TEST,
    also=[("values += (size_t)(h / (H / K))", "values += (size_t)(h % K)")],
)
fault("attention-scale", ATTENTION, "q[first + i] * scale", "q[first + i]", ATTENTION_TEST)
fault("attention-without-maximum", ATTENTION, "new_maximum = fmaxf(maximum, score)", "new_maximum = 0.0f", SCORES)
fault(
    "attention-acc-not-rescaled", ATTENTION, "fmaf(acc[i], shrink, p * own[i])", "acc[i] + p * own[i]", ATTENTION_TEST,
)
fault("attention-weight-not-rescaled", ATTENTION, "weight * shrink + p", "weight + p", ATTENTION_TEST)
fault(
    "attention-merge-not-rescaled", ATTENTION, "fmaf(weights[g], expf(maxima[g] - base), total)", "total + weights[g]",
    ATTENTION_TEST,
)
fault("attention-merge-last-group", ATTENTION, "g < GROUPS; g++) sum =", "g < GROUPS - 1; g++) sum =", ATTENTION_TEST)
fault("attention-shares-overlap", ATTENTION, "j0 += gridDim.z * GROUPS", "j0 += GROUPS", ATTENTION_TEST)
fault(
    "attention-share-without-keys", ATTENTION, "base = top == MINUS_INFINITY ? 0.0f : top;", "base = top;",
    "ops::attention_of_a_short_sequence_in_a_long_cache",
)
fault(
    "attention-shares-not-rescaled", ATTENTION, "fmaf(share[z].y, expf(share[z].x - top), total)", "total + share[z].y",
    ATTENTION_TEST,
)
fault("attention-last-share", ATTENTION, "z < Z; z++) sum =", "z < Z - 1; z++) sum =", ATTENTION_TEST)
fault("attention-bf16-weights", ATTENTION, "p * own[i]", f"{bf16('p')} * own[i]", ATTENTION_TEST)
fault("attention-barrier", ATTENTION, "    __syncthreads();\n", "", ATTENTION_TEST)

SILU, ARGMAX, TIES = "kernels/silu_mul.cu", "kernels/argmax.cu", "ops::argmax_ties_infinities_and_nan"
fault("silu-without-up", SILU, " * up[i];", ";", "ops::silu_mul")
fault("silu-without-gate", SILU, "g / (1.0f + expf(-g))", "1.0f / (1.0f + expf(-g))", "ops::silu_mul")
fault("silu-one-element-too-many", SILU, "if (i >= n)", "if (i > n)", "emulator::all_operations_under_the_sanitizers")
fault("argmax-last-of-equals", ARGMAX, "a.index < b.index", "a.index > b.index", TIES)
fault("argmax-nan-lost", ARGMAX, "(a_nan || (!b_nan && a.value > b.value))", "a.value > b.value", TIES)
fault("argmax-barrier", ARGMAX, "    __syncthreads();\n", "", "ops::argmax")
fault("embed-off-by-one", "kernels/embed.cu", "(size_t)id * C", "(size_t)(id ? id - 1 : 0) * C", "ops::embed")
fault("embed-one-id-too-many", "kernels/embed.cu", "id < V;", "id <= V;", "ops::embed_of_an_unknown_id")

CUDA = "cuqwen/cuda.py"
fault("launch-scale", CUDA, "np.float32(dim**-0.5)", "np.float32(1 / dim)", ATTENTION_TEST)
fault("launch-last-block", CUDA, "return -(-n // size)", "return max(1, n // size)", "ops::matmul")
fault(
    "launch-one-head-too-few", CUDA, '"qkv_rope_tile", types, (_blocks(tokens, 32), heads + 2 * kv_heads)',
    '"qkv_rope_tile", types, (_blocks(tokens, 32), heads + 2 * kv_heads - 1)', QKV_TEST,
)
fault(
    "launch-rows-without-a-name", CUDA, "target = None if out[1] is None else rows", "target = rows",
    "ops::rows_count_only_for_what_out_names",
)
fault(
    "launch-eps-default", CUDA, "np.int32(width), np.float32(eps))", "np.int32(width), np.float32(1e-6))",
    "model::kernels_compute_what_the_reference_computes[emulated-head_64_large_eps]",
)

# --- rotary table and reference ------------------------------------------------------------------------------------

ROPE, REFERENCE = "cuqwen/rope.py", "cuqwen/reference.py"
TRUTH, TRUTH_BIAS, TRUTH_UNTIED, TRUTH_EPS = (
    f"transformers::float64_is_the_truth[numpy-{spec}]"
    for spec in ("head_128", "qwen2_bias", "untied_sharded_f32", "head_64_large_eps")
)
fault("rope-base", ROPE, "float(theta) **", "10000.0 **", TRUTH)
fault("rope-exponent", ROPE, "/ head_dim)\n", "/ (head_dim - 2))\n", TRUTH)
fault(
    "rope-float32-angles", ROPE, "np.cos(angles)", "np.cos(angles.astype(dtype))",
    "ops::rope_table_is_rounded_once_near_and_far", also=[("np.sin(angles)", "np.sin(angles.astype(dtype))")],
)
fault(
    "rope-positions-from-one", ROPE, "np.arange(length, dtype", "np.arange(1, length + 1, dtype",
    "ops::rope_table_is_rounded_once_near_and_far",
)
fault(
    "reference-eps-outside-root", REFERENCE, "np.sqrt(mean_square + dtype(eps))", "(np.sqrt(mean_square) + dtype(eps))",
    SCALES,
)
fault("reference-eps-dropped", REFERENCE, "np.sqrt(mean_square + dtype(eps))", "np.sqrt(mean_square)", ZERO_ROWS)
fault("reference-eps-1e-5", REFERENCE, "mean_square + dtype(eps)", "mean_square + dtype(1e-5)", TRUTH)
fault(
    "reference-head-eps", REFERENCE, "np.sqrt(ms + dtype(eps))[..., None]", "(np.sqrt(ms) + dtype(eps))[..., None]",
    "ops::qk_norm",
)
fault(
    "reference-residual-dropped", REFERENCE, "product if residual is None else product + residual", "product", RESIDUAL,
)
fault(
    "reference-rotation-sign", REFERENCE, "(low * cos - high * sin, high * cos + low * sin)",
    "(low * cos + high * sin, high * cos - low * sin)", QKV_TEST,
)
fault(
    "reference-pairs-interleaved", REFERENCE, "low, high = a[..., :half], a[..., half:]",
    "low, high = a[..., 0::2], a[..., 1::2]", QKV_TEST,
    also=[
        ("np.concatenate((low * cos - high * sin, high * cos + low * sin), axis=-1)",
         "np.stack((low * cos - high * sin, high * cos + low * sin), axis=-1).reshape(a.shape)"),
    ],
)
fault(
    "reference-gain-after-rope", REFERENCE,
    "        if gain is not None:\n            a = a * gain.astype(dtype, copy=False)\n", "", TRUTH,
    also=[
        ("return np.concatenate((low * cos - high * sin, high * cos + low * sin), axis=-1)",
         "a = np.concatenate((low * cos - high * sin, high * cos + low * sin), axis=-1)\n"
         "        return a if gain is None else a * gain.astype(dtype, copy=False)"),
    ],
)
fault("reference-k-gain-dropped", REFERENCE, "rotate(k, k_norm)", "rotate(k, None)", TRUTH)
fault(
    "reference-mean-square-of-gained", REFERENCE, "for a in (q, k)]",
    "for a in (q if q_norm is None else q * q_norm, k if k_norm is None else k * k_norm)]", TRUTH,
)
fault(
    "reference-rows-ignored", REFERENCE, "out[... if rows is None else rows]",
    "out[... if rows is None else slice(len(rows))]", "model::a_prompt_fed_whole_equals_the_prompt_fed_in_pieces",
)
fault("reference-sees-the-future", REFERENCE, "<= at[:, None]", "<= at[:, None] + 1", ATTENTION_TEST)
fault("reference-misses-itself", REFERENCE, "<= at[:, None]", "< np.maximum(at, 1)[:, None]", ATTENTION_TEST)
fault("reference-scale", REFERENCE, " * dtype(dim**-0.5)", "", ATTENTION_TEST)
fault(
    "reference-group-mapping", REFERENCE, "reshape(len(at), k.shape[0], -1, dim).transpose(1, 2, 0, 3)",
    "reshape(len(at), -1, k.shape[0], dim).transpose(2, 1, 0, 3)", TRUTH,
    also=[(".transpose(2, 0, 1, 3)", ".transpose(2, 1, 0, 3)")],
)
fault(
    "reference-without-maximum", REFERENCE, "        scores -= scores.max(axis=-1, keepdims=True)\n", "", SCORES,
    "model::kernels_compute_what_the_reference_computes[emulated-tied_redundant_head]",
)
fault(
    "reference-block-positions", REFERENCE, "positions[first : first + block]", "positions[:block][: tokens - first]",
    "transformers::a_prompt_cut_short_has_the_same_logits[numpy-head_128-float64]",
    "api::the_whole_context_of_the_demo",
)
fault(
    "reference-always-float32", REFERENCE, "np.float64 if x.dtype == np.float64 else np.float32", "np.float32",
    "ops::float64_is_float64_throughout",
)
fault("reference-silu-sign", REFERENCE, "np.exp(-gate)", "np.exp(gate)", "ops::silu_mul")
fault(
    "reference-product-tail", REFERENCE, "range(0, len(weight), rows)",
    "range(0, max(1, len(weight) - rows + 1), rows)", "ops::matmul",
    "transformers::256_greedy_tokens_of_the_demo_are_the_golden_ones",
)

# --- model and cache -----------------------------------------------------------------------------------------------

MODEL, CACHE = "cuqwen/model.py", "cuqwen/cache.py"
PIECES, TRUTH_F32 = "model::a_prompt_fed_whole_equals_the_prompt_fed_in_pieces", (
    "transformers::float32_errs_at_most_four_times_as_much_as_transformers[demo]"
)
GATE_UP = "ops.matmul(h, layer.gate_proj), ops.matmul(h, layer.up_proj)"
fault("model-attention-residual-dropped", MODEL, "layer.o_proj, residual=x, out=x)", "layer.o_proj, out=x)", TRUTH)
fault(
    "model-mlp-residual-twice", MODEL, "layer.down_proj, residual=x, out=x)", "layer.down_proj, residual=x + x, out=x)",
    TRUTH,
)
fault(
    "model-last-layer-skipped", MODEL, "in enumerate(weights.layers):\n            keys",
    "in enumerate(weights.layers[:-1]):\n            keys", TRUTH,
)
fault("model-one-norm-for-both", MODEL, "layer.post_attention_layernorm, eps", "layer.input_layernorm, eps", TRUTH)
fault(
    "model-gate-and-up-swapped", MODEL, GATE_UP, "ops.matmul(h, layer.up_proj), ops.matmul(h, layer.gate_proj)", TRUTH,
)
fault(
    "model-final-norm-dropped", MODEL, "ops.rmsnorm(x[len(ids) - rows :], weights.norm, eps)", "x[len(ids) - rows :]",
    TRUTH,
)
fault("model-eps-fixed", MODEL, "self.weights, self.config.rms_norm_eps", "self.weights, 1e-6", TRUTH_EPS)
fault("model-head-eps-default", MODEL, "q_ms, k_ms, self.config.rms_norm_eps,", "q_ms, k_ms,", TRUTH_EPS)
fault("model-rope-base-fixed", MODEL, "self.config.rope_theta", "1e6", TRUTH_UNTIED)
fault("model-bias-dropped", MODEL, "k_bias=layer.k_bias", "k_bias=None", TRUTH_BIAS)
fault(
    "model-lm-head-on-the-first-row", MODEL, "x[len(ids) - rows :]", "x[:rows]",
    "api::greedy_is_the_argmax_of_the_logits",
)
fault(
    "model-k-rounded-before-norm", MODEL, "ops.qk_norm(q, k,",
    "ops.qk_norm(q, k.astype(self.kv_dtype).astype(k.dtype),", "model::k_is_rounded_once",
)
fault("model-positions-restart", MODEL, "self.positions[start:stop]", "self.positions[: len(ids)]", PIECES)
fault(
    "model-stale-keys", MODEL, "rows=positions, out=(q, keys)", "rows=positions - positions[0], out=(q, keys)", PIECES,
)
fault("model-length-not-advanced", MODEL, "        cache.length = stop\n", "", PIECES)
fault(
    "model-length-advanced-too-early", MODEL, "        cache.length = stop\n", "",
    "model::a_failure_inside_a_step_leaves_the_sequence_as_it_was",
    also=[("        logits = self.step(", "        cache.length = stop\n        logits = self.step(")],
)
fault("model-one-cache-for-all-layers", MODEL, "cache.layer(index)", "cache.layer(0)", PIECES)
DECODE, RECORDED = "cuqwen/decode.py", "model::recorded_steps_equal_single_launches"
fault(
    "decoder-position-one-behind", DECODE, "positions[self.cache.length :]", "positions[self.cache.length - 1 :]",
    RECORDED,
)
fault("decoder-length-not-advanced", DECODE, "        self.cache.length += 1\n", "", RECORDED)
fault("decoder-table-freed", DECODE, "self.model.cos", "None", RECORDED)
fault(
    "cache-keys-are-values", CACHE, "self.keys, self.values = empty(shape, dtype), empty(shape, dtype)",
    "self.keys = self.values = empty(shape, dtype)", TRUTH,
)
fault(
    "cache-half-the-bytes", CACHE, "return 2 * config", "return config",
    "model::bytes_per_token_are_those_of_the_cache",
)

# --- generation and sampling ---------------------------------------------------------------------------------------

GENERATE, SAMPLING = "cuqwen/generate.py", "cuqwen/sampling.py"
STOPS = "api::stop_strings_cut_at_each_offset"
fault("stop-held-back-too-little", GENERATE, "len(stop) - 1), 0, -1)", "len(stop) - 2), 0, -1)", STOPS)
fault("stop-cut-one-late", GENERATE, "self.pending[: min(found)]", "self.pending[: min(found) + 1]", STOPS)
fault(
    "stop-first-named-wins", GENERATE, "self.pending[: min(found)]", "self.pending[: found[0]]",
    "api::two_stop_strings_completed_by_one_token",
)
fault("stop-rest-lost", GENERATE, "tail + stops.finish()", "tail", "api::held_back_text_is_released_at_the_end")
fault("end-ids-ignored", GENERATE, "ended = token in end_ids", "ended = False", "api::end_ids_of_generation_config")
fault(
    "end-id-only-the-first", GENERATE, "ended = token in end_ids", "ended = token == end_ids[0]",
    "api::end_ids_of_generation_config",
)
fault(
    "end-token-printed", GENERATE, '"" if ended else stream.push(token)', "stream.push(token)",
    "api::end_ids_of_generation_config",
)
fault("one-token-too-few", GENERATE, "last = count == max_tokens", "last = count >= max_tokens - 1", "api::max_tokens")
fault(
    "unfinished-character-lost", GENERATE, "stops.push(stream.finish())", 'stops.push("")',
    "api::a_character_that_stays_incomplete_is_shown_at_the_end",
)
fault(
    "greedy-ids-beyond-the-tokenizer", GENERATE, "logits[0, :n_ids]", "logits[0]",
    "api::ids_without_a_token_are_never_drawn",
)
fault(
    "nan-chosen-as-a-token", GENERATE, "sampling.is_argmax and not first", "sampling.is_argmax",
    "api::broken_weights_do_not_generate",
)
fault(
    "prompt-chunk-drops-a-token", GENERATE, "ids[first : first + PROMPT_CHUNK]",
    "ids[first : first + PROMPT_CHUNK - 1]", "api::a_prompt_is_read_in_chunks",
)
fault(
    "sampled-ids-beyond-the-tokenizer", SAMPLING, "np.array(logits[:n_ids]", "np.array(logits",
    "api::ids_without_a_token_are_never_drawn",
)
fault("seed-ignored", SAMPLING, "PCG64(sampling.seed)", "PCG64()", "sampling::seeds_reproduce_and_differ")
fault("top-p-boundary", SAMPLING, 'allowance, side="right"', 'allowance, side="left"', "sampling::top_p")
fault(
    "top-p-ties-from-above", SAMPLING, "(scores == lowest)[:equals_removed]",
    "(scores == lowest)[::-1][:equals_removed]", "sampling::top_p",
)
fault("top-k-one-too-few", SAMPLING, "[-sampling.top_k]", "[1 - sampling.top_k]", "sampling::top_k")
fault("min-p-strict", SAMPLING, "weights >= sampling.min_p", "weights > sampling.min_p", "sampling::min_p")
fault(
    "temperature-inverted", SAMPLING, "(scores - top) / temperature", "(scores - top) * temperature",
    "sampling::plain_softmax_and_temperature",
)
fault(
    "repetition-rewards-negatives", SAMPLING, "used * sampling.repetition_penalty",
    "used / sampling.repetition_penalty", "sampling::repetition_penalty_counts_prompt_and_answer_once",
)
fault(
    "presence-counts-the-prompt", SAMPLING, "presence_penalty * (counts > 0)", "presence_penalty * seen",
    "sampling::presence_and_frequency_count_the_answer_only",
)
fault(
    "draw-of-probability-zero", SAMPLING, 'sums[-1], side="right"', 'sums[-1], side="left"',
    "sampling::the_draw_at_the_ends_and_on_the_bounds",
)
fault(
    "sampler-forgets", SAMPLING, "self._counts[token] += 1", "self._counts[token] = 1",
    "sampling::the_sampler_remembers_like_the_function",
)

# --- files: tokenizer, weights, configuration ----------------------------------------------------------------------

TOKENIZER, WEIGHTS, CONFIG, OPS = "cuqwen/tokenizer.py", "cuqwen/weights.py", "cuqwen/config.py", "cuqwen/ops.py"
REFUSED = "config::what_is_not_computed_is_refused"
fault(
    "half-a-character", TOKENIZER, "self._decoder.decode(self._token_bytes(id))",
    'self._token_bytes(id).decode("utf-8", "replace")', "tokenizer::stream_prints_whole_characters",
)
fault(
    "stream-ends-early", TOKENIZER, 'self._decoder.decode(b"", final=True)', '""',
    "tokenizer::stream_of_malformed_bytes_is_exhaustive",
)
fault(
    "special-tokens-printed", TOKENIZER, " if id not in self._special_ids else None", "",
    "tokenizer::stream_of_random_ids",
)
fault(
    "special-tokens-added", TOKENIZER, "add_special_tokens=False).ids", "add_special_tokens=True).ids",
    "tokenizer::nothing_is_added",
)
fault(
    "last-added-token-lost", TOKENIZER, "*(id + 1 for id in added)", "*added",
    "tokenizer::tokenizer_must_fit_the_embedding",
)
fault(
    "tokenizer-one-id-too-large", TOKENIZER, "tokenizer.n_ids > config.vocab_size:",
    "tokenizer.n_ids > config.vocab_size + 1:", "tokenizer::tokenizer_must_fit_the_embedding",
)
fault(
    "thinking-ignored", TOKENIZER, '["enable_thinking"] = enable_thinking', '["enable_thinking"] = True',
    "tokenizer::thinking_variable",
)
fault(
    "unexpected-tensor-accepted", WEIGHTS, "if name not in allowed:",
    "if name not in allowed and not name.endswith('.weight'):", "weights::one_error_lists_all_that_differs",
)
fault(
    "transposed-tensor-accepted", WEIGHTS, "tensor.shape != allowed[name]",
    "sorted(tensor.shape) != sorted(allowed[name])", "weights::one_error_lists_all_that_differs",
)
fault(
    "own-lm-head-ignored", WEIGHTS, 'embedding if config.tie_word_embeddings else placed["lm_head.weight"]',
    "embedding", TRUTH_UNTIED,
)
fault(
    "contradicting-lm-head-accepted", WEIGHTS, "    if copy is not None:\n        _check_copy",
    "    if False:\n        _check_copy", "weights::an_lm_head_of_its_own_contradicts_tied_embeddings",
)
fault(
    "nan-in-a-later-chunk", WEIGHTS, "for start, stop in tensor.chunks():", "for start, stop in tensor.chunks()[:1]:",
    "weights::check_finite_names_tensor_count_and_first_index",
)
fault(
    "sliding-window-accepted", CONFIG, 'keys.boolean("use_sliding_window") and',
    'keys.boolean("use_sliding_window") and False and', REFUSED,
)
fault("sliding-window-in-the-last-layer", CONFIG, "if first < layers:", "if first < layers - 1:", REFUSED)
fault("rope-scaling-ignored", CONFIG, 'in ("rope_parameters", "rope_scaling")', 'in ("rope_parameters",)', REFUSED)
fault("attention-bias-ignored", CONFIG, 'model_type == "qwen3" and keys', 'model_type == "qwen2" and keys', REFUSED)
fault("quantised-accepted", CONFIG, '    "quantization_config": ((None, {}), _UNQUANTISED),\n', "", REFUSED)
fault(
    "rope-base-guessed", CONFIG, '        keys.required("rope_theta",',
    '        return 1e4\n        keys.required("rope_theta",', "config::a_missing_key_is_named",
)
fault(
    "end-ids-of-the-wrong-file", CONFIG, "if has_end else config.eos_token_id", "if False else config.eos_token_id",
    "config::generation_config",
)
fault(
    "views-accepted", OPS, "if backend is cuda and not array.flags.c_contiguous:", "if False:",
    "ops::refusals_that_only_kernels_make",
)
fault("heads-unchecked", OPS, "heads == 0 or heads % kv_heads:", "heads == 0:", "ops::refusals")
fault(
    "misaligned-cache-accepted", OPS, "is cuda and _address(array) % 16:", "is cuda and False:",
    "ops::refusals_that_only_kernels_make",
)
fault("negative-eps-accepted", OPS, "if not 0 <= eps <", "if not -1 <= eps <", "ops::refusals")
# fmt: on


# --- planting and running ------------------------------------------------------------------------------------------


def changed(fault: Fault, text: str) -> str:
    """`text` with the fault in it; ToolError unless each of its texts is there exactly once."""
    for old, new in fault.edits:
        if (count := text.count(old)) != 1:
            raise ToolError(
                f"{fault.name}: {fault.file}: wanted this text exactly once, found it {count} times: {old!r}"
            )
        text = text.replace(old, new)
    return text


def check_table(faults: Sequence[Fault], root: Path) -> None:
    """ToolError, with everything that is wrong, unless each fault can be planted."""
    wrong = []
    for fault in faults:
        try:
            changed(fault, (root / fault.file).read_text(encoding="utf-8"))
        except (OSError, ToolError) as error:
            wrong.append(str(error))
    if wrong:
        raise ToolError("\n".join(wrong))


@contextmanager
def planted(fault: Fault, root: Path) -> Iterator[None]:
    path = root / fault.file
    text = path.read_text(encoding="utf-8")
    path.write_text(changed(fault, text), encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(text, encoding="utf-8")


def pytest(root: Path, tests: Sequence[str], *options: str) -> tuple[int, str]:
    """Exit status and output of these tests in the checkout `root`."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(root),
        "PYTHONDONTWRITEBYTECODE": "1",  # two faults of one length in one second would look like the same file
        "CUQWEN_TEST_CACHE": str(root.parent / "kernels"),
        "COLUMNS": "300",
    }
    command = [sys.executable, "-m", "pytest", "-q", "--tb=line", "-p", "no:cacheprovider", f"--basetemp={root}.tmp"]
    try:
        done = subprocess.run(
            [*command, *options, *tests], cwd=root, env=environment, capture_output=True, text=True, timeout=TIME_LIMIT
        )
    except subprocess.TimeoutExpired:
        raise ToolError(f"{' '.join(tests)}: not done after {TIME_LIMIT} s") from None
    return done.returncode, done.stdout + done.stderr


def missing(fault: Fault, root: Path) -> list[str]:
    """Those of its tests that are not written."""
    found = []
    for test in fault.tests:
        file, name = test.partition("[")[0].split("::")
        if not (root / file).is_file() or f"def {name}(" not in (root / file).read_text(encoding="utf-8"):
            found.append(test)
    return found


def check_unchanged(faults: Sequence[Fault], root: Path) -> None:
    """ToolError unless the tests of all faults pass as the checkout stands."""
    tests = {test for fault in faults if not missing(fault, root) for test in fault.tests}
    status, output = pytest(root, sorted(tests)) if tests else (0, "")
    if status:
        raise ToolError(f"the tests must pass before faults are planted, pytest says {status}:\n{output[-6000:]}")


def run(fault: Fault, root: Path) -> Result:
    if tests := missing(fault, root):
        return Result(fault, False, f"NOT NOTICED, there is no {' '.join(tests)}", 0.0)
    start = time.monotonic()
    with planted(fault, root):
        status, output = pytest(root, fault.tests, "-x")
    seconds = time.monotonic() - start
    if status < 0:
        return Result(fault, True, f"signal {-status} while running {fault.tests[0]}", seconds)
    failed = re.search(r"^(?:FAILED|ERROR) (\S+(?: \S+)*?)(?: - (.*))?$", output, re.M)
    if status == 1 and failed:
        if NO_FAULT.search(failed[2] or ""):
            raise ToolError(f"{fault.name}: {fault.file}: wanted a wrong result, got {failed[2]}\n{output[-2000:]}")
        return Result(fault, True, failed[1], seconds)
    if status == 0:
        passed = re.search(r"\d+ passed", output)
        return Result(fault, False, f"NOT NOTICED, {passed[0]}" if passed else "NOT RUN, all skipped", seconds)
    raise ToolError(f"{fault.name}: pytest says {status}:\n{output[-3000:]}")


def run_all(faults: Sequence[Fault], jobs: int) -> list[Result]:
    """Every fault in one of `jobs` copies of the checkout; prints a line for each as it is done."""
    width, results = max(len(fault.name) for fault in faults), []
    with tempfile.TemporaryDirectory(prefix="cuqwen-mutation-") as folder:
        copies: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for i in range(jobs):
            copies.put(shutil.copytree(ROOT, Path(folder) / f"copy{i}", ignore=shutil.ignore_patterns(*LEFT_OUT)))
        first = copies.get()
        check_table(faults, first)
        start = time.monotonic()
        check_unchanged(faults, first)
        print(f"unchanged: all tests pass ({time.monotonic() - start:.1f} s)", flush=True)
        copies.put(first)

        def work(fault: Fault) -> Result:
            root = copies.get()
            try:
                return run(fault, root)
            finally:
                copies.put(root)

        with ThreadPoolExecutor(jobs) as pool:
            for result in pool.map(work, faults):
                by = result.by.replace("tests/", "")
                fault = result.fault
                print(f"{fault.name:{width}}  {fault.file:22}  {result.seconds:5.1f} s  {by}", flush=True)
                results.append(result)
    return results


def main() -> int:
    names = [fault.name for fault in FAULTS]
    parser = argparse.ArgumentParser(description="Plants faults one at a time and says which test notices each.")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names, default=names, help="these faults only")
    parser.add_argument("--list", action="store_true", help="list the faults and their tests, plant nothing")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="faults at a time (default: 1)")
    arguments = parser.parse_args()
    faults = [fault for fault in FAULTS if fault.name in arguments.only]
    if len(set(names)) < len(names):
        print("mutation_check: two faults have one name", file=sys.stderr)
        return 2
    if arguments.list:
        for fault in faults:
            print(f"{fault.name}  {fault.file}  {' '.join(fault.tests)}")
        return 0
    start = time.monotonic()
    try:
        results = run_all(faults, max(1, arguments.jobs))
    except ToolError as error:
        print(f"mutation_check: {error}", file=sys.stderr)
        return 2
    survivors = [result.fault.name for result in results if not result.noticed]
    noticed = len(results) - len(survivors)
    print(f"{noticed} of {len(results)} faults noticed in {time.monotonic() - start:.0f} s")
    if survivors:
        print(f"not noticed: {', '.join(survivors)}")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
