"""What `cuqwen doctor` computes on the GPU and compares with NumPy: each operation, and the demo model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from cuqwen.api import Model
    from cuqwen.commands.doctor import Report

INSTALL = 'pip install "cuqwen[cuda13]" (driver 580 or newer) or "cuqwen[cuda12]" (525 or newer)'
EPS32, EPS_BF16 = 2.0**-24, 2.0**-8  # the most that a rounding changes, of the value
REPORT = "and please report it with all of this"
PROMPTS = ("In the beginning God created the heaven", "And the LORD said unto Moses", "Blessed are the poor in spirit")
ANSWER = 6  # tokens


class Sizes(NamedTuple):
    rows: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int


SMALL = Sizes(3, 256, 4, 2, 64, 512)  # a few tokens: dot products
LAYER = Sizes(512, 1024, 16, 8, 128, 3072)  # a prompt in Qwen3-0.6B: tensor cores, by wgmma where there is


class Case(NamedTuple):
    """A call of an operation. terms: of its longest sum. roundings: to bf16, one after another."""

    label: str
    name: str
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    terms: int
    roundings: int

    @property
    def bound(self) -> float:
        """Of the largest difference, as part of the largest result: each term's rounding adds up, of absolute terms that are
        0.64 sqrt(n) together where the largest sum of all is about 4 (standard normal x, weights of 1/sqrt(n))."""
        return 0.16 * self.terms**1.5 * EPS32 + self.roundings * EPS_BF16


def check_operations(report: Report, small: Sizes = SMALL, layer: Sizes = LAYER) -> None:
    """Each operation on the GPU, compared with the reference; the first call compiles its kernels."""
    from cuqwen import launch, ops, reference

    for case in [*_few_rows(small), *_prompts(layer, bf16=False), *_prompts(layer, bf16=True)]:
        started = perf_counter()
        try:
            placed = {key: _placed(value) for key, value in case.keywords.items()}
            results = _flat(getattr(ops, case.name)(*map(_placed, case.arguments), **placed))
            results = [result.get() if launch.is_gpu_array(result) else result for result in results]
        except Exception as error:  # as in Report.check
            report.fail(case.label, f"{type(error).__name__}: {error}"[:300], INSTALL)
            continue
        seconds = perf_counter() - started
        keywords = {key: value for key, value in case.keywords.items() if key != "out"}
        wanted = _flat(getattr(reference, case.name)(*case.arguments, **keywords))
        off = max(_difference(result, truth) for result, truth in zip(results, wanted, strict=True))
        remedy = f"use {'--exact' if case.roundings else '--device cpu'} until it is mended, {REPORT}"
        _compare(report, case.label, f"{seconds:6.2f} s to compile or find, ", off, case.bound, remedy)


def _compare(report: Report, label: str, text: str, off: float, bound: float, remedy: str) -> None:
    text += f"error {off:.0e}, allowed {bound:.0e}"
    if off <= bound:
        report.ok(label, text)
    else:
        report.fail(label, text, remedy)


def _placed(value: Any) -> Any:
    from cuqwen import launch

    return launch.upload(value) if hasattr(value, "shape") else value


def _flat(result: Any) -> list[Any]:
    return list(result) if isinstance(result, tuple) else [result]


def _difference(result: Any, truth: Any) -> float:
    """The largest difference, relative to the largest value; infinite for NaN."""
    import numpy as np

    difference = np.abs(np.asarray(result, np.float64) - truth).max() / max(np.abs(truth).max(), 1e-30)
    return float(difference) if np.isfinite(difference) else float("inf")


def _normal() -> Callable[..., Any]:
    import numpy as np

    rng = np.random.default_rng(0)

    def normal(*shape: int, dtype: Any = np.float32, scale: float = 1.0) -> Any:
        return (rng.standard_normal(shape, np.float32) * np.float32(scale)).astype(dtype)

    return normal


def _few_rows(s: Sizes) -> Iterator[Case]:
    """Every operation."""
    import ml_dtypes
    import numpy as np

    from cuqwen import rope_table

    normal, bf16 = _normal(), ml_dtypes.bfloat16
    positions = np.arange(5, 5 + s.rows, dtype=np.int32)
    table = rope_table(s.head_dim, 16, 1e6)
    heads, kv_heads = (s.rows, s.heads, s.head_dim), (s.rows, s.kv_heads, s.head_dim)
    cached = (16, *kv_heads[1:])
    x, q, squares = normal(s.rows, s.hidden), normal(*heads), (normal(*heads[:2]) ** 2, normal(*kv_heads[:2]) ** 2)

    def weight(rows: int) -> Any:
        return normal(rows, s.hidden, dtype=bf16, scale=s.hidden**-0.5)

    projections = [weight(n * s.head_dim) for n in (s.heads, s.kv_heads, s.kv_heads)]
    gains = {"q_norm": normal(s.head_dim), "k_norm": normal(s.head_dim)}
    drawn = {"uniforms": np.array([0.3]), "step": np.zeros(1, np.int32)}
    for name, arguments, keywords in (
        ("embed", (np.arange(1, 1 + s.rows, dtype=np.int32), normal(8, s.hidden, dtype=bf16)), {}),
        ("rmsnorm", (x, normal(s.hidden)), {}),
        ("qkv_rope", (x, *projections, *table, positions), gains),
        ("qk_norm", (q, normal(*kv_heads), *squares), {}),
        ("attention", (q, normal(*cached, dtype=bf16), normal(*cached, dtype=bf16), positions), {}),
        ("matmul", (x, weight(s.ffn)), {"residual": normal(s.rows, s.ffn)}),
        ("swiglu", (x, weight(s.ffn), weight(s.ffn)), {}),
        ("silu_mul", (normal(s.rows, s.ffn), normal(s.rows, s.ffn)), {}),
        ("argmax", (normal(s.rows, 1000),), {}),
        ("sample", (normal(1000), 0.8), {"top_k": 20, "top_p": 0.95, **drawn}),
    ):
        yield Case(name, name, arguments, keywords, s.hidden, 0)


def _prompts(s: Sizes, *, bf16: bool) -> Iterator[Case]:
    """The operations that have kernels of their own for many tokens, in float32 (--exact) or as prompts are read."""
    import ml_dtypes
    import numpy as np

    from cuqwen import rope_table

    normal, narrow = _normal(), ml_dtypes.bfloat16
    dtype = narrow if bf16 else np.float32
    positions, width = np.arange(s.rows, dtype=np.int32), s.heads * s.head_dim
    kv = (s.rows, s.kv_heads, s.head_dim)
    x, h, q = (
        normal(s.rows, s.hidden, dtype=dtype),
        normal(s.rows, width, dtype=dtype),
        normal(s.rows, s.heads, s.head_dim, dtype=dtype),
    )

    def weight(rows: int, columns: int) -> Any:
        return normal(rows, columns, dtype=narrow, scale=columns**-0.5)

    projections = [weight(n * s.head_dim, s.hidden) for n in (s.heads, s.kv_heads, s.kv_heads)]
    gains = {"q_norm": normal(s.head_dim), "k_norm": normal(s.head_dim)}
    keys, values = normal(*kv, dtype=dtype), normal(*kv, dtype=dtype)
    gated = {"out": np.zeros((s.rows, s.ffn), dtype)}
    for name, arguments, keywords, terms, roundings in (
        ("qkv_rope", (x, *projections, *rope_table(s.head_dim, s.rows, 1e6), positions), gains, s.hidden, 0),
        # the softmax's weights and the result
        ("attention", (q, keys, values, positions), {"out": np.zeros(q.shape, dtype)}, s.rows, 2),
        ("matmul", (h, weight(s.hidden, width)), {"residual": normal(s.rows, s.hidden)}, width, 0),
        ("swiglu", (x, weight(s.ffn, s.hidden), weight(s.ffn, s.hidden)), gated, s.hidden, 1),
    ):
        label = f"{name}, {s.rows} {'bf16' if bf16 else 'float32'}"
        yield Case(label, name, arguments, keywords, terms, roundings if bf16 else 0)


def check_model(report: Report, *, on_gpu: bool) -> None:
    """The demo model by the same route as any other: on the CPU, and on the GPU its prompts, which are computed, recorded and
    repeated, and its single tokens both ways, against float64."""
    try:
        from cuqwen import api, bench
    except ImportError as error:  # a package that is missing or broken
        report.fail("demo model", f"{type(error).__name__}: {error}", "install cuqwen again")
        return

    def on_cpu() -> str:
        with api.load("demo", device="cpu") as model:
            tokens = [step.token for step in model.stream(PROMPTS[0], max_tokens=16, temperature=0)]
        return f"{len(tokens)} tokens on the CPU"

    if not report.check("demo model", on_cpu, "install cuqwen again") or not on_gpu:
        return
    load = partial(api.load, "demo", device="cpu", dtype="float64")
    with load(kv_dtype="bfloat16") as truth, load() as wider:
        for label, portable, exact, instead in (
            ("one launch", False, True, "set CUQWEN_PORTABLE=1"),
            ("portable", True, True, "use --device cpu"),
            ("prompts", False, False, "use --exact"),
        ):
            try:
                with (
                    bench.portable_steps(portable),
                    api.load("demo", device="cuda", exact=exact, kv_dtype="bfloat16") as model,
                ):
                    if label == "one launch" and (reason := model.fallback):
                        report.note(label, f"not on this GPU: {reason}")
                        continue
                    started = perf_counter()
                    off, bound = _logits_off(model, truth, wider if exact else None)
                    if exact:
                        _check_tokens(model, truth)
                    text = f"{perf_counter() - started:6.2f} s, "
            except Exception as error:  # as in Report.check
                report.fail(label, f"{type(error).__name__}: {error}"[:300], f"{instead} until it is mended, {REPORT}")
            else:
                _compare(report, label, text, off, bound, f"{instead} until it is mended, {REPORT}")


def _logits_off(model: Model, truth: Model, wider: Model | None) -> tuple[float, float]:
    """(by how much the logits behind the tokens of some answers are off, what is allowed). Where keys and values are all that
    is rounded to bf16, they differ from the truth in what is rounded to the other side, so by less than all of that rounding
    changes: `wider` does without. A prompt that is rounded six times in a layer as well: as many roundings, that are as good
    as random."""
    import numpy as np

    off, bound = 0.0, 0.0 if wider else (6 * truth.config.num_hidden_layers) ** 0.5 * EPS_BF16
    for prompt in PROMPTS:
        steps = list(model.stream(prompt, max_tokens=ANSWER, temperature=0, logprobs=model.tokenizer.n_ids))
        found = np.zeros((ANSWER, model.tokenizer.n_ids))
        for row, step in zip(found, steps, strict=True):
            tokens, logprobs = zip(*(step.top_logprobs or ()), strict=True)
            row[list(tokens)] = logprobs
        ids = [*truth.tokenizer.encode(prompt), *(step.token for step in steps[:-1])]
        wanted = _centred(truth.logits(ids)[-ANSWER:])
        off = max(off, _distance(_centred(found), wanted))
        if wider:
            bound = max(bound, _distance(_centred(wider.logits(ids)[-ANSWER:]), wanted))
    return off, bound


def _check_tokens(model: Model, truth: Model) -> None:
    """That tokens come as nobody asks for their logits, the most likely ones and those that a seed draws."""
    for settings in ({"temperature": 0}, {"temperature": 0.8, "top_k": 20, "seed": 1}):
        wanted, got = (
            [step.token for step in each.stream(PROMPTS[0], max_tokens=ANSWER, **settings)] for each in (truth, model)
        )
        if got != wanted:
            raise ValueError(f"{settings}: wanted the tokens {wanted}, got {got}")


def _centred(logits: Any) -> Any:
    """What softmax makes of logits does not depend on their mean."""
    return logits - logits.mean(axis=-1, keepdims=True)


def _distance(found: Any, wanted: Any) -> float:
    """Of the row that is worst, as part of the length of the wanted one; infinite for NaN."""
    import numpy as np

    norm = np.linalg.norm
    worst = float((norm(found - wanted, axis=-1) / norm(wanted, axis=-1)).max())
    return worst if np.isfinite(worst) else float("inf")
