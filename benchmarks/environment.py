"""What `pip install "cuqwen[cuda13]"` puts on the disk: a fresh virtual environment, by package.

    python -m benchmarks.environment [--extra cuda13] [--output benchmarks/results/environment.json]

Needs a package index, no GPU. Sizes are bytes of all files, as `du --apparent-size` counts them, and as the disk stores them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

from benchmarks.record import ROOT, write_record

# Run by the new environment's Python: files of each distribution, by their RECORD
PACKAGES = """
import importlib.metadata, json
print(json.dumps({d.metadata["Name"] + " " + d.version: sum(f.locate().stat().st_size for f in d.files or () if f.locate().exists())
                  for d in importlib.metadata.distributions()}))
"""


def sizes(folder: Path) -> tuple[int, int]:
    """Bytes of all files in `folder`, and what they take on the disk (0 where that is not told, on Windows)."""
    stats = [os.lstat(os.path.join(base, name)) for base, _, names in os.walk(folder) for name in names]
    return sum(stat.st_size for stat in stats), sum(512 * getattr(stat, "st_blocks", 0) for stat in stats)


def measure(folder: Path, extra: str) -> dict[str, Any]:
    started = time.perf_counter()
    venv.create(folder, with_pip=True)
    bare = sizes(folder)[0]
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", f"{ROOT}[{extra}]"], check=True)
    seconds = time.perf_counter() - started
    listed = subprocess.run([python, "-c", PACKAGES], check=True, capture_output=True, text=True).stdout
    packages = json.loads(listed)
    files, disk = sizes(folder)
    largest = dict(sorted(packages.items(), key=lambda item: -item[1]))
    return {
        "extra": extra, "bytes": files, "disk_bytes": disk, "bare_venv_bytes": bare, "seconds": round(seconds, 1),
        "package_bytes": largest,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--extra", default="cuda13")
    parser.add_argument("--output", default="benchmarks/results/environment.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        figures = measure(Path(scratch) / "environment", options.extra)
    for name, size in figures["package_bytes"].items():
        print(f"{size / 1e6:8.1f} MB  {name}")
    print(
        f"{figures['bytes'] / 1e6:8.1f} MB in all, with {figures['bare_venv_bytes'] / 1e6:.1f} MB of a bare environment"
    )
    write_record(options.output, figures)


if __name__ == "__main__":
    sys.exit(main())
