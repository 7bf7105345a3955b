// One warp's share of the attention of decode_step.cu, in its terms: CH query heads over the cached keys and values in frames of the ring.
// A struct for the types that tensor cores multiply, bf16, and one for the others, with the same functions:
//
//   begin(shared)                    the queries, and no key yet
//   begin_with_newest(shared)        the same with the new key, which is in nobody's cache yet
//   add(slot, first, count)          the first `count` keys, at least one, of the HALF of a frame from row `first` on
//   finish(shared)                   sums and weights to shared.merge[warp] and so on
//
// Weights are powers of two of what scores are above `base`, which follows the largest score at a distance, so that sums are rarely scaled.
#pragma once

constexpr int HALF = FRAME_KEYS / 2, WARPS_OF_FRAME = 2;  // keys of a warp in a frame
constexpr float LOWEST = -3.402823466e38f;
constexpr float SLACK = 64.0f;  // floats lose nothing by weights up to 2^SLACK; only cached values beyond 2^63 could overflow in a sum

// Where the 16-byte piece n of row `row` is in a slot's keys or values: boxes of eight pieces, piece n of them at place n ^ row % 8.
__device__ __forceinline__ int piece_place(int row, int n) { return n / 8 * (FRAME_KEYS * 128) + row * 128 + 16 * (n % 8 ^ row % 8); }
// The g-th row that a warp reads: two of those in a phase of a load, 64 bytes of each, have their pieces in different banks.
__device__ __forceinline__ int key_row(int g) { return g / 2 + g % 2 * 4; }

template <class T> struct WarpAttention {
    static constexpr int IN_PIECE = 16 / sizeof(T), LANES = 8, PIECES = KEY_BYTES / 128, E = PIECES * IN_PIECE;  // lanes of a key; elements of a lane
    static constexpr int KEYS = 32 / LANES, LOADS = HALF / KEYS;
    static_assert(HALF % KEYS == 0 && E * LANES == D, "");
    float query[CH][E], base[CH], weight[CH], sum[CH][E];

    __device__ static int own() { return threadIdx.x % LANES; }
    __device__ static int group() { return threadIdx.x % 32 / LANES; }
    // The index in a row of this lane's e-th element.
    __device__ static int element(int e) { return (e / IN_PIECE * LANES + own()) * IN_PIECE + e % IN_PIECE; }

    __device__ static float dot(const float (&a)[E], const float (&b)[E]) {
        float x = 0.0f;
#pragma unroll
        for (int e = 0; e < E; e++) x = fmaf(a[e], b[e], x);
#pragma unroll
        for (int offset = LANES / 2; offset; offset >>= 1) x += __shfl_xor_sync(0xffffffffu, x, offset);
        return x;
    }

    __device__ __forceinline__ void begin(const Shared& shared) {
#pragma unroll
        for (int h = 0; h < CH; h++) {
            base[h] = LOWEST, weight[h] = 0.0f;
#pragma unroll
            for (int e = 0; e < E; e++) query[h][e] = shared.query[h][element(e)], sum[h][e] = 0.0f;
        }
    }

    __device__ __forceinline__ void begin_with_newest(const Shared& shared) {
        begin(shared);
        float key[E];
#pragma unroll
        for (int e = 0; e < E; e++) key[e] = shared.key[element(e)];
#pragma unroll
        for (int h = 0; h < CH; h++) {
            base[h] = dot(query[h], key);
            if (group()) continue;
            weight[h] = 1.0f;
#pragma unroll
            for (int e = 0; e < E; e++) sum[h][e] = shared.value[element(e)];
        }
    }

    __device__ static void load_row(const unsigned char* rows, int row, float (&x)[E]) {
#pragma unroll
        for (int p = 0; p < PIECES; p++) {
            alignas(16) T raw[IN_PIECE];
            *reinterpret_cast<uint4*>(raw) = *reinterpret_cast<const uint4*>(rows + piece_place(row, p * LANES + own()));
#pragma unroll
            for (int e = 0; e < IN_PIECE; e++) x[p * IN_PIECE + e] = to_float(raw[e]);
        }
    }

    __device__ __forceinline__ void add(const unsigned char* slot, int first, int count) {
        float score[CH][LOADS], x[E];
#pragma unroll
        for (int u = 0; u < LOADS; u++) {
            const int n = u * KEYS + group();
            load_row(slot, first + n, x);
#pragma unroll
            for (int h = 0; h < CH; h++) {
                score[h][u] = dot(query[h], x);
                if (n >= count) score[h][u] = MINUS_INFINITY;
            }
        }
#pragma unroll
        for (int h = 0; h < CH; h++) {
            float top = score[h][0];
#pragma unroll
            for (int u = 1; u < LOADS; u++) top = fmaxf(top, score[h][u]);
            if (__any_sync(0xffffffffu, top > base[h] + SLACK)) {
#pragma unroll
                for (int offset = LANES; offset < 32; offset *= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, offset));
                top = fmaxf(top, base[h]);
                const float shrink = exp2f(base[h] - top);
                base[h] = top, weight[h] *= shrink;
#pragma unroll
                for (int e = 0; e < E; e++) sum[h][e] *= shrink;
            }
#pragma unroll
            for (int u = 0; u < LOADS; u++) score[h][u] = exp2f(score[h][u] - base[h]), weight[h] += score[h][u];
        }
#pragma unroll
        for (int u = 0; u < LOADS; u++) {
            // What is not there may be NaN, so the last row that is takes its place, without weight.
            load_row(slot + KEY_FRAME / 2, first + min(u * KEYS + group(), count - 1), x);
#pragma unroll
            for (int h = 0; h < CH; h++)
#pragma unroll
                for (int e = 0; e < E; e++) sum[h][e] = fmaf(score[h][u], x[e], sum[h][e]);
        }
    }

    __device__ __forceinline__ void finish(Shared& shared) {
        const int warp = threadIdx.x / 32;
#pragma unroll
        for (int h = 0; h < CH; h++) {
#pragma unroll
            for (int offset = LANES; offset < 32; offset *= 2) {
                weight[h] += __shfl_xor_sync(0xffffffffu, weight[h], offset);
#pragma unroll
                for (int e = 0; e < E; e++) sum[h][e] += __shfl_xor_sync(0xffffffffu, sum[h][e], offset);
            }
            if (group() == 0)
#pragma unroll
                for (int e = 0; e < E; e++) shared.merge[warp][h * D + element(e)] = sum[h][e];
            if (threadIdx.x % 32 == 0) shared.top[h][warp] = base[h], shared.weight[h][warp] = weight[h];
        }
    }
};

// On tensor cores, 16 keys at a time. With g = lane / 4 and i = lane % 4, queries and weights are right factors whose column n is part n % 4
// (of three, whose sum is the value; the fourth is 0) of query head n / 4, so that their products with keys or values, which are left factors,
// leave to each lane something of its head i / 2 only. Row g of the scores is that of key key_row(g), row g + 8 that of the eighth after it, and
// the sums of values have the elements in order.
template <> struct WarpAttention<bf16> {
    static constexpr int STEPS = D / 16;
    unsigned query[STEPS][2];
    float base, weight, sum[STEPS][4];
    static_assert(CH <= 2 && (sizeof(KV_TYPE) != 2 || HALF % 16 == 0), "");

    __device__ static int lane() { return opaque(threadIdx.x % 32); }  // as in decode_consumer.cuh: 10 registers less
    __device__ static int head(int n) { return min(n / 4, CH - 1); }  // of column n

    __device__ __forceinline__ void begin(const Shared& shared) {
        const int n = lane() / 4, i = lane() % 4;
        const uint4* const from = reinterpret_cast<const uint4*>(shared.query_parts[head(n)][min(n % 4, 2)]);
#pragma unroll
        for (int t = 0; t < STEPS / 2; t++) {
            uint4 x = from[4 * t + i];
            if (n % 4 == 3) x = {0, 0, 0, 0};
            query[2 * t][0] = x.x, query[2 * t][1] = x.y, query[2 * t + 1][0] = x.z, query[2 * t + 1][1] = x.w;
        }
        base = LOWEST, weight = 0.0f;
#pragma unroll
        for (int m = 0; m < STEPS; m++)
#pragma unroll
            for (int e = 0; e < 4; e++) sum[m][e] = 0.0f;
    }

    __device__ __forceinline__ void begin_with_newest(const Shared& shared) {
        begin(shared);
        const int g = lane() / 4, i = lane() % 4, first = (g * 2 + i % 2) * STEPS;
        float score = 0.0f;
#pragma unroll
        for (int e = 0; e < STEPS; e++) score = fmaf(shared.query[head(2 * i)][first + e], shared.key[first + e], score);
#pragma unroll
        for (int offset = 1; offset < 32; offset *= offset == 1 ? 4 : 2) score += __shfl_xor_sync(0xffffffffu, score, offset);
        base = score;
        if (g == 0) weight = 1.0f;
        if (i % 2) return;
#pragma unroll
        for (int m = 0; m < STEPS; m++) sum[m][0] = shared.value[16 * m + g], sum[m][2] = shared.value[16 * m + 8 + g];
    }

    __device__ __forceinline__ void add(const unsigned char* slot, int first, int count) {
#pragma unroll
        for (int n = 0; n < HALF; n += 16)
            if (n < count) add16(slot, first + n, count - n);
    }

    __device__ __forceinline__ void add16(const unsigned char* slot, int first, int count) {
        const int g = lane() / 4, i = lane() % 4, n = key_row(g);
        float c[2][4] = {};  // two chains
#pragma unroll
        for (int t = 0; t < STEPS / 2; t++) {
            const unsigned char* const row = slot + piece_place(first + n, 4 * t + i);
            const uint4 a = *reinterpret_cast<const uint4*>(row), b = *reinterpret_cast<const uint4*>(row + 8 * 128);
            const unsigned pairs[2][4] = {{a.x, b.x, a.y, b.y}, {a.z, b.z, a.w, b.w}};
            mma_bf16(c[0], pairs[0], query[2 * t][0], query[2 * t][1]);
            mma_bf16(c[1], pairs[1], query[2 * t + 1][0], query[2 * t + 1][1]);
        }
        float score[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            score[r] = (c[0][2 * r] + c[1][2 * r]) + (c[0][2 * r + 1] + c[1][2 * r + 1]);
            score[r] += __shfl_xor_sync(0xffffffffu, score[r], 1);
            if (n + 8 * r >= count) score[r] = MINUS_INFINITY;
        }
        float top = fmaxf(score[0], score[1]);
        if (__any_sync(0xffffffffu, top > base + SLACK)) {
#pragma unroll
            for (int offset = 4; offset < 32; offset *= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, offset));
            top = fmaxf(top, base);
            const float shrink = exp2f(base - top);
            base = top, weight *= shrink;
#pragma unroll
            for (int m = 0; m < STEPS; m++)
#pragma unroll
                for (int e = 0; e < 4; e++) sum[m][e] *= shrink;
        }
#pragma unroll
        for (int r = 0; r < 2; r++) score[r] = exp2f(score[r] - base), weight += score[r];
        // as right factors: this lane's keys 2 i and 2 i + 1 of each eight
        unsigned w[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int from = 8 * i + g / 4 * 2;
            unsigned parts[3];
            cut(__shfl_sync(0xffffffffu, score[r], from), __shfl_sync(0xffffffffu, score[r], from + 4), parts);
            w[r] = g % 4 == 0 ? parts[0] : g % 4 == 1 ? parts[1] : g % 4 == 2 ? parts[2] : 0;
        }
        // What is not there may be NaN, so the last row that is takes its place, without weight.
        const int key = min(key_row(lane() % 8) + lane() / 16 * 8, count - 1);
#pragma unroll
        for (int m = 0; m < STEPS; m++) {
            unsigned values[4];
            ldmatrix_x4_trans(values, slot + KEY_FRAME / 2 + piece_place(first + key, 2 * m + lane() / 8 % 2));
            mma_bf16(sum[m], values, w[0], w[1]);
        }
    }

    __device__ __forceinline__ void finish(Shared& shared) {
        const int warp = threadIdx.x / 32, g = lane() / 4, i = lane() % 4;
        const bool upper = i % 2;
#pragma unroll
        for (int offset = 4; offset < 32; offset *= 2) weight += __shfl_xor_sync(0xffffffffu, weight, offset);
        if (i / 2 < CH && g == 0 && !upper) shared.top[i / 2][warp] = base, shared.weight[i / 2][warp] = weight;
#pragma unroll
        for (int m = 0; m < STEPS; m += 2)  // two lanes have a sum each for the same elements: one keeps those of step m, one those of m + 1
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const float low = sum[m][2 * r] + sum[m][2 * r + 1], high = sum[m + 1][2 * r] + sum[m + 1][2 * r + 1];
                const float x = (upper ? high : low) + __shfl_xor_sync(0xffffffffu, upper ? low : high, 1);
                if (i / 2 < CH) shared.merge[warp][i / 2 * D + (m + upper) * 16 + 8 * r + g] = x;
            }
    }
};
