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

// N pairs of words; p[n] is 16-byte aligned.
template <int N> __device__ __forceinline__ void read_pairs(const u64* const* p, unsigned tag, float (&x)[N][2], Patience& patience) {
#pragma unroll 1
    for (unsigned tries = 0;; tries++) {
        u64 word[N][2];
        bool ready = true;
#pragma unroll
        for (int n = 0; n < N; n++) load_relaxed2(p[n], word[n][0], word[n][1]);
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                ready &= unsigned(word[n][e] >> 32) == tag;
                x[n][e] = __uint_as_float(unsigned(word[n][e]));
            }
        if (ready || (tries % 256 == 255 && patience.over())) return;
    }
}

__device__ __forceinline__ float read_word(const u64* p, unsigned tag, Patience& patience) {
#pragma unroll 1
    for (unsigned tries = 0;; tries++) {
        const u64 word = load_relaxed(p);
        if (unsigned(word >> 32) == tag || (tries % 256 == 255 && patience.over())) return __uint_as_float(unsigned(word));
    }
}

// A warp's part of a vector of COLUMNS values, as the left factor [16, 16] of tensor-core products: a chunk of 64
// columns is 4 slices of 16; row 3 s + p holds part p (of three, whose sum is the value) of slice s. Rows 12 to 15 are zero.
template <int COLUMNS> struct Vector {
    unsigned part[segments(COLUMNS) * CHUNKS][4];
};

// Column of a warp's chunk n, counted from the warp's first: known when compiled, so that one address serves all chunks.
__host__ __device__ constexpr int chunk(int n) { return n / CHUNKS * SEGMENT + n % CHUNKS * CHUNK; }

template <int COLUMNS> __device__ __forceinline__ bool has_chunk(int n, int warp) {
    return n < segments(COLUMNS) * CHUNKS && ((n / CHUNKS + 1) * SEGMENT <= COLUMNS || chunk(n) + warp * OWN < COLUMNS);
}

// Two values as three pairs of bf16, which add up to them exactly.
__device__ __forceinline__ void split(float x, float y, unsigned (&parts)[3]) {
#pragma unroll
    for (int p = 0; p < 3; p++) {
        const bf16 a = __float2bfloat16_rn(x), b = __float2bfloat16_rn(y);
        parts[p] = (unsigned)__bfloat16_as_ushort(b) << 16 | __bfloat16_as_ushort(a);
        x -= __bfloat162float(a), y -= __bfloat162float(b);
    }
}

// Fills `v`, where get(n, x) gives x[m] = the two values from this lane's column on in the warp's chunk n + m,
// and each value is multiplied by weight[column] if there is one. `scratch`, [12][8] words of this warp, hands the parts to the
// lanes that need them. Returns this lane's share of the sum of squares before the weight.
template <int COLUMNS, class Get>
__device__ __forceinline__ float load_vector(Vector<COLUMNS>& v, const float* __restrict__ weight, unsigned* scratch, int warp, int lane, Get get) {
    constexpr int N = segments(COLUMNS) * CHUNKS, TOGETHER = N < 8 ? N : 4;  // chunks read at once: their latencies overlap
    const int row = lane % 16, half = lane / 16;
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
            split(a, b, parts);
#pragma unroll
            for (int p = 0; p < 3; p++) scratch[(lane / 8 * 3 + p) * 8 + lane % 8] = parts[p];
            __syncwarp();
            // registers of the fragment: rows 0 to 7, rows 8 to 15, and both again with columns 8 to 15
            ldmatrix_x4(v.part[n + m], scratch + (row < 12 ? row : 0) * 8 + half * 4);
            if (lane >= 16) v.part[n + m][1] = v.part[n + m][3] = 0;
            __syncwarp();
        }
    }
    return squares;
}

// The next T tiles of 8 rows from the ring times the vector; this warp's share of the dot product of row n goes to part[n PITCH + warp].
//
// In step j row n is read at slice (n + j) % 4, which spreads its 16-byte pieces over all banks although rows lie 2 KB apart; that
// is allowed because the left factor holds all slices: of its product with row n only the rows of slice (n + j) % 4 are used.
template <int COLUMNS, int T>
__device__ __forceinline__ void multiply_tiles(Ring& ring, const Vector<COLUMNS>& v, float* part, int warp, int lane) {
    constexpr int N = segments(COLUMNS), FRAMES = T * N, AT_ONCE = 4, STRIDE = (N == 1 ? COLUMNS : SEGMENT) * 2;
    const int g = lane / 4, i = lane % 4;
    const int n = lane % 8, half = lane / 8 % 2 ^ n / 4, step = lane / 16;  // whose address this lane gives
    float acc[T][4][4];
#pragma unroll
    for (int t = 0; t < T; t++)
#pragma unroll
        for (int e = 0; e < 16; e++) acc[t][e / 4][e % 4] = 0.0f;
#pragma unroll
    for (int f0 = 0; f0 < FRAMES; f0 += AT_ONCE) {
        int slot[AT_ONCE];
#pragma unroll
        for (int f = 0; f < AT_ONCE; f++)
            if (f0 + f < FRAMES) {
                slot[f] = ring.slot;
                while (!mbarrier_try_wait(ring.full + ring.slot, ring.parity)) {}
                ring.next();
            }
#pragma unroll
        for (int f = 0; f < AT_ONCE; f++) {
            if (f0 + f >= FRAMES) break;
            const int t = (f0 + f) / N, s = (f0 + f) % N;
#pragma unroll
            for (int m = s * CHUNKS; m < (s + 1) * CHUNKS; m++) {
                if (!has_chunk<COLUMNS>(m, warp)) break;
                const unsigned char* base = ring.slots + slot[f] * SLOT + n * STRIDE + (warp * OWN + m % CHUNKS * CHUNK) * 2 + half * 16;
#pragma unroll
                for (int j = 0; j < 4; j += 2) {
                    unsigned b[4];
                    ldmatrix_x4(b, base + (n + j + step) % 4 * 32);
                    mma_bf16(acc[t][j], v.part[m], g < 4 ? b[0] : b[1], g < 4 ? b[1] : b[0]);
                    mma_bf16(acc[t][j + 1], v.part[m], g < 4 ? b[2] : b[3], g < 4 ? b[3] : b[2]);
                }
            }
        }
        __syncwarp();
        if (lane == 0)
#pragma unroll
            for (int f = 0; f < AT_ONCE; f++)
                if (f0 + f < FRAMES) mbarrier_arrive(ring.empty + slot[f]);
    }
    float sum[2 * T];  // element 2 t + e: row 2 i + e of tile t
#pragma unroll
    for (int e = 0; e < 2; e++) {
        const int low = (g / 3 - 2 * i - e) & 3, high = ((g + 8) / 3 - 2 * i - e) & 3;  // the step in which the slice was right
#pragma unroll
        for (int t = 0; t < T; t++) {
            const float(&a)[4][4] = acc[t];
            sum[2 * t + e] = low == 0 ? a[0][e] : low == 1 ? a[1][e] : low == 2 ? a[2][e] : a[3][e];
            const float more = high == 0 ? a[0][2 + e] : high == 1 ? a[1][2 + e] : high == 2 ? a[2][2 + e] : a[3][2 + e];
            if (g < 4) sum[2 * t + e] += more;
        }
    }
    // over the eight g: each lane gives half of its sums away and keeps the other half, until one is left
#pragma unroll
    for (int bit = 4, left = 2 * T; bit; bit >>= 1, left = left > 1 ? left / 2 : 1) {
        const bool upper = g & bit;
        if (left == 1) {
            sum[0] += __shfl_xor_sync(0xffffffffu, sum[0], 4 * bit);
            continue;
        }
#pragma unroll
        for (int k = 0; k < T; k++) {
            if (k >= left / 2) break;
            const float given = upper ? sum[k] : sum[k + left / 2], kept = upper ? sum[k + left / 2] : sum[k];
            sum[k] = kept + __shfl_xor_sync(0xffffffffu, given, 4 * bit);
        }
    }
    constexpr int COPIES = 4 / T;  // lanes that hold the same sum
    const int e = g / COPIES;
    if (g % COPIES == 0) part[(e / 2 * ROWS + 2 * i + e % 2) * PITCH + warp] = sum[0];
}

__device__ __forceinline__ float sum_warps(const float* p) {
    const float4 a = reinterpret_cast<const float4*>(p)[0], b = reinterpret_cast<const float4*>(p)[1];
    return ((a.x + a.y) + (a.z + a.w)) + ((b.x + b.y) + (b.z + b.w));
}
