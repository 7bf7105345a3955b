"""The layers, the cache, and single tokens by recorded launches."""

from faults.table import BOTH_SIDES, GIVES_UP, PIECES, TRUTH, TRUTH_BIAS, TRUTH_EPS, TRUTH_UNTIED, bf16, fault

# fmt: off
MODEL, CACHE, DECODE = "cuqwen/model.py", "cuqwen/cache.py", "cuqwen/decode.py"
CHUNKS, RECORDED = "model::a_prompt_is_read_in_chunks", "model::recorded_steps_equal_single_launches"

fault("model-attention-residual-dropped", MODEL, "layer.o_proj, residual=x, out=x)", "layer.o_proj, out=x)", TRUTH)
fault(
    "model-mlp-residual-twice", MODEL, "layer.down_proj, residual=x, out=x)", "layer.down_proj, residual=x + x, out=x)",
    TRUTH,
)
fault(
    "model-last-layer-skipped", MODEL, "in enumerate(weights.layers):\n            keys",
    "in enumerate(weights.layers[:-1]):\n            keys", TRUTH,
)
fault("model-one-norm-for-both", MODEL, "layer.post_attention_layernorm, eps", "layer.input_layernorm, eps", TRUTH)
fault("model-eps-fixed", MODEL, "self.weights, self.config.rms_norm_eps", "self.weights, 1e-6", TRUTH_EPS)
fault("model-head-eps-default", MODEL, "None else self.config.rms_norm_eps, out", "None else 1e-6, out", TRUTH_EPS)
fault("model-bias-dropped", MODEL, "k_bias=layer.k_bias", "k_bias=None", TRUTH_BIAS)
fault(
    "model-k-rounded-before-norm", "kernels/qkv_rope_mma.cuh", "low[e] *= scale, high[e] *= scale;",
    f"low[e] = {bf16('low[e]')} * scale, high[e] = {bf16('high[e]')} * scale;", "model::k_is_rounded_once",
)
fault("model-positions-restart", MODEL, "self.positions[start:stop]", "self.positions[: len(ids)]", PIECES)
fault("model-length-not-advanced", MODEL, "        cache.length = stop\n", "", PIECES)
fault(
    "model-length-advanced-too-early", MODEL, "        cache.length = stop\n", "",
    "model::a_failure_inside_a_step_leaves_the_sequence_as_it_was",
    also=[("        logits = self.step(", "        cache.length = stop\n        logits = self.step(")],
)
fault("model-one-cache-for-all-layers", MODEL, "cache.layer(index)", "cache.layer(0)", PIECES)
fault(
    "model-gate-and-up-swapped", MODEL, "(h, layer.gate_proj, layer.up_proj,", "(h, layer.up_proj, layer.gate_proj,",
    TRUTH,
)
fault(
    "model-final-norm-dropped", MODEL, "ops.matmul(ops.rmsnorm(x, weights.norm, eps), weights.lm_head",
    "ops.matmul(x, weights.lm_head", TRUTH,
)
fault("model-rope-base-fixed", MODEL, "length, c.rope_theta,", "length, 1e6,", TRUTH_UNTIED)
fault(
    "model-lm-head-on-the-first-row", MODEL, "x, h, space = x[first:], h[first:], space.rows(first, len(ids))",
    "x, h, space = x[:rows], h[:rows], space.rows(0, rows)", "api::greedy_is_the_argmax_of_the_logits", CHUNKS,
)
fault(
    "model-residual-of-another-row", MODEL, "x, h, space = x[first:], h[first:],",
    "x, h, space = x[:rows], h[first:],", CHUNKS,
)
fault(
    "model-stale-keys", MODEL, "positions, rows=positions,\n", "positions, rows=positions - positions[0],\n", PIECES,
)
fault(
    "decoder-position-one-behind", DECODE, "positions[self.cache.length :]", "positions[self.cache.length - 1 :]",
    RECORDED,
)
fault("decoder-length-not-advanced", DECODE, "        self.cache.length += 1\n", "", RECORDED)
fault("decoder-table-freed", DECODE, "self.model.cos", "None", RECORDED)
fault(
    "decoder-position-never-sent", DECODE, "self.next_position = -1 if portable else self.cache.length",
    "self.next_position = self.cache.length",
    RECORDED,
)
fault(
    "decoder-position-never-sent-again", DECODE, "if self.cache.length != self.next_position:",
    "if self.next_position < 0:", "decode_step::decoder_continues_what_it_has_not_written",
)
fault(
    "decoder-choice-not-recorded", DECODE,
    "if self.choice is not None:\n            self.choice(logits, self.ids)\n        return logits\n\n\n",
    "return logits\n\n\n",
    BOTH_SIDES,
)
fault(
    "choice-beyond-the-tokenizer", DECODE, "sample(logits[0, : self.n_ids],", "sample(logits[0],",
    "api::ids_without_a_token_are_never_drawn",
)
fault(
    "no-choice-taken-for-a-token", DECODE, "if token < 0:", "if False:",
    "sample::broken_weights_are_refused_on_the_device_too",
)
fault(
    "nan-chosen-as-a-token", DECODE, "if not np.isfinite(float(row[int(ids[0])])):", "if False:",
    "sample::broken_weights_are_refused_on_the_device_too",
)
fault("loss-of-a-block-not-told", DECODE, "if status == LOST:", "if False:", GIVES_UP)
fault(
    "cache-keys-are-values", CACHE, "self.keys, self.values = empty(shape, dtype), empty(shape, dtype)",
    "self.keys = self.values = empty(shape, dtype)", TRUTH,
)
fault(
    "cache-half-the-bytes", CACHE, "return 2 * config", "return config",
    "model::bytes_per_token_are_those_of_the_cache",
)
