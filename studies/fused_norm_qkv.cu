// fused_norm_qkv: RMSNorm, QKV projection, Q/K norm and RoPE in one launch - the attempt that came before this package
//
//     h[c]    = H(x[t, c] / sqrt(mean_c(x[t, c]^2) + eps) input_layernorm[c])         H, A, O: a rounding each, to
//     a[h, d] = A(sum_c h[c] proj[h D + d, c])                       for q, k and v   H_TYPE, A_TYPE and OUT_TYPE
//     n[h, d] = a[h, d] / sqrt(mean_d(a[h, d]^2) + eps) gain[d]      for q and k
//     out[h, d]       = O(n[h, d] cos[p, d] - n[h, d + D/2] sin[p, d])          d < D/2, p = positions[t]
//     out[h, d + D/2] = O(n[h, d + D/2] cos[p, d] + n[h, d] sin[p, d])
//     out[h, d]       = a[h, d]                                      for v
//
// It stands here to be measured, not to be used: no wrapper of the package reaches it. What made the attempt is the
// types. With H_TYPE = A_TYPE = OUT_TYPE = bf16, the storage type, the normalised input and the projections stay on the
// chip and are bf16 there, and the statistics of the Q/K norm are those of the rounded projections, in the same pass. With
// all three f32 it is the same launch and the same fusion with float32 at each boundary.
//
// Entry point  fused_norm_qkv_row     always
// Arguments    q                [T, H, D]  OUT_TYPE;   k, v  [T, K, D]  OUT_TYPE
//              x                [T, C]     float32, the residual stream
//              input_layernorm  [C]        float32
//              q_proj           [H D, C],  k_proj, v_proj  [K D, C]  W_TYPE, the checkpoint's layout
//              q_norm, k_norm   [D]        float32 gains
//              cos, sin         [P, D/2]   float32
//              positions        [T]        int32, in 0..P-1
//              H, K             int32
//              eps              float32, of all norms
// Constants    W_TYPE, H_TYPE, A_TYPE, OUT_TYPE  bf16 | f16 | f32      HIDDEN  C, any from 1 to what shared memory holds
//              HEAD_DIM  D, even, from 2 to 256
// Work         block = one head of one token, 256 threads, a warp a dot product; grid (T, H + 2 K);
//              C sizeof(H_TYPE) + D sizeof(A_TYPE) + 128 bytes of shared memory. Each block normalises its token again
// Precision    statistics, products, sums, gain and rotation in float32, rounded at H, A and O. One rounding each is the
//              kindest reading: the weight of a norm is applied before the norm's result is rounded
// Error bound  none promised
// Traffic      (H + 2 K) D C sizeof(W_TYPE) bytes of weights for each token, most of them from L2; 2 T (H + 2 K) D C FLOP
// Determinism  fixed order of summation; a row's result does not depend on the other rows
// Wrapper variants.Fused · truth tests/truth.py · measured by studies/precision.py, told in docs/precision.md
#include "common.cuh"

constexpr int C = HIDDEN, D = HEAD_DIM;

extern "C" __global__ void __launch_bounds__(256)
fused_norm_qkv_row(OUT_TYPE* __restrict__ q, OUT_TYPE* __restrict__ k, OUT_TYPE* __restrict__ v,
                   const float* __restrict__ x, const float* __restrict__ input_layernorm,
                   const W_TYPE* __restrict__ q_proj, const W_TYPE* __restrict__ k_proj,
                   const W_TYPE* __restrict__ v_proj, const float* __restrict__ q_norm,
                   const float* __restrict__ k_norm, const float* __restrict__ cos, const float* __restrict__ sin,
                   const int* __restrict__ positions, int H, int K, float eps) {
    __shared__ H_TYPE h[C];
    __shared__ A_TYPE a[D];
    __shared__ float scratch[32];
    const int t = blockIdx.x, head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    // which of the three: blocks (·, 0..H-1) make q, the next K make k, the last K make v
    const bool is_q = head < H, is_v = head >= H + K;
    const int index = is_q ? head : is_v ? head - H - K : head - H;
    const W_TYPE* proj = (is_q ? q_proj : is_v ? v_proj : k_proj) + (size_t)index * D * C;
    OUT_TYPE* out = (is_q ? q : is_v ? v : k) + ((size_t)t * (is_q ? H : K) + index) * D;

    // RMSNorm, into shared memory in the storage type
    x += (size_t)t * C;
    float squares = 0.0f;
    for (int c = threadIdx.x; c < C; c += 256) squares = fmaf(x[c], x[c], squares);
    const float scale = 1.0f / sqrtf(block_sum(squares, scratch) / C + eps);
    for (int c = threadIdx.x; c < C; c += 256) store(h + c, x[c] * scale * input_layernorm[c]);
    __syncthreads();

    // the head's D projections, handed on in the storage type
    for (int d = warp; d < D; d += 8) {
        const W_TYPE* w = proj + (size_t)d * C;
        float sum = 0.0f;
        for (int c = lane; c < C; c += 32) sum = fmaf(to_float(h[c]), to_float(w[c]), sum);
        sum = warp_sum(sum);
        if (lane == 0) store(a + d, sum);
    }
    __syncthreads();

    const int d = threadIdx.x;
    if (is_v) {
        if (d < D) store(out + d, to_float(a[d]));
        return;
    }

    // Q/K norm of what was handed on, gain, rotation
    const float b = d < D ? to_float(a[d]) : 0.0f;
    const float head_scale = 1.0f / sqrtf(block_sum(b * b, scratch) / D + eps);
    if (d >= D / 2) return;
    const float* gain = is_q ? q_norm : k_norm;
    const float low = b * head_scale * gain[d], high = to_float(a[d + D / 2]) * head_scale * gain[d + D / 2];
    const size_t angle = (size_t)positions[t] * (D / 2) + d;
    store(out + d, low * cos[angle] - high * sin[angle]);
    store(out + d + D / 2, high * cos[angle] + low * sin[angle]);
}
