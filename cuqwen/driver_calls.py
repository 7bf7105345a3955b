"""Calls of the driver that CuPy lacks. Each returns a CUresult: 0 where all is well."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from cuqwen import driver

PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CUlaunchAttributeID
BF16, SWIZZLE_128_BYTES, L2_256_BYTES = 9, 3, 3  # CUtensorMapDataType, CUtensorMapSwizzle, CUtensorMapL2promotion


class _Attribute(ctypes.Structure):  # CUlaunchAttribute
    _fields_ = (("id", ctypes.c_int), ("value", ctypes.c_int * 17))


class _Config(ctypes.Structure):  # CUlaunchConfig
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("number", ctypes.c_uint),
    )


def launch_dependent(
    function: int, grid: tuple[int, ...], block: tuple[int, ...], values: Sequence[Any], shared_bytes: int, stream: int
) -> int:
    """A launch with the attribute that lets the kernel start before those before it have ended. values: the arguments, as
    objects of ctypes."""
    pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
    attribute = _Attribute(PROGRAMMATIC_STREAM_SERIALIZATION)
    attribute.value[1] = 1  # the id is padded to 8 bytes
    sizes = ((ctypes.c_uint * 3)(*(*map(int, dims), 1, 1)[:3]) for dims in (grid, block))
    config = _Config(*sizes, shared_bytes, stream, ctypes.pointer(attribute), 1)
    return int(driver.functions().cuLaunchKernelEx(ctypes.byref(config), ctypes.c_void_p(function), pointers, None))


def encode_tensor_map(place: int, start: int, rows: int, columns: int, box_rows: int) -> int:
    """Writes a CUtensorMap for boxes of `box_rows` rows and 64 columns of a bf16 matrix [rows, columns] at `start` to the 128
    bytes at `place`, a multiple of 64."""
    sizes, pitch = (ctypes.c_uint64 * 2)(columns, rows), (ctypes.c_uint64 * 1)(2 * columns)
    box, steps = (ctypes.c_uint32 * 2)(64, box_rows), (ctypes.c_uint32 * 2)(1, 1)
    return int(
        driver.functions().cuTensorMapEncodeTiled(
            ctypes.c_void_p(place), BF16, 2, ctypes.c_void_p(start), sizes, pitch, box, steps,
            0, SWIZZLE_128_BYTES, L2_256_BYTES, 0,
        )
    )  # fmt: skip
