// argmax: out[r] = the index of the largest of x[r, :], the lowest one among equals; NaN counts as largest, as in NumPy
//
// Entry point  argmax_row             always
// Arguments    out  [R]     int32
//              x    [R, N]  float32
//              N            int32, from 1
//              partial   [R, blocks]  uint64, scratch; may be null where one block has a row
//              counters  [R]          int32, zeros, and left so; may be null likewise
// Constants    none
// Work         the x-blocks of the grid share a row, 256 threads each, which take turns of 4 elements; the last of them to
//              finish compares what they found; grid (blocks, R), blocks from 1; 64 bytes of shared memory
// Precision    exact, but for subnormal values, which compare as zero (-ftz=true)
// Traffic      4 R N bytes
// Determinism  the result does not depend on the order of comparisons
// Limits       R <= 4096 (the counters of launch.workspace()) where several blocks share a row
// Wrapper cuda.argmax · truth reference.argmax · test tests/test_ops.py · benchmark benchmarks/ops.py
#include "common.cuh"

typedef unsigned long long Key;

// A number that orders as (NaN first, then larger value, then lower index) does: the best element has the largest.
__device__ __forceinline__ Key key(float value, int index) {
    const unsigned bits = __float_as_uint(value + 0.0f);  // -0 becomes 0
    const unsigned rank = value != value ? 0xffffffffu : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return (Key)rank << 32 | (0xffffffffu - index);
}

__device__ __forceinline__ Key warp_best(Key best) {
#pragma unroll
    for (int offset = 16; offset; offset >>= 1) best = max(best, __shfl_xor_sync(0xffffffffu, best, offset));
    return best;
}

extern "C" __global__ void __launch_bounds__(256)
argmax_row(int* __restrict__ out, const float* x, int N, Key* __restrict__ partial, int* __restrict__ counters) {
    __shared__ Key keys[8];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, blocks = gridDim.x, row = blockIdx.y;
    const int me = blockIdx.x * 256 + threadIdx.x, count = blocks * 256;
    x += (size_t)row * N;
    wait_for_launches_before();
    Key best = 0;  // below every key
    if ((size_t)x % 16 == 0) {
#pragma unroll 2
        for (int i = me; i < N / 4; i += count) {
            const float4 v = reinterpret_cast<const float4*>(x)[i];
            best = max(max(best, max(key(v.x, 4 * i), key(v.y, 4 * i + 1))), max(key(v.z, 4 * i + 2), key(v.w, 4 * i + 3)));
        }
        for (int i = N / 4 * 4 + me; i < N; i += count) best = max(best, key(x[i], i));
    } else {
        for (int i = me; i < N; i += count) best = max(best, key(x[i], i));
    }
    best = warp_best(best);
    if (lane == 0) keys[warp] = best;
    __syncthreads();
    if (warp) return;
    best = warp_best(lane < 8 ? keys[lane] : 0);
    if (blocks > 1) {
        partial += (size_t)row * blocks;
        if (lane == 0) __stcg(partial + blockIdx.x, best);
        if (!is_last_block(counters + row, blocks)) return;
        best = 0;
        for (int i = lane; i < blocks; i += 32) best = max(best, __ldcg(partial + i));
        best = warp_best(best);
    }
    if (lane == 0) out[row] = 0xffffffffu - (unsigned)best;
}
