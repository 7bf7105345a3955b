"""Attention of a token, on tensor cores too, and of a prompt by mma and by wgmma."""

from faults.table import ATTENTION_TEST, SCORES, bf16, fault

# fmt: off
ATTENTION, GROUP, SHARES = (f"kernels/attention{file}" for file in (".cu", "_group.cu", "_shares.cuh"))
SOFTMAX = "kernels/softmax.cuh"
ATTENTION_MMA, ATTENTION_WGMMA = "kernels/attention_mma.cu", "kernels/attention_wgmma.cu"
ONE_KEY, TWO_TILES, LONG, GROUP_ONE_KEY, _, GROUP_LONG = (
    f"ops::attention_of_a_short_sequence_in_a_long_cache[emulated-{heads}-{last}]"
    for heads in (2, 3)
    for last in (0, 255, 2499)
)
GROUP_SCORES = "ops::attention_extreme_scores[emulated-3-300.0]"
TURNS = "ops::attention_with_more_keys_than_warps_take_at_once"


def prompts(shape: str, side: str = "emulated", q: str = "bfloat16") -> str:
    return f"attention_mma::prompts[{side}-{shape}-float32-{q}-{q}]"


FIRST, RAGGED = "5-8-1-128-60", "130-2-1-128-70"

fault(
    "attention-sees-the-future", ATTENTION, "j0 + u * GROUPS <= last ? score", "j0 + u * GROUPS <= last + 1 ? score",
    ATTENTION_TEST,
)
fault(
    "attention-misses-itself", ATTENTION, "j0 + u * GROUPS <= last ? score",
    "j0 + u * GROUPS < last || last == 0 ? score", ATTENTION_TEST,
)
fault(
    "attention-group-mapping", ATTENTION, "keys += (size_t)kv * D + first;",
    "keys += (size_t)(blockIdx.y % K) * D + first;", ATTENTION_TEST,
    also=[("values += (size_t)kv * D + first;", "values += (size_t)(blockIdx.y % K) * D + first;")],
)
fault("attention-scale", ATTENTION, "query[h][i] *= scale;", ";", ATTENTION_TEST)
fault("attention-without-maximum", ATTENTION, "top = fmaxf(top, p[u][h]);", "top = 0.0f;", SCORES)
fault("attention-acc-not-rescaled", ATTENTION, "acc[h][i] *= shrink;", ";", TWO_TILES)
fault(
    "attention-weight-not-rescaled", ATTENTION, "maximum[h] = top, weight[h] *= shrink;", "maximum[h] = top;",
    TWO_TILES,
)
fault(
    "attention-merge-not-rescaled", ATTENTION, "reduce<LANES, 32>(weight[h] * shrink, add)",
    "reduce<LANES, 32>(weight[h], add)", ATTENTION_TEST,
)
fault("attention-merge-last-group", ATTENTION, "g < GROUPS; g++) sum +=", "g < GROUPS - 1; g++) sum +=", ATTENTION_TEST)
fault(
    "attention-shares-overlap", ATTENTION, "j0 - group <= last; j0 += Z * TILE", "j0 - group <= last; j0 += TILE",
    LONG,
)
fault("attention-group-without-keys", ATTENTION, "        if (j0 > last) continue;\n", "", ONE_KEY)
fault(
    "attention-share-without-keys", ATTENTION, "min((int)gridDim.z, last / TILE + 1)", "(int)gridDim.z",
    "ops::attention_of_a_short_sequence_in_a_long_cache",
)
fault("attention-shares-not-rescaled", SHARES, "its[i].x = exp2f(its[i].x - top)", "its[i].x = 1.0f", LONG, GROUP_LONG)
fault("attention-last-share", SHARES, "if (z0 + i < Z) {", "if (z0 + i < Z - 1) {", LONG, GROUP_LONG)
fault("attention-shares-before-the-last", SHARES, "    if (!is_last) return;\n", "    if (is_last) return;\n", LONG, GROUP_LONG)
fault("group-sees-the-future", GROUP, "+ e % 2 > last)", "+ e % 2 > last + 1)", ATTENTION_TEST)
fault("group-misses-itself", GROUP, "+ e % 2 > last)", "+ e % 2 >= max(last, 1))", ATTENTION_TEST)
fault("group-reads-unwritten-rows", GROUP, "values + min(key, last) * row", "values + key * row", GROUP_ONE_KEY)
fault("group-without-maximum", GROUP, "top = fmaxf(top, largest);", "top = 0.0f;", GROUP_SCORES)
fault("group-acc-not-rescaled", GROUP, "acc[n][e / 2][e % 2] *= shrink;", ";", TURNS)
fault("group-weight-not-rescaled", GROUP, "            total *= shrink;\n", "", TURNS)
fault("group-shares-overlap", GROUP, "step = WARPS * Z * KEYS;", "step = WARPS * KEYS;", GROUP_LONG)
fault(
    "group-share-without-keys", GROUP, "min((int)gridDim.z, (tiles + 3) / 4)", "(int)gridDim.z",
    "ops::attention_of_a_short_sequence_in_a_long_cache",
)
fault("group-part-of-a-query-lost", GROUP, "last[3] = high[0];", "last[3] = 0u;", TURNS)
fault(
    "group-second-chunk-of-heads", GROUP, "+ kv * size + in_group;", "+ kv * size;",
    "ops::attention[emulated-2-20-1-64-300-bfloat16]",
)
fault("group-barrier-after-queries", GROUP, "    __syncthreads();\n    float acc", "    float acc", ATTENTION_TEST)
fault("group-barrier-before-sums", GROUP, "    __syncthreads();\n    for (int e", "    for (int e", ATTENTION_TEST)
fault(
    "group-tile-not-there", GROUP, "cp_async_wait<1>();\n        float score",
    "cp_async_wait<2>();\n        float score",
    ATTENTION_TEST,
)
fault(
    "attention-bf16-weights", ATTENTION, "fmaf(p[u][h], value[i], acc[h][i])",
    f"fmaf({bf16('p[u][h]')}, value[i], acc[h][i])", ATTENTION_TEST,
)
fault(
    "attention-barrier", ATTENTION, "maxima[warp][h] = top[h];\n    }\n    __syncthreads();\n",
    "maxima[warp][h] = top[h];\n    }\n", ATTENTION_TEST,
)
fault(
    "attention-barrier-before-sums", ATTENTION, "acc[h][i] * shrink;\n    }\n    __syncthreads();\n",
    "acc[h][i] * shrink;\n    }\n", ATTENTION_TEST,
)
fault("prompt-attention-misses-itself", SOFTMAX, "8 * j + e > seen", "8 * j + e >= seen", prompts(RAGGED))
fault(
    "prompt-attention-beyond-the-cache", SOFTMAX, "p < S ?", "p <= S ?",
    "attention_mma::positions_in_any_order_and_beyond_the_cache[emulated-bfloat16-bfloat16]",
)
fault(
    "prompt-attention-without-maximum", SOFTMAX, "fmaxf(top[r], largest * scale)", "0.0f",
    "attention_mma::extreme_scores[emulated-300.0-bfloat16-bfloat16]",
)
fault(
    "prompt-attention-weight-not-rescaled", SOFTMAX, "total[r] = fmaf(total[r], shrink[r], sums[0] + sums[1]);",
    "total[r] += sums[0] + sums[1];", prompts(RAGGED),
)
fault("mma-attention-warp-stops-early", ATTENTION_MMA, "first > warp_last", "first >= warp_last", prompts(FIRST))
fault("mma-attention-hides-too-little", ATTENTION_MMA, "KEYS - 1 > warp_first", "KEYS - 1 > warp_last", prompts(RAGGED))
fault(
    "mma-attention-shrink-of-another-row", ATTENTION_MMA, "softmax[m].shrink[e / 2];", "softmax[m].shrink[0];",
    prompts(RAGGED),
)
fault("mma-attention-acc-not-rescaled", ATTENTION_MMA, "if (grown)", "if (false)", prompts(RAGGED))
fault(
    "mma-attention-group-mapping", ATTENTION_MMA, "keys += (size_t)(head / (H / K)) * D;",
    "keys += (size_t)(head % K) * D;", prompts("17-4-2-128-3"),
    also=[("values += (size_t)(head / (H / K)) * D;", "values += (size_t)(head % K) * D;")],
)
fault(
    "mma-attention-reads-unwritten-rows", ATTENTION_MMA, "const int there = min(block_last + 1, S);",
    "const int there = S;", prompts(FIRST),
)
fault(
    "mma-attention-barrier", ATTENTION_MMA,
    "        __syncthreads();  // the tile is there, and everybody has read the one before\n", "", prompts(RAGGED),
)
fault("mma-attention-tile-not-there", ATTENTION_MMA, "cp_async_wait<0>", "cp_async_wait<1>", prompts(RAGGED))
fault(
    "mma-attention-part-of-a-weight-lost", ATTENTION_MMA, "a[m][part][e] = parts[part];",
    "a[m][part][e] = part ? parts[part] : 0;", prompts(RAGGED, q="float32"),
)
fault(
    "wgmma-attention-acc-not-rescaled", ATTENTION_WGMMA, "if (grown)", "if (false)", prompts(RAGGED, "emulated-wgmma"),
)
fault(
    "wgmma-attention-reads-unwritten-rows", ATTENTION_WGMMA, "there = min(block_last + 1, S)", "there = S",
    prompts(FIRST, "emulated-wgmma"),
)
fault(
    "wgmma-attention-scores-before-they-are-done", ATTENTION_WGMMA, "            wgmma_wait<1>();\n", "",
    prompts(RAGGED, "emulated-wgmma"),
)
fault(
    "wgmma-attention-stage-still-read", ATTENTION_WGMMA, "mbarrier_wait(empty + tile % 2, tile / 2 % 2 ^ 1);",
    "mbarrier_wait(empty + tile % 2, 1);", prompts("20-2-1-64-800", "emulated-wgmma"),
)
fault(
    "wgmma-attention-tile-not-there", ATTENTION_WGMMA, "k_ring.filled<1>(tile)", "k_ring.filled<2>(tile)",
    prompts(RAGGED, "emulated-wgmma"),
)
fault(
    "mma-attention-parts-of-a-float32-cache", ATTENTION_MMA, "part + kv_part >= 2", "part + kv_part >= 3",
    "attention_mma::prompts",
)
