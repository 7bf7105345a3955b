"""The safetensors files of a checkpoint: what their headers say, and reading from them.

Files are read and not mapped: a mapped file that shrinks meanwhile ends the process, and page faults one after another are
slower than large reads.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import ml_dtypes
import numpy as np

from cuqwen.config import CheckpointError, describe_folder, read_json

_WINDOW = 64 << 20  # bytes of a tensor that are looked at together, four times
DTYPES = {name: np.dtype(t) for name, t in (("BF16", ml_dtypes.bfloat16), ("F16", np.float16), ("F32", np.float32))}


@dataclass(frozen=True)
class Tensor:
    """Where one tensor is stored."""

    path: Path
    offset: int  # in the file, of its first byte
    stored_name: str
    shape: tuple[int, ...]
    dtype: str  # safetensors' name

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def chunks(self) -> list[tuple[int, int]]:
        """Ranges of the first axis, each of at most a quarter window (but at least one row)."""
        rows = max(1, (_WINDOW // 4) // (self.nbytes // self.shape[0]))
        return [(start, min(start + rows, self.shape[0])) for start in range(0, self.shape[0], rows)]

    def rows(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows start..stop, without `stop` all from `start` on: an array of its own."""
        array = np.empty(((self.shape[0] if stop is None else stop) - start, *self.shape[1:]), DTYPES[self.dtype])
        with opened(self.path) as file:
            file.seek(self.offset + start * (self.nbytes // self.shape[0]))
            read_into(file, array.reshape(-1).view(np.uint8).data)
        return array


def opened(path: Path) -> FileIO:
    try:
        return open(path, "rb", buffering=0)
    except OSError as error:
        raise CheckpointError(_unreadable(path, error)) from error


def read_into(file: FileIO, memory: memoryview) -> None:
    """The next bytes, as many as `memory` has."""
    try:
        filled = count = file.readinto(memory)
        while count and filled < len(memory):  # the system may give less than it was asked for
            count = file.readinto(memory[filled:])
            filled += count
    except OSError as error:
        raise CheckpointError(_unreadable(Path(file.name), error)) from error
    if filled < len(memory):
        raise CheckpointError(
            f"{file.name}: wanted {file.tell() - filled + len(memory)} bytes or more, got {file.tell()}: it has become shorter "
            "while it was read. Download the file again"
        )


def survey(folder: Path, expected: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """All tensors that are used, by checkpoint name, in file order, after comparing them with the `expected` shapes.

    A stored `lm_head.weight` is part of the result also where it is not expected. Raises CheckpointError.
    """
    allowed = expected | {"lm_head.weight": expected["model.embed_tokens.weight"]}
    files = _files(folder)
    found: dict[str, Tensor] = {}
    wrong: dict[str, list[str]] = {"unexpected": [], "misshaped": [], "found twice": [], "not BF16, F16 or F32": []}
    for tensor in _stored_tensors(files):
        name = _full_name(tensor.stored_name)
        if tensor.dtype not in DTYPES:
            wrong["not BF16, F16 or F32"].append(f"{name} ({tensor.dtype})")
        if name not in allowed:
            wrong["unexpected"].append(name)
        elif name in found:
            wrong["found twice"].append(f"{name} (in {found[name].path.name} and in {tensor.path.name})")
        elif tensor.shape != allowed[name]:
            wrong["misshaped"].append(f"{name} (wanted {list(allowed[name])}, got {list(tensor.shape)})")
        found.setdefault(name, tensor)
    wrong = {"missing": [name for name in expected if name not in found], **wrong}
    if any(wrong.values()):
        places = {
            _full_name(name): f" (the index promises it in {path.name})" for path in files for name in files[path]
        }
        wrong["missing"] = [name + places.get(name, "") for name in wrong["missing"]]
        differences = [f"{len(names)} {kind}: {shortened(names)}" for kind, names in wrong.items() if names]
        remedy = "Download config.json and all *.safetensors of one dense Qwen checkpoint again"
        if wrong["not BF16, F16 or F32"]:
            remedy = "Use the unquantised checkpoint, or save it again in bfloat16, float16 or float32"
        raise CheckpointError(
            f"{folder}: wanted the {len(expected)} tensors that config.json asks for, "
            f"got {'; '.join(differences)}. {remedy}"
        )
    return found


def _stored_tensors(files: Iterable[Path]) -> Iterator[Tensor]:
    """What the headers say, in the order of the data, without the rotary buffers."""
    for path in files:
        _check_file(path)
        with opened(path) as file:
            size = bytearray(8)
            read_into(file, memoryview(size))
            header = bytearray(int.from_bytes(size, "little"))
            read_into(file, memoryview(header))
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        for stored_name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            if not stored_name.endswith("rotary_emb.inv_freq"):
                offset = 8 + len(header) + entry["data_offsets"][0]
                yield Tensor(path, offset, stored_name, tuple(entry["shape"]), entry["dtype"])


def _full_name(stored_name: str) -> str:
    """The name with the prefix `model.`, which checkpoints of the bare model (Embedding) leave out."""
    return f"model.{stored_name}" if stored_name.startswith(("embed_tokens.", "layers.", "norm.")) else stored_name


def _files(folder: Path) -> dict[Path, list[str]]:
    """The safetensors files of a checkpoint, each with the tensor names which the index promises in it."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return {single: []}
    if not index.exists():
        others = sorted(path.name for path in folder.glob("*.safetensors"))
        if others:
            state = f" and no model.safetensors.index.json, but {shortened(others)}. Download the index as well"
        else:
            state = f" in this folder{describe_folder(folder)}"
        raise CheckpointError(f"{folder}: no model.safetensors{state}")
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(file, str) for file in names.values()):
        raise CheckpointError(
            f"{index}: weight_map: wanted an object from tensor names to file names. Download this file again"
        )
    promised: dict[str, list[str]] = {}
    for name, file in names.items():
        promised.setdefault(file, []).append(name)
    for file, (name, *_) in promised.items():
        # A plain name, for an index can come from anyone. The hub's cache holds links, so resolved paths say nothing
        if not file.endswith(".safetensors") or any(mark in file for mark in ("/", "\\", ":", "\0")):
            raise CheckpointError(
                f"{index}: weight_map: {name}: wanted the name of a *.safetensors file in this folder, got {file!r}. "
                f"Download this file again from a source you trust"
            )
    files = {folder / file: promised[file] for file in sorted(promised)}
    missing = [path.name for path in files if not path.exists()]
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(files)} files that {index.name} names are missing: "
            f"{shortened(missing)}. Download them into this folder"
        )
    return files


def _check_file(path: Path) -> None:
    """Whether the header is what the format asks for and fits the file, which the format's own library knows best."""
    from safetensors import SafetensorError, safe_open

    try:
        safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(_unreadable(path, error)) from error


_CONVERT = "Convert the checkpoint: load it with transformers' from_pretrained, then call save_pretrained"
_OTHER_FORMATS = (
    (b"version https://git-lfs", "a Git LFS pointer", "Run `git lfs pull` there, or download the file from the hub"),
    (b"PK\x03\x04", "a zip archive, perhaps a PyTorch pickle", _CONVERT),
    (b"\x80\x02", "a Python pickle", _CONVERT),
    (b"\x80\x03", "a Python pickle", _CONVERT),
    (b"\x80\x04", "a Python pickle", _CONVERT),
    (b"\x80\x05", "a Python pickle", _CONVERT),
    (b"GGUF", "a GGUF file (llama.cpp's format)", "Use the original checkpoint"),
    (b"<", "a web page or XML, such as an error page", "Download the file again"),
)


def _unreadable(path: Path, error: Exception) -> str:
    """The message about a file that the safetensors library refuses."""
    again = "Download the file again"
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(64)
    except OSError as refusal:
        return f"{path}: cannot be read ({refusal.strerror}). Check the file and its permissions"
    if size < 8:
        return f"{path}: wanted a safetensors file, got {f'{size} bytes' if size else 'an empty file'}. {again}"
    header = int.from_bytes(start[:8], "little")
    if header > 100_000_000:  # the format's limit; only now may the first bytes be taken for another format's mark
        for magic, kind, remedy in _OTHER_FORMATS:
            if start.lstrip(b" \t\r\n\xef\xbb\xbf").startswith(magic):
                return f"{path}: wanted a safetensors file, got {kind}. {remedy}"
        return f"{path}: wanted a safetensors header of at most 100000000 bytes, got a length of {header}. {again}"
    if header > size - 8:
        return f"{path}: wanted a header of {header} bytes, got a file of {size}: it is cut short. {again}"
    try:
        with open(path, "rb") as file:
            entries = json.loads(file.read(8 + header)[8:])
        wanted = 8 + header + max(entry["data_offsets"][1] for key, entry in entries.items() if key != "__metadata__")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        wanted = size  # the header itself is damaged, and the library says how
    if wanted != size:
        return f"{path}: wanted {wanted} bytes, as its header says, got {size}: it is cut short or too long. {again}"
    return f"{path}: not a valid safetensors file ({error}). {again}"


def shortened(names: list[str], separator: str = ", ", most: int = 6) -> str:
    """The first few names and how many more there are."""
    return separator.join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
