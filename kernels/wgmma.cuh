// Products of many rows by Hopper's wgmma: as in mma.cuh x · w^T, with x [T, C] and w [N, C] bf16, fed by the copy engine.
// Shared by matmul.cu, qkv_rope.cu and swiglu.cu. No kernel in here. Needs sm_90a.
//
// A block is a producer, which copies tiles of x and w into a ring, and two groups of four warps, which multiply and write
// out: each 64 rows of every tile of the block, or by turns each a tile of its own, so that one multiplies while the other
// writes. Blocks come in clusters of PEERS, above each other: their common rows of w are fetched once, a share by each,
// because the L2 cache cannot feed 132 SMs as fast as they multiply.
//
// Error. As far as is known sm_90 adds 16 products and the accumulator at once, each cut to 2 bits below the last place of
// the largest, and cuts the sum to float32 (see mma.cuh). With A the sum of absolute terms so far a step loses at most
// 17/2 eps32 A and 2 eps32 A: 21/32 C eps32 sum |x w|.
// Order. Per output: ascending k in steps of 16. Every tile keeps it, so that an output has the same bits whatever the tile,
// and whatever the other rows.
#pragma once
#include "common.cuh"
#include "ptx.cuh"

constexpr int WGMMA_THREADS = 384;
constexpr int TRADE_PITCH = 40, TRADE_BYTES = 16 * TRADE_PITCH * 4;

// Where rows of w begin: a row of the matrix that a map describes. Rows outside of it are zeros.
struct WgmmaBox {
    const TensorMap* map;
    int row;
};

// BN      columns of a tile, 64, 128 or 256; it has 128 rows
// BOX     rows of w that one copy brings
// BLOCKS  of a cluster
// TURNS   whether the groups take tiles by turns
template <int BN_, int BOX_, int BLOCKS, bool TURNS>
struct WgmmaTile {
    static constexpr int BM = 128, BN = BN_, BOX = BOX_, BK = 64, NJ = BN / 8, PEERS = cluster_of(BLOCKS);
    static constexpr int PARTS = TURNS ? 2 : 1;  // of 64 rows that a group has
    static constexpr int X_BYTES = BM * BK * 2, STAGE = X_BYTES + BN * BK * 2, STAGES = BN == 256 ? 4 : BN == 128 ? 6 : 8;
    static constexpr int TRADE = STAGES * STAGE + 256, SHARED = TRADE + 8 * TRADE_BYTES;
    static_assert(BN % BOX == 0 && BN / BOX % BLOCKS == 0);

    // A place in the ring, and the parity of the turn.
    struct Place {
        int stage = 0, turn = 0;
        __device__ __forceinline__ void next() {
            if (++stage == STAGES) stage = 0, turn ^= 1;
        }
        __device__ __forceinline__ void skip(int steps) {
            turn ^= (stage + steps) / STAGES & 1, stage = (stage + steps) % STAGES;
        }
    };

    // The tiles of T x N outputs that a block computes, one after another. Sixteen tiles in a column follow each other, then
    // the next columns: blocks that run together share rows of x and of w in L2.
    struct Tiles {
        int down, across, tile, row, column;
        __device__ __forceinline__ Tiles(int T, int N)
            : down((T + PEERS * BM - 1) / (PEERS * BM)), across((N + BN - 1) / BN), tile(blockIdx.x / PEERS) {}
        __device__ __forceinline__ bool find() {
            constexpr int GROUP = 16 / PEERS;
            if (tile >= down * across) return false;
            const int first = tile / (GROUP * across) * GROUP, at = tile % (GROUP * across), height = min(GROUP, down - first);
            row = ((first + at % height) * PEERS + blockIdx.x % PEERS) * BM, column = at / height * BN;
            return true;
        }
        __device__ __forceinline__ void next() { tile += gridDim.x / PEERS; }
    };

    __device__ static __forceinline__ void multiply(float (&acc)[NJ][4], u64 x, u64 w, int add) {
        if constexpr (BN == 256) wgmma_m64n256(acc, x, w, add);
        else if constexpr (BN == 128) wgmma_m64n128(acc, x, w, add);
        else wgmma_m64n64(acc, x, w, add);
    }

    // Computes all tiles of this block. box(i, column) is where rows BOX i.. of w of the tile lie whose first column is
    // `column`. prepare(row, column) is called by a warp before it multiplies its 16 rows from `row` on, and
    // finish(acc, row, column, memory) does with them what follows the product: acc[j][e] is row `row` + lane / 4 + 8 (e / 2),
    // column `column` + 8 j + 2 (lane % 4) + e % 2, also outside of the outputs; TRADE_BYTES of `memory` are the warp's.
    // `shared`: SHARED bytes.
    template <class Box, class Prepare, class Finish>
    __device__ static __forceinline__ void product(unsigned char* shared, const TensorMap& x, int T, int N, int C, const Box& box,
                                                   const Prepare& prepare, const Finish& finish) {
        mbarrier* const full = reinterpret_cast<mbarrier*>(shared + STAGES * STAGE);
        mbarrier *const empty = full + STAGES, *const turns = empty + STAGES;
        // by a shuffle, so that the compiler knows it to be the same in a warp
        const int steps = (C + BK - 1) / BK, group = __shfl_sync(0xffffffffu, (int)threadIdx.x / 128, 0) - 1;
        static_assert((2 * STAGES + 2) * sizeof(mbarrier) <= 256);
        if (threadIdx.x == 0) {
            for (int s = 0; s < STAGES; s++) mbarrier_init(full + s, 1), mbarrier_init(empty + s, (TURNS ? 4 : 8) * PEERS);
            mbarrier_init(turns, 4), mbarrier_init(turns + 1, 4);
            fence_mbarrier_init();
        }
        if (threadIdx.x == 0) {
            prefetch_map(&x);
            for (int i = 0; i < BN / BOX; i++) prefetch_map(box(i, 0).map);
        }
        __syncwarp();
        cluster_barrier();
        Place place;
        if (group < 0) {
            fewer_registers<40>();
            if (threadIdx.x == 0) {
                const auto copy_w = [&](Place at, int step, int column) {
                    mbarrier_arrive_expect(full + at.stage, STAGE);
                    for (int i = blockIdx.x % PEERS; i < BN / BOX; i += PEERS) {
                        const WgmmaBox from = box(i, column);
                        unsigned char* const to = shared + at.stage * STAGE + X_BYTES + i * BOX * BK * 2;
                        bulk_copy_2d_to(to, from.map, step * BK, from.row, full + at.stage, (1u << PEERS) - 1);
                    }
                };
                // Of the first tile the weights, which no launch before writes, while these end.
                Tiles tiles(T, N);
                const bool any = tiles.find();
                for (Place at; any && at.turn == 0 && at.stage < steps; at.next()) copy_w(at, at.stage, tiles.column);
                wait_for_launches_before();
                for (bool first = true; tiles.find(); tiles.next(), first = false)
                    for (int step = 0; step < steps; step++, place.next()) {
                        if (!first || step >= STAGES) {
                            mbarrier_wait(empty + place.stage, place.turn ^ 1);
                            copy_w(place, step, tiles.column);
                        }
                        bulk_copy_2d(shared + place.stage * STAGE, &x, step * BK, tiles.row, full + place.stage);
                    }
            }
        } else {
            more_registers<232>();
            wait_for_launches_before();
            const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 - 4, offset = (TURNS ? 0 : 64 * group) + warp % 4 * 16;
            float* const memory = reinterpret_cast<float*>(shared + TRADE + warp * TRADE_BYTES);
            int number = 0;
            for (Tiles tiles(T, N); tiles.find(); tiles.next(), number++) {
                if (TURNS && number % 2 != group) {
                    place.skip(steps);
                    continue;
                }
                // Nobody may wait for a phase before the one before it has ended.
                if (TURNS) mbarrier_wait(turns + group, number / 2 % 2 ^ !group);
#pragma unroll
                for (int part = 0; part < PARTS; part++) prepare(tiles.row + 64 * part + offset, tiles.column);
                float acc[PARTS][NJ][4];
                int before = 0;
                for (int step = 0; step < steps; step++, place.next()) {
                    const unsigned char* const stage = shared + place.stage * STAGE;
                    const u64 a = matrix_descriptor(stage + (TURNS ? 0 : group * (X_BYTES / 2)));
                    const u64 b = matrix_descriptor(stage + X_BYTES);
                    mbarrier_wait(full + place.stage, place.turn);
                    wgmma_fence();
#pragma unroll
                    for (int kk = 0; kk < BK / 16; kk++)
#pragma unroll
                        for (int part = 0; part < PARTS; part++)
                            multiply(acc[part], a + part * (X_BYTES / 32) + 2 * kk, b + 2 * kk, step | kk);
                    wgmma_commit();
                    wgmma_wait<1>();  // of the step before, so that the tensor cores always have the next one
                    if (step && lane < PEERS) mbarrier_arrive_in(empty + before, lane);
                    before = place.stage;
                }
                if (TURNS && lane == 0) mbarrier_arrive(turns + !group);
                wgmma_wait<0>();
                if (lane < PEERS) mbarrier_arrive_in(empty + before, lane);
#pragma unroll
                for (int part = 0; part < PARTS; part++) 
                    finish(acc[part], tiles.row + 64 * part + offset, tiles.column, memory);
            }
        }
        __syncwarp();
        cluster_barrier();  // nobody's memory goes while others write to it
    }
};

// The shapes in use, all for clusters of two. Wide: most work for what it fetches. Turns: as much in two tiles at a time, where
// writing takes long beside multiplying. Middle, Few: where those would be too few to fill the GPU.
template <int BOX> using WgmmaWide = WgmmaTile<256, BOX, 2, false>;
template <int BOX> using WgmmaTurns = WgmmaTile<128, BOX, 2, true>;
template <int BOX> using WgmmaMiddle = WgmmaTile<128, BOX, 2, false>;
template <int BOX> using WgmmaFew = WgmmaTile<64, BOX, 2, false>;

// Trades 16 x 32 values of a warp's accumulators for rows: v[j][e] as acc has it, r[i] is row 4 i + lane / 8, columns 4 (lane % 8)
// to + 3, so that loads and stores of global memory take whole lines. (One store of the accumulators as they are touches 8 lines
// and takes 17 cycles.) 8 more floats a row spread the banks.
__device__ __forceinline__ void trade_rows(float4 (&r)[4], const float (&v)[4][4], float* memory) {
    const int lane = threadIdx.x % 32;
    __syncwarp();
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
        for (int half = 0; half < 2; half++)
            *reinterpret_cast<float2*>(memory + (lane / 4 + 8 * half) * TRADE_PITCH + 8 * j + lane % 4 * 2) =
                make_float2(v[j][2 * half], v[j][2 * half + 1]);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; i++) r[i] = *reinterpret_cast<const float4*>(memory + (4 * i + lane / 8) * TRADE_PITCH + lane % 8 * 4);
}
