// rmsnorm: out[r, c] = x[r, c] / sqrt(mean_c(x[r, c]^2) + eps) * weight[c]
//
// Entry point  rmsnorm_row            always
// Arguments    out     [R, C]  OUT_TYPE
//              x       [R, C]  X_TYPE
//              weight  [C]     W_TYPE
//              C               int32, any value from 1
//              eps             float32
// Constants    X_TYPE, W_TYPE, OUT_TYPE   bf16 | f16 | f32
// Work         block = one row, 256 threads; grid R; 128 bytes of shared memory
// Precision    statistics, scaling and weight in float32; one rounding, when OUT_TYPE is narrower than float32.
//              The weight is applied before that rounding (transformers rounds to the storage type first).
// Error bound  (C/256 + 16) eps32 relative, before the final rounding
// Traffic      R C (sizeof(X_TYPE) + sizeof(OUT_TYPE)) bytes (the second read of x comes from cache), 4 R C FLOP
// Limits       |x| < 1.8e19 / sqrt(C), above which the float32 sum of squares overflows; with eps = 0 also a mean square
//              above 1.2e-38, below which it is flushed to zero
// Determinism  fixed order of summation; a row's result does not depend on the other rows
// Wrapper cuda.rmsnorm · truth reference.rmsnorm · test tests/test_ops.py · benchmark benchmarks/ops.py
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(256)
rmsnorm_row(OUT_TYPE* __restrict__ out, const X_TYPE* __restrict__ x, const W_TYPE* __restrict__ weight, int C, float eps) {
    __shared__ float scratch[32];
    x += (size_t)blockIdx.x * C;
    out += (size_t)blockIdx.x * C;
    float sum = 0.0f;
    for (int c = threadIdx.x; c < C; c += blockDim.x) {
        const float a = to_float(x[c]);
        sum = fmaf(a, a, sum);
    }
    const float scale = 1.0f / sqrtf(block_sum(sum, scratch) / C + eps);
    for (int c = threadIdx.x; c < C; c += blockDim.x) store(out + c, to_float(x[c]) * scale * to_float(weight[c]));
}
