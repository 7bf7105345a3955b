"""What an answer keeps for the next one: the cache, the recordings, and logprobs on the way."""

from faults.table import fault

# fmt: off
API, CACHE = "cuqwen/api.py", "cuqwen/cache.py"
GENERATE, DECODE = "cuqwen/generate.py", "cuqwen/decode.py"
ONCE, DIFFERS = "reuse::a_chat_reads_each_token_once[cpu]", "reuse::what_differs_is_read[cpu-17]"
GROWS = "reuse::a_cache_grows_with_its_texts"
SAMPLED = "{'temperature': 0.7, 'top_k': 20, 'repetition_penalty': 1.2}"
AGAIN_CPU, AGAIN_EMULATED, AGAIN_GREEDY = (
    f"reuse::an_answer_like_the_last_one_records_nothing_anew[{case}]"
    for case in (f"cpu-{SAMPLED}", f"emulated-{SAMPLED}", "emulated-{}")
)

fault(
    "cache-take-forgets-values", CACHE,
    "for target, source in ((self.keys, other.keys), (self.values, other.values)):",
    "for target, source in ((self.keys, other.keys),):", f"{GROWS}[cpu]",
)
fault(
    "cache-take-one-row-less", CACHE, "copy(target[index, :rows], source[index, :rows])",
    "copy(target[index, : rows - 1], source[index, : rows - 1])", f"{GROWS}[emulated]",
)
fault(
    "reuse-one-token-too-many", GENERATE, "return next(i for i in range(count) if self.ids[i] != prompt[i])",
    "return 1 + next(i for i in range(count) if self.ids[i] != prompt[i])", DIFFERS,
)
fault(
    "reuse-rows-not-computed", GENERATE, "min(self.cache.length, len(self.ids), len(prompt))",
    "min(len(self.ids), len(prompt))", ONCE,
)
fault(
    "reuse-too-few-tokens-read-again", GENERATE, "else cuda.FEW_ROWS + 1", "else cuda.FEW_ROWS",
    "reuse::the_last_tokens_are_always_read[emulated]",
)
fault("reuse-ids-of-the-answer-lost", GENERATE, "            sequence.ids.append(token)\n", "", ONCE)
fault(
    "reuse-rows-of-another-text", GENERATE, "cache.length, self.ids = shared, list(prompt)",
    "cache.length, self.ids = min(cache.length, len(prompt) - least), list(prompt)", DIFFERS,
)
fault(
    "reuse-more-memory-than-planned", GENERATE, "or old.capacity + capacity > self.limit:", "or False:",
    "reuse::no_more_memory_than_planned_while_a_cache_grows[cpu]",
)
fault(
    "reuse-decoder-of-the-old-cache", GENERATE, "old, self.decoder, self.short_prompts = cache, None, None",
    "old = cache", f"{GROWS}[emulated]",
)
fault(
    "reuse-streams-share-a-text", API, "sequence = self._kept.pop() if self._kept else",
    "sequence = self._kept[0] if self._kept else", "reuse::streams_that_alternate_have_a_text_each[cpu]",
)
fault(
    "reuse-nothing-after-a-close", API,
    "        finally:\n            if self._network is not None:\n                self._kept[:] = [sequence]",
    "        else:\n            if self._network is not None:\n                self._kept[:] = [sequence]",
    "reuse::streams_that_end_early[cpu]",
)
fault(
    "reuse-after-a-lost-device", API, "            sequence.drop()\n", "            pass\n",
    "reuse::nothing_is_kept_after_a_lost_device[cpu]",
)
fault(
    "choice-draws-the-same-again", DECODE,
    "            self.model.device.copy(self.state[name], self.model.device.upload(array))\n", "            pass\n",
    AGAIN_CPU,
)
fault("choice-kept-for-other-rules", DECODE, "if _rules(sampling) != self.rules or", "if", AGAIN_GREEDY)
fault("choice-more-tokens-than-room", DECODE, " or max_tokens > self.room:", ":", AGAIN_CPU, AGAIN_EMULATED)
fault(
    "decoder-keeps-the-other-choice", DECODE, "self.choice, self.recording, self.eager_steps = choice, None, 0",
    "self.choice = choice", AGAIN_GREEDY,
)
fault(
    "logprobs-after-the-temperature", GENERATE, "row -= top + np.log(np.exp(row - top).sum())", "row -= top",
    "reuse::logprobs[cpu-False]",
)
fault(
    "logprobs-of-the-next-step", GENERATE, "ahead=not logprobs", "ahead=True",
    "reuse::logprobs[emulated-False]",
)
