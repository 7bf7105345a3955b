"""CUDA sources as the compiler gets them: one text for each entry point."""

from __future__ import annotations

import re
from pathlib import Path

# Inside the package in a wheel, beside it in a checkout or an editable install.
KERNEL_FOLDER = next(
    (p for p in (Path(__file__).parent / "kernels", Path(__file__).parent.parent / "kernels") if p.is_dir()),
    Path(__file__).parent / "kernels",
)

PASTED = re.compile(r'\n#(?:pragma once|include "([^"]+)").*')
ENTRY = re.compile(r'extern "C" (__global__\s+void\s+(?:__\w+__\((?:[^()]|\([^()]*\))*\)(?:\s|//.*)*)*(\w+))')


def source(file: str, entry: str | None = None) -> str:
    """The text of `kernels/<file>.cu` with our own headers pasted in, each once.

    With `entry`, all other entry points are templates that nobody instantiates: the one that is needed takes 0.1 to 0.5
    seconds to compile where all of qkv_rope take 1.7.

    CuPy's disk cache is keyed by the source text and not by the files that it includes, so a changed header would
    otherwise bring back the old kernel. `#line` keeps compiler messages pointing at the real files.
    """
    pasted: set[str] = set()

    def paste(name: str) -> str:
        text = f'#line 1 "kernels/{name}"\n{(KERNEL_FOLDER / name).read_text(encoding="utf-8")}'

        def put(found: re.Match[str]) -> str:
            header = found[1]
            if header is None or header in pasted:
                return "\n"
            pasted.add(header)
            number = text.count("\n", 0, found.start()) + 2
            return f'\n{paste(header)}#line {number} "kernels/{name}"'

        return PASTED.sub(put, text)

    text = paste(f"{file}.cu")
    if entry is None:
        return text
    return ENTRY.sub(lambda found: found[0] if found[2] == entry else f"template <int> {found[1]}", text)
