// attention: causal softmax attention with grouped heads over the rows of a KV cache
//
//     s[j] = (q[t, h] . keys[j, h K/H]) / sqrt(D)   for j = 0..positions[t]
//     out[t, h] = sum_j softmax(s)[j] values[j, h K/H]
//
// Entry point  attention_online       always; any number of queries, any number of cached rows
// Arguments    out        [T, H, D]  float32; may be q
//              q          [T, H, D]  float32
//              keys       [S, K, D]  KV_TYPE
//              values     [S, K, D]  KV_TYPE
//              positions  [T]        int32; query t sees rows 0..positions[t]; one outside 0..S-1 gives NaN
//              H, K, S               int32, H a multiple of K
//              scale                 float32, 1/sqrt(D)
// Constants    KV_TYPE               bf16 | f16 | f32      HEAD_DIM  D, a multiple of 8 from 8 to 256
// Work         block = one head of one query, 256 threads; eight lanes share a key, so 32 keys are under way at once;
//              grid (T, H); 128 D + 384 bytes of shared memory
// Precision    scores, online softmax (running maximum and sum), accumulation and merge in float32; nothing is rounded
// Error bound  (S/32 + D/8 + 16) eps32 (max|s| + 1) times max|values|
// Traffic      2 S K D sizeof(KV_TYPE) bytes for each query at most (shared by a group through the cache), 4 S H D FLOP
// Determinism  key j always goes to lane group j % 32 and the groups merge in order: a query's result depends on
//              nothing but its own row and the cache
// Limits       one block reads all rows of a head, so one query over a long cache leaves most of the GPU idle
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

extern "C" __global__ void __launch_bounds__(256)
attention_online(float* out, const float* q, const KV_TYPE* __restrict__ keys, const KV_TYPE* __restrict__ values,
                 const int* __restrict__ positions, int H, int K, int S, float scale) {
    __shared__ float sums[GROUPS][D], maxima[GROUPS], weights[GROUPS];
    const int t = blockIdx.x, h = blockIdx.y, group = threadIdx.x / LANES, first = threadIdx.x % LANES * OWN;
    const size_t head = ((size_t)t * H + h) * D, row = (size_t)K * D;
    const int last = positions[t];
    if (last < 0 || last >= S) {
        for (int d = threadIdx.x; d < D; d += blockDim.x) out[head + d] = NOT_A_NUMBER;
        return;
    }
    keys += (size_t)(h / (H / K)) * D + first;
    values += (size_t)(h / (H / K)) * D + first;

    float query[OWN], acc[OWN];
#pragma unroll
    for (int i = 0; i < OWN; i++) query[i] = q[head + first + i] * scale, acc[i] = 0.0f;
    float maximum = MINUS_INFINITY, weight = 0.0f;
    for (int j0 = 0; j0 <= last; j0 += GROUPS) {  // every lane makes the same number of turns: the shuffles need all
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
    for (int g = 0; g < GROUPS; g++) top = fmaxf(top, maxima[g]);  // group 0 has seen key 0, so top is finite
    for (int g = 0; g < GROUPS; g++) total = fmaf(weights[g], expf(maxima[g] - top), total);
    for (int d = threadIdx.x; d < D; d += blockDim.x) {
        float sum = 0.0f;
        for (int g = 0; g < GROUPS; g++) sum = fmaf(sums[g][d], expf(maxima[g] - top), sum);
        out[head + d] = sum / total;
    }
}
