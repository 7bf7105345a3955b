// The choice of the next token in decode_step.cu, in its terms. Every block comes to the same.
#pragma once

constexpr int NO_CHOICE = -1;       // in the place of a token id
constexpr int LOST = 1, ENDED = 2;  // in ids[1]

struct Chosen {
    int id;
    bool lost, halted;
};

#if SAMPLED
// With top_k alone or before other filters, and no penalties: blocks publish the ranks of groups' largest logits as they compute them. All
// else takes another look at the logits, and fences.
__device__ __forceinline__ bool by_tops(const unsigned* tops, const int* history) { return tops && !history; }

// Takes the logits of one pass of the head, row `first` + t of `rows` below PASS ROWS by thread t, the first two warps: all of a group come from
// one block, in order, and each warp publishes the rank of its largest. top: this warp's so far, in shared memory.
__device__ __forceinline__ void take_tops(unsigned* top, int shift, int n_ids, u64* words, unsigned tag, int first, int rows, int last, float logit) {
    const int t = threadIdx.x, r = first + t, next = first + PASS * ROWS;
    const unsigned here = __reduce_max_sync(0xffffffffu, t < rows && r < n_ids ? sampling::rank_of(logit) : 0);
    if (t % 32) return;
    const bool is_last = (next & ((1 << shift) - 1)) == 0 || next >= last;
    const unsigned largest = max(*top, here);
    if (is_last && first >> shift << shift < n_ids) store_relaxed(words + TOPS + (first >> shift) * 2 + t / 32, (u64)tag << 32 | largest);
    *top = is_last ? 0 : largest;
}

// What every block has published of this thread's groups.
__device__ __forceinline__ void read_tops(const sampling::Inputs& in, const u64* words, unsigned tag, Patience& patience,
                                          unsigned (&top)[sampling::GROUPS / sampling::THREADS]) {
    constexpr int N = sampling::GROUPS / sampling::THREADS;
    const int groups = in.groups();
    bool ready = false;
#pragma unroll 1
    for (unsigned tries = 0; !ready; tries++) {
        u64 pair[N][2];
        ready = tries % 256 == 255 && patience.over();
#pragma unroll
        for (int j = 0; j < N; j++) {
            const int g = j * sampling::THREADS + threadIdx.x;
            pair[j][0] = pair[j][1] = (u64)tag << 32;
            if (g < groups) load_relaxed2(words + TOPS + 2 * g, pair[j][0], pair[j][1]);
        }
        bool all = true;
#pragma unroll
        for (int j = 0; j < N; j++) {
            all &= unsigned(pair[j][0] >> 32) == tag && unsigned(pair[j][1] >> 32) == tag;
            top[j] = max(unsigned(pair[j][0]), unsigned(pair[j][1]));
        }
        ready |= all;
    }
}

// The last block, which has nothing else to do but its part of the head, chooses in the memory of its ring, which is empty then.
__device__ __noinline__ Chosen choose_token(Shared& shared, Patience patience, const sampling::Inputs& in, const Deal& head, u64* words) {
    const unsigned tag = in.logits.tag;
    const int t = threadIdx.x;
    const bool quick = by_tops(in.tops, in.history);
    block_barrier();  // the block's logits are there
    if (!quick) {
#pragma unroll 1
        for (int g = (head.first >> in.shift) + t / 32; g << in.shift < min(head.last, in.N); g += WARPS) look_at_group(in, g);
        block_barrier();
        if (t == 0) __threadfence();
    }
    if (t == 0) store_relaxed(words + BEST + 2 * blockIdx.x, (u64)tag << 32 | shared.lost);
    if (!works()) {
        unsigned top[sampling::GROUPS / sampling::THREADS];
        if (quick) read_tops(in, words, tag, patience, top);
#pragma unroll 1
        for (int b = t; b < int(gridDim.x); b += CONSUMERS)
            if (__float_as_uint(read_word(words + BEST + 2 * b, tag, patience)) || patience.lost) shared.lost = 1;
        if (!quick) __threadfence();
        block_barrier();
        const bool lost = shared.lost;
        int token = NO_CHOICE;
        if (!lost) {
            if (!quick) load_tops(in, top);
            token = choose(*reinterpret_cast<sampling::Shared*>(reinterpret_cast<unsigned char*>(&shared) - SLOTS * SLOT), in, shared.random, top);
        }
        if (t == 0) {
            if (in.history) __threadfence();  // all will look at it
            store_relaxed2(words + CHOSEN, (u64)tag << 32 | unsigned(token), (u64)tag << 32 | unsigned(lost ? LOST : shared.halted ? ENDED : 0));
        }
        fence_proxy_async();
    }
    const u64* const pair[1] = {words + CHOSEN};
    float both[1][2];
    read_pairs<1>(pair, tag, both, patience);
    if (in.history) __threadfence();
    if (patience.lost) shared.lost = 1;
    block_barrier();
    const unsigned state = __float_as_uint(both[0][1]);
    return {int(__float_as_uint(both[0][0])), shared.lost || state == LOST, state == ENDED};
}
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
    for (int b = t; b < int(gridDim.x); b += CONSUMERS) {
        const u64* const pair[1] = {words + BEST + 2 * b};
        float both[1][2];
        read_pairs<1>(pair, tag, both, me.patience);
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
