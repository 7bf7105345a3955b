"""Rotary position embedding: the table of cosines and sines."""

from __future__ import annotations

from typing import Any

import numpy as np


def rope_table(head_dim: int, length: int, theta: float, dtype: Any = np.float32) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of the rotary angles `p * theta**(-2 i / head_dim)` for positions p < `length`.

    Returns (cos, sin), each [length, head_dim / 2] of `dtype`. Frequencies, angles and functions are computed in
    float64 and rounded once: an angle made in float32 would be off by up to 0.008 rad at position 2**18.
    Element i belongs to the pair (i, i + head_dim / 2) of a head. (Su et al., arXiv 2104.09864, eq. 34, with the pairing
    of GPT-NeoX.) Raises ValueError for an odd `head_dim`.
    """
    if head_dim <= 0 or head_dim % 2:
        raise ValueError(f"rope_table: head_dim: wanted an even number from 2, got {head_dim}")
    frequencies = float(theta) ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    angles = np.arange(length, dtype=np.float64)[:, None] * frequencies
    return np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)
