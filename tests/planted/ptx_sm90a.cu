// What ptx.cuh offers on Hopper alone, for tests/test_emulator.py; `fault` as in ptx.cu.
#include "ptx.cuh"

enum Fault {
    NONE, NO_FENCE, NO_FENCE_AFTER_WAIT, NO_COMMIT, READ_BEFORE_WAIT, WRITTEN_BEFORE_WAIT, RELEASED_BEFORE_WAIT, NEVER_WAITED, THREE_WARPS,
    OTHER_OPERANDS, MISPLACED_TILE, NO_WAIT_FOR_DATA, NO_MAP
};

// out [64, 128] = x [64, C] w [128, C]^T in steps of 64: the last warp copies, the four before it multiply.
extern "C" __global__ void __launch_bounds__(160)
warpgroup(float* out, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w, int steps, int fault) {
    constexpr int STAGES = 2, X_BYTES = 64 * 128, STAGE = X_BYTES + 128 * 128;
    __shared__ mbarrier full[STAGES], empty[STAGES];
    DYNAMIC_SHARED(unsigned char, slots);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) mbarrier_init(full + s, 1), mbarrier_init(empty + s, 4);
        fence_mbarrier_init();
    }
    __syncthreads();
    if (warp == 4) {
        const TensorMap* const map = fault == NO_MAP ? reinterpret_cast<const TensorMap*>(out) : &w;
        for (int step = 0; lane == 0 && step < steps; step++) {
            const int s = step % STAGES;
            mbarrier_wait(empty + s, step / STAGES % 2 ^ 1);
            mbarrier_arrive_expect(full + s, STAGE);
            bulk_copy_2d(slots + s * STAGE, &x, 64 * step, 0, full + s);
            bulk_copy_2d(slots + s * STAGE + X_BYTES, map, 64 * step, 0, full + s);
        }
        return;
    }
    if (fault == THREE_WARPS && warp == 3) return;
    float d[16][4] = {};
    for (int step = 0; step < steps; step++) {
        const int s = step % STAGES;
        const unsigned char* const stage = slots + s * STAGE + 512 * (fault == MISPLACED_TILE);
        if (fault != NO_WAIT_FOR_DATA) mbarrier_wait(full + s, step / STAGES % 2);
        if (fault != NO_FENCE && (fault != NO_FENCE_AFTER_WAIT || step == 0)) wgmma_fence();
        for (int kk = 0; kk < 4; kk++)
            wgmma_m64n128(d, matrix_descriptor(stage + 32 * kk),
                          matrix_descriptor(stage + X_BYTES + 32 * (fault == OTHER_OPERANDS && lane == 1 ? 0 : kk)), 1);
        if (fault != NO_COMMIT) wgmma_commit();
        if (fault == RELEASED_BEFORE_WAIT && lane == 0) mbarrier_arrive(empty + s);
        if (fault == WRITTEN_BEFORE_WAIT && step == 1) d[0][0] = 1.0f;
        if (fault != READ_BEFORE_WAIT && (fault != NEVER_WAITED || step < steps - 1)) wgmma_wait<0>();
        if (fault != RELEASED_BEFORE_WAIT && lane == 0) mbarrier_arrive(empty + s);
    }
    for (int j = 0; j < 16; j++)
        for (int e = 0; e < 4; e++) out[(16 * warp + lane / 4 + e / 2 * 8) * 128 + 8 * j + lane % 4 * 2 + e % 2] = d[j][e];
    if (fault == READ_BEFORE_WAIT) wgmma_wait<0>();
}

// out [64, rows, 64] = boxes of x [20, 40] from rows and columns that lie partly or wholly outside of it on, as they lie in shared memory.
extern "C" __global__ void __launch_bounds__(32) boxes(unsigned short* out, const __grid_constant__ TensorMap x, int rows, int column, int row) {
    __shared__ mbarrier arrived;
    DYNAMIC_SHARED(unsigned short, box);
    if (threadIdx.x == 0) {
        mbarrier_init(&arrived, 1);
        fence_mbarrier_init();
        prefetch_map(&x);
        mbarrier_arrive_expect(&arrived, rows * 128);
        bulk_copy_2d(box, &x, column, row, &arrived);
    }
    __syncwarp();
    mbarrier_wait(&arrived, 0);
    for (int i = threadIdx.x; i < rows * 64; i += 32) out[i] = box[i];
}
