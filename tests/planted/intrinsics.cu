// No fault in here: what CUDA offers to kernels, one entry point a topic, for tests/test_emulator.py to compare with
// NumPy, and with a GPU where there is one.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "ptx.cuh"

constexpr unsigned ALL = 0xffffffffu;

// out [10, 32]: a row an operation; one warp
extern "C" __global__ void __launch_bounds__(32) shuffles(int* out, const int* x, int argument, int width) {
    const int lane = threadIdx.x, v = x[lane];
    const int results[10] = {
        __shfl_sync(ALL, v, argument),        __shfl_sync(ALL, v, argument, width),
        __shfl_up_sync(ALL, v, argument),     __shfl_up_sync(ALL, v, argument, width),
        __shfl_down_sync(ALL, v, argument),   __shfl_down_sync(ALL, v, argument, width),
        __shfl_xor_sync(ALL, v, argument),    __shfl_xor_sync(ALL, v, argument, width),
        __shfl_sync(ALL, v, x[lane] & 31),    (int)__shfl_xor_sync(ALL, (long long)v << 32, argument) + (int)(__shfl_xor_sync(ALL, (long long)v << 32, argument) >> 32),
    };
    for (int i = 0; i < 10; i++) out[32 * i + lane] = results[i];
}

// The two halves of a warp part ways, each with its own mask, and the first half does more.
extern "C" __global__ void __launch_bounds__(32) half_warps(int* out, const int* x) {
    const int lane = threadIdx.x;
    int v = x[lane];
    if (lane < 16) {
        for (int offset = 8; offset; offset >>= 1) v += __shfl_xor_sync(0x0000ffffu, v, offset);
        __syncwarp(0x0000ffffu);
        v += __shfl_sync(0x0000ffffu, x[lane], 3);
    } else {
        for (int offset = 8; offset; offset >>= 1) v = max(v, __shfl_xor_sync(0xffff0000u, v, offset));
    }
    __syncwarp();
    out[lane] = v + __shfl_sync(ALL, v, 31 - lane);
}

// out [13, 32]
extern "C" __global__ void __launch_bounds__(32) votes(unsigned* out, const int* x) {
    const int lane = threadIdx.x, v = x[lane];
    const unsigned u = v;
    const unsigned results[13] = {
        __ballot_sync(ALL, v > 0),
        (unsigned)__any_sync(ALL, v > 1000),
        (unsigned)__any_sync(ALL, lane == 7),
        (unsigned)__all_sync(ALL, v > -1000),
        (unsigned)__all_sync(ALL, lane != 7),
        __match_any_sync(ALL, v & 3),
        __reduce_add_sync(ALL, u),
        __reduce_min_sync(ALL, u),
        __reduce_max_sync(ALL, u),
        (unsigned)__reduce_min_sync(ALL, v),
        (unsigned)__reduce_max_sync(ALL, v),
        __reduce_and_sync(ALL, u | 8u) ^ __reduce_or_sync(ALL, u & 0xf0fu),
        __reduce_xor_sync(ALL, u),
    };
    for (int i = 0; i < 13; i++) out[32 * i + lane] = results[i];
}

// Reverses x [blocks, threads] within each block, three times through shared memory of both kinds; counts votes.
extern "C" __global__ void __launch_bounds__(256) barriers(float* out, int* counts, const float* x) {
    __shared__ float reversed[256];
    DYNAMIC_SHARED(float, again);
    const int i = threadIdx.x, n = blockDim.x;
    const float v = x[blockIdx.x * n + i];
    reversed[n - 1 - i] = v;
    __syncthreads();
    again[n - 1 - i] = reversed[i];
    __syncthreads();
    reversed[i] = again[n - 1 - i];
    const int count = __syncthreads_count(v > 0), any = __syncthreads_or(v > 2), all = __syncthreads_and(v > -2);
    out[blockIdx.x * n + i] = reversed[i];
    if (i == 0) counts[3 * blockIdx.x] = count, counts[3 * blockIdx.x + 1] = any != 0, counts[3 * blockIdx.x + 2] = all != 0;
}

// ints [10], wide [3]: every thread of every block takes part
extern "C" __global__ void __launch_bounds__(256) atomics(int* ints, unsigned long long* wide, float* sum, const int* x) {
    const int v = x[blockIdx.x * blockDim.x + threadIdx.x];
    atomicAdd(ints + 0, v);
    atomicSub(ints + 1, v);
    atomicMin(ints + 2, v);
    atomicMax(ints + 3, v);
    atomicAnd(ints + 4, v);
    atomicOr(ints + 5, v);
    atomicXor(ints + 6, v);
    atomicInc(reinterpret_cast<unsigned*>(ints + 7), 99u);
    atomicDec(reinterpret_cast<unsigned*>(ints + 8), 99u);
    for (int old = ints[9], seen; (seen = atomicCAS(ints + 9, old, old + 1)) != old;) old = seen;
    atomicAdd(wide + 0, (unsigned long long)v << 20);
    atomicMax(wide + 1, (unsigned long long)v << 20);
    if (threadIdx.x == 0) atomicExch(wide + 2, 5ull);
    atomicAdd(sum, (float)v);
}

// n float32 to both 16-bit types, and n 16-bit patterns of both types to float32
extern "C" __global__ void __launch_bounds__(256)
conversions(__nv_bfloat16* to_bf16, __half* to_f16, float* from_bf16, float* from_f16, const float* x,
            const __nv_bfloat16* b, const __half* h, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    to_bf16[i] = __float2bfloat16_rn(x[i]);
    to_f16[i] = __float2half_rn(x[i]);
    from_bf16[i] = __bfloat162float(b[i]);
    from_f16[i] = __half2float(h[i]);
}

// The same in pairs, and arithmetic in 16 bits: out [2, 4, n / 2]
extern "C" __global__ void __launch_bounds__(256) pairs(float2* out, const float2* x, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x, m = n / 2;
    if (i >= m) return;
    const __nv_bfloat162 b = __float22bfloat162_rn(x[i]);
    const __half2 h = __floats2half2_rn(x[i].x, x[i].y);
    out[i] = __bfloat1622float2(b);
    out[m + i] = make_float2(__low2float(b), __high2float(b));
    out[2 * m + i] = make_float2(__bfloat162float(b.x + b.y), __bfloat162float(b.x * b.y));
    out[3 * m + i] = make_float2(__bfloat162float(b.x - b.y), b.x < b.y);
    out[4 * m + i] = __half22float2(h);
    out[5 * m + i] = make_float2(__low2float(h), __high2float(h));
    out[6 * m + i] = make_float2(__half2float(h.x + h.y), __half2float(h.x * h.y));
    out[7 * m + i] = make_float2(__half2float(h.x - h.y), h.x < h.y);
}

// out [grid z, y, x, block z, y, x, 2]: the thread's linear index, and a mixture of the sizes
extern "C" __global__ void __launch_bounds__(256) indices(int* out) {
    const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const int threads = blockDim.x * blockDim.y * blockDim.z;
    out[2 * (block * threads + thread)] = thread;
    out[2 * (block * threads + thread) + 1] = gridDim.z * 1000 + blockDim.z * 100 + warpSize;
}

struct Pair { int number; float scale; };

// A structure by value, a null pointer, a 64-bit integer, a half.
extern "C" __global__ void __launch_bounds__(32)
arguments(float* out, const float* null, Pair pair, long long wide, __half half, bool flag) {
    if (threadIdx.x == 0)
        out[0] = pair.number * pair.scale + (null ? 1e30f : 0.0f) + (wide == 1ll << 40) + __half2float(half) + flag;
}

// bits and minima: out [10]
extern "C" __global__ void __launch_bounds__(32) arithmetic(float* out, float x, float y, unsigned u, int s) {
    if (threadIdx.x) return;
    out[0] = __uint_as_float(__float_as_uint(x) ^ 0x80000000u);
    out[1] = __popc(u) * 1000 + __clz(s) * 10 + __ffs(s);
    out[2] = min(x, __int_as_float(0x7fc00000));
    out[3] = max(u, s);
    out[4] = rsqrtf(x);
    out[5] = fmaf(x, y, -x * y);
    out[6] = __byte_perm(u, 0x12345678u, 0x5410);
    out[7] = __brev(u);
    out[8] = __umulhi(u, 0x80000000u);
    out[9] = x / y;
}

// All blocks meet at a barrier of our own between writing and reading; needs a cooperative launch.
extern "C" __global__ void __launch_bounds__(64) grid_barrier(int* out, int* values, unsigned* arrived) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x, n = gridDim.x * blockDim.x;
    values[i] = i;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        atomicAdd(arrived, 1u);
        while (atomicAdd(arrived, 0u) < gridDim.x) __nanosleep(100);
        __threadfence();
    }
    __syncthreads();
    out[i] = __ldcg(values + n - 1 - i);
}
