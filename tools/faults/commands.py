"""The command line."""

from faults.table import fault

# fmt: off
CONVERSATION, PERPLEXITY = "cuqwen/commands/conversation.py", "cuqwen/commands/perplexity.py"
CHECKS = "cuqwen/commands/checks.py"

fault(
    "chat-end-token-twice", CONVERSATION, "before = self.ids[:-1] if self.ids[-1] in self.end_ids else self.ids",
    "before = self.ids", "chat::tokens_of_a_conversation_are_those_of_the_template",
)
fault(
    "chat-last-token-forgotten", CONVERSATION, "self.ids = [*ids, *tokens]", "self.ids = [*ids, *tokens[:-1]]",
    "chat::three_turns_are_what_they_are_from_scratch",
)
fault(
    "chat-thinks-one-token-longer", "cuqwen/thinking.py", "if len(taken) == budget and rest",
    "if len(taken) > budget and rest", "chat::thinking_budget",
)
fault(
    "chat-prints-half-a-tag", "cuqwen/commands/chat.py", 'held = 0 if closed else _overlap(self.pending, "</think>")',
    "held = 0", "chat::thinking_is_shown_dimmed_or_tagged_or_not",
)
fault("perplexity-first-of-a-window", PERPLEXITY, "max(first, begin + 1)", "first", "perplexity::windows")
fault(
    "perplexity-of-the-token-itself", PERPLEXITY, "tokens[start + 1 : stop + 1]", "tokens[start:stop]",
    "perplexity::definition[128-64]",
)
fault(
    "info-reads-the-embedding", "cuqwen/commands/info.py", "weights - (0 if config.tie_word_embeddings else",
    "weights - (0 if not config.tie_word_embeddings else", "info::what_it_says_is_what_is_loaded",
)
fault(
    "info-one-cache-for-all", "cuqwen/commands/info.py", '"float32" if exact else "float16")', '"float16")',
    "info::what_it_says_is_what_is_loaded",
)
fault(
    "cli-quotes-for-all", "cuqwen/cli.py", '"prompt" in options and not', "not",
    "cli::quotes_are_advised_where_there_is_a_text",
)
fault(
    "budget-without-template", "cuqwen/commands/answers.py", " or options.thinking_budget is not None", "",
    "cli::chat_options_need_a_template",
)
fault(
    "doctor-too-tolerant", CHECKS, "0.16 * self.terms**1.5", "16 * self.terms**1.5",
    "doctor::every_operation_is_compared_with_the_reference",
)
fault(
    "doctor-small-sizes-only", CHECKS, ", *_prompts(layer, bf16=False), *_prompts(layer, bf16=True)]", "]",
    "doctor::every_operation_is_compared_with_the_reference",
)
fault(
    "doctor-one-way-twice", CHECKS, "bench.portable_steps(portable),", "bench.portable_steps(False),",
    "doctor::a_model_is_compared_with_float64",
)
fault(
    "bench-one-run-deviates", "cuqwen/commands/bench.py", 'if row["repetitions"] > 1 else', 'if row["repetitions"] else',
    "bench::one_repetition_has_no_deviation",
)
fault(
    "several-answers-read-the-prompt-again", "cuqwen/commands/generate.py", "len(ids) if is_first else 0", "len(ids)",
    "cli::several_answers_read_the_prompt_once",
)
fault(
    "speed-counts-the-first-token", "cuqwen/commands/figures.py", "rate = (len(self.times) - 1) / (last - first)",
    "rate = len(self.times) / (last - first)", "cli::closing_line",
)
fault(
    "several-answers-of-one-seed", "cuqwen/commands/generate.py", 'settings["seed"] = (given.seed + number) % 2**64',
    'settings["seed"] = given.seed % 2**64', "cli::several_answers",
)
fault(
    "chat-one-interrupt-ends", "cuqwen/commands/chat.py", "if ends or not self.interactive:", "if True:",
    "chat::interrupt_at_the_prompt_asks_for_another_one",
)
fault(
    "budget-draws-the-same-again", "cuqwen/api.py", "(sampling.seed + 2**63) % 2**64", "sampling.seed",
    "chat::nothing_is_lost_where_thinking_is_cut_and_no_number_is_drawn_twice",
)
fault(
    "memory-error-without-the-result", "cuqwen/api.py", "self._memory_errors(len(prompt), logits=len(prompt))",
    "self._memory_errors(len(prompt))", "reuse::memory_errors_say_what_was_wanted[cpu]",
)
fault(
    "prompt-room-not-checked", "cuqwen/commands/generate.py", "if given.max_tokens > room:", "if False:",
    "cli::prompt_and_max_tokens_longer_than_the_context",
)
