// qkv_rope: projection, bias, gain and rotation of q and k, projection and bias of v, on an already normalised input
//
//     a[h, d] = sum_c x[t, c] proj[h D + d, c] + bias[h D + d]                       for q, k and v
//     ms[t, h] = mean_d a[h, d]^2                                                    for q and k
//     b[h, d] = a[h, d] gain[d]                                                      for q and k
//     out[h, d]       = b[h, d] cos[p, d] - b[h, d + D/2] sin[p, d]                  d < D/2, p = positions[t]
//     out[h, d + D/2] = b[h, d + D/2] cos[p, d] + b[h, d] sin[p, d]
//
// The gain comes before the rotation, as Qwen3 has it; the scalar 1/sqrt(ms + eps) commutes with the rotation and is
// left to qk_norm, so that this product and that norm stay two steps with float32 in between. They do where the tensor cores'
// entry points take the second step as well, on a whole head in registers: the same operations, the same bits.
//
// Entry points qkv_rope_row           T = 1: `parts` warps a rotation pair, so that the rotation is at home; a head's blocks add up
//                                     its mean square as they finish
//              qkv_rope_rows          T = 2 to 4: `parts` warps two pairs of all tokens; the weights stream once
//              qkv_rope_mma_wide, _middle, _few   more tokens, bf16 weights, D = 64 or 128, C a multiple of 8, x and weights
//                                     16-byte aligned: tensor cores, one or two whole heads of 128, 64 or 32 tokens
//              qkv_rope_wgmma_wide, _turns, _middle   the same with x bf16 on Hopper, q, k and v 16-byte aligned: tiles of 128 tokens
//                                     and 256 or 128 elements of heads (wgmma.cuh)
//              qkv_rope_tile          otherwise: a block one head of 32 tokens, so the whole head is at hand afterwards
// Arguments    q       [T, H, D]  Q_TYPE       q_ms  [T, H]  float32
//              k       [T, K, D]  K_TYPE       k_ms  [T, K]  float32
//              v       [T, K, D]  V_TYPE
//              x       [T, C]     X_TYPE, normalised
//              q_proj  [H D, C], k_proj, v_proj [K D, C]  W_TYPE, the checkpoint's layout
//              q_bias  [H D], k_bias, v_bias [K D]        float32, or null
//              q_norm, k_norm     [D]                     float32 gains, or null
//              cos, sin [P, D/2]  float32
//              positions [T]      int32; one outside 0..P-1 gives NaN, nothing is read out of bounds
//              k_rows, v_rows [T] int32, or null: k (v) of token t goes to row rows[t] of [S, K, D] instead of row t; one
//                                 outside 0..S-1 is not stored
//              T, H, K, C, P, S   int32
//              qkv_rope_wgmma_*: x and the weights are maps of these matrices (launch.tensor_map) with boxes of 128 and 64 rows
//              eps                float32, of qkv_rope_mma_* and _wgmma_*: what qk_norm does to q and k follows; negative: not
//              parts, leaves      int32, of qkv_rope_row(s): 1, 2, 4 or 8 warps a pair: cuda._parts;
//                                 the lowest power of two that is not below gridDim.x
//              places             [T (H + K) leaves] int32, of qkv_rope_row(s): zeros, and left so
// Constants    X_TYPE, Q_TYPE  bf16 | f32
//              W_TYPE, K_TYPE, V_TYPE  bf16 | f16 | f32      HEAD_DIM  D, a multiple of 4 from 4 to 256
// Work         qkv_rope_row(s): 8 warps a block; up to 0.8 KB of shared memory; grid (ceil(D parts / 16), rows: / 32, H + 2 K)
//              qkv_rope_mma_*: 128 threads (wide, x f32: 256); grid one block a tile; shared bytes: tiles.shapes
//              qkv_rope_wgmma_*: 384 threads; grid pairs of blocks, as many as there are or run at once: a block takes tile
//              after tile; shared bytes: tiles.shapes
//              qkv_rope_tile: 2 D threads, 4 x 4 products each; about 0.25 KB x D of shared memory; grid (ceil(T/32), H + 2 K)
// Precision    products, sums, bias, gain, rotation in float32; one rounding, where q, k and v are stored narrower
// Error bound  row(s): (C/32 + 18) eps32, tile: (C + 6) eps32, mma: (11/8 C + 4) eps32 (x bf16), (C/32 + 94) eps32 (x f32),
//              wgmma: (21/32 C + 4) eps32,
//              times sum_c |x w| times the gain; see matmul.cu and mma.cuh, and 4 for
//              bias, gain and rotation. Mean squares: twice the relative error of a, and 11 eps32. With eps those of qk_norm
// Traffic      (H + 2 K) D C sizeof(W_TYPE) bytes of weights for each 32 tokens (row(s): 4), 2 T (H + 2 K) D C FLOP
// Determinism  fixed order of summation. Within an entry point a row's result does not depend on the other rows; the
//              rows, the tile and tensor cores sum in different orders and so differ within the error bound. qkv_rope_row and
//              qkv_rope_rows give the same bits, and so do all of qkv_rope_mma_*, and all of qkv_rope_wgmma_*
// Limits       qkv_rope_row(s): T (H + K) leaves <= 4096, launch.workspace()
// Wrapper cuda.qkv_rope · truth reference.qkv_rope · test tests/test_ops.py · benchmark benchmarks/ops.py
#include "dot.cuh"
#include "qkv_rope_head.cuh"
#include "qkv_rope_mma.cuh"
#include "qkv_rope_wgmma.cuh"

// Where element d of this block's head goes for token t: q by token, k and v by the row that `rows` names.
#define STORE(t, d, value)                                                    \
    do {                                                                      \
        const int row = head.rows ? head.rows[t] : (t);                       \
        const size_t at = ((size_t)row * head.heads + head.index) * D + (d);  \
        if (head.rows && (row < 0 || row >= S)) break;                        \
        if (blockIdx.y < H) store(q + at, (value));                           \
        else if (blockIdx.y < H + K) store(k + at, (value));                  \
        else store(v + at, (value));                                          \
    } while (0)

// Adds up what the gridDim.x blocks of a head have, by pairs, pairs of pairs and so on: of two that meet, the first leaves
// its sum, the second takes both on. Values travel in the exchanges themselves, which saves the fences and the second
// trip that counting the blocks takes. Whether this block ends up with the whole sum. Sums are not negative: a set sign
// bit says that a place is taken.
__device__ __forceinline__ bool add_over_blocks(float& sum, unsigned* places, int leaves) {
    for (int node = leaves + blockIdx.x, height = 0; node > 1; node >>= 1, height++) {
        if (((node ^ 1) << height) - leaves >= (int)gridDim.x) continue;  // nobody there
        const unsigned other = atomicExch(places + node / 2, __float_as_uint(sum) ^ 0x80000000u);
        if (other == 0) return false;
        places[node / 2] = 0;
        sum += __uint_as_float(other ^ 0x80000000u);
    }
    return true;
}

// `parts` warps PAIRS rotation pairs, elements d and d + D/2, of up to MAX_T tokens.
template <int PAIRS, int MAX_T>
__device__ __forceinline__ void few_rows(PARAMETERS, int parts, int leaves, int* __restrict__ places) {
    __shared__ float squares[8 * PAIRS][MAX_T];
    Head head = HEAD(blockIdx.y);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, i = lane / MAX_T, t = lane % MAX_T, row = head.index * D;
    const int pair = warp / parts * PAIRS, first = blockIdx.x * (8 / parts) * PAIRS + pair, d = first + i;
    const bool wide = C % 8 == 0 && ((size_t)x | (size_t)head.proj) % 16 == 0;
    const W_TYPE* rows[2 * PAIRS];
#pragma unroll
    for (int j = 0; j < PAIRS; j++) {  // past the end the last pair once more, which nobody stores
        rows[j] = head.proj + (size_t)(row + min(first + j, D / 2 - 1)) * C;
        rows[PAIRS + j] = rows[j] + (size_t)(D / 2) * C;
    }
    // AHEAD: 14B 27.3 to 25.2 us where such launches follow each other, 92 % of the read ceiling; no change in a layer.
    WarpDots<2 * PAIRS, MAX_T, X_TYPE, W_TYPE, true> dots(x, rows, T, C, wide, warp % parts, parts);
    // what this lane needs afterwards for pair d of token t travels with the first weights
    const bool first_part = warp % parts == 0 && i < PAIRS, mine = first_part && d < D / 2 && t < T;
    float bias[2] = {0.0f, 0.0f}, gain[2] = {1.0f, 1.0f}, c = 1.0f, s = 0.0f;
    if (mine && head.bias) bias[0] = head.bias[row + d], bias[1] = head.bias[row + d + D / 2];
    if (mine && head.gain) gain[0] = head.gain[d], gain[1] = head.gain[d + D / 2];
    if (mine && head.rotated) find_angle(c, s, d, positions[t], cos, sin, P);
    dots.wait();
    float sums[2 * PAIRS][MAX_T];
    dots.finish(sums);
    head = HEAD(opaque(blockIdx.y));  // again, instead of kept meanwhile: 48 registers and not 56, five blocks an SM
    float low = add_shares(sums, parts), high = __shfl_down_sync(0xffffffffu, low, PAIRS * MAX_T);
    if (head.bias) low += bias[0], high += bias[1];
    if (head.rotated && first_part) squares[pair + i][t] = mine ? fmaf(low, low, high * high) : 0.0f;
    if (head.gain) low *= gain[0], high *= gain[1];
    if (head.rotated) rotate(low, high, c, s);
    if (mine) {
        STORE(t, d, low);
        STORE(t, d + D / 2, high);
    }
    if (!head.rotated) return;
    __syncthreads();
    if (warp >= T) return;
    // Warp t sums up token t, neighbours first: the same order however many pairs a block has.
    float sum = lane < 8 / parts * PAIRS ? squares[lane][warp] : 0.0f;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    unsigned* const places_of_head = reinterpret_cast<unsigned*>(places) + (warp * (H + K) + blockIdx.y) * leaves;
    if (lane == 0 && add_over_blocks(sum, places_of_head, leaves))
        head.ms[(size_t)warp * head.heads + head.index] = sum / D;
}

extern "C" __global__ void __launch_bounds__(256, on_tensor_cores<W_TYPE> ? 5 : 4)  // more blocks spill
qkv_rope_row(PARAMETERS, int parts, int leaves, int* __restrict__ places) {
    few_rows<1, 1>(ARGUMENTS, parts, leaves, places);
}

extern "C" __global__ void __launch_bounds__(256, 2)  // more blocks spill
qkv_rope_rows(PARAMETERS, int parts, int leaves, int* __restrict__ places) {
    few_rows<2, 4>(ARGUMENTS, parts, leaves, places);
}

extern "C" __global__ void __launch_bounds__(2 * D) qkv_rope_tile(PARAMETERS) {
    constexpr int ROWS = 32, QUARTER = D / 4;
    __shared__ float partial[ROWS][QUARTER];
    const Head head = HEAD(blockIdx.y);
    const int row0 = blockIdx.x * ROWS, tx = threadIdx.x % QUARTER, ty = threadIdx.x / QUARTER;
    float acc[4][4];  // rows ty + 8 i, elements tx + D/4 j: j and j + 2 are a rotation pair
    tile_product<ROWS, D>(x, head.proj, T, head.heads * D, C, row0, head.index * D, acc);
    if (head.bias)
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) acc[i][j] += head.bias[head.index * D + tx + QUARTER * j];
    if (head.rotated) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float squares = 0.0f;
#pragma unroll
            for (int j = 0; j < 4; j++) squares = fmaf(acc[i][j], acc[i][j], squares);
            partial[ty + 8 * i][tx] = squares;
        }
        __syncthreads();
        for (int row = threadIdx.x; row < ROWS && row0 + row < T; row += 2 * D) {
            float squares = 0.0f;
            for (int j = 0; j < QUARTER; j++) squares += partial[row][j];
            head.ms[(size_t)(row0 + row) * head.heads + head.index] = squares / D;
        }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int t = row0 + ty + 8 * i;
        if (t >= T) continue;
        if (head.rotated) {
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const int d = tx + QUARTER * j;
                if (head.gain) acc[i][j] *= head.gain[d], acc[i][j + 2] *= head.gain[d + D / 2];
                float c, s;
                find_angle(c, s, d, positions[t], cos, sin, P);
                rotate(acc[i][j], acc[i][j + 2], c, s);
            }
        }
#pragma unroll
        for (int j = 0; j < 4; j++) STORE(t, tx + QUARTER * j, acc[i][j]);
    }
}

constexpr int HALF_HEAD = D == 64 ? 32 : 64;  // other head sizes have no tensor-core kernel
typedef WideTile<X_TYPE, HALF_HEAD> Wide;
typedef MiddleTile<X_TYPE, D == 64 ? MIDDLE_COLUMNS<X_TYPE> : 128, HALF_HEAD> Middle;
typedef FewTile<X_TYPE, 2 * HALF_HEAD, HALF_HEAD / 2, 32, HALF_HEAD> Few;

extern "C" __global__ void __launch_bounds__(Wide::THREADS, 256 / Wide::THREADS) qkv_rope_mma_wide(PARAMETERS, float eps) {
    tensor_heads<Wide>(ARGUMENTS, eps);
}

extern "C" __global__ void __launch_bounds__(Middle::THREADS, 2) qkv_rope_mma_middle(PARAMETERS, float eps) {
    tensor_heads<Middle>(ARGUMENTS, eps);
}

extern "C" __global__ void __launch_bounds__(Few::THREADS) qkv_rope_mma_few(PARAMETERS, float eps) {
    tensor_heads<Few>(ARGUMENTS, eps);
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(WGMMA_THREADS, 1)
qkv_rope_wgmma_wide(PARAMETERS_OF(const __grid_constant__ TensorMap, const __grid_constant__ TensorMap), float eps) {
    wgmma_heads<WgmmaWide<64>>(ARGUMENTS, eps);
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(WGMMA_THREADS, 1)
qkv_rope_wgmma_turns(PARAMETERS_OF(const __grid_constant__ TensorMap, const __grid_constant__ TensorMap), float eps) {
    wgmma_heads<WgmmaTurns<64>>(ARGUMENTS, eps);
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(WGMMA_THREADS, 1)
qkv_rope_wgmma_middle(PARAMETERS_OF(const __grid_constant__ TensorMap, const __grid_constant__ TensorMap), float eps) {
    wgmma_heads<WgmmaMiddle<64>>(ARGUMENTS, eps);
}

#endif
