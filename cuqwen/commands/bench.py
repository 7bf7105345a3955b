"""`cuqwen bench`: how fast a model is on this machine, in llama-bench's rows.

Fields of a row in json and csv; the table leaves out some:
  model              what was measured
  device             the GPU's name, or "cpu"
  engine             how: "one launch" (one kernel for up to 32 tokens),
                     "portable" (many small kernels in a CUDA graph), "cuda"
                     (prompts), "numpy", "transformers eager", "transformers
                     static" (static cache and torch.compile)
  test               ppN: a prompt of N tokens is read; tgN: N tokens are
                     generated; @ dN: after N tokens of context
  n_prompt, n_gen, depth   the same in numbers
  choice             how tokens are chosen: greedy, sampled (temperature 0.6,
                     top_k 20, top_p 0.95); empty for prompts
  repetitions        runs that count; one more before them does not
  tokens_per_second  their mean
  deviation          their standard deviation (n - 1), 0 for a single one
  gb_per_second      1e9 bytes a second that the model must read: weights, and
                     keys and values of the context; the chunk of a prompt
                     reads the weights once
  percent_of_read    of `read_gb_per_second`
  read_gb_per_second what this machine's memory gave at the beginning: on a
                     GPU a kernel that reads 2 GiB, on a CPU NumPy's product
                     of a matrix and a vector
"""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cuqwen.commands import loading, options, terminal

if TYPE_CHECKING:
    from cuqwen.bench import Case, Figures
    from cuqwen.model import Qwen3

SIZES = ("0.6B", "1.7B", "4B", "8B", "14B", "32B")
COLUMNS = ("model", "device", "engine", "test", "tokens_per_second", "gb_per_second", "percent_of_read")
INSTALL = "--compare: transformers is not installed; get it with pip install torch transformers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = """\
Measure tokens a second of prompts (pp) and of generated tokens (tg), as
llama-bench does, beside the speed at which this machine's memory can be read,
which bounds the second. Token ids are random."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (__doc__ or "").split("\n\n", 1)[1]
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument(
        "--model", metavar="ID|DIR|demo", help="a hub id, a checkpoint's folder, or the model in the package"
    )
    model.add_argument(
        "--random", choices=SIZES, metavar="SIZE", help=f"random weights in Qwen3's shape: {', '.join(SIZES)}"
    )
    options.add_loading(parser)
    add = parser.add_argument_group("tests").add_argument
    add("-p", "--n-prompt", type=_sizes, default=[512], metavar="N,N", help="lengths of prompts (default 512; 0: none)")
    add("-n", "--n-gen", type=_sizes, default=[128], metavar="N,N", help="tokens to generate (default 128; 0: none)")
    add("-d", "--n-depth", type=_sizes, default=[0], metavar="N,N", help="tokens of context before them (default 0)")
    add("-r", "--repetitions", type=int, default=5, metavar="N", help="runs of each test (default 5)")
    add("--sample", action="store_true", help="a second tg row whose tokens are sampled")
    add("--portable", action="store_true", help="many small kernels a token in a CUDA graph, not one launch for many")
    add("--compare", action="store_true", help="the same tests with transformers, if it is installed")
    output = parser.add_argument_group("output")
    output.add_argument("-o", "--output", choices=("md", "json", "csv"), default="md", help="default: md, a table")
    output.add_argument("--quiet", action="store_true", help="no progress")


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"wanted integers with commas between them, got {text!r}") from None
    if min(sizes) < 0:
        raise argparse.ArgumentTypeError(f"wanted integers from 0, got {min(sizes)}")
    return sizes


def run(given: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if given.repetitions < 1:
        parser.error(f"--repetitions: wanted at least 1, got {given.repetitions}")
    if given.max_context is not None and given.max_context < 1:
        parser.error(f"--max-context: wanted at least 1, got {given.max_context}")
    if not any(given.n_prompt) and not any(given.n_gen):
        parser.error("--n-prompt and --n-gen: wanted at least one size above 0")
    if given.random and (given.revision or given.check_weights):
        parser.error("--random: --revision and --check-weights are for a checkpoint")
    terminal.use_utf8()
    name, network, n_ids, context, folder = _network(given)
    from cuqwen import bench
    from cuqwen.bandwidth import read_bandwidth

    cases = bench.plan(given.n_prompt, given.n_gen, given.n_depth, sampled=given.sample)
    longest = max(case.depth + case.tokens for case in cases)
    if longest > context:
        raise ValueError(
            f"bench: depth and tokens: wanted at most the context of {context} tokens, got {longest}; use less"
        )
    works = [partial(bench.measure, network, n_ids, case, given.repetitions) for case in cases]
    if given.compare:
        works += _peers(cases, given.repetitions, network, n_ids, folder)
    head, rows = {"model": name, "device": _device_name(network)}, []
    show = terminal.for_a_person(given.quiet)
    with bench.portable_steps(given.portable), terminal.bar("bench", " tests", show=show) as progress:
        read = read_bandwidth(network.device.name)
        for work in works:
            rows.append({**head, **_row(work(), read)})
            if progress:
                progress(len(rows), len(works))
    terminal.write(FORMATS[given.output](rows))


def _network(given: argparse.Namespace) -> tuple[str, Qwen3, int, int, Path | None]:
    """Its name, the network, ids that it may choose from, the longest context, and the checkpoint's folder (None: random)."""
    if given.random is None:
        model = loading.load(given)
        return given.model, model.network, model.tokenizer.n_ids, model.max_context, model.folder
    with loading.hold_interrupts():
        import ml_dtypes
        import numpy as np

        from cuqwen import launch, sizes
        from cuqwen.model import Device

        if given.device == "cuda":
            launch.cupy()  # raises DeviceError with the remedy
        on_gpu = given.device != "cpu" and launch.has_gpu()
    place = Device.cuda() if on_gpu else Device.cpu()
    kv_dtype = ml_dtypes.bfloat16 if on_gpu and not given.exact else np.float32
    config = sizes.config_of(given.random)
    network = sizes.random_network(config, place, kv_dtype, exact=given.exact)
    return f"random {given.random}", network, sizes.TOKENS, given.max_context or config.context_length, None


def _device_name(network: Qwen3) -> str:
    if network.device.name == "cpu":
        return "cpu"
    from cuqwen import launch

    return launch.cupy().cuda.runtime.getDeviceProperties(0)["name"].decode()


def _peers(
    cases: list[Case], repetitions: int, network: Qwen3, n_ids: int, folder: Path | None
) -> list[partial[Figures]]:
    """The same cases by transformers; none, and a line that says so, if it is not installed."""
    from cuqwen.commands import peers

    peer = peers.load(folder, network)
    if peer is None:
        terminal.note(INSTALL)
        return []
    works = [partial(peers.measure, peer, "eager", network, n_ids, case, repetitions) for case in cases]
    if network.device.name == "cuda":  # with a static cache only steps are compiled
        generated = [case for case in cases if case.n_gen]
        works += [partial(peers.measure, peer, "static", network, n_ids, case, repetitions) for case in generated]
    return works


def _row(figures: Figures, read: float) -> dict[str, Any]:
    case = figures.case
    return {
        "engine": figures.engine, "test": case.name, "n_prompt": case.n_prompt, "n_gen": case.n_gen, "depth": case.depth,
        "choice": case.choice, "repetitions": len(figures.rates), "tokens_per_second": round(figures.mean, 3),
        "deviation": round(figures.deviation, 3), "gb_per_second": round(figures.bytes_per_second / 1e9, 3),
        "percent_of_read": round(100 * figures.bytes_per_second / read, 2), "read_gb_per_second": round(read / 1e9, 3),
    }  # fmt: skip


def _table(rows: list[dict[str, Any]]) -> str:
    """Markdown, in columns of one width."""
    titles = ["model", "device", "engine", "test", "tok/s", "GB/s", "% of read"]
    cells = [[_cell(row, column) for column in COLUMNS] for row in rows]
    widths = [max(len(line[i]) for line in (titles, *cells)) for i in range(len(titles))]
    numbers = range(4, len(titles))

    def line(texts: Iterable[str]) -> str:
        return (
            "| "
            + " | ".join(
                t.rjust(w) if i in numbers else t.ljust(w) for i, (t, w) in enumerate(zip(texts, widths, strict=True))
            )
            + " |"
        )

    rule = "|" + "|".join("-" * (w + 1) + ":" if i in numbers else "-" * (w + 2) for i, w in enumerate(widths)) + "|"
    read = f"\nread: {rows[0]['read_gb_per_second']:,.1f} GB/s\n"
    return "\n".join([line(titles), rule, *map(line, cells)]) + "\n" + read


def _cell(row: dict[str, Any], column: str) -> str:
    if column == "tokens_per_second":
        deviation = f" ± {row['deviation']:,.1f}" if row["repetitions"] > 1 else ""
        return f"{row[column]:,.1f}{deviation}"
    return f"{row[column]:,.1f}" if column in ("gb_per_second", "percent_of_read") else str(row[column])


def _csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


FORMATS: dict[str, Callable[[list[dict[str, Any]]], str]] = {
    "md": _table, "json": lambda rows: json.dumps(rows, indent=2, ensure_ascii=False) + "\n", "csv": _csv,
}  # fmt: skip
