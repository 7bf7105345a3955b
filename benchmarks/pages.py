"""What fills committed pages from committed data: marked parts, tables, pictures that are the same for the same data."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def marked(text: str, kind: str) -> dict[str, str]:
    """What stands in each part of a page that begins with `<!-- KIND: NAME -->` and ends with `<!-- end -->`, by name."""
    return {name: body.strip("\n") for name, body in re.findall(_pattern(kind), text, re.S)}


def fill_in(text: str, kind: str, parts: Mapping[str, str]) -> str:
    """The page with `parts` in their places. Raises KeyError for a part that nobody makes."""
    return re.sub(_pattern(kind), lambda m: f"<!-- {kind}: {m[1]} -->\n{parts[m[1]]}\n<!-- end -->", text, flags=re.S)


def _pattern(kind: str) -> str:
    return rf"<!-- {kind}: ([\w ]+) -->\n(.*?)<!-- end -->"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = [head, [":--", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def use_style(salt: str) -> None:
    """matplotlib set so that text stays text and the same data gives the same bytes."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams.update(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": salt,
            "font.size": 9,
            "font.family": "sans-serif",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
            "savefig.facecolor": "white",
        }
    )


def save(figure: Any, path: Path, description: str | None = None) -> None:
    """Write `figure` as SVG. description: a text that the file holds, for those who ask what it was drawn from."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None} | ({} if description is None else {"Description": description})
    figure.savefig(path, metadata=metadata, bbox_inches="tight")
    path.write_text(re.sub(r"[ \t]+$", "", path.read_text(encoding="utf-8"), flags=re.M), encoding="utf-8")
    print(f"drawn: {path}")
