"""A checkpoint's JSON files, read strictly: each value has the type that it must have, or a message says where, what was
wanted, what came, and what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

LARGEST_SIZE = 2**31 - 1  # sizes are 32-bit integers in the kernels
PLAIN = "Use a plain dense Qwen3 or Qwen2/Qwen2.5 checkpoint"
DAMAGED = "Download the checkpoint again, or correct this key"


class CheckpointError(ValueError):
    """Something is wrong with a checkpoint's files. One line: what and where, wanted, got, what to do next."""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file `path`. Raises CheckpointError if it cannot be read, parsed, or is no object."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}). Check the file and its permissions"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: broken JSON ({error}). Download this file again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: wanted a JSON object, got {short(value)}. Download this file again")
    return value


class Keys:
    """Typed reading of a parsed JSON object; each failure names the file and the key."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def fail(self, key: str, wanted: str, value: Any, remedy: str = DAMAGED) -> NoReturn:
        raise CheckpointError(f"{self.where}: {key}: wanted {wanted}, got {short(value)}. {remedy}")

    def required(self, key: str, wanted: str) -> Any:
        if self.values.get(key) is None:
            state = "null" if key in self.values else "no such key"
            raise CheckpointError(f"{self.where}: {key}: wanted {wanted}, got {state}. {DAMAGED}; it is not guessed")
        return self.values[key]

    def integer(self, key: str, at_most: int = LARGEST_SIZE) -> int:
        wanted = f"an integer from 1 to {at_most}"
        value = self.required(key, wanted)
        if type(value) is not int or not 1 <= value <= at_most:
            self.fail(key, wanted, value)
        return value

    def positive(self, key: str) -> float:
        wanted = "a finite number > 0"
        value = self.required(key, wanted)
        if type(value) not in (int, float) or not 0 < value < 1e38:  # fits float32; false for NaN
            self.fail(key, wanted, value)
        return float(value)

    def boolean(self, key: str) -> bool:
        value = self.required(key, "true or false")
        if type(value) is not bool:
            self.fail(key, "true or false", value)
        return value

    def choice(self, key: str, choices: tuple[str, ...], remedy: str) -> str:
        wanted = " or ".join(json.dumps(name) for name in choices)
        value = self.required(key, wanted)
        if value not in choices:
            self.fail(key, wanted, value, f"This is not computed here. {remedy}")
        return value

    def token_ids(self, key: str, vocab_size: int) -> tuple[int, ...]:
        """One id, a list of ids, or nothing: null and absent both mean none."""
        value = self.values.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(type(token) is not int or not 0 <= token < vocab_size for token in ids):
            self.fail(key, f"an id or a list of ids, each from 0 to vocab_size - 1 = {vocab_size - 1}", value)
        return tuple(ids)


def short(value: Any) -> str:
    """`value` as JSON would show it, or in Python's form where JSON has none, on one line and cut to 100 characters."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        try:
            text = " ".join(repr(value).split())
        except (ValueError, RecursionError):  # an integer with thousands of digits
            text = f"a {type(value).__name__} too long to show"
    return text if len(text) <= 100 else text[:97] + "..."
