// argmax: out[r] = the index of the largest of x[r, :], the lowest one among equals; NaN counts as largest, as in NumPy
//
// Entry point  argmax_row             always
// Arguments    out  [R]     int32
//              x    [R, N]  float32
//              N            int32, from 1
// Constants    none
// Work         block = one row, 1024 threads; grid R; 256 bytes of shared memory
// Precision    exact, but for subnormal values, which compare as zero (-ftz=true)
// Traffic      4 R N bytes
// Determinism  the result does not depend on the order of comparisons
// Wrapper cuda.argmax · truth reference.argmax · test tests/test_ops.py · benchmark benchmarks/ops.py
#include "common.cuh"

struct Candidate { float value; int index; };

// The better of two under (NaN first, then larger value, then lower index): a total order, so any tree gives the same.
__device__ __forceinline__ Candidate better(Candidate a, Candidate b) {
    const bool a_nan = a.value != a.value, b_nan = b.value != b.value;
    const bool tie = (a_nan && b_nan) || a.value == b.value;
    const bool a_wins = tie ? a.index < b.index : (a_nan || (!b_nan && a.value > b.value));
    return a_wins ? a : b;
}

__device__ __forceinline__ Candidate warp_best(Candidate best) {
#pragma unroll
    for (int offset = 16; offset; offset >>= 1) {
        Candidate other;
        other.value = __shfl_xor_sync(0xffffffffu, best.value, offset);
        other.index = __shfl_xor_sync(0xffffffffu, best.index, offset);
        best = better(best, other);
    }
    return best;
}

extern "C" __global__ void __launch_bounds__(1024) argmax_row(int* __restrict__ out, const float* __restrict__ x, int N) {
    __shared__ float values[32];
    __shared__ int indices[32];
    x += (size_t)blockIdx.x * N;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    Candidate best = {MINUS_INFINITY, 0x7fffffff};
    for (int i = threadIdx.x; i < N; i += 1024) best = better(best, Candidate{x[i], i});
    best = warp_best(best);
    if (lane == 0) values[warp] = best.value, indices[warp] = best.index;
    __syncthreads();
    if (warp) return;
    best = warp_best(Candidate{values[lane], indices[lane]});
    if (lane == 0) out[blockIdx.x] = best.index;
}
