// Vectors in decode_step.cu, in its terms: the words by which blocks exchange them, and their products with tiles of 8 rows in the ring.
#pragma once

__device__ __forceinline__ void publish(u64* word, float value, unsigned tag) {
    store_relaxed(word, (u64)tag << 32 | __float_as_uint(value));
}

// What a thread needs to wait without hanging: from `deadline` on it takes whatever there is.
struct Patience {
    u64 deadline;
    bool lost = false;
    __device__ bool over() {
        if (!lost && global_timer() > deadline) lost = true;
        return lost;
    }
};

// For all blocks, in copies, as those that poll one line of the L2 cache wait for each other: 466 us with one, 460 with four, 469 with eight.
__device__ __forceinline__ void publish_to_all(u64* word, float value, unsigned tag) {
#pragma unroll
    for (int copy = 0; copy < COPIES; copy++) publish(word + copy * VECTORS, value, tag);
}
// The copy of the vectors that this block reads.
__device__ __forceinline__ const u64* copy_of(const u64* words) { return words + blockIdx.x % COPIES * VECTORS; }

// N pairs of words, once they have this tag: words(n) is the 16-byte aligned address of the n-th, if there(n). The whole warp, which leaves
// together: where lanes went on as their words came, 0.6B took 484 instead of 466 us a token on an H100.
struct All {
    __device__ bool operator()(int) const { return true; }
};
template <int N, class Words, class There = All>
__device__ __forceinline__ void read_pairs(const Words& words, unsigned tag, float (&x)[N][2], Patience& patience, const There& there = {}) {
    u64 word[N][2];
#pragma unroll
    for (int n = 0; n < N; n++)
        if (there(n)) load_relaxed2(words(n), word[n][0], word[n][1]);
#pragma unroll 1
    for (unsigned tries = 0;; tries++) {
        bool ready = true, here[N];
#pragma unroll
        for (int n = 0; n < N; n++)
            if (there(n)) ready &= here[n] = unsigned(word[n][0] >> 32) == tag && unsigned(word[n][1] >> 32) == tag;
        if (__all_sync(0xffffffffu, ready)) break;
        if (tries % 256 == 255 && __any_sync(0xffffffffu, patience.over())) break;
#pragma unroll
        for (int n = 0; n < N; n++)
            if (there(n) && !here[n]) load_relaxed2(words(n), word[n][0], word[n][1]);
    }
#pragma unroll
    for (int n = 0; n < N; n++)
        if (there(n)) x[n][0] = __uint_as_float(unsigned(word[n][0])), x[n][1] = __uint_as_float(unsigned(word[n][1]));
}

__device__ __forceinline__ float read_word(const u64* p, unsigned tag, Patience& patience) {
#pragma unroll 1
    for (unsigned tries = 0;; tries++) {
        const u64 word = load_relaxed(p);
        if (unsigned(word >> 32) == tag || (tries % 256 == 255 && patience.over())) return __uint_as_float(unsigned(word));
    }
}

// A warp's part of a vector of COLUMNS values, as right factors [16, 8] of tensor-core products, two for a chunk of 64 values. Column 2 p + h is
// part p (of three, whose sum is the value) of the chunk's half h: pieces 4 h to 4 h + 3 of 8 values, of which the first factor has the first
// four of each and the second the others. Columns 6 and 7 repeat others.
template <int COLUMNS> struct Vector {
    unsigned part[segments(COLUMNS) * CHUNKS][4];
};

// Column of a warp's chunk n, counted from the warp's first: known when compiled, so that one address serves all chunks.
__host__ __device__ constexpr int chunk(int n) { return n / CHUNKS * SEGMENT + n % CHUNKS * CHUNK; }

template <int COLUMNS> __device__ __forceinline__ bool has_chunk(int n, int warp) {
    return n < segments(COLUMNS) * CHUNKS && ((n / CHUNKS + 1) * SEGMENT <= COLUMNS || chunk(n) + warp * OWN < COLUMNS);
}

// Fills `v`, where get(n, x) gives x[m] = the two values from this lane's column on in the warp's chunk n + m,
// and each value is multiplied by weight[column] if there is one. `scratch`, [3][32] words of this warp, hands the parts to the
// lanes that need them. Returns this lane's share of the sum of squares before the weight.
template <int COLUMNS, class Get>
__device__ __forceinline__ float load_vector(Vector<COLUMNS>& v, const float* __restrict__ weight, unsigned* scratch, int warp, int lane, Get get) {
    constexpr int N = segments(COLUMNS) * CHUNKS, TOGETHER = N < 8 ? N : 4;  // chunks read at once: their latencies overlap
    const int column = lane / 4 % 6;
    unsigned* const to = scratch + lane;
    const uint4* const from = reinterpret_cast<const uint4*>(scratch + column / 2 * 32 + column % 2 * 16 + lane % 4 * 4);
    float squares = 0.0f;
#pragma unroll
    for (int n = 0; n < N; n += TOGETHER) {
        float w[TOGETHER][2], x[TOGETHER][2];
#pragma unroll
        for (int m = 0; m < TOGETHER; m++)
            if (weight && has_chunk<COLUMNS>(n + m, warp)) {
                const float2 pair = *reinterpret_cast<const float2*>(weight + warp * OWN + 2 * lane + chunk(n + m));
                w[m][0] = pair.x, w[m][1] = pair.y;
            }
        get(n, x);
#pragma unroll
        for (int m = 0; m < TOGETHER; m++) {
            if (!has_chunk<COLUMNS>(n + m, warp)) break;
            float a = x[m][0], b = x[m][1];
            squares = fmaf(a, a, fmaf(b, b, squares));
            if (weight) a *= w[m][0], b *= w[m][1];
            unsigned parts[3];
            cut(a, b, parts);
#pragma unroll
            for (int p = 0; p < 3; p++) to[32 * p] = parts[p];
            __syncwarp();
            *reinterpret_cast<uint4*>(v.part[n + m]) = *from;
            __syncwarp();
        }
    }
    return squares;
}

// Adds up, over the four lanes i of a row, its sums of T tiles: part[(8 t + row) PITCH + warp].
template <int T> __device__ __forceinline__ void store_sums(float* part, float* sum, int i, int row, int warp) {
    // each lane gives half of its sums away and keeps the other half, until one is left
#pragma unroll
    for (int bit = 2, left = T; bit; bit >>= 1, left = left > 1 ? left / 2 : 1) {
        const bool upper = i & bit;
        if (left == 1) {
            sum[0] += __shfl_xor_sync(0xffffffffu, sum[0], bit);
            continue;
        }
#pragma unroll
        for (int k = 0; k < T / 2; k++) {
            if (k >= left / 2) break;
            const float given = upper ? sum[k] : sum[k + left / 2], kept = upper ? sum[k + left / 2] : sum[k];
            sum[k] = kept + __shfl_xor_sync(0xffffffffu, given, bit);
        }
    }
    constexpr int SAME = 4 / T;  // lanes that hold the same sum
    if (i % SAME == 0) part[(i / SAME * ROWS + row) * PITCH + warp] = sum[0];
}

// The next T tiles of 8 rows from the ring times the vector; this warp's share of the dot product of row n goes to part[n PITCH + warp].
//
// A tile is the left factor as it lies in memory, 128 bytes of four rows and of the other four read at once: eight lanes have a row, each a
// piece of 8 values, four of which are its registers in one fragment [16, 16] and four in the next. So rows 2 r and 2 r + 1 of a fragment are the
// two halves of the tile's row r, rows 8 + 2 r and 9 + 2 r those of row r + 4, and nothing is moved between loads and products; of the results,
// the columns of its half count in each row.
template <int COLUMNS, int T>
__device__ __forceinline__ void multiply_tiles(Ring& ring, const Vector<COLUMNS>& v, float* part, int warp, int lane) {
    constexpr int N = segments(COLUMNS), FRAMES = T * N * PARTS, AT_ONCE = T == 6 ? 6 : 4, CHAINS = T >= 4 ? 2 : 4;
    const int g = lane / 4, i = lane % 4, at = lane / 8 * ROW_PITCH<COLUMNS> + warp * OWN * 2 + lane % 8 * 16;
    float acc[T][CHAINS][4];
#pragma unroll
    for (int t = 0; t < T; t++)
#pragma unroll
        for (int e = 0; e < 4 * CHAINS; e++) acc[t][e / 4][e % 4] = 0.0f;
#pragma unroll
    for (int f0 = 0; f0 < FRAMES; f0 += AT_ONCE) {
        constexpr int MOST = FRAMES < AT_ONCE ? FRAMES : AT_ONCE;
        int slot[MOST];
        ring.receive(slot, FRAMES - f0);
#pragma unroll
        for (int f = 0; f < MOST; f += PARTS) {
            if (f0 + f >= FRAMES) break;
            const int t = (f0 + f) / PARTS / N, s = (f0 + f) / PARTS % N;
            const unsigned char* const upper_rows = ring.slots + slot[f] * SLOT + at;
            const unsigned char* const lower_rows = PARTS == 1 ? upper_rows + 4 * ROW_PITCH<COLUMNS> : ring.slots + slot[f + PARTS - 1] * SLOT + at;
#pragma unroll
            for (int c = 0; c < CHUNKS; c++) {
                const int m = s * CHUNKS + c;
                if (!has_chunk<COLUMNS>(m, warp)) break;
                const uint4 a = *reinterpret_cast<const uint4*>(upper_rows + c * 128), b = *reinterpret_cast<const uint4*>(lower_rows + c * 128);
                const unsigned pairs[2][4] = {{a.x, b.x, a.y, b.y}, {a.z, b.z, a.w, b.w}};
#pragma unroll
                for (int e = 0; e < 2; e++) mma_bf16(acc[t][(m * 2 + e) % CHAINS], pairs[e], v.part[m][2 * e], v.part[m][2 * e + 1]);
            }
        }
        __syncwarp();
        if (lane == 0)
#pragma unroll
            for (int f = 0; f < MOST; f++)
                if (f0 + f < FRAMES) mbarrier_arrive(ring.empty + slot[f]);
    }
    // Rows g and g + 8 are the same half of two rows of the tile, whose other halves lane ^ 4 has: one keeps the first row, one the other.
    const bool upper = g % 2;
    const int row = upper * 4 + g / 2;
    float sum[T];
#pragma unroll
    for (int t = 0; t < T; t++) {
        float c[4];
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const float(&a)[CHAINS][4] = acc[t];
            c[e] = CHAINS == 2 ? a[0][e] + a[1][e] : (a[0][e] + a[1][e]) + (a[2][e] + a[3][e]);
        }
        sum[t] = (upper ? c[3] : c[0]) + __shfl_xor_sync(0xffffffffu, upper ? c[1] : c[2], 4);
        if (i == 3) sum[t] = 0.0f;
    }
    if constexpr (T == 6) {
        store_sums<4>(part, sum, i, row, warp);
        store_sums<2>(part + 4 * ROWS * PITCH, sum + 4, i, row, warp);
    } else {
        store_sums<T>(part, sum, i, row, warp);
    }
}

__device__ __forceinline__ float sum_warps(const float* p) {
    const float4 a = reinterpret_cast<const float4*>(p)[0], b = reinterpret_cast<const float4*>(p)[1];
    return ((a.x + a.y) + (a.z + a.w)) + ((b.x + b.y) + (b.z + b.w));
}
