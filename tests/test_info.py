"""`cuqwen info`: what it says against the arrays themselves, and that it reads no weights for it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import checkpoints
import pytest
from hub_server import HubServer, Repo
from safetensors.numpy import load_file, save_file

import cuqwen
from cuqwen import cli
from cuqwen.config import Config
from cuqwen.weights import expected_tensors

ROOT = Path(__file__).resolve().parents[1]


def info(capsys, *arguments):
    """(exit status, what it prints) in this process."""
    status = cli.main(["info", *map(str, arguments), "--device", "cpu"])
    out, err = capsys.readouterr()
    return status, out if status == 0 else err


def facts(capsys, *arguments):
    status, out = info(capsys, *arguments, "--json")
    assert status == 0 and out.count("\n") == 1
    return json.loads(out)


@pytest.mark.parametrize("name", checkpoints.SPECS)
def test_what_it_says_is_what_is_loaded(name, capsys, tmp_path):
    folder = checkpoints.write(tmp_path / "model", checkpoints.SPECS[name])
    said = facts(capsys, folder)
    model = cuqwen.load(folder, device="cpu")
    arrays = [value for layer in model.network.weights.layers for value in vars(layer).values() if value is not None]
    arrays += [model.network.weights.embed_tokens, model.network.weights.norm]
    if not model.config.tie_word_embeddings:
        arrays.append(model.network.weights.lm_head)
    width = {"bfloat16": 2, "float16": 2, "float32": 4}[checkpoints.SPECS[name].dtype]  # as stored; here it is float32
    assert (
        said["parameters"] == sum(part["parameters"] for part in said["parts"].values()) == sum(a.size for a in arrays)
    )
    assert said["weight_bytes"] == width * said["parameters"]
    cache = model.network.new_cache(1)  # float32 on the CPU
    assert said["cache_bytes_per_token"] * 2 == cache.keys.nbytes + cache.values.nbytes
    exact = facts(capsys, folder, "--exact")
    assert exact["cache_bytes_per_token"] == exact["memory"][0]["cache_bytes"] / 512 == cache.keys.nbytes * 2
    read = model.network.read_bytes_per_token(0)
    norm = model.network.weights.norm.nbytes  # which that leaves out
    assert said["read_bytes_per_token"] * 4 == (read + norm) * width
    assert [row["context"] for row in said["memory"]] == [512] and said["context"] == 512
    assert said["gpu"] is None and said["architecture"]["hidden_size"] == model.config.hidden_size


def test_parts(capsys):
    said = facts(capsys, "demo")
    arrays = load_file(checkpoints.DEMO / "model.safetensors")
    sizes = {part: value["parameters"] for part, value in said["parts"].items()}
    wanted = dict.fromkeys(sizes, 0)
    for name, array in arrays.items():
        part = (
            "norms"
            if "norm" in name
            else "embedding"
            if "embed" in name
            else "attention"
            if "attn" in name
            else "feed-forward"
        )
        wanted[part] += array.size
    assert sizes == wanted


def header_only(folder, config_json):
    """A checkpoint of which there are the headers and, as a hole in the file, the weights."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_json))
    config = Config.from_folder(folder)
    entries, at = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in expected_tensors(config).items():
        size = 2
        for n in shape:
            size *= n
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    header = json.dumps(entries).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + at)
    return folder


EIGHT = {
    "model_type": "qwen3", "hidden_act": "silu", "attention_bias": False, "use_sliding_window": False, "hidden_size": 4096,
    "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "vocab_size": 151936, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1000000,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "eos_token_id": 151645,
}  # fmt: skip


def test_published_figures_of_8b(capsys, tmp_path):
    """Of a file of 16 GB of which only the header is there, so nothing else can have been read."""
    status, out = info(capsys, header_only(tmp_path / "8b", EIGHT))
    assert status == 0
    for text in ("8,190,735,360 parameters", "16.38 GB", "a token reads 15.14 GB", "(bfloat16)", "6.04 GB", "22.42 GB"):
        assert text in out, out
    exact = info(capsys, tmp_path / "8b", "--exact")[1]
    assert "(float32)" in exact and "12.08 GB" in exact and "28.46 GB" in exact, exact
    assert max(map(len, out.splitlines()[1:])) <= 80


def test_stretched_context(capsys, tmp_path):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    folder = header_only(tmp_path / "long", EIGHT | {"rope_scaling": yarn, "num_hidden_layers": 2})
    status, out = info(capsys, folder)
    assert status == 0 and "131,072 tokens, rope_theta 1,000,000, stretched 4 times (YaRN)" in out
    assert facts(capsys, folder)["architecture"]["rope_scaling"]["factor"] == 4


def test_a_checkpoint_that_does_not_fit_its_config(capsys, tmp_path):
    folder = Path(shutil.copytree(checkpoints.DEMO, tmp_path / "copy"))
    arrays = load_file(folder / "model.safetensors")
    del arrays["model.norm.weight"]
    arrays["model.extra"] = arrays.pop("model.layers.0.mlp.up_proj.weight")
    save_file(arrays, folder / "model.safetensors")
    status, err = info(capsys, folder)
    assert status == 1 and err.count("\n") == 1
    assert "model.norm.weight is missing" in err and "model.extra is unexpected" in err
    (folder / "model.safetensors").write_bytes(b"\x00" * 100)
    status, err = info(capsys, folder)
    assert status == 1 and err.count("\n") == 1 and "model.safetensors" in err and "download" in err
    assert info(capsys, tmp_path)[0] == 1


def in_process(*arguments, server, home):
    env = {
        key: value for key, value in os.environ.items() if not key.upper().startswith(("HF_", "HTTP", "ALL_", "PYTHON"))
    }
    env |= {"PYTHONPATH": str(ROOT), "HF_HOME": str(home), "HF_ENDPOINT": server.endpoint, "NO_PROXY": "*"}
    env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "CUDA_VISIBLE_DEVICES": "", "LC_ALL": "C.UTF-8"}
    done = subprocess.run(
        [sys.executable, "-m", "cuqwen", "info", *arguments], capture_output=True, text=True, env=env, timeout=60
    )
    assert "Traceback" not in done.stderr
    return done


@pytest.mark.parametrize("shards", [1, 2])
def test_of_a_hub_id_no_weights_are_downloaded(capsys, tmp_path, shards):
    spec = checkpoints.Spec(
        "wide", 4, 2, 64, 256, 2048, 4000, shards=shards
    )  # 9 MB: most of it is not in the first 100 kB
    folder = checkpoints.write(tmp_path / "model", spec)
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    size = sum(len(data) for name, data in files.items() if name.endswith(".safetensors"))
    with HubServer({"org/name": Repo(files)}) as server:
        done = in_process("org/name", "--json", server=server, home=tmp_path / "home")
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout)
        assert said == {**facts(capsys, folder), "model": "org/name"}
        assert server.sent <= 100_001 * shards < size / 10
        assert not list((tmp_path / "home").rglob("*.safetensors"))
        assert "tokenizer.json" not in server.fetched()
        done = in_process("org/other", server=server, home=tmp_path / "home")
        assert done.returncode == 1 and done.stderr.count("\n") == 1 and "org/other" in done.stderr
