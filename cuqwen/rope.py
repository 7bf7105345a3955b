"""Rotary position embedding: the table of cosines and sines."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cuqwen.yarn import Yarn

_BLOCK = 1 << 14  # positions computed at a time: bounds the float64 angles


def rope_table(
    head_dim: int, length: int, theta: float, dtype: Any = np.float32, *, scaling: Yarn | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of the rotary angles `p * theta**(-2 i / head_dim)` for positions p < `length`.

    Returns (cos, sin), each [length, head_dim / 2] of `dtype`. Frequencies, angles and functions are computed in
    float64 and rounded once: an angle made in float32 would be off by up to 0.008 rad at position 2**18.
    Element i belongs to the pair (i, i + head_dim / 2) of a head. (Su et al., arXiv 2104.09864, eq. 34, with the pairing
    of GPT-NeoX.) Raises ValueError for an odd `head_dim`.

    With `scaling` (YaRN: Peng et al., arXiv 2309.00071) the pairs that turn less than beta_slow times over the original
    context turn `factor` times slower, those that turn more than beta_fast times as before, those between by a share that
    is linear in i; all cosines and sines are multiplied by attention_factor.
    """
    if head_dim <= 0 or head_dim % 2:
        raise ValueError(f"rope_table: head_dim: wanted an even number from 2, got {head_dim}")
    frequencies = float(theta) ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is not None:
        kept = _kept(head_dim, theta, scaling)
        frequencies = frequencies * kept + frequencies / scaling.factor * (1 - kept)
    tables = np.empty((2, length, head_dim // 2), dtype)
    for first in range(0, length, _BLOCK):
        angles = np.arange(first, min(first + _BLOCK, length), dtype=np.float64)[:, None] * frequencies
        for table, function in zip(tables, (np.cos, np.sin), strict=True):
            values = function(angles)
            table[first : first + _BLOCK] = values if scaling is None else values * scaling.attention_factor
    return tables[0], tables[1]


def _kept(head_dim: int, theta: float, yarn: Yarn) -> np.ndarray:
    """How much of its own frequency each pair keeps: float64 [head_dim / 2], from 1 for the fast ones down to 0."""

    def pair(turns: float) -> float:
        """The pair, as a real number, that turns so often over the original context."""
        wave_length = yarn.original_max_position_embeddings / (2 * math.pi * turns)
        return head_dim * math.log(wave_length) / (2 * math.log(theta))

    low, high = pair(yarn.beta_fast), pair(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:  # as in transformers: a step, not a ramp
        high += 0.001
    return 1 - np.clip((np.arange(head_dim // 2) - low) / (high - low), 0, 1)
