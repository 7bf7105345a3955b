// qkv_rope: projection, bias, gain and rotation of q and k, projection and bias of v, on an already normalised input
//
//     a[h, d] = sum_c x[t, c] proj[h D + d, c] + bias[h D + d]                       for q, k and v
//     ms[t, h] = mean_d a[h, d]^2                                                    for q and k
//     b[h, d] = a[h, d] gain[d]                                                      for q and k
//     out[h, d]       = b[h, d] cos[p, d] - b[h, d + D/2] sin[p, d]                  d < D/2, p = positions[t]
//     out[h, d + D/2] = b[h, d + D/2] cos[p, d] + b[h, d] sin[p, d]
//
// The gain comes before the rotation, as Qwen3 has it; the scalar 1/sqrt(ms + eps) commutes with the rotation and is
// left to qk_norm, so that this product and that norm stay two steps with float32 in between.
//
// Entry points qkv_rope_row           T = 1: `parts` warps a rotation pair, so that the rotation is at home; a head's blocks add up
//                                     its mean square as they finish
//              qkv_rope_rows          T = 2 to 4: `parts` warps two pairs of all tokens; the weights stream once
//              qkv_rope_mma_wide, _middle, _few   more tokens, bf16 weights, D = 64 or 128, C a multiple of 8, x and weights
//                                     16-byte aligned: tensor cores, one or two whole heads of 128, 64 or 32 tokens
//              qkv_rope_wgmma_wide, _turns, _middle   the same with x bf16 on Hopper, q, k and v 16-byte aligned: tiles of 128 tokens
//                                     and 256 or 128 elements of heads (wgmma.cuh)
//              qkv_rope_tile          otherwise: a block one head of 32 tokens, so the whole head is at hand afterwards
// Arguments    q       [T, H, D]  float32      q_ms  [T, H]  float32
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
//              parts, leaves      int32, of qkv_rope_row(s): 1, 2, 4 or 8 warps a pair: cuda._parts;
//                                 the lowest power of two that is not below gridDim.x
//              places             [T (H + K) leaves] int32, of qkv_rope_row(s): zeros, and left so
// Constants    X_TYPE  bf16 | f32
//              W_TYPE, K_TYPE, V_TYPE  bf16 | f16 | f32      HEAD_DIM  D, a multiple of 4 from 4 to 256
// Work         qkv_rope_row(s): 8 warps a block; up to 0.8 KB of shared memory; grid (ceil(D parts / 16), rows: / 32, H + 2 K)
//              qkv_rope_mma_*: 128 threads (wide, x f32: 256); grid one block a tile; shared bytes: cuda._tiles
//              qkv_rope_wgmma_*: 384 threads; grid pairs of blocks, as many as there are or run at once: a block takes tile
//              after tile; shared bytes: cuda._tiles
//              qkv_rope_tile: 2 D threads, 4 x 4 products each; about 0.25 KB x D of shared memory; grid (ceil(T/32), H + 2 K)
// Precision    products, sums, bias, gain, rotation in float32; one rounding, where k and v are stored narrower
// Error bound  row(s): (C/32 + 18) eps32, tile: (C + 6) eps32, mma: (11/8 C + 4) eps32 (x bf16), (C/32 + 94) eps32 (x f32),
//              wgmma: (21/32 C + 4) eps32,
//              times sum_c |x w| times the gain; see matmul.cu and mma.cuh, and 4 for
//              bias, gain and rotation. Mean squares: twice the relative error of a, and 11 eps32
// Traffic      (H + 2 K) D C sizeof(W_TYPE) bytes of weights for each 32 tokens (row(s): 4), 2 T (H + 2 K) D C FLOP
// Determinism  fixed order of summation. Within an entry point a row's result does not depend on the other rows; the
//              rows, the tile and tensor cores sum in different orders and so differ within the error bound. qkv_rope_row and
//              qkv_rope_rows give the same bits, and so do all of qkv_rope_mma_*, and all of qkv_rope_wgmma_*
// Limits       qkv_rope_row(s): T (H + K) leaves <= 4096, launch.workspace()
// Wrapper cuda.qkv_rope · truth reference.qkv_rope · test tests/test_ops.py · benchmark benchmarks/ops.py
#include "dot.cuh"
#include "mma.cuh"
#include "wgmma.cuh"

constexpr int D = HEAD_DIM;

// One kind of head: the blocks (·, 0..H-1) make q, the next K make k, the last K make v.
struct Head {
    const W_TYPE* proj;
    const float *bias, *gain;
    const int* rows;
    float* ms;
    int heads, index;
    bool rotated;
};

__device__ __forceinline__ Head find_head(const W_TYPE* q_proj, const W_TYPE* k_proj, const W_TYPE* v_proj,
                                          const float* q_bias, const float* k_bias, const float* v_bias,
                                          const float* q_norm, const float* k_norm, const int* k_rows, const int* v_rows,
                                          float* q_ms, float* k_ms, int H, int K, int h) {
    if (h < H) return {q_proj, q_bias, q_norm, nullptr, q_ms, H, h, true};
    if (h < H + K) return {k_proj, k_bias, k_norm, k_rows, k_ms, K, h - H, true};
    return {v_proj, v_bias, nullptr, v_rows, nullptr, K, h - H - K, false};
}

// Cosine and sine of element d's angle; NaN for a position that the table does not have.
__device__ __forceinline__ void find_angle(float& c, float& s, int d, int position, const float* __restrict__ cos,
                                           const float* __restrict__ sin, int P) {
    const bool known = position >= 0 && position < P;
    c = known ? cos[(size_t)position * (D / 2) + d] : NOT_A_NUMBER;
    s = known ? sin[(size_t)position * (D / 2) + d] : NOT_A_NUMBER;
}

__device__ __forceinline__ void rotate(float& low, float& high, float c, float s) {
    const float a = low, b = high;
    low = fmaf(a, c, -(b * s));  // written out, so that every entry point rounds alike
    high = fmaf(b, c, a * s);
}

#define PARAMETERS_OF(X, W)                                                                                         \
    float *__restrict__ q, K_TYPE *__restrict__ k, V_TYPE *__restrict__ v, float *__restrict__ q_ms,                    \
        float *__restrict__ k_ms, X x, W q_proj, W k_proj, W v_proj, const float *__restrict__ q_bias,                  \
        const float *__restrict__ k_bias, const float *__restrict__ v_bias, const float *__restrict__ q_norm,           \
        const float *__restrict__ k_norm, const float *__restrict__ cos, const float *__restrict__ sin,                 \
        const int *__restrict__ positions, const int *__restrict__ k_rows, const int *__restrict__ v_rows, int T, int H, \
        int K, int C, int P, int S
#define PARAMETERS PARAMETERS_OF(const X_TYPE *__restrict__, const W_TYPE *__restrict__)
#define ARGUMENTS                                                                                                     \
    q, k, v, q_ms, k_ms, x, q_proj, k_proj, v_proj, q_bias, k_bias, v_bias, q_norm, k_norm, cos, sin, positions, k_rows, \
        v_rows, T, H, K, C, P, S

#define HEAD(h) find_head(q_proj, k_proj, v_proj, q_bias, k_bias, v_bias, q_norm, k_norm, k_rows, v_rows, q_ms, k_ms, H, K, h)

// Where element d of this block's head goes for token t: q by token, k and v by the row that `rows` names.
#define STORE(t, d, value)                                                    \
    do {                                                                      \
        const int row = head.rows ? head.rows[t] : (t);                       \
        const size_t at = ((size_t)row * head.heads + head.index) * D + (d);  \
        if (head.rows && (row < 0 || row >= S)) break;                        \
        if (blockIdx.y < H) q[at] = (value);                                  \
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
    WarpDots<2 * PAIRS, MAX_T, X_TYPE, W_TYPE> dots(x, rows, T, C, wide, warp % parts, parts);
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

extern "C" __global__ void __launch_bounds__(256)
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

// A tile of whole heads, one or two; a thread holds rotation pairs (see MmaTile).
template <class Tile> __device__ __forceinline__ void tensor_heads(PARAMETERS) {
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
        constexpr int WARPS = Tile::THREADS / 32, STEP = WARPS / HEADS, ROWS = Tile::BM / STEP, COUNT = ROWS < 8 ? ROWS : 8;
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
#pragma unroll
                    for (int e = 0; e < PER; e++) {
                        low[e] *= gain[0][e], high[e] *= gain[1][e];
                        rotate(low[e], high[e], c[i][e], s[i][e]);
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

constexpr int HALF_HEAD = D == 64 ? 32 : 64;  // other head sizes have no tensor-core kernel
typedef WideTile<X_TYPE, HALF_HEAD> Wide;
typedef MiddleTile<X_TYPE, D == 64 ? MIDDLE_COLUMNS<X_TYPE> : 128, HALF_HEAD> Middle;
typedef FewTile<X_TYPE, 2 * HALF_HEAD, HALF_HEAD / 2, 32, HALF_HEAD> Few;

extern "C" __global__ void __launch_bounds__(Wide::THREADS, 256 / Wide::THREADS) qkv_rope_mma_wide(PARAMETERS) { tensor_heads<Wide>(ARGUMENTS); }

extern "C" __global__ void __launch_bounds__(Middle::THREADS, 2) qkv_rope_mma_middle(PARAMETERS) { tensor_heads<Middle>(ARGUMENTS); }

extern "C" __global__ void __launch_bounds__(Few::THREADS) qkv_rope_mma_few(PARAMETERS) { tensor_heads<Few>(ARGUMENTS); }

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// A tile of whole heads; a thread holds rotation pairs, four lanes the heads of a row.
template <class Tile> __device__ __forceinline__ void wgmma_heads(PARAMETERS_OF(const TensorMap&, const TensorMap&)) {
    if constexpr (on_tensor_cores<X_TYPE> && on_tensor_cores<W_TYPE> && (D == 64 || D == 128)) {
        DYNAMIC_SHARED(unsigned char, shared);
        constexpr int BLOCKS = D / 8, HALF = BLOCKS / 2;  // of 8 columns: of a head, of half a head
        const int all = H + 2 * K;
        const auto box = [&](int i, int column) {
            const int row = column + i * Tile::BOX;
            if (row < H * D) return WgmmaBox{&q_proj, row};
            if (row < (H + K) * D) return WgmmaBox{&k_proj, row - H * D};
            return WgmmaBox{&v_proj, row - (H + K) * D};  // behind the last head zeros that nobody stores
        };
        const auto nothing = [](int, int) {};
        Tile::product(shared, x, T, all * D, C, box, nothing, [&](float (&acc)[Tile::NJ][4], int row0, int column, float* memory) {
            const int lane = threadIdx.x % 32, row = row0 + lane / 8;
            int position[4];
#pragma unroll
            for (int i = 0; i < 4; i++) position[i] = row + 4 * i < T ? positions[row + 4 * i] : -1;
#pragma unroll
            for (int n = 0; n < Tile::BN / D; n++) {
                const int h = column / D + n;
                if (h >= all) break;
                const Head head = find_head(nullptr, nullptr, nullptr, q_bias, k_bias, v_bias, q_norm, k_norm, k_rows, v_rows, q_ms,
                                            k_ms, H, K, h);
                if (head.bias)
#pragma unroll
                    for (int j = 0; j < BLOCKS; j++)
#pragma unroll
                        for (int e = 0; e < 4; e++)
                            acc[n * BLOCKS + j][e] += head.bias[head.index * D + 8 * j + lane % 4 * 2 + e % 2];
                if (head.rotated)
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        const int t = row0 + lane / 4 + 8 * half;
                        float squares = 0.0f;
#pragma unroll
                        for (int j = 0; j < BLOCKS; j++)
#pragma unroll
                            for (int e = 0; e < 2; e++) {
                                const float a = acc[n * BLOCKS + j][2 * half + e];
                                squares = fmaf(a, a, squares);
                            }
                        squares += __shfl_xor_sync(0xffffffffu, squares, 1);
                        squares += __shfl_xor_sync(0xffffffffu, squares, 2);
                        if (lane % 4 == 0 && t < T) head.ms[(size_t)t * head.heads + head.index] = squares / D;
                    }
                int target[4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int t = row + 4 * i;
                    target[i] = t >= T ? -1 : head.rows ? head.rows[t] : t;
                    if (head.rows && target[i] >= S) target[i] = -1;
                }
#pragma unroll
                for (int first = 0; first < HALF; first += 4) {
                    float4 lows[4], highs[4];
                    trade_rows(lows, *reinterpret_cast<const float(*)[4][4]>(acc + n * BLOCKS + first), memory);
                    trade_rows(highs, *reinterpret_cast<const float(*)[4][4]>(acc + n * BLOCKS + HALF + first), memory);
                    const int d = opaque(8 * first + lane % 8 * 4);  // so that nothing is read so early that it spills
                    float4 c4[4], s4[4];  // before any store, after which they might have to wait
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        c4[i] = s4[i] = {NOT_A_NUMBER, NOT_A_NUMBER, NOT_A_NUMBER, NOT_A_NUMBER};
                        if (!head.rotated || position[i] < 0 || position[i] >= P) continue;
                        c4[i] = *reinterpret_cast<const float4*>(cos + (size_t)position[i] * (D / 2) + d);
                        s4[i] = *reinterpret_cast<const float4*>(sin + (size_t)position[i] * (D / 2) + d);
                    }
                    float4 gain[2] = {{1.0f, 1.0f, 1.0f, 1.0f}, {1.0f, 1.0f, 1.0f, 1.0f}};
                    if (head.gain)
#pragma unroll
                        for (int half = 0; half < 2; half++)
                            gain[half] = {head.gain[d + half * (D / 2)], head.gain[d + half * (D / 2) + 1],
                                          head.gain[d + half * (D / 2) + 2], head.gain[d + half * (D / 2) + 3]};
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        float low[4] = {lows[i].x, lows[i].y, lows[i].z, lows[i].w};
                        float high[4] = {highs[i].x, highs[i].y, highs[i].z, highs[i].w};
                        if (head.rotated) {
                            const float g[8] = {gain[0].x, gain[0].y, gain[0].z, gain[0].w,
                                                gain[1].x, gain[1].y, gain[1].z, gain[1].w};
                            const float c[4] = {c4[i].x, c4[i].y, c4[i].z, c4[i].w}, s[4] = {s4[i].x, s4[i].y, s4[i].z, s4[i].w};
#pragma unroll
                            for (int e = 0; e < 4; e++) {
                                low[e] *= g[e], high[e] *= g[e + 4];
                                rotate(low[e], high[e], c[e], s[e]);
                            }
                        }
                        if (target[i] < 0) continue;
                        const size_t at = ((size_t)target[i] * head.heads + head.index) * D + d;
                        if (h < H) store_run(q + at, low, true), store_run(q + at + D / 2, high, true);
                        else if (h < H + K) store_run(k + at, low, true), store_run(k + at + D / 2, high, true);
                        else store_run(v + at, low, true), store_run(v + at + D / 2, high, true);
                    }
                }
            }
        });
    }
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(WGMMA_THREADS, 1)
qkv_rope_wgmma_wide(PARAMETERS_OF(const __grid_constant__ TensorMap, const __grid_constant__ TensorMap)) {
    wgmma_heads<WgmmaWide<64>>(ARGUMENTS);
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(WGMMA_THREADS, 1)
qkv_rope_wgmma_turns(PARAMETERS_OF(const __grid_constant__ TensorMap, const __grid_constant__ TensorMap)) {
    wgmma_heads<WgmmaTurns<64>>(ARGUMENTS);
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(WGMMA_THREADS, 1)
qkv_rope_wgmma_middle(PARAMETERS_OF(const __grid_constant__ TensorMap, const __grid_constant__ TensorMap)) {
    wgmma_heads<WgmmaMiddle<64>>(ARGUMENTS);
}

#endif
