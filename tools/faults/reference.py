"""The operations in NumPy."""

from faults.table import ATTENTION_TEST, QKV_TEST, RESIDUAL, SCALES, SCORES, TRUTH, ZERO_ROWS, fault

# fmt: off
REFERENCE = "cuqwen/reference.py"

fault(
    "reference-eps-outside-root", REFERENCE, "np.sqrt(mean_square + float(dtype(eps)))",
    "(np.sqrt(mean_square) + float(dtype(eps)))", SCALES,
)
fault("reference-eps-dropped", REFERENCE, "mean_square + float(dtype(eps))", "mean_square", ZERO_ROWS)
fault("reference-eps-1e-5", REFERENCE, "mean_square + float(dtype(eps))", "mean_square + 1e-5", TRUTH)
fault(
    "reference-head-eps", REFERENCE, "np.sqrt(ms + dtype(eps))[..., None]", "(np.sqrt(ms) + dtype(eps))[..., None]",
    "ops::qk_norm",
)
fault(
    "reference-residual-dropped", REFERENCE, "product if residual is None else product + residual", "product", RESIDUAL,
)
fault(
    "reference-rotation-sign", REFERENCE, "(low * cos - high * sin, high * cos + low * sin)",
    "(low * cos + high * sin, high * cos - low * sin)", QKV_TEST,
)
fault(
    "reference-pairs-interleaved", REFERENCE, "low, high = a[..., :half], a[..., half:]",
    "low, high = a[..., 0::2], a[..., 1::2]", QKV_TEST,
    also=[
        ("np.concatenate((low * cos - high * sin, high * cos + low * sin), axis=-1)",
         "np.stack((low * cos - high * sin, high * cos + low * sin), axis=-1).reshape(a.shape)"),
    ],
)
fault(
    "reference-gain-after-rope", REFERENCE,
    "        if gain is not None:\n            a = a * gain.astype(dtype, copy=False)\n", "", TRUTH,
    also=[
        ("return np.concatenate((low * cos - high * sin, high * cos + low * sin), axis=-1)",
         "a = np.concatenate((low * cos - high * sin, high * cos + low * sin), axis=-1)\n"
         "        return a if gain is None else a * gain.astype(dtype, copy=False)"),
    ],
)
fault("reference-k-gain-dropped", REFERENCE, "rotate(k, k_norm)", "rotate(k, None)", TRUTH)
fault(
    "reference-mean-square-of-gained", REFERENCE, "for a in (q, k)]",
    "for a in (q if q_norm is None else q * q_norm, k if k_norm is None else k * k_norm)]", TRUTH,
)
fault(
    "reference-rows-ignored", REFERENCE, "out[... if rows is None else rows]",
    "out[... if rows is None else slice(len(rows))]", "model::a_prompt_fed_whole_equals_the_prompt_fed_in_pieces",
)
fault("reference-sees-the-future", REFERENCE, "<= at[:, None]", "<= at[:, None] + 1", ATTENTION_TEST)
fault("reference-misses-itself", REFERENCE, "<= at[:, None]", "< np.maximum(at, 1)[:, None]", ATTENTION_TEST)
fault("reference-scale", REFERENCE, " * dtype(dim**-0.5)", "", ATTENTION_TEST)
fault(
    "reference-group-mapping", REFERENCE, "reshape(len(at), k.shape[0], -1, dim).transpose(1, 2, 0, 3)",
    "reshape(len(at), -1, k.shape[0], dim).transpose(2, 1, 0, 3)", TRUTH,
    also=[(".transpose(2, 0, 1, 3)", ".transpose(2, 1, 0, 3)")],
)
fault(
    "reference-without-maximum", REFERENCE, "        scores -= scores.max(axis=-1, keepdims=True)\n", "", SCORES,
    "model::kernels_compute_what_the_reference_computes[emulated-tied_redundant_head]",
)
fault(
    "reference-block-positions", REFERENCE, "positions[first : first + block]", "positions[:block][: tokens - first]",
    "transformers::a_prompt_cut_short_has_the_same_logits[numpy-head_128-float64]",
    "api::the_whole_context_of_the_demo",
)
fault(
    "reference-always-float32", REFERENCE, "np.float64 if x.dtype == np.float64 else np.float32", "np.float32",
    "ops::float64_is_float64_throughout",
)
fault("reference-silu-sign", REFERENCE, "np.exp(-gate)", "np.exp(gate)", "ops::silu_mul")
fault(
    "reference-product-tail", REFERENCE, "range(0, len(weight), rows)",
    "range(0, max(1, len(weight) - rows + 1), rows)", "ops::matmul",
    "transformers::256_greedy_tokens_of_the_demo_are_the_golden_ones",
)
