// The two ways in which a product with a weight matrix [N, C] is summed, shared by matmul.cu and qkv_rope.cu so
// that both run the same arithmetic: a warp a dot product (few rows of x) and a tile a block (many rows).
#pragma once
#include "common.cuh"

// One of `parts` equal shares of x[0..C) · w[0..C), float32 products and sums; every lane of the warp gets the result.
// Lane l of part p takes elements 8 l + 256 (p + parts i), so a warp reads 512 contiguous bytes of bf16 weights a step.
// `wide` says that both rows are 16-byte aligned and C is a multiple of 8.
template <class W>
__device__ __forceinline__ float warp_dot(const float* __restrict__ x, const W* __restrict__ w, int C, bool wide, int part = 0,
                                          int parts = 1) {
    const int lane = threadIdx.x % 32;
    float sum = 0.0f;
    if (wide) {
#pragma unroll(sizeof(W) == 2 ? 4 : 2)  // with float32 weights even 2 spills in qkv_rope_row on sm_90
        for (int c = 8 * lane + 256 * part; c < C; c += 256 * parts) {
            float a[8], b[8];
            load8(x + c, a);
            load8(w + c, b);
#pragma unroll
            for (int i = 0; i < 8; i++) sum = fmaf(a[i], b[i], sum);
        }
    } else {
        for (int c = lane + 32 * part; c < C; c += 32 * parts) sum = fmaf(x[c], to_float(w[c]), sum);
    }
    return warp_sum(sum);
}

// acc[i][j] = x[row0 + ty + (ROWS/4) i] · w[col0 + tx + (COLS/4) j] for the block's tile of ROWS x COLS products, where
// thread = ty (COLS/4) + tx; the block has (ROWS/4)(COLS/4) threads. Rows past T and columns past N count as zeros.
// Strided ownership keeps the shared-memory reads free of bank conflicts and, when COLS is a head, puts elements d and
// d + COLS/2 (a rotation pair) into one thread. Sums run over c in ascending order, one float32 accumulator each.
template <int ROWS, int COLS, class W>
__device__ __forceinline__ void tile_product(const float* __restrict__ x, const W* __restrict__ w, int T, int N, int C,
                                             int row0, int col0, float (&acc)[4][4]) {
    constexpr int DEPTH = 32, THREADS = (ROWS / 4) * (COLS / 4);
    __shared__ float xs[DEPTH][ROWS + 1], ws[DEPTH][COLS + 1];  // + 1: the transposing stores hit 32 different banks
    const int tx = threadIdx.x % (COLS / 4), ty = threadIdx.x / (COLS / 4);
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) acc[i][j] = 0.0f;
    for (int c0 = 0; c0 < C; c0 += DEPTH) {
        for (int e = threadIdx.x; e < ROWS * DEPTH; e += THREADS) {
            const int row = row0 + e / DEPTH, c = c0 + e % DEPTH;
            xs[e % DEPTH][e / DEPTH] = row < T && c < C ? x[(size_t)row * C + c] : 0.0f;
        }
        for (int e = threadIdx.x; e < COLS * DEPTH; e += THREADS) {
            const int col = col0 + e / DEPTH, c = c0 + e % DEPTH;
            ws[e % DEPTH][e / DEPTH] = col < N && c < C ? to_float(w[(size_t)col * C + c]) : 0.0f;
        }
        __syncthreads();
#pragma unroll 8
        for (int k = 0; k < DEPTH; k++) {
            float a[4], b[4];
#pragma unroll
            for (int i = 0; i < 4; i++) a[i] = xs[k][ty + ROWS / 4 * i], b[i] = ws[k][tx + COLS / 4 * i];
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) acc[i][j] = fmaf(a[i], b[j], acc[i][j]);
        }
        __syncthreads();
    }
}
