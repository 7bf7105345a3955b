// Products of many rows on tensor cores: a block computes a tile of BM x BN outputs x · w^T, with w bf16 [N, C] in the
// checkpoint's layout and x [T, C] bf16 or float32. Shared by matmul.cu, qkv_rope.cu and swiglu.cu. No kernel in here.
//
// float32 x: each value is cut into three bf16 parts, hi + mid + lo, 8 of its 24 bits each, so that every product with a
// bf16 weight is exact; the parts cost three times the products. Cutting, not rounding: hi never overflows, so the whole
// range is served, and a part is one byte permutation of two values. Parts below 2^-126 are flushed (|x| < 2^-110 only),
// and an infinity gives NaN (inf - inf).
//
// Error. NVIDIA states none; sm_80 adds the accumulator and 8 exact products at once, each cut to 1 bit below the last place
// of the largest, and cuts the sum to float32 (Fasi, Higham, Mikaitis, Pranesh, PeerJ CS 7:e330, 2021), sm_90 16 products
// and 2 bits as far as is known. With A the sum of absolute terms so far, a
// step loses at most 9 eps32 A (8.5) in the terms and 2 eps32 A at the end.
//     bf16 x:    C/8 steps: 11/8 C eps32 sum |x w|
//     float32 x: the sum starts from zero every 32 elements and is added to the total in float32, rounded to nearest.
//                Inside such a run hi takes 4 steps of 8 and mid and lo of its second half 4 more whose sum is not small:
//                (C/32 + 90) eps32 sum |x w|
// Order. Per output: ascending k in steps of 16, lo before mid before hi. Every tile shape keeps it, so that an output has
// the same bits whatever the shape, and whatever the other rows.
#pragma once
#include "common.cuh"
#include "ptx.cuh"

// Whether a product with weights of this type runs here.
template <class W> constexpr bool on_tensor_cores = false;
template <> constexpr bool on_tensor_cores<bf16> = true;

// The tile's rows r of w come from two matrices: r < BN/2 from `first`, the others from `second`, each as many as are there.
struct WeightRows {
    const bf16 *first, *second;
    int first_rows, second_rows;
};

// X          type of x: bf16 or f32
// BM, BN     the block's outputs       WM, WN  a warp's: multiples of 16
// PAIR       a warp's WN columns are two runs of WN/2, PAIR apart: with PAIR = D/2 the two halves of a head, with BN/2 gate and
//            up. A thread then holds in acc[i][j] and acc[i][j + NJ/2] columns that are PAIR apart
// BK         elements of C a stage: 32 or 64      STAGES  stages in shared memory, all but one on their way
template <class X, int BM_, int BN_, int WM, int WN, int PAIR, int BK, int STAGES>
struct MmaTile {
    static constexpr int BM = BM_, BN = BN_, WARPS_N = BN / WN, THREADS = BM / WM * WARPS_N * 32;
    static constexpr int MI = WM / 16, NJ = WN / 8, KK = BK / 16;
    static constexpr bool CUT = sizeof(X) == 4;
    static constexpr int X_PITCH = BK * sizeof(X), W_PITCH = BK * sizeof(bf16);  // bytes of a row in shared memory
    static constexpr int STAGE = BM * X_PITCH + BN * W_PITCH, SHARED = STAGES * STAGE;
    static_assert(PAIR % (WN / 2) == 0 && BN % (2 * PAIR) == 0 && KK % 2 == 0);

    // Where a 16-byte piece of a row lies: rows that are read together get different banks. ldmatrix reads one piece of 8
    // rows, the float32 fragments two neighbouring pieces of 4 rows.
    template <int PITCH, bool PAIRS> __device__ static __forceinline__ int place(int row) {
        return 16 * (PAIRS ? 2 * (row & 3) : PITCH == 64 ? row >> 1 & 3 : row & 7);
    }

    // Starts copying share `share` of KK of rows 0..ROWS-1 of a tile, elements c0..c0+BK-1; zeros stand for rows from `rows`
    // on and elements from C on.
    template <int ROWS, int PITCH, bool PAIRS, class E>
    __device__ static __forceinline__ void copy(unsigned char* shared, const E* from, int rows, int C, int c0, int share) {
        constexpr int PIECES = PITCH / 16, STEP = THREADS / PIECES;
        static_assert(THREADS % PIECES == 0 && STEP % 8 == 0 && (ROWS % STEP == 0 || STEP % ROWS == 0));
        const int row = threadIdx.x / PIECES, piece = threadIdx.x % PIECES, c = c0 + piece * (16 / (int)sizeof(E));
        unsigned char* to = shared + row * PITCH + (16 * piece ^ place<PITCH, PAIRS>(row));
        if (c >= C) rows = 0;
        if (ROWS < STEP && row >= ROWS) return;
#pragma unroll
        for (int i = 0; i < (ROWS + STEP - 1) / STEP; i++) {
            if (i % KK != share) continue;
            const bool there = row + i * STEP < rows;
            cp_async16(to + i * STEP * PITCH, from + (there ? (row + i * STEP) * C + c : 0), there ? 16 : 0);
        }
    }

    __device__ static __forceinline__ void start(unsigned char* stage, const X* x, int rows, const WeightRows& w, int C, int c0,
                                                 int share) {
        copy<BM, X_PITCH, CUT>(stage, x, rows, C, c0, share);
        stage += BM * X_PITCH;
        copy<BN / 2, W_PITCH, false>(stage, w.first, w.first_rows, C, c0, (share + KK / 2) % KK);
        copy<BN / 2, W_PITCH, false>(stage + BN / 2 * W_PITCH, w.second, w.second_rows, C, c0, share);
    }

    // The first row and column of this warp in the tile, and the column of its fragment j.
    __device__ static __forceinline__ int warp_row() { return threadIdx.x / 32 / WARPS_N * WM; }
    __device__ static __forceinline__ int warp_column() {
        constexpr int RUNS = PAIR / (WN / 2);
        const int n = threadIdx.x / 32 % WARPS_N;
        return n / RUNS * 2 * PAIR + n % RUNS * (WN / 2);
    }
    __device__ static constexpr int fragment_column(int j) { return j % (NJ / 2) * 8 + j / (NJ / 2) * PAIR; }

    struct Fragments {
        unsigned x[MI][CUT ? 8 : 4];  // bf16 pairs, or float32 values in pairs
        unsigned w[NJ / 2][4];        // b0, b1 of fragment 2 j and of 2 j + 1
    };

    __device__ static __forceinline__ void load(Fragments& f, const unsigned char* stage, int kk) {
        const int lane = threadIdx.x % 32;
        if constexpr (CUT) {
            const int row = warp_row() + lane / 4, i = lane % 4;
            const unsigned char* at = stage + row * X_PITCH + i % 2 * 8;
#pragma unroll
            for (int m = 0; m < MI; m++)
#pragma unroll
                for (int e = 0; e < 4; e++) {  // rows + 0, + 8, + 0, + 8; k + 0, + 0, + 8, + 8
                    const int piece = 64 * kk + 32 * (e / 2) + 16 * (i / 2);
                    const unsigned char* const from = at + (16 * m + e % 2 * 8) * X_PITCH + (piece ^ place<X_PITCH, true>(row));
                    const uint2 pair = *reinterpret_cast<const uint2*>(from);
                    f.x[m][2 * e] = pair.x, f.x[m][2 * e + 1] = pair.y;
                }
        } else {
            const int row = warp_row() + lane % 16;
            const unsigned char* at = stage + row * X_PITCH + ((32 * kk + lane / 16 * 16) ^ place<X_PITCH, false>(row));
#pragma unroll
            for (int m = 0; m < MI; m++) ldmatrix_x4(f.x[m], at + 16 * m * X_PITCH);
        }
        const int row = warp_column() + lane / 16 * fragment_column(1) + lane % 8;
        const unsigned char* at = stage + BM * X_PITCH + row * W_PITCH + ((32 * kk + lane / 8 % 2 * 16) ^ place<W_PITCH, false>(row));
#pragma unroll
        for (int j = 0; j < NJ / 2; j++) ldmatrix_x4(f.w[j], at + fragment_column(2 * j) * W_PITCH);
    }

    __device__ static __forceinline__ void multiply(float (&sum)[MI][NJ][4], const Fragments& f) {
#pragma unroll
        for (int m = 0; m < MI; m++) {
            if constexpr (CUT) {
                unsigned parts[3][4];
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    unsigned pairs[3];
                    cut(__uint_as_float(f.x[m][2 * e]), __uint_as_float(f.x[m][2 * e + 1]), pairs);
                    parts[0][e] = pairs[0], parts[1][e] = pairs[1], parts[2][e] = pairs[2];
                }
#pragma unroll
                for (int part = 0; part < 3; part++)
#pragma unroll
                    for (int j = 0; j < NJ; j++) mma_bf16(sum[m][j], parts[part], f.w[j / 2][j % 2 * 2], f.w[j / 2][j % 2 * 2 + 1]);
            } else {
#pragma unroll
                for (int j = 0; j < NJ; j++) mma_bf16(sum[m][j], f.x[m], f.w[j / 2][j % 2 * 2], f.w[j / 2][j % 2 * 2 + 1]);
            }
        }
    }

    __device__ static __forceinline__ void clear(float (&sum)[MI][NJ][4]) {
#pragma unroll
        for (int m = 0; m < MI; m++)
#pragma unroll
            for (int j = 0; j < NJ; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) sum[m][j][e] = 0.0f;
    }

    // Lays the tile into shared memory as float [BM][ROW], for what follows a product: coalesced reads and stores, and a row's
    // neighbours at hand. 8 more floats a row spread the banks.
    static constexpr int ROW = BN + 8;
    __device__ static __forceinline__ const float* spread(const float (&acc)[MI][NJ][4], unsigned char* shared) {
        static_assert(BM * ROW * 4 <= SHARED);
        const int lane = threadIdx.x % 32, row = warp_row() + lane / 4, column = warp_column() + lane % 4 * 2;
        float* const to = reinterpret_cast<float*>(shared) + row * ROW + column;
        __syncthreads();  // the last stage has been read
#pragma unroll
        for (int i = 0; i < 2 * MI; i++)
#pragma unroll
            for (int j = 0; j < NJ; j++)
                *reinterpret_cast<float2*>(to + 8 * i * ROW + fragment_column(j)) =
                    make_float2(acc[i / 2][j][i % 2 * 2], acc[i / 2][j][i % 2 * 2 + 1]);
        __syncthreads();
        return reinterpret_cast<const float*>(shared);
    }

    // acc = the block's tile: `x` points to its first row and `rows` of them are there (no more than BM count), `w` likewise.
    // With g = lane / 4, i = lane % 4: acc[m][j][e] is row warp_row() + 16 m + g + 8 (e / 2), column warp_column() +
    // fragment_column(j) + 2 i + e % 2. x and w: 16-byte aligned, C a multiple of 8. `shared`: SHARED bytes.
    __device__ static __forceinline__ void product(float (&acc)[MI][NJ][4], unsigned char* shared, const X* x, int rows,
                                                   const WeightRows& w, int C) {
        const int steps = (C + BK - 1) / BK;
#pragma unroll 1
        for (int s = 0; s < STAGES - 1; s++) {
#pragma unroll
            for (int share = 0; share < KK; share++)
                start(shared + s * STAGE, x, rows, w, C, s * BK, share);
            cp_async_commit();
        }
        clear(acc);
        float run[CUT ? MI : 1][CUT ? NJ : 1][4];
        Fragments f[2];
        cp_async_wait<STAGES - 2>();
        __syncthreads();
        load(f[0], shared, 0);
        int reading = 0, writing = STAGES - 1;
        for (int step = 0; step < steps; step++) {
#pragma unroll
            for (int kk = 0; kk < KK; kk++) {
                // In shares, so that fragments need not queue behind copies; behind the end, zeros that nobody reads
                start(shared + writing * STAGE, x, rows, w, C, (step + STAGES - 1) * BK, kk);
                if (kk == KK - 1) {  // the next stage is there, and everybody has read the last fragment of this one
                    cp_async_commit();
                    cp_async_wait<STAGES - 2>();
                    __syncthreads();
                    reading = reading + 1 == STAGES ? 0 : reading + 1;
                    writing = writing + 1 == STAGES ? 0 : writing + 1;
                }
                load(f[(kk + 1) % 2], shared + reading * STAGE, (kk + 1) % KK);  // behind the last stage: stale, not used
                if constexpr (CUT) {
                    if (kk % 2 == 0) clear(run);
                    multiply(run, f[kk % 2]);
                    if (kk % 2 == 1)
#pragma unroll
                        for (int m = 0; m < MI; m++)
#pragma unroll
                            for (int j = 0; j < NJ; j++)
#pragma unroll
                                for (int e = 0; e < 4; e++) acc[m][j][e] += run[m][j][e];
                } else {
                    multiply(acc, f[kk % 2]);
                }
            }
        }
        cp_async_wait<0>();  // the caller may use the memory, after a barrier
    }
};

// The first row and column of this block's tile among those of T x N outputs, in a grid of one dimension. Eight tiles in a
// column follow each other, then the next columns: blocks that run together share rows of x and of w in L2.
template <class Tile> __device__ __forceinline__ void find_tile(int T, int N, int& row0, int& col0) {
    constexpr int GROUP = 8;
    const int down = (T + Tile::BM - 1) / Tile::BM, across = (N + Tile::BN - 1) / Tile::BN;
    const int first = blockIdx.x / (GROUP * across) * GROUP, at = blockIdx.x % (GROUP * across), height = min(GROUP, down - first);
    row0 = (first + at % height) * Tile::BM, col0 = at / height * Tile::BN;
}

// n neighbouring elements, each rounded once; `aligned` says that they may be stored as one word.
template <int N, class E> __device__ __forceinline__ void store_run(E* p, const float (&v)[N], bool aligned) {
    static_assert(N == 1 || N == 2 || N == 4);
    if constexpr (N > 1) {
        if (aligned) {
            union { E element[N]; uint4 words4; uint2 words2; unsigned word; } run;
#pragma unroll
            for (int e = 0; e < N; e++) store(run.element + e, v[e]);
            if constexpr (sizeof(run.element) == 16) *reinterpret_cast<uint4*>(p) = run.words4;
            else if constexpr (sizeof(run.element) == 8) *reinterpret_cast<uint2*>(p) = run.words2;
            else *reinterpret_cast<unsigned*>(p) = run.word;
            return;
        }
    }
#pragma unroll
    for (int e = 0; e < N; e++) store(p + e, v[e]);
}

// The shapes in use; all fit into the 99 KB of shared memory that every GPU from sm_80 on has.
// Wide: most work for what it fetches; float32 x takes two accumulators a product and so twice the warps. Two blocks an SM for
// bf16 x: one multiplies while the other begins, waits or ends, worth more than tiles of 128 x 256 alone on an SM (LOG.md).
// Middle: where wide tiles would be too few to fill the GPU.
// Few: for so few rows that fetching the weights is all; many blocks, many stages.
template <class X, int PAIR>
using WideTile = MmaTile<X, 128, 128, sizeof(X) == 4 ? 32 : 64, 64, PAIR, sizeof(X) == 4 ? 32 : 64, 3>;
template <class X> constexpr int MIDDLE_COLUMNS = sizeof(X) == 4 ? 128 : 64;
template <class X, int BN, int PAIR>
using MiddleTile = MmaTile<X, 64, BN, 32, BN / 2, PAIR, sizeof(X) == 4 ? 32 : 64, sizeof(X) == 4 ? 3 : BN == 64 ? 6 : 4>;
template <class X, int BN, int WM, int WN, int PAIR> using FewTile = MmaTile<X, 32, BN, WM, WN, PAIR, 64, BN == 32 ? 6 : 4>;
