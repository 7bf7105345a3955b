"""The loop of an answer: stop strings, end tokens, limits."""

from faults.table import BOTH_SIDES, fault

# fmt: off
GENERATE = "cuqwen/generate.py"
STOPS = "api::stop_strings_cut_at_each_offset"

fault("stop-held-back-too-little", GENERATE, "len(stop) - 1), 0, -1)", "len(stop) - 2), 0, -1)", STOPS)
fault("stop-cut-one-late", GENERATE, "self.pending[: min(found)]", "self.pending[: min(found) + 1]", STOPS)
fault(
    "stop-first-named-wins", GENERATE, "self.pending[: min(found)]", "self.pending[: found[0]]",
    "api::two_stop_strings_completed_by_one_token",
)
fault("stop-rest-lost", GENERATE, "tail + stops.finish()", "tail", "api::held_back_text_is_released_at_the_end")
fault(
    "end-ids-ignored", GENERATE, "count == max_tokens, token in end_ids", "count == max_tokens, False",
    "api::end_ids_of_generation_config",
)
fault(
    "end-id-only-the-first", GENERATE, "count == max_tokens, token in end_ids", "count == max_tokens, token == end_ids[0]",
    "api::end_ids_of_generation_config",
)
fault(
    "end-token-printed", GENERATE, '"" if ended else stream.push(token)', "stream.push(token)",
    "api::end_ids_of_generation_config",
)
fault("one-token-too-few", GENERATE, "count == max_tokens, token", "count >= max_tokens - 1, token", "api::max_tokens")
fault(
    "unfinished-character-lost", GENERATE, "stops.push(stream.finish())", 'stops.push("")',
    "api::a_character_that_stays_incomplete_is_shown_at_the_end",
)
fault(
    "token-of-the-step-ahead", "cuqwen/decode.py", "token = choice.check(read_this(), logits)",
    "token = choice.check(read(), logits)",
    BOTH_SIDES,
)
