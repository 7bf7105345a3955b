"""Checkpoint files to arrays: every expected tensor is found, every found tensor is expected.

A checkpoint is `model.safetensors`, or `model.safetensors.index.json` with the shards it names; where both are there,
the single file counts, as in transformers. Names, shapes and dtypes of all tensors are compared with the
configuration from the files' headers, before any data is read. bfloat16, float16 and float32 are handed on as stored,
whatever `dtype` in config.json says.

Not errors: names without the leading `model.` (the Embedding checkpoints); rotary `inv_freq` buffers (old files hold
them, they follow from rope_theta); and `lm_head.weight` beside tied embeddings (0.6B and 1.7B store it twice), but only
as a copy of the embedding. Where the two differ, config.json and the weights contradict each other, and frameworks
disagree on which one to believe (transformers 4 the first, transformers 5 the second), so that is refused.

Files are read and not mapped: a mapped file that shrinks meanwhile ends the process, and page faults one after another are
slower than large reads. What goes to a GPU as it is stored goes there through a few page-locked buffers, filled by several
threads. Host memory at the peak, besides what `place` keeps: these buffers, and one tensor.
"""

import json
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import ml_dtypes
import numpy as np

from cuqwen import launch
from cuqwen.config import CheckpointError, Config, describe_folder, read_json

Array = Any  # a NumPy or a CuPy array: whatever `place` returns

_WINDOW = 64 << 20  # bytes of a tensor that are looked at together, four times
_PIECE, _THREADS = 8 << 20, 12  # bytes that a thread reads at once into one of its two buffers; most threads
DTYPES = {name: np.dtype(t) for name, t in (("BF16", ml_dtypes.bfloat16), ("F16", np.float16), ("F32", np.float32))}
_EXPONENTS = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F800000}  # all ones in NaN and infinity
_LAYER_NAMES = {  # field of LayerWeights: the name in the file, after "model.layers.{i}."
    "input_layernorm": "input_layernorm.weight",
    "q_proj": "self_attn.q_proj.weight",
    "k_proj": "self_attn.k_proj.weight",
    "v_proj": "self_attn.v_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "o_proj": "self_attn.o_proj.weight",
    "post_attention_layernorm": "post_attention_layernorm.weight",
    "gate_proj": "mlp.gate_proj.weight",
    "up_proj": "mlp.up_proj.weight",
    "down_proj": "mlp.down_proj.weight",
}


@dataclass
class LayerWeights:
    """One layer. Projections are [out, in], row-major, as in the file."""

    input_layernorm: Array  # [C]
    q_proj: Array  # [H*D, C]
    k_proj: Array  # [K*D, C]
    v_proj: Array  # [K*D, C]
    o_proj: Array  # [C, H*D]
    post_attention_layernorm: Array  # [C]
    gate_proj: Array  # [F, C]
    up_proj: Array  # [F, C]
    down_proj: Array  # [C, F]
    q_bias: Array | None = None  # [H*D], Qwen2 only
    k_bias: Array | None = None  # [K*D], Qwen2 only
    v_bias: Array | None = None  # [K*D], Qwen2 only
    q_norm: Array | None = None  # [D], Qwen3 only
    k_norm: Array | None = None  # [D], Qwen3 only


@dataclass
class Weights:
    """All weights of a model."""

    embed_tokens: Array  # [V, C]
    layers: list[LayerWeights]
    norm: Array  # [C]
    lm_head: Array  # [V, C], the very object embed_tokens when the two are tied


def expected_tensors(config: Config) -> dict[str, tuple[int, ...]]:
    """The checkpoint name and shape of each tensor which a model with this configuration has, in layer order."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "q_proj": (q_size, hidden),
        "k_proj": (kv_size, hidden),
        "v_proj": (kv_size, hidden),
    }
    if config.has_qkv_bias:
        layer |= {"q_bias": (q_size,), "k_bias": (kv_size,), "v_bias": (kv_size,)}
    if config.has_qk_norm:
        layer |= {"q_norm": (config.head_dim,), "k_norm": (config.head_dim,)}
    layer |= {"o_proj": (hidden, q_size), "post_attention_layernorm": (hidden,)}
    layer |= {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    names: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for i in range(config.num_hidden_layers):
        names |= {f"model.layers.{i}.{_LAYER_NAMES[field]}": shape for field, shape in layer.items()}
    names["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        names["lm_head.weight"] = (config.vocab_size, hidden)
    return names


def stored(folder: Path, config: Config) -> dict[str, tuple[tuple[int, ...], str]]:
    """(shape, "BF16", "F16" or "F32") of each tensor that `read` would hand on, by checkpoint name: from the headers alone.

    Raises CheckpointError as `read` does.
    """
    tensors = _survey(Path(folder), config)
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def read(
    folder: Path,
    config: Config,
    place: Callable[[np.ndarray], Array],
    *,
    reserve: Callable[[tuple[int, ...], np.dtype], Array | None] = lambda shape, dtype: None,
    progress: Callable[[int, int], None] | None = None,
) -> Weights:
    """Reads the checkpoint in `folder`.

    `reserve` is called once per tensor, shard by shard in file order, with its shape and ml_dtypes.bfloat16, float16 or
    float32. What it returns is memory on the current GPU, which is filled with the tensor; where it returns None, `place` is
    called with the tensor, C-contiguous, and what that returns stands in the result. `progress` is called with (bytes done,
    bytes in all). Raises CheckpointError if a file is missing or unreadable, or the tensors are not those of `config`.
    """
    tensors = _survey(Path(folder), config)
    copy = tensors.pop("lm_head.weight") if config.tie_word_embeddings and "lm_head.weight" in tensors else None
    if copy is not None:
        _check_copy(tensors["model.embed_tokens.weight"], copy)
    done, total = 0, sum(tensor.nbytes for tensor in tensors.values())

    def tell(more: int) -> None:
        nonlocal done
        done += more
        if progress is not None:
            progress(done, total)

    tell(0)
    placed = {name: reserve(tensor.shape, DTYPES[tensor.dtype]) for name, tensor in tensors.items()}
    with _filling([(tensor, placed[name]) for name, tensor in tensors.items() if placed[name] is not None]) as filled:
        for name, tensor in tensors.items():
            if placed[name] is None:
                placed[name] = place(_rows(tensor))  # no name for the array itself: it would outlive its turn
                tell(tensor.nbytes)
        for count in filled:
            tell(count)
    return arrange(config, placed)


def arrange(config: Config, tensors: dict[str, Array]) -> Weights:
    """Tensors by checkpoint name as the fields of `Weights`."""
    layers = []
    for i in range(config.num_hidden_layers):
        names = {field: f"model.layers.{i}.{name}" for field, name in _LAYER_NAMES.items()}
        layers.append(LayerWeights(**{field: tensors[name] for field, name in names.items() if name in tensors}))
    embedding = tensors["model.embed_tokens.weight"]
    lm_head = embedding if config.tie_word_embeddings else tensors["lm_head.weight"]
    return Weights(embedding, layers, tensors["model.norm.weight"], lm_head)


def check_finite(folder: Path, config: Config) -> None:
    """Reads all weights once and raises CheckpointError, naming the tensors, if any holds NaN or infinity."""
    bad = []
    for name, tensor in _survey(Path(folder), config).items():
        count, first = 0, None
        for start, stop in tensor.chunks():
            part = _rows(tensor, start, stop)
            exponent = _EXPONENTS[part.dtype.name]
            wrong = (part.view(f"u{part.itemsize}") & exponent) == exponent
            if first is None and wrong.any():
                index = np.unravel_index(np.argmax(wrong), wrong.shape)
                first = f"first {part[index]} at {[int(index[0]) + start, *map(int, index[1:])]}"
            count += int(np.count_nonzero(wrong))
        if count:
            bad.append(f"{name}: {count} of {math.prod(tensor.shape)} ({first})")
    if bad:
        raise CheckpointError(
            f"{folder}: wanted finite weights, got NaN or infinity in {len(bad)} tensors: {_shortened(bad, '; ')}. "
            f"Download the checkpoint again; if it stays so, the checkpoint itself is damaged"
        )


@dataclass(frozen=True)
class _Tensor:
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


def _rows(tensor: _Tensor, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Rows start..stop of the tensor, without `stop` all from `start` on: an array of its own."""
    array = np.empty(((tensor.shape[0] if stop is None else stop) - start, *tensor.shape[1:]), DTYPES[tensor.dtype])
    with _opened(tensor.path) as file:
        first = tensor.offset + start * (tensor.nbytes // tensor.shape[0])
        _read_into(file, first, array.reshape(-1).view(np.uint8).data)
    return array


def _opened(path: Path) -> FileIO:
    try:
        return open(path, "rb", buffering=0)
    except OSError as error:
        raise CheckpointError(_unreadable(path, error)) from error


def _read_into(file: FileIO, offset: int, memory: memoryview) -> None:
    try:
        file.seek(offset)
        filled = count = file.readinto(memory)
        while count and filled < len(memory):  # the system may give less than it was asked for
            count = file.readinto(memory[filled:])
            filled += count
    except OSError as error:
        raise CheckpointError(_unreadable(Path(file.name), error)) from error
    if filled < len(memory):
        raise CheckpointError(
            f"{file.name}: wanted {offset + len(memory)} bytes or more, got {offset + filled}: it has become shorter while it "
            "was read. Download the file again"
        )


@contextmanager
def _filling(targets: list[tuple[_Tensor, Array]]) -> Iterator[Iterator[int]]:
    """Threads copy the tensors into their arrays on the GPU. Gives the counts of bytes that are on their way, as they are; when
    these end all have arrived. They raise what a thread raises. However the block ends, no thread is left when it has.
    """
    todo: SimpleQueue[tuple[_Tensor, Array, int]] = SimpleQueue()
    for tensor, array in targets:
        for first in range(0, tensor.nbytes, _PIECE):
            todo.put((tensor, array, first))
    done: SimpleQueue[int | BaseException | None] = SimpleQueue()
    stop = threading.Event()
    count = min(_THREADS, math.ceil(todo.qsize() / 24))
    size = max((min(_PIECE, tensor.nbytes) for tensor, _ in targets), default=0)
    device = launch.settled_device() if count else 0

    def work() -> None:
        files: dict[Path, FileIO] = {}
        try:
            sender = launch.Sender(device, size)
            with ExitStack() as opened, suppress(Empty):
                opened.callback(sender.finish)  # also after an error: copies under way read the buffers
                while not stop.is_set():
                    tensor, array, first = todo.get_nowait()
                    if tensor.path not in files:
                        files[tensor.path] = opened.enter_context(_opened(tensor.path))
                    memory = sender.buffer()[: tensor.nbytes - first]
                    _read_into(files[tensor.path], tensor.offset + first, memory)
                    sender.send(array, first, len(memory))
                    done.put(len(memory))
        except BaseException as error:
            done.put(error)
        finally:
            done.put(None)

    def filled() -> Iterator[int]:
        running = count
        while running:
            item = done.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                running -= 1
            else:
                yield item

    threads = [threading.Thread(target=work, name="cuqwen-weights") for _ in range(count)]
    try:
        for thread in threads:
            thread.start()
        yield filled()
    finally:
        stop.set()
        for thread in threads:
            if thread.ident is not None:
                thread.join()


def _survey(folder: Path, config: Config) -> dict[str, _Tensor]:
    """All tensors that are used, by checkpoint name, in file order, after comparing them with `config`.

    With tied embeddings a stored `lm_head.weight` is part of the result. Raises CheckpointError.
    """
    expected = expected_tensors(config)
    allowed = expected | {"lm_head.weight": expected["model.embed_tokens.weight"]}
    files = _files(folder)
    found: dict[str, _Tensor] = {}
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
    promised = {_full_name(name): f" (the index promises it in {path.name})" for path in files for name in files[path]}
    wrong = {"missing": [name + promised.get(name, "") for name in expected if name not in found], **wrong}
    if any(wrong.values()):
        differences = [f"{len(names)} {kind}: {_shortened(names)}" for kind, names in wrong.items() if names]
        remedy = "Download config.json and all *.safetensors of one dense Qwen checkpoint again"
        if wrong["not BF16, F16 or F32"]:
            remedy = "Use the unquantised checkpoint, or save it again in bfloat16, float16 or float32"
        raise CheckpointError(
            f"{folder}: wanted the {len(expected)} tensors that config.json asks for, "
            f"got {'; '.join(differences)}. {remedy}"
        )
    return found


def _stored_tensors(files: Iterable[Path]) -> Iterator[_Tensor]:
    """What the headers say, in the order of the data, without the rotary buffers."""
    for path in files:
        _check_file(path)
        with _opened(path) as file:
            size = bytearray(8)
            _read_into(file, 0, memoryview(size))
            header = bytearray(int.from_bytes(size, "little"))
            _read_into(file, 8, memoryview(header))
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        for stored_name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            if not stored_name.endswith("rotary_emb.inv_freq"):
                offset = 8 + len(header) + entry["data_offsets"][0]
                yield _Tensor(path, offset, stored_name, tuple(entry["shape"]), entry["dtype"])


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
            state = f" and no model.safetensors.index.json, but {_shortened(others)}. Download the index as well"
        else:
            state = f" in this folder{describe_folder(folder)}"
        raise CheckpointError(f"{folder}: no model.safetensors{state}")
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(file, str) for file in names.values()):
        raise CheckpointError(
            f"{index}: weight_map: wanted an object from tensor names to file names. Download this file again"
        )
    files: dict[Path, list[str]] = {}
    for name, file in names.items():
        # A plain name, for an index can come from anyone. The hub's cache holds links, so resolved paths say nothing
        if not file.endswith(".safetensors") or any(mark in file for mark in ("/", "\\", ":", "\0")):
            raise CheckpointError(
                f"{index}: weight_map: {name}: wanted the name of a *.safetensors file in this folder, got {file!r}. "
                f"Download this file again from a source you trust"
            )
        files.setdefault(folder / file, []).append(name)
    files = dict(sorted(files.items()))
    missing = [path.name for path in files if not path.exists()]
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(files)} files that {index.name} names are missing: "
            f"{_shortened(missing)}. Download them into this folder"
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


def _check_copy(embedding: _Tensor, copy: _Tensor) -> None:
    """With tied embeddings a stored lm_head.weight must equal the embedding; raises CheckpointError if it does not."""
    for start, stop in embedding.chunks():
        a, b = _rows(embedding, start, stop), _rows(copy, start, stop)
        if a.dtype == b.dtype:  # as bits, which is fast
            differ = a.view(f"u{a.itemsize}") != b.view(f"u{b.itemsize}")
        else:
            differ = a.astype(np.float32) != b.astype(np.float32)
        if differ.any():
            row = start + int(np.argmax(differ.any(axis=1)))
            raise CheckpointError(
                f"{copy.path}: lm_head.weight: wanted a copy of embed_tokens.weight, as config.json has "
                f"tie_word_embeddings = true, got other values from row {row} on. Set tie_word_embeddings to false if "
                f"the output head was trained on its own; otherwise remove lm_head.weight"
            )


def _shortened(names: list[str], separator: str = ", ", most: int = 6) -> str:
    """The first few names and how many more there are."""
    return separator.join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
