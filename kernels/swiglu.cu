// swiglu: out[t, f] = g / (1 + exp(-g)) * u,  g = sum_c x[t, c] gate_proj[f, c],  u = sum_c x[t, c] up_proj[f, c]
//
// Entry points swiglu_row             T = 1: `parts` warps one column of out, its two dot products together
//              swiglu_rows            T = 2 to 4: `parts` warps two columns of all rows; the weights stream once
//              swiglu_mma_wide, _middle, _few   more rows, bf16 weights, C a multiple of 8, x and weights 16-byte aligned: tensor
//                                     cores, gate and up in one tile of 128 x 128, 64 x 64 (x f32: 64 x 128) or 32 x 32
//              swiglu_wgmma_wide, _turns, _middle, _few   the same with x bf16 on Hopper, F a multiple of 8, out 16-byte
//                                     aligned: tiles of 128 x 256, 128 x 128 and 128 x 64 (wgmma.cuh)
//              Otherwise cuda.swiglu takes two products and silu_mul.
// Arguments    out        [T, F]  OUT_TYPE
//              x          [T, C]  X_TYPE
//              gate_proj, up_proj  [F, C]  W_TYPE, the checkpoint's layout
//              T, F, C            int32
//              swiglu_wgmma_*: x and the weights are maps of these matrices (launch.tensor_map) with boxes of 128 rows, of the
//              weights for _turns and _middle 64, for _few 32
//              parts              int32, 1, 2, 4 or 8: cuda._short_parts
// Constants    X_TYPE, OUT_TYPE   bf16 | f32
//              W_TYPE             bf16 | f16 | f32
// Work         row(s): 8 warps a block; grid ceil(F parts / 8), rows: / 16; up to 512 bytes of shared memory
//              mma: 128 threads (wide, x f32: 256); grid one block a tile; shared bytes: tiles.shapes
//              wgmma: 384 threads; grid pairs of blocks, as many as there are or run at once: a block takes tile after tile
// Precision    products and sums in float32; expf is within 2 ulp and overflows to infinity, which gives the correct limit 0;
//              one rounding when OUT_TYPE is bf16
// Error bound  row(s): e_g = (C/32 + 14) eps32 sum_c |x gate_proj|, mma: 11/8 C eps32 (x bf16), (C/32 + 90) eps32 (x f32),
//              wgmma: 21/32 C eps32, e_u likewise (see matmul.cu). silu has slopes from -0.1 to 1.1:
//              1.1 e_g |u| + |silu(g)| e_u + 1.1 e_g e_u + 6 eps32 |silu(g) u|, before the final rounding; wgmma, by
//              __fdividef: 9 eps32 instead of 6, and |silu(g)| < 1.1e-36 gives 0
// Traffic      2 F C sizeof(W_TYPE) bytes of weights, T (C sizeof(X_TYPE) + F sizeof(OUT_TYPE)) others, 4 T F C FLOP
// Determinism  fixed order of summation. A row's result does not depend on the other rows. Both row entry points give the
//              same bits, those of matmul_row followed by silu_mul where `parts` are the same; all of swiglu_mma_* give the same,
//              and all of swiglu_wgmma_*
// Wrapper cuda.swiglu · truth reference.swiglu · test tests/test_ops.py · benchmark benchmarks/ops.py
#include "dot.cuh"
#include "mma.cuh"
#include "wgmma.cuh"

#define PARAMETERS_OF(X, W) OUT_TYPE *__restrict__ out, X x, W gate_proj, W up_proj, int T, int F, int C
#define PARAMETERS PARAMETERS_OF(const X_TYPE *__restrict__, const W_TYPE *__restrict__)
#define ARGUMENTS out, x, gate_proj, up_proj, T, F, C

template <int COLUMNS, int MAX_T> __device__ __forceinline__ void few_rows(PARAMETERS, int parts) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, t = lane % MAX_T;
    const int first = COLUMNS * (blockIdx.x * (8 / parts) + warp / parts), f = first + lane / MAX_T;
    const bool wide = C % 8 == 0 && ((size_t)x | (size_t)gate_proj | (size_t)up_proj) % 16 == 0;
    const W_TYPE* rows[2 * COLUMNS];
#pragma unroll
    for (int i = 0; i < COLUMNS; i++) {  // past the end the last row once more, which nobody stores
        const size_t row = (size_t)min(first + i, F - 1) * C;
        rows[i] = gate_proj + row, rows[COLUMNS + i] = up_proj + row;
    }
    WarpDots<2 * COLUMNS, MAX_T, X_TYPE, W_TYPE> dots(x, rows, T, C, wide, warp % parts, parts);
    dots.wait();
    float sums[2 * COLUMNS][MAX_T];
    dots.finish(sums);
    const float g = add_shares(sums, parts), u = __shfl_down_sync(0xffffffffu, g, COLUMNS * MAX_T);
    if (warp % parts == 0 && lane < COLUMNS * MAX_T && t < T && f < F)
        store(out + (size_t)t * F + f, g / (1.0f + expf(-g)) * u);
}

extern "C" __global__ void __launch_bounds__(256)
swiglu_row(PARAMETERS, int parts) {
    few_rows<1, 1>(ARGUMENTS, parts);
}

extern "C" __global__ void __launch_bounds__(256, 2)  // more blocks spill
swiglu_rows(PARAMETERS, int parts) {
    few_rows<2, 4>(ARGUMENTS, parts);
}

template <class Tile> __device__ __forceinline__ void tensor_tile(PARAMETERS) {
    if constexpr (on_tensor_cores<W_TYPE>) {
        DYNAMIC_SHARED(unsigned char, shared);
        int row0, col0;
        find_tile<Tile>(T, 2 * F, row0, col0);
        const int f0 = col0 / 2;
        const WeightRows rows = {reinterpret_cast<const bf16*>(gate_proj) + (size_t)f0 * C,
                                 reinterpret_cast<const bf16*>(up_proj) + (size_t)f0 * C, F - f0, F - f0};
        float acc[Tile::MI][Tile::NJ][4];
        Tile::product(acc, shared, x + (size_t)row0 * C, T - row0, rows, C);
        const float* const tile = Tile::spread(acc, shared);
        constexpr int WIDTH = Tile::BN / 8, STEP = Tile::THREADS / WIDTH;  // four neighbours a thread
        const bool aligned = F % 4 == 0 && (size_t)out % (4 * sizeof(OUT_TYPE)) == 0;
        const int column = threadIdx.x % WIDTH * 4, f = f0 + column;
#pragma unroll 4
        for (int row = threadIdx.x / WIDTH; row < Tile::BM; row += STEP) {
            const int t = row0 + row;
            if (t >= T) break;
            const float* const gate = tile + row * Tile::ROW + column;
            const float4 g4 = *reinterpret_cast<const float4*>(gate), u4 = *reinterpret_cast<const float4*>(gate + Tile::BN / 2);
            const float g[4] = {g4.x, g4.y, g4.z, g4.w}, u[4] = {u4.x, u4.y, u4.z, u4.w};
            float y[4];
#pragma unroll
            for (int e = 0; e < 4; e++) y[e] = g[e] / (1.0f + expf(-g[e])) * u[e];
            OUT_TYPE* const to = out + (size_t)t * F + f;
            if (f + 3 < F) {
                store_run(to, y, aligned);
            } else {
#pragma unroll
                for (int e = 0; e < 3; e++)
                    if (f + e < F) store(to + e, y[e]);
            }
        }
    }
}

typedef WideTile<X_TYPE, 64> Wide;
typedef MiddleTile<X_TYPE, MIDDLE_COLUMNS<X_TYPE>, MIDDLE_COLUMNS<X_TYPE> / 2> Middle;
typedef FewTile<X_TYPE, 32, 16, 16, 16> Few;

extern "C" __global__ void __launch_bounds__(Wide::THREADS, 256 / Wide::THREADS) swiglu_mma_wide(PARAMETERS) {
    tensor_tile<Wide>(ARGUMENTS);
}

extern "C" __global__ void __launch_bounds__(Middle::THREADS, 2) swiglu_mma_middle(PARAMETERS) {
    tensor_tile<Middle>(ARGUMENTS);
}

extern "C" __global__ void __launch_bounds__(Few::THREADS) swiglu_mma_few(PARAMETERS) {
    tensor_tile<Few>(ARGUMENTS);
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

template <class Tile> __device__ __forceinline__ void wgmma_tiles(PARAMETERS_OF(const TensorMap&, const TensorMap&)) {
    if constexpr (on_tensor_cores<X_TYPE> && on_tensor_cores<W_TYPE>) {
        DYNAMIC_SHARED(unsigned char, shared);
        const auto box = [&](int i, int column) { return WgmmaBox{i ? &up_proj : &gate_proj, column / 2}; };
        const auto nothing = [](int, int) {};
        Tile::product(shared, x, T, 2 * F, C, box, nothing, [&](const float (&acc)[Tile::NJ][4], int row0, int column, float* memory) {
            const int row = row0 + threadIdx.x % 32 / 8, f0 = column / 2 + threadIdx.x % 8 * 4;
#pragma unroll
            for (int first = 0; first < Tile::NJ / 2; first += 4) {
                float y[4][4];
#pragma unroll
                for (int j = 0; j < 4; j++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        const float g = acc[first + j][e];
                        y[j][e] = __fdividef(g, 1.0f + expf(-g)) * acc[first + j + Tile::NJ / 2][e];  // `/` branches
                    }
                float4 rows[4];
                trade_rows(rows, y, memory);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int t = row + 4 * i, f = f0 + 8 * first;
                    const float v[4] = {rows[i].x, rows[i].y, rows[i].z, rows[i].w};
                    if (t < T && f < F) store_run(out + (size_t)t * F + f, v, true);
                }
            }
        });
    }
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(WGMMA_THREADS, 1)
swiglu_wgmma_wide(PARAMETERS_OF(const __grid_constant__ TensorMap, const __grid_constant__ TensorMap)) {
    wgmma_tiles<WgmmaWide<128>>(ARGUMENTS);
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(WGMMA_THREADS, 1)
swiglu_wgmma_turns(PARAMETERS_OF(const __grid_constant__ TensorMap, const __grid_constant__ TensorMap)) {
    wgmma_tiles<WgmmaTurns<64>>(ARGUMENTS);
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(WGMMA_THREADS, 1)
swiglu_wgmma_middle(PARAMETERS_OF(const __grid_constant__ TensorMap, const __grid_constant__ TensorMap)) {
    wgmma_tiles<WgmmaMiddle<64>>(ARGUMENTS);
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(WGMMA_THREADS, 1)
swiglu_wgmma_few(PARAMETERS_OF(const __grid_constant__ TensorMap, const __grid_constant__ TensorMap)) {
    wgmma_tiles<WgmmaFew<32>>(ARGUMENTS);
}

#endif
