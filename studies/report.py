"""The study's record as plots and as the tables of docs/precision.md. Needs matplotlib; neither torch nor a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.pages import save, use_style

CHECKPOINTS = ("demo", "ordinary", "heavy")
# In the order of the forward pass, as in `variants.BOUNDARIES`, which needs more to be imported.
ATTENTION_INPUT = {
    "bf16_h": "normalised input h",
    "bf16_projections": "projections of q, k, before the gain",
    "bf16_rotated": "q, k gained and rotated, before the scalar",
    "bf16_cos_sin": "cos/sin table",
    "bf16_q": "q after its norm",
    "bf16_k": "k after its norm (the cache)",
    "bf16_v": "v (the cache)",
}
ELSEWHERE = {
    "bf16_attention": "attention output",
    "bf16_residual": "residual stream",
    "bf16_mlp_input": "normalised input of the MLP",
    "bf16_gate_up": "gate and up",
    "bf16_activation": "silu(gate) · up",
    "bf16_final_norm": "final norm",
    "bf16_logits": "logits",
}
SINGLE = {**ATTENTION_INPUT, **ELSEWHERE}
WHOLE = {
    "transformers_bfloat16": "transformers, bf16",
    "fused": "fused kernel, bf16 inside",
    "fused_roundings": "its five roundings, in separate kernels",
    "fused_float32": "fused kernel, float32 inside, bf16 cache",
    "ours": "cuqwen (bf16 cache)",
    "ours_float32_cache": "cuqwen, float32 cache",
    "transformers_float32": "transformers, float32",
    "norm_after_rope": "cuqwen, literal \"norm after RoPE\"",
}  # fmt: skip
OTHERS = {
    "bf16_k_unrotated": "k after its norm, before its rotation",
    "bf16_attention_input": "all seven of the attention input",
    "bf16_all": "all fourteen",
}
LABELS = {**WHOLE, **SINGLE, **OTHERS}

# Okabe and Ito's colours, which colour-blind readers can tell apart
COLOURS = {
    "transformers_bfloat16": "#0072B2",
    "fused": "#D55E00",
    "ours": "#009E73",
    "ours_float32_cache": "#56B4E9",
    "transformers_float32": "#999999",
    "norm_after_rope": "#CC79A7",
}
MARKERS = {"demo": ("#0072B2", "o"), "ordinary": ("#009E73", "s"), "heavy": ("#BBBBBB", "D")}


# --- plots ----------------------------------------------------------------------------------------------------------


def draw(record: dict[str, Any], folder: Path) -> None:
    """Write precision-layers.svg, precision-kl.svg, precision-boundaries.svg and precision-gains.svg into `folder`."""
    use_style("precision")
    parts = {"layers": _layers, "kl": _kl, "boundaries": _boundaries, "gains": _gains}
    for name, part in parts.items():
        if (figure := part(record)) is not None:
            save(figure, folder / f"precision-{name}.svg")


def _title(name: str, record: dict[str, Any]) -> str:
    part = record["checkpoints"][name]
    kind = {"demo": "demo, trained", "ordinary": "random, ordinary gains", "heavy": "random, heavy gains"}[name]
    return f"{kind}{' (tiny)' if part['tiny'] else ''}, {part['tokens']} tokens"


def _panels(record: dict[str, Any], names: list[str], height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(8.5, 3.4 * len(names)), height), layout="constrained")
    return figure, figure.subplots(1, len(names), sharey=True, squeeze=False)[0]


def _layers(record: dict[str, Any]) -> Any:
    """Error of the residual stream by layer, one panel a checkpoint."""
    names = list(record["checkpoints"])
    figure, axes = _panels(record, names, 3.6)
    for axis, name in zip(axes, names, strict=True):
        figures = record["checkpoints"][name]["figures"]
        for key in SINGLE:
            errors = figures[key]["error_by_layer"]
            axis.plot(range(1, len(errors) + 1), errors, color="#DDDDDD", linewidth=0.7, zorder=1)
        for key, colour in COLOURS.items():
            errors = figures[key]["error_by_layer"]
            style = "--" if key == "fused" else "-"
            axis.plot(range(1, len(errors) + 1), errors, style, color=colour, linewidth=1.6, label=LABELS[key])
        axis.set(yscale="log", xlabel="layer")
        axis.set_title(_title(name, record), fontsize=9)
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0].set_ylabel("relative error of the residual stream")
    axes[0].plot([], [], color="#DDDDDD", linewidth=0.7, label="one boundary in bf16")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure


def _kl(record: dict[str, Any]) -> Any:
    """Mean KL of everything that was measured, one row each."""
    from matplotlib.figure import Figure

    rows = list(LABELS)
    figure = Figure(figsize=(7.5, 0.24 * len(rows) + 1.2), layout="constrained")
    axis = figure.subplots()
    for name, part in record["checkpoints"].items():
        colour, marker = MARKERS[name]
        points = [part["figures"][key] for key in rows]
        kl = [max(f["mean_kl"], 1e-13) for f in points]  # float64's own noise may be negative
        spread = [min(2 * f["kl_standard_error"], 0.9 * x) for f, x in zip(points, kl, strict=True)]
        style = {"fmt": marker, "color": colour, "markersize": 5, "linewidth": 1}
        axis.errorbar(kl, range(len(rows)), xerr=spread, label=_title(name, record), **style)
    for edge in (len(WHOLE), len(WHOLE) + len(ATTENTION_INPUT), len(WHOLE) + len(SINGLE)):
        axis.axhline(edge - 0.5, color="#DDDDDD", linewidth=0.8)
    axis.set_yticks(range(len(rows)), [LABELS[key] for key in rows])
    axis.set(xscale="log", xlabel="mean KL of the logits against float64, nats (bars: ± 2 standard errors)")
    axis.invert_yaxis()
    axis.grid(axis="x", color="#EEEEEE")
    axis.set_axisbelow(True)
    figure.legend(loc="outside upper center", ncols=3)
    return figure


def _boundaries(record: dict[str, Any]) -> Any:
    """What one boundary in bf16 costs, in percent of the KL of all fourteen; the logits' share would dwarf the rest."""
    names = [name for name in ("demo", "ordinary") if name in record["checkpoints"]]
    if not names:
        return None
    figure, axes = _panels(record, names, 3.6)
    keys = [key for key in SINGLE if key != "bf16_logits"]
    for axis, name in zip(axes, names, strict=True):
        figures = record["checkpoints"][name]["figures"]
        percent = figures["bf16_all"]["mean_kl"] / 100
        shares = [figures[key]["mean_kl"] / percent for key in keys]
        spread = [2 * figures[key]["kl_standard_error"] / percent for key in keys]
        colours = ["#D55E00" if key in ATTENTION_INPUT else "#999999" for key in keys]
        axis.barh(range(len(keys)), shares, xerr=spread, color=colours, error_kw={"linewidth": 0.8})
        logits = figures["bf16_logits"]["mean_kl"] / percent
        axis.set_xlabel(
            f"percent of the KL of all fourteen\nlogits, not drawn: {logits:.0f} %; sum: {sum(shares) + logits:.0f} %"
        )
        axis.set_title(_title(name, record), fontsize=9)
    axes[0].set_yticks(range(len(keys)), [SINGLE[key] for key in keys])
    axes[0].invert_yaxis()
    return figure


def _gains(record: dict[str, Any]) -> Any:
    """Error of the logits as the Q gains of the heavy checkpoint shrink while its K gains stay."""
    if "sweep" not in record:
        return None
    from matplotlib.figure import Figure

    points = [{"q_gains_divided_by": 1, **record["checkpoints"]["heavy"]["figures"]}, *record["sweep"]]
    figure = Figure(figsize=(4.6, 3.2), layout="constrained")
    axis = figure.subplots()
    for key in ("transformers_bfloat16", "fused", "ours", "ours_float32_cache"):
        x, y = zip(*((p["q_gains_divided_by"], p[key]["relative_error"]) for p in points), strict=True)
        axis.plot(x, y, "--o" if key == "fused" else "-o", color=COLOURS[key], markersize=4, label=LABELS[key])
    axis.set_xscale("log", base=2)
    axis.set_xticks([p["q_gains_divided_by"] for p in points], [str(p["q_gains_divided_by"]) for p in points])
    axis.set(yscale="log", ylabel="relative error of the logits")
    axis.set_xlabel("Q gains divided by (K gains stay, up to 96.5)")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


# --- tables ---------------------------------------------------------------------------------------------------------


def table(record: dict[str, Any]) -> str:
    """All variants: mean KL, argmax agreement and error on demo and ordinary; errors after layers 1 and L on heavy."""
    columns: list[tuple[str, str, Any]] = []
    for name in ("demo", "ordinary"):
        columns += [
            (name, f"{name}: KL", lambda f: _power(f["mean_kl"])),
            (name, "argmax", lambda f: f"{f['argmax_agreement']:.2%}".replace("%", " %")),
            (name, "error", lambda f: _power(f["relative_error"])),
        ]
    columns += [
        ("heavy", "heavy: error after layer 1", lambda f: _power(f["error_by_layer"][0])),
        ("heavy", "after the last", lambda f: _power(f["error_by_layer"][-1])),
    ]
    columns = [column for column in columns if column[0] in record["checkpoints"]]
    lines = ["| " + " | ".join(["", *(title for _, title, _ in columns)]) + " |"]
    lines.append("|" + "|".join([":--", *["--:" for _ in columns]]) + "|")

    def row(key: str) -> str:
        cells = [cell(record["checkpoints"][name]["figures"][key]) for name, _, cell in columns]
        return "| " + " | ".join([LABELS[key], *cells]) + " |"

    def heading(text: str) -> str:
        return "| " + " | ".join([f"**{text}**", *["" for _ in columns]]) + " |"

    lines += [heading("Whole forward passes"), *map(row, WHOLE)]
    lines += [
        heading("cuqwen with a float32 cache, one boundary in bf16: the attention input"),
        *map(row, ATTENTION_INPUT),
    ]
    lines += [heading("... elsewhere"), *map(row, ELSEWHERE)]
    lines += [heading("... instead, and several at once"), *map(row, OTHERS)]
    return "\n".join(lines)


def _power(x: float) -> str:
    """Two digits: 1.4e-4."""
    mantissa, exponent = f"{x:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def provenance(record: dict[str, Any]) -> str:
    """One sentence: where, when and with what the figures were measured."""
    versions = record["versions"]
    used = ", ".join(
        f"{name} {versions[name]}" for name in ("torch", "transformers", "cupy-cuda13x") if name in versions
    )
    tokens = ", ".join(f"{name} {part['tokens']}" for name, part in record["checkpoints"].items())
    where = record["gpu"] or "a CPU (a rehearsal)"
    return f"Measured on {where}, {record['date'][:10]}, {used}; tokens: {tokens}. Command: `{record['command']}`."


def fill_in(page: Path, record: dict[str, Any]) -> None:
    """Replace what stands between the markers of `page`; raises ValueError if they are not there once each."""
    text = page.read_text(encoding="utf-8")
    for name, content in {"table": table(record), "provenance": provenance(record)}.items():
        begin, end = f"<!-- {name}: from studies/results/precision.json -->", f"<!-- end of {name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"{page}: wanted the markers {begin!r} and {end!r} once each")
        head, rest = text.split(begin)
        text = f"{head}{begin}\n{content}\n{end}{rest.split(end)[1]}"
    page.write_text(text, encoding="utf-8")
    print(f"filled in: {page}")
