// What follows the products of qkv_rope_mma_*: a tile of whole heads (mma.cuh) gets its bias, mean squares, gain and rotation and goes
// to the rows of its tokens. No kernel in here.
#pragma once
#include "mma.cuh"
#include "qkv_rope_head.cuh"

// A tile of whole heads, one or two; a thread holds rotation pairs (see MmaTile).
template <class Tile> __device__ __forceinline__ void tensor_heads(PARAMETERS, float eps) {
    if constexpr (on_tensor_cores<W_TYPE> && (D == 64 || D == 128)) {
        constexpr int HEADS = Tile::BN / D;
        static_assert(HEADS <= 2);
        DYNAMIC_SHARED(unsigned char, shared);
        const int all = H + 2 * K;
        int row0, col0;
        find_tile<Tile>(T, all * D, row0, col0);
        WeightRows rows;
        {
            const Head head = HEAD(col0 / D);
            rows.first = reinterpret_cast<const bf16*>(head.proj) + (size_t)head.index * D * C;
            rows.second = rows.first + (size_t)(D / 2) * C;
            rows.first_rows = rows.second_rows = Tile::BN / 2;
        }
        if (HEADS == 2) {
            const Head head = HEAD(min(col0 / D + 1, all - 1));
            rows.second = reinterpret_cast<const bf16*>(head.proj) + (size_t)head.index * D * C;
            if (col0 / D + 1 >= all) rows.second_rows = 0;
        }
        float acc[Tile::MI][Tile::NJ][4];
        Tile::product(acc, shared, x + (size_t)row0 * C, T - row0, rows, C);

        const bool aligned = ((size_t)q | (size_t)k | (size_t)v) % 8 == 0;
        // A warp takes rows of one head, COUNT at a time: lane l elements l PER.. of each half, so that a rotation pair is in
        // one thread.
        constexpr int WARPS = Tile::THREADS / 32, STEP = WARPS / HEADS, ROWS = Tile::BM / STEP;
        constexpr int MOST = sizeof(X_TYPE) == 4 ? 4 : 8, COUNT = ROWS < MOST ? ROWS : MOST;  // eight would spill with float32 x
        constexpr int PER = D < 64 ? 1 : D / 64;
        static_assert(ROWS <= 64);
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, h = col0 / D + warp % HEADS, d = lane * PER;
        const Head head = HEAD(min(h, all - 1));
        float bias[2][PER], gain[2][PER];
#pragma unroll
        for (int e = 0; e < 2 * PER; e++) {
            const int at = d + e % PER + e / PER * (D / 2);
            bias[e / PER][e % PER] = head.bias ? head.bias[head.index * D + at] : 0.0f;
            gain[e / PER][e % PER] = head.gain ? head.gain[at] : 1.0f;
        }
        // lane i knows the positions and the targets of the warp's rows i and i + 32
        int position[2] = {-1, -1}, target[2] = {-1, -1};
#pragma unroll
        for (int half = 0; half < (ROWS + 31) / 32; half++) {
            const int t = row0 + warp / HEADS + STEP * (32 * half + lane);
            if (32 * half + lane >= ROWS || h >= all || t >= T) continue;
            position[half] = head.rotated ? positions[t] : 0, target[half] = head.rows ? head.rows[t] : t;
            if (head.rows && target[half] >= S) target[half] = -1;
        }
        const float* const tile = Tile::spread(acc, shared);
#pragma unroll 1
        for (int first = 0; first < ROWS; first += COUNT) {
            const int its_position = first < 32 ? position[0] : position[1], its_target = first < 32 ? target[0] : target[1];
            float c[COUNT][PER], s[COUNT][PER];
#pragma unroll
            for (int i = 0; i < COUNT; i++) {
                const int p = __shfl_sync(0xffffffffu, its_position, (first + i) % 32);
#pragma unroll
                for (int e = 0; e < PER; e++)
                    if (head.rotated) find_angle(c[i][e], s[i][e], d + e, p, cos, sin, P);
            }
#pragma unroll
            for (int i = 0; i < COUNT; i++) {
                const int r = warp / HEADS + STEP * (first + i), t = row0 + r;
                const float* const a = tile + r * Tile::ROW + warp % HEADS * D + d;
                float low[PER], high[PER], squares = 0.0f;
#pragma unroll
                for (int e = 0; e < PER; e++) {
                    low[e] = a[e] + bias[0][e], high[e] = a[e + D / 2] + bias[1][e];
                    squares = fmaf(low[e], low[e], fmaf(high[e], high[e], squares));
                }
                if (head.rotated) {
                    squares = warp_sum(squares);
                    if (lane == 0 && t < T) head.ms[(size_t)t * head.heads + head.index] = squares / D;
                    const float scale = eps >= 0.0f ? 1.0f / sqrtf(squares / D + eps) : 1.0f;
#pragma unroll
                    for (int e = 0; e < PER; e++) {
                        low[e] *= gain[0][e], high[e] *= gain[1][e];
                        rotate(low[e], high[e], c[i][e], s[i][e]);
                        low[e] *= scale, high[e] *= scale;
                    }
                }
                const int row = __shfl_sync(0xffffffffu, its_target, (first + i) % 32);
                if (row < 0) continue;
                const size_t at = ((size_t)row * head.heads + head.index) * D + d;
                if (h < H) store_run(q + at, low, aligned), store_run(q + at + D / 2, high, aligned);
                else if (h < H + K) store_run(k + at, low, aligned), store_run(k + at + D / 2, high, aligned);
                else store_run(v + at, low, aligned), store_run(v + at + D / 2, high, aligned);
            }
        }
    }
}
