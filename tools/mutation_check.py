"""Plants faults one at a time and says which test notices each: proof that the tests can fail.

    python tools/mutation_check.py                      # all, one after another
    python tools/mutation_check.py --jobs 2             # two at a time
    python tools/mutation_check.py --list               # names, files and tests
    python tools/mutation_check.py --only rope-base attention-scale

A fault is a mistake that someone could make, written in tools/faults/ as an exact replacement of text in one file. It is made
in a copy of this checkout in a temporary folder; the checkout itself is not touched. The tests named with it must pass on the
unchanged copy and one of them must fail on the changed one. No GPU is needed: kernels run on the CPU, which takes a C++
compiler.

Exit status: 0 if every fault was noticed; 1 if one survived or its tests were skipped; 2 if the check itself is wrong: a
text that is not found exactly once, a test that fails without the fault, a fault that does not compile.
"""

from __future__ import annotations

import argparse
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from faults import FAULTS, Fault

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = (".git", "build", "dist", "venv", ".venv", "__pycache__", ".*_cache", ".hypothesis", "*.egg-info")
TIME_LIMIT = 600  # seconds for the tests of one fault
# What a fault that is no plausible bug, but a mistake in the table, makes a test say
NO_FAULT = re.compile(r"SyntaxError|IndentationError|NameError|UnboundLocalError|RuntimeError: \S*(g\+\+|clang|zig)")


class ToolError(Exception):
    """The check cannot be trusted as it stands."""


@dataclass(frozen=True)
class Result:
    fault: Fault
    noticed: bool
    by: str  # the test that failed, or why none did
    seconds: float


def changed(fault: Fault, text: str) -> str:
    """`text` with the fault in it; ToolError unless each of its texts is there exactly once."""
    for old, new in fault.edits:
        if (count := text.count(old)) != 1:
            raise ToolError(
                f"{fault.name}: {fault.file}: wanted this text exactly once, found it {count} times: {old!r}"
            )
        text = text.replace(old, new)
    return text


def check_table(faults: Sequence[Fault], root: Path) -> None:
    """ToolError, with everything that is wrong, unless each fault can be planted."""
    wrong = []
    for fault in faults:
        try:
            changed(fault, (root / fault.file).read_text(encoding="utf-8"))
        except (OSError, ToolError) as error:
            wrong.append(str(error))
    if wrong:
        raise ToolError("\n".join(wrong))


@contextmanager
def planted(fault: Fault, root: Path) -> Iterator[None]:
    path = root / fault.file
    text = path.read_text(encoding="utf-8")
    path.write_text(changed(fault, text), encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(text, encoding="utf-8")


def pytest(root: Path, tests: Sequence[str], *options: str) -> tuple[int, str]:
    """Exit status and output of these tests in the checkout `root`."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(root),
        "PYTHONDONTWRITEBYTECODE": "1",  # two faults of one length in one second would look like the same file
        "CUQWEN_TEST_CACHE": str(root.parent / "kernels"),
        "COLUMNS": "300",
    }
    command = [sys.executable, "-m", "pytest", "-q", "--tb=line", "-p", "no:cacheprovider", f"--basetemp={root}.tmp"]
    try:
        done = subprocess.run(
            [*command, *options, *tests], cwd=root, env=environment, capture_output=True, text=True, timeout=TIME_LIMIT
        )
    except subprocess.TimeoutExpired:
        raise ToolError(f"{' '.join(tests)}: not done after {TIME_LIMIT} s") from None
    return done.returncode, done.stdout + done.stderr


def missing(fault: Fault, root: Path) -> list[str]:
    """Those of its tests that are not written."""
    found = []
    for test in fault.tests:
        file, name = test.partition("[")[0].split("::")
        if not (root / file).is_file() or f"def {name}(" not in (root / file).read_text(encoding="utf-8"):
            found.append(test)
    return found


def check_unchanged(faults: Sequence[Fault], root: Path) -> None:
    """ToolError unless the tests of all faults pass as the checkout stands."""
    tests = {test for fault in faults if not missing(fault, root) for test in fault.tests}
    status, output = pytest(root, sorted(tests)) if tests else (0, "")
    if status:
        raise ToolError(f"the tests must pass before faults are planted, pytest says {status}:\n{output[-6000:]}")


def run(fault: Fault, root: Path) -> Result:
    if tests := missing(fault, root):
        return Result(fault, False, f"NOT NOTICED, there is no {' '.join(tests)}", 0.0)
    start = time.monotonic()
    with planted(fault, root):
        status, output = pytest(root, fault.tests, "-x")
    seconds = time.monotonic() - start
    if status < 0:
        return Result(fault, True, f"signal {-status} while running {fault.tests[0]}", seconds)
    failed = re.search(r"^(?:FAILED|ERROR) (\S+(?: \S+)*?)(?: - (.*))?$", output, re.M)
    if status == 1 and failed:
        if NO_FAULT.search(failed[2] or ""):
            raise ToolError(f"{fault.name}: {fault.file}: wanted a wrong result, got {failed[2]}\n{output[-2000:]}")
        return Result(fault, True, failed[1], seconds)
    if status == 0:
        passed = re.search(r"\d+ passed", output)
        return Result(fault, False, f"NOT NOTICED, {passed[0]}" if passed else "NOT RUN, all skipped", seconds)
    raise ToolError(f"{fault.name}: pytest says {status}:\n{output[-3000:]}")


def run_all(faults: Sequence[Fault], jobs: int) -> list[Result]:
    """Every fault in one of `jobs` copies of the checkout; prints a line for each as it is done."""
    results, widths = [], [max(len(getattr(fault, field)) for fault in faults) for field in ("name", "file")]
    with tempfile.TemporaryDirectory(prefix="cuqwen-mutation-") as folder:
        copies: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for i in range(jobs):
            copies.put(shutil.copytree(ROOT, Path(folder) / f"copy{i}", ignore=shutil.ignore_patterns(*LEFT_OUT)))
        first = copies.get()
        check_table(faults, first)
        start = time.monotonic()
        check_unchanged(faults, first)
        print(f"unchanged: all tests pass ({time.monotonic() - start:.1f} s)", flush=True)
        copies.put(first)

        def work(fault: Fault) -> Result:
            root = copies.get()
            try:
                return run(fault, root)
            finally:
                copies.put(root)

        with ThreadPoolExecutor(jobs) as pool:
            for result in pool.map(work, faults):
                by = result.by.replace("tests/", "")
                fault = result.fault
                what = f"{fault.name:{widths[0]}}  {fault.file:{widths[1]}}"
                print(f"{what}  {result.seconds:5.1f} s  {by}", flush=True)
                results.append(result)
    return results


def main() -> int:
    names = [fault.name for fault in FAULTS]
    parser = argparse.ArgumentParser(description="Plants faults one at a time and says which test notices each.")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names, default=names, help="these faults only")
    parser.add_argument("--list", action="store_true", help="list the faults and their tests, plant nothing")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="faults at a time (default: 1)")
    arguments = parser.parse_args()
    faults = [fault for fault in FAULTS if fault.name in arguments.only]
    if len(set(names)) < len(names):
        print("mutation_check: two faults have one name", file=sys.stderr)
        return 2
    if arguments.list:
        for fault in faults:
            print(f"{fault.name}  {fault.file}  {' '.join(fault.tests)}")
        return 0
    start = time.monotonic()
    try:
        results = run_all(faults, max(1, arguments.jobs))
    except ToolError as error:
        print(f"mutation_check: {error}", file=sys.stderr)
        return 2
    survivors = [result.fault.name for result in results if not result.noticed]
    noticed = len(results) - len(survivors)
    print(f"{noticed} of {len(results)} faults noticed in {time.monotonic() - start:.0f} s")
    if survivors:
        print(f"not noticed: {', '.join(survivors)}")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
