// What ptx.cuh offers from sm_90 on and between blocks, for tests/test_emulator.py; `fault` as in ptx.cu.
#include "ptx.cuh"

enum Fault {
    NONE, NO_WAIT_FOR_DATA, WRONG_PARITY, NO_WAIT_FOR_SLOT, RELEASED_TOO_EARLY, NO_SYNCWARP_BEFORE_RELEASE, NO_BARRIER_AFTER_INIT,
    TOO_MANY_BYTES_ANNOUNCED, TOO_FEW_BYTES_ANNOUNCED, ONE_ARRIVAL_TOO_MANY, ONE_ARRIVAL_TOO_FEW, MISALIGNED_SOURCE,
    MISALIGNED_SLOT, ODD_SIZE, PAST_THE_END, PAST_THE_SLOTS, NEVER_WAITED, INITIALISED_TWICE, OVERWRITTEN, ANOTHER_COUNT, TOO_MANY_THREADS,
    TOO_FEW_THREADS, HALF_A_WARP, WRONG_ID, NEVER_SENT, NO_TAG, TAG_IN_THE_OTHER_WORD
};

// out[n] = the sum of column n of x [tiles, 256]: the last warp copies, four warps add up, each thread two columns.
extern "C" __global__ void __launch_bounds__(160) ring(float* out, const float* x, int tiles, int fault) {
    constexpr int STAGES = 3, WARPS = 4, COLUMNS = 256;
    __shared__ mbarrier full[STAGES], empty[STAGES];
    DYNAMIC_SHARED(float, slots);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            mbarrier_init(full + s, 1);
            mbarrier_init(empty + s, fault == ONE_ARRIVAL_TOO_FEW ? WARPS + 1 : WARPS);
        }
        if (fault == INITIALISED_TWICE) mbarrier_init(full, 1);
        if (fault == OVERWRITTEN) full[STAGES - 1] = 0;
        fence_mbarrier_init();
    }
    if (fault != NO_BARRIER_AFTER_INIT) __syncthreads();
    if (warp == WARPS) {
        for (int tile = 0; lane == 0 && tile < tiles; tile++) {
            const int s = tile % STAGES, parity = tile / STAGES % 2;
            const unsigned bytes = 4 * COLUMNS;
            if (fault != NO_WAIT_FOR_SLOT) mbarrier_wait(empty + s, parity ^ 1);
            mbarrier_arrive_expect(full + s, bytes + 16 * (fault == TOO_MANY_BYTES_ANNOUNCED) - 16 * (fault == TOO_FEW_BYTES_ANNOUNCED));
            bulk_copy_once(slots + s * COLUMNS + (fault == MISALIGNED_SLOT) + 16 * (fault == PAST_THE_SLOTS && s == STAGES - 1),
                           x + tile * COLUMNS + (fault == MISALIGNED_SOURCE) + 4 * (fault == PAST_THE_END),
                           bytes - 8 * (fault == ODD_SIZE), full + s);
        }
        return;
    }
    float sums[2] = {};
    for (int tile = 0; tile < tiles; tile++) {
        const int s = tile % STAGES, parity = tile / STAGES % 2;
        if (fault == NEVER_WAITED && tile == tiles - 1) break;
        if (fault == NO_WAIT_FOR_DATA ? warp != 1 : true) mbarrier_wait(full + s, parity ^ (fault == WRONG_PARITY));
        if (fault == RELEASED_TOO_EARLY && lane == 0) mbarrier_arrive(empty + s);
        for (int i = 0; i < 2; i++) sums[i] += slots[s * COLUMNS + COLUMNS - 1 - (int)threadIdx.x - 128 * i];
        if (fault != NO_SYNCWARP_BEFORE_RELEASE) __syncwarp();
        if (fault != RELEASED_TOO_EARLY && lane <= (fault == ONE_ARRIVAL_TOO_MANY)) mbarrier_arrive(empty + s);
    }
    for (int i = 0; i < 2; i++) out[COLUMNS - 1 - threadIdx.x - 128 * i] = sums[i];
}

// out [4, 64] = x, each row by way of shared memory from one warp to the next two: two pairs of warps pass rows on by
// named barriers, and never wait for the other pair.
extern "C" __global__ void __launch_bounds__(128) pairs_of_warps(float* out, const float* x, int rows, int fault) {
    __shared__ float row[2][32];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, pair = warp / 2;
    const int threads = fault == TOO_MANY_THREADS ? 96 : fault == TOO_FEW_THREADS ? 32 : fault == ANOTHER_COUNT ? 64 + 32 * (warp % 2) : 64;
    const int written = fault == WRONG_ID ? 16 : 1 + 2 * pair, read = 2 + 2 * pair;
    for (int i = pair; i < rows; i += 2) {
        if (warp % 2 == 0) row[pair][lane] = x[32 * i + lane];
        if (fault != HALF_A_WARP || lane < 16) named_barrier(written, threads);
        if (warp % 2 == 1) out[32 * i + lane] = row[pair][31 - lane];
        named_barrier(read, threads);
    }
}

// Each block sends 64 numbers to all others, makes its next ones of all that come, and so on: out [blocks, 64]. words
// [2, blocks, 64], zero: number and round in each word, because the two words of a pair need not be of one time; two halves,
// so that a fast block does not overwrite what a slow one has yet to read.
extern "C" __global__ void __launch_bounds__(32) exchange(u64* out, u64* words, int rounds, int fault) {
    const int blocks = gridDim.x, at = 2 * threadIdx.x;
    u64 x = 1 + 64 * blockIdx.x + at, y = x + 1;
    for (int round = 1; round <= rounds; round++) {
        u64* now = words + round % 2 * blocks * 64;
        if (fault != NEVER_SENT || blockIdx.x != 1 || round < 2)
            store_relaxed2(now + 64 * blockIdx.x + at, x << 32 | (fault == TAG_IN_THE_OTHER_WORD ? 0 : round), y << 32 | round);
        u64 sum_x = 0, sum_y = 0;
        for (int other = 0; other < blocks; other++) {
            do load_relaxed2(now + 64 * other + at, x, y);
            while (fault == NO_TAG ? false : (int)y != round || ((int)x != round && fault != TAG_IN_THE_OTHER_WORD));
            sum_x += (x >> 32) * (other + 1), sum_y += (y >> 32) * (other + 1);
        }
        x = (sum_x + sum_y) % 1000003, y = (3 * sum_x + sum_y) % 1000003;
    }
    out[64 * blockIdx.x + at] = x, out[64 * blockIdx.x + at + 1] = y;
}

// One word passed round all blocks `turns` times; done[block] = turns in which the clock did not go back; times[block] (or
// null) = nanoseconds.
extern "C" __global__ void __launch_bounds__(32) round_trip(int* done, u64* times, u64* word, int turns) {
    if (threadIdx.x) return;
    const u64 start = global_timer();
    u64 now = start;
    int forward = 0;
    for (int turn = 0; turn < turns; turn++) {
        const u64 mine = turn * gridDim.x + blockIdx.x, before = now;
        while (load_relaxed(word) != mine) {}
        store_relaxed(word, mine + 1);
        now = global_timer();
        forward += now >= before;
    }
    done[blockIdx.x] = forward;
    if (times) times[blockIdx.x] = now - start;
}

// Waits for an arrival that never comes, 5 ms long: out = 1.
extern "C" __global__ void __launch_bounds__(32) gives_up(int* out) {
    __shared__ mbarrier never;
    if (threadIdx.x) return;
    mbarrier_init(&never, 1);
    const u64 start = global_timer();
    while (!mbarrier_try_wait(&never, 0))
        if (global_timer() - start > 5000000) {
            out[0] = 1;
            return;
        }
}

extern "C" __global__ void __launch_bounds__(32) proxies(float* out) {
    __shared__ float all[32];
    all[threadIdx.x] = threadIdx.x;
    fence_proxy_async();
    __syncthreads();
    out[threadIdx.x] = all[31 - threadIdx.x];
}
