// decode_step: one token through the whole network in one launch; the same mathematics as the operations, one after another
//
// Entry point  decode_step            always; gridDim.x blocks that must all be resident at once (one a multiprocessor)
// Needs        sm_90
// Arguments    logits    [V]  float32, of the token after the given one
//              ids       [2]  int32: the token, replaced by the arg-max of the logits below n_ids, the lowest id among equals, or by -1 where
//                             they leave none (NaN, +inf, or all -inf); and 1 from when a block gave up waiting, after which no
//                             launch does anything
//              position  [1]  int32, its position p, 0..S-1; replaced by p + 1. A token or a position that does not exist
//                             gives logits of NaN and no cached row
//              addresses [L, 14]  addresses of each layer's arrays, in the order of `enum Array`; 0 where a layer has none
//              embed     [V, C], lm_head [V, C]  W_TYPE        norm [C]  float32
//              cos, sin  [P, D/2]  float32, P > p
//              keys, values  [L, S, K, D]  KV_TYPE; row p of each layer is written
//              words     exchange_words() 8-byte words, zero before the first launch and left to this kernel afterwards
//              epoch     [1]  uint32, 1 before the first launch, counted up by each; 0 once a block gave up
//              V, n_ids, S  int32       eps  float32
// Constants    LAYERS L, HIDDEN C, HEADS H, KV_HEADS K, HEAD_DIM D (64 or 128), FFN F; C, H D and F multiples of 64, V of 8
//              W_TYPE bf16, KV_TYPE bf16 | f16 | f32, QK_NORM and QKV_BIAS 0 | 1, UNIT_HEADS query heads that attend together,
//              SLOTS of 16 KB in the ring, of which at most IN_FLIGHT (in the head HEAD_IN_FLIGHT) are on their way at a time
// Work         8 consumer warps and one producer warp a block. A matrix is dealt out in groups of 8 rows; a block's groups of a
//              token follow one another in an order that no value decides, so the producer streams them through the ring
//              without a pause at stages or layers. A consumer warp owns 128 columns of every 1024: it waits for just these
//              values of the vector, multiplies all rows by them on the tensor cores, and the 8 partial sums of a row meet in shared memory.
// Exchange     between blocks by words {float32 value, tag}: a reader polls the very word that it needs, and no fence,
//              counter or barrier of the grid exists. Five exchanges a layer (vector, qkv, attention, vector, activation), one
//              more where a head's keys are shared out. A word is written again only after everybody has passed it:
//              each block publishes in each exchange of the vector, and all wait for all of them.
// Precision    as the operations: float32 everywhere, one rounding where k and v are stored. A float32 factor of a product is the
//              exact sum of three bf16 parts, each multiplied on the tensor cores; the parts are rows of one fragment.
// Error bound  that of the operations
// Traffic      all weights once and 2 L p K D sizeof(KV_TYPE) bytes of cache
// Determinism  fixed order of summation; the split of the keys follows from p, and nothing from timing
// Limits       UNITS = H / UNIT_HEADS <= gridDim.x <= C / 8 <= 8 gridDim.x. A block that waits longer than 2 s goes on with what it has.
//              Finite weights: an infinite one gives NaN, as do values above 3.39e38
// Wrapper decode_step.DecodeStep · truth the operations · test tests/test_decode_step.py · benchmark benchmarks/decode.py
#include "common.cuh"
#include "ptx.cuh"

constexpr int L = LAYERS, C = HIDDEN, H = HEADS, K = KV_HEADS, D = HEAD_DIM, F = FFN, HD = H * D, QKV = (H + 2 * K) * D;
constexpr int WARPS = 8, CONSUMERS = 32 * WARPS, ROWS = 8, SEGMENT = 1024, CHUNK = 64;  // more warps would have too few registers
constexpr int OWN = SEGMENT / WARPS, CHUNKS = OWN / CHUNK;  // columns of a warp in a segment, in chunks of one fragment
constexpr int SLOT = ROWS * SEGMENT * 2, PASS = 8, PITCH = 12;  // bytes; tiles between two barriers; floats, conflict-free
constexpr int CH = UNIT_HEADS, UNITS = H / CH, SHARE = CH * D, MAX_SPLITS = 16;
constexpr int LANES = D / 8, KEYS = 32 / LANES, BATCH = (CH == 1 ? 6 : 4) * 2 / sizeof(KV_TYPE);  // lanes of a key, keys a load, loads of a warp at a time
static_assert(H % K == 0 && (H / K) % CH == 0 && C % CHUNK == 0 && HD % CHUNK == 0 && F % CHUNK == 0 && D % 64 == 0 && D <= 128, "");
static_assert(CH + 2 <= WARPS, "");

enum Array { INPUT_NORM, Q_PROJ, K_PROJ, V_PROJ, Q_BIAS, K_BIAS, V_BIAS, Q_NORM, K_NORM, O_PROJ, POST_NORM, GATE, UP, DOWN, ARRAYS };

// The words of each exchange.
constexpr int AFTER_O = 0, AFTER_DOWN = AFTER_O + C, PROJECTED = AFTER_DOWN + C, ATTENDED = PROJECTED + QKV,
              ACTIVATION = ATTENDED + HD, SHARES = ACTIVATION + F, BEST = SHARES + UNITS * MAX_SPLITS * (SHARE + 2 * CH);

__host__ __device__ constexpr int segments(int k) { return (k + SEGMENT - 1) / SEGMENT; }

template <class T> __device__ __forceinline__ const T* array(const u64* table, int layer, Array which) {
    return reinterpret_cast<const T*>(table[layer * ARRAYS + which]);
}

// Groups of 8 rows, dealt out evenly; the layer turns the deal so that no block has the longer end in each.
struct Deal {
    int first, last;
    __device__ Deal(int groups, int turn) {
        const unsigned b = (blockIdx.x + turn) % gridDim.x;
        first = b * groups / gridDim.x, last = (b + 1) * groups / gridDim.x;
    }
    __device__ int size() const { return last - first; }
};

// ------------------------------------------------------------------------------------------------ the ring

struct Ring {
    unsigned char* slots;
    mbarrier *full, *empty;
    int slot = 0;
    unsigned parity = 0;
    int in_flight = IN_FLIGHT;  // frames
    __device__ void next() {
        if (++slot == SLOTS) slot = 0, parity ^= 1;
    }
    // Waits until the frame that was sent `in_flight` frames ago has arrived: what waits for words or keys would queue behind all
    // that is on its way. One frame instead of twelve: 521 us a token instead of 700 (0.6B, H100).
    __device__ void wait_for_landing() const {
        const bool wrapped = slot < in_flight;
        const int earlier = slot - in_flight + (wrapped ? SLOTS : 0);
        while (!mbarrier_try_wait(full + earlier, parity ^ unsigned(wrapped))) {}
    }
};

// Eight rows of a matrix, segment after segment, into the ring. The whole producer warp.
template <int COLUMNS> __device__ __forceinline__ void produce(Ring& ring, const W_TYPE* rows) {
    constexpr int N = segments(COLUMNS);
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int s = 0; s < N; s++) {
        const int columns = N == 1 ? COLUMNS : min(SEGMENT, COLUMNS - s * SEGMENT);
        while (!mbarrier_try_wait(ring.empty + ring.slot, ring.parity ^ 1)) {}
        ring.wait_for_landing();
        unsigned char* slot = ring.slots + ring.slot * SLOT;
        if (lane == 0) mbarrier_arrive_expect(ring.full + ring.slot, ROWS * columns * 2);
        __syncwarp();
        if (N == 1) {  // rows follow one another: one copy, 4 % faster than eight on an H100
            if (lane == 0) bulk_copy(slot, rows, ROWS * COLUMNS * 2, ring.full + ring.slot);
        } else if (lane < ROWS) {
            bulk_copy(slot + lane * SEGMENT * 2, rows + (size_t)lane * COLUMNS + s * SEGMENT, columns * 2, ring.full + ring.slot);
        }
        ring.next();
    }
}

__device__ __forceinline__ const W_TYPE* qkv_rows(const u64* table, int layer, int group) {
    constexpr int Q = HD / ROWS, KV = K * D / ROWS;
    const Array which = group < Q ? Q_PROJ : group < Q + KV ? K_PROJ : V_PROJ;
    const int first = group < Q ? 0 : group < Q + KV ? Q : Q + KV;
    return array<W_TYPE>(table, layer, which) + (size_t)(group - first) * ROWS * C;
}

__device__ void produce_all(Ring& ring, const u64* table, const W_TYPE* lm_head, int V) {
    for (int l = 0; l < L; l++) {
        const Deal qkv(QKV / ROWS, l), vector(C / ROWS, l), ffn(F / ROWS, l);
        for (int g = qkv.first; g < qkv.last; g++) produce<C>(ring, qkv_rows(table, l, g));
        for (int g = vector.first; g < vector.last; g++) produce<HD>(ring, array<W_TYPE>(table, l, O_PROJ) + (size_t)g * ROWS * HD);
        for (int g = ffn.first; g < ffn.last; g++) {
            produce<C>(ring, array<W_TYPE>(table, l, GATE) + (size_t)g * ROWS * C);
            produce<C>(ring, array<W_TYPE>(table, l, UP) + (size_t)g * ROWS * C);
        }
        for (int g = vector.first; g < vector.last; g++) produce<F>(ring, array<W_TYPE>(table, l, DOWN) + (size_t)g * ROWS * F);
    }
    const Deal head(V / ROWS, 0);
    ring.in_flight = HEAD_IN_FLIGHT;  // nobody waits for words here
    for (int g = head.first; g < head.last; g++) produce<C>(ring, lm_head + (size_t)g * ROWS * C);
}

// ----------------------------------------------------------------------------------------------- exchange

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

// ----------------------------------------------------------------------------------------------- products

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

// --------------------------------------------------------------------------------------------- the kernel

struct Shared {
    mbarrier full[SLOTS], empty[SLOTS];
    alignas(16) float part[2][PASS * ROWS * PITCH], squares[2][WARPS];
    unsigned scratch[WARPS][12 * 8];
    u64 table[L * ARRAYS];
    float cos[D / 2], sin[D / 2];
    float query[CH][D], key[D], value[D];
    float merge[WARPS][SHARE], top[CH][WARPS], weight[CH][WARPS];
    u64 best[WARPS];
    int lost, known;  // known: token and position exist
};

#include "decode_attention.cuh"

struct Consumer {
    Shared& shared;
    Ring ring;
    Patience patience;
    int buffer = 0;

    // Opaque, or what each stage derives from them is kept in registers across all the others, and spilled.
    __device__ int warp() const { return opaque(threadIdx.x / 32); }
    __device__ int lane() const { return opaque(threadIdx.x % 32); }

    __device__ void barrier() { named_barrier(1, CONSUMERS); }

    // `tiles` tiles of a matrix times v, at most PASS between two barriers; then finish(first row, rows, sums) with sums[row PITCH].
    template <int COLUMNS, class Finish>
    __device__ __forceinline__ void multiply(const Vector<COLUMNS>& v, int tiles, Finish finish) {
#pragma unroll 1
        for (int t0 = 0; t0 < tiles; t0 += PASS) {
            const int warp = this->warp(), lane = this->lane();
            float* part = shared.part[buffer];
            const int n = min(PASS, tiles - t0);
            int t = 0;
            if (segments(COLUMNS) == 1)  // the latencies of four tiles overlap
#pragma unroll 1
                for (; t + 4 <= n; t += 4) multiply_tiles<COLUMNS, 4>(ring, v, part + t * ROWS * PITCH, warp, lane);
            if (segments(COLUMNS) <= 2)
#pragma unroll 1
                for (; t + 2 <= n; t += 2) multiply_tiles<COLUMNS, 2>(ring, v, part + t * ROWS * PITCH, warp, lane);
#pragma unroll 1
            for (; t < n; t++) multiply_tiles<COLUMNS, 1>(ring, v, part + t * ROWS * PITCH, warp, lane);
            barrier();
            finish(t0 * ROWS, n * ROWS, part);
            buffer ^= 1;  // the next but one pass may write here: everybody is then past the barrier after this one
        }
    }

    // Where the sum of squares of a vector is after the next barrier, from each lane's share of it.
    __device__ __forceinline__ const float* share_squares(int which, float squares) {
        squares = warp_sum(squares);
        if (threadIdx.x % 32 == 0) shared.squares[which][threadIdx.x / 32] = squares;
        return shared.squares[which];
    }

    // Reads a vector of words, or of the embedding where there is one.
    template <int COLUMNS>
    __device__ __forceinline__ float read(Vector<COLUMNS>& v, const float* weight, const u64* words, unsigned tag, const W_TYPE* embedded = nullptr) {
        const int warp = this->warp(), lane = this->lane();
        const int first = warp * OWN + 2 * lane;
        return load_vector<COLUMNS>(v, weight, shared.scratch[warp], warp, lane, [&](int n, auto& x) {
            constexpr int N = sizeof(x) / sizeof(x[0]);
            if (embedded) {
#pragma unroll
                for (int m = 0; m < N; m++)
                    if (has_chunk<COLUMNS>(n + m, warp)) {
                        x[m][0] = shared.known ? to_float(embedded[first + chunk(n + m)]) : NOT_A_NUMBER;
                        x[m][1] = shared.known ? to_float(embedded[first + chunk(n + m) + 1]) : NOT_A_NUMBER;
                    }
                return;
            }
#pragma unroll 1
            for (unsigned tries = 0;; tries++) {
                u64 word[N][2];
                bool ready = true;
#pragma unroll
                for (int m = 0; m < N; m++)
                    if (has_chunk<COLUMNS>(n + m, warp)) load_relaxed2(words + first + chunk(n + m), word[m][0], word[m][1]);
#pragma unroll
                for (int m = 0; m < N; m++)
                    if (has_chunk<COLUMNS>(n + m, warp))
#pragma unroll
                        for (int e = 0; e < 2; e++) {
                            ready &= unsigned(word[m][e] >> 32) == tag;
                            x[m][e] = __uint_as_float(unsigned(word[m][e]));
                        }
                if (ready || (tries % 256 == 255 && patience.over())) return;
            }
        });
    }
};

__device__ __forceinline__ float inverse_rms(const float* squares, float eps) { return inverse_sqrt(sum_warps(squares) / C + eps); }

constexpr int NO_CHOICE = -1;  // in the place of a token id
constexpr unsigned RANK_OF_INFINITY = 0x7f800000u | 0x80000000u;  // of +inf; NaN has a larger one, -inf its complement

// Larger is better: NaN first, then by value, then the lower id.
__device__ __forceinline__ u64 rank(float logit, int id) {
    const unsigned bits = __float_as_uint(logit == 0.0f ? 0.0f : logit);
    const unsigned key = logit != logit ? 0xfffffffeu : bits >> 31 ? ~bits : bits | 0x80000000u;
    return (u64)key << 32 | ~(unsigned)id;
}

__device__ __forceinline__ u64 warp_max(u64 x) {
#pragma unroll
    for (int offset = 16; offset; offset >>= 1) {
        const u64 other = __shfl_xor_sync(0xffffffffu, x, offset);
        x = other > x ? other : x;
    }
    return x;
}

extern "C" __global__ void __launch_bounds__(CONSUMERS + 32, 1)
decode_step(float* __restrict__ logits, int* ids, int* position, const u64* __restrict__ addresses, const W_TYPE* __restrict__ embed,
            const W_TYPE* __restrict__ lm_head, const float* __restrict__ norm, const float* __restrict__ cos,
            const float* __restrict__ sin, KV_TYPE* keys, KV_TYPE* values, u64* words, unsigned* epoch, int V, int n_ids, int S, float eps) {
    DYNAMIC_SHARED(unsigned char, memory);
    Shared& shared = *reinterpret_cast<Shared*>(memory + SLOTS * SLOT);
    const int t = threadIdx.x, warp = t / 32, p = *position, id = *ids;
    const unsigned turn = *epoch;
    const bool known = id >= 0 && id < V && p >= 0 && p < S;
    if (turn == 0 || C / ROWS > PASS * int(gridDim.x)) {
        if (blockIdx.x == 0 && t == 0) ids[0] = NO_CHOICE, ids[1] = 1;
        return;
    }
    if (t == 0) {
        for (int s = 0; s < SLOTS; s++) mbarrier_init(shared.full + s, 1), mbarrier_init(shared.empty + s, WARPS);
        fence_mbarrier_init();
        shared.lost = 0, shared.known = known;
    }
    for (int i = t; i < L * ARRAYS; i += CONSUMERS + 32) shared.table[i] = addresses[i];
    if (t < D / 2) shared.cos[t] = cos[(size_t)(known ? p : 0) * (D / 2) + t], shared.sin[t] = sin[(size_t)(known ? p : 0) * (D / 2) + t];
    __syncthreads();
    const u64* table = shared.table;
    if (warp == WARPS) {
        Ring ring{memory, shared.full, shared.empty};
        produce_all(ring, table, lm_head, V);
        return;
    }
    Consumer me{shared, Ring{memory, shared.full, shared.empty}, Patience{global_timer() + 2000000000ull}};
    const W_TYPE* embedded = embed + (size_t)(known ? id : 0) * C;
    u64 best = 0;

#pragma unroll 1
    for (int l = 0; l < L; l++) {
        const unsigned tag = turn * (L + 1) + l + 1;
        const Deal vector(C / ROWS, l), qkv(QKV / ROWS, l), ffn(F / ROWS, l);
        const int mine = vector.first * ROWS + t;  // this thread's element of the residual stream, if there are so many
        const bool has_element = t < vector.size() * ROWS;
        KV_TYPE *k = keys + (size_t)l * S * K * D, *v = values + (size_t)l * S * K * D;
        {  // norm, projections
            Vector<C> x;
            const float* squares = me.share_squares(0, me.read<C>(x, array<float>(table, l, INPUT_NORM), words + AFTER_DOWN, tag - 1, l ? nullptr : embedded));
            me.multiply<C>(x, qkv.size(), [&](int first, int rows, const float* part) {
                if (t >= rows) return;
                const int r = qkv.first * ROWS + first + t;
                float a = sum_warps(part + t * PITCH) * inverse_rms(squares, eps);
                if (QKV_BIAS) {
                    const Array which = r < HD ? Q_BIAS : r < HD + K * D ? K_BIAS : V_BIAS;
                    a += array<float>(table, l, which)[r < HD ? r : r < HD + K * D ? r - HD : r - HD - K * D];
                }
                publish(words + PROJECTED + r, a, tag);
            });
        }
        attend(me, table, l, known ? p : 0, k, v, words, tag, eps);
        {  // output projection, residual added
            float before = 0.0f;
            if (has_element) before = l ? read_word(words + AFTER_DOWN + mine, tag - 1, me.patience) : known ? to_float(embedded[mine]) : NOT_A_NUMBER;
            Vector<HD> x;
            me.read<HD>(x, nullptr, words + ATTENDED, tag);
            me.multiply<HD>(x, vector.size(), [&](int, int rows, const float* part) {
                if (t < rows) publish(words + AFTER_O + mine, before + sum_warps(part + t * PITCH), tag);
            });
        }
        {  // norm, gate and up, whose tiles take turns
            Vector<C> x;
            const float* squares = me.share_squares(1, me.read<C>(x, array<float>(table, l, POST_NORM), words + AFTER_O, tag));
            me.multiply<C>(x, 2 * ffn.size(), [&](int first, int rows, const float* part) {
                if (t >= rows / 2) return;
                const float scale = inverse_rms(squares, eps), *pair = part + (t / ROWS * 2 * ROWS + t % ROWS) * PITCH;
                const float gate = sum_warps(pair) * scale, up = sum_warps(pair + ROWS * PITCH) * scale;
                publish(words + ACTIVATION + ffn.first * ROWS + first / 2 + t, gate * __fdividef(up, 1.0f + expf(-gate)), tag);
            });
        }
        {  // down, residual added
            float before = 0.0f;
            if (has_element) before = read_word(words + AFTER_O + mine, tag, me.patience);
            Vector<F> x;
            me.read<F>(x, nullptr, words + ACTIVATION, tag);
            me.multiply<F>(x, vector.size(), [&](int, int rows, const float* part) {
                if (t < rows) publish(words + AFTER_DOWN + mine, before + sum_warps(part + t * PITCH), tag);
            });
        }
    }
    {  // norm, logits
        const Deal head(V / ROWS, 0);
        Vector<C> x;
        const float* squares = me.share_squares(0, me.read<C>(x, norm, words + AFTER_DOWN, turn * (L + 1) + L));
        me.multiply<C>(x, head.size(), [&](int first, int rows, const float* part) {
            if (t >= rows) return;
            const int r = head.first * ROWS + first + t;
            const float logit = sum_warps(part + t * PITCH) * inverse_rms(squares, eps);
            logits[r] = logit;
            if (r < n_ids) best = max(best, rank(logit, r));
        });
    }

    const unsigned tag = turn * (L + 1) + L;
    if (me.patience.lost) shared.lost = 1;
    best = warp_max(best);
    if (t % 32 == 0) shared.best[warp] = best;
    me.barrier();
    if (t == 0) {
        for (int w = 1; w < WARPS; w++) best = max(best, shared.best[w]);
        if (shared.lost) best = ~0ull;
        store_relaxed2(words + BEST + 2 * blockIdx.x, (u64)tag << 32 | best >> 32, (u64)tag << 32 | (best & 0xffffffffu));
    }
    if (blockIdx.x || warp) return;
    best = 0;
    for (int b = t; b < int(gridDim.x); b += 32) {
        const u64* const pair[1] = {words + BEST + 2 * b};
        float both[1][2];
        read_pairs<1>(pair, tag, both, me.patience);
        best = max(best, (u64)__float_as_uint(both[0][0]) << 32 | __float_as_uint(both[0][1]));
    }
    best = warp_max(best);
    const bool lost = __any_sync(0xffffffffu, me.patience.lost) || best == ~0ull;
    if (t) return;
    const unsigned key = unsigned(best >> 32);
    ids[0] = lost || key >= RANK_OF_INFINITY || key <= ~RANK_OF_INFINITY ? NO_CHOICE : int(~(unsigned)best);
    if (lost) ids[1] = 1;
    *position = p + 1;
    // After a launch that lost a block nothing is as it should be, and that block may begin only now: it and all later launches end
    // at once, before they leave words that somebody could take for their own.
    *epoch = lost ? 0 : turn + 1;
}
