// attention of a few queries on tensor cores: attention.cu's formula, the query heads of a key head as rows of one product
//
//     s[j] = (q[t, h] . keys[j, h K/H]) / sqrt(D)   for j = 0..positions[t]
//     out[t, h] = sum_j softmax(s)[j] values[j, h K/H]
//
// Entry point  attention_group        keys and values bf16, D 64 or 128, all 16-byte aligned, up to cuda.FEW_ROWS queries, more than
//                                     two query heads a key head: what they take on CUDA cores binds before memory does
// Arguments    out        [T, H, D]  float32, 16-byte aligned; may be q
//              q          [T, H, D]  float32, 16-byte aligned
//              keys       [S, K, D]  bf16, 16-byte aligned
//              values     [S, K, D]  bf16, 16-byte aligned
//              positions  [T]        int32; query t sees rows 0..positions[t]; one outside 0..S-1 gives NaN
//              H, K, S               int32, H a multiple of K
//              scale                 float32, log2(e) / sqrt(D): weights are powers of two
//              partial, share, counters  as in attention.cu, with 8 heads
// Constants    HEAD_DIM  D, 64 or 128
// Work         256 threads, up to 8 query heads of a key head of one query. A tile is 16 keys (D 64: 32), one warp's at a time; they
//              lie in shared memory where its lanes want them: each reads what it has copied. 64 D + 65536 bytes.
//              Grid (T, K ceil(H/K / 8), Z): warp w of block z takes tiles 8 z + w (w Z + z if there are less than 8 Z), + 8 Z, ..., with
//              Z no more than a quarter of the tiles, and 1 for eight; the last block to finish merges the shares
// Precision    q and the weights are cut into three bf16 parts of 8 of their 24 bits, so that all products are exact; a tensor
//              core's sum covers 16 elements or keys, starts from zero and is added to the rest in float32
// Error bound  2 (S/16 + Z + 47 + (D/16 + 34) m) eps32 times sum of weight |v|, with m the largest sum_d |q keys| / sqrt(D) and
//              what mma.cuh states of sums on tensor cores: a score takes 2 roundings in q, 23 in its runs and D/16 + 1 of them
// Traffic      4 S K D bytes for each query (once for each 8 heads of a group), 4 S H D FLOP
// Determinism  runs of keys go to warps, and warps and shares merge, in a fixed order: with one Z a query's result depends on
//              nothing but its own row and the cache. Z follows from T, H, K and S
// Limits       Z <= 64; Z > 1: T K ceil(H/K / 8) <= 4096, launch.workspace(). An infinity in q, keys or values gives NaN
// Wrapper cuda.attention · truth reference.attention · test tests/test_ops.py · benchmark benchmarks/ops.py
#include "attention_shares.cuh"
#include "common.cuh"
#include "ptx.cuh"

constexpr int D = HEAD_DIM, HEADS = 8, WARPS = 8, THREADS = 32 * WARPS;
constexpr int STEPS = 128 / D, KEYS = 16 * STEPS;  // of 16 keys; a tile, which a warp has at a time
constexpr int AHEAD = 2;                           // tiles of a warp that set off early
constexpr int PIECES = 8;     // of 16 bytes, a lane's part of a tile's keys, and as many of its values
constexpr int PITCH = D + 4;  // of a row of sums in shared memory: the lanes of a store get different banks

// Three bf16 parts of each of eight rows' elements k 2 i, 2 i + 1 (a, b) and 2 i + 8, 2 i + 9 (c, d), as left operands of two
// products: in rows 0 to 7 and 8 to 15 `last` has zeros and the last parts, `first` the first and the middle ones.
struct Parts {
    unsigned last[4], first[4];

    __device__ __forceinline__ Parts() {}
    __device__ __forceinline__ Parts(float a, float b, float c, float d) {
        unsigned low[3], high[3];
        cut(a, b, low), cut(c, d, high);
        last[0] = 0u, last[1] = low[0], last[2] = 0u, last[3] = high[0];
        first[0] = low[2], first[1] = low[1], first[2] = high[2], first[3] = high[1];
    }
};
constexpr int QUERIES = D / 16 * 32 * (int)sizeof(Parts);  // bytes

// x, y += row g of eight times columns 2 i, 2 i + 1 of b: a sum that starts from zero, so that little of it is cut off.
__device__ __forceinline__ void multiply(float& x, float& y, const Parts& rows, unsigned b0, unsigned b1) {
    float d[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    mma_bf16(d, rows.last, b0, b1);
    mma_bf16(d, rows.first, b0, b1);
    x += d[0] + d[2], y += d[1] + d[3];
}

// The query heads of a block.
struct Heads {
    int kv, number;  // their key head; how many of them there are
    size_t first;    // row of q [T H, D]

    __device__ __forceinline__ Heads(int y, int H, int K) {
        const int size = H / K, chunks = (size + HEADS - 1) / HEADS, in_group = y % chunks * HEADS;
        kv = y / chunks, number = min(size - in_group, HEADS), first = (size_t)blockIdx.x * H + kv * size + in_group;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
attention_group(float* out, const float* q, const bf16* keys, const bf16* values, const int* __restrict__ positions, int H, int K,
                int S, float scale, float* partial, float2* share, int* counters) {
    DYNAMIC_SHARED(unsigned char, shared);
    Parts* const query = reinterpret_cast<Parts*>(shared);                                  // [D / 16][32]
    float (*const sums)[HEADS][PITCH] = reinterpret_cast<float (*)[HEADS][PITCH]>(shared);  // in the end, [WARPS]
    __shared__ float tops[WARPS][HEADS], weights[WARPS][HEADS];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, i = lane % 4;
    Heads mine(blockIdx.y, H, K);
    const int last = positions[blockIdx.x], tiles = last / KEYS + 1;
    // One block where that gives its warps a tile at most, else four warps or more a block: reading is shared by more SMs.
    const int Z = tiles <= WARPS ? 1 : min((int)gridDim.z, (tiles + 3) / 4), step = WARPS * Z * KEYS;
    if (last < 0 || last >= S) {
        wait_for_launches_before();
        for (int e = threadIdx.x; blockIdx.z == 0 && e < mine.number * D; e += THREADS) out[mine.first * D + e] = NOT_A_NUMBER;
        return;
    }
    if ((int)blockIdx.z >= Z) return;
    const size_t row = (size_t)K * D;
    keys += (size_t)mine.kv * D, values += (size_t)mine.kv * D;
    // The tiles of a block's warps lie side by side (50 us instead of 52.5 for 32,768 keys), but where that leaves blocks without
    // work or with less than others a tile goes to each block by turns (5.6 instead of 6.3 us for 1,024).
    int j0 = (tiles < WARPS * Z ? warp * Z + blockIdx.z : blockIdx.z * WARPS + warp) * KEYS;
    // Rows that are to come from memory set off while the launch before this one ends; they may be written until it has. No
    // more of them than L2 holds: all 134 MB of 32,768 keys took 63 us instead of 50.
    for (int n = 0; n < AHEAD; n++) {
        const int key = j0 + n * step + lane / (D / 64);
        const size_t at = key * row + lane % (D / 64) * 64;
        if (key <= last) prefetch_l2(keys + at), prefetch_l2(values + at);
    }
    wait_for_launches_before();

    // A lane copies what it will read, so nobody waits for others. Of 32 elements of a key it has 8 i to 8 i + 7: two steps of a
    // product, which takes them from q in this order as well. Behind the last row stands the last one, whose weight is zero there.
    unsigned char* const own = shared + QUERIES + (warp * 2 * PIECES * 32 + lane) * 16;
    const auto copy_keys = [&](int j0) {
        if (j0 <= last)
#pragma unroll
            for (int n = 0; n < PIECES; n++)
                cp_async16(own + n * 512, keys + min(j0 + n / (D / 32) * 8 + g, last) * row + n % (D / 32) * 32 + 8 * i);
        cp_async_commit();
    };
    // Of 16 values those of keys 2 i, 2 i + 1, 2 i + 8, 2 i + 9, of 64 elements eight. Columns 2 i and 2 i + 1 of a product are then
    // among elements 8 i.. and 32 + 8 i...
    const auto copy_values = [&](int j0) {
        if (j0 <= last)
#pragma unroll
            for (int n = 0; n < PIECES; n++) {
                const int r = n / (D / 64), key = j0 + r / 4 * 16 + r / 2 % 2 * 8 + 2 * i + r % 2;
                const int element = n % (D / 64) * 64 + g % 2 * 32 + g / 2 * 8;
                cp_async16(own + (PIECES + n) * 512, values + min(key, last) * row + element);
            }
        cp_async_commit();
    };
    const auto piece = [&](int n) { return *reinterpret_cast<const uint4*>(own + n * 512); };
    copy_keys(j0), copy_values(j0);

    for (int d = warp; d < D / 16; d += WARPS) {
        float4 x = {0.0f, 0.0f, 0.0f, 0.0f};
        const int element = d / 2 * 32 + 8 * i + d % 2 * 4;
        if (g < mine.number) x = *reinterpret_cast<const float4*>(q + (mine.first + g) * D + element);
        query[32 * d + lane] = Parts(x.x * scale, x.y * scale, x.z * scale, x.w * scale);
    }
    __syncthreads();
    float acc[D / 64][8][2] = {}, top = MINUS_INFINITY, total = 0.0f;  // of head g; total of this lane's keys
    for (; j0 <= last; j0 += step) {
        cp_async_wait<1>();
        float score[2 * STEPS][2] = {};  // of head g, keys 8 m + 2 i, 8 m + 2 i + 1
#pragma unroll
        for (int n = 0; n < D / 32; n++) {
            const Parts low = query[64 * n + lane], high = query[64 * n + 32 + lane];
#pragma unroll
            for (int m = 0; m < 2 * STEPS; m++) {
                const uint4 k = piece(m * (D / 32) + n);
                multiply(score[m][0], score[m][1], low, k.x, k.y);
                multiply(score[m][0], score[m][1], high, k.z, k.w);
            }
        }
        copy_keys(j0 + step);
        if (j0 + KEYS - 1 > last)
#pragma unroll
            for (int e = 0; e < 4 * STEPS; e++)
                if (j0 + e / 2 * 8 + 2 * i + e % 2 > last) score[e / 2][e % 2] = MINUS_INFINITY;
        float largest = MINUS_INFINITY;
#pragma unroll
        for (int e = 0; e < 4 * STEPS; e++) largest = fmaxf(largest, score[e / 2][e % 2]);
        if (__any_sync(0xffffffffu, largest > top)) {  // rarely, after the first few
            largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
            largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
            const float before = top;
            top = fmaxf(top, largest);
            const float shrink = exp2f(before - top);
            total *= shrink;
#pragma unroll
            for (int n = 0; n < D / 64; n++)
#pragma unroll
                for (int e = 0; e < 16; e++) acc[n][e / 2][e % 2] *= shrink;
        }
        cp_async_wait<1>();
#pragma unroll
        for (int s = 0; s < STEPS; s++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                float& x = score[2 * s + e / 2][e % 2];
                x = exp2f(x - top), total += x;
            }
            const Parts weight(score[2 * s][0], score[2 * s][1], score[2 * s + 1][0], score[2 * s + 1][1]);
#pragma unroll
            for (int n = 0; n < D / 64; n++) {
                unsigned v[4][4];  // [key][pair of elements]
#pragma unroll
                for (int r = 0; r < 4; r++) {
                    const uint4 x = piece(PIECES + (4 * s + r) * (D / 64) + n);
                    v[r][0] = x.x, v[r][1] = x.y, v[r][2] = x.z, v[r][3] = x.w;
                }
#pragma unroll
                for (int e = 0; e < 8; e++) {  // element e of each of two keys
                    const int halves = e % 2 ? 0x7632 : 0x5410;
                    multiply(acc[n][e][0], acc[n][e][1], weight, __byte_perm(v[0][e / 2], v[1][e / 2], halves),
                             __byte_perm(v[2][e / 2], v[3][e / 2], halves));
                }
            }
        }
        copy_values(j0 + step);
    }

    // All warps of the block
    total += __shfl_xor_sync(0xffffffffu, total, 1);
    total += __shfl_xor_sync(0xffffffffu, total, 2);
    if (i == 0) tops[warp][g] = top;
    cp_async_wait<0>();
    __syncthreads();
    mine = Heads(opaque(blockIdx.y), H, K);  // again, instead of kept meanwhile
    const float own_top = top;
#pragma unroll
    for (int w = 0; w < WARPS; w++) top = fmaxf(top, tops[w][g]);  // finite: each share has a key
    const float shrink = exp2f(own_top - top);
    if (i == 0) weights[warp][g] = total * shrink;
#pragma unroll
    for (int n = 0; n < D / 64; n++)
#pragma unroll
        for (int e = 0; e < 16; e += 4)
            *reinterpret_cast<float4*>(&sums[warp][g][64 * n + e / 8 * 32 + 8 * i + e % 8]) =
                make_float4(acc[n][e % 8][e / 8] * shrink, acc[n][e % 8 + 1][e / 8] * shrink, acc[n][e % 8 + 2][e / 8] * shrink,
                            acc[n][e % 8 + 3][e / 8] * shrink);
    __syncthreads();
    for (int e = threadIdx.x; e < mine.number * D; e += THREADS) {
        const int h = e / D;
        float sum = 0.0f, all = 0.0f, its = MINUS_INFINITY;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += sums[w][h][e % D], all += weights[w][h], its = fmaxf(its, tops[w][h]);
        if (Z == 1) {
            out[mine.first * D + e] = sum / all;
        } else {
            const size_t at = (mine.first + h) * gridDim.z + blockIdx.z;
            __stcg(partial + at * D + e % D, sum);
            if (e % D == 0) __stcg(share + at, make_float2(its, all));
        }
    }
    if (Z > 1) merge_shares<D, THREADS, HEADS>(out, partial, share, mine.first, mine.number, Z, counters);
}
