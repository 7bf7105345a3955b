"""The NVIDIA driver, reached without CuPy and without NumPy."""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from typing import Any


@functools.cache
def functions() -> Any:
    """The driver's functions. Raises OSError where there is no driver."""
    return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")


@functools.cache
def wake() -> None:
    """Have a thread begin the first GPU's context, the one that CuPy takes as well, while this one imports and reads. What goes
    wrong there CuPy meets again, and tells."""
    threading.Thread(target=_begin_context, name="cuqwen-driver").start()


def _begin_context() -> None:
    try:
        cuda = functions()
    except OSError:
        return
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if cuda.cuInit(0) == 0 and cuda.cuDeviceGet(ctypes.byref(device), 0) == 0:
        cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
