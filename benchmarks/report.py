"""The records in benchmarks/results as tables in README.md and docs/performance.md, and as pictures in docs/images.

    python -m benchmarks.report [--root FOLDER]

A page says where a part goes: `<!-- benchmarks: NAME -->` and `<!-- end -->`, with NAME one of PARTS. A part whose record
is not there, or older than the fields that it needs, says how to make one, and its picture is left out. The pictures need
matplotlib and are drawn again only where their data has changed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import posixpath
import statistics
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.pages import fill_in, save, table, use_style
from benchmarks.record import ROOT
from cuqwen.sizes import config_of
from cuqwen.weights import expected_tensors

Record = dict[str, Any]
Records = dict[str, Record]
Points = dict[int, float]

PAGES = ("README.md", "docs/performance.md")
SIZE = "0.6B"
NO_VALUE = "–"
BESIDE = 128  # the context at which everything was measured
MODES = {"default": "cuqwen", "exact": "cuqwen, exact", "transformers bf16": "transformers"}
CONTENDERS = {
    "transformers bfloat16": "transformers, bf16",
    "cuqwen": "**cuqwen**",
    "transformers float32": "transformers, float32",
    "cuqwen exact": "**cuqwen**, `exact=True`",
    "cuqwen token by token": "**cuqwen**, token by token",
    "cuqwen kv float32": "**cuqwen**, float32 cache",
    "cuqwen exact kv bfloat16": "**cuqwen**, `exact=True`, bf16 cache",
}
CHECKPOINTS = {"demo": "demo", "ordinary": "random, ordinary gains", "heavy": "random, heavy gains"}
# Okabe and Ito's colours, which colour-blind readers can tell apart
COLOURS = {
    "cuqwen": "#009E73", "cuqwen, exact": "#56B4E9", "floor": "#999999", "llama.cpp": "#0072B2", "transformers": "#D55E00",
    "transformers compiled": "#E69F00", "qwen_megakernel": "#CC79A7",
}  # fmt: skip
STAGES = {"imports": "#999999", "load": "#56B4E9", "first token": "#009E73"}


def read(folder: Path) -> Records:
    """The records that are there, by name."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


# --- what the records say ---------------------------------------------------------------------------------------------


def decode_rows(record: Record, size: str, **wanted: Any) -> Points:
    """Tokens a second by context."""
    rows = (r for r in record["rows"] if r["size"] == size and all(r[key] == value for key, value in wanted.items()))
    return {r["context"]: r["median"] for r in rows}


def floors(record: Record, size: str) -> Points:
    """Tokens a second by context at which weights and cache are read at the speed that was measured in the same run."""
    return {r["context"]: 1e6 / r["floor_microseconds"] for r in record["rows"] if r["size"] == size}


def peers(records: Records, kind: str, size: str) -> dict[str, Points]:
    """Tokens a second of others by context or length: of the record's own run where they are in it, else of peers.json."""
    found = {
        row["engine"]: {int(n): rate for n, rate in row["tokens_per_second"].items()}
        for row in records.get("peers", {}).get(kind, ())
        if row["size"] == size
    }
    if kind == "decode" and size == SIZE:
        names = {"transformers eager": "transformers", "transformers static": "transformers compiled"}
        for row in records.get("decode", {}).get("transformers", ()):
            if "tokens_per_second" in row:
                found[names[row["engine"]]] = {row["context"]: statistics.median(row["tokens_per_second"])}
    return found


def prefill_rows(record: Record, size: str, what: str) -> dict[str, dict[int, Record]]:
    """Rows by engine and length."""
    result: dict[str, dict[int, Record]] = {}
    for row in record["rows"]:
        if row["size"] == size and row["what"] == what:
            result.setdefault(MODES[row["mode"]], {})[row["tokens"]] = row
    return result


def prefill_floors(records: Records, size: str, lengths: Iterable[int]) -> Points:
    """Tokens a second by length at which products and attention run as fast as the product that ops.json has as ceiling."""
    flops = records.get("ops", {}).get("ceilings", {}).get("tensor")
    if flops is None:
        return {}
    c = config_of(size)
    products = sum(
        math.prod(shape) for name, shape in expected_tensors(c).items() if ".layers." in name and len(shape) == 2
    )
    pairs = (
        2 * c.num_hidden_layers * c.num_attention_heads * c.head_dim
    )  # of a query and a key: scores, and sums of values
    return {n: flops / (2 * products + pairs * (n + 1)) for n in lengths}


def prefill_rates(records: Records, size: str) -> dict[str, Points]:
    ours = prefill_rows(records["prefill"], size, "prefill")
    rates = {engine: {n: row["tokens_per_second"] for n, row in rows.items()} for engine, rows in ours.items()}
    return rates | {engine: by for engine, by in peers(records, "prefill", size).items() if engine not in rates}


def sizes_of(record: Record) -> list[str]:
    return list(dict.fromkeys(row["size"] for row in record["rows"]))


def first_token_at(row: Record) -> float:
    """Seconds from the start of the process."""
    return row["spans"]["first token"][0]


def starts(record: Record) -> dict[str, Record]:
    """Seconds by stage from the shell to the first token, medians where there are several runs."""

    def ours(cache: str) -> Record:
        runs = [row for row in record["cuqwen"] if row["kernel_cache"] == cache and row["tokens"] == 1]
        whole = statistics.median(first_token_at(row) for row in runs)
        load, first = (statistics.median(row[key] for row in runs) for key in ("load_seconds", "first_token_seconds"))
        return {"imports": whole - load - first, "load": load, "first token": first}

    peer = record["transformers_bf16"]
    return {
        "cuqwen": ours("warm"),
        "cuqwen, first run on a machine": ours("cold"),
        "transformers": {
            "imports": peer["import_seconds"], "load": peer["load_seconds"], "first token": peer["first_token_seconds"]
        },
    }  # fmt: skip


# --- parts: tables and sentences --------------------------------------------------------------------------------------


def summary(records: Records) -> str:
    decode = records["decode"]
    speed, floor = decode_rows(decode, SIZE, choice="greedy", one_launch=True)[BESIDE], floors(decode, SIZE)[BESIDE]
    others = peers(records, "decode", SIZE)
    beside = ", ".join(f"{name} {others[name][BESIDE]:,.0f}" for name in others if BESIDE in others[name])
    lines = [
        f"- **{speed:,.0f} tokens a second** of Qwen3-{SIZE}'s shape at {BESIDE} tokens of context, {_percent(speed / floor, 0)} of what "
        f"reading weights and cache once allows ({beside}).",
    ]
    if "accuracy" in records:
        figures = records["accuracy"]["results"]["demo"]["figures"]
        closer = figures["transformers bfloat16"]["mean_kl"] / figures["cuqwen"]["mean_kl"]
        lines.append(
            f"- **{closer:.0f} times closer** to a float64 truth, in KL divergence, than transformers in bf16 (`demo`)."
        )
    if "generate" in records:
        times = {name: sum(stages.values()) for name, stages in starts(records["generate"]).items()}
        ours, theirs = times["cuqwen"], times["transformers"]
        commit = records["generate"]["commit"][:7]
        older = "" if records["decode"]["commit"].startswith(commit) else f", at commit {commit}"
        lines.append(
            f"- **{ours:.1f} s** from the shell to the first token{older} (transformers {theirs:.1f} s, without starting Python)."
        )
    if "prefill" in records:
        rates = prefill_rates(records, SIZE)
        beside = ", ".join(
            f"{name} {by[2048]:,.0f}" for name, by in rates.items() if 2048 in by and "cuqwen" not in name
        )
        lines.insert(1, f"- **{rates['cuqwen'][2048]:,.0f} tokens a second** of a prompt of 2,048 tokens ({beside}).")
    return "\n".join([f"On one {decode['gpu'].removeprefix('NVIDIA ')}:", "", *lines])


def decode(records: Records) -> str:
    record = records["decode"]
    ours = decode_rows(record, SIZE, choice="greedy", one_launch=True)
    floor = floors(record, SIZE)
    lines: dict[str, Points] = {"floor": floor, "**cuqwen**, greedy": ours}
    lines["cuqwen, sampled"] = decode_rows(record, SIZE, choice="sampled", one_launch=True)
    for row in record["end_to_end"]:
        if row["tokens_per_second"]:
            name = f"`model.stream`, text and all, {row['choice']}"
            lines[name] = {row["context"]: statistics.median(row["tokens_per_second"])}
    lines["portable kernels, greedy"] = decode_rows(record, SIZE, choice="greedy", one_launch=False)
    lines["portable kernels, sampled"] = decode_rows(record, SIZE, choice="sampled", one_launch=False)
    lines |= peers(records, "decode", SIZE)
    rows = [[name, *(_rate(by.get(n)) for n in ours)] for name, by in lines.items() if set(by) & set(ours)]
    rows.insert(2, ["share of the floor", *(_percent(ours[n] / floor[n], 0) for n in ours)])
    return table(["tokens a second; context", *(f"{n:,}" for n in ours)], rows)


def sizes(records: Records) -> str:
    record, rows = records["decode"], []
    for size in sizes_of(record):
        ours, floor = decode_rows(record, size, choice="greedy", one_launch=True), floors(record, size)
        others = peers(records, "decode", size).get("llama.cpp", {})
        cells = [_rate(ours.get(n)) for n in (BESIDE, 1024)]
        share = _percent(ours[BESIDE] / floor[BESIDE], 0) if BESIDE in ours else NO_VALUE
        rows.append([size, _rate(floor.get(BESIDE)), cells[0], share, cells[1], _rate(others.get(BESIDE))])
    return table(
        [
            "tokens a second; size",
            f"floor at {BESIDE}",
            f"**cuqwen** at {BESIDE}",
            "share",
            "at 1,024",
            f"llama.cpp at {BESIDE}",
        ],
        rows,
    )


def prefill(records: Records) -> str:
    rows = []
    for size in sizes_of(records["prefill"]):
        rates = prefill_rates(records, size)
        floor = prefill_floors(records, size, rates["cuqwen"])
        for tokens, ours in rates["cuqwen"].items():
            share = _percent(ours / floor[tokens], 0) if floor else NO_VALUE
            others = (_rate(rates.get(name, {}).get(tokens)) for name in ("cuqwen, exact", "transformers", "llama.cpp"))
            rows.append([size, f"{tokens:,}", _rate(floor.get(tokens)), _rate(ours), share, *others])
    head = ["floor", "**cuqwen**", "share", "cuqwen, `exact=True`", "transformers", "llama.cpp"]
    return table(["tokens a second; size", "prompt", *head], rows)


def first_token(records: Records) -> str:
    rows = []
    for size in sizes_of(records["prefill"]):
        times = prefill_rows(records["prefill"], size, "first token")
        for tokens in times["cuqwen"]:
            cells = (times.get(engine, {}).get(tokens) for engine in MODES.values())
            rows.append([size, f"{tokens:,}", *(f"{cell['median']:.2f} ms" if cell else NO_VALUE for cell in cells)])
    return table(["size", "prompt", "**cuqwen**", "cuqwen, `exact=True`", "transformers"], rows)


def memory(records: Records) -> str:
    used = records["prefill"]["memory"]
    return (
        f"Planned for {SIZE}: {used['plan']}. Used when the context was full: {used['used_bytes'] / 1e9:.2f} GB, "
        f"{used['percent_of_plan']:.0f} % of the plan."
    )


def start(records: Records) -> str:
    record = records["generate"]
    rows = []
    for name, stages in starts(record).items():
        cells = [f"{stages[stage]:.2f} s" for stage in STAGES]
        rows.append([f"**{name}**" if name == "cuqwen" else name, *cells, f"**{sum(stages.values()):.1f} s**"])
    return table([f"prompt of {record['prompt_tokens']} tokens", *STAGES, "shell to first token"], rows)


def spans(records: Records) -> str:
    runs = [row for row in records["generate"]["cuqwen"] if (row["kernel_cache"], row["tokens"]) == ("warm", 1)]
    run = sorted(runs, key=first_token_at)[len(runs) // 2]
    found = sorted(run["spans"].items(), key=lambda span: span[1])
    rows = [[name, *(f"{t:.2f} s" for t in (begin, end, end - begin))] for name, (begin, end) in found]
    return table(["part, some beside others", "from", "to", "takes"], rows)


def load(records: Records) -> str:
    record = records["load"]
    rows = [["copying page-locked memory to the GPU", f"{record['copy'] / 1e9:.1f} GB/s"]]
    rows += [
        [f"reading the files into page-locked memory, {n} thread{'s' * (n != '1')}", f"{rate / 1e9:.1f} GB/s"]
        for n, rate in record["reads"].items()
    ]
    seconds = statistics.median(record["load_seconds"])
    share = f"{record['percent_of_slower']:.0f} % of the slower of the two"
    rows.append(["**`cuqwen.load`**, all of it", f"**{record['rate'] / 1e9:.1f} GB/s**, {seconds:.2f} s, {share}"])
    if theirs := record["safetensors_torch_seconds"]:
        rows.append(
            ["safetensors for PyTorch, tensors only", f"{record['bytes'] / theirs / 1e9:.1f} GB/s, {theirs:.2f} s"]
        )
    return table([f"{record['bytes'] / 1e9:.1f} GB of {record['size']}'s shape in {record['files']} files", ""], rows)


def environment(records: Records) -> str:
    record = records["environment"]
    added = record["bytes"] - record["bare_venv_bytes"]
    largest = list(record["package_bytes"].items())[:3]
    most = ", ".join(f"{name.split()[0]} {size / 1e6:.0f}" for name, size in largest)
    return f"It adds {added / 1e9:.2f} GB to a virtual environment (of which MB: {most})."


def accuracy(records: Records) -> str:
    results = records["accuracy"]["results"]
    rows = []
    names = next(iter(results.values()))["figures"]
    for name in sorted(names, key=[*CONTENDERS, *names].index):
        figures = [result["figures"][name] for result in results.values()]
        cells = ((_power(f["mean_kl"]), _percent(f["argmax_agreement"])) for f in figures)
        rows.append([CONTENDERS.get(name, name), *(cell for pair in cells for cell in pair)])
    head = [cell for name in results for cell in (f"{CHECKPOINTS[name]}: KL", "same argmax")]
    return table(["", *head], rows)


def ceilings(records: Records) -> str:
    c = records["ops"]["ceilings"]
    rows = [
        ["reading memory", f"{c['read'] / 1e12:.2f} TB/s"], ["copying, read and written bytes", f"{c['copy'] / 1e12:.2f} TB/s"],
        ["an empty node of a CUDA graph", f"{c['node']:.2f} us"],
    ]  # fmt: skip
    if c["tensor"]:
        rows.append(["bf16 product of 8192 x 8192, PyTorch", f"{c['tensor'] / 1e12:.0f} TFLOP/s"])
    return table(["ceiling, measured in the same run", ""], rows)


def operations(records: Records) -> str:
    rows = [row for row in records["ops"]["rows"] if "error" not in row and row["size"] in (SIZE, "8B")]
    tables = []
    for tokens in sorted({row["tokens"] for row in rows}):
        lines = []
        for row in rows:
            if row["tokens"] == tokens:
                theirs = [f"{row[key]:.1f}" if row[key] else NO_VALUE for key in ("torch", "torch_compiled")]
                limit = f"{row['percent_of_ceiling']:.0f} % of {row['ceiling']}"
                name = f"`{row['operation']}` {row['what']}".strip()
                floor = f"{row['floor_microseconds']:.1f}"
                lines.append([name, row["size"], f"{row['microseconds']:.1f}", floor, limit, *theirs])
        tables.append(
            f"{tokens:,} token{'s' * (tokens > 1)}:\n\n"
            + table(["us in a CUDA graph", "size", "cuqwen", "floor", "share", "torch", "compiled"], lines)
        )
    return "\n\n".join(tables)


def products(records: Records) -> str:
    """Of one token, which reads all weights: the share of the ceiling at each size, and the bytes."""
    shares: dict[str, dict[str, str]] = {}
    for row in records["ops"]["rows"]:
        if "error" not in row and row["tokens"] == 1 and row["operation"] in ("qkv_rope", "matmul", "swiglu"):
            size = row["gigabytes_per_second"] * row["microseconds"] / 1e3
            name = f"`{row['operation']}` {row['what']}".strip()
            shares.setdefault(name, {})[row["size"]] = f"{row['percent_of_ceiling']:.0f} % of {size:,.0f} MB"
    sizes = list(dict.fromkeys(size for row in shares.values() for size in row))
    return table(["", *sizes], [[name, *(row.get(size, NO_VALUE) for size in sizes)] for name, row in shares.items()])


def large(records: Records) -> str:
    rows = []
    for row in records["ops"]["rows"]:
        if row["size"] != "large" or "error" in row:
            continue
        unit, rate = ("TFLOP/s", "teraflops") if row["ceiling"] == "tensor" else ("GB/s", "gigabytes_per_second")
        same = row["torch"] and not row["what"].endswith("float32")  # torch's is in bf16 and moves half the bytes
        theirs = _rate(row[rate] * row["microseconds"] / row["torch"]) if same else NO_VALUE
        limit = f"{row['percent_of_ceiling']:.0f} % of {row['ceiling']}"
        name = f"`{row['operation']}` {row['what']}"
        rows.append([name, f"{row['tokens']:,}", unit, _rate(row[rate]), limit, theirs])
    return table(["", "T", "unit", "cuqwen", "share", "torch"], rows)


def sources(records: Records) -> str:
    lines = []
    for name, record in records.items():
        if name == "peers":
            engines = "; ".join(f"{engine}: {what}" for engine, what in record["engines"].items())
            lines.append(f"- {_link(name)}: {record['gpu']}, {record['date']}, in runs of their own. {engines}.")
            continue
        parts = [f"`{record['command']}`"]
        if record["gpu"]:
            parts += [record["gpu"], f"driver {record['driver']}"]
        parts.append(record["date"][:10])
        if record["commit"] != "unknown":
            parts.append(f"commit {record['commit'][:7]}")
        if record["gpu"]:
            used = ("cupy-cuda13x", "cupy-cuda12x", "torch", "transformers")
            parts += [f"{key} {record['versions'][key]}" for key in used if key in record["versions"]]
        lines.append(f"- {_link(name)}: {', '.join(parts)}.")
    return "\n".join(lines)


def _link(name: str) -> str:
    return f"[{name}.json](../benchmarks/results/{name}.json)"


def _rate(x: float | None) -> str:
    return NO_VALUE if x is None else f"{x:,.0f}"


def _power(x: float) -> str:
    """Two digits: 1.4e-4."""
    mantissa, exponent = f"{x:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _percent(x: float, digits: int = 2) -> str:
    return f"{100 * x:.{digits}f} %"


class Part(NamedTuple):
    """What goes between two markers. needs: the record and a field of it without which it is left out. picture: of PICTURES."""

    make: Callable[[Records], str]
    needs: tuple[str, str]
    picture: str | None = None


PARTS = {
    "summary": Part(summary, ("decode", "rows")),
    "decode": Part(decode, ("decode", "rows")),
    "decode picture": Part(lambda records: "", ("decode", "rows"), "decode"),
    "sizes": Part(sizes, ("decode", "rows")),
    "prefill": Part(prefill, ("prefill", "rows")),
    "prefill picture": Part(lambda records: "", ("prefill", "rows"), "prefill"),
    "first token": Part(first_token, ("prefill", "rows")),
    "memory": Part(memory, ("prefill", "memory")),
    "start": Part(start, ("generate", "cuqwen")),
    "start picture": Part(lambda records: "", ("generate", "cuqwen"), "start"),
    "spans": Part(spans, ("generate", "cuqwen")),
    "load": Part(load, ("load", "rate")),
    "environment": Part(environment, ("environment", "package_bytes")),
    "accuracy": Part(accuracy, ("accuracy", "results")),
    "ceilings": Part(ceilings, ("ops", "ceilings")),
    "operations": Part(operations, ("ops", "ceilings")),
    "products": Part(products, ("ops", "ceilings")),
    "large": Part(large, ("ops", "ceilings")),
    "sources": Part(sources, ("decode", "rows")),
}


# --- pictures ---------------------------------------------------------------------------------------------------------


def decode_lines(records: Records) -> dict[str, Points]:
    record = records["decode"]
    ours = decode_rows(record, SIZE, choice="greedy", one_launch=True)
    return {"floor": floors(record, SIZE), "cuqwen": ours, **peers(records, "decode", SIZE)}


def prefill_lines(records: Records) -> dict[str, Points]:
    rates = prefill_rates(records, SIZE)
    floor = prefill_floors(records, SIZE, rates["cuqwen"])
    return ({"floor": floor} if floor else {}) | rates


def draw_lines(lines: dict[str, Points], xlabel: str, ylabel: str, least: float) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axis = figure.subplots()
    for name, by in lines.items():
        points = sorted((max(x, least), y) for x, y in by.items())
        width = 2.2 if name == "cuqwen" else 1.2
        axis.plot(
            *zip(*points, strict=True), "--" if name == "floor" else "-o", color=COLOURS[name], markersize=4, linewidth=width,
            label=name, zorder=3 if name == "cuqwen" else 2,
        )  # fmt: skip
    ticks = sorted({max(x, least) for name, by in lines.items() for x in by})
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [f"{x / 1024:g}k" if x % 1024 == 0 else f"{x:g}" for x in ticks])
    axis.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, None))
    axis.yaxis.set_major_formatter("{x:,.0f}")
    axis.grid(axis="y", color="#EEEEEE")
    figure.legend(loc="outside right upper")
    return figure


def draw_start(rows: dict[str, Record]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 0.45 * len(rows) + 1.1), layout="constrained")
    axis = figure.subplots()
    left = dict.fromkeys(rows, 0.0)
    for stage, colour in STAGES.items():
        widths = [stages[stage] for stages in rows.values()]
        axis.barh(list(rows), widths, left=list(left.values()), color=colour, label=stage, height=0.6)
        left = {name: left[name] + stages[stage] for name, stages in rows.items()}
    for y, total in enumerate(left.values()):
        axis.annotate(f"{total:.1f} s", (total, y), (4, 0), textcoords="offset points", va="center")
    axis.invert_yaxis()
    axis.set(xlabel="seconds from the shell to the first token", xlim=(0, 1.08 * max(left.values())))
    figure.legend(loc="outside upper center", ncols=len(STAGES))
    return figure


class Picture(NamedTuple):
    """data: what is drawn, from the records. draw: the figure, from data."""

    caption: str
    data: Callable[[Records], Any]
    draw: Callable[[Any], Any]


PICTURES = {
    "decode": Picture(
        f"Tokens a second of {SIZE} by context, beside the floor and other engines", decode_lines,
        lambda data: draw_lines(data, "tokens of context", "tokens a second", 20),
    ),
    "prefill": Picture(
        f"Tokens a second of {SIZE} by length of the prompt, beside other engines", prefill_lines,
        lambda data: draw_lines(data, "tokens of the prompt", "tokens a second", 1),
    ),
    "start": Picture(
        "From the shell to the first token, by stage", lambda records: starts(records["generate"]), draw_start
    ),
}  # fmt: skip


def is_there(records: Records, part: Part) -> bool:
    name, field = part.needs
    return field in records.get(name, {})


def digest(data: Any) -> str:
    return "data sha256 " + hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def pictures(records: Records) -> Iterator[tuple[str, Picture, Any]]:
    """(name, picture, its data) of those that the records allow."""
    for part in PARTS.values():
        if part.picture is not None and is_there(records, part):
            picture = PICTURES[part.picture]
            yield part.picture, picture, picture.data(records)


def draw(records: Records, folder: Path) -> None:
    """Write those pictures whose data has changed."""
    for name, picture, data in pictures(records):
        path = folder / f"{name}.svg"
        if not (path.exists() and digest(data) in path.read_text(encoding="utf-8")):
            use_style(name)
            save(picture.draw(data), path, digest(data))


# --- pages ------------------------------------------------------------------------------------------------------------


def parts(records: Records, page: str) -> dict[str, str]:
    """The text of every part, as `page` needs it."""
    result = {}
    for name, part in PARTS.items():
        record = part.needs[0]
        if not is_there(records, part):
            missing = f"Not measured yet: `python -m benchmarks.{record}` makes the record that this is filled from."
            result[name] = f"(No picture without {record}.json.)" if part.picture else missing
        elif part.picture is not None:
            path = posixpath.relpath(f"docs/images/{part.picture}.svg", posixpath.dirname(page) or ".")
            result[name] = f"![{PICTURES[part.picture].caption}]({path})"
        else:
            result[name] = part.make(records)
    return result


def write(root: Path, names: Iterable[str] = PAGES) -> None:
    """Fill in the pages and draw the pictures of the checkout in `root`."""
    records = read(root / "benchmarks" / "results")
    for name in names:
        page = root / name
        text = page.read_text(encoding="utf-8")
        filled = fill_in(text, "benchmarks", parts(records, name))
        if filled != text:
            page.write_text(filled, encoding="utf-8")
            print(f"filled in: {page}")
    draw(records, root / "docs" / "images")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=ROOT, help="another checkout than this one")
    write(parser.parse_args().root)


if __name__ == "__main__":
    main()
