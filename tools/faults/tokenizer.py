"""Text to tokens and back."""

from faults.table import fault

# fmt: off
TOKENIZER = "cuqwen/tokenizer.py"

fault(
    "half-a-character", TOKENIZER, "self._decoder.decode(self._token_bytes(id))",
    'self._token_bytes(id).decode("utf-8", "replace")', "tokenizer::stream_prints_whole_characters",
)
fault(
    "stream-ends-early", TOKENIZER, 'self._decoder.decode(b"", final=True)', '""',
    "tokenizer::stream_of_malformed_bytes_is_exhaustive",
)
fault(
    "special-tokens-printed", TOKENIZER, " if id not in self._special_ids else None", "",
    "tokenizer::stream_of_random_ids",
)
fault(
    "special-tokens-added", TOKENIZER, "add_special_tokens=False).ids", "add_special_tokens=True).ids",
    "tokenizer::nothing_is_added",
)
fault(
    "last-added-token-lost", TOKENIZER, "*(id + 1 for id in added)", "*added",
    "tokenizer::tokenizer_must_fit_the_embedding",
)
fault(
    "tokenizer-one-id-too-large", TOKENIZER, "tokenizer.n_ids > config.vocab_size:",
    "tokenizer.n_ids > config.vocab_size + 1:", "tokenizer::tokenizer_must_fit_the_embedding",
)
fault(
    "thinking-ignored", TOKENIZER, '["enable_thinking"] = enable_thinking', '["enable_thinking"] = True',
    "tokenizer::thinking_variable",
)
