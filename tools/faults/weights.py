"""Weights: what is refused, and what is downloaded."""

from faults.table import TRUTH_UNTIED, fault

# fmt: off
WEIGHTS, CHECKPOINT, STAGING, HUB = (f"cuqwen/{name}.py" for name in ("weights", "checkpoint", "staging", "hub"))

fault(
    "unexpected-tensor-accepted", CHECKPOINT, "if name not in allowed:",
    "if name not in allowed and not name.endswith('.weight'):", "weights::one_error_lists_all_that_differs",
)
fault(
    "transposed-tensor-accepted", CHECKPOINT, "tensor.shape != allowed[name]",
    "sorted(tensor.shape) != sorted(allowed[name])", "weights::one_error_lists_all_that_differs",
)
fault(
    "own-lm-head-ignored", WEIGHTS, 'embedding if config.tie_word_embeddings else tensors["lm_head.weight"]',
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
fault(
    "sent-piece-at-its-tensor", STAGING, "sender.send(array, at, len(memory))", "sender.send(array, 0, len(memory))",
    "weights::reserved_tensors_are_filled",
)
fault(
    "sent-buffers-not-awaited", STAGING, "        self._stream.synchronize()\n", "",
    "weights::a_buffer_is_locked_once_and_unlocked",
)
fault(
    "buffers-stay-locked", STAGING, "            sender.close()\n", "            pass\n",
    "weights::reserved_tensors_are_filled",
)
fault(
    "reading-goes-on-after-an-error", STAGING, "        self._stop.set()\n", "",
    "weights::no_thread_goes_on_when_somebody_stops_it",
)
fault(
    "short-file-read-as-it-is", CHECKPOINT, "    if filled < len(memory):", "    if False:",
    "weights::a_file_that_becomes_shorter_while_it_is_read",
)
