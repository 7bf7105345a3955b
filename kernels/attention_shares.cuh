// What the blocks that share the keys of a query leave behind, and its merge in the last of them. Shared by attention.cu and
// attention_group.cu. No kernel in here.
#pragma once
#include "common.cuh"

constexpr int MAX_SHARES = 64;

// out, partial, share and counters as in attention.cu, partial and share written by __stcg, each block its place `blockIdx.z` of the
// first Z. `first`: the first of the block's `heads` rows of out [T H, D]. All threads of these blocks call it.
template <int D, int THREADS, int MAX_HEADS>
__device__ __forceinline__ void merge_shares(float* out, const float* partial, const float2* share, size_t first, int heads, int Z,
                                             int* counters) {
    __shared__ float factors[MAX_SHARES][MAX_HEADS];
    __shared__ bool is_last;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, pitch = gridDim.z;
    out += first * D, partial += first * pitch * D, share += first * pitch;
    __syncthreads();
    if (warp == 0) {
        const bool answer = is_last_block(counters + blockIdx.x * gridDim.y + blockIdx.y, Z);
        if (threadIdx.x == 0) is_last = answer;
    }
    __syncthreads();
    if (!is_last) return;
    // What the shares hold of this thread's first elements travels while their factors are found: a warp a head
    constexpr int BATCH = 16;
    float4 parts[BATCH];
    const auto fetch = [&](int e, int z0) {
        const float* const from = partial + ((size_t)(e / D) * pitch + z0) * D + e % D;
#pragma unroll
        for (int i = 0; i < BATCH; i++)
            if (z0 + i < Z) parts[i] = __ldcg(reinterpret_cast<const float4*>(from + i * D));
    };
    if (4 * threadIdx.x < heads * D) fetch(4 * threadIdx.x, 0);
    for (int h = warp; h < heads; h += THREADS / 32) {
        float2 its[MAX_SHARES / 32];
        float top = MINUS_INFINITY, total = 0.0f;
#pragma unroll
        for (int i = 0; i < MAX_SHARES / 32; i++)
            its[i] = lane + 32 * i < Z ? __ldcg(share + (size_t)h * pitch + lane + 32 * i) : make_float2(MINUS_INFINITY, 0.0f);
#pragma unroll
        for (int i = 0; i < MAX_SHARES / 32; i++) top = fmaxf(top, its[i].x);
#pragma unroll
        for (int offset = 16; offset; offset >>= 1) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, offset));
#pragma unroll
        for (int i = 0; i < MAX_SHARES / 32; i++) its[i].x = exp2f(its[i].x - top), total = fmaf(its[i].y, its[i].x, total);
        total = warp_sum(total);
#pragma unroll
        for (int i = 0; i < MAX_SHARES / 32; i++) factors[lane + 32 * i][h] = its[i].x / total;
    }
    __syncthreads();
    for (int e = 4 * threadIdx.x; e < heads * D; e += 4 * THREADS) {
        float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
        for (int z0 = 0; z0 < Z; z0 += BATCH) {
            if (e >= 4 * THREADS || z0) fetch(e, z0);
#pragma unroll
            for (int i = 0; i < BATCH; i++)
                if (z0 + i < Z) {
                    const float factor = factors[z0 + i][e / D];
                    sum.x = fmaf(parts[i].x, factor, sum.x), sum.y = fmaf(parts[i].y, factor, sum.y);
                    sum.z = fmaf(parts[i].z, factor, sum.z), sum.w = fmaf(parts[i].w, factor, sum.w);
                }
        }
        *reinterpret_cast<float4*>(out + e) = sum;
    }
}
