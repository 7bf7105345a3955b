// qk_norm: q_out = q / sqrt(q_ms + eps),  k_out = k / sqrt(k_ms + eps), one scalar a head
//
// What is left of Qwen3's per-head RMSNorm after qkv_rope: the gain was applied there, before the rotation, and the
// rotation keeps a head's mean square, so the scalar may follow it.
//
// Entry point  qk_norm                always
// Arguments    q_out  [T, H, D]  Q_TYPE; may be q where Q_TYPE is f32
//              k_out  [T, K, D]  K_TYPE; may be k where K_TYPE is f32. With rows: [S, K, D], the keys of a cache
//              q      [T, H, D]  float32, rotated and gained;      k     [T, K, D]  float32, likewise
//              q_ms   [T, H]     float32, mean square of the un-gained head;  k_ms  [T, K]  float32, likewise
//              rows   [T]        int32, or null: k of token t goes to row rows[t] of k_out instead of row t; one outside
//                                0..S-1 is not stored
//              H, K, D, S        int32
//              eps               float32
// Constants    Q_TYPE            bf16 | f32
//              K_TYPE            bf16 | f16 | f32
// Work         warp = one head of one token, 128 threads; grid (T, (H + K) / 4); no shared memory
// Precision    float32; one rounding when q or k is stored narrower
// Error bound  4 eps32 relative, before the final rounding
// Traffic      T D ((4 + sizeof(Q_TYPE)) H + (4 + sizeof(K_TYPE)) K) bytes, T D (H + K) FLOP
// Determinism  elementwise
// Wrapper cuda.qk_norm · truth reference.qk_norm · test tests/test_ops.py · benchmark benchmarks/ops.py
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(128)
qk_norm(Q_TYPE* q_out, K_TYPE* k_out, const float* q, const float* k, const float* q_ms,
        const float* k_ms, const int* __restrict__ rows, int H, int K, int D, int S, float eps) {
    const int t = blockIdx.x, h = 4 * blockIdx.y + threadIdx.x / 32;
    const bool is_q = h < H;
    const size_t head = is_q ? (size_t)t * H + h : (size_t)t * K + h - H;
    const int row = rows ? rows[t] : t;
    const size_t k_head = (size_t)row * K + h - H;
    if (h >= H + K || (!is_q && rows && (row < 0 || row >= S))) return;
    wait_for_launches_before();
    const float scale = 1.0f / sqrtf((is_q ? q_ms : k_ms)[head] + eps);
    const float* const from = (is_q ? q : k) + head * D;
    for (int first = threadIdx.x % 32; first < D; first += 128) {
        float x[4];  // all on their way before the first is stored, maybe to the same array
#pragma unroll
        for (int i = 0; i < 4; i++) x[i] = first + 32 * i < D ? from[first + 32 * i] : 0.0f;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int d = first + 32 * i;
            if (d >= D) break;
            if (is_q) store(q_out + head * D + d, x[i] * scale);
            else store(k_out + k_head * D + d, x[i] * scale);
        }
    }
}
