// The tokens from a threshold on, as a list in shared memory, and the choice from a short one. Part of sample.cu.
#pragma once
#include "sample_scores.cuh"

namespace sampling {

// Neighbouring threads share what one of n items asks of all others: the logarithm of their number.
__device__ __forceinline__ int sharing(int n) { return max(0, min(5, 31 - __clz(THREADS) - (32 - __clz(n - 1)))); }

// The rank below which top_k chooses nothing: the k-th largest of the segments' maxima. Any k segments of the vocabulary will
// do: more than k let few others through.
__device__ __forceinline__ unsigned threshold_of_top_k(Shared& s, int segments) {
    const int t = threadIdx.x, bits = sharing(segments), parts = 1 << bits;
#pragma unroll 1
    for (int i = t >> bits; i < segments; i += THREADS >> bits) {  // segments is a multiple of that, and of 4 parts
        const unsigned top = s.segments[i];
        int reached = 0;
#pragma unroll 1
        for (int j = t & (parts - 1); j < segments; j += 4 * parts)
#pragma unroll
            for (int m = 0; m < 4; m++) reached += s.segments[j + m * parts] >= top;
#pragma unroll 1
        for (int offset = parts / 2; offset; offset /= 2) reached += __shfl_xor_sync(ALL, reached, offset);
        const unsigned best = __reduce_max_sync(ALL, reached >= s.job.set.top_k ? top : 0);
        if (t % 32 == 0) atomicMax(&s.threshold, best);
    }
    block_barrier();
    return s.threshold;
}

// The tokens of marked groups with a rank from `rank` on and keys from low to high into s.keys and s.ids, in any order; returns
// how many there are. More than LIST are only counted. No group is marked afterwards.
__device__ __noinline__ int gather(Shared& s, unsigned rank, u64 low, u64 high) {
    const Job& job = s.job;
    const int t = threadIdx.x, lane = t % 32, rows = 1 << (job.shift - 5);  // of 32 tokens
    const bool bounded = low > 0 || high < ~0ull;
    const float least = value_of_rank(rank);
    if (t == 0) s.count = 0;
    block_barrier();
    const int groups = s.groups;
#pragma unroll 1
    for (int a = t / 32; a < groups; a += 4 * WARPS)
#pragma unroll 1
        for (int row = 0; row < rows; row += 4) {  // of four groups: sixteen loads on their way
            int ids[16];
            float logit[16];
            unsigned some = 0;
#pragma unroll
            for (int j = 0; j < 16; j++) {
                const int group = a + j / 4 * WARPS;
                ids[j] = group < groups ? (s.active[group] << job.shift) + 32 * (row + j % 4) + lane : job.N;
            }
            job.logits.get(ids, job.N, logit);
#pragma unroll
            for (int j = 0; j < 16; j++) some |= unsigned(!(logit[j] < least)) << j;
            if (job.history)  // penalties: the exact score decides
#pragma unroll
                for (int j = 0; j < 16; j++)
                    if (ids[j] < job.N && __ldcg(job.history + ids[j])) some |= 1u << j;
#pragma unroll 1
            for (; some; some &= some - 1) {
                const int j = __ffs(some) - 1, group = a + j / 4 * WARPS;
                const int id = group < groups ? (s.active[group] << job.shift) + 32 * (row + j % 4) + lane : job.N;
                if (id >= job.N || row + j % 4 >= rows) continue;
                if (bounded || job.history) {
                    const u64 key = key_at(job, id);
                    if (key < low || key > high || rank_of_key(key) < rank) continue;
                }
                const int place = atomicAdd(&s.count, 1);
                if (place < LIST) s.ids[place] = id;
            }
        }
    block_barrier();
    const int n = s.count;
#pragma unroll 1
    for (int i = t; i < min(n, LIST); i += THREADS) s.keys[i] = key_at(job, s.ids[i]);
    if (t == 0) s.groups = 0;
    block_barrier();
    return n;
}

// The first token, by ids, of a list of n <= SHORT at which the running sum of what the filters keep exceeds that share of it;
// -1 if its largest key leaves no choice. whole: what all tokens sum to, 0 if only those of the list count.
// Each sum is one over the tokens before another one, so each token asks all others, with nothing to wait for but four
// barriers. Weights are integers (units of 2^-52, the largest weight is 1), so that the order of the list does not matter.
__device__ __noinline__ int draw_from_short_list(Shared& s, int n, double whole, double share) {
    const Settings& set = s.job.set;
    const int bits = sharing(n), parts = 1 << bits, i = threadIdx.x >> bits, part = threadIdx.x & (parts - 1);
    const bool mine = i < n && part == 0;
    const u64 key = s.keys[min(i, n - 1)];
    const int id = s.ids[min(i, n - 1)];
    u64 largest = 0;
#pragma unroll 1
    for (int j = threadIdx.x % 32; j < n; j += 32) largest = max(largest, s.keys[j]);
    largest = warp_max(largest);
    if (!has_choice(largest)) return -1;
    const double weight = weight_of(key, value_of(largest), set);
    const u64 units = (u64)(weight * 0x1p52 + 0.5);
    if (mine) s.parts[i] = units;
    if (threadIdx.x == 0) s.least = s.removed = 0, s.first = -1;
    block_barrier();

    int place = -1;
    u64 less = 0, up_to = 0;  // of smaller keys; of those, and of equal ones up to this id
#pragma unroll 1
    for (int j = part; j < n; j += parts) {
        const u64 other = s.keys[j], w = s.parts[j];
        const bool smaller = other < key;
        if (smaller) less += w;
        if (smaller || (other == key && s.ids[j] <= id)) up_to += w, place++;
    }
    if (part) place++;
#pragma unroll 1
    for (int offset = parts / 2; offset; offset /= 2) {
        place += __shfl_xor_sync(ALL, place, offset);
        less += __shfl_xor_sync(ALL, less, offset), up_to += __shfl_xor_sync(ALL, up_to, offset);
    }
    if (mine && set.top_k > 0 && place == n - set.top_k) s.least = key, s.removed = less;
    if (mine && place == n - 1) s.total = up_to;
    block_barrier();

    bool kept = key >= s.least && weight >= set.min_p;
    if (set.top_p < 1 && place < n - 1) {  // the most likely token always stays
        const double listed = (double)(s.total - s.removed) * 0x1p-52, sum = whole > 0 ? whole : listed;
        kept = kept && (double)(up_to - s.removed) * 0x1p-52 > (1 - set.top_p) * sum - (sum - listed);
    }
    if (mine) s.kept[i] = kept ? units : 0;
    block_barrier();

    u64 all = 0, before = 0;
#pragma unroll 1
    for (int j = part; j < n; j += parts) {
        const u64 w = s.kept[j];
        all += w;
        if (s.ids[j] < id) before += w;
    }
#pragma unroll 1
    for (int offset = parts / 2; offset; offset /= 2) all += __shfl_xor_sync(ALL, all, offset), before += __shfl_xor_sync(ALL, before, offset);
    const u64 target = (u64)(share * (double)all);  // less than all: a share is at most 1 - 2^-53
    if (mine && kept && before <= target && target < before + units) s.first = id;
    block_barrier();
    return s.first;
}

}  // namespace sampling
