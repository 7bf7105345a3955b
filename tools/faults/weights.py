"""Weights: what is refused, and what is downloaded."""

from faults.table import TRUTH_UNTIED, fault

# fmt: off
WEIGHTS, HUB = "cuqwen/weights.py", "cuqwen/hub.py"

fault(
    "unexpected-tensor-accepted", WEIGHTS, "if name not in allowed:",
    "if name not in allowed and not name.endswith('.weight'):", "weights::one_error_lists_all_that_differs",
)
fault(
    "transposed-tensor-accepted", WEIGHTS, "tensor.shape != allowed[name]",
    "sorted(tensor.shape) != sorted(allowed[name])", "weights::one_error_lists_all_that_differs",
)
fault(
    "own-lm-head-ignored", WEIGHTS, 'embedding if config.tie_word_embeddings else placed["lm_head.weight"]',
    "embedding", TRUTH_UNTIED,
)
fault(
    "contradicting-lm-head-accepted", WEIGHTS, "    if copy is not None:\n        _check_copy",
    "    if False:\n        _check_copy", "weights::an_lm_head_of_its_own_contradicts_tied_embeddings",
)
fault(
    "nan-in-a-later-chunk", WEIGHTS, "for start, stop in tensor.chunks():", "for start, stop in tensor.chunks()[:1]:",
    "weights::check_finite_names_tensor_count_and_first_index",
)
fault(
    "info-downloads-weights", HUB, 'allow_patterns=["config.json", INDEX_FILE]',
    'allow_patterns=["config.json", INDEX_FILE, "*.safetensors"]', "info::of_a_hub_id_no_weights_are_downloaded",
)
