"""From what the user calls a model ("demo", a folder, a hub id) to a local folder that holds its checkpoint.

Downloads are the hub client's: its cache, its token, its environment variables (`HF_HOME`, `HF_TOKEN`, `HF_ENDPOINT`,
`HF_HUB_OFFLINE`). What is added here: only the files that are read, nothing begun that the disk cannot hold, and each
failure told in one line.
"""

import errno
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cuqwen.strict_json import CheckpointError

DEMO_FOLDER = Path(__file__).with_name("demo")
INDEX_FILE = "model.safetensors.index.json"
WEIGHT_FILE = "model.safetensors"
_NEEDED_FILES = ("config.json", "tokenizer.json")
_SMALL_FILES = (*_NEEDED_FILES, "generation_config.json", "tokenizer_config.json", "chat_template.jinja", INDEX_FILE)
# "owner/name" or "name"; the client checks the finer rules
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LARGEST_HEADER = 100_000_000  # bytes, the format's own limit
_LOGIN = "set HF_TOKEN or run `hf auth login`"


def resolve(model: str | os.PathLike[str], *, revision: str | None = None, progress: bool = False) -> Path:
    """The local folder of `model`, downloaded first if need be.

    model     "demo" (the checkpoint inside this package), a folder that holds config.json, or a hub id ("owner/name").
              A folder wins over a hub id of the same name.
    revision  branch, tag or commit of a hub id; None is its main branch.
    progress  show the hub client's bars on stderr while weights download. Without it nothing is written, unless
              HF_HUB_DISABLE_PROGRESS_BARS=0 demands it. (The client keeps this setting for the whole process, so it is
              changed for the time of the call.)

    A hub id that is wholly in the cache is not downloaded again; if the hub cannot be reached, the cached copy serves.
    Raises CheckpointError where there is no such checkpoint or it cannot be fetched, TypeError and ValueError for
    arguments that make no sense.
    """
    if not isinstance(model, (str, os.PathLike)):
        raise TypeError(f"model: wanted a folder, a hub id or 'demo', got {type(model).__name__}")
    if not os.fspath(model):
        raise ValueError("model: wanted a folder, a hub id or 'demo', got an empty string")
    folder = _local_folder(model)
    if folder is None:
        return _download(str(model), revision, progress)
    if revision is not None:
        raise ValueError(f"revision {revision!r} needs a hub id, but {os.fspath(model)!r} is the local folder {folder}")
    return folder


def is_local(model: str | os.PathLike[str]) -> bool:
    """Whether `model` is there without a download: "demo", or a folder."""
    if not isinstance(model, (str, os.PathLike)):
        return False
    return model == "demo" or os.path.isdir(os.path.expanduser(os.fspath(model)))


Headers = dict[str, tuple[str, tuple[int, ...], int]]  # tensor: (safetensors' name of its dtype, shape, bytes)


def read_headers(model: str | os.PathLike[str], *, revision: str | None = None) -> tuple[Path, dict[str, Headers]]:
    """(a folder with config.json, the headers of the weight files by file name) of `model`, without reading weights.

    `model` and `revision` as for `resolve`. Of a hub id config.json and the index are downloaded, and of weight files that
    are not in the cache the first bytes. Raises as `resolve` does.
    """
    folder = _local_folder(model)
    if folder is not None:
        folder = resolve(model, revision=revision)
        return folder, {name: _local_header(folder / name) for name in _weight_files(folder)}
    from huggingface_hub import HfApi, snapshot_download

    model_id = str(model)
    with _hub_call(model_id, revision):
        folder = Path(snapshot_download(model_id, revision=revision, allow_patterns=["config.json", INDEX_FILE]))
    if not (folder / "config.json").is_file():
        raise CheckpointError(_lacks_files(model_id, ["config.json"]))
    headers: dict[str, Headers] = {}
    for name in _weight_files(folder):
        if (folder / name).is_file():
            headers[name] = _local_header(folder / name)
            continue
        with _hub_call(model_id, revision, file=name):
            found = HfApi().parse_safetensors_file_metadata(model_id, name, revision=folder.name)
        headers[name] = {
            key: (info.dtype, tuple(info.shape), info.data_offsets[1] - info.data_offsets[0])
            for key, info in found.tensors.items()
        }
    return folder, headers


def _local_header(path: Path) -> Headers:
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > _LARGEST_HEADER:
                raise ValueError(f"a header of {size} bytes")
            entries = json.loads(file.read(size))
        return {
            key: (entry["dtype"], tuple(entry["shape"]), entry["data_offsets"][1] - entry["data_offsets"][0])
            for key, entry in entries.items()
            if key != "__metadata__"
        }
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); download the checkpoint again, or check the permissions"
        ) from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: wanted a safetensors file, got something else ({error}); download it again"
        ) from error


def _local_folder(model: str | os.PathLike[str]) -> Path | None:
    """The folder that `model` means, or None where it can only be a hub id."""
    if model == "demo":
        if not (DEMO_FOLDER / "config.json").is_file():
            raise CheckpointError(f"model 'demo': no config.json in {DEMO_FOLDER}; install cuqwen again")
        return DEMO_FOLDER
    name = os.path.expanduser(os.fspath(model))
    # os.path, because pathlib raises for a name that is too long, such as a prompt given in the model's place
    if os.path.isdir(name):
        if not os.path.isfile(os.path.join(name, "config.json")):
            raise CheckpointError(
                f"folder {name}: wanted a checkpoint with config.json, found none; give the folder that holds it, "
                "with model.safetensors and tokenizer.json beside it"
            )
        return Path(name)
    if os.path.exists(name):
        raise CheckpointError(f"{name}: wanted a folder, got a file; give the folder that holds config.json")
    if isinstance(model, os.PathLike) or not _HUB_ID.fullmatch(model):
        raise CheckpointError(
            f"{_shorten(name)}: there is no such folder, and it is no hub id; give a folder with config.json, "
            "'demo' or a hub id such as Qwen/Qwen3-0.6B"
        )
    return None


def _download(model_id: str, revision: str | None, progress: bool) -> Path:
    """The cache folder of one commit of `model_id`, with every file that is needed in it."""
    from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
    from huggingface_hub.hf_api import RepoFile

    with _hub_call(model_id, revision):
        folder = Path(snapshot_download(model_id, revision=revision, allow_patterns=list(_SMALL_FILES)))
    absent = [name for name in _NEEDED_FILES if not (folder / name).is_file()]
    if absent:
        raise CheckpointError(_lacks_files(model_id, absent))
    missing = [name for name in _weight_files(folder) if not (folder / name).is_file()]
    if not missing:
        return folder
    # By commit, which is the folder's name: the branch may move between the calls.
    commit = folder.name
    with _hub_call(model_id, revision):
        found = HfApi().get_paths_info(model_id, missing, revision=commit)
    sizes = {entry.path: entry.size for entry in found if isinstance(entry, RepoFile)}
    absent = [name for name in missing if name not in sizes]
    if absent:
        raise CheckpointError(_lacks_files(model_id, absent))
    wanted = sum(sizes.values())
    if wanted > _free_bytes(constants.HF_HUB_CACHE):
        raise CheckpointError(f"model {model_id!r}: {_no_room(wanted)}")
    # One after the other in this thread: the client's own pool of threads would keep an interrupt waiting until the
    # files under way are complete, minutes for a large one.
    for name in missing:
        with _hub_call(model_id, revision, progress=progress, file=name, wanted=wanted):
            hf_hub_download(model_id, name, revision=commit)
        wanted -= sizes[name]
    return folder


def _weight_files(folder: Path) -> list[str]:
    """The names of the safetensors files: those in the index, or the only one."""
    index = folder / INDEX_FILE
    if not index.is_file():
        return [WEIGHT_FILE]
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        # a name becomes a path on this machine, so it may only be a plain one
        if not names or not all(re.fullmatch(r"\w[\w.-]*\.safetensors", name, re.ASCII) for name in names):
            raise ValueError
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index}: wanted a JSON object whose weight_map names .safetensors files of the same folder; "
            "the file is broken, delete it and load again"
        ) from error
    return sorted(names)


@contextmanager
def _hub_call(
    model_id: str, revision: str | None, *, progress: bool = False, file: str | None = None, wanted: int | None = None
) -> Iterator[None]:
    """Runs the client silently, but for its bars where `progress` asks for them, and tells its failures in one line.

    file is the file being downloaded, wanted the bytes still to come with it.
    """
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
        logging,
    )

    verbosity, bars = logging.get_verbosity(), not are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its hints on disk space and on the variables below
        logging.set_verbosity_error()  # its remarks on missing tokens and on each new attempt
        try:
            if bars and not progress:
                disable_progress_bars()
            yield
        # Exception, because the client lets through what its HTTP library raises, and it is at its third library.
        except Exception as error:
            where = f"model {model_id!r}" + (f", file {file}" if file else "")
            raise CheckpointError(f"{where}: {_reason(error, model_id, revision, wanted)}") from error
        finally:
            logging.set_verbosity(verbosity)
            if bars and not progress:
                enable_progress_bars()


def _reason(error: Exception, model_id: str, revision: str | None, wanted: int | None) -> str:
    """What happened and what to do next, in one line."""
    from huggingface_hub import constants, errors

    cache, hub = constants.HF_HUB_CACHE, constants.ENDPOINT
    # "not in the cache" is how the client reports every failure to reach the hub; the cause says which
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return (
            f"offline (HF_HUB_OFFLINE is set) and not, or not wholly, in the cache {cache}; unset HF_HUB_OFFLINE "
            "to download it, or give a folder"
        )
    if isinstance(error, errors.GatedRepoError):
        return f"gated; accept its terms at {hub}/{model_id}, then {_LOGIN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"no revision {revision or 'main'!r}; the branches and tags are at {hub}/{model_id}/tree/main"
    if status == 401 and "nvalid credentials" in str(error):
        return f"{hub} refused the access token; {_LOGIN} with a valid one, or unset HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"not on {hub}, or private, and there is no such folder here; check the name "
            f"(for example Qwen/Qwen3-0.6B), or {_LOGIN} for a private model"
        )
    if isinstance(error, errors.HFValidationError):
        return "there is no such folder, and it is no hub id (owner/name); check the name"
    if status is not None:
        return f"{hub} answered with status {status}; try again later, or HF_HUB_OFFLINE=1 for what is in the cache"
    number = getattr(error, "errno", None)
    if number in _FULL_DISK:
        return _no_room(wanted)
    if isinstance(error, OSError) and number is not None and error.filename is not None:
        return f"cannot write {error.filename}: {error.strerror}; set HF_HOME to a folder that can be written"
    told = _shorten(" ".join(str(error).split()))
    what = f"cannot reach {hub}" if wanted is None else f"the download from {hub} broke off"
    return f"{what} ({type(error).__name__}: {told}); check the network and the proxy settings, then run again"


def _lacks_files(model_id: str, names: list[str]) -> str:
    from huggingface_hub import constants

    text = f"model {model_id!r}: wanted a checkpoint in transformers' safetensors form, but it has no "
    text += ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    if constants.HF_HUB_OFFLINE:
        return text + " in the cache; unset HF_HUB_OFFLINE to complete it"
    return text + "; choose another model (GGUF, ONNX and .bin files are not read)"


def _no_room(wanted: int | None) -> str:
    from huggingface_hub import constants

    size = "" if wanted is None else f"wanted {_in_units(wanted)}, "
    return (
        f"not enough room on the disk: {size}available {_in_units(_free_bytes(constants.HF_HUB_CACHE))} in "
        f"{constants.HF_HUB_CACHE}; make room, or set HF_HOME to a folder on a larger disk"
    )


def _free_bytes(folder: str) -> int:
    """Bytes free on the disk of `folder`, which need not exist yet."""
    path = os.path.abspath(folder)
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    return shutil.disk_usage(path).free


def _in_units(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _shorten(text: str, length: int = 200) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
