// attention: causal softmax attention with grouped heads over the rows of a KV cache
//
//     s[j] = (q[t, h] . keys[j, h K/H]) / sqrt(D)   for j = 0..positions[t]
//     out[t, h] = sum_j softmax(s)[j] values[j, h K/H]
//
// Entry points attention_1, _2, _4    a block that many query heads of one key head, so that they read its rows once: the
//                                     lowest that is not below H/K, else 4. More than two go to attention_group where it
//                                     serves their keys, and more than a few queries to attention_mma
// Arguments    out        [T, H, D]  float32, 16-byte aligned; may be q
//              q          [T, H, D]  float32, 16-byte aligned
//              keys       [S, K, D]  KV_TYPE, 16-byte aligned
//              values     [S, K, D]  KV_TYPE, 16-byte aligned
//              positions  [T]        int32; query t sees rows 0..positions[t]; one outside 0..S-1 gives NaN
//              H, K, S               int32, H a multiple of K
//              scale                 float32, log2(e) / sqrt(D): weights are powers of two
//              partial    [T, H, Z, D] float32, scratch: sums of 2^(s - top) v over the keys of a share; null if Z = 1
//              share      [T, H, Z, 2] float32, scratch: top = the share's largest score in units of log 2, and the sum of
//                                    2^(s - top); likewise
//              counters   [T ceil(H/K / heads) K] int32, zeros, and left so; likewise
// Constants    KV_TYPE               bf16 | f16 | f32      HEAD_DIM  D, a multiple of 8 from 8 to 256
// Work         256 threads; D/8 lanes, rounded up to a power of two, share a key, and four keys for each group of lanes are a
//              tile; up to 35 KB of shared memory. Grid (T, K ceil(H/K / heads), Z): block z takes tiles z, z + Z, ..., with Z no
//              more than there are tiles, and 1 for two; the last block to finish merges the shares
// Precision    scores, online softmax (running maximum and sum), accumulation and merge in float32; nothing is rounded
// Error bound  2 (S/G + G + Z + 16 + 34 m) eps32 times max|values|, with G = threads/lanes groups to which the keys go, and m
//              the largest sum_d |q keys| / sqrt(D): a score takes at most 13 roundings, its factor and exp some more
// Traffic      2 S K D sizeof(KV_TYPE) bytes for each query at most (shared by up to 4 heads of a group), 4 S H D FLOP
// Determinism  keys go to lane groups, and groups and shares merge, in a fixed order: with one Z a query's result depends on
//              nothing but its own row and the cache. Z follows from T, H, K and S
// Limits       Z > 1: T K ceil(H/K / heads) <= 4096, launch.workspace()
// Wrapper cuda.attention · truth reference.attention · test tests/test_ops.py · benchmark benchmarks/ops.py
#include "attention_shares.cuh"
#include "common.cuh"

constexpr int D = HEAD_DIM;

constexpr int WARPS = 8, THREADS = 32 * WARPS;
// Lanes that share a key, 8 elements each, and groups of them.
constexpr int LANES = D > 128 ? 32 : D > 64 ? 16 : D > 32 ? 8 : D > 16 ? 4 : D > 8 ? 2 : 1, GROUPS = THREADS / LANES;

struct Eight { uint4 bits[sizeof(KV_TYPE) / 2]; };  // elements

__device__ __forceinline__ Eight load_bits(const KV_TYPE* p) {
    Eight e;
#pragma unroll
    for (int i = 0; i < (int)sizeof(KV_TYPE) / 2; i++) e.bits[i] = reinterpret_cast<const uint4*>(p)[i];
    return e;
}

// Over the lanes of a warp whose numbers differ in the bits from FIRST to below LAST; each of them gets it.
template <int FIRST, int LAST, class F> __device__ __forceinline__ float reduce(float x, F f) {
#pragma unroll
    for (int offset = FIRST; offset < LAST; offset *= 2) x = f(x, __shfl_xor_sync(0xffffffffu, x, offset));
    return x;
}

template <int HEADS>
__device__ __forceinline__ void attend(float* out, const float* q, const KV_TYPE* keys, const KV_TYPE* values,
                                       const int* __restrict__ positions, int H, int K, int S, float scale, float* partial,
                                       float2* share, int* counters) {
    constexpr int TURN = 4, TILE = GROUPS * TURN, AHEAD = 4;  // keys of a group at a time, of a block; tiles
    __shared__ float sums[GROUPS][HEADS][D], maxima[WARPS][HEADS], weights[WARPS][HEADS];
    const auto add = [](float a, float b) { return a + b; };
    const auto larger = [](float a, float b) { return fmaxf(a, b); };
    const int warp = threadIdx.x / 32, group = threadIdx.x / LANES, lane = threadIdx.x % LANES, first = lane * 8;
    const int size = H / K, chunks = (size + HEADS - 1) / HEADS, kv = blockIdx.y / chunks;
    const int in_group = blockIdx.y % chunks * HEADS, heads = min(size - in_group, HEADS);  // those that are there
    const size_t row = (size_t)K * D, head0 = (size_t)blockIdx.x * H + kv * size + in_group;
    const bool owns = first < D;
    // One block for two tiles: 3.2 us on an H100; two blocks and the merge: 4.4.
    const int last = positions[blockIdx.x], Z = last < 2 * TILE ? 1 : min((int)gridDim.z, last / TILE + 1);
    if (last < 0 || last >= S) {
        wait_for_launches_before();
        for (int i = threadIdx.x; blockIdx.z == 0 && i < heads * D; i += THREADS) out[head0 * D + i] = NOT_A_NUMBER;
        return;
    }
    if ((int)blockIdx.z >= Z) return;
    // Rows that are to come from memory set off while the launch before this one ends; they may be written until it has. No
    // more of them than L2 holds.
    constexpr int LINES = (D * (int)sizeof(KV_TYPE) + 127) / 128;
    for (int j0 = blockIdx.z * TILE, n = 0; n < AHEAD && j0 <= last; j0 += Z * TILE, n++)
        for (int i = threadIdx.x; i < TILE * LINES && j0 + i / LINES <= last; i += THREADS) {
            const size_t at = (j0 + i / LINES) * row + (size_t)kv * D + i % LINES * (128 / sizeof(KV_TYPE));
            prefetch_l2(keys + at), prefetch_l2(values + at);
        }
    keys += (size_t)kv * D + first;
    values += (size_t)kv * D + first;
    wait_for_launches_before();

    float query[HEADS][8], acc[HEADS][8], maximum[HEADS], weight[HEADS];
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        maximum[h] = MINUS_INFINITY, weight[h] = 0.0f;
#pragma unroll
        for (int i = 0; i < 8; i++) query[h][i] = acc[h][i] = 0.0f;
        if (owns && h < heads) {
            load8(q + (head0 + h) * D + first, query[h]);
#pragma unroll
            for (int i = 0; i < 8; i++) query[h][i] *= scale;
        }
    }
    // every lane makes the same number of turns: the shuffles need all
    for (int j0 = blockIdx.z * TILE + group; j0 - group <= last; j0 += Z * TILE) {
        Eight k[TURN] = {}, v[TURN] = {};
#pragma unroll
        for (int u = 0; u < TURN; u++)
            if (owns && j0 + u * GROUPS <= last) k[u] = load_bits(keys + (j0 + u * GROUPS) * row);
#pragma unroll
        for (int u = 0; u < TURN; u++)
            if (owns && j0 + u * GROUPS <= last) v[u] = load_bits(values + (j0 + u * GROUPS) * row);
        float p[TURN][HEADS];
#pragma unroll
        for (int u = 0; u < TURN; u++) {
            float key[8];
            load8(reinterpret_cast<const KV_TYPE*>(k[u].bits), key);
#pragma unroll
            for (int h = 0; h < HEADS; h++) {
                float part = 0.0f;
#pragma unroll
                for (int i = 0; i < 8; i++) part = fmaf(query[h][i], key[i], part);
                const float score = reduce<1, LANES>(part, add);
                p[u][h] = j0 + u * GROUPS <= last ? score : MINUS_INFINITY;
            }
        }
        if (j0 > last) continue;
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            float top = maximum[h];
#pragma unroll
            for (int u = 0; u < TURN; u++) top = fmaxf(top, p[u][h]);
            const float shrink = exp2f(maximum[h] - top);
            maximum[h] = top, weight[h] *= shrink;
#pragma unroll
            for (int u = 0; u < TURN; u++) weight[h] += p[u][h] = exp2f(p[u][h] - top);
#pragma unroll
            for (int i = 0; i < 8; i++) acc[h][i] *= shrink;
        }
#pragma unroll
        for (int u = 0; u < TURN; u++) {
            float value[8];
            load8(reinterpret_cast<const KV_TYPE*>(v[u].bits), value);
#pragma unroll
            for (int h = 0; h < HEADS; h++)
#pragma unroll
                for (int i = 0; i < 8; i++) acc[h][i] = fmaf(p[u][h], value[i], acc[h][i]);
        }
    }

    // All groups of lanes; in the end thread e has element e % D of head e / D.
    float top[HEADS];
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        top[h] = reduce<LANES, 32>(maximum[h], larger);
        if (threadIdx.x % 32 == 0) maxima[warp][h] = top[h];
    }
    __syncthreads();
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        for (int w = 0; w < WARPS; w++) top[h] = fmaxf(top[h], maxima[w][h]);  // finite: each share has a key
        const float shrink = exp2f(maximum[h] - top[h]), its = reduce<LANES, 32>(weight[h] * shrink, add);
        if (threadIdx.x % 32 == 0) weights[warp][h] = its;
        if (owns)
#pragma unroll
            for (int i = 0; i < 8; i++) sums[group][h][first + i] = acc[h][i] * shrink;
    }
    __syncthreads();
    for (int e = threadIdx.x; e < heads * D; e += THREADS) {
        const int h = e / D;
        float sum = 0.0f, total = 0.0f;
#pragma unroll
        for (int g = 0; g < GROUPS; g++) sum += sums[g][h][e % D];
        for (int w = 0; w < WARPS; w++) total += weights[w][h];
        if (Z == 1) {
            out[head0 * D + e] = sum / total;
        } else {
            __stcg(partial + ((head0 + h) * gridDim.z + blockIdx.z) * D + e % D, sum);
            float its = top[0];
#pragma unroll
            for (int i = 1; i < HEADS; i++)
                if (h == i) its = top[i];
            if (e % D == 0) __stcg(share + (head0 + h) * gridDim.z + blockIdx.z, make_float2(its, total));
        }
    }
    if (Z > 1) merge_shares<D, THREADS, HEADS>(out, partial, share, head0, heads, Z, counters);
}

#define PARAMETERS                                                                                                     \
    float *out, const float *q, const KV_TYPE *keys, const KV_TYPE *values, const int *__restrict__ positions, int H, int K, \
        int S, float scale, float *partial, float2 *share, int *counters

extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_1(PARAMETERS) {
    attend<1>(out, q, keys, values, positions, H, K, S, scale, partial, share, counters);
}
extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_2(PARAMETERS) {
    attend<2>(out, q, keys, values, positions, H, K, S, scale, partial, share, counters);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_4(PARAMETERS) {
    attend<4>(out, q, keys, values, positions, H, K, S, scale, partial, share, counters);
}
