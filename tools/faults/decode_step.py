"""A token in one launch."""

from faults.table import GIVES_UP, fault

# fmt: off
STEP, STEP_RING, STEP_VECTOR, STEP_ATTENTION, STEP_CHOICE, STEP_SAMPLED = (
    "kernels/decode_step.cu", "kernels/decode_ring.cuh", "kernels/decode_vector.cuh", "kernels/decode_attention.cuh",
    "kernels/decode_choice.cuh", "kernels/decode_sampled.cuh",
)
DECODE = "cuqwen/decode.py"
TWO_HEADS, BIASES, SEGMENTS, ROUNDED = (
    f"decode_step::decode_step[emulated-{case}]"
    for case in (
        "two_heads_a_key_head-float32", "untied_no_gain_biases-float32", "two_heads_together_ragged_segments-float32",
        "two_heads_a_key_head-bfloat16",
    )
)
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
    "step-last-part-lost", STEP_VECTOR, "to[16 * p] = parts[p];", "to[16 * p] = p ? parts[p] : 0;", TWO_HEADS,
)
fault(
    "step-columns-of-the-other-rows", STEP_VECTOR, "(i < 2 ? c[0] : c[2])", "(i < 1 ? c[0] : c[2])", TWO_HEADS,
)
fault(
    "step-first-columns-twice", STEP_VECTOR, "v.part[m][b % 2 * 2], v.part[m][b % 2 * 2 + 1]", "v.part[m][0], v.part[m][1]",
    TWO_HEADS,
)
fault(
    "step-sums-of-tiles-exchanged", STEP_VECTOR, "part + 4 * ROWS * PITCH, sum + 4", "part + 4 * ROWS * PITCH, sum + 2",
    SHARES,
)
fault("step-frames-not-waited-for", STEP_RING, "        if (there) return;\n", "        return;\n", TWO_HEADS)
fault("step-one-copy-written", STEP_VECTOR, "copy < COPIES", "copy < 1", TWO_HEADS)
fault(
    "step-second-half-not-moved", STEP_RING, "slot + row_place<COLUMNS>(4 * lane)", "slot + 8 * lane * COLUMNS", TWO_HEADS,
)
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
    "decode_step::decode_step_shares_out_the_keys[emulated-2-193]",
)
fault(
    "step-keys-behind-the-share", STEP_ATTENTION, "score[h][u] = row < there[f] ? sum : MINUS_INFINITY;",
    "score[h][u] = sum;", SHARES,
)
fault("step-values-behind-the-share", STEP_ATTENTION, "row, own, row < there[f], x)", "row, own, true, x)", SHARES)
fault("step-pieces-of-the-first-slot", STEP_ATTENTION, "(row + slot) % 8", "row % 8", SHARES)
fault("step-keys-of-another-head", STEP_RING, "(mine.kv() * BOXES + lane % BOXES)", "lane % BOXES", TWO_HEADS)
fault("step-keys-of-another-layer", STEP_RING, "mine, keys, values, l * S);", "mine, keys, values, 0);", TWO_HEADS)
fault(
    "step-rows-dealt-to-nobody", STEP_RING, "min(rows, int(b * units / blocks * unit)), last",
    "min(rows, int((b * units + 1) / blocks * unit)), last",
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
fault("lots-half-of-each", STEP_SAMPLED, "top[j] = max(unsigned(a), unsigned(b));", "top[j] = unsigned(a);", AMONG)
fault("lots-chosen-in-a-ring-in-use", STEP, "if (chooses()) ring.wait_for_choice(n);", "", AMONG)
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
    "element % 2 ? state[1][0] : state[1][1]", "decode_step::decode_step_shares_out_the_keys[emulated-2-193]",
)
