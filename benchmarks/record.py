"""What every measurement is stored with: GPU, driver, date, commit, command, versions."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from cuqwen import __version__, launch

ROOT = Path(__file__).resolve().parent.parent


def commit() -> str:
    """The commit that is measured: from $CUQWEN_COMMIT where the folder is no git checkout."""
    if "CUQWEN_COMMIT" in os.environ:
        return os.environ["CUQWEN_COMMIT"]
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine() -> dict[str, Any]:
    """GPU, driver and the versions that matter."""
    wanted = ("torch", "transformers", "cupy-cuda13x", "cupy-cuda12x", "numpy")
    found = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions() if d.metadata["Name"]}
    versions = {name: found[name] for name in wanted if name in found} | {"cuqwen": __version__}
    if not launch.has_gpu():
        return {"gpu": None, "driver": None, "versions": versions}
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    name, driver = subprocess.run(query, check=True, capture_output=True, text=True).stdout.splitlines()[0].split(", ")
    return {"gpu": name, "driver": driver, "versions": versions}


def write_record(path: str | Path, figures: dict[str, Any]) -> None:
    """Write `figures` as JSON with what they were measured on."""
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    command = " ".join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
    head = {**machine(), "date": now, "commit": commit(), "command": command}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps({**head, **figures}, indent=2) + "\n", encoding="utf-8")
    print(f"written to {path}")
