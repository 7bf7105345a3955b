"""Pages of docs/ that follow from the sources: docs/interface.md, and the marked parts of docs/models.md.

    python -m tools.make_docs [--root FOLDER]

The interface is what the sources say: signatures and docstrings of the public Python names, and the heads of the kernels as
far as a caller needs them. A test fails where a page and the sources differ.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np

from benchmarks.pages import fill_in, table
from cuqwen import config, memory, sizes, weights
from cuqwen.cache import KVCache
from cuqwen.cuda import STORAGE
from cuqwen.model import CHUNK, Device, activation_dtype

ROOT = Path(__file__).resolve().parent.parent
BF16 = np.dtype(ml_dtypes.bfloat16)
CONTEXTS = (4096, 16384, 40960, 131072)
PYTHON = (  # heading, module, names; a class with its public methods
    ("Loading and generating", "api", ("load", "Model")),
    ("One generated token", "generate", ("Step",)),
    ("What a model needs", "memory", ("MemoryPlan",)),
    ("Errors", "strict_json", ("CheckpointError",)),
    ("", "launch", ("DeviceError",)),
    ("Rotary embedding", "rope", ("rope_table",)),
)
INTERFACE = """# Interface

Made by `python -m tools.make_docs` from the sources' own docstrings and heads; do not edit it here.

`import cuqwen` gives `load`, `Model`, `Step`, `rope_table`, `CheckpointError`, `DeviceError`, `ops`, and of the operations
`rmsnorm`, `qkv_rope` and `qk_norm`. Letters: T tokens of a call, S rows of the cache, C hidden size, H query heads, K key and
value heads, D head size, F feed-forward size, V vocabulary.
"""


# --- Python -------------------------------------------------------------------------------------------------------------


def stub(source: str, name: str) -> str:
    """A function or class of a module's text as its signature and docstring; a class with its fields and public methods."""
    lines = source.splitlines()
    (node,) = (item for item in ast.parse(source).body if getattr(item, "name", None) == name)
    if not isinstance(node, ast.ClassDef):
        return _head(node, lines)
    parts = [_head(node, lines)]
    fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
    if fields:
        parts.append("\n".join(lines[fields[0].lineno - 1 : fields[-1].end_lineno]))
    methods = [item for item in node.body if isinstance(item, ast.FunctionDef) and not item.name.startswith("_")]
    return "\n\n".join([*parts, *(_head(item, lines) for item in methods)])


def _head(node: ast.stmt, lines: list[str]) -> str:
    """From the decorators to the end of the docstring, or of the signature where there is none."""
    assert isinstance(node, (ast.FunctionDef, ast.ClassDef))
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    has_docstring = ast.get_docstring(node) is not None
    last = node.body[0].end_lineno if has_docstring else node.body[0].lineno - 1
    return "\n".join(lines[first - 1 : last])


def python_part(root: Path) -> str:
    result = ["## Python"]
    for heading, module, names in PYTHON:
        source = (root / "cuqwen" / f"{module}.py").read_text(encoding="utf-8")
        result += [f"### {heading}"] if heading else []
        result += [f"```python\n{stub(source, name)}\n```" for name in names]
    source = (root / "cuqwen" / "ops.py").read_text(encoding="utf-8")
    result += ["### Operations", f"```text\n{ast.get_docstring(ast.parse(source))}\n```"]
    public = [f.name for f in ast.parse(source).body if isinstance(f, ast.FunctionDef) and f.name in operations(root)]
    result += [f"#### `{name}`\n\n```python\n{stub(source, name)}\n```" for name in public]
    return "\n\n".join(result)


def operations(root: Path) -> set[str]:
    """The names that kernels and the functions of the reference share."""
    tree = ast.parse((root / "cuqwen" / "reference.py").read_text(encoding="utf-8"))
    functions = {item.name for item in tree.body if isinstance(item, ast.FunctionDef)}
    return functions & {path.stem for path in (root / "kernels").glob("*.cu")}


# --- kernels ------------------------------------------------------------------------------------------------------------


def kernel_head(source: str) -> str:
    """What a .cu file says of itself up to its constants: formula, entry points, arguments."""
    head = source.split("#include")[0].split('extern "C"')[0]
    lines = [line.removeprefix("//").removeprefix(" ") for line in head.splitlines() if line.startswith("//")]
    end = next((i for i, line in enumerate(lines) if line.startswith("Work")), len(lines))
    return "\n".join(lines[:end]).rstrip()


def kernel_part(root: Path) -> str:
    result = [
        "## Kernels",
        "Each is compiled at run time with the constants defined before its source (see [architecture.md](architecture.md)) "
        "and launched by [cuda.py](../cuqwen/cuda.py). The rest of each head stays in the file: how the work is divided, "
        "precision, error bound, traffic, determinism, limits.",
    ]
    for path in sorted((root / "kernels").glob("*.cu")):
        head = kernel_head(path.read_text(encoding="utf-8"))
        result.append(f"### [{path.name}](../kernels/{path.name})\n\n```text\n{head}\n```")
    return "\n\n".join(result)


# --- models -------------------------------------------------------------------------------------------------------------


def plan(size: str, context: int, exact: bool = False) -> memory.MemoryPlan:
    """What `load` would plan on a GPU with room for everything, cache in bf16."""
    c, device = sizes.config_of(size), Device.cuda()
    stored = [(shape, "BF16") for shape in weights.expected_tensors(c).values()]
    dtype = activation_dtype("cuda", device.dtype, exact, {BF16})
    chunk = min(CHUNK["cuda"], context)
    row = KVCache.bytes_per_token(c, BF16) + c.head_dim * device.dtype.itemsize + 4
    return memory.MemoryPlan(
        "cuda", memory._weight_bytes(stored, device), row,
        memory._workspace_bytes(c, chunk, device, dtype, BF16, {BF16}), context, chunk, None,
    )  # fmt: skip


def sizes_part() -> str:
    rows = []
    for size in sizes.SIZES:
        c = sizes.config_of(size)
        parameters = sum(int(np.prod(shape)) for shape in weights.expected_tensors(c).values())
        shape = (
            c.num_hidden_layers,
            c.hidden_size,
            c.intermediate_size,
            c.num_attention_heads,
            c.num_key_value_heads,
            c.head_dim,
        )
        per_token = KVCache.bytes_per_token(c, BF16)
        rows.append(
            [
                size,
                *(f"{n:,}" for n in shape),
                "yes" if c.tie_word_embeddings else "no",
                f"{parameters / 1e9:.2f}",
                f"{per_token:,}",
            ]
        )
    head = [
        "Qwen3",
        "layers",
        "C",
        "F",
        "H",
        "K",
        "D",
        "head is the embedding",
        "parameters, 1e9",
        "cache bytes a token, bf16",
    ]
    return table(head, rows)


def memory_part() -> str:
    rows = []
    for size in sizes.SIZES:
        plans = [plan(size, context) for context in CONTEXTS]
        first = [f"{plans[0].weights / 1e9:.1f}", f"{max(p.workspace for p in plans) / 1e9:.1f}"]
        rows.append([size, *first, *(f"{p.total / 1e9:.1f}" for p in plans)])
    return table(["GB; size", "weights", "workspace", *(f"in all at {n:,}" for n in CONTEXTS)], rows)


def refused_part() -> str:
    rows = [
        [f"`{key}`", " or ".join(["absent", *(f"`{json.dumps(value)}`" for value in harmless)]), remedy]
        for key, (harmless, remedy) in config._MARKS.items()
    ]
    return table(["key of config.json", "served", "otherwise refused, with the remedy"], rows).replace(
        ":-- | --: | --:", ":-- | :-- | :--"
    )


def dtypes_part() -> str:
    served = ", ".join(f"`{name}`" for name in weights.DTYPES)
    stored = ", ".join(f"`{name}`" for name in STORAGE.values())
    return f"Types in the file: {served} (safetensors' names); in the kernels: {stored}."


def config_part(root: Path) -> str:
    sources = {"Config": "config.py", "Yarn": "yarn.py"}
    stubs = [stub((root / "cuqwen" / file).read_text(encoding="utf-8"), name) for name, file in sources.items()]
    shown = [re.sub(r"\n\n    @property.*", "", text, flags=re.S) for text in stubs]
    return "```python\n" + "\n\n\n".join(shown) + "\n```"


def pages(root: Path) -> dict[str, str]:
    """The text of each page that is made here, by its path."""
    models = (root / "docs" / "models.md").read_text(encoding="utf-8")
    made = {
        "sizes": sizes_part(), "memory": memory_part(), "refused": refused_part(), "dtypes": dtypes_part(),
        "config": config_part(root),
    }  # fmt: skip
    interface = "\n\n".join([INTERFACE.rstrip(), python_part(root), kernel_part(root)]) + "\n"
    return {"docs/interface.md": interface, "docs/models.md": fill_in(models, "generated", made)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=ROOT, help="another checkout than this one")
    root = parser.parse_args().root
    for name, text in pages(root).items():
        (root / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
