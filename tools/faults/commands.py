"""The command line."""

from faults.table import fault

# fmt: off
CONVERSATION, PERPLEXITY = "cuqwen/commands/conversation.py", "cuqwen/commands/perplexity.py"

fault(
    "chat-end-token-twice", CONVERSATION, "before = self.ids[:-1] if self.ids[-1] in self.end_ids else self.ids",
    "before = self.ids", "chat::tokens_of_a_conversation_are_those_of_the_template",
)
fault(
    "chat-last-token-forgotten", CONVERSATION, "self.ids = [*ids, *tokens]", "self.ids = [*ids, *tokens[:-1]]",
    "chat::three_turns_are_what_they_are_from_scratch",
)
fault(
    "chat-thinks-one-token-longer", "cuqwen/commands/answers.py", "if len(taken) == thinking_budget and rest",
    "if len(taken) > thinking_budget and rest", "chat::thinking_budget",
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
    "doctor-too-tolerant", "cuqwen/commands/doctor.py", "TOLERANCE = 1e-4", "TOLERANCE = 1e-3",
    "doctor::every_operation_is_compared_with_the_reference",
)
fault(
    "speed-counts-the-first-token", "cuqwen/commands/figures.py", "rate = (len(self.times) - 1) / (last - first)",
    "rate = len(self.times) / (last - first)", "cli::closing_line",
)
fault(
    "several-answers-of-one-seed", "cuqwen/commands/generate.py", 'settings["seed"] = (given.seed + number) % 2**64',
    'settings["seed"] = given.seed % 2**64', "cli::several_answers",
)
