"""The package as it is shipped: wheel, sdist, editable install and plain checkout, each run from an empty folder."""

import ast
import email
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import cuqwen

ROOT = Path(__file__).resolve().parents[1]
KERNELS = {path.name for path in (ROOT / "kernels").iterdir() if path.suffix in (".cu", ".cuh")}
# What a clone does not have: this folder's own build results, caches and environments
NOT_SOURCE = (".git", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", "venv", ".venv", "*.so")
GENERATE = ("generate", "In the beginning", "--model", "demo", "--temperature", "0", "--max-tokens", "12", "--quiet")
# What a run must have: its own package, and every kernel source with its headers
SELF_CHECK = """
import pathlib, sys, cuqwen
from cuqwen import sources
print(cuqwen.__version__)
print(pathlib.Path(cuqwen.__file__).resolve().parent)
for path in sorted(sources.KERNEL_FOLDER.glob("*.cu")):
    text = sources.source(path.stem)
    assert '#include "' not in text, path
    print(path.name)
"""
# An editable installation that this environment may have stands before the one of the test
FORGET_CUQWEN = """
import os, sys
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "")]
for name in [name for name in sys.modules if name.startswith("__editable__")]:
    del sys.modules[name]  # the finder of another editable cuqwen has the same name
sys.path[:] = [p for p in sys.path if "site-packages" in p or not os.path.isdir(os.path.join(p, "cuqwen"))]
"""


def run(*command, cwd, path=None):
    """Run Python in `cwd` with nothing but `path` added to its module path; return what it prints."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PIP_", "COV_"))}
    env |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1", "OMP_NUM_THREADS": "1"}
    env |= {"PYTHONDONTWRITEBYTECODE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    done = subprocess.run([sys.executable, *command], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def check_installation(path, home, cwd, prologue=""):
    """The package that Python finds with `path` is the one in `home`, is whole, and its demo writes."""
    version, where, *kernels = run("-c", prologue + SELF_CHECK, cwd=cwd, path=path).splitlines()
    assert version == cuqwen.__version__ and Path(where) == Path(home).resolve()
    assert set(kernels) == {name for name in KERNELS if name.endswith(".cu")}
    main = f"{prologue}\nimport runpy; runpy.run_module('cuqwen', run_name='__main__')"
    assert run("-c", main, *GENERATE, cwd=cwd, path=path) == text_of_checkout()


def text_of_checkout():
    return run("-m", "cuqwen", *GENERATE, cwd=ROOT.parent, path=ROOT)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of this repository as a clone would be, so that building leaves nothing here."""
    folder = tmp_path_factory.mktemp("source") / "cuqwen"
    return shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*NOT_SOURCE))


@pytest.fixture(scope="module")
def built(source, tmp_path_factory):
    """Folder with the sdist, and the wheel that was built from nothing but the sdist."""
    folder = tmp_path_factory.mktemp("built")
    if importlib.util.find_spec("build") is None:
        pytest.skip("needs `build` (pip install -e .[test])")
    run("-m", "build", "--no-isolation", "--outdir", folder, source, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(built):
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture
def empty(tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    return folder


# --- wheel and sdist -----------------------------------------------------------------------------------------------


def test_wheel_holds_the_package_and_nothing_else(wheel):
    assert wheel.stat().st_size < 16e6
    assert wheel.name == f"cuqwen-{cuqwen.__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names} == {"cuqwen", f"cuqwen-{cuqwen.__version__}.dist-info"}
    assert {name.removeprefix("cuqwen/kernels/") for name in names if name.startswith("cuqwen/kernels/")} == KERNELS
    modules = {path.relative_to(ROOT / "cuqwen").as_posix() for path in (ROOT / "cuqwen").rglob("*.py")}
    assert modules == {name.removeprefix("cuqwen/") for name in names if name.endswith(".py")}
    assert "cuqwen/py.typed" in names
    for file in ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"):
        assert f"cuqwen/demo/{file}" in names
    assert not [name for name in names if "test" in name or "__pycache__" in name]


def test_wheel_built_from_the_checkout_is_the_same(wheel, source, tmp_path):
    """Without the detour through the sdist, as pip does it for `pip install .`"""
    run("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source, cwd=tmp_path)
    (direct,) = tmp_path.glob("*.whl")
    contents = [
        {name: archive.read(name) for name in archive.namelist() if not name.endswith("/RECORD")}
        for archive in map(zipfile.ZipFile, (direct, wheel))
    ]
    assert contents[0] == contents[1]


def test_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    info = f"cuqwen-{cuqwen.__version__}.dist-info"
    metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
    assert (metadata["Name"], metadata["Version"]) == ("cuqwen", cuqwen.__version__)
    assert metadata["Requires-Python"] == ">=3.10"
    assert "Apache-2.0" in (metadata["License"], metadata["License-Expression"])
    assert set(metadata.get_all("Provides-Extra")) == {"cuda13", "cuda12", "test", "dev"}
    assert any(name.endswith("LICENSE") for name in archive.namelist())
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    names = {line.split(">")[0].split("<")[0].split("=")[0].strip() for line in required}
    assert names == {"numpy", "ml_dtypes", "safetensors", "huggingface_hub", "tokenizers", "jinja2", "tqdm"}
    assert not any(word in line for line in metadata.get_all("Requires-Dist") for word in ("torch", "transformers"))
    for extra in ("cuda12", "cuda13"):
        requirements = [line for line in metadata.get_all("Requires-Dist") if f'"{extra}"' in line]
        assert any(f"cupy-{extra}x" in r for r in requirements) and any("nvrtc" in r for r in requirements)
    assert metadata.get_payload().strip(), "no README in the metadata"


def test_sdist_holds_what_a_builder_needs(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.cfg", "pyproject.toml", "README.md", "LICENSE", "cuqwen/py.typed"} <= names
    assert {f"kernels/{name}" for name in KERNELS} <= names
    assert not [name for name in names if "__pycache__" in name or name.startswith("build/")]


# --- each way to have it runs the demo from an empty folder -----------------------------------------------------------


def test_wheel_runs_from_an_empty_folder(wheel, tmp_path, empty):
    target = tmp_path / "target"
    run("-m", "pip", "install", "--no-deps", "--target", target, wheel, cwd=empty)
    check_installation(target, target / "cuqwen", empty)
    assert run(target / "bin" / "cuqwen", *GENERATE, cwd=empty, path=target) == text_of_checkout()
    assert run(target / "bin" / "cuqwen", "--version", cwd=empty, path=target) == f"cuqwen {cuqwen.__version__}\n"
    assert list(empty.iterdir()) == []  # nothing was left where the user stood


def test_wheel_runs_from_a_folder_that_cannot_be_written(wheel, tmp_path, empty):
    """As in a system-wide installation: the demo is read where it is."""
    target = tmp_path / "target"
    run("-m", "pip", "install", "--no-deps", "--no-compile", "--target", target, wheel, cwd=empty)
    before = {path: path.stat().st_mtime_ns for path in target.rglob("*")}
    assert run("-m", "cuqwen", *GENERATE, cwd=empty, path=target) == text_of_checkout()
    assert {path: path.stat().st_mtime_ns for path in target.rglob("*")} == before


def test_plain_checkout(source, empty):
    check_installation(source, source / "cuqwen", empty)
    assert run("-m", "cuqwen", *GENERATE, cwd=source) == text_of_checkout()


def test_editable_install(source, tmp_path, empty):
    prefix = tmp_path / "prefix"
    options = ("--no-deps", "--no-build-isolation", "--ignore-installed", "--prefix", prefix)
    run("-m", "pip", "install", *options, "-e", source, cwd=empty)
    (site,) = prefix.glob("lib/python*/site-packages")
    if (
        run("-c", FORGET_CUQWEN + "import importlib.util; print(importlib.util.find_spec('cuqwen'))", cwd=empty)
        != "None\n"
    ):
        pytest.skip("cuqwen is installed in this environment, which hides the editable one")
    # .pth files count only in site folders; first in the path, since the finder of any editable cuqwen has the same name
    prologue = FORGET_CUQWEN + f"import site; sys.path.insert(0, {str(site)!r}); site.addsitedir({str(site)!r})\n"
    check_installation(None, source / "cuqwen", empty, prologue)


# --- what `import cuqwen` costs ------------------------------------------------------------------------------------------


def test_import_is_fast_and_light(empty):
    code = (
        "import time; t = time.perf_counter(); import cuqwen; t = time.perf_counter() - t\n"
        "import sys; print(t, *sys.modules)"
    )
    seconds = []
    for _ in range(5):
        second, *modules = run("-c", code, cwd=empty, path=ROOT).split()
        seconds.append(float(second))
        heavy = {"cupy", "tokenizers", "safetensors", "huggingface_hub", "jinja2", "tqdm", "torch", "transformers"}
        assert not heavy & {name.split(".")[0] for name in modules}
    assert min(seconds) < 0.15


def test_operations_need_no_gpu_and_no_file_formats(empty):
    """`import cuqwen; cuqwen.rmsnorm(x, w)` on NumPy arrays."""
    code = (
        "import sys, numpy as np, cuqwen\n"
        "print(cuqwen.rmsnorm(np.array([[3.0, 4.0]]), np.ones(2), 0.0))\n"
        "assert not {'cupy', 'tokenizers', 'safetensors', 'huggingface_hub', 'jinja2'} & set(sys.modules)\n"
    )
    assert run("-c", code, cwd=empty, path=ROOT).split() == ["[[0.84852814", "1.13137085]]"]


def test_public_names():
    assert set(cuqwen.__all__) >= {"load", "CheckpointError", "rmsnorm", "qkv_rope", "qk_norm", "ops"}
    assert set(dir(cuqwen)) >= set(cuqwen.__all__)
    for name in cuqwen.__all__:
        assert getattr(cuqwen, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = cuqwen.no_such_name


# --- the sources -------------------------------------------------------------------------------------------------------


def _unannotated(tree):
    """The functions of a module that lack an annotation, as "line name: what"; `self` and `cls` need none."""
    methods = {
        id(item) for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for item in ast.walk(node)
        if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef)) and item in node.body
        and not any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in item.decorator_list)
    }  # fmt: skip
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        arguments = node.args.posonlyargs + node.args.args
        arguments = arguments[1:] if id(node) in methods else arguments
        arguments += [*node.args.kwonlyargs, *filter(None, (node.args.vararg, node.args.kwarg))]
        for argument in arguments:
            if argument.annotation is None:
                yield f"{node.lineno} {node.name}: {argument.arg}"
        if node.returns is None:
            yield f"{node.lineno} {node.name}: return"


def test_unannotated_functions_are_found():
    source = "class A:\n def f(self, x: int) -> int: pass\n @staticmethod\n def g(x) -> int: pass\ndef h(*a, b=1): pass"
    assert list(_unannotated(ast.parse(source))) == ["5 h: b", "5 h: a", "5 h: return", "4 g: x"]


def test_every_function_is_annotated():
    for path in (ROOT / "cuqwen").rglob("*.py"):
        assert not list(_unannotated(ast.parse(path.read_text(encoding="utf-8")))), path


@pytest.mark.parametrize("command", [("check",), ("format", "--check")], ids=" ".join)
def test_ruff(command):
    if importlib.util.find_spec("ruff") is None:
        pytest.skip("needs ruff (pip install -e .[dev])")
    folders = [
        name for name in ("cuqwen", "tests", "tools", "benchmarks", "studies", "examples") if (ROOT / name).is_dir()
    ]
    run("-m", "ruff", *command, "--no-cache", *folders, cwd=ROOT)  # not README.md, whose examples new releases format
