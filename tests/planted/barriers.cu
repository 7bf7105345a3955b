// Kernels with planted faults in their barriers, for tests/test_emulator.py: each must be caught.

// Fault: no __syncthreads between writing and reading. Reverses each block's part of x.
extern "C" __global__ void __launch_bounds__(256) missing_barrier(float* out, const float* x) {
    __shared__ float all[256];
    const int i = threadIdx.x, n = blockDim.x;
    all[i] = x[blockIdx.x * n + i];
    out[blockIdx.x * n + i] = all[n - 1 - i];
}

// Fault: `scratch` is used a second time while slower warps may still read the first sum.
extern "C" __global__ void __launch_bounds__(256) missing_second_barrier(float* out, const float* x) {
    __shared__ float scratch[8];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int turn = 0; turn < 2; turn++) {
        const float sum = __reduce_add_sync(0xffffffffu, (unsigned)(x[threadIdx.x] + turn));
        if (lane == 0) scratch[warp] = sum;
        __syncthreads();
        float total = 0.0f;
        for (int i = 0; i < 8; i++) total += scratch[i];
        out[256 * turn + threadIdx.x] = total;
    }
}

// Fault: no __syncwarp between the lanes' writes and their neighbours' reads.
extern "C" __global__ void __launch_bounds__(32) missing_syncwarp(float* out, const float* x) {
    __shared__ float all[32];
    all[threadIdx.x] = x[threadIdx.x];
    out[threadIdx.x] = all[threadIdx.x ^ 1];
}

// Fault: half of the threads return before the barrier.
extern "C" __global__ void __launch_bounds__(64) barrier_after_return(float* out) {
    if (threadIdx.x >= 40) return;
    __syncthreads();
    out[threadIdx.x] = 1.0f;
}

// Fault: the barrier stands in a branch that some threads do not take.
extern "C" __global__ void __launch_bounds__(64) barrier_in_branch(float* out) {
    if (threadIdx.x < 8) __syncthreads();
    out[threadIdx.x] = 1.0f;
    __syncthreads();
}

// Fault: the lanes of the second warp never come to the shuffle that the first lane waits at, but to the barrier.
extern "C" __global__ void __launch_bounds__(64) shuffle_in_branch(float* out) {
    float v = threadIdx.x;
    if (threadIdx.x == 32) v = __shfl_xor_sync(0xffffffffu, v, 1);
    __syncthreads();
    out[threadIdx.x] = v;
}

// Fault: a lane that is not in its own mask.
extern "C" __global__ void __launch_bounds__(32) wrong_mask(float* out) {
    out[threadIdx.x] = __shfl_xor_sync(0x7fffffffu, (float)threadIdx.x, 1);
}

// Fault: reads from lanes that the block does not have, as soon as it has fewer than 32 threads.
extern "C" __global__ void __launch_bounds__(32) absent_lanes(float* out) {
    out[threadIdx.x] = __shfl_down_sync(0xffffffffu, (float)threadIdx.x, 1);
}

// Fault: waits for a flag that nobody raises.
extern "C" __global__ void __launch_bounds__(32) waits_for_ever(int* flag) {
    while (atomicAdd(flag, 0) == 0) __nanosleep(100);
}

// Fault: the last block to come overwrites what the others wrote; the result depends on the order of blocks.
extern "C" __global__ void __launch_bounds__(32) last_block_wins(int* out) {
    if (threadIdx.x == 0) out[0] = blockIdx.x;
}
