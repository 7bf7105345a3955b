"""What a wrapper passes to a kernel, and what it refuses."""

from faults.table import ATTENTION_TEST, QKV_TEST, fault

# fmt: off
CUDA, OPS = "cuqwen/cuda.py", "cuqwen/ops.py"

fault("launch-scale", CUDA, "dim**-0.5 / np.log(2)), *scratch)", "dim**-1 / np.log(2)), *scratch)", ATTENTION_TEST)
fault("launch-last-block", CUDA, "return -(-n // size)", "return max(1, n // size)", "ops::matmul")
fault(
    "launch-one-head-too-few", CUDA, '"qkv_rope_tile", types, (_blocks(tokens, 32), heads + 2 * kv_heads)',
    '"qkv_rope_tile", types, (_blocks(tokens, 32), heads + 2 * kv_heads - 1)', QKV_TEST,
)
fault(
    "launch-rows-without-a-name", CUDA, "target = None if out[1] is None else rows", "target = rows",
    "ops::rows_count_only_for_what_out_names",
)
fault(
    "launch-eps-default", CUDA, "np.int32(width), np.float32(eps))", "np.int32(width), np.float32(1e-6))",
    "model::kernels_compute_what_the_reference_computes[emulated-head_64_large_eps]",
)
fault(
    "views-accepted", OPS, "if self.backend is cuda and not array.flags.c_contiguous:", "if False:",
    "ops::refusals_that_only_kernels_make",
)
fault("heads-unchecked", OPS, "heads == 0 or heads % kv_heads:", "heads == 0:", "ops::refusals")
fault(
    "misaligned-cache-accepted", OPS, "is cuda and launch.address(array) % 16:", "is cuda and False:",
    "ops::refusals_that_only_kernels_make",
)
fault("negative-eps-accepted", OPS, "if not 0 <= eps <", "if not -1 <= eps <", "ops::refusals")
