// attention of a prompt by Hopper's wgmma: attention_mma.cu's formula and arguments, for bf16 queries
//
// Needs        sm_90a; for others the file is empty
// Entry point  attention_wgmma        q, keys and values bf16, D 64 or 128, all 16-byte aligned
// Arguments    out        [T, H, D]  OUT_TYPE, 16-byte aligned; may be q
//              q          [T, H, D]  bf16, 16-byte aligned
//              keys       [S, K, D]  bf16, 16-byte aligned
//              values     [S, K, D]  bf16, 16-byte aligned
//              positions  [T]        int32, in any order; query t sees rows 0..positions[t]; one outside 0..S-1 gives NaN
//              T, H, K, S            int32, H a multiple of K
//              scale                 float32, log2(e) / sqrt(D)
// Constants    OUT_TYPE               bf16 | f32       HEAD_DIM  D, 64 or 128
//              GROUPS                 warpgroups with 64 queries of a block each, 1 or 2
// Work         block = 64 GROUPS queries of one head, grid (H, T / (64 GROUPS)), the last queries, which see most, first. One
//              more warpgroup fetches tiles of 128 keys and values into two stages each of shared memory. The others start
//              a tile's products with its keys and those of the tile before with its values, and weigh the former's scores
//              while the latter run; 128 (GROUPS + 1) threads, 2 D (64 GROUPS + 512) bytes of shared memory
// Precision    products exact, weights rounded to bf16 once; sums, maxima and output float32 until it is stored
// Error bound  with E = 2^-24, s = sum |q k| / sqrt(D) of the worst key, V = sum of weight |v|, and what mma.cuh states of
//              the tensor cores' sums: (2^-8 + (3/2 S + 2 (11/8 D + 4) s + 64) E) V
// Traffic      4 S K D bytes for each 64 GROUPS queries of a head through L2, 4 S H D FLOP a query
// Determinism  as attention_mma.cu, with tiles of 128 keys: the same bits for any GROUPS
// Limits       an infinity or NaN in a row of values reaches all queries of a block that has one who sees that row
// Wrapper cuda.attention · truth reference.attention · test tests/test_attention_mma.py · benchmark benchmarks/ops.py
#include "common.cuh"
#include "ptx.cuh"
#include "softmax.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr int D = HEAD_DIM, KEYS = 128, ROWS = 64 * GROUPS, CONSUMERS = 128 * GROUPS, THREADS = CONSUMERS + 128;
constexpr int Q_BYTES = ROWS * D * 2, TILE = KEYS * D * 2;

// Starts copying rows 0..COUNT-1, `pitch` elements apart, as wgmma reads them: [D / 64][COUNT][64], and in each row of 128 bytes
// piece p of row r at place p ^ r % 8. Zeros stand for rows from `rows` on. By 128 threads.
template <int COUNT> __device__ __forceinline__ void copy(unsigned char* shared, const bf16* from, size_t pitch, int rows) {
    constexpr int PIECES = D / 8, STEP = 128 / PIECES;
    const int thread = threadIdx.x % 128, row = thread / PIECES, piece = thread % PIECES;
    from += row * pitch + 8 * piece;
    shared += piece / 8 * COUNT * 128 + row * 128 + 16 * (piece % 8 ^ row % 8);
    if (rows >= COUNT) {
#pragma unroll 8
        for (int i = 0; i < COUNT; i += STEP, from += STEP * pitch) cp_async16(shared + i * 128, from);
    } else {
#pragma unroll 4
        for (int i = 0; i < COUNT; i += STEP, from += STEP * pitch) cp_async16(shared + i * 128, from, row + i < rows ? 16 : 0);
    }
}

// A tile's keys or values: two stages that 128 threads fill and 4 GROUPS warps empty.
struct Ring {
    unsigned char* stages;
    mbarrier *full, *empty;

    __device__ __forceinline__ unsigned char* stage(int tile) const { return stages + tile % 2 * TILE; }
    __device__ __forceinline__ void fill(int tile, const bf16* rows, size_t pitch, int there) const {
        mbarrier_wait(empty + tile % 2, tile / 2 % 2 ^ 1);
        copy<KEYS>(stage(tile), rows + (size_t)tile * KEYS * pitch, pitch, there - tile * KEYS);
        cp_async_commit();
    }
    // Tells that all copies of a tile but those of the newest N groups are there.
    template <int N> __device__ __forceinline__ void filled(int tile) const {
        cp_async_wait<N>();
        fence_proxy_async();
        mbarrier_arrive(full + tile % 2);
    }
    __device__ __forceinline__ void wait(int tile) const { mbarrier_wait(full + tile % 2, tile / 2 % 2); }
    __device__ __forceinline__ void release(int tile) const {
        if (threadIdx.x % 32 == 0) mbarrier_arrive(empty + tile % 2);
    }
};

// Starts scores = queries times a tile's keys.
__device__ __forceinline__ void multiply_keys(float (&scores)[KEYS / 8][4], const unsigned char* queries,
                                              const unsigned char* keys) {
#pragma unroll
    for (int k = 0; k < D / 16; k++)
        wgmma_m64n128(scores, matrix_descriptor(queries + k / 4 * ROWS * 128) + k % 4 * 2,
                      matrix_descriptor(keys + k / 4 * KEYS * 128) + k % 4 * 2, k);
    wgmma_commit();
}

__device__ __forceinline__ void multiply_rows(float (&sum)[16][4], const unsigned (&a)[4], u64 b) {
    wgmma_m64n128_rows(sum, a, b, KEYS * 128);
}
__device__ __forceinline__ void multiply_rows(float (&sum)[8][4], const unsigned (&a)[4], u64 b) { wgmma_m64n64_rows(sum, a, b); }

// Starts sum += weights times a tile's values.
__device__ __forceinline__ void multiply_values(float (&sum)[D / 8][4], const unsigned (&weights)[KEYS / 16][4],
                                                const unsigned char* values) {
#pragma unroll
    for (int k = 0; k < KEYS / 16; k++) multiply_rows(sum, weights[k], matrix_descriptor(values) + 128 * k);
    wgmma_commit();
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
attention_wgmma(OUT_TYPE* out, const bf16* q, const bf16* __restrict__ keys, const bf16* __restrict__ values,
                const int* __restrict__ positions, int T, int H, int K, int S, float scale) {
    DYNAMIC_SHARED(unsigned char, shared);
    __shared__ mbarrier barriers[8];
    __shared__ int last_of_warp[4 * GROUPS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, head = blockIdx.x, row0 = (gridDim.y - 1 - blockIdx.y) * ROWS;
    const size_t q_pitch = (size_t)H * D, pitch = (size_t)K * D;
    const Queries queries = {positions, row0, T, S};
    const Ring k_ring = {shared + Q_BYTES, barriers, barriers + 2};
    const Ring v_ring = {shared + Q_BYTES + 2 * TILE, barriers + 4, barriers + 6};
    const int last = warp < 4 * GROUPS ? queries.seen(16 * warp + lane % 16) : 0;
    const int warp_first = __reduce_min_sync(0xffffffffu, last), warp_last = __reduce_max_sync(0xffffffffu, last);
    if (warp < 4 * GROUPS && lane == 0) last_of_warp[warp] = warp_last;
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; i++) {
            mbarrier_init(k_ring.full + i, 128), mbarrier_init(k_ring.empty + i, 4 * GROUPS);
            mbarrier_init(v_ring.full + i, 128), mbarrier_init(v_ring.empty + i, 4 * GROUPS);
        }
        fence_mbarrier_init();
    }
    __syncthreads();
    int block_last = 0;
#pragma unroll
    for (int i = 0; i < 4 * GROUPS; i++) block_last = max(block_last, last_of_warp[i]);
    const int there = min(block_last + 1, S), tiles = block_last / KEYS + 1;

    if (warp >= 4 * GROUPS) {
        fewer_registers<24>();
        keys += (size_t)(head / (H / K)) * D;
        values += (size_t)(head / (H / K)) * D;
        copy<ROWS>(shared, q + row0 * q_pitch + head * D, q_pitch, T - row0);
        for (int tile = 0; tile < tiles; tile++) {
            k_ring.fill(tile, keys, pitch, there);
            if (tile) v_ring.filled<1>(tile - 1);
            v_ring.fill(tile, values, pitch, there);
            k_ring.filled<1>(tile);
        }
        v_ring.filled<0>(tiles - 1);
    } else {
        more_registers<240>();
        const unsigned char* const mine = shared + warp / 4 * 64 * 128;
        float scores[KEYS / 8][4], sum[D / 8][4] = {};
        unsigned weights[KEYS / 16][4];
        Softmax softmax;
        const auto weigh = [&](int tile) {
            if ((tile + 1) * KEYS - 1 > warp_first) hide(scores, queries, 16 * warp, tile * KEYS);
            return softmax.weigh(scores, scale);
        };
        const auto round = [&] {
#pragma unroll
            for (int k = 0; k < KEYS / 16; k++)
#pragma unroll
                for (int e = 0; e < 4; e++) {  // rows + 0, + 8, + 0, + 8; keys + 0, + 0, + 8, + 8
                    const float* const two = scores[2 * k + e / 2] + e % 2 * 2;
                    weights[k][e] = pair(two[0], two[1]);
                }
        };
        k_ring.wait(0);
        wgmma_fence();
        multiply_keys(scores, mine, k_ring.stage(0));
        wgmma_wait<0>();
        wgmma_touch(scores);
        k_ring.release(0);
        weigh(0);
        round();
        for (int tile = 1; tile < tiles; tile++) {
            k_ring.wait(tile);
            wgmma_touch(scores), wgmma_touch(sum);
            wgmma_fence();
            multiply_keys(scores, mine, k_ring.stage(tile));
            v_ring.wait(tile - 1);
            multiply_values(sum, weights, v_ring.stage(tile - 1));
            wgmma_wait<1>();
            wgmma_touch(scores);
            k_ring.release(tile);
            const bool grown = weigh(tile);
            wgmma_wait<0>();
            wgmma_touch(sum);
            v_ring.release(tile - 1);
            round();
            if (grown)
#pragma unroll
                for (int j = 0; j < D / 8; j++)
#pragma unroll
                    for (int e = 0; e < 4; e++) sum[j][e] *= softmax.shrink[e / 2];
        }
        v_ring.wait(tiles - 1);
        wgmma_touch(sum);
        wgmma_fence();
        multiply_values(sum, weights, v_ring.stage(tiles - 1));
        wgmma_wait<0>();
        wgmma_touch(sum);
        softmax.finish(out + row0 * q_pitch + head * D, q_pitch, sum, queries, 16 * warp);
    }
}
#endif
