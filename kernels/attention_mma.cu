// attention of a prompt on tensor cores: attention.cu's formula for more than a few queries
//
//     s[j] = (q[t, h] . keys[j, h K/H]) / sqrt(D)   for j = 0..positions[t]
//     out[t, h] = sum_j softmax(s)[j] values[j, h K/H]
//
// Entry point  attention_mma          keys and values bf16, or float32 with float32 q, D 64 or 128, all 16-byte aligned; not
//                                     bf16 q on Hopper, which have attention_wgmma
// Arguments    out        [T, H, D]  OUT_TYPE, 16-byte aligned; may be q
//              q          [T, H, D]  Q_TYPE, 16-byte aligned
//              keys       [S, K, D]  KV_TYPE, 16-byte aligned
//              values     [S, K, D]  KV_TYPE, 16-byte aligned
//              positions  [T]        int32, in any order; query t sees rows 0..positions[t]; one outside 0..S-1 gives NaN
//              T, H, K, S            int32, H a multiple of K
//              scale                 float32, log2(e) / sqrt(D): weights are powers of two
// Constants    Q_TYPE, OUT_TYPE      bf16 | f32       HEAD_DIM  D, 64 or 128
//              KV_TYPE               bf16, or f32 with Q_TYPE f32
//              ROWS                  queries of a block: 64 or 128 (bf16 q), 64 (float32 q)
// Work         block = ROWS queries of one head, 128 threads, a quarter of the queries a warp; grid (H, T / ROWS), the last
//              queries, which see most, first. Tiles of 64 (float32 q: 32) keys and values stand in two stages of shared memory,
//              one used, one on its way; 2 D (PARTS ROWS + 4 KEYS) + 16 bytes. float32 keys and values stand there in one stage, in
//              three parts: 6 KEYS instead of 4; what they take to come is for the other block on the SM
// Precision    bf16 q: products exact, weights rounded to bf16 once; sums, maxima and output float32 until it is stored.
//              float32 q: q and the weights are cut into three bf16 parts of 8 of their 24 bits, so that all products are
//              exact; a tile's sum of weighted values starts from zero and is added to the total in float32.
//              float32 keys and values are cut likewise. Of the nine products of parts the three smallest are left out, no more
//              than 2^-21 of a term
// Error bound  with E = 2^-24, s = sum |q k| / sqrt(D) of the worst key, V = sum of weight |v|, and what mma.cuh states of
//              the tensor cores' sums (11/8 E a term):
//              bf16 q: (2^-8 + (3/2 S + 2 (11/8 D + 4) s + 64) E) V; float32 q: (S/32 + 176 + 2 (11/8 D + 16) s) E V;
//              float32 keys and values: (S/32 + 256 + 2 (13/8 D + 25) s) E V: 8 E for what is left out, and twice as many sums
// Traffic      2 S K D sizeof(KV_TYPE) bytes for each ROWS queries of a head through L2, 4 S H D FLOP a query, three times as many for
//              float32 q, six times for float32 keys and values
// Determinism  a query's keys are taken in tiles that begin at multiples of KEYS, in ascending order, and masked keys change
//              nothing: its result depends on its own row and the cache alone, not on the other queries or how many there are
// Limits       an infinity or NaN in a row of values reaches all queries of a block that has one who sees that row
// Wrapper cuda.attention · truth reference.attention · test tests/test_attention_mma.py · benchmark benchmarks/ops.py
#include "common.cuh"
#include "ptx.cuh"
#include "softmax.cuh"

constexpr int D = HEAD_DIM;
constexpr bool CUT = sizeof(Q_TYPE) == 4;
constexpr int PARTS = CUT ? 3 : 1, KV_PARTS = sizeof(KV_TYPE) == 4 ? 3 : 1;
constexpr int THREADS = 128, MI = ROWS / 64, KEYS = CUT ? 32 : 64, STAGES = KV_PARTS == 1 ? 2 : 1;
constexpr int PITCH = 2 * D, Q_PART = ROWS * PITCH, KV_PART = KEYS * PITCH, TILE = KV_PARTS * KV_PART, STAGE = 2 * TILE;  // bytes
static_assert(KV_PARTS <= PARTS);

// Where a 16-byte piece of a row lies: the eight rows that ldmatrix reads together get different banks.
__device__ __forceinline__ int place(int row, int piece) { return row * PITCH + 16 * (piece ^ (row & 7)); }

// Starts copying rows 0..COUNT-1 of a tile, `pitch` elements apart; zeros stand for rows from `rows` on.
template <int COUNT>
__device__ __forceinline__ void copy(unsigned char* shared, const bf16* from, size_t pitch, int rows) {
    constexpr int PIECES = D / 8, STEP = THREADS / PIECES;
    const int row = threadIdx.x / PIECES, piece = threadIdx.x % PIECES;
    from += row * pitch + 8 * piece;
    shared += place(row, piece);
#pragma unroll
    for (int i = 0; i < COUNT; i += STEP) {
        const bool there = row + i < rows;
        cp_async16(shared + i * PITCH, there ? from + i * pitch : from, there ? 16 : 0);
    }
}

// The same for float32 rows, cut into three parts, one behind the other; all is there when this returns.
template <int COUNT>
__device__ __forceinline__ void copy(unsigned char* shared, const float* from, size_t pitch, int rows) {
    constexpr int PIECES = D / 8, STEP = THREADS / PIECES;
    const int piece = threadIdx.x % PIECES;
    if (rows <= 0) return;  // an empty cache: nothing that is read counts
#pragma unroll  // all loads are on their way together, as no branch parts them
    for (int i = 0; i < COUNT; i += STEP) {
        const int row = threadIdx.x / PIECES + i;
        const bool there = row < rows;
        float v[8];
        load8(from + (there ? row : 0) * pitch + 8 * piece, v);
#pragma unroll
        for (int e = 0; e < 8; e++) v[e] = there ? v[e] : 0.0f;
        unsigned parts[4][3];
#pragma unroll
        for (int e = 0; e < 4; e++) cut(v[2 * e], v[2 * e + 1], parts[e]);
#pragma unroll
        for (int part = 0; part < 3; part++)
            *reinterpret_cast<uint4*>(shared + part * COUNT * PITCH + place(row, piece)) =
                make_uint4(parts[0][part], parts[1][part], parts[2][part], parts[3][part]);
    }
}

// Whether the product of these parts of two factors is large enough to be computed; the highest part is the last.
__device__ constexpr bool counts(int part, int kv_part) { return KV_PARTS == 1 || part + kv_part >= 2; }

// scores[m][j] = the warp's rows 16 m.. times keys 8 j..
__device__ __forceinline__ void multiply_keys(float (&scores)[MI][KEYS / 8][4], const unsigned char* queries,
                                              const unsigned char* keys) {
    const int lane = threadIdx.x % 32, row = place(lane % 16, lane / 16), key = place(lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
    for (int m = 0; m < MI; m++)
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) scores[m][j][e] = 0.0f;
#pragma unroll KV_PARTS == 1 ? PARTS : 1  // more of the longer one spill
    for (int parts = 0; parts < PARTS * KV_PARTS; parts++) {  // the lowest parts first: small sums lose little
        const int part = parts / KV_PARTS, key_part = parts % KV_PARTS;
        if (!counts(part, key_part)) continue;
#pragma unroll
        for (int k = 0; k < D / 16; k++) {
            unsigned a[MI][4], b[4];
#pragma unroll
            for (int m = 0; m < MI; m++) ldmatrix_x4(a[m], queries + part * Q_PART + 16 * m * PITCH + (row ^ 32 * k));
#pragma unroll
            for (int j = 0; j < KEYS / 8; j += 2) {
                ldmatrix_x4(b, keys + key_part * KV_PART + 8 * j * PITCH + (key ^ 32 * k));
#pragma unroll
                for (int m = 0; m < MI; m++) {
                    mma_bf16(scores[m][j], a[m], b[0], b[1]);
                    mma_bf16(scores[m][j + 1], a[m], b[2], b[3]);
                }
            }
        }
    }
}

// sum[m] += the warp's weights of rows 16 m.. times the tile's values
__device__ __forceinline__ void multiply_values(float (&sum)[MI][D / 8][4], const float (&weights)[MI][KEYS / 8][4],
                                                const unsigned char* values) {
    const int lane = threadIdx.x % 32, row = place(lane % 16, lane / 16);
#pragma unroll
    for (int k = 0; k < KEYS / 16; k++) {
        unsigned a[MI][PARTS][4], b[4];
#pragma unroll
        for (int m = 0; m < MI; m++)
#pragma unroll
            for (int e = 0; e < 4; e++) {  // rows + 0, + 8, + 0, + 8; keys + 0, + 0, + 8, + 8
                const float w0 = weights[m][2 * k + e / 2][e % 2 * 2], w1 = weights[m][2 * k + e / 2][e % 2 * 2 + 1];
                if constexpr (CUT) {
                    unsigned parts[3];
                    cut(w0, w1, parts);
#pragma unroll
                    for (int part = 0; part < 3; part++) a[m][part][e] = parts[part];
                } else {
                    a[m][0][e] = pair(w0, w1);
                }
            }
#pragma unroll
        for (int j = 0; j < D / 8; j += 2)
#pragma unroll
            for (int value_part = 0; value_part < KV_PARTS; value_part++) {
                ldmatrix_x4_trans(b, values + value_part * KV_PART + 16 * k * PITCH + (row ^ 16 * j));
#pragma unroll
                for (int part = 0; part < PARTS; part++) {
                    if (!counts(part, value_part)) continue;
#pragma unroll
                    for (int m = 0; m < MI; m++) {
                        mma_bf16(sum[m][j], a[m][part], b[0], b[1]);
                        mma_bf16(sum[m][j + 1], a[m][part], b[2], b[3]);
                    }
                }
            }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
attention_mma(OUT_TYPE* out, const Q_TYPE* q, const KV_TYPE* __restrict__ keys, const KV_TYPE* __restrict__ values,
              const int* __restrict__ positions, int T, int H, int K, int S, float scale) {
    DYNAMIC_SHARED(unsigned char, shared);
    int* const last_of_warp = reinterpret_cast<int*>(shared + PARTS * Q_PART + STAGES * STAGE);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, head = blockIdx.x;
    const int row0 = (gridDim.y - 1 - blockIdx.y) * ROWS, warp_row = 16 * MI * warp;
    const size_t q_pitch = (size_t)H * D, pitch = (size_t)K * D;

    const Queries queries = {positions, row0, T, S};
    const int last = queries.seen(warp_row + lane % (16 * MI));
    const int warp_first = __reduce_min_sync(0xffffffffu, last), warp_last = __reduce_max_sync(0xffffffffu, last);
    if (lane == 0) last_of_warp[warp] = warp_last;
    __syncthreads();
    const int block_last = max(max(last_of_warp[0], last_of_warp[1]), max(last_of_warp[2], last_of_warp[3]));
    const int there = min(block_last + 1, S);

    keys += (size_t)(head / (H / K)) * D;
    values += (size_t)(head / (H / K)) * D;
    const auto start = [&](int tile) {
        unsigned char* const stage = shared + PARTS * Q_PART + tile % STAGES * STAGE;
        const size_t first = (size_t)tile * KEYS * pitch;
        copy<KEYS>(stage, keys + first, pitch, there - tile * KEYS);
        copy<KEYS>(stage + TILE, values + first, pitch, there - tile * KEYS);
        cp_async_commit();
    };
    copy<ROWS>(shared, q + row0 * q_pitch + head * D, q_pitch, T - row0);
    if (STAGES == 2) start(0);

    float sum[MI][D / 8][4] = {};
    Softmax softmax[MI];
    const int tiles = block_last / KEYS + 1;
    for (int tile = 0; tile < tiles; tile++) {
        cp_async_wait<0>();
        __syncthreads();  // the tile is there, and everybody has read the one before
        if (STAGES == 2) {
            if (tile + 1 < tiles) start(tile + 1);
        } else {
            start(tile);
            __syncthreads();
        }
        const int first = tile * KEYS;
        if (first > warp_last) continue;
        const unsigned char* const stage = shared + PARTS * Q_PART + tile % STAGES * STAGE;
        float scores[MI][KEYS / 8][4];
        multiply_keys(scores, shared + warp_row * PITCH, stage);

        bool grown = false;
#pragma unroll
        for (int m = 0; m < MI; m++) {
            if (first + KEYS - 1 > warp_first) hide(scores[m], queries, warp_row + 16 * m, first);
            grown |= softmax[m].weigh(scores[m], scale);
        }
        if constexpr (CUT) {
            float run[MI][D / 8][4] = {};
            multiply_values(run, scores, stage + TILE);
#pragma unroll
            for (int m = 0; m < MI; m++)
#pragma unroll
                for (int j = 0; j < D / 8; j++)
#pragma unroll
                    for (int e = 0; e < 4; e++) sum[m][j][e] = fmaf(sum[m][j][e], softmax[m].shrink[e / 2], run[m][j][e]);
        } else {
            if (grown)
#pragma unroll
                for (int m = 0; m < MI; m++)
#pragma unroll
                    for (int j = 0; j < D / 8; j++)
#pragma unroll
                        for (int e = 0; e < 4; e++) sum[m][j][e] *= softmax[m].shrink[e / 2];
            multiply_values(sum, scores, stage + TILE);
        }
    }

#pragma unroll
    for (int m = 0; m < MI; m++)
        softmax[m].finish(out + row0 * q_pitch + head * D, q_pitch, sum[m], queries, warp_row + 16 * m);
}
