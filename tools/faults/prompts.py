"""Prompts in chunks, in bf16, and short ones by recorded launches."""

from faults.table import fault

# fmt: off
MODEL, PROMPT = "cuqwen/model.py", "cuqwen/prompt.py"
CHUNKS, EVEN = "model::a_prompt_is_read_in_chunks", "model::chunks_are_even"
ON_KERNELS, SHORT = "model::prompts_on_kernels[emulated-normed_64]", "model::short_prompts_equal_others[emulated-20]"

fault(
    "prompt-chunk-drops-a-token", MODEL, "logits = self.forward(ids[first:last], cache,",
    "logits = self.forward(ids[first : max(last - 1, first + 1)], cache,", CHUNKS,
)
fault("prompt-ragged-end", MODEL, "            bounds[-2] -= self.chunk // 4", "            bounds[-2] -= 0", EVEN)
fault(
    "prompt-logits-of-every-chunk-in-one-place", MODEL, "(last - first, result[first:last]) if every_row",
    "(last - first, result[: last - first]) if every_row", CHUNKS,
)
fault(
    "prompt-progress-too-early", MODEL, "progress(start + first, start + total)",
    "progress(start + last, start + total)", EVEN,
)
fault("prompt-exact-not-exact", MODEL, 'if device == "cuda" and not exact and', 'if device == "cuda" and', ON_KERNELS)
fault(
    "prompt-never-bf16", MODEL, 'if device == "cuda" and not exact and',
    'if device == "cuda" and not exact and False and', ON_KERNELS,
)
fault(
    "prompt-workspace-for-each-chunk", MODEL, "if self.workspace.x is None or len(self.workspace.x) < tokens:",
    "if True:", "model::the_workspace_is_made_once[emulated]",
)
fault(
    "short-prompt-padding-at-the-end", PROMPT, "inputs[:, width - len(ids) :] = ids,", "inputs[:, : len(ids)] = ids,",
    SHORT,
)
fault("short-prompt-padding-in-the-cache", PROMPT, "        inputs[1] = -1\n", "        inputs[1] = stop\n", SHORT)
fault("short-prompt-length-not-advanced", PROMPT, "        self.cache.length = stop\n", "", SHORT)
fault(
    "short-prompt-ids-of-the-first", PROMPT, "            launch.copy(self.inputs[width], launch.upload(inputs))\n",
    "", SHORT,
)
fault(
    "short-prompt-workspace-freed", PROMPT, "keep = self.model.cos, self.model.sin, self.model.workspace",
    "keep = self.model.cos, self.model.sin", SHORT,
)
fault(
    "short-prompt-tables-freed", PROMPT, "keep = self.model.cos, self.model.sin, self.model.workspace",
    "keep = self.model.workspace", SHORT,
)
fault(
    "short-prompts-recorded-for-good", PROMPT,
    "                    del self.recordings[next(iter(self.recordings))]\n", "                    pass\n",
    "model::only_the_last_recordings_are_kept[emulated]",
)
