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
//              key_map, value_map  boxes of FRAME_KEYS rows and 128 bytes of them as [L S, K D] (launch.tensor_map)
//              words     exchange_words() 8-byte words, zero before the first launch and left to this kernel afterwards
//              epoch     [1]  uint32, 1 before the first launch, counted up by each; 0 once a block gave up
//              V, n_ids, S  int32       eps  float32
// Constants    LAYERS L, HIDDEN C, HEADS H, KV_HEADS K, HEAD_DIM D (64 or 128), FFN F; C, H D and F multiples of 64, V of 8
//              W_TYPE bf16, KV_TYPE bf16 | f16 | f32, QK_NORM and QKV_BIAS 0 | 1, UNIT_HEADS query heads that attend together,
//              SLOTS of 16 KB in the ring
// Work         8 consumer warps and one producer warp a block. A matrix is dealt out in tiles of 8 rows, the last of a block
//              often of 4; a block's tiles of a token, and between them its share of the cached keys and values, follow one another in an
//              order that no value decides, so the producer streams them through the ring without a pause at stages or layers,
//              few of them on their way at a time (decode_ring.cuh). A consumer warp owns 128 columns of every 1024: it waits for just these
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
// Limits       UNITS = H / UNIT_HEADS <= gridDim.x <= C / 4 <= 16 gridDim.x. A block that waits longer than 2 s goes on with what it has.
//              Finite weights: an infinite one gives NaN, as do values above 3.39e38
// Wrapper decode_step.DecodeStep · truth the operations · test tests/test_decode_step.py · benchmark benchmarks/decode.py
#include "common.cuh"
#include "ptx.cuh"

constexpr int L = LAYERS, C = HIDDEN, H = HEADS, K = KV_HEADS, D = HEAD_DIM, F = FFN, HD = H * D, QKV = (H + 2 * K) * D;
constexpr int WARPS = 8, CONSUMERS = 32 * WARPS, ROWS = 8, SEGMENT = 1024, CHUNK = 64;  // more warps would have too few registers
constexpr int OWN = SEGMENT / WARPS, CHUNKS = OWN / CHUNK;  // columns of a warp in a segment, in chunks of one fragment
constexpr int SLOT = ROWS * SEGMENT * 2, PASS = 8, PITCH = 12;  // bytes; tiles between two barriers; floats, conflict-free
constexpr int CH = UNIT_HEADS, UNITS = H / CH, SHARE = CH * D;
constexpr int KEY_BYTES = D * sizeof(KV_TYPE), FRAME_KEYS = SLOT / 2 / KEY_BYTES;  // a frame has the keys and the values of so many rows
constexpr int SPLIT_KEYS = 96, MAX_SPLITS = 16;  // blocks that share a head's keys have so many each, or more
constexpr int LOW = 4;  // frames
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

#include "decode_ring.cuh"
#include "decode_vector.cuh"

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

    // `rows` rows of a matrix times v, or of TOGETHER matrices whose tiles take turns, at most PASS tiles between two barriers; then
    // finish(first row, rows, sums) with sums[row PITCH].
    template <int COLUMNS, int TOGETHER = 1, class Finish>
    __device__ __forceinline__ void multiply(const Vector<COLUMNS>& v, int rows, Finish finish) {
        const int tiles = (rows + ROWS - 1) / ROWS * TOGETHER;
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
            const int first = t0 * ROWS / TOGETHER;
            finish(first, min(n * ROWS / TOGETHER, rows - first), part);
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
            const float* __restrict__ sin, KV_TYPE* keys, KV_TYPE* values, const __grid_constant__ TensorMap key_map,
            const __grid_constant__ TensorMap value_map, u64* words, unsigned* epoch, int V, int n_ids, int S, float eps) {
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
        produce_all(ring, table, lm_head, V, known ? p : 0, &key_map, &value_map, S);
        return;
    }
    Consumer me{shared, Ring{memory, shared.full, shared.empty}, Patience{global_timer() + 2000000000ull}};
    const W_TYPE* embedded = embed + (size_t)(known ? id : 0) * C;
    u64 best = 0;

#pragma unroll 1
    for (int l = 0; l < L; l++) {
        const unsigned tag = turn * (L + 1) + l + 1;
        const Deal<ROWS> qkv(QKV, l);
        const Deal<4> vector(C, l), ffn(F, l);
        const int mine = vector.first + t;  // this thread's element of the residual stream, if there are so many
        const bool has_element = t < vector.size();
        KV_TYPE *k = keys + (size_t)l * S * K * D, *v = values + (size_t)l * S * K * D;
        {  // norm, projections
            Vector<C> x;
            const float* squares = me.share_squares(0, me.read<C>(x, array<float>(table, l, INPUT_NORM), words + AFTER_DOWN, tag - 1, l ? nullptr : embedded));
            me.multiply<C>(x, qkv.size(), [&](int first, int rows, const float* part) {
                if (t >= rows) return;
                const int r = qkv.first + first + t;
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
            me.multiply<C, 2>(x, ffn.size(), [&](int first, int rows, const float* part) {
                if (t >= rows) return;
                const float scale = inverse_rms(squares, eps), *pair = part + (t / ROWS * 2 * ROWS + t % ROWS) * PITCH;
                const float gate = sum_warps(pair) * scale, up = sum_warps(pair + ROWS * PITCH) * scale;
                publish(words + ACTIVATION + ffn.first + first + t, gate * __fdividef(up, 1.0f + expf(-gate)), tag);
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
        const Deal<ROWS> head(V, 0);
        Vector<C> x;
        const float* squares = me.share_squares(0, me.read<C>(x, norm, words + AFTER_DOWN, turn * (L + 1) + L));
        me.multiply<C>(x, head.size(), [&](int first, int rows, const float* part) {
            if (t >= rows) return;
            const int r = head.first + first + t;
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
