"""The table that the other modules fill, and the tests that several of them name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One mistake: in `file` each text of `edits` is replaced; one of `tests` (pytest's node ids) must notice."""

    name: str
    file: str
    edits: tuple[tuple[str, str], ...]
    tests: tuple[str, ...]


FAULTS: list[Fault] = []


def fault(name: str, file: str, old: str, new: str, *tests: str, also: Sequence[tuple[str, str]] = ()) -> None:
    """Adds to the table. A test is written `file::test` without `tests/test_` and `test_`."""
    nodes = tuple("tests/test_" + test.replace("::", ".py::test_", 1) for test in tests)
    FAULTS.append(Fault(name, file, ((old, new), *also), nodes))


def bf16(value: str) -> str:
    """CUDA for `value` rounded to bf16 and back."""
    return f"__bfloat162float(__float2bfloat16_rn({value}))"


SANITIZED = "emulator::all_operations_under_the_sanitizers"
SCALES, ZERO_ROWS = "ops::rmsnorm_extreme_scales_and_gains", "ops::rmsnorm_constant_and_zero_rows"
RESIDUAL, QKV_TEST = "ops::matmul_residual_in_place", "ops::qkv_rope"
ATTENTION_TEST, SCORES = "ops::attention", "ops::attention_extreme_scores"
TRUTH, TRUTH_BIAS, TRUTH_UNTIED, TRUTH_EPS = (
    f"transformers::float64_is_the_truth[numpy-{spec}]"
    for spec in ("head_128", "qwen2_bias", "untied_sharded_f32", "head_64_large_eps")
)
PIECES = "model::a_prompt_fed_whole_equals_the_prompt_fed_in_pieces"
GIVES_UP = "decode_step::decode_step_gives_up_when_words_never_come"
BOTH_SIDES = "sample::an_answer_is_the_same_on_both_sides"
