"""The KV cache: the one place that states its layout.

`keys` and `values` are [L, S, K, D]: for each layer the rows of all positions, each row all KV heads. New rows of a layer
are one contiguous block, so the kernels write k and v straight into it; any run of positions can be read as one piece.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cuqwen.config import Config

Array = Any


class KVCache:
    """Keys and values of the tokens seen so far, for one sequence.

    capacity: rows S, the most tokens that it can hold; length: rows in use. Rows from `length` on are undefined.
    """

    def __init__(
        self, config: Config, capacity: int, dtype: Any, empty: Callable[[tuple[int, ...], Any], Array]
    ) -> None:
        shape = (config.num_hidden_layers, capacity, config.num_key_value_heads, config.head_dim)
        self.keys, self.values = empty(shape, dtype), empty(shape, dtype)
        self.capacity = capacity
        self.length = 0

    def layer(self, index: int) -> tuple[Array, Array]:
        """(keys, values) of a layer, each [S, K, D]."""
        return self.keys[index], self.values[index]

    def take(self, other: KVCache, copy: Callable[[Array, Array], None]) -> None:
        """Begin with the rows of `other`, which fit. copy: copies a contiguous array into another one."""
        rows = other.length
        for target, source in ((self.keys, other.keys), (self.values, other.values)):
            for index in range(len(target) if rows else 0):
                copy(target[index, :rows], source[index, :rows])
        self.length = rows

    @staticmethod
    def bytes_per_token(config: Config, dtype: Any) -> int:
        """Bytes of keys and values that one token takes over all layers."""
        return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * np.dtype(dtype).itemsize
