"""Choosing a token: the kernel and cuqwen/sampling.py."""

from faults.table import fault

# fmt: off
SAMPLE, SAMPLE_ALL = "kernels/sample_draw.cuh", "kernels/sample_all.cuh"
SAMPLE_LIST, SAMPLE_SCORES = "kernels/sample_list.cuh", "kernels/sample_scores.cuh"
SAMPLING = "cuqwen/sampling.py"
PENALTIES = "sample::sample_with_penalties[emulated-{'temperature': 1.0}-{'presence_penalty': 1.5}]"
PENALTIES_TOP_K = (
    "sample::sample_with_penalties[emulated-{'temperature': 1.0, 'top_k': 5}-"
    "{'frequency_penalty': -0.3, 'repetition_penalty': 0.8}]"
)


def equals(n: int, top_p: float = 0.5) -> str:
    """n equal logits; 400 exceed the short list, 5,000 the long one."""
    return f"sample::sample_of_equals[emulated-{top_p}-{n}]"


def sample(settings: dict[str, float], kind: str = "normal") -> str:
    return f"sample::sample[emulated-{settings}-{kind}]"


fault(
    "sample-prompt-counts-as-answer", SAMPLE_SCORES, "(double)(uses - 1)", "(double)uses",
    "sample::sample_with_penalties",
)
fault("sample-first-use-not-counted", SAMPLE, "history[token] + 1 : 2", "history[token] + 1 : 1", PENALTIES)
fault("sample-top-p-boundary", SAMPLE_LIST, "* 0x1p-52 > (1 - set.top_p)", "* 0x1p-52 >= (1 - set.top_p)", equals(40))
fault("sample-top-p-boundary-of-many", SAMPLE_ALL, "s.running[r] <= allowance", "s.running[r] < allowance", equals(400))
fault("sample-equals-from-above", SAMPLE_LIST, "s.ids[j] <= id", "s.ids[j] >= id", equals(40))
fault("sample-same-number-again", SAMPLE, "*in.step = random.now + 1", "*in.step = random.now", equals(40))
fault(
    "sample-min-p-strict-in-long-lists", SAMPLE_ALL, "in && weight >= s.job.set.min_p", "in && weight > s.job.set.min_p",
    "sample::sample_of_equals",
)
fault(
    "sample-min-p-strict", SAMPLE_LIST, "weight >= set.min_p", "weight > set.min_p",
    sample({"temperature": 1.0, "min_p": 1.0}),
)
fault("sample-one-of-equals-too-many", SAMPLE_ALL, "id > bound.id", "id >= bound.id", equals(400), equals(5000))
fault(
    "sample-scan-without-the-warps-before", SAMPLE_SCORES, "return base + x;", "return x;",
    "sample::sample_sizes[emulated-2049]",
)
fault(
    "sample-threshold-of-fewer", SAMPLE_LIST, "reached >= s.job.set.top_k", "reached >= s.job.set.top_k - 1",
    sample({"temperature": 1.0, "top_k": 5}),
)
fault(
    "sample-threshold-not-gathered", SAMPLE_LIST, "logit[j] < least)", "logit[j] <= least)",
    sample({"temperature": 1.0, "top_k": 5}, "equals"),
)
fault(
    "sample-penalised-logits-not-gathered", SAMPLE_LIST, "some |= 1u << j;", ";", PENALTIES_TOP_K,
    "sample::sample_with_penalties",
)
fault(
    "sample-drawn-one-late", SAMPLE_LIST, "before <= target &&", "before < target &&",
    "sample::sample_draw_at_the_ends_and_on_the_bounds",
)
fault(
    "sample-top-k-counts-for-top-p", SAMPLE_LIST, "s.removed = less", "s.removed = 0",
    sample({"temperature": 0.6, "top_k": 20, "top_p": 0.95}),
    sample({"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.05}),
)
fault(
    "sample-nan-has-no-rank", SAMPLE_SCORES, "x != x ? ALL : bits ^", "bits ^",
    "sample::sample_refuses_logits_without_a_choice",
)
fault("sample-target-not-reduced", SAMPLE_ALL, "        target -= s.before;\n", "", sample({"temperature": 1.0}))
fault(
    "sample-groups-not-counted-from-zero", SAMPLE, "s.groups = s.threshold = 0", "s.threshold = 0",
    sample({"temperature": 1.0, "top_k": 5}),
)
fault(
    "sampled-ids-beyond-the-tokenizer", SAMPLING, "np.array(logits[:n_ids]", "np.array(logits",
    "sampling::ids_beyond_the_tokenizer_have_no_part",
)
fault("seed-ignored", SAMPLING, "PCG64(sampling.seed)", "PCG64()", "sampling::seeds_reproduce_and_differ")
fault("top-p-boundary", SAMPLING, 'allowance, side="right"', 'allowance, side="left"', "sampling::top_p")
fault(
    "top-p-ties-from-above", SAMPLING, "(scores == lowest)[:equals_removed]",
    "(scores == lowest)[::-1][:equals_removed]", "sampling::top_p",
)
fault("top-k-one-too-few", SAMPLING, "[-sampling.top_k]", "[1 - sampling.top_k]", "sampling::top_k")
fault("min-p-strict", SAMPLING, "weights >= sampling.min_p", "weights > sampling.min_p", "sampling::min_p")
fault(
    "temperature-inverted", SAMPLING, "(scores - top) / temperature", "(scores - top) * temperature",
    "sampling::plain_softmax_and_temperature",
)
fault(
    "repetition-rewards-negatives", SAMPLING, "used * sampling.repetition_penalty",
    "used / sampling.repetition_penalty", "sampling::repetition_penalty_counts_prompt_and_answer_once",
)
fault(
    "presence-counts-the-prompt", SAMPLING, "presence_penalty * (counts > 0)", "presence_penalty * seen",
    "sampling::presence_and_frequency_count_the_answer_only",
)
fault(
    "draw-of-probability-zero", SAMPLING, 'sums[-1], side="right"', 'sums[-1], side="left"',
    "sampling::the_draw_at_the_ends_and_on_the_bounds",
)
fault(
    "sampler-forgets", SAMPLING, "self._counts[token] += 1", "self._counts[token] = 1",
    "sampling::the_sampler_remembers_like_the_function",
)
