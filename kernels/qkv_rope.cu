// qkv_rope: projection, bias, gain and rotation of q and k, projection and bias of v, on an already normalised input
//
//     a[h, d] = sum_c x[t, c] proj[h D + d, c] + bias[h D + d]                       for q, k and v
//     ms[t, h] = mean_d a[h, d]^2                                                    for q and k
//     b[h, d] = a[h, d] gain[d]                                                      for q and k
//     out[h, d]       = b[h, d] cos[p, d] - b[h, d + D/2] sin[p, d]                  d < D/2, p = positions[t]
//     out[h, d + D/2] = b[h, d + D/2] cos[p, d] + b[h, d] sin[p, d]
//
// The gain comes before the rotation, as Qwen3 has it; the scalar 1/sqrt(ms + eps) commutes with the rotation and is
// left to qk_norm, so that this product and that norm stay two steps with float32 in between.
//
// Entry points qkv_rope_row           T <= 4: a block one head of one token, a warp a dot product
//              qkv_rope_tile          otherwise: a block one head of 32 tokens, so the whole head is at hand afterwards
// Arguments    q       [T, H, D]  float32      q_ms  [T, H]  float32
//              k       [T, K, D]  K_TYPE       k_ms  [T, K]  float32
//              v       [T, K, D]  V_TYPE
//              x       [T, C]     float32, normalised
//              q_proj  [H D, C], k_proj, v_proj [K D, C]  W_TYPE, the checkpoint's layout
//              q_bias  [H D], k_bias, v_bias [K D]        float32, or null
//              q_norm, k_norm     [D]                     float32 gains, or null
//              cos, sin [P, D/2]  float32
//              positions [T]      int32; one outside 0..P-1 gives NaN, nothing is read out of bounds
//              k_rows, v_rows [T] int32, or null: k (v) of token t goes to row rows[t] of [S, K, D] instead of row t; one
//                                 outside 0..S-1 is not stored
//              T, H, K, C, P, S   int32
// Constants    W_TYPE, K_TYPE, V_TYPE  bf16 | f16 | f32      HEAD_DIM  D, a multiple of 4 from 4 to 256
// Work         qkv_rope_row:  1024 threads (there are few heads, so each block has to keep many loads in flight), 4 D + 128 bytes of shared memory; grid (T, H + 2 K)
//              qkv_rope_tile: 2 D threads, 4 x 4 products each; about 0.25 KB x D of shared memory; grid (ceil(T/32), H + 2 K)
// Precision    products, sums, bias, gain, rotation in float32; one rounding, where k and v are stored narrower
// Error bound  row: (C/32 + 12) eps32, tile: (C + 6) eps32, times sum_c |x w| times the gain
// Traffic      (H + 2 K) D C sizeof(W_TYPE) bytes of weights for each 32 tokens (row: for each token), 2 T (H + 2 K) D C FLOP
// Determinism  fixed order of summation. Within an entry point a row's result does not depend on the other rows; the
//              two entry points sum in different orders and so differ within the error bound
// Wrapper cuda.qkv_rope · truth reference.qkv_rope · test tests/test_ops.py · benchmark benchmarks/ops.py
#include "dot.cuh"

constexpr int D = HEAD_DIM;

// One kind of head: the blocks (·, 0..H-1) make q, the next K make k, the last K make v.
struct Head {
    const W_TYPE* proj;
    const float *bias, *gain;
    const int* rows;
    float* ms;
    int heads, index;
    bool rotated;
};

__device__ __forceinline__ Head find_head(const W_TYPE* q_proj, const W_TYPE* k_proj, const W_TYPE* v_proj,
                                          const float* q_bias, const float* k_bias, const float* v_bias,
                                          const float* q_norm, const float* k_norm, const int* k_rows, const int* v_rows,
                                          float* q_ms, float* k_ms, int H, int K) {
    const int h = blockIdx.y;
    if (h < H) return {q_proj, q_bias, q_norm, nullptr, q_ms, H, h, true};
    if (h < H + K) return {k_proj, k_bias, k_norm, k_rows, k_ms, K, h - H, true};
    return {v_proj, v_bias, nullptr, v_rows, nullptr, K, h - H - K, false};
}

__device__ __forceinline__ void rotate(float& low, float& high, int d, int position, const float* __restrict__ cos,
                                       const float* __restrict__ sin, int P) {
    const bool known = position >= 0 && position < P;
    const float c = known ? cos[(size_t)position * (D / 2) + d] : NOT_A_NUMBER;
    const float s = known ? sin[(size_t)position * (D / 2) + d] : NOT_A_NUMBER;
    const float a = low, b = high;
    low = a * c - b * s;
    high = b * c + a * s;
}

#define PARAMETERS                                                                                                        \
    float *__restrict__ q, K_TYPE *__restrict__ k, V_TYPE *__restrict__ v, float *__restrict__ q_ms,                      \
        float *__restrict__ k_ms, const float *__restrict__ x, const W_TYPE *__restrict__ q_proj,                         \
        const W_TYPE *__restrict__ k_proj, const W_TYPE *__restrict__ v_proj, const float *__restrict__ q_bias,           \
        const float *__restrict__ k_bias, const float *__restrict__ v_bias, const float *__restrict__ q_norm,             \
        const float *__restrict__ k_norm, const float *__restrict__ cos, const float *__restrict__ sin,                   \
        const int *__restrict__ positions, const int *__restrict__ k_rows,                   \
        const int *__restrict__ v_rows, int T, int H, int K, int C, int P, int S

// Where element d of this block's head goes for token t: q by token, k and v by the row that `rows` names.
#define STORE(t, d, value)                                                    \
    do {                                                                      \
        const int row = head.rows ? head.rows[t] : (t);                       \
        const size_t at = ((size_t)row * head.heads + head.index) * D + (d);  \
        if (head.rows && (row < 0 || row >= S)) break;                        \
        if (blockIdx.y < H) q[at] = (value);                                  \
        else if (blockIdx.y < H + K) store(k + at, (value));                  \
        else store(v + at, (value));                                          \
    } while (0)

extern "C" __global__ void __launch_bounds__(1024, 1) qkv_rope_row(PARAMETERS) {
    __shared__ float a[D], scratch[32];
    const Head head = find_head(q_proj, k_proj, v_proj, q_bias, k_bias, v_bias, q_norm, k_norm, k_rows, v_rows, q_ms, k_ms, H, K);
    const int t = blockIdx.x, row = head.index * D;
    const bool wide = C % 8 == 0 && ((size_t)x | (size_t)head.proj) % 16 == 0;
    for (int d = threadIdx.x / 32; d < D; d += 32) {
        const float sum = warp_dot(x + (size_t)t * C, head.proj + (size_t)(row + d) * C, C, wide);
        if (threadIdx.x % 32 == 0) a[d] = head.bias ? sum + head.bias[row + d] : sum;
    }
    __syncthreads();
    const int d = threadIdx.x;
    if (!head.rotated) {
        if (d < D) STORE(t, d, a[d]);
        return;
    }
    const float squares = block_sum(d < D ? a[d] * a[d] : 0.0f, scratch);
    if (d == 0) head.ms[(size_t)t * head.heads + head.index] = squares / D;
    if (d >= D / 2) return;
    float low = a[d], high = a[d + D / 2];
    if (head.gain) low *= head.gain[d], high *= head.gain[d + D / 2];
    rotate(low, high, d, positions[t], cos, sin, P);
    STORE(t, d, low);
    STORE(t, d + D / 2, high);
}

extern "C" __global__ void __launch_bounds__(2 * D) qkv_rope_tile(PARAMETERS) {
    constexpr int ROWS = 32, QUARTER = D / 4;
    __shared__ float partial[ROWS][QUARTER];
    const Head head = find_head(q_proj, k_proj, v_proj, q_bias, k_bias, v_bias, q_norm, k_norm, k_rows, v_rows, q_ms, k_ms, H, K);
    const int row0 = blockIdx.x * ROWS, tx = threadIdx.x % QUARTER, ty = threadIdx.x / QUARTER;
    float acc[4][4];  // rows ty + 8 i, elements tx + D/4 j: j and j + 2 are a rotation pair
    tile_product<ROWS, D>(x, head.proj, T, head.heads * D, C, row0, head.index * D, acc);
    if (head.bias)
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) acc[i][j] += head.bias[head.index * D + tx + QUARTER * j];
    if (head.rotated) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float squares = 0.0f;
#pragma unroll
            for (int j = 0; j < 4; j++) squares = fmaf(acc[i][j], acc[i][j], squares);
            partial[ty + 8 * i][tx] = squares;
        }
        __syncthreads();
        for (int row = threadIdx.x; row < ROWS && row0 + row < T; row += 2 * D) {
            float squares = 0.0f;
            for (int j = 0; j < QUARTER; j++) squares += partial[row][j];
            head.ms[(size_t)(row0 + row) * head.heads + head.index] = squares / D;
        }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int t = row0 + ty + 8 * i;
        if (t >= T) continue;
        if (head.rotated) {
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const int d = tx + QUARTER * j;
                if (head.gain) acc[i][j] *= head.gain[d], acc[i][j + 2] *= head.gain[d + D / 2];
                rotate(acc[i][j], acc[i][j + 2], d, positions[t], cos, sin, P);
            }
        }
#pragma unroll
        for (int j = 0; j < 4; j++) STORE(t, tx + QUARTER * j, acc[i][j]);
    }
}
