"""Each script in examples/ runs as it stands, on the demo, and says what it is meant to show."""

import re
import subprocess
import sys

import pytest
from terminal import ROOT, environment

SHOWN = {
    "generate": r"\n40 tokens on cpu, [\d,]+ tok/s, finished by length\n$",
    "next_token": r"^And God said, Let there be\n( +\d+\.\d%  '[^\n]+'\n){5}$",
    "operations": r"numpy \(3, 1, 32\) float32\n.*itself only: True\n$",
    "precision": r"a float32 cache: relative error \d\.\de-0[67], .* 100%\n.*a bfloat16 cache: relative error \d\.\de-0[34], .* \d+%\n$",
    "score": r"(-\d+)\.\d\d  Thus saith[^\n]*Israel\n +(-\d+)\.\d\d  [^\n]*\n +(-\d+)\.\d\d  [^\n]*telephone\n$",
}


def test_all_are_here():
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == SHOWN.keys()


@pytest.mark.parametrize("name", SHOWN)
def test_example(name, tmp_path):
    command = [sys.executable, ROOT / "examples" / f"{name}.py"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=tmp_path, timeout=60)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    found = re.search(SHOWN[name], done.stdout, re.S)
    assert found, done.stdout
    if name == "score":
        assert int(found[1]) > int(found[3])  # the King James Bible has no telephone
