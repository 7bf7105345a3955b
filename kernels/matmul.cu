// matmul: out[t, n] = sum_c x[t, c] weight[n, c]  (+ residual[t, n])
//
// Entry points matmul_row             T <= 4: `parts` warps an output element; the weights stream once for each row of x
//              matmul_tile            otherwise: a block a tile of 64 x 64 outputs
// Arguments    out       [T, N]  float32; may be the same array as residual
//              x         [T, C]  float32
//              weight    [N, C]  W_TYPE, the checkpoint's layout
//              residual  [T, N]  float32, or null
//              T, N, C           int32
//              parts             int32, matmul_row only: 1, 2, 4 or 8, more where N is too small to fill the GPU with warps
// Constants    W_TYPE            bf16 | f16 | f32
// Work         matmul_row:  8 warps a block; grid (ceil(N parts / 8), T); 32 bytes of shared memory
//              matmul_tile: 256 threads, 4 x 4 outputs each; grid (ceil(N/64), ceil(T/64)); 16.6 KB of shared memory
// Precision    products and sums in float32, nothing is rounded to the storage type
// Error bound  row: (C/32 + 14) eps32, tile: C eps32, both times sum_c |x w|
// Traffic      N C sizeof(W_TYPE) + 4 T (C + N) bytes at least, 2 T N C FLOP
// Determinism  fixed order of summation. Within an entry point a row's result does not depend on the other rows; the
//              two entry points sum in different orders and so differ within the error bound
// Limits       matmul_tile: T up to 64 x 65,535 rows, the largest grid
// Wrapper cuda.matmul · truth reference.matmul · test tests/test_ops.py · benchmark benchmarks/ops.py
#include "dot.cuh"

extern "C" __global__ void __launch_bounds__(256)
matmul_row(float* out, const float* __restrict__ x, const W_TYPE* __restrict__ weight, const float* residual, int T,
           int N, int C, int parts) {
    __shared__ float sums[8];
    const int warp = threadIdx.x / 32, t = blockIdx.y, first = blockIdx.x * (8 / parts), n = first + warp / parts;
    const bool wide = C % 8 == 0 && ((size_t)x | (size_t)weight) % 16 == 0;
    if (n < N) {
        const float sum = warp_dot(x + (size_t)t * C, weight + (size_t)n * C, C, wide, warp % parts, parts);
        if (threadIdx.x % 32 == 0) sums[warp] = sum;
    }
    __syncthreads();
    const int mine = first + threadIdx.x;
    if (threadIdx.x >= 8 / parts || mine >= N) return;
    float sum = 0.0f;
    for (int part = 0; part < parts; part++) sum += sums[threadIdx.x * parts + part];
    const size_t at = (size_t)t * N + mine;
    out[at] = residual ? sum + residual[at] : sum;
}

extern "C" __global__ void __launch_bounds__(256)
matmul_tile(float* out, const float* __restrict__ x, const W_TYPE* __restrict__ weight, const float* residual, int T,
            int N, int C) {
    const int row0 = blockIdx.y * 64, col0 = blockIdx.x * 64;
    float acc[4][4];
    tile_product<64, 64>(x, weight, T, N, C, row0, col0, acc);
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int t = row0 + ty + 16 * i, n = col0 + tx + 16 * j;
            if (t >= T || n >= N) continue;
            const size_t at = (size_t)t * N + n;
            out[at] = residual ? acc[i][j] + residual[at] : acc[i][j];
        }
}
