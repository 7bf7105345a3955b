// What all entry points of qkv_rope.cu share: its parameters, what they are to one head, and the rotation. No kernel in here.
#pragma once
#include "common.cuh"

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
                                          float* q_ms, float* k_ms, int H, int K, int h) {
    if (h < H) return {q_proj, q_bias, q_norm, nullptr, q_ms, H, h, true};
    if (h < H + K) return {k_proj, k_bias, k_norm, k_rows, k_ms, K, h - H, true};
    return {v_proj, v_bias, nullptr, v_rows, nullptr, K, h - H - K, false};
}

// Cosine and sine of element d's angle; NaN for a position that the table does not have.
__device__ __forceinline__ void find_angle(float& c, float& s, int d, int position, const float* __restrict__ cos,
                                           const float* __restrict__ sin, int P) {
    const bool known = position >= 0 && position < P;
    c = known ? cos[(size_t)position * (D / 2) + d] : NOT_A_NUMBER;
    s = known ? sin[(size_t)position * (D / 2) + d] : NOT_A_NUMBER;
}

__device__ __forceinline__ void rotate(float& low, float& high, float c, float s) {
    const float a = low, b = high;
    low = fmaf(a, c, -(b * s));  // written out, so that every entry point rounds alike
    high = fmaf(b, c, a * s);
}

#define PARAMETERS_OF(X, W)                                                                                         \
    Q_TYPE *__restrict__ q, K_TYPE *__restrict__ k, V_TYPE *__restrict__ v, float *__restrict__ q_ms,                    \
        float *__restrict__ k_ms, X x, W q_proj, W k_proj, W v_proj, const float *__restrict__ q_bias,                  \
        const float *__restrict__ k_bias, const float *__restrict__ v_bias, const float *__restrict__ q_norm,           \
        const float *__restrict__ k_norm, const float *__restrict__ cos, const float *__restrict__ sin,                 \
        const int *__restrict__ positions, const int *__restrict__ k_rows, const int *__restrict__ v_rows, int T, int H, \
        int K, int C, int P, int S
#define PARAMETERS PARAMETERS_OF(const X_TYPE *__restrict__, const W_TYPE *__restrict__)
#define ARGUMENTS                                                                                                     \
    q, k, v, q_ms, k_ms, x, q_proj, k_proj, v_proj, q_bias, k_bias, v_bias, q_norm, k_norm, cos, sin, positions, k_rows, \
        v_rows, T, H, K, C, P, S

#define HEAD(h) find_head(q_proj, k_proj, v_proj, q_bias, k_bias, v_bias, q_norm, k_norm, k_rows, v_rows, q_ms, k_ms, H, K, h)
