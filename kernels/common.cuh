// Storage types, conversions, wide loads and block reductions shared by the kernels. No kernel in here.
//
// CuPy compiles with -ftz=true: float32 subnormals are flushed to zero everywhere. Square root and division are
// IEEE-rounded (NVRTC's default), so 1.0f / sqrtf(x) is used where rsqrtf(x) would add two ulp.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include "ptx.cuh"

typedef float f32;
typedef __half f16;
typedef __nv_bfloat16 bf16;

#define NOT_A_NUMBER __int_as_float(0x7fc00000)
#define MINUS_INFINITY __int_as_float(0xff800000)

__device__ __forceinline__ float to_float(f32 x) { return x; }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }

// One rounding, to nearest even.
__device__ __forceinline__ void store(f32* p, float x) { *p = x; }
__device__ __forceinline__ void store(f16* p, float x) { *p = __float2half_rn(x); }
__device__ __forceinline__ void store(bf16* p, float x) { *p = __float2bfloat16_rn(x); }

// 1 / sqrt(x) within 1 ulp or so; IEEE's root and quotient take ten times the instructions.
__device__ __forceinline__ float inverse_sqrt(float x) {
    const float y = rsqrtf(x);
    return y * fmaf(-0.5f * x * y, y, 1.5f);
}

// Two float32 values into three pairs of bf16 that add up to them, the last part first: 8 of 24 bits each, so that it is exact.
__device__ __forceinline__ void cut(float a, float b, unsigned (&parts)[3]) {
#pragma unroll
    for (int i = 2; i >= 0; i--) {
        const unsigned x = __float_as_uint(a), y = __float_as_uint(b);
        parts[i] = __byte_perm(x, y, 0x7632);  // the upper halves
        a -= __uint_as_float(x & 0xffff0000u), b -= __uint_as_float(y & 0xffff0000u);
    }
}

// Eight consecutive elements from a 16-byte aligned address.
__device__ __forceinline__ void load8(const f32* p, float (&v)[8]) {
    const float4 a = reinterpret_cast<const float4*>(p)[0], b = reinterpret_cast<const float4*>(p)[1];
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}
__device__ __forceinline__ void load8(const bf16* p, float (&v)[8]) {
    const uint4 a = *reinterpret_cast<const uint4*>(p);
    const unsigned pairs[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {  // a bf16 is the upper half of a float32
        v[2 * i] = __uint_as_float(pairs[i] << 16);
        v[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u);
    }
}
__device__ __forceinline__ void load8(const f16* p, float (&v)[8]) {
    union { uint4 bits; f16 half[8]; } a;
    a.bits = *reinterpret_cast<const uint4*>(p);
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = __half2float(a.half[i]);
}

// Eight consecutive elements to a 16-byte aligned address, each rounded once.
template <class T> __device__ __forceinline__ void store8(T* p, const float (&v)[8]) {
    union { uint4 bits[sizeof(T) / 2]; T element[8]; } a;
#pragma unroll
    for (int i = 0; i < 8; i++) store(a.element + i, v[i]);
#pragma unroll
    for (int i = 0; i < (int)sizeof(T) / 2; i++) reinterpret_cast<uint4*>(p)[i] = a.bits[i];
}

// For a kernel whose launch may overlap with others (`dependent` in launch.py): what it does before, loading what no launch of a
// recording writes, overlaps with the launch before. The next one may start behind it and not sooner: a whole token took
// 930 us instead of 866 when launches took room and bandwidth two or more ahead of their turn.
__device__ __forceinline__ void wait_for_launches_before() {
    griddepcontrol_wait();
    griddepcontrol_launch_dependents();
}

// Sum over the 32 lanes of a warp; every lane gets it.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int offset = 16; offset; offset >>= 1) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}

// Whether this block is the last of `blocks` that come here; if so, it sees what all of them wrote before, reading it by
// __ldcg. Called by all lanes of one warp a block, the one that wrote. `counter` lies in launch.workspace(): zero before
// the first comes and after the last.
__device__ __forceinline__ bool is_last_block(int* counter, int blocks) {
    unsigned before = 0;
    __threadfence();
    __syncwarp();
    if (threadIdx.x % 32 == 0) before = atomicInc(reinterpret_cast<unsigned*>(counter), blocks - 1);
    // No second fence (0.3 us on an H100): loads that bypass L1 cannot go before the answer on which they depend.
    return __shfl_sync(0xffffffffu, before, 0) == blocks - 1u;
}

// Sum over a block of whole warps; every thread gets it. `scratch` is 32 floats of shared memory that nobody else
// uses until the block's next barrier after this call.
__device__ __forceinline__ float block_sum(float x, float* scratch) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    x = warp_sum(x);
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    return warp_sum(lane < warps ? scratch[lane] : 0.0f);
}
