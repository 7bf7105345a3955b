// matmul: out[t, n] = sum_c x[t, c] weight[n, c]  (+ residual[t, n])
//
// Entry points matmul_row             T <= 4: a warp an output element; the weights stream once for each row of x
//              matmul_tile            otherwise: a block a tile of 64 x 64 outputs
// Arguments    out       [T, N]  float32; may be the same array as residual
//              x         [T, C]  float32
//              weight    [N, C]  W_TYPE, the checkpoint's layout
//              residual  [T, N]  float32, or null
//              T, N, C           int32
// Constants    W_TYPE            bf16 | f16 | f32
// Work         matmul_row:  8 warps a block; grid (ceil(N/8), T); no shared memory
//              matmul_tile: 256 threads, 4 x 4 outputs each; grid (ceil(N/64), ceil(T/64)); 16.6 KB of shared memory
// Precision    products and sums in float32, nothing is rounded to the storage type
// Error bound  row: (C/32 + 6) eps32, tile: C eps32, both times sum_c |x w|
// Traffic      N C sizeof(W_TYPE) + 4 T (C + N) bytes at least, 2 T N C FLOP
// Determinism  fixed order of summation. Within an entry point a row's result does not depend on the other rows; the
//              two entry points sum in different orders and so differ within the error bound
// Wrapper cuda.matmul · truth reference.matmul · test tests/test_ops.py · benchmark benchmarks/ops.py
#include "dot.cuh"

extern "C" __global__ void __launch_bounds__(256)
matmul_row(float* out, const float* __restrict__ x, const W_TYPE* __restrict__ weight, const float* residual, int T,
           int N, int C) {
    const int n = blockIdx.x * 8 + threadIdx.x / 32, t = blockIdx.y;
    if (n >= N) return;
    const bool wide = C % 8 == 0 && ((size_t)x | (size_t)weight) % 16 == 0;
    float sum = warp_dot(x + (size_t)t * C, weight + (size_t)n * C, C, wide);
    if (threadIdx.x % 32) return;
    const size_t at = (size_t)t * N + n;
    if (residual) sum += residual[at];
    out[at] = sum;
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
