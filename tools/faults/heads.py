"""Projections to heads, rotation, per-head norm."""

from faults.table import QKV_TEST, SANITIZED, bf16, fault

# fmt: off
QKV, QKV_HEAD, QKV_MMA = "kernels/qkv_rope.cu", "kernels/qkv_rope_head.cuh", "kernels/qkv_rope_mma.cuh"
ORDER = "ops::the_two_steps_equal_the_published_order"
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
MANY_HEADS = "ops::qkv_rope_of_many_rows[emulated-mma_few-17-1-1-128-40-False-True-bfloat16]"
QK_NORM, MODEL_KERNELS = "kernels/qk_norm.cu", "model::kernels_compute_what_the_reference_computes[emulated-head_128]"
HEAD_ROOT = "sqrtf((is_q ? q_ms : k_ms)[head] + eps)"

fault(
    "kernel-alignment-unchecked", QKV, "C % 8 == 0 && ((size_t)x | (size_t)head.proj) % 16 == 0", "C % 8 == 0",
    SANITIZED,
)
fault(
    "kernel-rotation-sign", QKV_HEAD, "low = fmaf(a, c, -(b * s));", "low = fmaf(a, c, b * s);", QKV_TEST,
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
fault("kernel-gain-after-rope-tensor-cores", QKV_MMA, MANY_GAIN + MANY_ROTATE, MANY_ROTATE + MANY_GAIN, MANY_HEADS)
fault("kernel-k-gain-dropped", QKV_HEAD, "k_bias, k_norm, k_rows", "k_bias, nullptr, k_rows", QKV_TEST)
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
    "kernel-position-of-the-tile", QKV_MMA, "head.rotated ? positions[t] : 0", "head.rotated ? positions[t - row0] : 0",
    "ops::qkv_rope_of_many_rows[emulated-mma_few-65-2-1-128-72-False-True-bfloat16]",
)
fault("kernel-bias-of-k-for-v", QKV_HEAD, "{v_proj, v_bias,", "{v_proj, k_bias,", QKV_TEST)
fault("kernel-k-rounded-before-norm", QKV, "store(k + at, (value));", f"store(k + at, {bf16('value')});", QKV_TEST)
fault(
    "kernel-row-beyond-the-cache-tensor-cores", QKV_MMA,
    "            if (head.rows && target[half] >= S) target[half] = -1;\n", "", "ops::rows_beyond_the_cache",
)
fault(
    "kernel-half-a-head-twice", QKV_MMA, "rows.second = rows.first + (size_t)(D / 2) * C;", "rows.second = rows.first;",
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
fault("head-eps-outside-root", QK_NORM, HEAD_ROOT, "(sqrtf((is_q ? q_ms : k_ms)[head]) + eps)", "ops::qk_norm")
fault("head-eps-dropped", QK_NORM, HEAD_ROOT, "sqrtf((is_q ? q_ms : k_ms)[head])", "ops::qk_norm")
fault("head-mean-square-of-q", QK_NORM, "(is_q ? q_ms : k_ms)[head]", "q_ms[head]", "ops::qk_norm")
fault("head-one-too-many", QK_NORM, "is_q = h < H;", "is_q = h <= H;", MODEL_KERNELS)
fault("head-row-beyond-the-cache", QK_NORM, "(row < 0 || row >= S)", "row < 0", "ops::rows_beyond_the_cache")
fault("head-k-in-the-wrong-row", QK_NORM, "rows ? rows[t] : t;", "t;", MODEL_KERNELS)
