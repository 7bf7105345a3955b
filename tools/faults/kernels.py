"""Norms, stores, activation, argmax, embedding."""

from faults.table import SANITIZED, SCALES, ZERO_ROWS, bf16, fault

# fmt: off
RMSNORM, COMMON = "kernels/rmsnorm.cu", "kernels/common.cuh"
POWER, POWER_OF_SCALED = "const float power = sum / C + eps;", "add) / C + eps * s * s);"
NORMALISED = "a[e] = a[e] * scale.before * scale.after * gain[e];"
SILU, ARGMAX, TIES = "kernels/silu_mul.cu", "kernels/argmax.cu", "ops::argmax_ties_infinities_and_nan"

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
