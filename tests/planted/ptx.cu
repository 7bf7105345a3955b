// What ptx.cuh offers from sm_80 on, for tests/test_emulator.py to compare with NumPy, and with a GPU where there is one.
// `fault` plants one fault, which must be caught; NONE must be right.
#include <cuda_bf16.h>
#include "ptx.cuh"

enum Fault {
    NONE, NO_WAIT, ONE_GROUP_TOO_FEW, NO_BARRIER_AFTER_WAIT, NO_BARRIER_BEFORE_REUSE, MISALIGNED, PAST_THE_END, NEVER_WAITED,
    TOO_MANY_BYTES, MISALIGNED_ROW, PAST_SHARED_MEMORY
};

// out [M, N] = x [M, K] w, float32 sums; w is [N, K], or [K, N] if `transposed`; M, N, K multiples of 16. A warp has a
// tile of 16 x 16.
extern "C" __global__ void __launch_bounds__(32)
tile_product(float* out, const __nv_bfloat16* x, const __nv_bfloat16* w, int N, int K, bool transposed) {
    __shared__ __align__(16) __nv_bfloat16 a[16][24], b[16][24];
    const int lane = threadIdx.x, row0 = blockIdx.y * 16, col0 = blockIdx.x * 16, r = lane / 2, c = lane % 2 * 8;
    float d[2][4] = {};
    for (int k0 = 0; k0 < K; k0 += 16) {
        cp_async16(&a[r][c], x + (row0 + r) * K + k0 + c);
        cp_async16(&b[r][c], transposed ? w + (k0 + r) * N + col0 + c : w + (col0 + r) * K + k0 + c);
        cp_async_commit();
        cp_async_wait<0>();
        __syncwarp();
        unsigned fa[4], fb[4];
        ldmatrix_x4(fa, &a[lane % 16][lane / 16 * 8]);
        if (transposed) ldmatrix_x4_trans(fb, &b[lane % 16][lane / 16 * 8]);
        else ldmatrix_x4(fb, &b[lane % 8 + lane / 16 * 8][lane / 8 % 2 * 8]);
        mma_bf16(d[0], fa, fb[0], fb[1]);
        mma_bf16(d[1], fa, fb[2], fb[3]);
        __syncwarp();
    }
    for (int i = 0; i < 8; i++) {
        const int row = row0 + lane / 4 + i / 2 % 2 * 8, column = col0 + i / 4 * 8 + lane % 4 * 2 + i % 2;
        out[row * N + column] = d[i / 4][i % 4];
    }
}

// The four registers of each lane: out [2, 32, 4], of four 8 x 8 matrices of 16 bits, plain and transposed
extern "C" __global__ void __launch_bounds__(32) fragments(unsigned* out, const uint4* rows, int offset) {
    __shared__ __align__(16) unsigned char all[33 * 16];
    reinterpret_cast<uint4*>(all)[threadIdx.x] = rows[threadIdx.x];
    __syncwarp();
    unsigned r[2][4];
    ldmatrix_x4(r[0], all + 16 * threadIdx.x + offset);
    ldmatrix_x4_trans(r[1], all + 16 * threadIdx.x + offset);
    for (int i = 0; i < 8; i++) out[i / 4 * 128 + 4 * threadIdx.x + i % 4] = r[i / 4][i % 4];
}

// out [4] = zeros: no bytes of memory of this block
extern "C" __global__ void __launch_bounds__(1) copy_of_nothing(float* out) {
    __shared__ __align__(16) float slot[2][4];
    cp_async16(slot[0], slot[1], 0);
    cp_async_commit();
    cp_async_wait<0>();
    for (int i = 0; i < 4; i++) out[i] = slot[0][i];
}

// Fault: x, from which a copy is on its way, is overwritten before the copy is waited for. out [128]
extern "C" __global__ void __launch_bounds__(32) source_changes(float* out, float* x, bool after_the_wait) {
    __shared__ __align__(16) float slot[128];
    float* mine = slot + 4 * threadIdx.x;
    cp_async16(mine, x + 4 * threadIdx.x);
    cp_async_commit();
    if (!after_the_wait) x[4 * threadIdx.x + 1] = -1.0f;
    cp_async_wait<0>();
    if (after_the_wait) x[4 * threadIdx.x + 1] = -1.0f;
    for (int i = 0; i < 4; i++) out[4 * threadIdx.x + i] = mine[i];
}

// out[n] = the sum of column n of x [tiles, 512], whose last row has `length` elements only. 128 threads, each copies four
// columns and sums up those of the thread at the other end.
extern "C" __global__ void __launch_bounds__(128) pipeline(float* out, const float* x, int tiles, int length, int fault) {
    constexpr int STAGES = 4;
    const int ahead = fault == NO_BARRIER_BEFORE_REUSE ? STAGES : STAGES - 1;
    __shared__ __align__(16) float slot[STAGES][512];
    const int mine = 4 * threadIdx.x, other = 508 - mine;
    const auto issue = [&](int tile) {
        if (tile < tiles) {
            const int left = tile < tiles - 1 || fault == PAST_THE_END ? 16 : 4 * min(max(length - mine, 0), 4);
            cp_async16(slot[tile % STAGES] + mine, x + 512 * tile + (left ? mine : 0) + (fault == MISALIGNED),
                       left + 16 * (fault == TOO_MANY_BYTES));
        }
        cp_async_commit();
    };
    for (int tile = 0; tile < ahead; tile++) issue(tile);
    float sums[4] = {};
    for (int tile = 0; tile < tiles; tile++) {
        if (fault == ONE_GROUP_TOO_FEW || fault == NO_BARRIER_BEFORE_REUSE) cp_async_wait<STAGES - 1>();
        else if (fault != NO_WAIT) cp_async_wait<STAGES - 2>();
        if (fault != NO_BARRIER_AFTER_WAIT) __syncthreads();  // all threads' copies are there, all have read the tile before
        if (ahead < STAGES) issue(tile + ahead);
        for (int i = 0; i < 4; i++) sums[i] += slot[tile % STAGES][other + i];
        if (ahead == STAGES) issue(tile + ahead);  // one tile too far: some have yet to read this slot
    }
    if (fault == NEVER_WAITED) {
        cp_async16(slot[0] + mine, x + mine);
        cp_async_commit();
    } else if (fault == NO_WAIT) {
        cp_async_wait<0>();
    }
    for (int i = 0; i < 4; i++) out[other + i] = sums[i];
}
