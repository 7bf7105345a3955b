// Online softmax of attention scores as tensor cores leave them. Shared by attention_mma.cu and attention_wgmma.cu. No kernel in
// here.
//
// A warp has 16 rows of scores: with g = lane / 4, i = lane % 4, s[j][e] is row g + 8 (e / 2), key 8 j + 2 i + e % 2, and the
// sums of weighted values lie alike.
#pragma once
#include "common.cuh"

// The queries of a block.
struct Queries {
    const int* positions;
    int first, T, S;  // the first of them, and how many there are in all; cached rows

    // The last key that query `row` of the block sees, -1 for a position outside the cache.
    __device__ __forceinline__ int last_key(int row) const {
        const int p = first + row < T ? positions[first + row] : -1;
        return p >= 0 && p < S ? p : -1;
    }
    // The same, but all see key 0, those too whose result does not count: then no sum of weights is empty.
    __device__ __forceinline__ int seen(int row) const { return max(0, last_key(row)); }
};

// Hides the keys behind those that each of 16 queries sees; the queries begin at `row`, the keys at `first`.
template <int NJ> __device__ __forceinline__ void hide(float (&s)[NJ][4], const Queries& queries, int row, int first) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int seen = queries.seen(row + 8 * r + lane / 4) - first - lane % 4 * 2;
#pragma unroll
        for (int j = 0; j < NJ; j++)
#pragma unroll
            for (int e = 0; e < 2; e++)
                if (8 * j + e > seen) s[j][2 * r + e] = MINUS_INFINITY;
    }
}

// Two weights, each rounded to bf16 once, as an element of a fragment.
__device__ __forceinline__ unsigned pair(float a, float b) {
    union { __nv_bfloat162 values; unsigned bits; } u;
    u.values = __floats2bfloat162_rn(a, b);
    return u.bits;
}

__device__ __forceinline__ void store2(float* p, float a, float b) { *reinterpret_cast<float2*>(p) = make_float2(a, b); }
__device__ __forceinline__ void store2(bf16* p, float a, float b) { *reinterpret_cast<unsigned*>(p) = pair(a, b); }

struct Softmax {  // of 16 rows; of two of them in each thread
    float top[2] = {MINUS_INFINITY, MINUS_INFINITY}, total[2] = {0.0f, 0.0f}, shrink[2];  // total: of this lane's keys

    // Scores to weights, 2^(scale score - top). What was summed up before has to be multiplied by `shrink`, if that changes
    // anything for any row of the warp, which it returns.
    template <int NJ> __device__ __forceinline__ bool weigh(float (&s)[NJ][4], float scale) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float largest = MINUS_INFINITY;
#pragma unroll
            for (int j = 0; j < NJ; j++) largest = fmaxf(largest, fmaxf(s[j][2 * r], s[j][2 * r + 1]));
            largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
            largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
            const float new_top = fmaxf(top[r], largest * scale);
            shrink[r] = exp2f(top[r] - new_top);
            top[r] = new_top;
            float sums[2] = {};  // two chains of additions
#pragma unroll
            for (int j = 0; j < NJ; j++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float& x = s[j][2 * r + e];
                    x = exp2f(fmaf(x, scale, -new_top));
                    sums[e] += x;
                }
            total[r] = fmaf(total[r], shrink[r], sums[0] + sums[1]);
        }
        return __any_sync(0xffffffffu, shrink[0] != 1.0f || shrink[1] != 1.0f);
    }

    // Stores the 16 rows that begin at `row`, divided by the sums of their weights. `out`: the block's first row, `pitch`
    // elements from the next.
    template <int NJ, class E>
    __device__ __forceinline__ void finish(E* out, size_t pitch, const float (&sum)[NJ][4], const Queries& queries,
                                           int row) const {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float all = total[r];
            all += __shfl_xor_sync(0xffffffffu, all, 1);
            all += __shfl_xor_sync(0xffffffffu, all, 2);
            const int mine = row + 8 * r + lane / 4;
            if (queries.first + mine >= queries.T) continue;
            const float share = queries.last_key(mine) >= 0 ? 1.0f / all : NOT_A_NUMBER;
#pragma unroll
            for (int j = 0; j < NJ; j++)
                store2(out + mine * pitch + 8 * j + lane % 4 * 2, sum[j][2 * r] * share, sum[j][2 * r + 1] * share);
        }
    }
};
