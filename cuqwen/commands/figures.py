"""How fast it was: the closing line, and the table that `--stats` prints."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cuqwen.api import Model
    from cuqwen.generate import Step


@dataclass
class Answer:
    """An answer as it came: its steps, and the times at which each was there. prompt_tokens: those that were read for it,
    0 if all were in the cache."""

    model: Model
    prompt_tokens: int
    context: int  # tokens of the whole prompt
    started: float = field(default_factory=perf_counter)
    steps: list[Step] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def watch(self, steps: Iterable[Step]) -> Iterator[Step]:
        for step in steps:
            self.times.append(perf_counter())
            self.steps.append(step)
            yield step

    @property
    def tokens(self) -> list[int]:
        return [step.token for step in self.steps]

    @property
    def text(self) -> str:
        return "".join(step.text for step in self.steps)

    @property
    def timings(self) -> dict[str, float]:
        """Seconds to the first token, seconds for the others, and tokens a second among those."""
        first, last = self.times[0], self.times[-1]
        rate = (len(self.times) - 1) / (last - first) if len(self.times) > 1 else 0.0
        return {
            "first_token_seconds": first - self.started, "decode_seconds": last - first, "tokens_per_second": rate,
        }  # fmt: skip

    @property
    def bandwidth(self) -> float:
        """Bytes a second that the tokens after the first have read, weights and cache."""
        context = self.context + len(self.steps) // 2
        return self.timings["tokens_per_second"] * self.model.network.read_bytes_per_token(context)

    def line(self) -> str:
        """`prompt 20 tok · 4 ms | 256 tok · 2,013 tok/s · 2.40 TB/s · 81 % of this GPU | 1.6 GB`"""
        if not self.steps:
            return f"prompt {self.prompt_tokens:,} tok | no answer"
        timings = self.timings
        read = f"{self.prompt_tokens:,} tok" if self.prompt_tokens else "cached"
        parts = [f"prompt {read} · {1e3 * timings['first_token_seconds']:,.0f} ms"]
        if timings["tokens_per_second"]:
            rate = f"{timings['tokens_per_second']:,.0f} tok/s"
            parts += [f"{len(self.steps):,} tok · {rate} · {in_units(self.bandwidth)}/s{self._share()}"]
        memory = memory_bytes(self.model)
        return " | ".join([*parts, in_units(memory, 1)] if memory else parts)

    def _share(self, of: str = " · {:.0f} % of this GPU") -> str:
        from cuqwen import launch

        peak = launch.peak_bandwidth() if self.model.device == "cuda" else 0.0  # some GPUs report none
        return of.format(100 * self.bandwidth / peak) if peak else ""

    def table(self, load_seconds: float) -> str:
        timings, model = self.timings, self.model
        first = timings["first_token_seconds"]
        read = f"{self.prompt_tokens:,} tokens" if self.prompt_tokens else "cached"
        rows = {
            "load": f"{load_seconds:.2f} s",
            "prompt": f"{read}, {1e3 * first:,.1f} ms to the first token of the answer",
            "answer": f"{len(self.steps):,} tokens",
        }
        if len(self.times) > 2:
            waits = sorted(1e3 * (b - a) for a, b in zip(self.times, self.times[1:], strict=False))
            slowest = waits[min(len(waits) - 1, int(0.99 * len(waits)))]
            rows["answer"] += f", {timings['tokens_per_second']:,.1f} tok/s"
            rows["each"] = f"{statistics.median(waits):.3f} ms (median), {slowest:.3f} ms (99 of 100 are faster)"
            size = model.network.read_bytes_per_token(self.context + len(self.steps) // 2)
            rows["reads"] = (
                f"{in_units(size)} a token, {in_units(self.bandwidth)}/s{self._share(', {:.1f} % of this GPU')}"
            )
        memory = memory_bytes(model)
        if memory:
            rows["memory"] = f"{in_units(memory)}; with a full context {model.memory_plan}"
        return "\n".join(f"{name:8}{value}" for name, value in rows.items())


def in_units(size: float, digits: int = 2) -> str:
    """`size` bytes for people: 1.19 GB."""
    unit, name = next(((u, n) for u, n in ((1e12, "TB"), (1e9, "GB")) if size >= u), (1e6, "MB"))
    return f"{size / unit:.{digits}f} {name}"


def memory_bytes(model: Model) -> int:
    """What this process holds: of the GPU's memory for arrays, or its largest size in memory; 0 where that is not told."""
    if model.device == "cuda":
        from cuqwen import launch

        return launch.cupy().get_default_memory_pool().total_bytes()
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
