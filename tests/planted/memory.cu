// Kernels with planted faults in their memory accesses, for tests/test_emulator.py: each must be caught.

#include "ptx.cuh"

// Fault: one more element than there is, when n is not a multiple of the block.
extern "C" __global__ void __launch_bounds__(32) write_past_end(float* out, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i <= n) out[i] = 1.0f;
}

// Fault: reads x[n].
extern "C" __global__ void __launch_bounds__(32) read_past_end(float* out, const float* x, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = x[i] + x[i + 1];
}

// Fault: an index one past a shared array, which happens to hit its neighbour.
extern "C" __global__ void __launch_bounds__(32) shared_index(float* out, int offset) {
    __shared__ float a[32], b[32];
    a[threadIdx.x] = 1.0f, b[threadIdx.x] = 2.0f;
    __syncthreads();
    out[threadIdx.x] = a[threadIdx.x + offset] + b[threadIdx.x];
}

// Fault: one float more of dynamic shared memory than the launch asks for.
extern "C" __global__ void __launch_bounds__(32) dynamic_shared_overrun(float* out, int n) {
    DYNAMIC_SHARED(float, all);
    if (threadIdx.x <= n) all[threadIdx.x] = 1.0f;
    __syncthreads();
    out[threadIdx.x] = all[0];
}

// Fault: a 16-byte load from an address that is a multiple of 4 only. A GPU stops; a CPU does not mind.
extern "C" __global__ void __launch_bounds__(32) misaligned(float4* out, const float* x) {
    out[threadIdx.x] = *reinterpret_cast<const float4*>(x + 4 * threadIdx.x + 1);
}

// Fault: sums one row of shared memory more than was written, static and dynamic.
extern "C" __global__ void __launch_bounds__(32) uninitialised(float* out) {
    __shared__ float part[33];
    DYNAMIC_SHARED(float, rest);
    part[threadIdx.x] = 1.0f, rest[threadIdx.x] = 1.0f;
    __syncthreads();
    float a = 0.0f, b = 0.0f;
    for (int i = 0; i < 33; i++) a += part[i], b += rest[i];
    if (threadIdx.x == 0) out[2 * blockIdx.x] = a, out[2 * blockIdx.x + 1] = b;
}

// Fault: a local array that is too large for a fibre's stack (a GPU would take it from local memory).
extern "C" __global__ void __launch_bounds__(32) large_frame(float* out, int n) {
    volatile float large[17000];
    for (int i = 0; i < n; i++) large[i] = i;
    out[threadIdx.x] = large[n - 1];
}
