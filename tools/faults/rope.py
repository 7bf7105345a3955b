"""The rotary table and config.json."""

from faults.table import TRUTH, fault

# fmt: off
ROPE, CONFIG, MODEL = "cuqwen/rope.py", "cuqwen/config.py", "cuqwen/model.py"
YARN_FILE = "cuqwen/yarn.py"
REFUSED, PUBLISHED = "config::what_is_not_computed_is_refused", "config::yarn_as_published"
NEAR_AND_FAR, YARN = "ops::rope_table_is_rounded_once_near_and_far", "yarn::yarn_table"

fault("rope-base", ROPE, "float(theta) **", "10000.0 **", TRUTH)
fault("rope-exponent", ROPE, "/ head_dim)\n", "/ (head_dim - 2))\n", TRUTH)
fault(
    "rope-float32-angles", ROPE, "values = function(angles)", "values = function(angles.astype(np.float32))",
    NEAR_AND_FAR,
)
fault(
    "rope-positions-from-one", ROPE, "np.arange(first, min(first + _BLOCK, length), dtype=np.float64)",
    "np.arange(first + 1, min(first + _BLOCK, length) + 1, dtype=np.float64)", NEAR_AND_FAR,
)
fault(
    "rope-blocks-overlap", ROPE, "table[first : first + _BLOCK] =",
    "table[first - first % 3 : first - first % 3 + len(values)] =", YARN,
)
fault(
    "yarn-scaled-twice", ROPE, "frequencies / scaling.factor * (1 - kept)",
    "frequencies / scaling.factor**2 * (1 - kept)", YARN,
)
fault("yarn-ramp-reversed", ROPE, "return 1 - np.clip(", "return np.clip(", YARN)
fault(
    "yarn-not-truncated", ROPE, "    if yarn.truncate:\n        low, high = math.floor(low), math.ceil(high)\n", "",
    YARN,
)
fault(
    "yarn-attention-factor-dropped", ROPE, "values if scaling is None else values * scaling.attention_factor",
    "values", YARN,
)
fault(
    "yarn-betas-exchanged", ROPE, "pair(yarn.beta_fast), pair(yarn.beta_slow)",
    "pair(yarn.beta_slow), pair(yarn.beta_fast)", YARN,
)
fault(
    "yarn-growth-of-the-paper", YARN_FILE, "return 0.1 * scale * math.log(factor) + 1.0",
    "return 0.1 * scale * math.log(factor)", PUBLISHED,
)
fault(
    "yarn-context-of-the-file", CONFIG,
    "return int(self.rope_scaling.factor * self.rope_scaling.original_max_position_embeddings)",
    "return self.max_position_embeddings", PUBLISHED,
)
fault(
    "yarn-ignored-by-the-model", MODEL, "scaling=c.rope_scaling", "scaling=None", "yarn::context_limits",
    "yarn::config_of_the_network_reaches_the_table",
)
fault(
    "sliding-window-accepted", CONFIG, 'keys.boolean("use_sliding_window") and',
    'keys.boolean("use_sliding_window") and False and', REFUSED,
)
fault("sliding-window-in-the-last-layer", CONFIG, "if first < layers:", "if first < layers - 1:", REFUSED)
fault("rope-scaling-ignored", YARN_FILE, 'in ("rope_parameters", "rope_scaling")', 'in ("rope_parameters",)', REFUSED)
fault("attention-bias-ignored", CONFIG, 'model_type == "qwen3" and keys', 'model_type == "qwen2" and keys', REFUSED)
fault("quantised-accepted", CONFIG, '    "quantization_config": ((None, {}), _UNQUANTISED),\n', "", REFUSED)
fault(
    "rope-base-guessed", YARN_FILE, '        keys.required("rope_theta",',
    '        return 1e4\n        keys.required("rope_theta",', "config::a_missing_key_is_named",
)
fault(
    "end-ids-of-the-wrong-file", CONFIG, "if has_end else config.eos_token_id", "if False else config.eos_token_id",
    "config::generation_config",
)
