// decode_step: tokens of one sequence, each chosen by the one before it: whole steps through the network in one launch; the same mathematics
// as the operations, one after another
//
// Entry point  decode_step            always; gridDim.x blocks that must all be resident at once (one a multiprocessor)
// Needs        sm_90
// Arguments    logits    [V]  float32, of the last token
//              ids       [2]  int32: the token to begin with, replaced by the last one chosen, -1 where the logits leave none (NaN, +inf, or all
//                             -inf); and 0 if more may follow, ENDED, or LOST from when a block gave up waiting, after which no launch does anything
//              position  [1]  int32, its position p, 0..S-1; replaced by that of ids[0]. A token or a position that does not exist
//                             gives logits of NaN, no choice and no cached row
//              tokens    [S + 1]  int32, memory of the host: the token chosen for position q appears at q as soon as it is known
//              halt      [1]  int32, memory of the host: not 0 ends the launch after this token or the next
//              ends      [n_ends <= 32]  int32: after one of these tokens nothing follows
//              addresses [L, 14]  addresses of each layer's arrays, in the order of `enum Array`; 0 where a layer has none
//              embed     [V, C], lm_head [V, C]  W_TYPE        norm [C]  float32
//              cos, sin  [P, D/2]  float32, P >= S
//              keys, values  [L, S, K, D]  KV_TYPE; row p of each layer is written
//              key_map, value_map  boxes of FRAME_KEYS rows and 128 bytes of them as [L S, K D] (launch.tensor_map)
//              words     exchange_words() 8-byte words, zero before the first launch and left to this kernel afterwards
//              epoch     [1]  uint32, 1 before the first launch, counted up by each token; 0 once a block gave up
//              V, n_ids, S  int32       eps  float32
//              count     int32, tokens at most, 1 or more      fresh  int32: 0 does nothing if the launch before has ENDED
//              step .. frequency  as of sample.cu, N = n_ids; null and 0 unless SAMPLED
// Constants    LAYERS L, HIDDEN C, HEADS H, KV_HEADS K, HEAD_DIM D (64 or 128), FFN F; C, H D and F multiples of 64, V of 8
//              W_TYPE bf16, KV_TYPE bf16 | f16 | f32, QK_NORM and QKV_BIAS 0 | 1, UNIT_HEADS 1 | 2 query heads that attend together,
//              SEGMENT columns in a frame of weights, of 8 rows up to 1,024, of 4 where there are more (2,048 or 2,560), SLOTS frames in
//              the ring, 4 or more; SAMPLED 0: the arg-max of the logits below n_ids, the lowest id among equals, 1: as sample.cu chooses
// Work         8 consumer warps and one producer warp a block. A matrix is dealt out in tiles of 8 rows, the last of a block
//              often of 4; a block's tiles of a token, and between them its share of the cached keys and values, follow one another in an
//              order that no value decides, so the producer streams them through the ring without a pause at stages or layers, few of them
//              on their way at a time, and on into the next token's while this one is chosen, but in the block that chooses
//              (decode_ring.cuh). A consumer warp owns an eighth of a segment's columns: it waits for just these values of the vector,
//              multiplies all rows by them on the tensor cores, and the 8 partial sums of a row meet in shared memory. In attention two warps
//              have a frame of keys and values (decode_keys.cuh).
// Exchange     between blocks by words {float32 value, tag}: a reader polls the very word that it needs, in one of COPIES
//              of the vectors, and no counter or barrier of the grid exists. Five exchanges a layer (vector, qkv, attention, vector, activation), one
//              more where a head's keys are shared out, one for the choice. A word is written again only after everybody has passed it:
//              each block publishes in each exchange of the vector and in that of the choice, and all wait for all of them. (So the order of
//              two blocks' stores to one word follows from the words in between, relaxed as these are.) Fences: one a
//              token, before the last exchange of the vector, for the new keys and values, which others' bulk copies read for the next
//              token, and those of decode_sampled.cuh.
// Choice       arg-max: every block publishes its best and finds the best of all. SAMPLED: every block looks at the groups of logits that it
//              has computed, and the last block chooses (decode_sampled.cuh).
// Precision    as the operations: float32 everywhere, one rounding where k and v are stored. A float32 factor of a product is the
//              exact sum of three bf16 parts (from 2^-110 on), each multiplied on the tensor cores; the parts are columns of one fragment.
// Error bound  that of the operations
// Traffic      a token: all weights once and 2 L p K D sizeof(KV_TYPE) bytes of cache
// Determinism  fixed order of summation (another with fewer than 6 SLOTS); the split of the keys follows from p, and nothing from
//              timing but after how many tokens `halt` ends
// Limits       UNITS = H / UNIT_HEADS <= W <= C / 4 <= 16 W and 2 <= W, where W is gridDim.x. A block that waits longer than 2 s goes on with what it has.
//              Finite values: an infinite one gives NaN, an infinite weight an infinity or NaN
// Wrapper decode_step.DecodeStep · truth the operations · test tests/test_decode_step.py, test_decode_many.py · benchmark benchmarks/decode.py
#include "common.cuh"
#include "ptx.cuh"

constexpr int L = LAYERS, C = HIDDEN, H = HEADS, K = KV_HEADS, D = HEAD_DIM, F = FFN, HD = H * D, QKV = (H + 2 * K) * D;
constexpr int WARPS = 8, CONSUMERS = 32 * WARPS, ROWS = 8, CHUNK = 64;  // more warps would have too few registers
constexpr int OWN = SEGMENT / WARPS, CHUNKS = OWN / CHUNK;  // columns of a warp in a segment, in chunks of one fragment
constexpr int FRAME_ROWS = SEGMENT > 1024 ? 4 : 8, PARTS = ROWS / FRAME_ROWS;  // of a tile in a frame; frames of a tile's segment
constexpr int SLOT = FRAME_ROWS * SEGMENT * 2, KEY_FRAME = 16 << 10;          // bytes; of a frame of keys and values
constexpr int PASS = 8, PITCH = WARPS;  // tiles between two barriers; floats from row to row
constexpr int CH = UNIT_HEADS, UNITS = H / CH, SHARE = CH * D;
constexpr int KEY_BYTES = D * sizeof(KV_TYPE), FRAME_KEYS = KEY_FRAME / 2 / KEY_BYTES;  // a frame has the keys and the values of so many rows
constexpr int PARTS_PITCH = D / 2 + 16;  // words of a part of a query, so that a warp reads parts from different banks
constexpr int SPLIT_KEYS = 96, MAX_SPLITS = 16;  // blocks that share a head's keys have so many each, or more
static_assert(H % K == 0 && (H / K) % CH == 0 && C % CHUNK == 0 && HD % CHUNK == 0 && F % CHUNK == 0 && D % 64 == 0 && D <= 128, "");
static_assert(CH + 2 <= WARPS && SLOTS >= 4 && FRAME_KEYS % 8 == 0 && OWN % CHUNK == 0 && SLOT >= KEY_FRAME && SLOT % 1024 == 0, "");

enum Array { INPUT_NORM, Q_PROJ, K_PROJ, V_PROJ, Q_BIAS, K_BIAS, V_BIAS, Q_NORM, K_NORM, O_PROJ, POST_NORM, GATE, UP, DOWN, ARRAYS };

// The words of each exchange. CHOSEN: the token and whether it is the last, for each block in a line of its own, BEST: each block's, or that it is
// done, TOPS: of lots.
constexpr int MAX_BLOCKS = 1024, MAX_LOTS = 8192, CHOSEN_PITCH = 16;
constexpr int AFTER_O = 0, AFTER_DOWN = AFTER_O + C, PROJECTED = AFTER_DOWN + C, ATTENDED = PROJECTED + QKV,
              ACTIVATION = ATTENDED + HD, VECTORS = ACTIVATION + F, COPIES = 4, SHARES = COPIES * VECTORS,
              CHOSEN = SHARES + UNITS * MAX_SPLITS * (SHARE + 2 * CH), BEST = CHOSEN + CHOSEN_PITCH * MAX_BLOCKS,
              TOPS = BEST + 2 * MAX_BLOCKS, LOGITS = TOPS + 4 * MAX_LOTS;

__host__ __device__ constexpr int segments(int k) { return (k + SEGMENT - 1) / SEGMENT; }

template <class T> __device__ __forceinline__ const T* array(const u64* table, int layer, Array which) {
    return reinterpret_cast<const T*>(table[layer * ARRAYS + which]);
}

#include "decode_ring.cuh"
#include "decode_vector.cuh"

__device__ __forceinline__ void block_barrier() { named_barrier(1, CONSUMERS); }

#if SAMPLED
// By words, as blocks exchange all else. Called for what is sure to come.
struct Logits {
    const u64* words;
    unsigned tag;
    // out[i] = that of ids[i], -inf from `end` on.
    template <int N> __device__ __forceinline__ void get(const int (&ids)[N], int end, float (&out)[N]) const {
        bool ready = false;
#pragma unroll 1
        while (!ready) {
            u64 word[N];
#pragma unroll
            for (int i = 0; i < N; i++) word[i] = ids[i] < end ? load_relaxed(words + ids[i]) : 0;
            ready = true;
#pragma unroll
            for (int i = 0; i < N; i++) {
                ready &= ids[i] >= end || unsigned(word[i] >> 32) == tag;
                out[i] = ids[i] < end ? __uint_as_float(unsigned(word[i])) : MINUS_INFINITY;
            }
        }
    }
};


#include "sample_draw.cuh"
static_assert(CONSUMERS == sampling::THREADS && MAX_LOTS <= 4 * sampling::GROUPS && sizeof(sampling::Shared) <= SLOTS * SLOT, "");
#endif

struct Shared {
    mbarrier full[SLOTS], empty[SLOTS], next;
    alignas(16) float part[2][PASS * ROWS * PITCH], squares[2][WARPS];
    unsigned scratch[WARPS][3 * 32];
    u64 table[L * ARRAYS];
    float cos[D / 2], sin[D / 2];
    alignas(16) unsigned query_parts[CH][3][PARTS_PITCH];
    float query[CH][D], key[D], value[D];
    float merge[WARPS][SHARE], top[CH][WARPS], weight[CH][WARPS];
    u64 best[2][WARPS];
    int position, left, lost, known, over;  // left: tokens, this one included; known: token and position exist; over: no token follows
    unsigned turn;
    int ends[32];
    Deal head;  // its rows
#if SAMPLED
    int lots;
    sampling::Random random;
#endif
    unsigned halted;
};

#include "decode_attention.cuh"
#include "decode_consumer.cuh"

__device__ __forceinline__ float inverse_rms(const float* squares, float eps) { return inverse_sqrt(sum_warps(squares) / C + eps); }

#include "decode_choice.cuh"

// What the layers of a token have in common.
struct Token {
    int id, position;
    unsigned turn;  // tags of layer l's words are turn (L + 1) + l + 1
    bool known, is_last;
    __device__ unsigned tag(int l) const { return turn * (L + 1) + l + 1; }
};

__device__ __forceinline__ void run_layers(Consumer& me, const Token& token, const u64* table, const W_TYPE* embed, KV_TYPE* keys, KV_TYPE* values,
                                           u64* words, int S, float eps) {
    const int t = threadIdx.x, p = token.known ? token.position : 0;
    const u64* const copy = copy_of(words);
    const W_TYPE* embedded = embed + (size_t)(token.known ? token.id : 0) * C;
#pragma unroll 1
    for (int l = 0; l < opaque(L); l++) {  // or registers are spilled
        const unsigned tag = token.tag(l);
        const Deal qkv = projections(l), vector(C, l, 4), ffn(F, l, 4);
        const int mine = vector.first + t;  // this thread's element of the residual stream, if there are so many
        const bool has_element = t < vector.size();
        KV_TYPE *k = keys + (size_t)l * S * K * D, *v = values + (size_t)l * S * K * D;
        {  // norm, projections
            Vector<C> x;
            const float share = me.read<C>(x, array<float>(table, l, INPUT_NORM), copy + AFTER_DOWN, tag - 1, l ? nullptr : embedded);
            const float* squares = me.share_squares(0, share);
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
        attend(me, table, l, p, k, v, words, tag, eps);
        {  // output projection, residual added
            float before = 0.0f;
            if (has_element)
                before = l ? read_word(copy + AFTER_DOWN + mine, tag - 1, me.patience) : token.known ? to_float(embedded[mine]) : NOT_A_NUMBER;
            Vector<HD> x;
            me.read<HD>(x, nullptr, copy + ATTENDED, tag);
            me.multiply<HD>(x, vector.size(), [&](int, int rows, const float* part) {
                if (t < rows) publish_to_all(words + AFTER_O + mine, before + sum_warps(part + t * PITCH), tag);
            });
        }
        {  // norm, gate and up, whose tiles take turns
            Vector<C> x;
            const float* squares = me.share_squares(1, me.read<C>(x, array<float>(table, l, POST_NORM), copy + AFTER_O, tag));
            me.multiply<C, 2>(x, ffn.size(), [&](int first, int rows, const float* part) {
                if (t >= rows) return;
                const float scale = inverse_rms(squares, eps), *pair = part + (t / ROWS * 2 * ROWS + t % ROWS) * PITCH;
                const float gate = sum_warps(pair) * scale, up = sum_warps(pair + ROWS * PITCH) * scale;
                publish_to_all(words + ACTIVATION + ffn.first + first + t, gate * __fdividef(up, 1.0f + expf(-gate)), tag);
            });
        }
        {  // down, residual added
            float before = 0.0f;
            if (has_element) before = read_word(copy + AFTER_O + mine, tag, me.patience);
            // the new keys and values, for bulk copies of others: these threads publish below
            if (l == L - 1 && t < PASS * ROWS && !token.is_last) __threadfence(), fence_proxy_async_all();
            Vector<F> x;
            me.read<F>(x, nullptr, copy + ACTIVATION, tag);
            me.multiply<F>(x, vector.size(), [&](int, int rows, const float* part) {
                if (t < rows) publish_to_all(words + AFTER_DOWN + mine, before + sum_warps(part + t * PITCH), tag);
            });
        }
    }
}

extern "C" __global__ void __launch_bounds__(CONSUMERS + 32, 1)
decode_step(float* __restrict__ logits, int* ids, int* position, int* tokens, const int* halt, const int* __restrict__ ends,
            const u64* __restrict__ addresses, const W_TYPE* __restrict__ embed, const W_TYPE* __restrict__ lm_head,
            const float* __restrict__ norm, const float* __restrict__ cos, const float* __restrict__ sin, KV_TYPE* keys, KV_TYPE* values,
            const __grid_constant__ TensorMap key_map, const __grid_constant__ TensorMap value_map, u64* words, unsigned* epoch, int V,
            int n_ids, int S, float eps, int n_ends, int count, int fresh, int* step, int* history, unsigned* tops, u64* maxima, double* sums,
            double* relative, const double* uniforms, int shift, int segments, int U, int top_k, double temperature, double inverse,
            double top_p, double min_p, double repetition, double presence, double frequency) {
    DYNAMIC_SHARED(unsigned char, memory);
    Shared& shared = *reinterpret_cast<Shared*>(memory + SLOTS * SLOT);
    const int t = threadIdx.x, first_position = *position;
    const unsigned first_turn = *epoch;
    int id = *ids;
    const bool known = id >= 0 && id < V && first_position >= 0 && first_position < S;
    if (first_turn == 0 || C / ROWS > PASS * int(gridDim.x)) {
        if (blockIdx.x == 0 && t == 0) ids[0] = NO_CHOICE, ids[1] = LOST;
        return;
    }
    if (!fresh && ids[1] == ENDED) return;
    if (t == 0) {
        for (int s = 0; s < SLOTS; s++) mbarrier_init(shared.full + s, 1), mbarrier_init(shared.empty + s, WARPS);
        mbarrier_init(&shared.next, 1);
        fence_mbarrier_init();
#if SAMPLED
        shared.lots = in_lots(tops, history, V);
        const int unit = shared.lots ? ROWS : 1 << shift;  // whole groups of sample.cu
#else
        constexpr int unit = ROWS;
#endif
        shared.head = Deal(V, 0, unit);
        shared.lost = 0, shared.over = 0, shared.known = known, shared.position = first_position, shared.turn = first_turn, shared.left = count;
    }
    if (t < 32) shared.ends[t] = t < n_ends ? ends[t] : NO_CHOICE;
    for (int i = t; i < L * ARRAYS; i += CONSUMERS + 32) shared.table[i] = addresses[i];
    const auto turn_by = [&](int p) {
        if (t < D / 2) shared.cos[t] = cos[(size_t)p * (D / 2) + t], shared.sin[t] = sin[(size_t)p * (D / 2) + t];
    };
    turn_by(known ? first_position : 0);
    __syncthreads();
    Ring ring{memory, shared.full, shared.empty, &shared.next, &shared.over};
    if (t >= CONSUMERS) {
#pragma unroll 1
        for (int n = 0; n < count && !ring.is_over(); n++) {
            const int p = first_position + n;
            produce_layers(ring, n, shared.table, (n ? p < S : known) ? p : 0, &key_map, &value_map, S);
            produce_head(ring, lm_head, shared.head);
        }
        for (int frames = 1; frames <= SLOTS; frames++) ring.wait_for_landing(frames);  // not in a block that has ended
        return;
    }
    Consumer me{shared, ring, Patience{}};
#if SAMPLED
    const auto inputs = [&](unsigned tag) {
        const sampling::Settings set = {temperature, inverse, top_p, min_p, repetition, presence, frequency, top_k < n_ids ? top_k : 0};
        return sampling::Inputs{set, {words + LOGITS, tag}, step, history, tops, maxima, sums, relative, uniforms, n_ids, shift, segments, U};
    };
#endif

#pragma unroll 1
    while (true) {
        const Token token{id, shared.position, shared.turn, bool(shared.known), shared.left == 1};
        me.patience.deadline = global_timer() + 2000000000ull;
        run_layers(me, token, shared.table, embed, keys, values, words, S, eps);
        const unsigned tag = token.tag(L - 1);
#if SAMPLED
        if (t == 0 && chooses()) shared.random = sampling::Random(inputs(tag)), shared.halted = load_host(halt);
#else
        u64 best = 0;
        const int halted = blockIdx.x == 0 && t == 0 ? load_host(halt) : 0;  // some microseconds before it is looked at
#endif
        {  // norm, logits
            const Deal head = shared.head;
            Vector<C> x;
            const float* squares = me.share_squares(0, me.read<C>(x, norm, copy_of(words) + AFTER_DOWN, tag));
            if (me.patience.lost) shared.lost = 1;
            if (!token.is_last) __threadfence();  // this block has heard of everybody's new keys and values
            me.barrier();
            if (t == 0 && !token.is_last && !chooses()) mbarrier_arrive(&shared.next);
            if (!token.is_last && token.position + 1 < S) turn_by(token.position + 1);
            if (t == CONSUMERS - 1) shared.known = token.position + 1 < S;
            me.multiply<C>(x, head.size(), [&](int first, int rows, const float* part) {
                if (t >= PASS * ROWS) return;
                const int r = head.first + first + t;
                float logit = 0.0f;
                if (t < rows) logits[r] = logit = sum_warps(part + t * PITCH) * inverse_rms(squares, eps);
#if SAMPLED
                if (t < rows) publish(words + LOGITS + r, logit, tag);
                if (shared.lots) publish_lot(words, first / LOT, tag, t < rows && r < n_ids, logit, shared.lost);
#else
                if (t < rows && r < n_ids) best = max(best, rank(logit, r));
#endif
            });
        }
#if SAMPLED
        const Chosen chosen = choose_token(shared, me.patience, inputs(tag), V, words);
#else
        const Chosen chosen = choose_token(me, best, words, tag, halted);
#endif
        id = chosen.lost ? NO_CHOICE : chosen.id;
        const bool over = chosen.halted || id == NO_CHOICE || __any_sync(0xffffffffu, id == shared.ends[t % 32]);
        const bool ends_here = over || shared.left == 1;
        if (blockIdx.x == 0 && t == 0) {
            const int next = shared.position + 1;
            if (next > 0 && next <= S) store_host(tokens + next, id);
            if (ends_here) {
                ids[0] = id, ids[1] = chosen.lost ? LOST : over ? ENDED : 0;
                *position = next;
                // After a launch that lost a block nothing is as it should be, and that block may begin only now: it and all later launches
                // end at once, before they leave words that somebody could take for their own.
                *epoch = chosen.lost ? 0 : shared.turn + 1;
            }
        }
        if (ends_here) break;
        me.barrier();
        if (t == 0) shared.position++, shared.turn++, shared.left--;
        if (t == 0 && chooses()) mbarrier_arrive(&shared.next);
        me.barrier();
    }
    if (t == 0) shared.over = 1;
}
