// The choice of the next token in decode_step.cu, in its terms. Every block comes to the same.
#pragma once

constexpr int NO_CHOICE = -1;       // in the place of a token id
constexpr int LOST = 1, ENDED = 2;  // in ids[1]

struct Chosen {
    int id;
    bool lost, halted;
};

#if SAMPLED
#include "decode_sampled.cuh"
#else
constexpr unsigned RANK_OF_INFINITY = 0x7f800000u | 0x80000000u;  // of +inf; NaN has a larger one, -inf its complement

// Larger is better: NaN first, then by value, then the lower id.
__device__ __forceinline__ u64 rank(float logit, int id) {
    const unsigned bits = __float_as_uint(logit == 0.0f ? 0.0f : logit);
    const unsigned key = logit != logit ? 0xfffffffeu : bits >> 31 ? ~bits : bits | 0x80000000u;
    return (u64)key << 32 | ~(unsigned)id;
}

__device__ __forceinline__ u64 best_of_warp(u64 x) {
#pragma unroll
    for (int offset = 16; offset; offset >>= 1) x = max(x, __shfl_xor_sync(0xffffffffu, x, offset));
    return x;
}
__device__ __forceinline__ u64 best_of_warps(const u64* best) {
    u64 all = best[0];
#pragma unroll
    for (int w = 1; w < WARPS; w++) all = max(all, best[w]);
    return all;
}

// The best of all blocks' ranks, of which this thread has seen `best`.
__device__ __forceinline__ Chosen choose_token(Consumer& me, u64 best, u64* words, unsigned tag, int halted) {
    Shared& shared = me.shared;
    const int t = threadIdx.x;
    best = best_of_warp(best);
    if (t % 32 == 0) shared.best[0][t / 32] = best;
    me.barrier();
    if (t == 0) {
        best = shared.lost ? ~0ull : best_of_warps(shared.best[0]);
        store_relaxed2(words + BEST + 2 * blockIdx.x, (u64)tag << 32 | best >> 32, (u64)tag << 32 | (best & 0xffffffffu));
        if (blockIdx.x == 0) store_relaxed(words + CHOSEN, (u64)tag << 32 | unsigned(halted != 0));
    }
    best = 0;
#pragma unroll 1
    for (int b0 = 0; b0 < int(gridDim.x); b0 += CONSUMERS) {
        const int b = min(b0 + t, int(gridDim.x) - 1);
        float both[1][2];
        read_pairs<1>([&](int) { return words + BEST + 2 * b; }, tag, both, me.patience);
        best = max(best, (u64)__float_as_uint(both[0][0]) << 32 | __float_as_uint(both[0][1]));
    }
    if (t == CONSUMERS - 1) shared.halted = __float_as_uint(read_word(words + CHOSEN, tag, me.patience));
    if (me.patience.lost) shared.lost = 1;
    best = best_of_warp(best);
    if (t % 32 == 0) shared.best[1][t / 32] = best;
    me.barrier();
    best = best_of_warps(shared.best[1]);
    const bool lost = shared.lost || best == ~0ull;
    const unsigned key = unsigned(best >> 32);
    return {lost || key >= RANK_OF_INFINITY || key <= ~RANK_OF_INFINITY ? NO_CHOICE : int(~(unsigned)best), lost, shared.halted != 0};
}
#endif
