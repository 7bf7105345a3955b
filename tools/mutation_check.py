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
SANITIZED = "emulator::all_operations_under_the_sanitizers"
SCALES, ZERO_ROWS = "ops::rmsnorm_extreme_scales_and_gains", "ops::rmsnorm_constant_and_zero_rows"
POWER, POWER_OF_SCALED = "const float power = sum / C + eps;", "add) / C + eps * s * s);"
NORMALISED = "a[e] = a[e] * scale.before * scale.after * gain[e];"

fault(
    "kernel-eps-outside-root", RMSNORM, POWER, "const float power = sum / C;", SCALES,
    also=[("1.0f / sqrtf(power)", "1.0f / (sqrtf(power) + eps)")],
)
fault(
    "kernel-eps-dropped", RMSNORM, POWER, "const float power = sum / C;", ZERO_ROWS,
    also=[(POWER_OF_SCALED, "add) / C);")],
)
fault("kernel-eps-not-scaled", RMSNORM, POWER_OF_SCALED, "add) / C + eps);", SCALES)
fault("kernel-eps-1e-5", RMSNORM, POWER, "const float power = sum / C + 1e-5f;", SCALES)
fault("rmsnorm-squares-flushed", RMSNORM, "power >= 0x1p-96f", "power >= 0.0f", SCALES)
fault("rmsnorm-squares-overflow", RMSNORM, " && sum < -MINUS_INFINITY)", ")", SCALES)
fault("kernel-gain-plus-one", RMSNORM, "* to_float(weight[c])", "* (1.0f + to_float(weight[c]))", "ops::rmsnorm")
fault(
    "kernel-gain-plus-one-wide", RMSNORM, "* scale.after * gain[e];", "* scale.after * (1.0f + gain[e]);",
    "ops::rmsnorm",
)
fault(
    "kernel-rounded-before-gain", RMSNORM, NORMALISED,
    "{ OUT_TYPE r; store(&r, a[e] * scale.before * scale.after); a[e] = to_float(r) * gain[e]; }", "ops::rmsnorm_types",
)
fault(
    "kernel-rounded-before-gain-anywhere", RMSNORM,
    "store(out + c, value(c) * scale.before * scale.after * to_float(weight[c]));",
    "{ OUT_TYPE r; store(&r, value(c) * scale.before * scale.after); "
    "store(out + c, to_float(r) * to_float(weight[c])); }",
    "ops::rmsnorm_adds_to_the_residual",
)
fault("rmsnorm-bf16-sum", RMSNORM, "sum = fmaf(v, v, sum);", f"sum = {bf16('fmaf(v, v, sum)')};", "ops::rmsnorm")
fault(
    "rmsnorm-residual-not-kept", RMSNORM, "if (ADD) store8(residual + place(i), a);", "",
    "ops::rmsnorm_adds_to_the_residual",
)
fault(
    "rmsnorm-half-the-lanes", RMSNORM, "for (int offset = 16; offset; offset >>= 1)",
    "for (int offset = 8; offset; offset >>= 1)", "ops::rmsnorm",
)
fault("rmsnorm-last-warp", RMSNORM, "lane < count / 32 ?", "lane < count / 32 - 1 ?", "ops::rmsnorm")
fault("rmsnorm-barrier", RMSNORM, "= x;\n        __syncthreads();", "= x;", "ops::rmsnorm")
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
    "int offset = 8; offset; offset >>= 1) x +=", "ops::matmul",
)

SHARED_SUMS = "ops::many_warps_share_a_product"
fault(
    "dot-bf16-sum", DOT, "sums[r][t] = fmaf(a[i], b[r][i], sums[r][t]);",
    f"sums[r][t] = {bf16('fmaf(a[i], b[r][i], sums[r][t])')};", "ops::matmul",
)
fault("dot-last-chunk", DOT, "if (c < C) multiply(", "if (c < C / 256 * 256) multiply(", "ops::matmul")
fault("dot-tail", DOT, "c < C; c += 32", "c < C / 32 * 32; c += 32", "ops::matmul")
fault("dot-parts-overlap", DOT, "(threadIdx.x % 32) + 256 * part;", "(threadIdx.x % 32);", SHARED_SUMS)
fault("dot-last-part", DOT, "p < parts; p++", "p < parts - 1; p++", SHARED_SUMS)
fault(
    "dot-parts-barrier", DOT, "shares[warp][lane] = total;\n    __syncthreads();", "shares[warp][lane] = total;",
    SHARED_SUMS,
)
fault("tile-tail", DOT, "c0 < C; c0 += DEPTH", "c0 + DEPTH <= C; c0 += DEPTH", "ops::matmul")
fault(
    "tile-bf16-sum", DOT, "acc[i][j] = fmaf(a[i], b[j], acc[i][j]);",
    f"acc[i][j] = {bf16('fmaf(a[i], b[j], acc[i][j])')};", "ops::matmul",
)
fault(
    "tile-bf16-activations", DOT, "to_float(x[(size_t)row * C + c]) :", f"{bf16('to_float(x[(size_t)row * C + c])')} :",
    "ops::matmul",
)
fault("tile-barrier-before-use", DOT, "        __syncthreads();\n#pragma unroll 8", "#pragma unroll 8", "ops::matmul")
fault(
    "tile-barrier-after-use", DOT, "        }\n        __syncthreads();\n    }\n}", "        }\n    }\n}",
    "ops::matmul",
)
fault("tile-reads-past-the-last-row", DOT, "row < T && c < C ?", "c < C ?", SANITIZED)

MATMUL, RESIDUAL = "kernels/matmul.cu", "ops::matmul_residual_in_place"
fault("matmul-residual-dropped", MATMUL, "residual ? sum + before : sum;", "sum;", RESIDUAL)
fault("matmul-residual-twice", MATMUL, "? acc[i][j] + residual[at]", "? acc[i][j] + 2.0f * residual[at]", RESIDUAL)
fault("matmul-one-output-too-many", MATMUL, "&& t < T && n < N;", "&& t < T && n <= N;", "ops::matmul")
fault("matmul-tile-edge", MATMUL, "if (t >= T || n >= N)", "if (t >= T)", "ops::matmul")
fault(
    "matmul-alignment-unchecked", MATMUL, "C % 8 == 0 && ((size_t)x | (size_t)weight) % 16 == 0", "C % 8 == 0",
    SANITIZED,
)

# --- kernels: projections, rotation, per-head norm -----------------------------------------------------------------

QKV, QKV_TEST, ORDER = "kernels/qkv_rope.cu", "ops::qkv_rope", "ops::the_two_steps_equal_the_published_order"
ROW_GAIN = "    if (head.gain) low *= gain[0], high *= gain[1];\n"
ROW_ROTATE = "    if (head.rotated) rotate(low, high, c, s);\n"
ROW_SQUARES = "    if (head.rotated && first_part) squares[pair + i][t] = mine ? fmaf(low, low, high * high) : 0.0f;\n"
TILE_GAIN = "                if (head.gain) acc[i][j] *= head.gain[d], acc[i][j + 2] *= head.gain[d + D / 2];\n"
TILE_ROTATE = (
    "                float c, s;\n                find_angle(c, s, d, positions[t], cos, sin, P);\n"
    "                rotate(acc[i][j], acc[i][j + 2], c, s);\n"
)
MANY_GAIN = "                        low[e] *= gain[0][e], high[e] *= gain[1][e];\n"
MANY_ROTATE = "                        rotate(low[e], high[e], c[i][e], s[i][e]);\n"
MANY_HEADS = "ops::qkv_rope_of_many_rows[emulated-few-17-1-1-128-40-False-True-bfloat16]"
IN_CACHE = "ops::qkv_rope_writes_rows_of_a_cache"

fault(
    "kernel-alignment-unchecked", QKV, "C % 8 == 0 && ((size_t)x | (size_t)head.proj) % 16 == 0", "C % 8 == 0",
    SANITIZED,
)
fault(
    "kernel-rotation-sign", QKV, "low = fmaf(a, c, -(b * s));", "low = fmaf(a, c, b * s);", QKV_TEST,
    also=[("high = fmaf(b, c, a * s);", "high = fmaf(b, c, -(a * s));")],
)
fault(
    "kernel-pairs-interleaved", QKV, "(row + min(first + j, D / 2 - 1)) * C",
    "(row + 2 * min(first + j, D / 2 - 1)) * C", QKV_TEST,
    also=[
        ("rows[PAIRS + j] = rows[j] + (size_t)(D / 2) * C;", "rows[PAIRS + j] = rows[j] + C;"),
        ("bias[0] = head.bias[row + d], bias[1] = head.bias[row + d + D / 2]",
         "bias[0] = head.bias[row + 2 * d], bias[1] = head.bias[row + 2 * d + 1]"),
        ("gain[0] = head.gain[d], gain[1] = head.gain[d + D / 2]",
         "gain[0] = head.gain[2 * d], gain[1] = head.gain[2 * d + 1]"),
        ("STORE(t, d, low);", "STORE(t, 2 * d, low);"),
        ("STORE(t, d + D / 2, high);", "STORE(t, 2 * d + 1, high);"),
    ],
)
fault("kernel-gain-after-rope", QKV, ROW_GAIN + ROW_ROTATE, ROW_ROTATE + ROW_GAIN, QKV_TEST, ORDER)
fault("kernel-gain-after-rope-tile", QKV, TILE_GAIN + TILE_ROTATE, TILE_ROTATE + TILE_GAIN, QKV_TEST)
fault("kernel-gain-after-rope-tensor-cores", QKV, MANY_GAIN + MANY_ROTATE, MANY_ROTATE + MANY_GAIN, MANY_HEADS)
fault("kernel-k-gain-dropped", QKV, "k_bias, k_norm, k_rows", "k_bias, nullptr, k_rows", QKV_TEST)
fault("kernel-mean-square-of-gained", QKV, ROW_SQUARES + ROW_GAIN, ROW_GAIN + ROW_SQUARES, QKV_TEST, ORDER)
fault(
    "kernel-mean-square-barrier", QKV, "        __syncthreads();\n        for (int row", "        for (int row",
    QKV_TEST,
)
fault(
    "kernel-head-barrier", QKV, "    __syncthreads();\n    if (warp >= T) return;", "    if (warp >= T) return;",
    QKV_TEST,
)
fault(
    "kernel-position-of-the-call", QKV, "(mine && head.rotated) find_angle(c, s, d, positions[t],",
    "(mine && head.rotated) find_angle(c, s, d, t,", QKV_TEST,
)
fault(
    "kernel-position-plus-one", QKV, "                find_angle(c, s, d, positions[t],",
    "                find_angle(c, s, d, positions[t] + 1,", QKV_TEST,
)
fault(
    "kernel-position-of-the-tile", QKV, "head.rotated ? positions[t] : 0", "head.rotated ? positions[t - row0] : 0",
    "ops::qkv_rope_of_many_rows[emulated-few-65-2-1-128-72-False-True-bfloat16]",
)
fault("kernel-bias-of-k-for-v", QKV, "{v_proj, v_bias,", "{v_proj, k_bias,", QKV_TEST)
fault("kernel-k-rounded-before-norm", QKV, "store(k + at, (value));", f"store(k + at, {bf16('value')});", QKV_TEST)
fault(
    "kernel-row-beyond-the-cache-tensor-cores", QKV,
    "            if (head.rows && target[half] >= S) target[half] = -1;\n", "", "ops::rows_beyond_the_cache",
)
fault(
    "kernel-half-a-head-twice", QKV, "rows.second = rows.first + (size_t)(D / 2) * C;", "rows.second = rows.first;",
    MANY_HEADS,
)
fault("kernel-places-left-taken", QKV, "        places[node / 2] = 0;\n", "", "ops::counters_are_left_zero")
fault(
    "kernel-half-a-mean-square", QKV, "sum += __uint_as_float(other ^ 0x80000000u);",
    "sum = __uint_as_float(other ^ 0x80000000u);", "ops::counters_are_left_zero",
)
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

# --- kernels: attention, activation, argmax, embedding --------------------------------------------------------------

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
fault("silu-without-up", SILU, " * up[i]);", ");", "ops::silu_mul")
fault("silu-without-gate", SILU, "g / (1.0f + expf(-g))", "1.0f / (1.0f + expf(-g))", "ops::silu_mul")
fault("silu-one-element-too-many", SILU, "if (i >= n)", "if (i > n)", SANITIZED)
fault(
    "argmax-last-of-equals", ARGMAX, "(0xffffffffu - index)", "(unsigned)index", TIES,
    also=[("0xffffffffu - (unsigned)best;", "(unsigned)best;")],
)
fault("argmax-nan-lost", ARGMAX, "value != value ? 0xffffffffu :", "value != value ? 0u :", TIES)
fault("argmax-zeros-differ", ARGMAX, "__float_as_uint(value + 0.0f)", "__float_as_uint(value)", TIES)
fault("argmax-last-block", ARGMAX, "i < blocks; i += 32", "i < blocks - 1; i += 32", "ops::argmax_finds_it_anywhere")
fault("argmax-barrier", ARGMAX, "    __syncthreads();\n", "", "ops::argmax")
fault("embed-off-by-one", "kernels/embed.cu", "(size_t)id * C", "(size_t)(id ? id - 1 : 0) * C", "ops::embed")
fault("embed-one-id-too-many", "kernels/embed.cu", "id < V;", "id <= V;", "ops::embed_of_an_unknown_id")

# --- kernels: tensor cores -----------------------------------------------------------------------------------------

MMA, SWIGLU = "kernels/mma.cuh", "kernels/swiglu.cu"
BITS = "ops::float32_rows_keep_all_their_bits[emulated-few-1.0-5]"
MANY, MANY_F32 = (f"ops::products_of_many_rows[emulated-few-17-40-136-{name}]" for name in ("bfloat16", "float32"))
fault("mma-last-part-lost", MMA, "int part = 0; part < 3; part++", "int part = 1; part < 3; part++", BITS)
fault("mma-run-added-twice", MMA, "if (kk % 2 == 0) clear(run);", "if (kk == 0) clear(run);", MANY_F32)
fault(
    "mma-stage-not-there", MMA, "                    cp_async_wait<STAGES - 2>();",
    "                    cp_async_wait<STAGES - 1>();", MANY,
)
fault("mma-copies-under-way-at-the-end", MMA, "        cp_async_wait<0>();", "        cp_async_wait<1>();", MANY)
fault("mma-runs-side-by-side", MMA, "j % (NJ / 2) * 8 + j / (NJ / 2) * PAIR", "j * 8", MANY)
fault("mma-group-of-tiles-too-high", MMA, "height = min(GROUP, down - first)", "height = GROUP", MANY)
fault("mma-rows-beyond-the-weights", MMA, "const bool there = row + i * STEP < rows;", "const bool there = true;", MANY)
fault("mma-barrier", MMA, "                    __syncthreads();\n", "", MANY)
fault(
    "matmul-tile-residual-dropped", MATMUL, "if (residual && aligned && t < T", "if (residual && aligned && t < 0",
    MANY,
)
fault("swiglu-gate-for-up-tile", SWIGLU, "const float4*>(gate + Tile::BN / 2)", "const float4*>(gate)", MANY)
fault(
    "swiglu-gate-for-up", SWIGLU, "rows[COLUMNS + i] = up_proj + row", "rows[COLUMNS + i] = gate_proj + row",
    "ops::swiglu[emulated-bfloat16-1-64-64]",
)

# --- kernels: choosing a token -------------------------------------------------------------------------------------

SAMPLE, EQUALS = "kernels/sample.cu", "sample::sample_of_equals"
PENALTIES = "sample::sample_with_penalties"
fault("sample-prompt-counts-as-answer", SAMPLE, "(double)(uses - 1)", "(double)uses", PENALTIES)
fault("sample-first-use-not-counted", SAMPLE, "history[token] + 1 : 2", "history[token] + 1 : 1", PENALTIES)
fault("sample-top-p-boundary", SAMPLE, "sums[j] <= allowance", "sums[j] < allowance", EQUALS)
fault("sample-one-of-equals-too-many", SAMPLE, "id > bound.id", "id >= bound.id", EQUALS)
fault("sample-same-number-again", SAMPLE, "*step = now + 1", "*step = now", EQUALS)
fault(
    "sample-min-p-strict", SAMPLE, "in && weight >= job.set.min_p", "in && weight > job.set.min_p",
    "sample::sample[emulated-{'temperature': 1.0, 'min_p': 1.0}-equals]",
)
fault(
    "sample-scan-without-the-warps-before", SAMPLE, "(warp ? base : 0) + ", "",
    "sample::sample_sizes",
)

# --- kernels: a token in one launch --------------------------------------------------------------------------------

STEP, STEP_RING, STEP_VECTOR, STEP_ATTENTION = (
    "kernels/decode_step.cu", "kernels/decode_ring.cuh", "kernels/decode_vector.cuh", "kernels/decode_attention.cuh",
)
TWO_HEADS, BIASES, SEGMENTS, ROUNDED = (
    f"decode_step::decode_step[emulated-{case}]"
    for case in (
        "two_heads_a_key_head-float32", "untied_no_gain_biases-float32", "two_heads_together_ragged_segments-float32",
        "two_heads_a_key_head-bfloat16",
    )
)
GIVES_UP = "decode_step::decode_step_gives_up_when_words_never_come"
SHARES = "decode_step::decode_step_shares_out_the_keys[emulated-2-300]"
fault(
    "step-attention-residual-dropped", STEP, "AFTER_O + mine, before + sum_warps", "AFTER_O + mine, sum_warps",
    TWO_HEADS,
)
fault(
    "step-mlp-residual-dropped", STEP, "AFTER_DOWN + mine, before + sum_warps", "AFTER_DOWN + mine, sum_warps",
    TWO_HEADS,
)
fault(
    "step-waits-for-the-wrong-layer", STEP, "words + AFTER_DOWN, tag - 1, l ?", "words + AFTER_DOWN, tag, l ?",
    TWO_HEADS,
)
fault(
    "step-gate-and-up-swapped", STEP, "gate = sum_warps(pair) * scale, up = sum_warps(pair + ROWS * PITCH)",
    "up = sum_warps(pair) * scale, gate = sum_warps(pair + ROWS * PITCH)", TWO_HEADS,
)
fault("step-bias-of-v-for-k", STEP, "r < HD + K * D ? K_BIAS : V_BIAS", "r < HD + K * D ? V_BIAS : K_BIAS", BIASES)
fault(
    "step-one-norm-for-both", STEP, "array<float>(table, l, POST_NORM)", "array<float>(table, l, INPUT_NORM)",
    TWO_HEADS,
)
fault(
    "step-last-part-lost", STEP_VECTOR, "for (int p = 0; p < 3; p++) {\n        const bf16 a",
    "for (int p = 0; p < 2; p++) {\n        const bf16 a", TWO_HEADS,
    also=[("unsigned parts[3];\n            split", "unsigned parts[3] = {};\n            split")],
)
fault("step-slice-misread", STEP_VECTOR, "(n + j + step) % 4", "(n + step) % 4", TWO_HEADS)
fault("step-halves-not-swapped", STEP_VECTOR, "g < 4 ? b[0] : b[1], g < 4 ? b[1] : b[0]", "b[0], b[1]", TWO_HEADS)
fault("step-ring-never-turns-over", STEP_RING, "slot = 0, parity ^= 1;", "slot = 0;", SEGMENTS)
fault("step-waits-for-a-later-frame", STEP_RING, "parity ^ unsigned(wrapped)", "parity", TWO_HEADS)
fault(
    "step-last-of-equals", STEP, "32 | ~(unsigned)id;", "32 | (unsigned)id;",
    "decode_step::decode_step_without_a_choice[emulated-None]",
    also=[("int(~(unsigned)best)", "int((unsigned)best)")],
)
fault(
    "step-ids-beyond-the-tokenizer", STEP, "if (r < n_ids)", "if (r < V)",
    "decode_step::decode_step_without_a_choice[emulated-None]",
)
fault(
    "step-nan-chosen-as-a-token", STEP, "key >= RANK_OF_INFINITY || ", "",
    "decode_step::decode_step_without_a_choice[emulated-nan]",
)
fault("step-loss-not-told", STEP, "    if (lost) ids[1] = 1;\n", "", GIVES_UP)
fault("step-loss-forgotten", STEP, "lost ? 0 : turn + 1;", "turn + 1;", GIVES_UP)
fault(
    "step-of-a-token-that-is-none", STEP, "shared.known = known;", "shared.known = 1;",
    "decode_step::decode_step_of_what_does_not_exist",
)
fault("step-position-not-advanced", STEP, "*position = p + 1;", "*position = p;", TWO_HEADS)
fault("step-epoch-not-counted", STEP, "lost ? 0 : turn + 1;", "lost ? 0 : turn;", TWO_HEADS)
fault("step-newest-key-dropped", STEP_ATTENTION, "if (newest && warp == WARPS - 1)", "if (false)", TWO_HEADS)
fault("step-newest-key-not-rounded", STEP_ATTENTION, "            a = to_float(narrow);\n", "", ROUNDED)
fault("step-head-gain-dropped", STEP_ATTENTION, ", x[e / 2][e % 2] *= g[e];", ";", TWO_HEADS)
fault(
    "step-rotation-sign", STEP_ATTENTION, "a * c - other * s : a * c + other * s",
    "a * c + other * s : a * c - other * s", TWO_HEADS,
)
fault(
    "step-key-in-the-wrong-row", STEP_ATTENTION, "((size_t)p * K + kv) * D", "((size_t)(p + 1) * K + kv) * D",
    TWO_HEADS,
)
fault(
    "step-some-keys-in-no-share", STEP_RING, "(cached + (1 << shift) - 1) >> shift", "cached >> shift",
    "decode_step::decode_step_shares_out_the_keys[emulated-2-193]",
)
fault(
    "step-keys-behind-the-share", STEP_ATTENTION, "score[h][u] = row < there[f] ? sum : MINUS_INFINITY;",
    "score[h][u] = sum;", SHARES,
)
fault("step-values-behind-the-share", STEP_ATTENTION, "row, own, row < there[f], x)", "row, own, true, x)", SHARES)
fault("step-pieces-not-turned", STEP_ATTENTION, "at % IN_BOX / IN_PIECE ^ row % 8", "at % IN_BOX / IN_PIECE", SHARES)
fault("step-keys-of-another-head", STEP_RING, "(mine.kv() * BOXES + lane % BOXES)", "lane % BOXES", TWO_HEADS)
fault("step-keys-of-another-layer", STEP_RING, "mine, keys, values, l * S);", "mine, keys, values, 0);", TWO_HEADS)
fault(
    "step-rows-dealt-to-nobody", STEP_RING, "b * units / gridDim.x * UNIT, last", "(b * units + 1) / gridDim.x * UNIT, last",
    SEGMENTS,
)
fault("step-acc-not-rescaled", STEP_ATTENTION, "    head.weight *= shrink;\n", "", SHARES)
fault(
    "step-warps-not-rescaled", STEP_ATTENTION, "fmaf(shared.weight[h][w], factor, weight)",
    "weight + shared.weight[h][w]", SHARES,
)
fault(
    "step-shares-not-rescaled", STEP_ATTENTION, "float weight = state[0][1] * factor;", "float weight = state[0][1];",
    SHARES,
)

# --- kernels: launches ---------------------------------------------------------------------------------------------

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
    "reference-eps-outside-root", REFERENCE, "np.sqrt(mean_square + float(dtype(eps)))",
    "(np.sqrt(mean_square) + float(dtype(eps)))", SCALES,
)
fault("reference-eps-dropped", REFERENCE, "mean_square + float(dtype(eps))", "mean_square", ZERO_ROWS)
fault("reference-eps-1e-5", REFERENCE, "mean_square + float(dtype(eps))", "mean_square + 1e-5", TRUTH)
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
    "model-gate-and-up-swapped", MODEL, "(h, layer.gate_proj, layer.up_proj)", "(h, layer.up_proj, layer.gate_proj)",
    TRUTH,
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
    "decoder-position-never-sent", DECODE, "        if self.one_launch:\n            self.next", "        self.next",
    RECORDED,
)
fault(
    "decoder-position-never-sent-again", DECODE, "if self.cache.length != self.next_position:",
    "if self.next_position < 0:", "decode_step::decoder_continues_what_it_has_not_written",
)
fault(
    "decoder-choice-not-recorded", DECODE, "if self.choice is not None and not (", "if False and not (",
    "sample::an_answer_is_the_same_on_both_sides",
)
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
    "choice-beyond-the-tokenizer", DECODE, "sample(logits[0, : self.n_ids],", "sample(logits[0],",
    "api::ids_without_a_token_are_never_drawn",
)
fault(
    "no-choice-taken-for-a-token", DECODE, "if token < 0:", "if False:",
    "sample::broken_weights_are_refused_on_the_device_too",
)
fault(
    "nan-chosen-as-a-token", DECODE, "if not np.isfinite(float(row[int(ids[0])])):", "if False:",
    "sample::broken_weights_are_refused_on_the_device_too",
)
fault("loss-of-a-block-not-told", DECODE, "if lost:", "if False:", GIVES_UP)
fault(
    "token-of-the-step-ahead", GENERATE, "logits, read, read_this = decoder", "logits, read_this, read = decoder",
    "sample::an_answer_is_the_same_on_both_sides",
)
fault(
    "prompt-chunk-drops-a-token", GENERATE, "ids[first : first + PROMPT_CHUNK]",
    "ids[first : first + PROMPT_CHUNK - 1]", "api::a_prompt_is_read_in_chunks",
)
fault(
    "sampled-ids-beyond-the-tokenizer", SAMPLING, "np.array(logits[:n_ids]", "np.array(logits",
    "sampling::ids_beyond_the_tokenizer_have_no_part",
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
    "views-accepted", OPS, "if self.backend is cuda and not array.flags.c_contiguous:", "if False:",
    "ops::refusals_that_only_kernels_make",
)
fault("heads-unchecked", OPS, "heads == 0 or heads % kv_heads:", "heads == 0:", "ops::refusals")
fault(
    "misaligned-cache-accepted", OPS, "is cuda and launch.address(array) % 16:", "is cuda and False:",
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
