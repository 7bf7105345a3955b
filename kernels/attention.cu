// attention: causal softmax attention with grouped heads over the rows of a KV cache
//
//     s[j] = (q[t, h] . keys[j, h K/H]) / sqrt(D)   for j = 0..positions[t]
//     out[t, h] = sum_j softmax(s)[j] values[j, h K/H]
//
// Entry points attention_online       more than 4 queries, a cache of at most 256 rows, or so many heads that they fill the
//                                     GPU: a block a head of a query
//              attention_split        otherwise: that block's keys shared out over Z blocks, so that one query over a long
//              attention_merge        cache fills the GPU; then their partial results are merged
// Arguments    out        [T, H, D]  float32; may be q
//              q          [T, H, D]  float32
//              keys       [S, K, D]  KV_TYPE, 16-byte aligned
//              values     [S, K, D]  KV_TYPE, 16-byte aligned
//              positions  [T]        int32; query t sees rows 0..positions[t]; one outside 0..S-1 gives NaN
//              H, K, S               int32, H a multiple of K
//              scale                 float32, 1/sqrt(D)
//              partial    [T, H, Z, D] float32, sums of exp(s - top) v over the keys of a share
//              share      [T, H, Z, 2] float32, top = the share's largest score (-inf for no key) and sum of exp(s - top)
// Constants    KV_TYPE               bf16 | f16 | f32      HEAD_DIM  D, a multiple of 8 from 8 to 256
// Work         256 threads; eight lanes share a key, so 32 keys, a tile, are under way at once; 128 D + 384 bytes of shared
//              memory. attention_online: grid (T, H). attention_split: grid (T, H, Z), block z takes tiles z, z + Z, ...
//              attention_merge: grid (T, H), 128 threads, no shared memory
// Precision    scores, online softmax (running maximum and sum), accumulation and merge in float32; nothing is rounded
// Error bound  (S/32 + D/8 + 16) eps32 (max|s| + 1) times max|values|
// Traffic      2 S K D sizeof(KV_TYPE) bytes for each query at most (shared by a group through the cache), 4 S H D FLOP
// Determinism  keys go to lane groups, and groups and shares merge, in a fixed order: with one entry point and one Z a
//              query's result depends on nothing but its own row and the cache. Z follows from T, H and S
// Wrapper cuda.attention · truth reference.attention · test tests/test_ops.py · benchmark benchmarks/ops.py
#include "common.cuh"

constexpr int D = HEAD_DIM;

constexpr int LANES = 8, GROUPS = 32, OWN = D / LANES;  // lanes sharing a key, keys under way, elements of it per lane

__device__ __forceinline__ void load_own(const KV_TYPE* p, float (&v)[OWN]) {
    if constexpr (OWN % 8 == 0) {  // rows are multiples of 64 elements, hence 16-byte aligned whenever the cache is
#pragma unroll
        for (int i = 0; i < OWN; i += 8) load8(p + i, reinterpret_cast<float(&)[8]>(v[i]));
    } else {
#pragma unroll
        for (int i = 0; i < OWN; i++) v[i] = to_float(p[i]);
    }
}

// Sum over the eight lanes of a group; each of them gets it.
__device__ __forceinline__ float group_sum(float x) {
#pragma unroll
    for (int offset = LANES / 2; offset; offset >>= 1) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}

// The tiles of keys blockIdx.z, blockIdx.z + gridDim.z, ... of one head of one query. Returns their largest score and sum
// of exp(score - largest) to every thread, and calls put(d, sum_j exp(score_j - largest) values[j, d], that sum of exp) once for each d.
template <class Put>
__device__ __forceinline__ float2 attend(const float* q, const KV_TYPE* __restrict__ keys, const KV_TYPE* __restrict__ values,
                                         int last, int H, int K, float scale, Put put) {
    __shared__ float sums[GROUPS][D], maxima[GROUPS], weights[GROUPS];
    const int h = blockIdx.y, group = threadIdx.x / LANES, first = threadIdx.x % LANES * OWN;
    const size_t row = (size_t)K * D;
    keys += (size_t)(h / (H / K)) * D + first;
    values += (size_t)(h / (H / K)) * D + first;

    float query[OWN], acc[OWN];
#pragma unroll
    for (int i = 0; i < OWN; i++) query[i] = q[first + i] * scale, acc[i] = 0.0f;
    float maximum = MINUS_INFINITY, weight = 0.0f;
    // every lane makes the same number of turns: the shuffles need all
    for (int j0 = blockIdx.z * GROUPS; j0 <= last; j0 += gridDim.z * GROUPS) {
        const int j = j0 + group;
        const bool seen = j <= last;
        float part = 0.0f, own[OWN];
        if (seen) {
            load_own(keys + j * row, own);
#pragma unroll
            for (int i = 0; i < OWN; i++) part = fmaf(query[i], own[i], part);
        }
        const float score = group_sum(part);
        if (!seen) continue;
        const float new_maximum = fmaxf(maximum, score), shrink = expf(maximum - new_maximum), p = expf(score - new_maximum);
        maximum = new_maximum;
        weight = weight * shrink + p;
        load_own(values + j * row, own);
#pragma unroll
        for (int i = 0; i < OWN; i++) acc[i] = fmaf(acc[i], shrink, p * own[i]);
    }

#pragma unroll
    for (int i = 0; i < OWN; i++) sums[group][first + i] = acc[i];
    if (threadIdx.x % LANES == 0) maxima[group] = maximum, weights[group] = weight;
    __syncthreads();
    float top = MINUS_INFINITY, total = 0.0f;
    for (int g = 0; g < GROUPS; g++) top = fmaxf(top, maxima[g]);
    const float base = top == MINUS_INFINITY ? 0.0f : top;  // a share without keys: exp(-inf - 0) = 0 everywhere
    for (int g = 0; g < GROUPS; g++) total = fmaf(weights[g], expf(maxima[g] - base), total);
    for (int d = threadIdx.x; d < D; d += blockDim.x) {
        float sum = 0.0f;
        for (int g = 0; g < GROUPS; g++) sum = fmaf(sums[g][d], expf(maxima[g] - base), sum);
        put(d, sum, total);
    }
    return make_float2(top, total);
}

extern "C" __global__ void __launch_bounds__(256)
attention_online(float* out, const float* q, const KV_TYPE* __restrict__ keys, const KV_TYPE* __restrict__ values,
                 const int* __restrict__ positions, int H, int K, int S, float scale) {
    const size_t head = ((size_t)blockIdx.x * H + blockIdx.y) * D;
    const int last = positions[blockIdx.x];
    if (last < 0 || last >= S) {
        for (int d = threadIdx.x; d < D; d += blockDim.x) out[head + d] = NOT_A_NUMBER;
        return;
    }
    attend(q + head, keys, values, last, H, K, scale, [=](int d, float sum, float total) { out[head + d] = sum / total; });
}

extern "C" __global__ void __launch_bounds__(256)
attention_split(float* __restrict__ partial, float2* __restrict__ share, const float* __restrict__ q,
                const KV_TYPE* __restrict__ keys, const KV_TYPE* __restrict__ values, const int* __restrict__ positions,
                int H, int K, int S, float scale) {
    const size_t head = (size_t)blockIdx.x * H + blockIdx.y, mine = head * gridDim.z + blockIdx.z;
    const int last = positions[blockIdx.x];
    if (last < 0 || last >= S) {
        for (int d = threadIdx.x; d < D; d += blockDim.x) partial[mine * D + d] = NOT_A_NUMBER;
        if (threadIdx.x == 0) share[mine] = make_float2(0.0f, 1.0f);
        return;
    }
    const float2 result = attend(q + head * D, keys, values, last, H, K, scale,
                                 [=](int d, float sum, float) { partial[mine * D + d] = sum; });
    if (threadIdx.x == 0) share[mine] = result;
}

extern "C" __global__ void __launch_bounds__(128)
attention_merge(float* __restrict__ out, const float* __restrict__ partial, const float2* __restrict__ share, int H, int Z) {
    const size_t head = (size_t)blockIdx.x * H + blockIdx.y;
    partial += head * Z * D;
    share += head * Z;
    float top = share[0].x, total = 0.0f;  // share 0 has key 0, so top is finite
    for (int z = 1; z < Z; z++) top = fmaxf(top, share[z].x);
    for (int z = 0; z < Z; z++) total = fmaf(share[z].y, expf(share[z].x - top), total);
    for (int d = threadIdx.x; d < D; d += blockDim.x) {
        float sum = 0.0f;
        for (int z = 0; z < Z; z++) sum = fmaf(partial[(size_t)z * D + d], expf(share[z].x - top), sum);
        out[head * D + d] = sum / total;
    }
}
