"""The house holds: an operation is a name, modules import only upwards, CuPy stays in one file."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cuqwen import cuda, ops, reference, sources

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "cuqwen"
OPERATIONS = (
    "embed",
    "rmsnorm",
    "qkv_rope",
    "qk_norm",
    "attention",
    "matmul",
    "swiglu",
    "silu_mul",
    "argmax",
    "sample",
)
ORDER = (
    "strict_json", "yarn", "config", "hub", "checkpoint", "beside", "driver", "driver_calls", "sources", "launch", "staging", "bandwidth", "rope", "sampling", "reference", "tiles", "cuda", "ops", "weights", "cache",
    "model", "memory", "sizes", "prompt", "decode_step", "decode", "bench", "tokenizer", "generate", "thinking", "startup", "api", "commands", "cli",
)  # fmt: skip


def _public_functions(module):
    return {
        name
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    }


def test_every_operation_is_a_kernel_file_and_a_function_in_each_module():
    assert {p.stem for p in sources.KERNEL_FOLDER.glob("*.cu")} == {
        *OPERATIONS,
        "attention_group",
        "attention_mma",
        "attention_wgmma",
        "decode_step",
        "read",
    }  # decode_step is them all
    assert _public_functions(reference) == set(OPERATIONS)
    assert _public_functions(cuda) - {"variants"} == set(OPERATIONS)
    assert _public_functions(ops) - {"backend_of"} == set(OPERATIONS)


@pytest.mark.parametrize("name", OPERATIONS)
def test_one_signature(name):
    signatures = [inspect.signature(getattr(module, name)) for module in (ops, reference, cuda)]
    assert signatures[0] == signatures[1] == signatures[2]


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_has_tests_a_benchmark_and_an_example(name):
    own = ROOT / "tests" / f"test_{name}.py"
    assert f"def test_{name}" in (own if own.exists() else ROOT / "tests" / "test_ops.py").read_text()
    assert f"def {name}(" in (ROOT / "benchmarks" / "ops.py").read_text()
    assert ">>> " in getattr(ops, name).__doc__


@pytest.mark.parametrize("name", OPERATIONS)
def test_kernel_head_names_what_a_reader_needs(name):
    head = (sources.KERNEL_FOLDER / f"{name}.cu").read_text().split("#include")[0]
    for word in ("Entry point", "Arguments", "Constants", "Work", "Precision", "Traffic", "Determinism", "Wrapper"):
        assert re.search(rf"^// {word}", head, re.M), f"{name}.cu: the head lacks {word!r}"


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            if node.module == "cuqwen":
                yield from (f"cuqwen.{alias.name}" for alias in node.names)


def test_modules_import_only_from_modules_above_them():
    files = {p.stem: [p] for p in PACKAGE.glob("*.py") if p.stem not in ("__init__", "__main__")}
    files["commands"] = list((PACKAGE / "commands").glob("*.py"))
    assert files.keys() == set(ORDER)
    for module, paths in files.items():
        imported = {name for path in paths for name in _imports(path) if name.startswith("cuqwen.")}
        used = {name.split(".")[1] for name in imported} - ({"commands"} if module == "commands" else set())
        below = {name for name in used & files.keys() if ORDER.index(name) >= ORDER.index(module)}
        assert not below, f"{module} imports from below: {below}"


def test_cupy_is_imported_in_launch_only_and_no_framework_at_all():
    for path in PACKAGE.rglob("*.py"):
        names = {name.split(".")[0] for name in _imports(path)}
        assert "cupy" not in names or path.stem == "launch"
        # peers: what `cuqwen bench --compare` runs beside
        assert not names & {"torch", "transformers"} or path.stem == "peers"


def test_only_the_command_line_prints():
    for path in PACKAGE.rglob("*.py"):
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        prints = any(isinstance(n.func, ast.Name) and n.func.id == "print" for n in calls)
        assert not prints or path.stem == "cli" or path.parent.name == "commands"


def test_nothing_that_windows_lacks_is_imported_unguarded():
    lacking = {"fcntl", "grp", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty"}
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        guarded = {
            child
            for node in ast.walk(tree)
            if isinstance(node, ast.Try) or (isinstance(node, ast.With) and "ImportError" in ast.unparse(node.items[0]))
            for child in ast.walk(node)
        }
        for node in set(ast.walk(tree)) - guarded:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not lacking & {*names, *([node.module] if isinstance(node, ast.ImportFrom) else [])}, path


def test_nothing_that_windows_lacks_is_called_and_texts_name_their_encoding():
    lacking = {
        "os": "chown fchown fork forkpty geteuid getgid getloadavg getpgid getuid killpg lchown major mkfifo mknod nice openpty "
        "posix_fadvise posix_fallocate pread preadv pwrite sched_getaffinity sendfile setsid statvfs sysconf uname wait",
        "signal": "SIGALRM SIGCHLD SIGHUP SIGKILL SIGPIPE SIGUSR1 SIGUSR2 SIGWINCH alarm pause pthread_sigmask setitimer",
    }
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            where = f"{path.name}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert node.attr not in lacking.get(node.value.id, "").split(), where
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not node.value.startswith(("/tmp", "/dev/")), where
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            opens_text = isinstance(node.func, ast.Name) and name == "open" and "b" not in ast.unparse(node.args[1:2])
            if opens_text or name in ("read_text", "write_text"):
                assert (name == "read_text" and node.args) or "encoding" in {k.arg for k in node.keywords}, where


def test_no_assert_for_what_a_caller_can_cause():
    for path in PACKAGE.rglob("*.py"):
        assert not any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(path.read_text()))), path


def test_docstring_examples():
    import doctest

    results = doctest.testmod(ops)
    assert results.attempted >= 2 * len(OPERATIONS) and results.failed == 0


def test_pasted_sources_point_at_their_files():
    text = sources.source("qkv_rope")
    assert '#include "' not in text and text.count("warp_sum(float x) {") == 1
    lines = text.splitlines()
    where = {}
    name, number = None, 0
    for line in lines:
        if match := re.match(r'#line (\d+) "(.*)"', line):
            number, name = int(match[1]), match[2]
            continue
        where[name, number] = line
        number += 1
    for file in ("kernels/qkv_rope.cu", "kernels/dot.cuh", "kernels/common.cuh"):
        for number, line in enumerate((ROOT / file).read_text().splitlines(), 1):
            if "include" not in line and "#pragma once" not in line:
                assert where[file, number] == line


def test_planted_faults_in_python_can_be_parsed():
    """One that cannot be is noticed by any test, and stops tools/mutation_check.py."""
    script = """
import mutation_check
for fault in mutation_check.FAULTS:
    if fault.file.endswith(".py"):
        text = (mutation_check.ROOT / fault.file).read_text()
        for old, new in fault.edits:
            text = text.replace(old, new)
        compile(text, fault.name, "exec")
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT / "tools", check=True)


def test_planted_faults_are_met_by_tests_that_exist():
    """Parameters included; whether they notice the faults takes tools/mutation_check.py half an hour."""
    table = "import mutation_check; print(*sorted({test for fault in mutation_check.FAULTS for test in fault.tests}), sep='\\n')"
    tests = subprocess.run(
        [sys.executable, "-c", table], cwd=ROOT / "tools", check=True, capture_output=True, text=True
    )
    collect = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run([*collect, *tests.stdout.splitlines()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
