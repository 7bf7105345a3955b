"""Products: dot products of few rows, tiles on CUDA cores, mma and wgmma of many rows."""

from faults.table import RESIDUAL, SANITIZED, bf16, fault

# fmt: off
DOT, MATMUL, SWIGLU = "kernels/dot.cuh", "kernels/matmul.cu", "kernels/swiglu.cu"
MMA, WGMMA = "kernels/mma.cuh", "kernels/wgmma.cuh"
SHARED_SUMS = "ops::many_warps_share_a_product"
BITS = "ops::float32_rows_keep_all_their_bits[emulated-mma_few-1.0-5]"
MANY, MANY_F32 = (f"ops::products_of_many_rows[emulated-mma_few-17-40-136-{name}]" for name in ("bfloat16", "float32"))


def product(tile: str, shape: str) -> str:
    return f"wgmma::products[emulated-wgmma_{tile}-{shape}]"


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
fault("matmul-residual-dropped", MATMUL, "residual ? sum + before : sum;", "sum;", RESIDUAL)
fault("matmul-residual-twice", MATMUL, "? acc[i][j] + residual[at]", "? acc[i][j] + 2.0f * residual[at]", RESIDUAL)
fault("matmul-one-output-too-many", MATMUL, "&& t < T && n < N;", "&& t < T && n <= N;", "ops::matmul")
fault("matmul-tile-edge", MATMUL, "if (t >= T || n >= N)", "if (t >= T)", "ops::matmul")
fault(
    "matmul-alignment-unchecked", MATMUL, "C % 8 == 0 && ((size_t)x | (size_t)weight) % 16 == 0", "C % 8 == 0",
    SANITIZED,
)
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
fault(
    "wgmma-groups-out-of-turn", WGMMA, "if (TURNS) mbarrier_wait(turns + group, number / 2 % 2 ^ !group);", "",
    product("turns", "257-80-264"), product("turns", "129-48-136"), product("turns", "2048-16-8"),
)
fault(
    "wgmma-read-before-it-is-done", WGMMA, "                wgmma_wait<0>();", "                wgmma_wait<1>();",
    product("wide", "257-80-264"),
)
fault(
    "wgmma-stage-still-read", WGMMA, "mbarrier_wait(empty + place.stage, place.turn ^ 1);", "",
    product("wide", "257-80-264"), product("few", "2048-16-8"),
)
fault(
    "wgmma-stage-given-back-too-early", WGMMA, "if (step && lane < PEERS) mbarrier_arrive_in(empty + before, lane);",
    "if (lane < PEERS) mbarrier_arrive_in(empty + place.stage, lane);", product("wide", "257-80-264"),
)
fault(
    "swiglu-gate-for-up-wgmma", SWIGLU, "acc[first + j + Tile::NJ / 2][e];  //", "acc[first + j][e];  //",
    product("middle", "129-48-136"),
)
fault(
    "wgmma-reads-before-the-launch-before-ends", WGMMA, "wait_for_launches_before();\n                for (bool first",
    "for (bool first", "wgmma::recorded_products_wait_for_what_they_read",
)
fault("wgmma-slot-not-free-at-first", WGMMA, "!first || step >= STAGES", "!first", "wgmma::products")
