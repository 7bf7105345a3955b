"""hub.resolve with the real hub client against a hub on loopback (hub_server.py), and its local side.

The client reads its environment when it is imported, so each download runs in a process of its own.
"""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hub_server import COMMIT, HubServer, Repo

from cuqwen import hub
from cuqwen.config import CheckpointError

NAME = "org/name"
NEEDED = {
    "config.json": b'{"model_type": "qwen3"}',
    "generation_config.json": b'{"do_sample": true}',
    "tokenizer.json": b'{"version": "1.0"}',
    "tokenizer_config.json": b'{"eos_token": "x"}',
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors": b"w" * 100_000,
}
UNNEEDED = {
    "README.md": b"# name",
    "pytorch_model.bin": b"b" * 1000,
    "consolidated.safetensors": b"c" * 1000,
    "original/config.json": b"{}",
    "onnx/model.onnx": b"o" * 1000,
    "name-q4.gguf": b"g" * 1000,
    "vocab.json": b"{ }",
}
SHARDS = {f"model-0000{i}-of-00002.safetensors": bytes([i]) * 50_000 for i in (1, 2)}
INDEX = json.dumps({"metadata": {"total_size": 100_000}, "weight_map": dict(zip("abc", [*SHARDS] * 2, strict=False))})
CLIENT = """
import json
from cuqwen.hub import resolve
try:
    answer = {{"folder": str(resolve({model!r}, **{arguments!r}))}}
except Exception as error:
    answer = {{"error": type(error).__name__, "message": str(error)}}
print(json.dumps(answer))
"""
NO_SLEEP = "import time; time.sleep = lambda seconds: None\n"  # the client's pauses before each new attempt


@pytest.fixture
def server():
    with HubServer({NAME: Repo({**NEEDED, **UNNEEDED})}) as running:
        yield running


@pytest.fixture
def client(server, tmp_path):
    """client(...) -> (answer, stderr) of `resolve(model, **arguments)` in a new process with an empty cache."""

    def environment(**extra):
        kept = {key: value for key, value in os.environ.items() if not key.upper().startswith(("HF_", "HTTP", "ALL_"))}
        root = str(Path(hub.__file__).parents[1])
        own = {"PYTHONPATH": root, "HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": server.endpoint, "NO_PROXY": "*"}
        return {**kept, **own, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **extra}

    def run(model=NAME, *, prelude="", env=None, **arguments):
        server.requests.clear()
        process = subprocess.run(
            [sys.executable, "-c", prelude + CLIENT.format(model=model, arguments=arguments)],
            env=environment(**(env or {})),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert process.returncode == 0, process.stderr
        return json.loads(process.stdout), process.stderr

    run.environment = environment
    return run


def told(answer, *words):
    """Checks that the client told one clear line, and nothing beside it."""
    answer, stderr = answer
    assert answer.get("error") == "CheckpointError", answer
    assert stderr == ""
    assert "\n" not in answer["message"] and len(answer["message"]) < 500
    for word in words:
        assert word in answer["message"], answer["message"]


# downloads that work


def test_downloads_only_what_is_needed(client, server):
    answer, stderr = client()
    assert server.fetched() == sorted(NEEDED)
    assert stderr == ""
    folder = Path(answer["folder"])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == NEEDED


def test_second_call_downloads_nothing(client, server):
    first, _ = client()
    assert server.fetched()
    assert client() == (first, "")
    assert server.fetched() == []
    assert len(server.requests) == 1  # which commit is it now?


def test_files_that_may_be_missing(client, server):
    for name in ("generation_config.json", "tokenizer_config.json", "chat_template.jinja"):
        del server.repos[NAME].files[name]
    answer, _ = client()
    assert sorted(os.listdir(answer["folder"])) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_shards_are_those_in_the_index(client, server):
    files = {**NEEDED, **SHARDS, "model.safetensors.index.json": INDEX.encode()}
    files["model-00009-of-00009.safetensors"] = b"stale"
    server.repos[NAME].files = files
    answer, _ = client()
    assert server.fetched() == sorted({*NEEDED, *SHARDS, "model.safetensors.index.json"} - {"model.safetensors"})
    for name, data in SHARDS.items():
        assert (Path(answer["folder"]) / name).read_bytes() == data
    assert client() == (answer, "")
    assert server.fetched() == []


def test_revision(client, server):
    other = COMMIT[::-1]
    server.repos[NAME].revisions["v2"] = other
    assert Path(client(revision="v2")[0]["folder"]).name == other
    assert Path(client()[0]["folder"]).name == COMMIT
    assert Path(client(revision=other)[0]["folder"]).name == other


def test_branch_that_moves_meanwhile(client, server):
    """All files are of one commit, the one that the branch had at first."""
    server.repos[NAME].moves_to = COMMIT[::-1]
    answer, _ = client()
    assert {path.name: path.read_bytes() for path in Path(answer["folder"]).iterdir()} == NEEDED
    assert server.requests and not any(COMMIT[::-1] in line or "main" in line for line in server.requests[1:])


def test_progress_shows_a_bar_of_the_weights(client):
    # TQDM_POSITION=-1 makes the client draw its bars where stderr is no terminal
    answer, stderr = client(progress=True, env={"TQDM_POSITION": "-1"})
    assert "model.safetensors: 100%" in stderr and "folder" in answer
    assert "config.json" not in stderr


def test_no_progress_is_silent(client):
    assert client(progress=False, env={"TQDM_POSITION": "-1"})[1] == ""


def test_bars_that_the_environment_rules(client):
    """The client gives its own variable priority, and would warn of it."""
    _, stderr = client(progress=False, env={"HF_HUB_DISABLE_PROGRESS_BARS": "0"})
    assert "HF_HUB_DISABLE_PROGRESS_BARS" not in stderr
    _, stderr = client(progress=True, env={"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_POSITION": "-1"})
    assert stderr == ""


def test_client_settings_are_restored(client):
    prelude = """
import atexit
from huggingface_hub import utils
before = utils.logging.get_verbosity(), utils.are_progress_bars_disabled()
atexit.register(lambda: print(before == (utils.logging.get_verbosity(), utils.are_progress_bars_disabled())))
"""
    for arguments in ({}, {"revision": "nowhere"}):
        process = subprocess.run(
            [sys.executable, "-c", prelude + CLIENT.format(model=NAME, arguments=arguments)],
            env=client.environment(),
            capture_output=True,
            text=True,
            check=True,
        )
        assert process.stdout.splitlines()[-1] == "True"


# offline and unreachable


def test_offline_from_cache(client, server):
    online, _ = client()
    assert client(env={"HF_HUB_OFFLINE": "1"}) == (online, "")
    assert server.requests == []


def test_offline_without_cache(client, server):
    told(client(env={"HF_HUB_OFFLINE": "1"}), repr(NAME), "HF_HUB_OFFLINE", "cache")
    assert server.requests == []


def test_offline_with_half_a_cache(client, server):
    server.repos[NAME].truncate = "model.safetensors"
    client(prelude=NO_SLEEP)
    told(client(env={"HF_HUB_OFFLINE": "1"}), repr(NAME), "HF_HUB_OFFLINE")


@pytest.fixture
def nowhere():
    """The address of a server that is not running."""
    with socket.socket() as bound:  # and not listening: the port is nobody else's meanwhile
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


def test_server_down_with_cache(client, nowhere):
    online, _ = client()
    assert client(env={"HF_ENDPOINT": nowhere}) == (online, "")


def test_server_down_without_cache(client, nowhere):
    told(client(env={"HF_ENDPOINT": nowhere}), repr(NAME), f"cannot reach {nowhere}", "check the network")


def test_server_fails(client, server):
    server.repos[NAME].status = 503
    told(client(), repr(NAME), "status 503", "later")


def test_truncated_transfer_then_whole(client, server):
    server.repos[NAME].truncate = "model.safetensors"
    told(client(prelude=NO_SLEEP), repr(NAME), "model.safetensors", "broke off", "run again")
    server.repos[NAME].truncate = None
    answer, _ = client()
    assert (Path(answer["folder"]) / "model.safetensors").read_bytes() == NEEDED["model.safetensors"]
    assert server.fetched() == ["model.safetensors"]


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_interrupt_ends_a_download_at_once(client, server):
    server.repos[NAME].slow = "model.safetensors"
    code = "from cuqwen.hub import resolve\nresolve('org/name')"
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=client.environment(), stderr=subprocess.PIPE, text=True
    )
    while not any("/cdn/" in line for line in server.requests):
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.3)  # until it waits for bytes
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert time.monotonic() - start < 5  # the server would trickle for a minute
    assert stderr.splitlines()[-1].startswith("KeyboardInterrupt")


# what the hub refuses


def test_unknown_id(client):
    told(client("org/nobody"), "'org/nobody'", "check the name", "HF_TOKEN", "hf auth login")


def test_private(client, server):
    server.repos[NAME].private = True
    told(client(), repr(NAME), "private", "hf auth login")


def test_gated(client, server):
    server.repos[NAME].gated = True
    told(client(), repr(NAME), "gated", f"{server.endpoint}/{NAME}", "HF_TOKEN", "hf auth login")


def test_refused_token(client):
    told(client(env={"HF_TOKEN": "hf_wrong"}), repr(NAME), "token", "HF_TOKEN")


def test_unknown_revision(client):
    told(client(revision="nowhere"), repr(NAME), "'nowhere'", "branches and tags")


def test_impossible_id(client, server):
    told(client("a--b/c"), "'a--b/c'", "hub id")
    assert server.requests == []


# what the hub holds is not what is needed


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_missing_file(client, server, name):
    del server.repos[NAME].files[name]
    told(client(), repr(NAME), name, "choose another model")
    assert "model.safetensors" not in server.fetched()


def test_missing_shard(client, server):
    shard, absent = SHARDS
    server.repos[NAME].files = {**NEEDED, shard: SHARDS[shard], "model.safetensors.index.json": INDEX.encode()}
    told(client(), repr(NAME), absent)
    assert shard not in server.fetched()  # found before anything large is fetched


@pytest.mark.parametrize(
    "index",
    [
        "",
        "[]",
        "{}",
        '{"weight_map": {}}',
        '{"weight_map": ["model.safetensors"]}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": "../model.safetensors"}}',
        '{"weight_map": {"a": "/tmp/model.safetensors"}}',
        '{"weight_map": {"a": "model.bin"}}',
    ],
)
def test_broken_index(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json: wanted .* weight_map"):
        hub._weight_files(tmp_path)


def test_index_that_is_no_utf8(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match="weight_map"):
        hub._weight_files(tmp_path)


# the disk


def test_too_little_room_is_seen_before_the_download(client, server):
    prelude = """
import shutil, types
shutil.disk_usage = lambda path: types.SimpleNamespace(total=90_000, used=0, free=90_000)
"""
    told(client(prelude=prelude), repr(NAME), "not enough room", "wanted 0.1 MB, available 0.1 MB", "HF_HOME")
    assert "model.safetensors" not in server.fetched()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_disk_fills_up(client, number):
    prelude = f"""
import huggingface_hub.file_download as download
def write(*args, **kwargs):
    raise OSError({number}, "full")
download.http_get = write
"""
    told(client(prelude=prelude), repr(NAME), "not enough room", "available", "HF_HOME")


def test_sizes_in_messages():
    assert hub._in_units(1_519_000_000) == "1.52 GB"
    assert hub._in_units(20_500_000) == "20.5 MB"
    assert hub._free_bytes("/no/such/folder") == hub._free_bytes("/") > 0


@pytest.mark.skipif(os.name != "posix", reason="limits the size of files")
def test_file_size_limit(client):
    prelude = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
    told(client(prelude=prelude), "model.safetensors", "not enough room", "HF_HOME")


def test_cache_that_cannot_be_written(client, tmp_path):
    (tmp_path / "file").write_text("")
    told(client(env={"HF_HOME": str(tmp_path / "file" / "home")}), "cannot write", str(tmp_path / "file"), "HF_HOME")


# folders


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "org" / "name" / "config.json").write_text("{}")
    return tmp_path / "org" / "name"


def test_folder(folder, monkeypatch):
    assert hub.resolve(folder) == folder
    assert hub.resolve(str(folder)) == folder
    monkeypatch.setenv("HOME", str(folder.parent))
    assert hub.resolve("~/name") == folder


def test_folder_wins_over_hub_id(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("org/name").resolve() == folder.resolve()


def test_folder_without_config(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        hub.resolve(tmp_path)


def test_file_instead_of_folder(folder):
    with pytest.raises(CheckpointError, match="wanted a folder, got a file"):
        hub.resolve(folder / "config.json")


@pytest.mark.parametrize(
    "model",
    [
        *("/no/such/folder", "./org/name", "../name", "~/nowhere", "~nobody-here/x", "a/b/c", "org/name/"),
        *("C:\\x", "a b", "word " * 2000, "a\0b", Path("no") / "folder"),
    ],
)
def test_absent_folder(model):
    with pytest.raises(CheckpointError, match="no such folder") as caught:
        hub.resolve(model)
    assert len(str(caught.value)) < 400


def test_demo(folder, tmp_path, monkeypatch):
    assert (hub.DEMO_FOLDER.parent, hub.DEMO_FOLDER.name) == (Path(hub.__file__).parent, "demo")
    monkeypatch.setattr(hub, "DEMO_FOLDER", folder)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()  # "./demo" would name this one
    assert hub.resolve("demo") == folder
    monkeypatch.setattr(hub, "DEMO_FOLDER", tmp_path)
    with pytest.raises(CheckpointError, match="install cuqwen again"):
        hub.resolve("demo")


def test_arguments(folder):
    for model in (None, 3, b"demo"):
        with pytest.raises(TypeError, match=f"got {type(model).__name__}"):
            hub.resolve(model)
    with pytest.raises(ValueError, match="empty"):
        hub.resolve("")
    with pytest.raises(ValueError, match="revision 'main' needs a hub id"):
        hub.resolve(folder, revision="main")


def test_import_is_light():
    code = "import sys, cuqwen.hub; sys.exit('huggingface_hub' in sys.modules)"
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(Path(hub.__file__).parents[1])}
    )
