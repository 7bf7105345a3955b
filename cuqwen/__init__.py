"""Qwen3 on one NVIDIA GPU from Python, without PyTorch.

    model = cuqwen.load("Qwen/Qwen3-0.6B")
    print(model.generate([{"role": "user", "content": "Why is the sky blue?"}]))

`cuqwen.rmsnorm`, `cuqwen.qkv_rope`, `cuqwen.qk_norm` and the rest of `cuqwen.ops` take NumPy arrays (computed by the
reference) or CuPy arrays (computed by the kernels). Importing this package loads nothing else until a name is used.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from cuqwen import ops
    from cuqwen.api import Model, load
    from cuqwen.generate import Step
    from cuqwen.launch import DeviceError
    from cuqwen.ops import qk_norm, qkv_rope, rmsnorm
    from cuqwen.rope import rope_table
    from cuqwen.strict_json import CheckpointError

_HOMES = {
    "load": "api",
    "Model": "api",
    "Step": "generate",
    "CheckpointError": "strict_json",
    "DeviceError": "launch",
    "rmsnorm": "ops",
    "qkv_rope": "ops",
    "qk_norm": "ops",
    "rope_table": "rope",
}

__all__ = [
    "CheckpointError", "DeviceError", "Model", "Step", "load", "ops", "qk_norm", "qkv_rope", "rmsnorm", "rope_table",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module("cuqwen.ops")
    if name in _HOMES:
        return getattr(importlib.import_module(f"cuqwen.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'cuqwen' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
