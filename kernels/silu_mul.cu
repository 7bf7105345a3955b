// silu_mul: out[i] = gate[i] / (1 + exp(-gate[i])) * up[i]
//
// Entry point  silu_mul               always
// Arguments    out       [n]  OUT_TYPE; may be gate or up where that is f32
//              gate, up  [n]  float32
//              n                   int64
// Constants    OUT_TYPE           bf16 | f32
// Work         one element a thread, 256 threads a block; grid ceil(n/256); no shared memory
// Precision    float32; expf is within 2 ulp and overflows to infinity, which gives the correct limit 0; one rounding
//              when OUT_TYPE is bf16
// Error bound  6 eps32 relative, before the rounding to OUT_TYPE
// Traffic      (8 + sizeof(OUT_TYPE)) n bytes
// Determinism  elementwise
// Wrapper cuda.silu_mul · truth reference.silu_mul · test tests/test_ops.py · benchmark benchmarks/ops.py
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(256) silu_mul(OUT_TYPE* out, const float* gate, const float* up, long long n) {
    const long long i = blockIdx.x * 256ll + threadIdx.x;
    if (i >= n) return;
    const float g = gate[i];
    store(out + i, g / (1.0f + expf(-g)) * up[i]);
}
