"""`cuqwen perplexity`: exp of the mean negative log-likelihood of a text's tokens, by a window that strides over it."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from cuqwen.commands import loading, options, terminal
from cuqwen.commands.generate import read_text

if TYPE_CHECKING:
    from cuqwen.api import Model

ROWS = 256  # of logits at a time: [256, V] are 156 MB of Qwen3's
CONTEXT, STRIDE = 2048, 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = """How well a model predicts a text: exp of the mean negative log-likelihood of its tokens. A
    window of --context tokens moves over the text by --stride tokens; each token counts once, in the first window that
    has it behind another."""
    parser.add_argument(
        "model", metavar="ID|DIR|demo", help="a hub id, a checkpoint's folder, or the model in the package"
    )
    parser.add_argument("file", metavar="FILE", help='the text, UTF-8; "-" reads standard input')
    options.add_loading(parser)
    parser.add_argument(
        "--context", type=int, metavar="N", help=f"tokens of a window (default {CONTEXT}, or the model's)"
    )
    parser.add_argument("--stride", type=int, metavar="N", help=f"tokens that it moves on (default {STRIDE})")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def run(given: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    options.at_least(given, parser, 1, "max_context", "stride")
    options.at_least(given, parser, 2, "context")
    if given.context is not None and given.stride is not None and given.stride > given.context:
        parser.error(f"--stride: wanted at most --context {given.context}, got {given.stride}")
    text = read_text(None if given.file == "-" else Path(given.file))
    model = loading.load(given)
    ids = model.tokenizer.encode(text)
    if len(ids) < 2:
        raise ValueError(f"{given.file}: wanted a text of at least 2 tokens, got {len(ids)}")
    context = given.context or min(CONTEXT, model.max_context)
    if context > model.max_context:
        raise ValueError(f"--context: wanted at most the model's {model.max_context}, got {context}")
    stride = min(given.stride or STRIDE, context)
    started = perf_counter()
    with terminal.bar("perplexity", "tok", show=terminal.for_a_person(given.quiet)) as progress:
        total, counted = negative_log_likelihood(model, ids, context, stride, progress)
    seconds = perf_counter() - started
    value = math.exp(total / counted)
    if given.json:
        report = {
            "perplexity": value, "tokens": counted, "context": context, "stride": stride, "model": given.model,
            "device": model.device, "seconds": round(seconds, 6),
        }  # fmt: skip
        terminal.write(json.dumps(report, ensure_ascii=False) + "\n")
        return
    terminal.write(f"perplexity {value:.4f}\n")
    if not given.quiet:
        terminal.note(f"{counted:,} tokens, context {context:,}, stride {stride:,}, {seconds:.1f} s")


def windows(length: int, context: int, stride: int) -> list[tuple[int, int, int]]:
    """(begin, first, end): a window over begin..end - 1, in which the tokens from `first` on are predicted. The first token
    of a window has nothing before it, so it can only count in the window before."""
    found, first = [], 1
    for begin in range(0, length, stride):
        end = min(begin + context, length)
        found.append((begin, max(first, begin + 1), end))
        first = end
        if end == length:
            break
    return found


def negative_log_likelihood(
    model: Model, ids: list[int], context: int, stride: int, progress: Callable[[int, int], None] | None = None
) -> tuple[float, int]:
    """(the sum of -log p over the tokens that are predicted, in nats; their number)."""
    import numpy as np

    network, tokens = model.network, np.asarray(ids, np.int32)
    cache = network.new_cache(min(context, len(ids)))
    total, counted = 0.0, 0
    for begin, first, end in windows(len(ids), context, stride):
        cache.length = 0
        if first > begin + 1:  # what is only context
            network.read(tokens[begin : first - 1], cache)
        for start in range(first - 1, end - 1, ROWS):  # a token is predicted by the logits of the one before
            stop = min(start + ROWS, end - 1)
            logits = network.read(tokens[start:stop], cache, every_row=True)
            total += _losses(model, logits, tokens[start + 1 : stop + 1])
            counted += stop - start
        if progress is not None:
            progress(end, len(ids))
    return total, counted


def _losses(model: Model, logits: Any, targets: Any) -> float:
    """The sum over the rows of -log softmax(logits)[target]."""
    from cuqwen import launch

    if model.device == "cuda":
        xp: Any = launch.cupy()
    else:
        import numpy as xp
    scores = logits - logits.max(axis=1, keepdims=True)
    chosen = scores[xp.arange(len(targets)), xp.asarray(targets)]
    return float((xp.log(xp.exp(scores).sum(axis=1, dtype=xp.float64)) - chosen).sum(dtype=xp.float64))
