"""Weights: what is stored is what is read; everything that differs or is damaged is refused by name."""

import dataclasses
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import threading
import time
import zipfile
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from emulator import Sender
from safetensors.numpy import save_file

from cuqwen import checkpoint, staging, weights
from cuqwen.config import CheckpointError, Config
from cuqwen.model import Device
from cuqwen.weights import check_finite, expected_tensors, read

QWEN3 = Config(
    model_type="qwen3",
    hidden_size=12,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,  # H·D = 24 ≠ C
    vocab_size=31,
    max_position_embeddings=64,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    tie_word_embeddings=False,
    dtype="bfloat16",
    eos_token_id=(),
)
TIED = dataclasses.replace(QWEN3, tie_word_embeddings=True)
QWEN2 = dataclasses.replace(QWEN3, model_type="qwen2")
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def make(config, dtype=ml_dtypes.bfloat16, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in expected_tensors(config).items()}


def save(folder, tensors, shards=1, index=None):
    """Writes the tensors as one file, or as `shards` files with an index; `index` changes the latter's weight_map."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    places = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in sorted(set(places.values())):
        save_file({name: array for name, array in tensors.items() if places[name] == file}, folder / file)
    document = {"metadata": {"total_size": 0}, "weight_map": {**places, **(index or {})}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(document))


def flat(result):
    """Weights back to checkpoint names."""
    names = {"model.embed_tokens.weight": result.embed_tokens, "model.norm.weight": result.norm}
    for i, layer in enumerate(result.layers):
        for field, name in weights._LAYER_NAMES.items():
            if getattr(layer, field) is not None:
                names[f"model.layers.{i}.{name}"] = getattr(layer, field)
    if result.lm_head is not result.embed_tokens:
        names["lm_head.weight"] = result.lm_head
    return names


def assert_same(result, tensors):
    got = flat(result)
    assert got.keys() == tensors.keys()
    for name, array in tensors.items():
        assert got[name].dtype == array.dtype and got[name].shape == array.shape, name
        assert got[name].tobytes() == array.tobytes(), name


def identity(array):
    return array


def refused(folder, config, *parts, call=read):
    arguments = (folder, config, forbidden) if call is read else (folder, config)
    with pytest.raises(CheckpointError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message and len(message) < 2000, message
    for part in parts:
        assert part in message, message
    return message


def forbidden(array):
    raise AssertionError("data was read before the headers were checked")


# --- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [QWEN3, TIED, QWEN2], ids=["qwen3", "tied", "qwen2"])
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32], ids=["bf16", "f16", "f32"])
@pytest.mark.parametrize("shards", [1, 3])
def test_reads_what_is_stored(tmp_path, config, dtype, shards):
    tensors = make(config, dtype)
    save(tmp_path, tensors, shards)
    result = read(tmp_path, config, identity)
    assert_same(result, tensors)
    assert (result.lm_head is result.embed_tokens) is config.tie_word_embeddings
    assert (result.layers[0].q_norm is None) is (config.model_type == "qwen2")
    assert (result.layers[0].q_bias is None) is (config.model_type == "qwen3")
    for array in flat(result).values():
        assert array.flags.c_contiguous
    check_finite(tmp_path, config)


def test_expected_shapes():
    shapes = expected_tensors(QWEN2)
    assert shapes["model.embed_tokens.weight"] == shapes["lm_head.weight"] == (31, 12)
    layer = {
        name[len("model.layers.1.") :]: shape for name, shape in shapes.items() if name.startswith("model.layers.1.")
    }
    assert layer == {
        "input_layernorm.weight": (12,),
        "self_attn.q_proj.weight": (24, 12),
        "self_attn.k_proj.weight": (12, 12),
        "self_attn.v_proj.weight": (12, 12),
        "self_attn.q_proj.bias": (24,),
        "self_attn.k_proj.bias": (12,),
        "self_attn.v_proj.bias": (12,),
        "self_attn.o_proj.weight": (12, 24),
        "post_attention_layernorm.weight": (12,),
        "mlp.gate_proj.weight": (20, 12),
        "mlp.up_proj.weight": (20, 12),
        "mlp.down_proj.weight": (12, 20),
    }
    assert expected_tensors(QWEN3)["model.layers.0.self_attn.k_norm.weight"] == (6,)
    assert "lm_head.weight" not in expected_tensors(TIED)


@pytest.mark.parametrize("kind", ["Qwen3", "Qwen2"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
def test_what_transformers_saves_is_read(tmp_path, kind, tied, shard_size):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "vocab_size": 53}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": tied}
    extra = {"head_dim": 10} if kind == "Qwen3" else {}
    source = getattr(transformers, f"{kind}Config")(**sizes, **heads, **extra)
    model = getattr(transformers, f"{kind}ForCausalLM")(source).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors").exists() is (shard_size == "5GB")
    got = flat(read(tmp_path, Config.from_folder(tmp_path), identity))
    parameters = {
        name: tensor for name, tensor in model.state_dict().items() if not (tied and name == "lm_head.weight")
    }
    assert got.keys() == parameters.keys()
    for name, tensor in parameters.items():
        np.testing.assert_array_equal(got[name].astype(np.float32), tensor.float().numpy())


def test_bare_names_and_rotary_buffers(tmp_path):
    tensors = make(TIED)
    bare = {name.removeprefix("model."): array for name, array in tensors.items()}
    bare["layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)
    bare["rotary_emb.inv_freq"] = np.ones(3, np.float64)
    save(tmp_path, bare, shards=2)
    assert_same(read(tmp_path, TIED, identity), tensors)


@pytest.mark.parametrize("stored_as", [ml_dtypes.bfloat16, np.float32])
def test_a_redundant_lm_head_is_not_placed(tmp_path, stored_as):
    tensors = make(TIED)
    save(tmp_path, {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].astype(stored_as)})
    placed = []
    result = read(tmp_path, TIED, lambda array: placed.append(array) or array)
    assert len(placed) == len(tensors)
    assert_same(result, tensors)


@pytest.mark.parametrize("stored_as", [ml_dtypes.bfloat16, np.float32])
def test_an_lm_head_of_its_own_contradicts_tied_embeddings(tmp_path, stored_as, monkeypatch):
    monkeypatch.setattr(checkpoint, "_WINDOW", 400)  # several chunks: 4 rows of 12 bf16 each
    tensors = make(TIED)
    head = tensors["model.embed_tokens.weight"].astype(stored_as)
    head[29, 3] += head.dtype.type(1)
    save(tmp_path, {**tensors, "lm_head.weight": head})
    refused(
        tmp_path, TIED, "lm_head.weight", "tie_word_embeddings", "from row 29 on", "Set tie_word_embeddings to false"
    )


def test_order_progress_and_one_call_each(tmp_path):
    tensors = make(QWEN3)
    save(tmp_path, tensors, shards=3)
    placed, steps = [], []
    read(tmp_path, QWEN3, lambda array: placed.append(array.nbytes), progress=lambda *step: steps.append(step))
    total = sum(array.nbytes for array in tensors.values())
    assert len(placed) == len(tensors) and sum(placed) == total
    assert steps[0] == (0, total) and steps[-1] == (total, total) and len(steps) == len(tensors) + 1
    assert [done for done, _ in steps] == [sum(placed[:i]) for i in range(len(placed) + 1)]


def test_shards_are_read_one_after_another_in_file_order(tmp_path):
    tensors = {name: np.full(shape, i, np.float32) for i, (name, shape) in enumerate(expected_tensors(QWEN3).items())}
    save(tmp_path, tensors, shards=3)
    path = tmp_path / "model.safetensors.index.json"
    places = json.loads(path.read_text())["weight_map"]
    path.write_text(json.dumps({"weight_map": dict(reversed(places.items()))}))
    placed = []
    read(tmp_path, QWEN3, lambda array: placed.append(list(tensors)[int(array.flat[0])]))
    files = [places[name] for name in placed]
    assert files == sorted(files)


def test_the_single_file_wins_over_an_index(tmp_path):
    save(tmp_path, make(QWEN3, seed=1), shards=2)
    tensors = make(QWEN3, seed=2)
    save(tmp_path, tensors)
    assert_same(read(tmp_path, QWEN3, identity), tensors)


# --- tensors that differ from config.json ----------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 2])
def test_one_error_lists_all_that_differs(tmp_path, shards):
    tensors = make(QWEN3)
    for name in ("lm_head.weight", "model.layers.0.mlp.up_proj.weight"):
        del tensors[name]
    tensors["model.layers.2.mlp.up_proj.weight"] = np.ones((2, 2), np.float32)
    tensors["score.weight"] = np.ones(2, np.float32)
    tensors[Q_PROJ] = np.ascontiguousarray(tensors[Q_PROJ].T)
    save(tmp_path, tensors, shards)
    message = refused(
        tmp_path, QWEN3, "wanted the 25 tensors", "2 missing: model.layers.0.mlp.up_proj.weight, lm_head.weight"
    )
    assert "2 unexpected: " in message and "score.weight" in message and "model.layers.2.mlp.up_proj.weight" in message
    assert f"1 misshaped: {Q_PROJ} (wanted [24, 12], got [12, 24])" in message


@pytest.mark.parametrize("name", expected_tensors(QWEN2) | expected_tensors(QWEN3))
def test_each_tensor_must_be_there(tmp_path, name):
    config = QWEN3 if name in expected_tensors(QWEN3) else QWEN2
    tensors = make(config)
    del tensors[name]
    save(tmp_path, tensors)
    refused(tmp_path, config, f"1 missing: {name}. Download", call=check_finite)


def test_long_lists_are_shortened(tmp_path):
    save(tmp_path, {f"x{i}": np.ones(1, np.float32) for i in range(1000)})
    config = dataclasses.replace(QWEN3, num_hidden_layers=100)
    message = refused(tmp_path, config, "1103 missing: ", "1000 unexpected: x0", "and 994 more", "and 1097 more")
    assert len(message) < 1000


def test_the_kind_of_model_must_fit(tmp_path):
    save(tmp_path, make(QWEN2))
    refused(tmp_path, QWEN3, "q_norm.weight", "q_proj.bias", "4 missing", "6 unexpected")


@pytest.mark.parametrize(
    ("array", "name"),
    [
        (np.ones((24, 12), ml_dtypes.float8_e4m3fn), "F8_E4M3"),
        (np.ones((24, 12), np.int8), "I8"),
        (np.ones((24, 12), np.float64), "F64"),
    ],
)
def test_other_dtypes(tmp_path, array, name):
    save(tmp_path, {**make(QWEN3), Q_PROJ: array})
    refused(tmp_path, QWEN3, f"1 not BF16, F16 or F32: {Q_PROJ} ({name})", "unquantised")


def test_a_tensor_in_two_shards(tmp_path):
    tensors = make(QWEN3)
    save(tmp_path, tensors, shards=2)
    extra = tmp_path / "model-00003.safetensors"
    save_file({"lm_head.weight": tensors["lm_head.weight"]}, extra)
    path = tmp_path / "model.safetensors.index.json"
    document = json.loads(path.read_text())
    document["weight_map"]["x"] = extra.name
    path.write_text(json.dumps(document))
    refused(tmp_path, QWEN3, "1 found twice: lm_head.weight (in model-00001-of-00002.safetensors and in model-00003")


# --- the index -------------------------------------------------------------------------------------------------------


def test_missing_shards(tmp_path):
    save(tmp_path, make(QWEN3), shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    refused(tmp_path, QWEN3, "1 of 3 files", "are missing: model-00002-of-00003.safetensors. Download")


def test_a_tensor_which_the_index_promises(tmp_path):
    tensors = make(QWEN3)
    del tensors[Q_PROJ]
    save(tmp_path, tensors, shards=2, index={Q_PROJ: "model-00001-of-00002.safetensors"})
    refused(tmp_path, QWEN3, f"1 missing: {Q_PROJ} (the index promises it in model-00001-of-00002.safetensors)")


@pytest.mark.parametrize(
    "file",
    [
        "../outside.safetensors",
        "{absolute}",
        "sub/x.safetensors",
        "..",
        "",
        "x\0.safetensors",
        "config.json",
        "a\\b.safetensors",
        "C:x.safetensors",
    ],
)
def test_an_index_that_names_other_places(tmp_path, file):
    folder = tmp_path / "model"
    folder.mkdir()
    tensors = make(QWEN3)
    head = {"lm_head.weight": tensors.pop("lm_head.weight")}
    for place in (tmp_path / "outside.safetensors", folder / "x.safetensors"):
        save_file(head, place)  # they do exist: only the check stands between them and the reader
    save(folder, tensors, 2, {"lm_head.weight": file.format(absolute=tmp_path / "outside.safetensors")})
    refused(folder, QWEN3, "index.json: weight_map: lm_head.weight: wanted the name of a *.safetensors file")


@pytest.mark.parametrize(
    ("document", "part"),
    [
        ("{", "broken JSON"),
        ("[]", "wanted a JSON object"),
        ("{}", "weight_map: wanted an object"),
        ('{"weight_map": {}}', "weight_map: wanted an object"),
        ('{"weight_map": ["a"]}', "weight_map: wanted an object"),
        ('{"weight_map": {"a": 1}}', "weight_map: wanted an object"),
    ],
)
def test_a_broken_index(tmp_path, document, part):
    (tmp_path / "model.safetensors.index.json").write_text(document)
    refused(tmp_path, QWEN3, "model.safetensors.index.json: " + part)


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (["config.json"], ["no model.safetensors", "it holds config.json"]),
        (["pytorch_model.bin", "config.json"], ["PyTorch pickle", "save_pretrained"]),
        (["model-00001-of-00002.safetensors"], ["no model.safetensors.index.json", "Download the index"]),
        (["x.gguf"], ["GGUF"]),
    ],
)
def test_a_folder_without_weights(tmp_path, names, parts):
    for name in names:
        (tmp_path / name).write_bytes(b"")
    refused(tmp_path, QWEN3, *parts)


# --- damaged and mislabelled files -----------------------------------------------------------------------------------


def with_header(header, data=b""):
    header = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(header)) + header + data


def zip_bytes(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps([1, 2, 3]))
    return path.read_bytes()


ONE = '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1503300328\n"
DAMAGED = {
    "640-byte header, cut": (with_header(ONE.ljust(640)), "cut short"),  # starts as a pickle does: 80 02
    "empty": (b"", "an empty file"),
    "three bytes": (b"abc", "got 3 bytes"),
    "cut in header": (with_header(ONE)[:30], "cut short"),
    "cut in data": (
        with_header(ONE, b"\0" * 7),
        f"wanted {16 + len(ONE)} bytes, as its header says, got {15 + len(ONE)}",
    ),
    "too long": (with_header(ONE, b"\0" * 9), "cut short or too long"),
    "oversized header": (struct.pack("<Q", 2**63) + b"{}", f"got a length of {2**63}"),
    "oversized header, 200 MB": (struct.pack("<Q", 200_000_000) + b"{}", "got a length of 200000000"),
    "header beyond the end": (struct.pack("<Q", 50_000_000) + b"{}", "wanted a header of 50000000 bytes"),
    "header is no JSON": (with_header("{{{{"), "not a valid safetensors file"),
    "header is a list": (with_header("[1, 2]"), "not a valid safetensors file"),
    "header is not UTF-8": (with_header(b"\xff\xfe\xfd"), "not a valid safetensors file"),
    "offsets beyond the end": (with_header(ONE.replace("8]", "80]"), b"\0" * 8), "cut short"),
    "odd offsets": (with_header(ONE.replace("[0, 8]", "8")), "not a valid safetensors file"),
    "shape and size differ": (with_header(ONE.replace("[2]", "[3]"), b"\0" * 8), "not a valid safetensors file"),
    "overflowing shape": (with_header(ONE.replace("[2]", "[4294967296, 4294967296]"), b"\0" * 8), "not a valid"),
    "unknown dtype": (with_header(ONE.replace("F32", "XX"), b"\0" * 8), "not a valid safetensors file"),
    "noise": (bytes(range(7, 250, 3)) * 20, "safetensors header of at most"),
    "git-lfs pointer": (LFS, "a Git LFS pointer. Run `git lfs pull`"),
    "pickle": (pickle.dumps({"a": np.ones(3)}, protocol=2), "a Python pickle. Convert"),
    "pickle 5": (pickle.dumps({"a": np.ones(3)}, protocol=5), "a Python pickle. Convert"),
    "gguf": (b"GGUF\x03\0\0\0" + b"\0" * 100, "a GGUF file"),
    "html": (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "a web page"),
}


@pytest.mark.parametrize("kind", DAMAGED)
@pytest.mark.parametrize("call", [read, check_finite])
def test_damaged_files(tmp_path, kind, call):
    content, part = DAMAGED[kind]
    (tmp_path / "model.safetensors").write_bytes(content)
    refused(tmp_path, QWEN3, "model.safetensors: ", part, call=call)


def test_a_zip_archive(tmp_path):
    content = zip_bytes(tmp_path / "x.zip")
    (tmp_path / "model.safetensors").write_bytes(content)
    refused(tmp_path, QWEN3, "a zip archive, perhaps a PyTorch pickle. Convert the checkpoint")


@pytest.mark.parametrize("cut", [1, 100, -1, -3000])
def test_a_real_checkpoint_cut_short(tmp_path, cut):
    save(tmp_path, make(QWEN3), shards=2)
    path = tmp_path / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    refused(tmp_path, QWEN3, "model-00002-of-00002.safetensors: ", "Download the file again")


def test_a_folder_or_a_forbidden_file_in_its_place(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    refused(tmp_path, QWEN3, "model.safetensors: ", "cannot be read")


def test_no_tensors_at_all(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(with_header("{}"))
    refused(tmp_path, QWEN3, "25 missing: model.embed_tokens.weight")


# --- check_finite ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32], ids=["bf16", "f16", "f32"])
@pytest.mark.parametrize("window", [64 << 20, 200])
def test_check_finite_names_tensor_count_and_first_index(tmp_path, dtype, window, monkeypatch):
    monkeypatch.setattr(checkpoint, "_WINDOW", window)  # 200 bytes: two rows a chunk in bf16, one in f32
    tensors = make(QWEN3, dtype)
    largest = ml_dtypes.finfo(dtype).max
    tensors["model.norm.weight"][:2] = largest, -largest  # finite, if only just
    save(tmp_path, tensors)
    check_finite(tmp_path, QWEN3)
    tensors[Q_PROJ][17, 5] = np.nan
    tensors[Q_PROJ][23, 0] = -np.inf
    tensors["model.layers.0.input_layernorm.weight"][11] = np.inf
    save(tmp_path, tensors)
    assert_same(read(tmp_path, QWEN3, identity), tensors)  # loading does not look: it would cost a pass over the data
    message = refused(tmp_path, QWEN3, "in 2 tensors: ", call=check_finite)
    assert f"{Q_PROJ}: 2 of 288 (first nan at [17, 5])" in message
    assert "model.layers.0.input_layernorm.weight: 1 of 12 (first inf at [11])" in message


# --- to a GPU ---------------------------------------------------------------------------------------------------------


class Sent(Sender):
    """The emulator's, which also counts, fails where it is told to, and is as slow."""

    made, closed, sent, fail_at, seconds = 0, 0, 0, None, 0.0

    def __init__(self, device, size):
        super().__init__(device, size)
        type(self).made += 1

    def send(self, array, first, count):
        if self.fail_at is not None and first >= self.fail_at:
            raise RuntimeError("the GPU has fallen off the bus")
        time.sleep(self.seconds)
        type(self).sent += count
        super().send(array, first, count)

    def close(self):
        type(self).closed += 1


@pytest.fixture
def gpu(monkeypatch):
    """Matrices are reserved and sent, in pieces of 50 bytes by up to three threads. No thread outlives the call."""
    before = set(threading.enumerate())
    monkeypatch.setattr(staging, "now", lambda: (0, None))
    monkeypatch.setattr(staging, "Sender", type("Fresh", (Sent,), {}))
    for name, value in {"PIECE": 50, "STRETCH": 120, "SHARE": 120, "THREADS": 3}.items():
        monkeypatch.setattr(staging, name, value)
    yield staging.Sender
    assert set(threading.enumerate()) <= before and staging.Sender.closed == staging.Sender.made


def reserve(shape, dtype):
    return np.full(shape, np.nan, dtype) if len(shape) > 1 else None


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32], ids=["bf16", "f16", "f32"])
def test_reserved_tensors_are_filled(tmp_path, gpu, shards, dtype):
    tensors, told, placed = make(QWEN3, dtype), [], []
    save(tmp_path, tensors, shards)

    def place(array):
        placed.append(array.shape)
        return array

    result = read(tmp_path, QWEN3, place, reserve=reserve, progress=lambda *figures: told.append(figures))
    assert_same(result, tensors)
    assert {len(shape) for shape in placed} == {1} and gpu.made == 3
    total = sum(array.nbytes for array in tensors.values())
    assert told == sorted(told) and told[0] == (0, total) and told[-1] == (total, total)


@pytest.mark.parametrize("fail_at", [0, 100])
def test_what_a_thread_raises_is_raised(tmp_path, gpu, fail_at):
    save(tmp_path, make(QWEN3))
    gpu.fail_at = fail_at
    with pytest.raises(RuntimeError, match="fallen off"):
        read(tmp_path, QWEN3, identity, reserve=reserve)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("after", [0, 2000])
def test_no_thread_goes_on_when_somebody_stops_it(tmp_path, gpu, monkeypatch, error, after):
    monkeypatch.setattr(staging, "STRETCH", 1000)
    save(tmp_path, make(QWEN3))
    gpu.seconds, sent = 0.005, []

    def progress(done, total):
        sent.append(gpu.sent)
        if done > after:
            raise error

    with pytest.raises(error):
        read(tmp_path, QWEN3, identity, reserve=reserve, progress=progress)
    assert gpu.sent <= sent[-1] + 2 * 3 * 50  # what each thread had begun


@pytest.mark.parametrize("reserve", [reserve, lambda shape, dtype: None], ids=["sent", "placed"])
def test_a_file_that_becomes_shorter_while_it_is_read(tmp_path, gpu, reserve):
    save(tmp_path, make(QWEN3))
    path = tmp_path / "model.safetensors"

    def cut(done, total):
        os.truncate(path, path.stat().st_size // 2)

    with pytest.raises(
        CheckpointError, match=f"{re.escape(str(path))}: wanted [0-9]+ bytes or more, got [0-9]+: it has"
    ):
        read(tmp_path, QWEN3, identity, reserve=reserve, progress=cut)


@pytest.mark.parametrize("locked", [True, False])
def test_a_buffer_is_locked_once_and_unlocked(monkeypatch, locked):
    calls, pages = [], staging.HUGE_PAGE

    def register(start, size, flags):
        calls.append(("lock", start, size))
        if not locked:
            raise RuntimeError("cudaErrorNotSupported")

    runtime = SimpleNamespace(
        hostRegister=register,
        hostUnregister=lambda start: calls.append(("unlock", start)),
        CUDARuntimeError=RuntimeError,
    )
    stream = SimpleNamespace(
        synchronize=lambda: calls.append(("wait",)), wait_event=lambda event: calls.append(("after", event))
    )
    device = SimpleNamespace(use=lambda: calls.append(("use",)))
    cuda = SimpleNamespace(runtime=runtime, Device=lambda number: device, Stream=lambda non_blocking: stream)
    monkeypatch.setattr(staging, "cupy", lambda: SimpleNamespace(cuda=cuda))
    sender = staging.Sender(0, 2 * pages)
    start = np.frombuffer(sender.buffer, np.uint8).ctypes.data
    assert start % pages == 0 and len(sender.buffer) == 2 * pages

    class Address(int):
        def __add__(self, first):
            return Address(int(self) + first)

        def copy_from_host_async(self, address, count, on):
            assert on is stream
            calls.append(("copy", int(self), address.value, count))

    sender.after("all before")
    for first, count in ((0, 100), (100, 7)):
        sender.send(SimpleNamespace(data=Address(1000)), first, count)
    sender.close()
    sent = [("copy", 1000, start, 100), ("wait",), ("copy", 1100, start, 7), ("wait",)]
    assert calls == [
        ("use",),
        ("after", "all before"),
        ("lock", start, 2 * pages),
        *sent,
        *([("unlock", start)] if locked else []),
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("locked", [True, False])
def test_sent_bytes_arrive(tmp_path, monkeypatch, locked):
    """Several pieces a tensor, sizes that are no multiples of anything; with page-locked memory and without."""
    monkeypatch.setattr(staging, "PIECE", 30001)
    if not locked:
        monkeypatch.setattr(staging, "_page_lock", lambda memory: lambda: None)
    config = dataclasses.replace(QWEN3, hidden_size=1000, intermediate_size=999, vocab_size=3001)
    tensors = make(config)
    save(tmp_path, tensors, shards=2)
    device = Device.cuda()
    result = read(tmp_path, config, device.place_weight, reserve=device.reserve_weight)
    for name, array in flat(result).items():
        assert (
            array.get().tobytes() == (tensors[name] if array.ndim > 1 else tensors[name].astype(np.float32)).tobytes()
        )


# --- host memory -----------------------------------------------------------------------------------------------------

PEAK = """
import resource, sys
from pathlib import Path
from cuqwen import checkpoint, weights
from cuqwen.config import Config
import ml_dtypes, numpy, safetensors
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
checkpoint._WINDOW = 8 << 20
config = Config.from_folder(Path(sys.argv[1]))
before = peak()
total = []
def progress(done, of): total.append(of)
weights.read(Path(sys.argv[1]), config, lambda array: int(array.view("u2")[..., -1].max()), progress=progress)
after_read = peak()
weights.check_finite(Path(sys.argv[1]), config)
print(before, after_read, peak(), total[-1])
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak memory is read from Linux' /proc")
def test_host_memory_stays_below_one_shard(tmp_path):
    """Three shards of 60 MB; the largest tensor, 24 MB, is on the way once as mapped pages and once as an array."""
    config = dataclasses.replace(QWEN3, hidden_size=1024, intermediate_size=4096, vocab_size=12000, num_hidden_layers=5)
    tensors = {name: np.ones(shape, ml_dtypes.bfloat16) for name, shape in expected_tensors(config).items()}
    save(tmp_path, tensors, shards=3)
    document = {
        **dataclasses.asdict(config),
        "hidden_act": "silu",
        "attention_bias": False,
        "use_sliding_window": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(document))
    sizes = [path.stat().st_size for path in tmp_path.glob("*.safetensors")]
    assert sum(sizes) > 170e6 and max(sizes) < 80e6, sizes
    root = os.path.dirname(os.path.dirname(weights.__file__))
    run = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path], capture_output=True, text=True, cwd=root, check=False, timeout=60
    )
    assert run.returncode == 0, run.stderr
    before, after_read, after_check, total = map(int, run.stdout.split())
    assert total == sum(array.nbytes for array in tensors.values())
    largest = max(array.nbytes for array in tensors.values())
    slack = 16 << 20  # one window of mapped pages (8 MiB) and the allocator's and the temporaries' share
    assert after_read - before < 2 * largest + slack < max(sizes) + slack
    assert after_check - before < 2 * largest + slack
