// matmul: out[t, n] = sum_c x[t, c] weight[n, c]  (+ residual[t, n])
//
// Entry points matmul_row             T = 1: `parts` warps two columns of out
//              matmul_rows            T = 2 to 4: `parts` warps four columns of all rows; the weights stream once
//              matmul_mma_wide, _middle, _few   more rows, bf16 weights, C a multiple of 8, x and weight 16-byte aligned: tensor
//                                     cores, tiles of 128 x 128, 64 x 64 (x f32: 64 x 128) and 32 x 32; see tiles.choose
//              matmul_wgmma_wide, _turns, _middle, _few   the same with x bf16 on Hopper, N a multiple of 16, out and residual
//                                     16-byte aligned: tiles of 128 x 256, 128 x 128 and 128 x 64 (wgmma.cuh)
//              matmul_tile            otherwise: a block a tile of 64 x 64 outputs
// Arguments    out       [T, N]  float32; may be the same array as residual
//              x         [T, C]  X_TYPE
//              weight    [N, C]  W_TYPE, the checkpoint's layout
//              residual  [T, N]  float32, or null
//              matmul_wgmma_*: x and weight are maps of these matrices (launch.tensor_map) with boxes of 128 rows, of weight
//              for _turns and _middle 64, for _few 32
//              T, N, C           int32
//              parts             int32, matmul_row(s): 1, 2, 4 or 8: cuda._short_parts
// Constants    X_TYPE            bf16 | f32
//              W_TYPE            bf16 | f16 | f32
// Work         matmul_row(s): 8 warps a block; grid ceil(N parts / 16), rows: / 32; up to 512 bytes of shared memory
//              matmul_mma_*: 128 threads (wide, x f32: 256); grid one block a tile; shared bytes: tiles.shapes
//              matmul_wgmma_*: 384 threads; grid pairs of blocks, as many as there are or run at once: a block takes tile after
//              tile; shared bytes: tiles.shapes
//              matmul_tile: 256 threads, 4 x 4 outputs each; grid (ceil(N/64), ceil(T/64)); 16.6 KB of shared memory
// Precision    products and sums in float32, nothing is rounded to the storage type; on tensor cores float32 x goes in
//              three exact bf16 parts (mma.cuh)
// Error bound  row(s): (C/32 + 14) eps32, tile: C eps32, mma: x bf16 11/8 C eps32, x f32 (C/32 + 90) eps32 (derived in mma.cuh;
//              measured on an H100 with C = 4096 and all terms positive: 216 and 12), wgmma: 21/32 C eps32 (wgmma.cuh; measured
//              likewise: 213), each times sum_c |x w|. C/32 sequential additions a lane, 8 more for a last step that not all
//              lanes take, 5 across the lanes; parts shorten the first by more than they add
// Traffic      N C sizeof(W_TYPE) + 4 T (C + N) bytes at least, 2 T N C FLOP
// Determinism  fixed order of summation. Within an entry point a row's result does not depend on the other rows; the
//              rows, the tile and tensor cores sum in different orders and so differ within the error bound. matmul_row and
//              matmul_rows give the same bits, and so do all of matmul_mma_*, and all of matmul_wgmma_*
// Limits       matmul_tile: T up to 64 x 65,535 rows, the largest grid. matmul_mma_*: up to 2^31 tiles; C below 2^23; an
//              infinite float32 x gives NaN; |x| < 2^-110 loses what lies below 2^-126
// Wrapper cuda.matmul · truth reference.matmul · test tests/test_ops.py · benchmark benchmarks/ops.py
#include "dot.cuh"
#include "mma.cuh"
#include "wgmma.cuh"

#define PARAMETERS_OF(X, W) float *out, X x, W weight, const float *residual, int T, int N, int C
#define PARAMETERS PARAMETERS_OF(const X_TYPE *__restrict__, const W_TYPE *__restrict__)
#define ARGUMENTS out, x, weight, residual, T, N, C

template <int COLUMNS, int MAX_T> __device__ __forceinline__ void few_rows(PARAMETERS, int parts) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, t = lane % MAX_T;
    const int first = COLUMNS * (blockIdx.x * (8 / parts) + warp / parts), n = first + lane / MAX_T;
    const bool wide = C % 8 == 0 && ((size_t)x | (size_t)weight) % 16 == 0;
    const bool mine = warp % parts == 0 && lane < COLUMNS * MAX_T && t < T && n < N;
    const size_t at = (size_t)t * N + n;
    const W_TYPE* rows[COLUMNS];
#pragma unroll
    for (int i = 0; i < COLUMNS; i++)  // past the end the last row once more, which nobody stores
        rows[i] = weight + (size_t)min(first + i, N - 1) * C;
    WarpDots<COLUMNS, MAX_T, X_TYPE, W_TYPE> dots(x, rows, T, C, wide, warp % parts, parts);
    dots.wait();
    const float before = mine && residual ? residual[at] : 0.0f;
    float sums[COLUMNS][MAX_T];
    dots.finish(sums);
    const float sum = add_shares(sums, parts);
    if (mine) out[at] = residual ? sum + before : sum;
}

extern "C" __global__ void __launch_bounds__(256)
matmul_row(PARAMETERS, int parts) {
    few_rows<2, 1>(ARGUMENTS, parts);
}

extern "C" __global__ void __launch_bounds__(256, 2)  // more blocks spill
matmul_rows(PARAMETERS, int parts) {
    few_rows<4, 4>(ARGUMENTS, parts);
}

extern "C" __global__ void __launch_bounds__(256) matmul_tile(PARAMETERS) {
    const int row0 = blockIdx.y * 64, col0 = blockIdx.x * 64;
    float acc[4][4];
    tile_product<64, 64>(x, weight, T, N, C, row0, col0, acc);
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int t = row0 + ty + 16 * i, n = col0 + tx + 16 * j;
            if (t >= T || n >= N) continue;
            const size_t at = (size_t)t * N + n;
            out[at] = residual ? acc[i][j] + residual[at] : acc[i][j];
        }
}

template <class Tile> __device__ __forceinline__ void tensor_tile(PARAMETERS) {
    if constexpr (on_tensor_cores<W_TYPE>) {
        DYNAMIC_SHARED(unsigned char, shared);
        int row0, col0;
        find_tile<Tile>(T, N, row0, col0);
        const bf16* const first = reinterpret_cast<const bf16*>(weight) + (size_t)col0 * C;
        const int there = N - col0, second = min(there, Tile::BN / 2);  // no address beyond the matrix, though none is read
        const WeightRows rows = {first, first + (size_t)(second < there ? second : 0) * C, there, there - second};
        float acc[Tile::MI][Tile::NJ][4];
        Tile::product(acc, shared, x + (size_t)row0 * C, T - row0, rows, C);
        const float* const tile = Tile::spread(acc, shared);
        // Four neighbours a thread. Eight rows at a time: their residuals are read before the first store, which may be to the
        // same array, so that the loads wait for each other no more than they must.
        constexpr int WIDTH = Tile::BN / 4, STEP = Tile::THREADS / WIDTH, COUNT = Tile::BM < 8 * STEP ? Tile::BM / STEP : 8;
        const bool aligned = N % 4 == 0 && ((size_t)out | (size_t)residual) % 16 == 0;
        const int column = threadIdx.x % WIDTH * 4, n = col0 + column;
#pragma unroll 1
        for (int row = threadIdx.x / WIDTH; row < Tile::BM; row += COUNT * STEP) {
            float4 before[COUNT];
#pragma unroll
            for (int i = 0; i < COUNT; i++) {
                const int t = row0 + row + i * STEP;
                const float* const from = residual + (size_t)t * N + n;
                before[i] = {0.0f, 0.0f, 0.0f, 0.0f};
                if (residual && aligned && t < T && n < N) before[i] = *reinterpret_cast<const float4*>(from);
            }
#pragma unroll
            for (int i = 0; i < COUNT; i++) {
                const int t = row0 + row + i * STEP;
                const float4 sum = *reinterpret_cast<const float4*>(tile + (row + i * STEP) * Tile::ROW + column);
                const float v[4] = {sum.x + before[i].x, sum.y + before[i].y, sum.z + before[i].z, sum.w + before[i].w};
                const size_t at = (size_t)t * N + n;
                if (t >= T) continue;
                if (aligned) {
                    if (n < N) store_run(out + at, v, true);
                } else {
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        if (n + e < N) out[at + e] = residual ? v[e] + residual[at + e] : v[e];
                }
            }
        }
    }
}

typedef WideTile<X_TYPE, 32> Wide;
typedef MiddleTile<X_TYPE, MIDDLE_COLUMNS<X_TYPE>, MIDDLE_COLUMNS<X_TYPE> / 4> Middle;
typedef FewTile<X_TYPE, 32, 16, 16, 8> Few;

extern "C" __global__ void __launch_bounds__(Wide::THREADS, 256 / Wide::THREADS) matmul_mma_wide(PARAMETERS) {
    tensor_tile<Wide>(ARGUMENTS);
}

extern "C" __global__ void __launch_bounds__(Middle::THREADS, 2) matmul_mma_middle(PARAMETERS) {
    tensor_tile<Middle>(ARGUMENTS);
}

extern "C" __global__ void __launch_bounds__(Few::THREADS) matmul_mma_few(PARAMETERS) {
    tensor_tile<Few>(ARGUMENTS);
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

template <class Tile> __device__ __forceinline__ void wgmma_tiles(PARAMETERS_OF(const TensorMap&, const TensorMap&)) {
    if constexpr (on_tensor_cores<X_TYPE> && on_tensor_cores<W_TYPE>) {
        DYNAMIC_SHARED(unsigned char, shared);
        const auto box = [&](int i, int column) { return WgmmaBox{&weight, column + i * Tile::BOX}; };
        // Residuals of as many runs of 32 columns as registers allow are on their way together, before the first store, which may
        // be to the same array: all of them during the product where they fit, else they go into L2 meanwhile.
        constexpr int RUNS = Tile::NJ / 4;
        constexpr bool EARLY = Tile::PARTS * RUNS <= 4;
        constexpr int AHEAD = EARLY ? RUNS : 2;
        float4 before[AHEAD][4];
        const auto load = [&](int row0, int column) {
#pragma unroll
            for (int k = 0; k < AHEAD; k++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int t = row0 + threadIdx.x % 32 / 8 + 4 * i, n = column + threadIdx.x % 8 * 4 + 32 * k;
                    before[k][i] = {0.0f, 0.0f, 0.0f, 0.0f};
                    if (residual && t < T && n < N)
                        before[k][i] = *reinterpret_cast<const float4*>(residual + (size_t)t * N + n);
                }
        };
        const auto prepare = [&](int row, int column) {
            if constexpr (EARLY) {
                load(row, column);
            } else {
                constexpr int LINES = Tile::BN / 32;
                for (int i = threadIdx.x % 32; residual && i < 16 * LINES; i += 32)
                    if (const int t = row + i / LINES, n = column + i % LINES * 32; t < T && n < N)
                        prefetch_l2(residual + (size_t)t * N + n);
            }
        };
        Tile::product(shared, x, T, N, C, box, prepare, [&](const float (&acc)[Tile::NJ][4], int row0, int column, float* memory) {
#pragma unroll
            for (int first = 0; first < RUNS; first += AHEAD) {
                if (!EARLY) load(row0, column + 32 * first);
#pragma unroll
                for (int k = 0; k < AHEAD; k++) {
                    float4 sums[4];
                    trade_rows(sums, *reinterpret_cast<const float(*)[4][4]>(acc + 4 * (first + k)), memory);
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const int t = row0 + threadIdx.x % 32 / 8 + 4 * i, n = column + threadIdx.x % 8 * 4 + 32 * (first + k);
                        const float4 a = sums[i], b = before[k][i];
                        const float v[4] = {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
                        if (t < T && n < N) store_run(out + (size_t)t * N + n, v, true);
                    }
                }
            }
        });
    }
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(WGMMA_THREADS, 1)
matmul_wgmma_wide(PARAMETERS_OF(const __grid_constant__ TensorMap, const __grid_constant__ TensorMap)) {
    wgmma_tiles<WgmmaWide<128>>(ARGUMENTS);
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(WGMMA_THREADS, 1)
matmul_wgmma_turns(PARAMETERS_OF(const __grid_constant__ TensorMap, const __grid_constant__ TensorMap)) {
    wgmma_tiles<WgmmaTurns<64>>(ARGUMENTS);
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(WGMMA_THREADS, 1)
matmul_wgmma_middle(PARAMETERS_OF(const __grid_constant__ TensorMap, const __grid_constant__ TensorMap)) {
    wgmma_tiles<WgmmaMiddle<64>>(ARGUMENTS);
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(WGMMA_THREADS, 1)
matmul_wgmma_few(PARAMETERS_OF(const __grid_constant__ TensorMap, const __grid_constant__ TensorMap)) {
    wgmma_tiles<WgmmaFew<32>>(ARGUMENTS);
}

#endif
