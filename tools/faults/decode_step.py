"""A token in one launch."""

from faults.table import GIVES_UP, fault

# fmt: off
STEP, STEP_RING, STEP_VECTOR, STEP_ATTENTION, STEP_KEYS, STEP_CHOICE, STEP_SAMPLED = (
    "kernels/decode_step.cu", "kernels/decode_ring.cuh", "kernels/decode_vector.cuh", "kernels/decode_attention.cuh",
    "kernels/decode_keys.cuh", "kernels/decode_choice.cuh", "kernels/decode_sampled.cuh",
)
DECODE = "cuqwen/decode.py"
TWO_HEADS, BIASES, SEGMENTS, FOUR_ROWS, ROUNDED = (
    f"decode_step::decode_step[emulated-{case}]"
    for case in (
        "two_heads_a_key_head-float32", "untied_no_gain_biases-float32", "two_heads_together_ragged_segments-float32",
        "frames_of_four_rows-float32", "two_heads_a_key_head-bfloat16",
    )
)
SHARES, SHARES_193, SHARES_MMA, SHARES_GROWING = (
    f"decode_step::decode_step_shares_out_the_keys[emulated-{case}]"
    for case in ("2-64-float32-300", "2-64-float32-193", "4-128-bfloat16-517", "4-128-float16-517")
)

fault(
    "step-attention-residual-dropped", STEP, "AFTER_O + mine, before + sum_warps", "AFTER_O + mine, sum_warps",
    TWO_HEADS,
)
fault(
    "step-mlp-residual-dropped", STEP, "AFTER_DOWN + mine, before + sum_warps", "AFTER_DOWN + mine, sum_warps",
    TWO_HEADS,
)
fault(
    "step-waits-for-the-wrong-layer", STEP, "copy + AFTER_DOWN, tag - 1, l ?", "copy + AFTER_DOWN, tag, l ?",
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
    "step-last-part-lost", STEP_VECTOR, "to[32 * p] = parts[p];", "to[32 * p] = p ? parts[p] : 0;", TWO_HEADS,
)
fault(
    "step-columns-of-the-other-half", STEP_VECTOR, "(upper ? c[3] : c[0])", "(upper ? c[2] : c[0])", TWO_HEADS,
)
fault(
    "step-first-columns-twice", STEP_VECTOR, "v.part[m][2 * e], v.part[m][2 * e + 1]", "v.part[m][0], v.part[m][1]",
    TWO_HEADS,
)
fault(
    "step-sums-of-tiles-exchanged", STEP_VECTOR, "part + 4 * ROWS * PITCH, sum + 4", "part + 4 * ROWS * PITCH, sum + 2",
    SHARES,
)
fault("step-frames-not-waited-for", STEP_RING, "        if (there) return;\n", "        return;\n", TWO_HEADS)
fault("step-one-copy-written", STEP_VECTOR, "copy < COPIES", "copy < 1", TWO_HEADS)
fault("step-upper-rows-twice", STEP_VECTOR, "upper_rows + 4 * ROW_PITCH<COLUMNS>", "upper_rows", TWO_HEADS)
fault("step-first-frame-of-a-tile-twice", STEP_VECTOR, "slot[f + PARTS - 1] * SLOT", "slot[f] * SLOT", FOUR_ROWS)
fault("step-first-rows-in-every-frame", STEP_RING, "(size_t)(first + lane) * COLUMNS", "(size_t)lane * COLUMNS", FOUR_ROWS)
fault("step-empty-frame-overtakes-lanes", STEP_RING, "if (PARTS > 1) __syncwarp();", "", FOUR_ROWS)
fault("step-warps-all-begin-at-the-first-frame", STEP_ATTENTION, "ring.skip(warp / WARPS_OF_FRAME);", "ring.skip(0);", SHARES)
fault("step-frames-not-passed", STEP_ATTENTION, "me.ring.skip(frames);", "me.ring.skip(max(0, frames - 1));", SHARES)
fault("step-ring-never-turns-over", STEP_RING, "slot = 0, parity ^= 1;", "slot = 0;", SEGMENTS)
fault("step-waits-for-a-later-frame", STEP_RING, "parity ^ unsigned(wrapped)", "parity", TWO_HEADS)
fault(
    "step-last-of-equals", STEP_CHOICE, "32 | ~(unsigned)id;", "32 | (unsigned)id;",
    "decode_step::decode_step_without_a_choice[emulated-None]",
    also=[("int(~(unsigned)best)", "int((unsigned)best)")],
)
fault(
    "step-ids-beyond-the-tokenizer", STEP, "t < rows && r < n_ids) best", "t < rows) best",
    "decode_step::decode_step_without_a_choice[emulated-None]",
)
fault(
    "step-nan-chosen-as-a-token", STEP_CHOICE, "key >= RANK_OF_INFINITY || ", "",
    "decode_step::decode_step_without_a_choice[emulated-nan]",
)
fault("step-loss-not-told", STEP, "chosen.lost ? LOST : over", "over", GIVES_UP)
fault("step-loss-forgotten", STEP, "chosen.lost ? 0 : shared.turn + 1;", "shared.turn + 1;", GIVES_UP)
fault(
    "step-of-a-token-that-is-none", STEP, "shared.known = known,", "shared.known = 1,",
    "decode_step::decode_step_of_what_does_not_exist",
)
fault("step-position-not-advanced", STEP, "*position = next;", "*position = next - 1;", TWO_HEADS)
fault("step-epoch-not-counted", STEP, "chosen.lost ? 0 : shared.turn + 1;", "chosen.lost ? 0 : shared.turn;", TWO_HEADS)
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
    "decode_plan::every_key_is_in_one_share_of_each_unit",
)
fault(
    "step-keys-behind-the-share", STEP_KEYS, "if (n >= count) score[h][u] = MINUS_INFINITY;", "", SHARES,
)
fault("step-keys-behind-the-share-mma", STEP_KEYS, "if (n + 8 * r >= count) score[r] = MINUS_INFINITY;", "", SHARES_MMA)
fault("step-values-behind-the-share", STEP_KEYS, "min(u * KEYS + group(), count - 1)", "u * KEYS + group()", SHARES)
fault(
    "step-values-behind-the-share-mma", STEP_KEYS, "min(key_row(lane() % 8) + lane() / 16 * 8, count - 1)",
    "key_row(lane() % 8) + lane() / 16 * 8", SHARES_MMA,
)
fault("step-pieces-not-turned", STEP_KEYS, "(n % 8 ^ row % 8)", "(n % 8)", SHARES)
fault("step-weights-of-other-keys", STEP_KEYS, "const int from = 8 * i + g / 4 * 2;", "const int from = 8 * i;", SHARES_MMA)
fault("step-weights-without-last-part", STEP_KEYS, "g % 4 == 2 ? parts[2] : 0;", "0;", SHARES_MMA)
fault("step-query-without-last-part", STEP_KEYS, "if (n % 4 == 3) x", "if (n % 4 >= 2) x", SHARES_MMA)
fault("step-newest-key-in-two-columns", STEP_KEYS, "        if (i % 2) return;\n", "", ROUNDED)
fault("step-base-does-not-follow", STEP_KEYS, "base = top, weight *= shrink;", "weight *= shrink;", SHARES_MMA)
fault("step-sums-not-scaled-mma", STEP_KEYS, "sum[m][e] *= shrink;", ";", SHARES_MMA)
fault("step-keys-of-another-head", STEP_RING, "(mine.kv() * BOXES + lane % BOXES)", "lane % BOXES", TWO_HEADS)
fault("step-keys-of-another-layer", STEP_RING, "mine, keys, values, l * S);", "mine, keys, values, 0);", TWO_HEADS)
fault(
    "step-rows-dealt-to-nobody", STEP_RING, "min(rows, int(b * units / blocks * unit)), last",
    "min(rows, int((b * units + 1) / blocks * unit)), last",
    SEGMENTS,
)
fault(
    "step-sums-not-scaled", STEP_KEYS, "sum[h][e] *= shrink;", ";", SHARES_GROWING,
)
fault(
    "step-warps-not-rescaled", STEP_ATTENTION, "fmaf(shared.weight[h][w], factor, weight)",
    "weight + shared.weight[h][w]", SHARES,
)
fault(
    "step-shares-not-rescaled", STEP_ATTENTION, "float weight = state[0][1] * factor;", "float weight = state[0][1];",
    SHARES,
)

# Many steps in one launch
MANY = "decode_many::many_steps_are_single_ones[emulated-two_heads_a_key_head-5-bfloat16]"
ENDS = "decode_many::an_answer_ends_where_it_is_told_to[emulated]"
HALT = "decode_many::halt_ends_a_launch[emulated]"
fault("steps-one-rotation-for-all", STEP, "turn_by(token.position + 1);", "turn_by(token.position);", MANY)
fault("steps-one-turn-for-all", STEP, "shared.turn++, ", "", MANY)
fault("steps-cached-keys-do-not-grow", STEP, "(n ? p < S : known) ? p : 0", "known ? first_position : 0", MANY)
fault("steps-end-ids-ignored", STEP, " || __any_sync(0xffffffffu, id == shared.ends[t % 32])", "", ENDS)
fault("steps-go-on-after-the-end", STEP, "if (!fresh && ids[1] == ENDED) return;", "", HALT)
fault("steps-halt-ignored", STEP_CHOICE, "(u64)tag << 32 | unsigned(halted != 0)", "(u64)tag << 32", HALT)
fault("steps-copies-still-on-their-way", STEP, "frames <= SLOTS; frames++", "frames <= 1; frames++", HALT)
fault("steps-token-of-another-place", STEP, "tokens + next, id", "tokens + next - 1, id", MANY)
AMONG = "decode_many::a_launch_chooses_among_many"
fault(
    "lots-late-ones-not-looked-at", STEP_SAMPLED, "for (int n = early + t; n < all;", "for (int n = early + t; n < early;",
    AMONG,
)
fault("lots-half-of-each", STEP_SAMPLED, "return max(top[0], top[1]);", "return top[0];", AMONG)
fault("lots-second-of-a-half-forgotten", STEP_SAMPLED, "(its.rest[h] & ~LANE_BITS) >= rank || ", "", AMONG)
fault("lots-token-of-the-other-half", STEP_SAMPLED, "first + 32 * h +", "first +", AMONG)
fault("lots-second-not-rounded-up", STEP_SAMPLED, "second + LANE_BITS & ~LANE_BITS", "second & ~LANE_BITS", AMONG)
fault(
    "lots-loss-not-told", STEP_SAMPLED, "lost ? sampling::ALL : top", "top",
    "decode_many::a_block_that_is_lost_later_is_noticed",
)
fault("lots-chooser-expects-projections", STEP, "const Deal qkv = projections(l),", "const Deal qkv(QKV, l, ROWS),", AMONG)
fault("lots-chosen-in-a-ring-in-use", STEP_RING, "if (l == 0) ring.wait_for_next(n);", "", AMONG)
fault("lots-nothing-but-the-late-ones", STEP_SAMPLED, "gather_lots(s, V, rank, 0, before);", "", AMONG)
fault(
    "heads-together-too-late", DECODE, ", cached=start + asked - count)", ")", "decode_many::an_answer_grows_to_many_keys"
)
fault("answer-cache-behind-its-tokens", DECODE, "start + (int(made[0]) if len(made) else more)", "start", ENDS)
fault("answer-not-halted", DECODE, "                step.halt[0] = 1\n", "", ENDS)
fault("answer-halted-for-ever", DECODE, "            step.halt[0] = 0\n", "", ENDS)
fault(
    "answer-one-launch-only", DECODE, "while asked < more and asked < arrived + BATCH:",
    "while asked == 0 and asked < more:", ENDS,
)
fault(
    "step-weight-of-a-share-for-its-top", STEP_ATTENTION, "element % 2 ? state[1][1] : state[1][0]",
    "element % 2 ? state[1][0] : state[1][1]", SHARES_193,
)
