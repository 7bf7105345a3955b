// The two ways in which a product with a weight matrix [N, C] is summed, shared by matmul.cu, swiglu.cu and qkv_rope.cu so
// that all run the same arithmetic: a warp a few dot products (few rows of x) and a tile a block (many rows).
#pragma once
#include "common.cuh"

// ROWS rows of weights times up to T rows of x [tokens, C], by one of `parts` warps that share each dot product: each weight
// is read once. The constructor sends off the first loads, so that what the caller loads next travels with them; weights
// are no launch's result, so they need not wait for the launches before, but x must: `wait`, then
// `finish`, which gives every lane sums[r][t], of which those from `tokens` on mean nothing.
// Lane l of part p takes elements 8 l + 256 (p + parts i) in ascending order, one float32 accumulator for each dot product,
// so that a warp reads 512 contiguous bytes of bf16 weights a step and a sum depends on C and parts alone.
// `wide` says that all rows are 16-byte aligned and C is a multiple of 8. With AHEAD the constructor sets off 4 KB more for L2, so
// that memory is not idle until x is there.
template <int ROWS, int T, class X, class W, bool AHEAD = false>
struct WarpDots {
    // steps under way at once: 16-byte loads of weights a lane
    static constexpr int LOADS = 4, STEPS = LOADS * 2 / (ROWS * (int)sizeof(W)) > 0 ? LOADS * 2 / (ROWS * (int)sizeof(W)) : 1;
    struct Eight { uint4 bits[sizeof(W) / 2]; };  // elements

    const X* x;
    const W* rows[ROWS];
    int tokens, C, part, parts, at;
    bool wide;
    Eight ahead[STEPS][ROWS];

    __device__ __forceinline__ WarpDots(const X* x, const W* const (&weights)[ROWS], int tokens, int C, bool wide, int part,
                                        int parts)
        : x(x), tokens(tokens), C(C), part(part), parts(parts), wide(wide) {
#pragma unroll
        for (int r = 0; r < ROWS; r++) rows[r] = weights[r];
        at = 8 * (threadIdx.x % 32) + 256 * part;
        if (!wide) return;
#pragma unroll
        for (int s = 0; s < STEPS; s++)
            if (at + 256 * parts * s < C) load(s, at + 256 * parts * s);
        if constexpr (AHEAD) {
            constexpr int LINES = 2 * (int)sizeof(W);  // of a step of a row
            const int line = threadIdx.x % 32, c = 256 * (part + parts * (STEPS + line / LINES)) + line % LINES * (128 / (int)sizeof(W));
            if (line < 32 / ROWS && c < C)
#pragma unroll
                for (int r = 0; r < ROWS; r++) prefetch_l2(rows[r] + c);
        }
    }

    __device__ __forceinline__ void load(int step, int c) {
#pragma unroll
        for (int r = 0; r < ROWS; r++)
#pragma unroll
            for (int i = 0; i < (int)sizeof(W) / 2; i++)  // streamed: x and not the weights shall stay in L1
                ahead[step][r].bits[i] = __ldcs(reinterpret_cast<const uint4*>(rows[r] + c) + i);
    }

    __device__ __forceinline__ void wait() {
        wait_for_launches_before();
        x = opaque_pointer(x);
    }

    __device__ __forceinline__ void finish(float (&sums)[ROWS][T]) {
#pragma unroll
        for (int r = 0; r < ROWS; r++)
#pragma unroll
            for (int t = 0; t < T; t++) sums[r][t] = 0.0f;
        if (wide) {
            for (int c0 = at; c0 < C; c0 += 256 * parts * STEPS)
#pragma unroll
                for (int s = 0; s < STEPS; s++) {
                    const int c = c0 + 256 * parts * s, next = c + 256 * parts * STEPS;
                    if (c < C) multiply(x + c, ahead[s], sums);
                    if (next < C) load(s, next);
                }
        } else {
            for (int c = threadIdx.x % 32 + 32 * part; c < C; c += 32 * parts)
#pragma unroll
                for (int r = 0; r < ROWS; r++) {
                    const float b = to_float(rows[r][c]);
#pragma unroll
                    for (int t = 0; t < T; t++)
                        if (t < tokens) sums[r][t] = fmaf(to_float(x[(size_t)t * C + c]), b, sums[r][t]);
                }
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++)
#pragma unroll
            for (int t = 0; t < T; t++) sums[r][t] = warp_sum(sums[r][t]);
    }

    __device__ __forceinline__ void multiply(const X* x, const Eight (&weights)[ROWS], float (&sums)[ROWS][T]) {
        float b[ROWS][8];
#pragma unroll
        for (int r = 0; r < ROWS; r++) load8(reinterpret_cast<const W*>(weights[r].bits), b[r]);
#pragma unroll
        for (int t = 0; t < T; t++) {
            if (t >= tokens) continue;
            float a[8];
            load8(x + (size_t)t * C, a);
#pragma unroll
            for (int r = 0; r < ROWS; r++)
#pragma unroll
                for (int i = 0; i < 8; i++) sums[r][t] = fmaf(a[i], b[r][i], sums[r][t]);
        }
    }
};

// The sums of the `parts` warps that share a dot product, of 8 warps a block: lane r T + t of the first of them gets the sum
// of row r of the weights and row t of x. The whole block calls it.
template <int ROWS, int T>
__device__ __forceinline__ float add_shares(const float (&sums)[ROWS][T], int parts) {
    __shared__ float shares[8][ROWS * T];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float total = 0.0f;
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int t = 0; t < T; t++)
            if (lane == r * T + t) total = sums[r][t];
    if (parts == 1) return total;
    if (lane < ROWS * T) shares[warp][lane] = total;
    __syncthreads();
    if (lane < ROWS * T && warp % parts == 0)
        for (int p = 1; p < parts; p++) total += shares[warp + p][lane];
    return total;
}

// acc[i][j] = x[row0 + ty + (ROWS/4) i] · w[col0 + tx + (COLS/4) j] for the block's tile of ROWS x COLS products, where
// thread = ty (COLS/4) + tx; the block has (ROWS/4)(COLS/4) threads. Rows past T and columns past N count as zeros.
// Strided ownership keeps the shared-memory reads free of bank conflicts and, when COLS is a head, puts elements d and
// d + COLS/2 (a rotation pair) into one thread. Sums run over c in ascending order, one float32 accumulator each.
template <int ROWS, int COLS, class X, class W>
__device__ __forceinline__ void tile_product(const X* __restrict__ x, const W* __restrict__ w, int T, int N, int C,
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
            xs[e % DEPTH][e / DEPTH] = row < T && c < C ? to_float(x[(size_t)row * C + c]) : 0.0f;
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
